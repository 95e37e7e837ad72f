"""What a run tells: a progress line, its logs, and report.md with its curves."""

import hashlib
import importlib.util
import json
import math
import os
import re
import sys
import time
from pathlib import Path

from .curve import curve_svg

__all__ = ["Bar", "Board", "Log", "Progress", "Reading", "count", "duration", "printable", "write_file", "write_report"]


# ---- numbers for people -------------------------------------------------------------------------------------------


def count(n: float, unit: str = "") -> str:
    """1234567 -> "1.23 M"; with a unit, "1.23 MB"."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(n) >= factor:
            return f"{n / factor:.3g} {prefix}{unit}" if abs(n) < 999.5 * factor else f"{n / factor:.0f} {prefix}{unit}"
    return f"{n:.3g} {unit}".rstrip()


def duration(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, s = divmod(max(0, round(seconds)), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"


def printable(text: str) -> str:
    """What a model writes may hold control sequences that would take over a terminal; only line ends and tabs pass."""
    return "".join(c if c in "\n\t" or not (ord(c) < 32 or 127 <= ord(c) < 160) else "\ufffd" for c in text)


def write_file(path: Path, text: str) -> None:
    """Write a whole small file or leave the old one: never half of one, even where the power goes."""
    part = path.with_name(path.name + ".part")
    with open(part, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


# ---- the log ------------------------------------------------------------------------------------------------------


class Log:
    """log.jsonl: one JSON object a line, each with the `step` it belongs to (updates done so far).

    A resumed run gives the step it resumes from: later records are dropped, for they will be written again, and so is a
    last line that a crash cut in half.  With the `mark` of that time it is as long as it was then, and if it is another
    one that is a ValueError; a log that was removed begins anew.
    """

    def __init__(self, path: str | os.PathLike, resume: int | None = None, mark: dict | None = None):
        self.path = Path(path)
        self.records: list[dict] = []
        self._sha256 = hashlib.sha256()
        if resume is not None and self.path.exists():
            self._take(resume, mark)
        write_file(self.path, "".join(_line(record) for record in self.records))
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115  (lives as long as the run)

    def _take(self, resume: int, mark: dict | None) -> None:
        records = read_log(self.path)
        self.records = records[: mark["lines"]] if mark else [r for r in records if r["step"] <= resume]
        for record in self.records:
            self._sha256.update(_line(record).encode())
        if mark and self.mark() != mark:
            raise ValueError(
                f"{self.path}: was altered after it was written (its checksum differs); if you remove it, the run goes "
                "on with a new one"
            )

    def mark(self) -> dict:
        """What a checkpoint keeps of the log: how many lines there are, and their sha256."""
        return {"lines": len(self.records), "sha256": self._sha256.hexdigest()}

    def write(self, step: int, **values: object) -> None:
        record = {"step": step, **values}
        line = _line(record)
        self._file.write(line)
        self._file.flush()  # whoever follows the file sees whole lines
        self._sha256.update(line.encode())
        self.records.append(record)

    def sync(self) -> None:
        """On the disk, so that a checkpoint never knows more than its log."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def column(self, name: str) -> list[tuple[int, float]]:
        """(step, value) of the records that have the value."""
        return [(record["step"], record[name]) for record in self.records if name in record]


def _line(record: dict) -> str:
    return json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"


def read_log(path: Path) -> list[dict]:
    """The records of a log; a torn last line is left out.  ValueError: any other line is no record."""
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    records = []
    for i, line in enumerate(lines[:-1]):  # what follows the last newline is nothing, or torn
        try:
            record = json.loads(line)
            if not isinstance(record["step"], int):
                raise TypeError
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ValueError(f"{path}: line {i + 1} is not a record of a run") from None
        records.append(record)
    return records


