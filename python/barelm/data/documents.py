"""Documents from files, one at a time: text, JSONL and parquet, plain or compressed, a folder of them, standard input.

Memory does not grow with the files: text is read in blocks, JSONL by lines, parquet by a few rows.  Nothing is changed
and nothing is lost without a word: bytes come as they are, and what is refused is counted and named.
"""

import glob
import gzip
import hashlib
import json
import os
import sys
import sysconfig
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

__all__ = ["Counts", "Document", "Documents"]

PART = 4 << 20  # bytes; a longer document comes in parts of about this size
MAX_LINE = 64 << 20  # bytes of a JSONL line
ROWS = 256  # of a parquet file at a time
NAMED = 5  # of the refused, and of those that are not UTF-8, how many are remembered by name

MADE_BY_US = {"run.json", "dataset.json"}  # a run or a dataset is in the folder that has one of them
# Not text about Python but its tests, its editor's innards, tables of characters (an eighth of all bytes), what others
# installed, and what the build left behind.
STDLIB_SKIP = {"test", "tests", "idlelib", "idle_test", "encodings", "site-packages", "dist-packages", "__pycache__"}
STDLIB_SKIP_PREFIX = ("_sysconfigdata", "__phello__")


class Document(NamedTuple):
    """A text, or a part of a very long one.

    name     of the file, below the source and with "/"; ":17" after it is the line, the row or the place in the file,
             from 1; the parts of one text have one name
    data     its bytes exactly as they are in the file, of JSONL and parquet the UTF-8 of the string
    begins   False: the later part of a very long text; it goes on where the part before it ended
    """

    name: str
    data: bytes
    begins: bool = True


@dataclass
class Counts:
    """What a pass over documents has met so far.  The parts of a long document count as one."""

    documents: int = 0
    bytes: int = 0  # of text
    empty: int = 0
    refused: int = 0  # lines, rows and files
    refused_first: list[tuple[str, str]] = field(default_factory=list)  # (name, why)
    not_utf8: int = 0  # documents with bytes that are not UTF-8; they are kept
    not_utf8_first: list[str] = field(default_factory=list)
    longest: tuple[str, int] = ("", 0)  # (name, bytes)
    _hash: "hashlib._Hash" = field(default_factory=hashlib.sha256, repr=False)
    _length: int = 0  # bytes of the document so far
    _is_utf8: bool = True  # the document so far

    @property
    def hash(self) -> str:
        """sha256 over the bytes of the documents and where each ends: equal for equal text, wherever it lies."""
        return self._hash.hexdigest()

    def add(self, document: Document) -> None:
        if document.begins:
            self.documents, self._length, self._is_utf8 = self.documents + 1, 0, True
        self.bytes += len(document.data)
        self._hash.update(bytes([document.begins]) + hashlib.sha256(document.data).digest())
        self._length += len(document.data)
        if self._length > self.longest[1]:
            self.longest = (document.name, self._length)
        if self._is_utf8 and not _is_utf8(document.data):
            self._is_utf8 = False
            self.not_utf8 += 1
            self.not_utf8_first += [document.name] * (self.not_utf8 <= NAMED)

    def refuse(self, name: str, why: str) -> None:
        self.refused += 1
        self.refused_first += [(name, why)] * (self.refused <= NAMED)


def _is_utf8(data: bytes) -> bool:
    try:
        return data.isascii() or bool(data.decode("utf-8"))
    except UnicodeDecodeError:
        return False


