"""Which files an ONNX graph would read: found by walking its protobuf, before a runtime opens it.

A graph of a stranger's bundle may name any path of the machine as the place of its weights. The runtimes' own
checks differ by version, so the bundle's loader does not rely on them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from vila_edge.engine.protobuf import fields
from vila_edge.errors import BundleError

# Field numbers of onnx.proto3 that lead from a message to the messages that can hold a tensor.
_TENSOR = "TensorProto"
_CHILDREN: dict[str, dict[int, str]] = {
    "ModelProto": {7: "GraphProto", 20: "TrainingInfoProto", 25: "FunctionProto"},
    "TrainingInfoProto": {1: "GraphProto", 2: "GraphProto"},
    "GraphProto": {1: "NodeProto", 5: _TENSOR, 15: "SparseTensorProto"},
    "FunctionProto": {7: "NodeProto", 11: "AttributeProto"},
    "NodeProto": {5: "AttributeProto"},
    "AttributeProto": {
        5: _TENSOR,
        6: "GraphProto",
        10: _TENSOR,
        11: "GraphProto",
        22: "SparseTensorProto",
        23: "SparseTensorProto",
    },
    "SparseTensorProto": {1: _TENSOR, 2: _TENSOR},
}
_TENSOR_EXTERNAL_DATA = 13
_MAX_DEPTH = 32


@dataclass(frozen=True)
class ExternalData:
    """A tensor's place outside of the graph: `length` bytes from `offset` of the file `location`."""

    location: str
    offset: int
    length: int


def check_external_data(graph: bytes, folder: Path, source: Path) -> None:
    """Raises BundleError unless every external tensor of `graph` lies inside a plain file of `folder`."""
    sizes = {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file() and not path.is_symlink()}
    for data in external_data(graph, source):
        size = sizes.get(data.location)
        if size is None:
            raise BundleError(f"{source}: reads weights from {data.location!r}, which is not a file of the bundle")
        if data.offset < 0 or data.length < 0 or data.offset + data.length > size:
            raise BundleError(
                f"{source}: reads bytes {data.offset:,}..{data.offset + data.length:,} of {data.location}, "
                f"which has {size:,}"
            )


def external_data(graph: bytes, source: Path) -> Iterator[ExternalData]:
    """All external tensors of a serialised ModelProto, wherever they stand."""
    try:
        yield from _walk(memoryview(graph), "ModelProto", 0)
    except (IndexError, ValueError, RecursionError, UnicodeDecodeError) as error:
        raise BundleError(f"{source}: not an ONNX graph: {error}") from None


def _walk(message: memoryview, kind: str, depth: int) -> Iterator[ExternalData]:
    if depth > _MAX_DEPTH:
        raise ValueError(f"nested deeper than {_MAX_DEPTH} messages")
    if kind == _TENSOR:
        entries = dict(_entry(value) for number, value in fields(message) if number == _TENSOR_EXTERNAL_DATA)
        if entries:
            yield _external(entries)
        return
    children = _CHILDREN[kind]
    for number, value in fields(message):
        if number in children:
            yield from _walk(value, children[number], depth + 1)


def _external(entries: Mapping[str, str]) -> ExternalData:
    return ExternalData(entries.get("location", ""), int(entries.get("offset", "0")), int(entries.get("length", "-1")))


def _entry(message: memoryview) -> tuple[str, str]:
    """A StringStringEntryProto."""
    found = dict(fields(message))
    return bytes(found.get(1, b"")).decode(), bytes(found.get(2, b"")).decode()
