"""Folders that appear whole or not at all, and the checksums of what is in them."""

import ctypes
import glob
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

__all__ = ["digest", "digest_of", "whole_folder"]


@contextmanager
def whole_folder(folder: str | os.PathLike, is_ours: Callable[[Path], bool], what: str) -> Iterator[Path]:
    """A hidden folder to write into; once the block is left without an error, `folder` is replaced by it in one step.

    is_ours   whether an existing folder is one that may be replaced (an empty one always may)
    what      what such a folder is called, for the message
    FileExistsError if the folder holds something else; where the block raises, nothing has changed and nothing is left.
    """
    folder = Path(folder).absolute()
    if folder.exists() and not (folder.is_dir() and (is_ours(folder) or not any(folder.iterdir()))):
        raise FileExistsError(f"{folder}: exists and is no {what}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(folder)
    part = folder.parent / f".{folder.name}.{os.getpid()}.part"
    part.mkdir()
    try:
        yield part
        for path in part.iterdir():
            _sync(path)
        _sync(part)
        _publish(part, folder)
    except OSError as error:
        if error.filename is None and error.errno is not None:  # a full disk does not say which
            raise OSError(error.errno, error.strerror, str(folder)) from None
        raise
    finally:
        shutil.rmtree(part, ignore_errors=True)


def digest(path: Path) -> dict:
    """{"bytes", "sha256"} of a file."""
    with open(path, "rb") as f:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(f, "sha256").hexdigest()}


def digest_of(values: Mapping) -> str:
    """sha256 of a JSON object without its entry "sha256", which is to hold it."""
    rest = {k: v for k, v in values.items() if k != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _remove_leftovers(folder: Path):
    """Unfinished folders of processes that were killed while they wrote here."""
    for part in folder.parent.glob(f".{glob.escape(folder.name)}.*.part"):
        pid = part.name.split(".")[-2]
        if pid == str(os.getpid()) or (pid.isdecimal() and not _lives(int(pid))):
            shutil.rmtree(part, ignore_errors=True)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


def _sync(path: Path):
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _publish(part: Path, folder: Path):
    """Give the finished folder its name.  An older one changes places with it, so that at no instant there is none."""
    if not folder.exists() or not any(folder.iterdir()):
        os.rename(part, folder)
    elif not _exchange(part, folder):
        old = part.with_suffix(".old")
        os.rename(folder, old)
        try:
            os.rename(part, folder)
        except OSError:
            os.rename(old, folder)
            raise
        shutil.rmtree(old, ignore_errors=True)
    _sync(folder.parent)


def _exchange(a: Path, b: Path) -> bool:
    """Linux's renameat2 with RENAME_EXCHANGE; False where the system or the file system has none."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    at_cwd, exchange = -100, 2
    return rename is not None and rename(at_cwd, os.fsencode(a), at_cwd, os.fsencode(b), exchange) == 0
