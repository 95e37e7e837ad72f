"""GGUF, the file: named values, then tensors, as llama.cpp's specification has it (versions 2 and 3, little-endian).

Which values and tensors a model has is told in gguf.py.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from .binary import Binary
from .numbers import fits, n_bytes
from .output import Tensor, write_parts
from .source import CheckpointError, Stored

__all__ = ["MAGIC", "Array", "Header", "Tensor", "read", "write"]

MAGIC = b"GGUF"
U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)  # types of values
NUMBERS = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "B", U64: "Q", I64: "q", F64: "d"}
TENSOR_TYPES = {0: "F32", 1: "F16", 8: "Q8_0", 28: "F64", 30: "BF16"}
OTHER_TENSOR_TYPES = {
    **{2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K"},
    **{15: "Q8_K", 16: "IQ2_XXS", 20: "IQ4_NL", 23: "IQ4_XS"},
}
ALIGNMENT = 32
MAX_NAME = 256  # bytes; the specification has 65535 for keys and 64 for tensors, real ones are shorter than 64
MAX_DIMENSIONS = 4


# ---- reading ------------------------------------------------------------------------------------------------------


class Array(NamedTuple):
    """An array among the values, which stays in the file until it is asked for."""

    path: Path
    key: str
    type: int
    count: int
    offset: int

    def strings(self) -> list[str]:
        """CheckpointError: they are no strings."""
        with Binary(self.path) as file:
            if self.type != STRING:
                raise file.error(f"{self.key}: strings are expected")
            file.skip(self.offset, self.key)
            return file.texts(self.count, self.key)

    def numbers(self) -> np.ndarray:
        """CheckpointError: they are no numbers."""
        with Binary(self.path) as file:
            if self.type not in NUMBERS:
                raise file.error(f"{self.key}: numbers are expected")
            file.skip(self.offset, self.key)
            unit = np.dtype("<" + NUMBERS[self.type])
            return np.frombuffer(file.take(self.count * unit.itemsize, self.key), unit)


class Header(NamedTuple):
    path: Path
    values: dict[str, object]  # int, float, bool, str or Array
    tensors: dict[str, Stored]


def read(path: Path) -> Header:
    """CheckpointError: it is no such file, or damaged."""
    with Binary(path) as file:
        if file.take(4, "header") != MAGIC:
            raise file.error("is no GGUF file")
        version = file.numbers("I", "header")[0]
        if version not in (2, 3):
            big = version == int.from_bytes((3).to_bytes(4, "little"), "big")
            raise file.error("is big-endian" if big else f"is GGUF version {version}, must be 2 or 3")
        n_tensors, n_values = file.numbers("2Q", "header")
        values: dict[str, object] = {}
        for i in range(n_values):
            key = _name(file, f"value {i}")
            if key in values:
                raise file.error(f"{key}: comes twice")
            values[key] = _value(file, key)
        infos = [_info(file, i) for i in range(_bounded(file, n_tensors, 24, "tensors"))]
        start = _aligned(file.at, _alignment(file, values))
        tensors: dict[str, Stored] = {}
        for name, dimensions, kind, offset in infos:
            if name in tensors:
                raise file.error(f"{name}: comes twice")
            tensors[name] = _stored(file, name, dimensions, kind, start + offset)
    return Header(path, values, tensors)


def _bounded(file: Binary, n: int, size: int, what: str) -> int:
    """A count of things of at least `size` bytes each."""
    if n > file.left // size:
        raise file.error(f"{what}: there would be {n:,}, the file has {file.left:,} bytes left")
    return n


def _name(file: Binary, what: str) -> str:
    length = file.numbers("Q", what)[0]
    if not 0 < length <= MAX_NAME:
        raise file.error(f"{what}: its name would have {length:,} bytes")
    return file.text(length, what)


def _value(file: Binary, key: str) -> object:
    kind = file.numbers("I", key)[0]
    if kind in NUMBERS:
        number = file.numbers(NUMBERS[kind], key)[0]
        return bool(number) if kind == BOOL else _shortest(number) if kind == F32 else number
    if kind == STRING:
        return file.text(file.numbers("Q", key)[0], key)
    if kind != ARRAY:
        raise file.error(f"{key}: has type {kind}, which there is not")
    kind, count = file.numbers("IQ", key)
    start = file.at
    if kind in NUMBERS:
        size = struct.calcsize(NUMBERS[kind])
        file.skip(_bounded(file, count, size, key) * size, key)
    elif kind == STRING:
        file.skip_texts(_bounded(file, count, 8, key), key)
    else:
        raise file.error(f"{key}: is an array of type {kind}, must be of numbers or strings")
    return Array(file.path, key, kind, count, start)


def _shortest(number: float) -> float:
    """The shortest decimal that is this float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(number)))


