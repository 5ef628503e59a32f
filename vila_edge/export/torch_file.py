"""The tensors of a torch checkpoint, mapped where they lie. Its pickle is read as data: nothing in it is ever run."""

from __future__ import annotations

import io
import math
import pickletools
import struct
import zipfile
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

from vila_edge.errors import InputError
from vila_edge.tensorfile import DTYPES, TensorEntry, TensorFile

STORAGES = {
    "torch.DoubleStorage": "F64",
    "torch.FloatStorage": "F32",
    "torch.HalfStorage": "F16",
    "torch.BFloat16Storage": "BF16",
    "torch.LongStorage": "I64",
    "torch.IntStorage": "I32",
    "torch.ShortStorage": "I16",
    "torch.CharStorage": "I8",
    "torch.ByteStorage": "U8",
    "torch.BoolStorage": "U8",  # a byte of 0 or 1 each
}
FUNCTIONS = ("collections.OrderedDict", "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter")

# pickletools.genops would read the argument of an opcode before it could be refused
OPCODES = {opcode.code.encode("latin-1"): opcode.name for opcode in pickletools.opcodes}
ARGUMENTS = {opcode.name: opcode.arg.reader for opcode in pickletools.opcodes if opcode.arg}

MAX_PICKLE_BYTES = 64 << 20
MAX_OPCODES = 1 << 21  # some 50,000 tensors; an opcode adds one object at most, so this bounds stack and memo too
MAX_DIMENSIONS = 32  # what every numpy takes
MAX_ELEMENTS = 1 << 48

SAVE_PLAIN = "save it again as plain tensors: torch.save(model.state_dict(), path), or as safetensors"
SAVE_AGAIN = "load it and save it with a current torch, or save it as safetensors"


class TorchFile(TensorFile):
    """The tensors of one `pytorch_model.bin` or `*.pt` (torch 1.6 or newer), by name. Booleans are of type U8."""

    def __init__(self, path: Path) -> None:
        """Raises InputError if the file is missing, damaged, legacy or holds more than a state dict needs.

        The state dict may be the file's one object or lie in it as "state_dict" or "model". Numbers, strings and None
        among its values are passed over.
        """
        self.path = path
        if not path.is_file():
            raise InputError(f"{path}: no such file")
        try:
            with path.open("rb") as file:
                self.entries = _entries(file)
        except InputError as error:
            raise InputError(f"{path}: {error.message}", error.hint) from None
        except (zipfile.BadZipFile, struct.error, OSError, ValueError, NotImplementedError) as error:
            raise InputError(f"{path}: not a whole torch checkpoint: {error}") from None


def _entries(file: BinaryIO) -> dict[str, TensorEntry]:
    head = file.read(512)
    if head[:1] == b"\x80" or head[257:262] == b"ustar":
        raise InputError("in the form that torch had before 1.6, which only unpickling can read", SAVE_AGAIN)
    if not head.startswith(b"PK\3\4"):
        raise InputError("not a torch checkpoint, expected a zip file", SAVE_AGAIN)
    members = _Members(file)
    order = members.read("byteorder", 16) if "byteorder" in members else b"little"
    if order != b"little":
        raise InputError(f"stored in the byte order {order!r}, expected little", SAVE_AGAIN)
    state = _state(_Pickle(members.read("data.pkl", MAX_PICKLE_BYTES)).read())
    places = {key: members.place(f"data/{key}") for key in {tensor.storage.key for tensor in state.values()}}
    return {name: _entry(f"tensor {_quoted(name)}", value, places[value.storage.key]) for name, value in state.items()}


