"""What an ONNX model reads from files beside it, and why some of that must not be read.

A tensor of a model may name any file and any bytes of it, and ONNX Runtime maps what it names. So
the models of an artifact are looked at before a session opens them: tensors lie in the artifact's
own files beside the model, inside of those, each in bytes of its own and as many as its type has.
The wire format of protobuf is read here, since run.py, which has this text too, does without onnx.
Field numbers and element types are those of onnx.proto.
"""

from __future__ import annotations

import itertools
import math
import os
import pathlib
import stat
from collections.abc import Collection, Iterator
from typing import Any

TENSOR = "tensor"
INNER = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: TENSOR, 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: TENSOR, 6: "graph", 10: TENSOR, 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: TENSOR, 2: TENSOR},
}
"""For each kind of message the fields that hold others which may hold tensors."""
DIMS, DATA_TYPE, NAME, EXTERNAL, LOCATION = 1, 2, 8, 13, 14
"""Fields of a TensorProto."""
BITS = {
    1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64, 14: 64,
    15: 128, 16: 16, 17: 8, 18: 8, 19: 8, 20: 8, 21: 4, 22: 4, 23: 4, 24: 8, 25: 2, 26: 2,
}  # fmt: skip
"""Bits of an element, by the number of its type."""
DEPTH, RANK = 64, 64
"""Graphs inside of graphs, and axes of a tensor, at most."""
SAID = frozenset({"location", "offset", "length", "checksum"})
"""What may be said of a place. ONNX Runtime takes more: where matrices lie that it has repacked."""
LARGEST_TAG = (1 << 32) - 1
"""Of a field. ONNX Runtime takes the low 32 bits of a larger one, other readers refuse it."""


def check_external(folder: str | pathlib.Path, model: str, files: Collection[str]) -> None:
    """Refuse a model of `folder` that reads what it must not; `files` are those of the artifact.

    Raises ValueError, in one sentence, and OSError where the model cannot be read.
    """
    folder = pathlib.Path(folder)
    if model not in files:
        raise ValueError(f"the model {model!r} is no file of the artifact")
    if not model.endswith(".onnx"):  # by which ONNX Runtime tells formats apart
        raise ValueError(f"the model {model!r} is not called .onnx")
    data, beside = (folder / model).read_bytes(), pathlib.PurePosixPath(model).parent
    held: dict[str, list[tuple[int, int, str]]] = {}
    for tensor in external_tensors(data, model):
        name, location = tensor["name"], tensor["location"]
        told = f"{model}: the data of {name!r:.80}"
        path = str(beside / location)
        if not location or location != pathlib.PurePosixPath(location).name or location == "..":
            raise ValueError(
                f"{told} lies in {location!r:.80}, which is no name of a file beside it"
            )
        if path not in files:
            raise ValueError(f"{told} lies in {location!r:.80}, which is no file of the artifact")
        start, size = tensor["offset"], tensor["length"]
        whole = _size(folder / path, told)
        if start + size > whole:
            raise ValueError(f"{told} ends at byte {start + size} of {path}, which has {whole}")
        if size != tensor["bytes"]:
            raise ValueError(
                f"{told} is {size} bytes, and its type and shape take {tensor['bytes']}"
            )
        if size:
            held.setdefault(path, []).append((start, start + size, name))
    for path, parts in held.items():
        parts.sort()
        for (_, end, first), (start, _, second) in itertools.pairwise(parts):
            if start < end:
                raise ValueError(f"{model}: {first!r:.80} and {second!r:.80} share bytes of {path}")


