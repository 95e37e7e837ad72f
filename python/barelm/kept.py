"""Results of an evaluation that are kept: a folder of its own, which a later run of the same command goes on with.

items.jsonl    one JSON object for each item that is done, in order
summary.json   what the results are of (`of`: the weights, the files, the flags that count), whether all is done, and
               then the result
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from . import checkpoint
from .report import Bar, console, duration, write_file

__all__ = ["Kept", "evals_folder", "weights_digest"]

ITEMS, SUMMARY = "items.jsonl", "summary.json"
AT_ONCE = 32  # items that are made and then kept together


def weights_digest(folder: str | os.PathLike) -> str:
    """sha256 of a checkpoint's config and weights, whatever files hold them: equal for models that compute the same."""
    source = checkpoint.open_weights(folder)
    sha256 = hashlib.sha256(json.dumps(source.config.to_dict(), sort_keys=True).encode())
    for name in sorted(source.shapes):
        sha256.update(name.encode())
        for rows in source.rows(name):
            sha256.update(np.ascontiguousarray(rows).data)
    return sha256.hexdigest()


def evals_folder(folder: Path, out: str) -> Path:
    """Where the results of a checkpoint go: `out`; or evals/step_N in the folder of its run; or evals in its own."""
    if out:
        return Path(out)
    folder = Path(folder).absolute()
    return folder.parent / "evals" / folder.name if (folder.parent / "run.json").is_file() else folder / "evals"


class Kept:
    """The results in one folder.

    records   those of the items that are done, in order
    of        {what: value} that results must share so that they may be counted together

    ValueError: what is there is of something else, which is never mixed nor overwritten, or is damaged.  A last line
    that a crash cut in half is dropped.
    """

    def __init__(self, folder: Path, of: Mapping[str, object]):
        self.folder, self._of = Path(folder), json.loads(json.dumps(dict(of)))
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(error.errno, f"{error.strerror}; --out names another folder", str(self.folder)) from None
        self.records = self._read() if self._is_ours() else []
        self._write_summary({}, done=False)
        write_file(self.folder / ITEMS, "".join(map(_line, self.records)))

    def _is_ours(self) -> bool:
        """Whether results are there.  ValueError: they are of something else."""
        path = self.folder / SUMMARY
        if not path.exists():
            if (self.folder / ITEMS).exists():
                raise ValueError(f"{self.folder / ITEMS}: there is no {SUMMARY} that says whose results these are")
            return False
        try:
            of = json.loads(path.read_bytes())["of"]
            other = [what for what in self._of.keys() | of.keys() if self._of.get(what) != of.get(what)]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise ValueError(f"{path}: is no summary of results") from None
        if other:
            raise ValueError(
                f"{self.folder}: holds results with other {', '.join(sorted(other))}; --out names another folder for "
                "these"
            )
        return True

    def _read(self) -> list[dict]:
        path, records = self.folder / ITEMS, []
        lines = path.read_bytes().split(b"\n") if path.exists() else [b""]
        for number, line in enumerate(lines[:-1], 1):  # what follows the last newline is nothing, or torn
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                record = None
            if not isinstance(record, dict) or record.get("item") != number - 1:
                raise ValueError(f"{path}: line {number} is not the result of item {number - 1}")
            records.append(record)
        return records

    def go_on(
        self, n: int, make: Callable[[slice], list[dict]], says: Callable[[list[dict]], str] = lambda records: ""
    ) -> list[dict]:
        """The records of the items 0 .. n - 1, with progress on standard error; what is kept already is not made again.

        make   the records of some items
        says   what is told of those that are there, beside the progress
        Ctrl-C: what is made is kept, and a line says so.
        """
        began, start, screen = time.perf_counter(), len(self.records), console(stderr=True)
        with Bar(screen) as bar:
            try:
                while (done := len(self.records)) < n:
                    self.add(make(slice(done, min(done + AT_ONCE, n))))
                    done = len(self.records)
                    left = duration((time.perf_counter() - began) * (n - done) / (done - start))
                    bar.show(f"{done:,} of {n:,} items  {says(self.records)}  {left} left", done, n)
            except KeyboardInterrupt:
                said = f"{len(self.records):,} of {n:,} items are kept in {self.folder}; the same command goes on there"
                screen.print(said, markup=False, highlight=False, soft_wrap=True)
                raise
        return self.records[:n]

    def add(self, records: Sequence[Mapping]) -> None:
        """The next items' results, on the disk at once."""
        records = [{"item": len(self.records) + i, **record} for i, record in enumerate(records)]
        with open(self.folder / ITEMS, "a", encoding="utf-8") as file:
            file.write("".join(map(_line, records)))
            file.flush()
            os.fsync(file.fileno())
        self.records += records

    def finish(self, result: Mapping) -> None:
        self._write_summary(result, done=True)

    def _write_summary(self, result: Mapping, done: bool) -> None:
        summary = {"of": self._of, "done": done, **result}
        write_file(self.folder / SUMMARY, json.dumps(summary, indent=1, allow_nan=False) + "\n")


def _line(record: Mapping) -> str:
    return json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"