class _Members:
    """What the one folder of a zip file holds, by name, as plain bytes of that file."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        with zipfile.ZipFile(file) as archive:
            infos = archive.infolist()
            starts = sorted({info.header_offset for info in infos if info.header_offset < archive.start_dir})
            self._ends = dict(pairwise([*starts, archive.start_dir]))
        self._infos = {info.filename: info for info in infos}
        roots = [name[: -len("data.pkl")] for name in self._infos if name.endswith("/data.pkl")]
        if len(roots) != 1:
            raise InputError(f"{len(roots)} members are called data.pkl, expected one: not a torch checkpoint")
        self._root = roots[0]

    def __contains__(self, name: str) -> bool:
        return self._root + name in self._infos

    def read(self, name: str, limit: int) -> bytes:
        """A member's content. Its checksum is not asked: torch can be told to write none."""
        offset, length = self.place(name)
        if length > limit:
            raise InputError(f"{name} has {length:,} bytes, expected {limit:,} at most")
        self._file.seek(offset)
        return self._file.read(length)

    def place(self, name: str) -> tuple[int, int]:
        """The offset and length of a member's bytes in the file."""
        if name not in self:
            raise InputError(f"member {_quoted(name)} is missing")
        info = self._infos[self._root + name]
        self._file.seek(info.header_offset)
        signature, _, flags, method, *_, name_length, extra_length = struct.unpack("<4s5H3I2H", self._file.read(30))
        local_name = self._file.read(name_length).decode("utf-8" if flags & 0x800 else "cp437")
        if method or info.compress_type:
            raise InputError(f"member {_quoted(name)} is compressed, and torch compresses nothing", SAVE_AGAIN)
        if (flags | info.flag_bits) & 1:
            raise InputError(f"member {_quoted(name)} is encrypted")
        offset, length = info.header_offset + 30 + name_length + extra_length, info.file_size
        same = (signature, local_name, length) == (b"PK\3\4", info.orig_filename, info.compress_size)
        if not same or offset + length > self._ends.get(info.header_offset, 0):
            raise InputError(f"member {_quoted(name)} does not lie where the zip directory says")
        return offset, length


@dataclass(frozen=True)
class _Symbol:
    """A global that a pickle names. It is never looked up."""

    name: str


@dataclass(frozen=True)
class _Storage:
    """`count` values in the member data/`key`."""

    dtype: str
    key: str
    count: int


@dataclass(frozen=True)
class _Tensor:
    """A view of a storage as the pickle claims it, unchecked."""

    storage: _Storage
    offset: int
    shape: tuple[Any, ...]
    stride: tuple[Any, ...]


class _OrderedDict(dict[str, Any]):
    """What collections.OrderedDict() makes, and the one object that may be given attributes."""


