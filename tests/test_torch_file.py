"""torch checkpoints, read without unpickling: what torch saves comes back, what would run does not run."""

from __future__ import annotations

import io
import os
import pickle
import random
import struct
import subprocess
import sys
import tarfile
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vila_edge.errors import InputError
from vila_edge.export import torch_file
from vila_edge.export.torch_file import MAX_PICKLE_BYTES, TorchFile

PROTO = b"\x80\x02"
TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "U8",
}


def saved(path: Path, value: object, **options: Any) -> TorchFile:
    torch.save(value, path, **options)
    return TorchFile(path)


def check_same(file: TorchFile, want: dict[str, torch.Tensor]) -> None:
    """The arrays have the shapes and bits of the tensors, and lie in the file where the entries say."""
    assert set(file.entries) == set(want)
    whole = file.path.read_bytes()
    for name, tensor in want.items():
        bits = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        entry = file.entries[name]
        assert entry.dtype == TYPES[tensor.dtype]
        assert entry.shape == file.array(name).shape == tuple(tensor.shape)
        assert file.array(name).tobytes() == whole[entry.offset : entry.offset + entry.length] == bits


def forge(path: Path, pickled: bytes, members: dict[str, bytes] | None = None) -> Path:
    """A zip file as torch writes it, around any pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        for name, data in {"data/0": bytes(16), **(members or {})}.items():
            archive.writestr(f"archive/{name}", data)
    return path


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def storage(identity: bytes = b"", count: bytes = b"K\x04") -> bytes:
    """The opcodes of a persistent id, of four floats in data/0."""
    return b"(" + (identity or text("storage") + b"ctorch\nFloatStorage\n") + text("0") + text("cpu") + count + b"tQ"


def tensor(
    shape: bytes = b"K\x04\x85", stride: bytes = b"K\x01\x85", offset: bytes = b"K\x00", of: bytes = b""
) -> bytes:
    """The opcodes of a tensor."""
    hooks = b"ccollections\nOrderedDict\n)R"
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n(" + (of or storage()) + offset + shape + stride + b"\x89" + hooks + b"tR"
    )


def state(value: bytes) -> bytes:
    """A pickle of {"w": value}."""
    return PROTO + b"}" + text("w") + value + b"s."


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_type_comes_back_bit_by_bit(tmp_path: Path, protocol: int) -> None:
    tensors = {str(dtype): (torch.randn(5, 7) * 9).to(dtype) for dtype in TYPES}
    file = saved(tmp_path / "x.bin", tensors, pickle_protocol=protocol)
    check_same(file, tensors)
    check_same(file, torch.load(tmp_path / "x.bin", weights_only=False))


def test_bfloat16_and_float16_widen_exactly(tmp_path: Path) -> None:
    values = torch.randn(40, 3)
    file = saved(tmp_path / "x.pt", {"b": values.bfloat16(), "h": values.half()})
    np.testing.assert_array_equal(file.float32("b"), values.bfloat16().float().numpy())
    np.testing.assert_array_equal(file.float32("h"), values.half().float().numpy())


def test_a_module_state_with_metadata_comes_back(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    parameters = module.state_dict()
    assert parameters._metadata  # type: ignore[attr-defined]  # an attribute, which the pickle sets by BUILD
    check_same(saved(tmp_path / "x", parameters), dict(parameters))


def test_parameters_come_back(tmp_path: Path) -> None:
    parameters = {name: torch.nn.Parameter(torch.randn(2, 3), flag) for name, flag in (("a", True), ("b", False))}
    check_same(saved(tmp_path / "x", parameters), dict(parameters))


def test_views_share_the_bytes_of_one_storage(tmp_path: Path) -> None:
    whole = torch.arange(24.0).reshape(6, 4)
    views = {
        "whole": whole,
        "tail": whole[4:],
        "row": whole[2],
        "same": whole,
        "one": whole[1, 3],
        "ones": whole[:1, :1],
    }
    file = saved(tmp_path / "x", views)
    check_same(file, views)
    assert file.entries["tail"].offset == file.entries["whole"].offset + 16 * 4
    assert file.entries["same"] == file.entries["whole"]


def test_scalars_and_empty_tensors_come_back(tmp_path: Path) -> None:
    empty = torch.zeros(3)
    tensors = {"scalar": torch.tensor(2.5), "none": torch.zeros(0), "no_rows": torch.zeros(0, 4), "end": empty[3:]}
    tensors |= {"whole": empty, "no_columns": torch.zeros(4, 0), "long": torch.tensor(7)}
    check_same(saved(tmp_path / "x", tensors), tensors)


def test_long_storages_and_many_tensors_come_back(tmp_path: Path) -> None:
    tensors = {f"layer.{i}.weight": torch.full((i % 7 + 1,), float(i)) for i in range(1000)}
    check_same(saved(tmp_path / "x", {**tensors, "big": torch.zeros(70_000)}), {**tensors, "big": torch.zeros(70_000)})


@pytest.mark.parametrize("key", ["state_dict", "model"])
def test_a_state_may_lie_one_level_down(tmp_path: Path, key: str) -> None:
    tensors = OrderedDict(a=torch.randn(3), b=torch.randn(2, 2).half())
    check_same(saved(tmp_path / "x", {"epoch": 3, key: tensors, "name": "n"}), tensors)


def test_a_tensor_may_be_called_model(tmp_path: Path) -> None:
    tensors = {"model": torch.randn(3), "state_dict": torch.randn(4)}
    check_same(saved(tmp_path / "x", tensors), tensors)


def test_plain_values_are_passed_over(tmp_path: Path) -> None:
    plain = {"i": 1 << 40, "j": -3, "s": "text", "n": None, "f": 0.5, "t": True}
    check_same(saved(tmp_path / "x", {**plain, "w": torch.ones(2)}), {"w": torch.ones(2)})


def test_the_location_of_a_storage_is_ignored(tmp_path: Path) -> None:
    path = forge(tmp_path / "x", state(tensor().replace(text("cpu"), text("cuda:0"))))
    assert TorchFile(path).array("w").tolist() == [0.0] * 4


def test_tensors_are_mapped_and_not_read(tmp_path: Path) -> None:
    file = saved(tmp_path / "x", {"w": torch.arange(6.0).reshape(2, 3)})
    array = file.array("w")
    assert isinstance(array, np.memmap)
    assert Path(str(array.filename)) == file.path
    with file.path.open("r+b") as changed:
        changed.seek(file.entries["w"].offset)
        changed.write(struct.pack("<f", 42.0))
    assert array[0, 0] == 42.0


def test_a_torch_that_wrote_no_checksums_is_read(tmp_path: Path) -> None:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        check_same(saved(tmp_path / "x", {"w": torch.ones(5)}), {"w": torch.ones(5)})
    finally:
        torch.serialization.set_crc32_options(before)


def test_neither_torch_nor_the_named_modules_are_imported(tmp_path: Path) -> None:
    path = forge(tmp_path / "x", state(b"cthis\ns\n"))
    torch.save({"w": torch.ones(2)}, tmp_path / "y")
    code = f"""
