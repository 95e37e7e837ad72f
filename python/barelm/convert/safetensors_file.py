"""safetensors, alone or in shards: where each tensor lies, and a writer that never holds more than a part of one.

A file is the length of a header (8 bytes), the header (JSON: name, dtype, shape and place of each tensor), and their
bytes without gaps.  Of several files an index, `model.safetensors.index.json`, says which holds what.  We read headers
ourselves, since NumPy has no bfloat16 for the safetensors package to give; the bytes are then checked as strictly.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from .numbers import KINDS, n_bytes
from .output import Tensor, write_parts
from .source import CheckpointError, Stored, file_size

__all__ = ["INDEX", "SINGLE", "Tensor", "read", "read_index", "shards", "write"]

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATS = ("F32", "F16", "BF16", "F64")
MAX_HEADER = 100_000_000  # bytes: the format's own limit
MAX_INDEX = 64 << 20
MAX_NAME = 255  # of a file


# ---- reading ------------------------------------------------------------------------------------------------------


def read(path: Path) -> dict[str, Stored]:
    """{name: where it lies} of one file, also of what is no float.  CheckpointError: it is damaged."""
    size = file_size(path)
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER):
                raise ValueError(f"its header would have {length} bytes, the file has {size}")
            header = json.loads(file.read(length), object_pairs_hook=_no_twins)
        if not isinstance(header, dict):
            raise ValueError("its header is no object")
        header.pop("__metadata__", None)
        places = [_place(name, entry) for name, entry in header.items()]
        _check_places(places, size - 8 - length)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    return {p.name: Stored(path, 8 + length + p.begin, p.dtype, p.shape) for p in places}


class _Place(NamedTuple):
    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def _no_twins(pairs: list[tuple[str, object]]) -> dict:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a name comes twice in its header")
    return values


def _whole(value: object, what: str) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError(f"{what} is {value!r:.40}")
    return value


def _place(name: str, entry: object) -> _Place:
    what = f"the entry of {name[:80]}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{what} has other fields than dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or not isinstance(shape, list) or not isinstance(offsets, list) or len(offsets) != 2:
        raise ValueError(f"{what} is damaged")
    shape = tuple(_whole(n, f"{what}: a size") for n in shape)
    begin, end = (_whole(n, f"{what}: an offset") for n in offsets)
    if dtype in KINDS and dtype not in FLOATS:  # GGUF's, which this format does not know
        raise ValueError(f"{what}: its dtype is {dtype}")
    if len(shape) > 8:
        raise ValueError(f"{what}: has {len(shape)} dimensions")
    return _Place(name, dtype[:16], shape, begin, end)


def _check_places(places: list[_Place], size: int) -> None:
    """They follow each other without gaps until the end of the file, each as long as its shape says."""
    at = 0
    for place in sorted(places, key=lambda place: (place.begin, place.end)):
        if place.begin != at or place.end < place.begin:
            raise ValueError(f"{place.name[:80]} does not begin where the tensor before it ends")
        if place.dtype in FLOATS and place.end - place.begin != n_bytes(place.shape, place.dtype):
            raise ValueError(f"{place.name[:80]} has {place.end - place.begin} bytes, which is not its shape's")
        at = place.end
    if at != size:
        raise ValueError(f"its tensors have {at} bytes, the file has {size}")


def read_index(path: Path) -> dict[str, Stored]:
    """{name: where it lies} of all files that an index names, which lie beside it."""
    try:
        if file_size(path) > MAX_INDEX:
            raise ValueError("too large for an index")
        index = json.loads(path.read_bytes(), object_pairs_hook=_no_twins)
        files = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
            raise ValueError("weight_map is no object of file names")
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    found: dict[str, Stored] = {}
    for name in sorted(set(files.values())):
        if not name.endswith(".safetensors") or os.path.basename(name) != name or len(name) > MAX_NAME:
            raise CheckpointError(f"{path}: {name[:80]!r} is no safetensors file of this folder")
        shard = read(path.parent / name)
        other = next((key for key in shard if files.get(key) != name), None)
        if other is not None:
            raise CheckpointError(f"{path}: does not say that {other[:80]} is in {name}")
        found |= shard
    lost = next((key for key in files if key not in found), None)
    if lost is not None:
        raise CheckpointError(f"{path}: says that {lost[:80]} is in {files[lost]}, which lacks it")
    return found


# ---- writing ------------------------------------------------------------------------------------------------------


def shards(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Names in groups of at most `limit` bytes each, in their order; a larger one alone."""
    groups: list[list[str]] = [[]]
    full = 0
    for name, size in sizes.items():
        if groups[-1] and full + size > limit:
            groups.append([])
            full = 0
        groups[-1].append(name)
        full += size
    return groups


def write(path: Path, tensors: list[Tensor]) -> None:
    """One file, its tensors in the order given."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for tensor in tensors:
        size = n_bytes(tensor.shape, tensor.kind)
        header[tensor.name] = {
            "dtype": tensor.kind,
            "shape": list(tensor.shape),
            "data_offsets": [at, at + size],
        }
        at += size
    data = json.dumps(header, separators=(",", ":")).encode()
    data += b" " * (-len(data) % 8)
    with open(path, "wb") as file:
        file.write(len(data).to_bytes(8, "little") + data)
        for tensor in tensors:
            write_parts(file, tensor)