class Documents:
    """The documents of a source, in an order that depends on names alone; each `for` is a new pass with new counts.

    source    what is read, for people
    size      bytes of its files as they lie on the disk; None: nobody knows (standard input)
    counts    of the pass that runs, or ran last
    done      bytes of files that this pass has behind it
    """

    def __init__(
        self, data: str | os.PathLike | Sequence[str] | None = None, *, field: str = "text", split_at: str = ""
    ):
        """data    a file, a folder (everything below it, without what is hidden), a pattern ("books/**/*.txt"), "-" for
                  standard input; several of them as a list, or with commas between them (unless a file has that very
                  name); None or "": the Python standard library of this interpreter

        By the ending of its name a file is
          .jsonl .ndjson    one document a line, the string in `field`
          .parquet          one document a row, the string in the column `field` (needs barelm[data])
          anything else     text: one document, or several with `split_at` ("<|endoftext|>") between them
        and the first and the last of these may be compressed: .gz, .zst (needs barelm[data]).

        FileNotFoundError: no such path.  ValueError: neither a file nor a folder, or a pattern that nothing matches.
        While it is read: OSError and ValueError name a file that cannot be read, or is damaged or cut off.
        """
        if not isinstance(split_at, str) or not isinstance(field, str) or not field:
            raise ValueError("field and split_at: must be strings, and field not empty")
        self.field, self._split_at = field, split_at.encode("utf-8", "surrogateescape")
        names = _sources(data)
        self.source = "the Python standard library" if names is None else ", ".join(names)
        self._files = _stdlib() if names is None else [file for name in names for file in _find(name)]
        sizes = [os.stat(path).st_size for _, path in self._files if path != "-"]
        self.size = sum(sizes) if len(sizes) == len(self._files) else None
        self.counts, self._finished, self._position = Counts(), 0, _nowhere
        self._stdin_is_read = False

    @property
    def done(self) -> int:
        return self._finished + self._position()

    def __iter__(self) -> Iterator[Document]:
        self.counts, self._finished, self._position = Counts(), 0, _nowhere
        return self._read_all(self.counts)

    def _read_all(self, counts: Counts) -> Iterator[Document]:
        for name, path in self._files:
            for document in self._read(name, path, counts):
                if document.data:
                    counts.add(document)
                    yield document
                else:
                    counts.empty += 1
            self._finished, self._position = self._finished + self._position(), _nowhere

    def _read(self, name: str, path: str, counts: Counts) -> Iterator[Document]:
        stem, compression = os.path.splitext(name.lower())
        if compression not in (".gz", ".zst"):
            stem, compression = name.lower(), ""
        if stem.endswith(".parquet"):
            if compression:
                counts.refuse(name, f"a parquet file inside {compression} is not read")
                return
            yield from self._parquet(name, path, counts)
            return
        with self._open(path, compression) as file:
            if stem.endswith((".jsonl", ".ndjson")):
                yield from _json_lines(name, file, self.field, counts)
            else:
                yield from _text(name, file, self._split_at, counts)

    @contextmanager
    def _open(self, path: str, compression: str) -> Iterator[BinaryIO]:
        """The bytes of a file.  What goes wrong while it is read names the file."""
        if path == "-":
            if self._stdin_is_read:
                raise ValueError("-: standard input can be read only once")
            self._stdin_is_read = True
            yield sys.stdin.buffer
            return
        decompressor, errors = _decompressor(path, compression)
        try:
            with open(path, "rb") as raw:
                self._position = lambda: 0 if raw.closed else raw.tell()
                with decompressor(raw) as file:
                    yield file
                self._position = _at(os.fstat(raw.fileno()).st_size)
        except errors as error:
            raise ValueError(f"{path}: damaged or cut off ({error})") from None
        except OSError as error:
            raise _named(error, path) from None

    def _parquet(self, name: str, path: str, counts: Counts) -> Iterator[Document]:
        pa = _parquet(path)
        size = os.stat(path).st_size
        try:
            with pa.parquet.ParquetFile(path, pre_buffer=False) as file:
                _check_column(path, pa, file.schema_arrow, self.field)
                row, rows = 0, file.metadata.num_rows
                for batch in file.iter_batches(ROWS, columns=[self.field]):
                    for value in _values(pa, batch.column(0)):
                        row += 1
                        if value is None:
                            counts.refuse(f"{name}:{row}", f"{self.field} is null")
                        else:
                            yield from _in_parts(f"{name}:{row}", value)
                    self._position = _at(size * row // max(rows, 1))
        except pa.ArrowException as error:
            raise ValueError(f"{path}: damaged, or not a parquet file ({_first_line(error)})") from None
        except OSError as error:
            raise _named(error, path) from None
        self._position = _at(size)


def _decompressor(path: str, compression: str) -> tuple[Callable, tuple]:
    """What makes a readable file of a compressed one, and what it raises where that is damaged."""
    if compression == ".gz":
        return (lambda raw: gzip.GzipFile(fileobj=raw)), (EOFError, zlib.error, gzip.BadGzipFile)
    if compression == ".zst":
        zstd = _zstd(path)
        return zstd.ZstdFile, (EOFError, zstd.ZstdError)
    return nullcontext, ()


def _nowhere() -> int:
    return 0


def _at(position: int) -> Callable[[], int]:
    return lambda: position


def _named(error: OSError, path: str) -> OSError:
    """The same error with the name of the file."""
    if error.filename is not None:
        return error
    return (
        OSError(f"{path}: {_first_line(error)}") if error.errno is None else OSError(error.errno, error.strerror, path)
    )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


# ---- which files ----


def _sources(data: str | os.PathLike | Sequence[str] | None) -> list[str] | None:
    """The names in `data`; None: the standard library."""
    if data is None or data == "":
        return None
    if isinstance(data, str | os.PathLike):
        data = os.fspath(data)
        names = data.split(",") if "," in data and not os.path.exists(data) else [data]
    else:
        names = [os.fspath(name) for name in data]
    if not names or not all(names):
        raise ValueError(f"data: a name is empty in {data!r}")
    return names


def _find(source: str) -> list[tuple[str, str]]:
    """(name, path) of every file of one source, sorted by name."""
    if source == "-":
        return [("-", "-")]
    path = Path(source)
    if path.is_dir():
        return _below(path, sorted(_walk(path, skip=lambda name: name.startswith("."))))
    if path.is_file():
        return [(path.name, str(path))]
    if path.exists():
        raise ValueError(f"{source}: neither a file nor a folder")
    if not glob.has_magic(source):
        raise FileNotFoundError(f"{source}: no such file or folder")
    found = [Path(name) for name in glob.glob(source, recursive=True)]
    root = _root(source)
    names = sorted({path.relative_to(root).as_posix() for path in found if path.is_file()})
    if not names:
        raise FileNotFoundError(f"{source}: no file matches")
    return _below(root, names)


def _root(pattern: str) -> Path:
    """The folder before the first wildcard."""
    parts = Path(pattern).parts
    fixed = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    return Path(*parts[:fixed])


def _below(root: Path, names: list[str]) -> list[tuple[str, str]]:
    return [(name, str(root / name)) for name in names]


def _stdlib() -> list[tuple[str, str]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    names = []
    if root.is_dir():
        names = [
            name
            for name in _walk(root, skip=lambda name: name in STDLIB_SKIP)
            if name.endswith(".py") and not name.rsplit("/", 1)[-1].startswith(STDLIB_SKIP_PREFIX)
        ]
    if not names:
        raise ValueError(f"{root}: this Python keeps no .py files of its standard library there; name a text to read")
    return _below(root, sorted(names))


def _walk(root: Path, skip: Callable[[str], bool]) -> Iterator[str]:
    """Paths, relative to root and with "/", of the regular files below it; runs and datasets of ours are no text."""

    def fail(error: OSError) -> None:
        raise error

    for folder, folders, files in os.walk(root, onerror=fail):
        if MADE_BY_US & set(files):
            folders.clear()
            continue
        folders[:] = sorted(name for name in folders if not skip(name))
        for name in files:
            path = Path(folder, name)
            if not skip(name) and path.is_file():  # a pipe or a socket would block the reader
                yield path.relative_to(root).as_posix()


# ---- what is in a file ----


def _text(name: str, file: BinaryIO, split_at: bytes, counts: Counts) -> Iterator[Document]:
    """The documents of a text file.  A zero byte at its beginning: it is none; further on: that part is refused."""
    number, whole = 1, True  # whole: what comes next goes on from what was given last
    for i, (data, begins) in enumerate(_pieces(file, split_at)):
        number += begins and i > 0
        if b"\0" in data:
            if i == 0:
                counts.refuse(name, "has a zero byte: not text")
                return
            counts.refuse(f"{name}:{number}" if split_at else name, "a part of it has a zero byte: not text")
            whole = False
        else:
            yield Document(f"{name}:{number}" if split_at else name, data, begins or not whole)
            whole = True


def _pieces(file: BinaryIO, split_at: bytes) -> Iterator[tuple[bytes, bool]]:
    """(data, begins): what lies between the separators, and of that what is very long in parts.  Where the parts are
    cut depends on the bytes alone, not on how they come."""
    rest, begins, first = b"", True, True
    while block := _block(file):
        *complete, rest = (rest + block).split(split_at) if split_at else [rest + block]
        for data in complete:
            yield from _cut(data, begins)
            begins, first = True, False
        while len(rest) - len(split_at) > PART:  # the beginning of a separator may be at the end
            at = _place_to_cut(rest)
            yield rest[:at], begins
            rest, begins, first = rest[at:], False, False
    if rest or first:
        yield from _cut(rest, begins)


def _block(file: BinaryIO) -> bytes:
    """PART bytes, or what there is until the end.  In steps: inside one long read of a pipe Ctrl-C could go unheard."""
    found, size = [], 0
    while size < PART and (step := file.read1(PART - size)):
        found.append(step)
        size += len(step)
    return b"".join(found)


def _cut(data: bytes, begins: bool = True) -> Iterator[tuple[bytes, bool]]:
    while len(data) > PART:
        at = _place_to_cut(data)
        yield data[:at], begins
        data, begins = data[at:], False
    if data or begins:
        yield data, begins


def _place_to_cut(data: bytes) -> int:
    """After the last line end before PART; where lines are too long for that, between two characters."""
    at = 1 + data.rfind(b"\n", PART // 2, PART)
    if at == 0:
        at = character_start(data, PART)
    return at


def character_start(data: bytes, at: int) -> int:
    """The place at or, by up to 3 bytes, before `at` where no UTF-8 character is cut; `at` where there is none."""
    return next((i for i in range(at, max(at - 4, 0), -1) if i == len(data) or data[i] & 0xC0 != 0x80), at)


def _in_parts(name: str, data: bytes) -> Iterator[Document]:
    return (Document(name, part, begins) for part, begins in _cut(data))


def _json_lines(name: str, file: BinaryIO, key: str, counts: Counts) -> Iterator[Document]:
    number = 0
    while line := file.readline(MAX_LINE + 1):
        number += 1
        where = f"{name}:{number}"
        if len(line) > MAX_LINE:
            while line and not line.endswith(b"\n"):
                line = file.readline(PART)
            counts.refuse(where, f"the line has more than {MAX_LINE >> 20} MiB")
            continue
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line.strip():
            counts.empty += 1
            continue
        try:
            data = _field_of(line, key)
        except ValueError as error:
            counts.refuse(where, str(error))
        else:
            yield from _in_parts(where, data)


def _field_of(line: bytes, key: str) -> bytes:
    """The string in one field of a JSON object, as UTF-8.  Bytes that are not UTF-8 stay what they are."""
    try:
        value = json.loads(line.decode("utf-8", "surrogateescape"))
    except RecursionError:
        raise ValueError("not JSON (nested too deeply)") from None
    except ValueError as error:
        raise ValueError(f"not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"not an object but a {type(value).__name__}")
    if key not in value:
        raise ValueError(f"no field {key!r}")
    if not isinstance(value[key], str):
        raise ValueError(f"{key} is not a string but a {type(value[key]).__name__}")
    try:
        return value[key].encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # half of a surrogate pair, written as \ud800
        return value[key].encode("utf-8", "surrogatepass")


def _check_column(path: str, pa, schema, name: str) -> None:
    if name not in schema.names:
        raise ValueError(f"{path}: no column {name!r} (it has {', '.join(schema.names)})")
    kind = schema.field(name).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    binary = (pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(), pa.binary_view())
    if kind not in binary:
        raise ValueError(f"{path}: the column {name!r} holds no strings but {kind}")


def _values(pa, column) -> list[bytes | None]:
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    return column.cast(pa.large_binary()).to_pylist()


# ---- libraries that are not always there ----


def _zstd(path: str):
    """Python 3.14's compression.zstd, or its backport: unlike the others they notice a file that was cut off."""
    try:
        if sys.version_info >= (3, 14):
            from compression import zstd
        else:
            from backports import zstd
    except ImportError:
        raise _missing(path) from None
    return zstd


def _parquet(path: str):
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise _missing(path) from None
    return pyarrow


def _missing(path: str) -> ImportError:
    return ImportError(f"{path}: to read such a file, pip install 'barelm[data]'")