import sys
from pathlib import Path
from vila_edge.errors import InputError
from vila_edge.export.torch_file import TorchFile
assert TorchFile(Path({str(tmp_path / "y")!r})).float32("w").tolist() == [1.0, 1.0]
try:
    TorchFile(Path({str(path)!r}))
except InputError as error:
    assert "'this.s'" in error.message
assert not {{"torch", "this"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


class Runs:
    """An object whose unpickling calls a function."""

    def __init__(self, function: Callable[..., Any], *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[object, ...]]:
        return self.call


def malicious(canary: Path) -> dict[str, bytes]:
    """Pickles that leave a file behind where they are unpickled, or would have another way in."""
    command = f"touch {canary}"
    opening = f"open({str(canary)!r}, 'w').close()"
    run = Runs(os.system, command)
    call = text(command) + b"\x85"
    ordered = PROTO + b"ccollections\nOrderedDict\n)R"
    return {
        "reduce": pickle.dumps(run, 2),
        "stack global": pickle.dumps(run, 4),
        "text protocol": pickle.dumps(run, 0),
        "by the name os": PROTO + b"cos\nsystem\n" + call + b"R.",
        "eval": pickle.dumps(Runs(eval, opening), 2),
        "exec": pickle.dumps({"w": Runs(exec, opening)}, 5),
        "nested in a value": pickle.dumps({"w": [1, {"x": (2, run)}]}, 2),
        "nested in the metadata": ordered + b"}" + text("_metadata") + pickle.dumps(run, 2)[2:-1] + b"sb.",
        "inst": b"(" + text(command) + b"ios\nsystem\n.",
        "obj": PROTO + b"(cos\nsystem\n" + text(command) + b"o.",
        "obj of an allowed name": PROTO + b"(ccollections\nOrderedDict\n" + text(command) + b"o.",
        "newobj": PROTO + b"csubprocess\nPopen\n" + call + b"\x81.",
        "newobj of an allowed name": PROTO + b"ccollections\nOrderedDict\n)\x81.",
        "newobj with keywords": b"\x80\x04csubprocess\nPopen\n" + call + b"}\x92.",
        "extension registry": PROTO + b"\x82\x01.",
        "build with setstate": ordered + b"}" + text("__setstate__") + b"cos\nsystem\nsb" + text(command) + b"b.",
        "build of another attribute": ordered + b"}" + text("__class__") + b"K\x01sb.",
        "build of one attribute more": ordered + b"}(" + text("_metadata") + b"N" + text("x") + b"Nub.",
        "build of a plain dictionary": PROTO + b"}}" + text("_metadata") + b"Nsb.",
        "build with a tuple": ordered + b"N}" + text("_metadata") + b"Ns\x86b.",
        "build of a tensor": state(tensor() + b"}" + text("_metadata") + b"Nsb"),
        "persistent id that is a text": state(text(command) + b"Q"),
        "persistent id in text form": state(b"P" + command.encode() + b"\n"),
        "persistent id of another kind": state(storage(text("module") + b"ctorch\nFloatStorage\n")),
        "persistent id with a function": state(storage(text("storage") + b"ctorch._utils\n_rebuild_parameter\n")),
        "persistent id without a type": state(storage(text("storage") + text("FloatStorage"))),
        "global of torch off the list": PROTO + b"ctorch.hub\nload\n" + call + b"R.",
        "tensor function off the list": PROTO + b"ctorch._utils\n_rebuild_device_tensor_from_numpy\n" + call + b"R.",
        "dotted walk": b"\x80\x04" + text("torch._utils") + text("sys.modules") + b"\x93" + call + b"R.",
        "global named by a tuple": b"\x80\x04" + text("collections") + b"\x85" + text("OrderedDict") + b"\x93.",
        "call of a tensor": state(tensor() + call + b"R"),
        "call of a storage class": state(b"ctorch\nFloatStorage\n" + call + b"R"),
        "ordered dictionary with items": state(b"ccollections\nOrderedDict\n" + call + b"R"),
        "key that is a global": PROTO + b"}ccollections\nOrderedDict\nK\x01s.",
        "escapes in a name": PROTO + b"c\\hollections\nOrderedDict\n)R.",
        "items of what is no dictionary": PROTO + b"ccollections\nOrderedDict\n" + text("a") + b"K\x01s.",
        "items appended to a dictionary": PROTO + b"}K\x01a.",
        "a class as value": state(b"ctorch\nFloatStorage\n"),
    }


def test_the_canary_would_sing(tmp_path: Path) -> None:
    for name in ("reduce", "stack global", "by the name os", "eval", "nested in a value", "inst", "obj"):
        canary = tmp_path / name.replace(" ", "_")
        pickle.loads(malicious(canary)[name])
        assert canary.exists(), name


@pytest.mark.parametrize("kind", malicious(Path("canary")))
def test_a_malicious_pickle_is_refused_and_not_run(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    path = forge(tmp_path / "model.bin", malicious(tmp_path / "canary")[kind])
    with pytest.raises(InputError, match="model.bin"):
        TorchFile(path)
    assert os.listdir(tmp_path) == ["model.bin"]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "kind, symbol", [("by the name os", "os.system"), ("eval", "eval"), ("newobj", "subprocess.Popen")]
)
def test_the_refusal_names_the_global(tmp_path: Path, kind: str, symbol: str) -> None:
    path = forge(tmp_path / "x", malicious(tmp_path / "canary")[kind])
    with pytest.raises(InputError, match=rf"{symbol}', which no state dict needs.*state_dict\(\)"):
        TorchFile(path)


def test_a_whole_module_is_refused_with_a_hint(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"torch.nn.modules.linear.Linear.*torch.save\(model.state_dict"):
        saved(tmp_path / "x", torch.nn.Linear(2, 2))


def bombs() -> dict[str, bytes]:
    """Pickles that are small and ask for much."""
    doubled = b"K\x01\x85q\x00" + b"h\x00\x86q\x00" * 5000
    return {
        "laughs as the value": PROTO + doubled + b".",
        "laughs as a tensor's shape": state(tensor(shape=doubled)),
        "laughs as a key": PROTO + b"}" + doubled + b"Ns.",
        "laughs as a name": b"\x80\x04" + doubled + text("x") + b"\x93.",
        "laughs as an id": state(doubled + b"Q"),
        "a long of gigabytes": PROTO + b"\x8b\xff\xff\xff\x7f" + b"\xff" * 1000 + b".",
        "a long in text": b"L" + b"9" * 3_000_000 + b"L\n.",
        "longs of 255 bytes": state(tensor(shape=b"(" + (b"\x8a\xff" + b"\x7f" * 255) * 32 + b"t")),
        "a text of gigabytes": PROTO + b"X\xff\xff\xff\xffabc.",
        "a memo far out": PROTO + b"}r\xff\xff\xff\xffj\xff\xff\xff\xff" + b"(",
        "marks without end": PROTO + b"(" * 999_999,
        "nested without end": PROTO + b")" + b"\x85" * 999_999,
        "dimensions without end": state(
            tensor(shape=b"(" + b"K\x01" * 99_999 + b"t", stride=b"(" + b"K\x01" * 99_999 + b"t")
        ),
        "keys that collide": PROTO
        + b"}("
        + b"".join(b"\x8a\x0e" + (i * ((1 << 61) - 1)).to_bytes(14, "little") + b"N" for i in range(1, 50_000))
        + b"u.",
    }


@pytest.mark.parametrize("kind", bombs())
def test_a_pickle_bomb_is_refused_soon(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_file, "MAX_OPCODES", 300_000)
    path = forge(tmp_path / "model.bin", bombs()[kind])
    start = time.monotonic()
    with pytest.raises(InputError, match="model.bin"):
        TorchFile(path)
    assert time.monotonic() - start < 20


def test_one_memo_used_many_times_is_read_in_linear_time(tmp_path: Path) -> None:
    names = b"".join(text(f"{i:06d}") + b"h\x07" for i in range(100_000))
    path = forge(tmp_path / "x", PROTO + b"}" + text("w") + tensor() + b"q\x07s(" + names + b"u.")
    assert len(TorchFile(path).entries) == 100_001


def test_a_dictionary_that_holds_itself_is_refused(tmp_path: Path) -> None:
    path = forge(tmp_path / "x", PROTO + b"}q\x00" + text("model") + b"h\x00s.")
    with pytest.raises(InputError, match="'model' is a dict"):
        TorchFile(path)


def test_a_pickle_too_large_is_refused_unread(tmp_path: Path) -> None:
    path = forge(tmp_path / "x", b"")
    with zipfile.ZipFile(path, "w") as archive, archive.open("archive/data.pkl", "w") as member:
        member.write(bytes(MAX_PICKLE_BYTES + 1))
    with pytest.raises(InputError, match="67,108,864 at most"):
        TorchFile(path)


@pytest.mark.parametrize(
    "bad, message",
    [
        (tensor(stride=b"K\x02\x85"), "tensor 'w' is not contiguous"),
        (tensor(stride=b"K\x00\x85"), "tensor 'w' is not contiguous"),
        (tensor(offset=b"K\x01"), "tensor 'w' reaches beyond its storage"),
        (tensor(shape=b"K\x05\x85"), "tensor 'w' reaches beyond its storage"),
        (tensor(of=storage(count=b"K\x05")), "tensor 'w' reaches beyond its storage"),
        (tensor(shape=b"K\x02K\x02\x86"), "2 dimensions and 1 strides"),
        (tensor(shape=b"J\xff\xff\xff\xff\x85"), "that no tensor has"),
        (tensor(offset=b"J\xff\xff\xff\xff"), "that no tensor has"),
        (tensor(stride=b"N\x85"), "that no tensor has"),
        (tensor(shape=text("4") + b"\x85"), "that no tensor has"),
        (tensor(of=storage().replace(text("0"), text("9"))), "member 'data/9' is missing"),
        (tensor(of=storage().replace(text("0"), text("../0"))), "member 'data/../0' is missing"),
        (
            tensor(shape=b"K\x00" + b"J\xff\xff\xff\x7f" * 2 + b"\x87", stride=b"K\x01K\x01K\x01\x87"),
            "beyond its storage",
        ),
        (b"]K\x01a", "'w' is a list, expected a tensor"),
        (storage(), "'w' is a Storage, expected a tensor"),
        (b"}", "'w' is a dict, expected a tensor"),
    ],
)
def test_a_bad_tensor_is_refused_by_name(tmp_path: Path, bad: bytes, message: str) -> None:
    path = forge(tmp_path / "model.bin", state(bad))
    with pytest.raises(InputError, match=f"model.bin: .*{message}"):
        TorchFile(path)


def test_what_is_not_a_flat_state_is_refused(tmp_path: Path) -> None:
    ones = torch.ones(2)
    for value, message in (
        (torch.ones(4, 3).t(), "not contiguous.*contiguous()"),
        (torch.ones(3).expand(2, 3), "not contiguous"),
    ):
        with pytest.raises(InputError, match=f"tensor 'odd' is {message}"):
            saved(tmp_path / "x", {"odd": value})
    for whole, message in (
        (ones, "holds a Tensor, expected a state dict"),
        ([ones], "holds a list, expected a state dict"),
        ({"state_dict": {"w": ones}, "w": ones}, "tensors beside the state dict 'state_dict'"),
        ({"state_dict": {"w": ones}, "optimizer": {}}, "'optimizer' is a dict"),
        ({"state_dict": {"w": ones}, "model": {"w": ones}}, "'state_dict' is a dict"),
        ({"state_dict": {"model": {"w": ones}}}, "'model' is a dict"),
        ({1: ones}, "keys that are not strings"),
        ({"w": torch.ones(2, dtype=torch.complex64)}, "ComplexFloatStorage"),
        ({"w": torch.ones(2).to_sparse()}, "sparse"),
    ):
        with pytest.raises(InputError, match=message):
            saved(tmp_path / "x", whole)


def test_a_file_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    torch.save({"a": torch.randn(30), "b": torch.randn(4, 4).half()}, path)
    whole = path.read_bytes()
    for size in range(0, len(whole), 3):
        path.write_bytes(whole[:size])
        with pytest.raises(InputError, match="model.bin"):
            TorchFile(path)


def opened_or_refused(path: Path) -> bool:
    """Whether the file was refused by its name. What is not refused lies within the file and can be read."""
    try:
        file = TorchFile(path)
    except InputError as error:
        assert path.name in error.message
        return True
    size = path.stat().st_size
    for name, entry in file.entries.items():
        assert 0 <= entry.offset <= entry.offset + entry.length <= size
        assert file.array(name).nbytes == entry.length
    return False


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_damaged_pickle_is_refused_or_harmless(tmp_path: Path, protocol: int) -> None:
    path = tmp_path / "model.bin"
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    torch.save(module.state_dict(), path, pickle_protocol=protocol)
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        pickled = archive.read("model/data.pkl")
    start, rng = whole.index(pickled), random.Random(protocol)
    refused = 0
    for _ in range(600):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            data[start + rng.randrange(len(pickled))] = rng.randrange(256)
        path.write_bytes(data)
        refused += opened_or_refused(path)
    assert refused > 300


def test_a_damaged_zip_is_refused_or_harmless(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    torch.save({"a": torch.randn(3), "b": torch.zeros(0, 4)}, path)
    whole, rng = path.read_bytes(), random.Random(1)
    directory = whole.index(b"PK\1\2")
    refused = 0
    for i in range(600):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            data[rng.randrange(directory if i % 2 else 0, len(data))] = rng.choice(
                (0, 1, 0x7F, 0xFF, rng.randrange(256))
            )
        path.write_bytes(data)
        refused += opened_or_refused(path)
    assert refused > 200


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA])
@pytest.mark.parametrize("member", ["data.pkl", "data/0"])
def test_a_compressed_member_is_refused(tmp_path: Path, method: int, member: str) -> None:
    with zipfile.ZipFile(tmp_path / "x", "w") as archive:
        for name, data in (("data.pkl", state(tensor())), ("data/0", bytes(16))):
            archive.writestr(f"archive/{name}", data, method if name == member else zipfile.ZIP_STORED)
    with pytest.raises(InputError, match=f"'{member}' is compressed"):
        TorchFile(tmp_path / "x")


def change_directory(path: Path, member: str, at: int, value: bytes) -> None:
    """Bytes changed in the zip directory's record of a member."""
    data = bytearray(path.read_bytes())
    record = data.index(member.encode(), data.index(b"PK\1\2")) - 46
    data[record + at : record + at + len(value)] = value
    path.write_bytes(data)


def test_a_member_that_is_not_where_the_directory_says_is_refused(tmp_path: Path) -> None:
    path, huge = tmp_path / "model.bin", struct.pack("<I", 1 << 30)
    for at, value, message in (
        (8, b"\1", "is encrypted"),
        (20, huge, "does not lie where"),  # the stored size alone
        (20, huge * 2, "does not lie where"),  # both sizes
        (42, struct.pack("<I", 4), "not a whole|does not lie where"),  # the offset: within another member
        (42, bytes(4), "does not lie where"),  # the offset: another member
        (42, huge, "not a whole|does not lie where"),  # the offset: outside of the file
    ):
        assert TorchFile(forge(path, state(tensor()))).array("w").shape == (4,)
        change_directory(path, "archive/data/0", at, value)
        with pytest.raises(InputError, match=f"model.bin: .*({message})"):
            TorchFile(path)


def test_a_member_that_lies_further_than_any_file_is_refused(tmp_path: Path) -> None:
    path = forge(tmp_path / "model.bin", state(tensor()))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("more", b"")  # so that the directory is written anew
        archive.getinfo("archive/data/0").header_offset = (1 << 64) - 1
    with pytest.raises(InputError, match="model.bin: not a whole torch checkpoint"):
        TorchFile(path)


def test_a_member_behind_the_directory_is_refused(tmp_path: Path) -> None:
    path, size, name = forge(tmp_path / "x", state(tensor()), {"data/1": b""}), 1 << 30, b"archive/data/0"
    local = struct.pack("<4s5H3I2H", b"PK\3\4", 20, 0, 0, 0, 0, 0, size, size, len(name), 0) + name
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = local
    change_directory(path, "archive/data/0", 20, struct.pack("<II", size, size))
    change_directory(path, "archive/data/0", 42, struct.pack("<I", path.stat().st_size - len(local)))
    change_directory(path, "archive/data/1", 42, struct.pack("<I", 2 * size))
    with pytest.raises(InputError, match="'data/0' does not lie where the zip directory says"):
        TorchFile(path)


def test_a_member_that_runs_into_the_next_is_refused(tmp_path: Path) -> None:
    path = forge(tmp_path / "x", state(tensor()))
    data = bytearray(path.read_bytes())
    local = data.rindex(b"PK\3\4")
    data[local + 28 : local + 30] = struct.pack("<H", 4)  # an extra field that the directory knows nothing of
    path.write_bytes(data)
    with pytest.raises(InputError, match="'data/0' does not lie where the zip directory says"):
        TorchFile(path)


def test_big_endian_files_are_refused(tmp_path: Path) -> None:
    assert TorchFile(forge(tmp_path / "x", state(tensor()), {"byteorder": b"little"})).entries
    with pytest.raises(InputError, match="byte order b'big', expected little"):
        TorchFile(forge(tmp_path / "x", state(tensor()), {"byteorder": b"big"}))


def test_legacy_files_are_refused_with_a_hint(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="before 1.6.*save it with a current torch, or save it as safetensors"):
        saved(tmp_path / "x", {"w": torch.ones(2)}, _use_new_zipfile_serialization=False)
    with tarfile.open(tmp_path / "x", "w") as archive:
        archive.addfile(tarfile.TarInfo("storages"), io.BytesIO())
    with pytest.raises(InputError, match="before 1.6.*save it with a current torch, or save it as safetensors"):
        TorchFile(tmp_path / "x")


def test_other_files_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    for content in (b"", b"text", b"PK\3\4", bytes(1000)):
        path.write_bytes(content)
        with pytest.raises(InputError, match="model.bin: not a"):
            TorchFile(path)
    for names in ((), ("a/data.pkl", "b/data.pkl"), ("data.pkl",)):
        with zipfile.ZipFile(path, "w") as archive:
            for name in ("readme", *names):
                archive.writestr(name, b"")
        with pytest.raises(InputError, match="model.bin: . members are called data.pkl, expected one"):
            TorchFile(path)
    for absent in (tmp_path, tmp_path / "y"):
        with pytest.raises(InputError, match="no such file"):
            TorchFile(absent)