class _Pickle:
    """A stack machine for the opcodes of a state dict. It imports and calls nothing; globals are names to it."""

    def __init__(self, data: bytes) -> None:
        self._data = io.BytesIO(data)
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []  # the stacks below the open marks
        self._memo: dict[int, Any] = {}

    def read(self) -> Any:
        """The object that the pickle describes. Raises InputError, or ValueError for what is no pickle at all."""
        try:
            for _ in range(MAX_OPCODES):
                opcode = OPCODES[self._data.read(1)]
                if opcode == "STOP":
                    (value,) = self._stack
                    return value
                self._step(opcode)
        except (IndexError, KeyError, TypeError):
            raise ValueError("data.pkl is damaged") from None
        raise InputError(f"data.pkl has more than {MAX_OPCODES:,} opcodes, which no state dict needs")

    def _step(self, opcode: str) -> None:
        push, pop = self._stack.append, self._stack.pop
        match opcode:
            case "BINPUT" | "LONG_BINPUT":
                self._memo[ARGUMENTS[opcode](self._data)] = self._stack[-1]
            case "MEMOIZE":
                self._memo[len(self._memo)] = self._stack[-1]
            case "BINGET" | "LONG_BINGET":
                push(self._memo[ARGUMENTS[opcode](self._data)])
            case "BINUNICODE" | "SHORT_BINUNICODE" | "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT":
                push(ARGUMENTS[opcode](self._data))
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                push({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode])
            case "EMPTY_TUPLE" | "EMPTY_LIST" | "EMPTY_DICT":
                push({"EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict}[opcode]())
            case "MARK":
                self._below.append(self._stack)
                self._stack = []
            case "TUPLE":
                items = self._pop_to_mark()
                self._stack.append(tuple(items))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                items = [pop() for _ in range(int(opcode[-1]))]
                push(tuple(reversed(items)))
            case "APPEND" | "APPENDS":
                items = [pop()] if opcode == "APPEND" else self._pop_to_mark()
                list.extend(self._stack[-1], items)
            case "SETITEM" | "SETITEMS":
                items = [pop(), pop()][::-1] if opcode == "SETITEM" else self._pop_to_mark()
                # numbers can be chosen to collide, and a tuple can take for ever to hash
                if not all(isinstance(key, str) for key in items[::2]):
                    raise InputError("a dictionary has keys that are not strings", SAVE_PLAIN)
                dict.update(self._stack[-1], zip(items[::2], items[1::2], strict=True))
            case "GLOBAL":
                module, name = (self._data.readline()[:-1].decode() for _ in range(2))
                push(_symbol(module, name))
            case "STACK_GLOBAL":
                name, module = pop(), pop()
                push(_symbol(module, name))
            case "BINPERSID":
                push(_storage(pop()))
            case "REDUCE":
                arguments, function = pop(), pop()
                push(_call(function, arguments))
            case "BUILD":
                state, owner = pop(), self._stack[-1]
                if not (isinstance(owner, _OrderedDict) and isinstance(state, dict) and state.keys() == {"_metadata"}):
                    raise InputError("data.pkl sets attributes other than the _metadata of a state dict", SAVE_PLAIN)
            case "PROTO" | "FRAME":
                ARGUMENTS[opcode](self._data)
            case _:
                raise InputError(f"data.pkl uses the opcode {opcode}, which no state dict needs", SAVE_PLAIN)

    def _pop_to_mark(self) -> list[Any]:
        items, self._stack = self._stack, self._below.pop()
        return items


def _symbol(module: object, name: object) -> _Symbol:
    if not (isinstance(module, str) and isinstance(name, str)):
        raise ValueError("data.pkl names a global by what is no string")
    symbol = f"{module}.{name}"
    if symbol not in STORAGES and symbol not in FUNCTIONS:
        raise InputError(f"data.pkl names {_quoted(symbol)}, which no state dict needs; nothing was run", SAVE_PLAIN)
    return _Symbol(symbol)


def _storage(identity: object) -> _Storage:
    match identity:
        case ("storage", _Symbol(name), str(key), str(), int(count)):
            return _Storage(STORAGES[name], key, count)
    raise InputError("data.pkl has a persistent id that is no storage of torch", SAVE_PLAIN)


def _call(function: object, arguments: Any) -> Any:
    match function, arguments:
        case _Symbol("collections.OrderedDict"), ():
            return _OrderedDict()
        case _Symbol("torch._utils._rebuild_tensor_v2"), (_Storage(), int(), tuple(), tuple(), _, _):
            return _Tensor(*arguments[:4])
        case _Symbol("torch._utils._rebuild_parameter"), (_Tensor() as tensor, _, _):
            return tensor
    raise InputError("data.pkl has a call that torch.save does not write; nothing was run", SAVE_PLAIN)


def _state(root: object) -> dict[str, _Tensor]:
    if not isinstance(root, dict):
        raise InputError(f"holds a {type(root).__name__.strip('_')}, expected a state dict", SAVE_PLAIN)
    inner = [key for key in ("state_dict", "model") if isinstance(root.get(key), dict)]
    if len(inner) != 1:
        return _tensors(root)
    if _tensors({name: value for name, value in root.items() if name != inner[0]}):
        raise InputError(f"has tensors beside the state dict {inner[0]!r}", SAVE_PLAIN)
    return _tensors(root[inner[0]])


def _tensors(state: dict[str, Any]) -> dict[str, _Tensor]:
    for name, value in state.items():
        if not (value is None or isinstance(value, _Tensor | int | float | str)):
            raise InputError(f"{_quoted(name)} is a {type(value).__name__.strip('_')}, expected a tensor", SAVE_PLAIN)
    return {name: value for name, value in state.items() if isinstance(value, _Tensor)}


def _entry(what: str, tensor: _Tensor, place: tuple[int, int]) -> TensorEntry:
    storage, shape, stride = tensor.storage, tensor.shape, tensor.stride
    if len(shape) != len(stride) or len(shape) > MAX_DIMENSIONS:
        raise InputError(f"{what} has {len(shape)} dimensions and {len(stride)} strides")
    if not all(isinstance(n, int) and 0 <= n <= MAX_ELEMENTS for n in (storage.count, tensor.offset, *shape, *stride)):
        raise InputError(f"{what} has a shape, stride or place that no tensor has")
    step = 1
    for size, distance in zip(reversed(shape), reversed(stride), strict=True):
        if size > 1 and distance != step and 0 not in shape:
            raise InputError(f"{what} is not contiguous: shape {shape}, strides {stride}", "call contiguous() on it")
        step *= max(size, 1)
    item, count = DTYPES[storage.dtype].itemsize, math.prod(shape)
    if step > MAX_ELEMENTS or tensor.offset + count > storage.count or storage.count * item > place[1]:
        raise InputError(f"{what} reaches beyond its storage, which has {place[1]:,} bytes")
    return TensorEntry(storage.dtype, shape, place[0] + tensor.offset * item, count * item)


def _quoted(text: str) -> str:
    return repr(text if len(text) <= 200 else text[:200] + "...")