def _info(file: Binary, i: int) -> tuple[str, tuple[int, ...], int, int]:
    name = _name(file, f"tensor {i}")
    n = file.numbers("I", name)[0]
    if not 0 < n <= MAX_DIMENSIONS:
        raise file.error(f"{name}: has {n} dimensions, must have 1 to {MAX_DIMENSIONS}")
    dimensions = file.numbers(f"{n}Q", name)
    kind, offset = file.numbers("IQ", name)
    return name, dimensions, kind, offset


def _alignment(file: Binary, values: Mapping[str, object]) -> int:
    n = values.get("general.alignment", ALIGNMENT)
    if type(n) is not int or not 1 <= n <= 1 << 20 or n & (n - 1):
        raise file.error(f"general.alignment: is {n!r:.40}, must be a power of two")
    return n


def _aligned(at: int, alignment: int) -> int:
    return -(-at // alignment) * alignment


def _stored(file: Binary, name: str, dimensions: tuple[int, ...], kind: int, offset: int) -> Stored:
    if kind not in TENSOR_TYPES:
        named = OTHER_TENSOR_TYPES.get(kind, f"number {kind}")
        raise file.error(f"{name}: has type {named}, must be one of {', '.join(TENSOR_TYPES.values())}")
    shape, kind = dimensions[::-1], TENSOR_TYPES[kind]  # the file's begin with the one whose values are neighbours
    if not fits(shape, kind) or (kind == "Q8_0" and len(shape) != 2):
        raise file.error(f"{name}: rows of {shape[-1]} values are no whole units of {kind}")
    if math.prod(shape) < 1 or offset + n_bytes(shape, kind) > file.size:
        raise file.error(f"{name}: shape {shape} at byte {offset:,} is not within the file's {file.size:,} bytes")
    return Stored(file.path, offset, kind, shape)


# ---- writing ------------------------------------------------------------------------------------------------------


def write(file: BinaryIO, values: Mapping[str, object], tensors: list[Tensor]) -> None:
    """A whole file.  values: bool, str, int (as uint32), float (as float32), lists of str, and arrays of int32 or
    float32."""
    file.write(MAGIC + struct.pack("<IQQ", 3, len(tensors), len(values)))
    for key, value in values.items():
        file.write(_string(key) + _packed(value))
    offset = 0
    codes = {name: code for code, name in TENSOR_TYPES.items()}
    for tensor in tensors:
        n = len(tensor.shape)
        form = f"<I{n}QIQ"
        file.write(_string(tensor.name) + struct.pack(form, n, *tensor.shape[::-1], codes[tensor.kind], offset))
        offset = _aligned(offset + n_bytes(tensor.shape, tensor.kind), ALIGNMENT)
    for tensor in tensors:
        file.write(bytes(-file.tell() % ALIGNMENT))
        write_parts(file, tensor)
    file.write(bytes(-file.tell() % ALIGNMENT))  # llama.cpp expects the last one whole too


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _packed(value: object) -> bytes:
    """Type and content."""
    if isinstance(value, bool):
        return struct.pack("<IB", BOOL, value)
    if isinstance(value, int):
        return struct.pack("<II", U32, value)
    if isinstance(value, float):
        return struct.pack("<If", F32, value)
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _string(value)
    if isinstance(value, np.ndarray):
        kind = {"i": I32, "f": F32}[value.dtype.kind]
        return struct.pack("<IIQ", ARRAY, kind, len(value)) + value.astype("<" + NUMBERS[kind]).tobytes()
    return struct.pack("<IIQ", ARRAY, STRING, len(value)) + b"".join(map(_string, value))


def is_gguf(path: Path) -> bool:
    try:
        with Binary(path) as file:
            return file.take(4, "header") == MAGIC
    except CheckpointError:
        return False