class Board:
    """The numbers of a log as TensorBoard's event files."""

    def __init__(self, folder: Path, step: int):
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._pb, self._events = summary_pb2, event_pb2
        self._writer = EventFileWriter(str(folder))
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)  # what a stopped run did later is hidden
        self._writer.add_event(event_pb2.Event(wall_time=time.time(), step=step + 1, session_log=start))

    @classmethod
    def open(cls, folder: Path, step: int) -> "Board | None":
        """None where the package is not installed."""
        return cls(folder, step) if importlib.util.find_spec("tensorboard") else None

    def write(self, step: int, values: dict[str, object]) -> None:
        numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
        summary = self._pb.Summary(value=[self._pb.Summary.Value(tag=n, simple_value=v) for n, v in numbers.items()])
        self._writer.add_event(self._events.Event(wall_time=time.time(), step=step, summary=summary))

    def close(self) -> None:
        self._writer.close()


# ---- progress -----------------------------------------------------------------------------------------------------


class Progress:
    """A bar on a terminal, plain lines elsewhere: step, loss, tokens/s, share of peak, time left.

    unit     what comes before the name of each step
    flops    floating-point operations per token; None: the share of peak is not shown
    peak     what this machine reached in a test, FLOP/s
    done     share of the run that lies behind already (a resumed run); the time left counts from there
    """

    PLAIN_SECONDS = 5.0  # between two plain lines
    MEMORY = 0.95  # how much of the speed average the past keeps each step

    def __init__(
        self, console, flops: float | None = None, peak: float | None = None, done: float = 0.0, unit: str = "step "
    ):
        self._console, self._flops, self._peak, self._first, self._unit = console, flops, peak, done, unit
        self._start = time.perf_counter()
        self._tokens = self._seconds = 0.0
        self._last_plain = -math.inf
        self._bar = _rich_bar(console) if console.is_terminal else None
        self._task = self._bar.add_task("", total=1.0, completed=done, text="") if self._bar else None

    def __enter__(self) -> "Progress":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    @property
    def tokens_per_second(self) -> float:
        return self._tokens / self._seconds if self._seconds else 0.0

    @property
    def mfu(self) -> float | None:
        """Share of the measured peak that the counted operations reach (model FLOPs utilisation, arXiv:2204.02311)."""
        return self.tokens_per_second * self._flops / self._peak if self._flops and self._peak else None

    def update(self, step: str, done: float, loss: float, tokens: int, seconds: float) -> None:
        """After each step: its name ("12/100"), the share done, its loss, and how long its tokens took."""
        self._tokens = self.MEMORY * self._tokens + tokens
        self._seconds = self.MEMORY * self._seconds + seconds
        parts = [f"loss {loss:.3f}", f"{self.tokens_per_second:,.0f} tokens/s"]
        if self.mfu is not None:
            parts.append(f"{self.mfu:.0%} of peak")
        left = self._left(done)
        if left is not None:
            parts.append(f"{duration(left)} left")
        if self._bar:
            self._bar.update(self._task, completed=done, description=f"{self._unit}{step}", text="  ".join(parts))
        elif time.perf_counter() - self._last_plain >= self.PLAIN_SECONDS or done >= 1:
            self._last_plain = time.perf_counter()
            self.say(f"{self._unit}{step}  " + "  ".join(parts))

    def say(self, text: str) -> None:
        """A line above the bar."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _left(self, done: float) -> float | None:
        spent = time.perf_counter() - self._start
        return spent * (1 - done) / (done - self._first) if done > self._first else None


class Bar:
    """Progress of work that is no training: a bar with a text on a terminal, the text now and then elsewhere."""

    PLAIN_SECONDS = 5.0  # between two lines

    def __init__(self, console):
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as RichProgress

        columns = (BarColumn(bar_width=24), TextColumn("{task.fields[text]}"))
        self._screen, self._start = console, time.perf_counter()
        self._last = self._start
        self._bar = RichProgress(*columns, console=console, transient=True)
        self._task = self._bar.add_task("", total=None, text="")

    def __enter__(self):
        if self._screen.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._screen.is_terminal:
            self._bar.stop()

    def show(self, text: str, done: float, total: float | None) -> None:
        if self._screen.is_terminal:
            self._bar.update(self._task, total=total, completed=done, text=text)
        elif time.perf_counter() - self._last >= self.PLAIN_SECONDS:
            self._last = time.perf_counter()
            self._screen.print(text, markup=False, highlight=False, soft_wrap=True)


class Reading(Bar):
    """Documents that become tokens: how many, MB/s and the time left."""

    def __call__(self, documents, tokens: int) -> None:
        counts, spent = documents.counts, time.perf_counter() - self._start
        parts = [f"{counts.documents:,} documents", count(counts.bytes, "B"), f"{count(tokens)} tokens"]
        parts.append(count(counts.bytes / max(spent, 1e-9), "B/s"))
        done = documents.done / documents.size if documents.size else math.nan
        if done > 0:
            parts.append(f"{duration(spent * (1 - done) / done)} left")
        self.show("  ".join(parts), documents.done, documents.size)


def _rich_bar(console):
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as RichProgress

    return RichProgress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[text]}"),
        console=console,
        refresh_per_second=4,
    )


def console(stderr: bool = False):
    """A rich console; on standard error where standard output is for a program to read."""
    from rich.console import Console

    return Console(file=sys.stderr if stderr else sys.stdout)


# ---- the report ---------------------------------------------------------------------------------------------------


def write_report(folder: Path, title: str, facts: dict[str, str], log: Log, closing: str = "") -> None:
    """report.md, curve.svg and lr.svg of a run folder, from what its log holds.

    facts   {name: value} of the table at the top.  closing: the last paragraph, in Markdown.
    """
    write_file(folder / "curve.svg", curve_svg(_losses(log), log.column("val_loss"), title))
    rates = curve_svg(log.column("lr"), (), title, "learning rate", names=("rate", ""), memory=0)
    write_file(folder / "lr.svg", rates)
    out = [f"# {title}", "", "| | |", "|---|---|"]
    out += [f"| {name} | {_cell(value)} |" for name, value in facts.items()]
    out += ["", "![training and validation loss](curve.svg)", "", "![learning rate](lr.svg)", ""]
    out += [*_evaluations(log), *_skipped(log), *_samples(log)]
    write_file(folder / "report.md", "\n".join([*out, closing]).rstrip() + "\n")


def _cell(text: str) -> str:
    return " ".join(str(text).replace("|", "\\|").split())


def _losses(log: Log) -> list[tuple[int, float]]:
    """Of the steps that were made: an outlier would flatten all the rest of the curve."""
    return [(r["step"], r["loss"]) for r in log.records if "loss" in r and "skipped" not in r]


def _skipped(log: Log, most: int = 20) -> list[str]:
    rows = log.column("skipped")
    out = ["## Skipped steps", ""] if rows else []
    out += [f"- {step:,}: {why}" for step, why in rows[-most:]]
    return [*out, ""] if rows else []


def _evaluations(log: Log, most: int = 12) -> list[str]:
    rows = [record for record in log.records if "bits_per_byte" in record]
    if not rows:
        return []
    gap = -(-len(rows) // most)
    shown = [row for i, row in enumerate(rows) if i % gap == 0 or i == len(rows) - 1]
    return [
        "## Held-out text",
        "",
        "| step | loss (nats per token) | bits per byte |",
        "|---:|---:|---:|",
        *(f"| {row['step']:,} | {row['val_loss']:.4f} | {row['bits_per_byte']:.4f} |" for row in shown),
        "",
    ]


def _samples(log: Log, most: int = 6) -> list[str]:
    rows = [record for record in log.records if "sample" in record][-most:]
    out = ["## Samples", ""] if rows else []
    for row in rows:
        text = row["prompt"] + row["sample"]
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))  # longer than any inside
        out += [f"After step {row['step']:,}:", "", fence, text, fence, ""]
    return out