def external_tensors(data: bytes, model: str = "the model") -> Iterator[dict[str, Any]]:
    """The tensors of a model whose bytes lie in files, with what is said of them.

    Raises ValueError where the bytes are no model, or what is said is no place in a file.
    """
    for fields in _messages(memoryview(data), "model", 0, model):
        external = fields.get(EXTERNAL, [])
        if not external and 1 not in fields.get(LOCATION, []):
            continue
        name = _text(fields.get(NAME, [b""])[-1])
        said = dict(_pair(entry, model) for entry in external)
        strange = said.keys() - SAID
        if strange:
            raise ValueError(f"{model}: of the data of {name!r:.80} is said {min(strange)!r:.80}")
        kind = (fields.get(DATA_TYPE) or [0])[-1]
        if kind not in BITS:
            raise ValueError(f"{model}: {name!r:.80} is of type {kind}, which lies in no file")
        dims = [d for field in fields.get(DIMS, []) for d in _numbers(field, model)]
        size = -(-math.prod(dims[:RANK]) * BITS[kind] // 8)
        start, length = _number(said.get("offset", "0")), _number(said.get("length", str(size)))
        if len(dims) > RANK or min(start, length, *dims) < 0:
            raise ValueError(
                f"{model}: {name!r:.80} has an offset, a length or a shape that is none"
            )
        yield {
            "name": name, "location": said.get("location", ""),
            "offset": start, "length": length, "bytes": size,
        }  # fmt: skip


def _messages(data: memoryview, kind: str, depth: int, model: str) -> Iterator[dict[int, Any]]:
    """The fields of each tensor in a message of this kind."""
    if depth > 4 * DEPTH:
        raise ValueError(f"{model} holds graphs in graphs, deeper than {DEPTH}")
    if kind == TENSOR:
        fields: dict[int, Any] = {}
        for field, value in _fields(data, model):
            if field in (DIMS, DATA_TYPE, NAME, EXTERNAL, LOCATION):
                fields.setdefault(field, []).append(value)
        yield fields
        return
    inner = INNER[kind]
    for field, value in _fields(data, model):
        if field in inner and isinstance(value, memoryview):
            yield from _messages(value, inner[field], depth + 1, model)


def _fields(data: memoryview, model: str) -> Iterator[tuple[int, Any]]:
    """The fields of a message: whole numbers, or bytes. Those of a fixed width are passed over."""
    at, end = 0, len(data)
    while at < end:
        key, at = _varint(data, at, model)
        field, wire = key >> 3, key & 7
        if not field or key > LARGEST_TAG:
            raise ValueError(f"{model} is no ONNX model, or is damaged")
        if wire == 0:
            value, at = _varint(data, at, model)
            yield field, value
            continue
        size = {1: 8, 5: 4}.get(wire, -1)
        if wire == 2:
            size, at = _varint(data, at, model)
        if size < 0 or at + size > end:
            raise ValueError(f"{model} is no ONNX model, or is damaged")
        if wire == 2:
            yield field, data[at : at + size]
        at += size


def _varint(data: memoryview, at: int, model: str) -> tuple[int, int]:
    """A whole number, and where it ends."""
    value = 0
    for step, byte in enumerate(data[at : at + 10]):
        value |= (byte & 127) << 7 * step
        if byte < 128:
            return value & (1 << 64) - 1, at + step + 1
    raise ValueError(f"{model} is no ONNX model, or is damaged")


def _numbers(field: Any, model: str) -> Iterator[int]:
    """One signed number, or several that are packed."""
    at, data = 0, field
    while isinstance(data, memoryview) and at < len(data):
        value, at = _varint(data, at, model)
        yield value - (value >> 63 << 64)
    if isinstance(data, int):
        yield data - (data >> 63 << 64)


def _pair(entry: Any, model: str) -> tuple[str, str]:
    """A key and its value."""
    fields = dict(_fields(entry, model)) if isinstance(entry, memoryview) else {}
    return _text(fields.get(1)), _text(fields.get(2))


def _text(field: Any) -> str:
    """A text; empty for a number in its place."""
    return str(field, "utf-8", "replace") if isinstance(field, (bytes, memoryview)) else ""


def _number(text: str) -> int:
    """A number of bytes as it is written; -1 for anything else."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 19 else -1


def _size(path: pathlib.Path, told: str) -> int:
    """The bytes of a regular file. Raises ValueError for anything else."""
    try:
        found = os.stat(path)
    except OSError as problem:
        raise ValueError(f"{told} lies in {path.name}: {problem.strerror}") from None
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{told} lies in {path.name}, which is no regular file")
    return found.st_size
