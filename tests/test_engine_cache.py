"""Engines are code: what comes out of the cache is what went in, on this machine, or an error that tells."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from vila_edge import machine_secret
from vila_edge.engine.engine_cache import EngineCache, EngineKey, build_flags, default_root, engine_key
from vila_edge.engine.tensorrt_options import BuildOptions, default_form, load_tensorrt
from vila_edge.errors import BackendError
from vila_edge.version import __version__

PLAN = bytes(range(256)) * 40
OPTIONS = BuildOptions(context=2048)


def tensorrt(version: str = "10.3.0", name: str = "tensorrt") -> ModuleType:
    module = ModuleType(name)
    module.__dict__["__version__"] = version
    return module


def key_of(component: str = "decoder", options: BuildOptions = OPTIONS, sm: int = 87) -> EngineKey:
    return engine_key("d" * 64, component, tensorrt(), sm, build_flags(component, options))


@pytest.fixture
def cache(tmp_path: Path) -> EngineCache:
    return EngineCache(tmp_path / "deep" / "engines")


def test_what_goes_in_comes_out(cache: EngineCache) -> None:
    key = key_of()
    assert cache.find(key) is None
    path = cache.store(key, memoryview(PLAN))
    assert cache.find(key) == path
    assert cache.read(key) == PLAN
    assert cache.verify(key) == len(PLAN)
    assert cache.known() == [key]


def test_nobody_else_can_read_it(cache: EngineCache) -> None:
    before = os.umask(0)
    try:
        path = cache.store(key_of(), PLAN)
    finally:
        os.umask(before)
    modes = [stat.S_IMODE(file.stat().st_mode) for file in (cache.root, path, cache.secret)]
    assert modes == [0o700, 0o600, 0o600]
    assert sorted(os.listdir(cache.root)) == sorted([path.name, "secret"])


def test_a_folder_that_is_open_is_closed(cache: EngineCache) -> None:
    cache.root.mkdir(parents=True)
    cache.root.chmod(0o755)
    cache.prepare()
    assert stat.S_IMODE(cache.root.stat().st_mode) == 0o700


def test_the_folder_is_that_of_the_desktop_specification(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_root() == tmp_path / "vila-edge" / "engines"
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    for ignored in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert default_root() == tmp_path / "me" / ".cache" / "vila-edge" / "engines"


@pytest.mark.parametrize(
    "other",
    [
        dataclasses.replace(key_of(), bundle_digest="e" * 64),
        dataclasses.replace(key_of(), component="mm_projector"),
        dataclasses.replace(key_of(), runtime="tensorrt_rtx"),
        dataclasses.replace(key_of(), version="10.3.1"),
        dataclasses.replace(key_of(), sm=86),
        key_of(options=BuildOptions(context=1024)),
        key_of(options=BuildOptions(context=2048, chunk=256)),
        key_of(options=BuildOptions(context=2048, form="append")),
        key_of(options=BuildOptions(context=2048, workspace=1 << 30)),
        dataclasses.replace(key_of(), flags={**key_of().flags, "vila_edge": "0.0.0"}),
    ],
)
def test_every_field_of_the_key_makes_another_engine(other: EngineKey, cache: EngineCache) -> None:
    assert other.file_name != key_of().file_name
    cache.store(key_of(), PLAN)
    assert cache.find(other) is None
    with pytest.raises(BackendError, match=f"no engine of {other.component} to use"):
        cache.read(other)


def test_the_order_of_flags_does_not_matter() -> None:
    turned = dataclasses.replace(key_of(), flags=dict(reversed(list(key_of().flags.items()))))
    assert turned.file_name == key_of().file_name


def test_a_component_depends_on_its_own_options_alone() -> None:
    larger = BuildOptions(context=4096, chunk=1024)
    assert key_of("vision_tower", larger) == key_of("vision_tower")
    more = BuildOptions(context=2048, images=4)
    assert key_of("decoder", more) == key_of("decoder")
    assert key_of("vision_tower", more) != key_of("vision_tower")


def flip_last(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def empty(path: Path) -> None:
    path.write_bytes(b"")


def a_bare_plan(path: Path) -> None:
    path.write_bytes(PLAN)


def without_its_seal(path: Path) -> None:
    header, plan = path.read_bytes().split(b"\n", 1)
    said = json.loads(header)
    del said["hmac"]
    path.write_bytes(json.dumps(said).encode() + b"\n" + plan)


def cut_with_its_size(path: Path) -> None:
    header, plan = path.read_bytes().split(b"\n", 1)
    said = json.loads(header) | {"size": len(plan) - 1}
    path.write_bytes(json.dumps(said).encode() + b"\n" + plan[:-1])


def a_list_for_a_key(path: Path) -> None:
    header, plan = path.read_bytes().split(b"\n", 1)
    path.write_bytes(json.dumps(json.loads(header) | {"key": [1]}).encode() + b"\n" + plan)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (flip_last, "HMAC does not match"),
        (cut, "truncated"),
        (lengthen, "truncated or added to"),
        (empty, "does not begin like an engine"),
        (a_bare_plan, "does not begin like an engine"),
        (without_its_seal, "not understood"),
        (cut_with_its_size, "HMAC does not match"),
        (a_list_for_a_key, "names no key"),
    ],
)
def test_damage_is_found_and_named(damage: Callable[[Path], None], says: str, cache: EngineCache) -> None:
    path = cache.store(key_of(), PLAN)
    damage(path)
    for look in (cache.read, cache.verify):
        with pytest.raises(BackendError, match=says) as error:
            look(key_of(), "my.bundle")
        assert str(path) in error.value.message
        assert error.value.hint == "build it on this machine: vila-edge build my.bundle --force"


def test_an_engine_of_another_machine_is_refused(cache: EngineCache, tmp_path: Path) -> None:
    other = EngineCache(tmp_path / "other")
    foreign = other.store(key_of(), PLAN)
    cache.prepare()
    foreign.rename(cache.root / foreign.name)
    with pytest.raises(BackendError, match="not built by this user on this machine"):
        cache.read(key_of())


def test_a_renamed_engine_is_refused(cache: EngineCache) -> None:
    wanted = key_of(options=BuildOptions(context=4096))
    cache.store(key_of(), PLAN).rename(cache.root / wanted.file_name)
    with pytest.raises(BackendError, match="renamed: its header says context 2048, wanted: 4096"):
        cache.read(wanted)
    assert cache.known() == []
    header, plan = (cache.root / wanted.file_name).read_bytes().split(b"\n", 1)
    said = json.loads(header) | {"key": wanted.plain()}  # the header too
    (cache.root / wanted.file_name).write_bytes(json.dumps(said).encode() + b"\n" + plan)
    with pytest.raises(BackendError, match="HMAC does not match"):
        cache.read(wanted)
    assert cache.known() == [wanted]  # what it says; nothing is handed out


def test_a_link_is_no_engine(cache: EngineCache, tmp_path: Path) -> None:
    path = cache.store(key_of(), PLAN)
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert cache.find(key_of()) is None
    assert cache.known() == []


def test_the_secret_is_for_its_owner_alone(cache: EngineCache) -> None:
    cache.store(key_of(), PLAN)
    cache.secret.chmod(0o640)
    for use in (lambda: cache.read(key_of()), lambda: cache.store(key_of(), PLAN), cache.prepare):
        with pytest.raises(BackendError, match=r"open to others: its mode is 0640, expected 0600") as error:
            use()
        assert f"remove {cache.secret}" in error.value.hint
    cache.secret.chmod(0o600)
    assert cache.read(key_of()) == PLAN


def test_without_the_secret_nothing_is_trusted(cache: EngineCache) -> None:
    cache.store(key_of(), PLAN)
    secret = cache.secret.read_bytes()
    assert len(set(secret)) > 10
    cache.secret.write_bytes(secret[:31])
    with pytest.raises(BackendError, match="damaged: expected 32 bytes"):
        cache.read(key_of())
    cache.secret.unlink()
    with pytest.raises(BackendError, match="missing: engines here cannot be told from foreign ones"):
        cache.read(key_of())
    cache.prepare()  # a new one
    with pytest.raises(BackendError, match="HMAC does not match"):
        cache.read(key_of())


def test_a_secret_of_somebody_else_is_refused(cache: EngineCache, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.store(key_of(), PLAN)
    me = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: me + 1)
    with pytest.raises(BackendError, match=f"secret belongs to user {me}, expected {me + 1}"):
        cache.read(key_of())
    with pytest.raises(BackendError, match=f"engines belongs to user {me}, not to {me + 1}"):
        cache.prepare()


def test_two_processes_make_one_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one is through just before ours links its own."""
    path, link = tmp_path / "secret", os.link

    def late(source: Path, target: Path) -> None:
        monkeypatch.setattr(os, "link", link)
        path.write_bytes(b"theirs")
        link(source, target)

    monkeypatch.setattr(os, "link", late)
    machine_secret.make_secret(path)
    assert path.read_bytes() == b"theirs"
    assert os.listdir(tmp_path) == ["secret"]


def test_a_folder_without_access_is_named(cache: EngineCache, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.store(key_of(), PLAN)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    for name in ("lstat", "listdir"):
        monkeypatch.setattr(os, name, refuse)
    for use in (lambda: cache.find(key_of()), cache.known, lambda: cache.read(key_of())):
        with pytest.raises(
            BackendError, match=f"cannot use the engine cache: {cache.root}.*Permission denied"
        ) as error:
            use()
        assert "XDG_CACHE_HOME" in error.value.hint
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(BackendError, match=f"{cache.root}: no permission to read and write"):
        cache.prepare()


def test_a_file_in_the_place_of_the_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BackendError, match="is not a folder"):
        EngineCache(tmp_path / "file").prepare()
    with pytest.raises(BackendError, match="file/engines: File exists"):
        EngineCache(tmp_path / "file" / "engines").prepare()
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) != 0o700


def test_a_full_disk_leaves_the_old_engine(cache: EngineCache, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.store(key_of(), PLAN)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(BackendError, match="No space left on device") as error:
        cache.store(key_of(), PLAN[::-1])
    assert "MiB are free there; make room" in error.value.hint
    assert cache.read(key_of()) == PLAN
    assert len(os.listdir(cache.root)) == 2


@pytest.mark.parametrize(
    ("there", "says"),
    [
        ([], "none is in "),
        ([dataclasses.replace(key_of(), bundle_digest="e" * 64)], "none is in "),
        ([key_of("mm_projector")], "none is in "),
        ([key_of(sm=86), key_of(sm=72)], "it was built for SM 72, SM 86, this is SM 87"),
        (
            [dataclasses.replace(key_of(), version="8.5.2")],
            "it was built for tensorrt 8.5.2, this is tensorrt 10.3.0",
        ),
        (
            [dataclasses.replace(key_of(), runtime="tensorrt_rtx", version="1.7.1.116")],
            "it was built for tensorrt_rtx, this is tensorrt",
        ),
        ([key_of(options=BuildOptions(context=1024))], "it was built with context 1024, wanted: 2000"),
        (
            [dataclasses.replace(key_of(), flags={**key_of().flags, "vila_edge": "0.0.1"})],
            f"it was built with vila_edge 0.0.1, wanted: {__version__}",
        ),
    ],
)
def test_what_is_there_instead_is_said(there: list[EngineKey], says: str, cache: EngineCache) -> None:
    for age, key in enumerate(there):
        path = cache.store(key, PLAN)
        os.utime(path, (1000 + age, 1000 + age))
    wanted = engine_key("d" * 64, "decoder", tensorrt(), 87, {"context": 2000})
    with pytest.raises(BackendError, match=re.escape(f"no engine of decoder to use: {says}")) as error:
        cache.pick(wanted, "my.bundle")
    other = "; or take --backend tensorrt_rtx" if "tensorrt_rtx" in says else ""
    assert error.value.hint == "build it on this machine: vila-edge build my.bundle" + other


def test_the_newest_engine_that_is_large_enough_is_picked(cache: EngineCache) -> None:
    for age, context in enumerate((4096, 2048, 1024)):
        path = cache.store(key_of(options=BuildOptions(context=context)), PLAN)
        os.utime(path, (1000 + age, 1000 + age))

    def picked(**flags: int | str | None) -> object:
        return cache.pick(engine_key("d" * 64, "decoder", tensorrt(), 87, flags)).flags["context"]

    assert picked() == 1024
    assert picked(context=1025) == 2048
    assert picked(context=2049) == 4096
    assert picked(form="scatter", context=2048, workspace=None) == 2048
    with pytest.raises(BackendError, match="built with form scatter, wanted: append"):
        picked(form="append")


@pytest.mark.parametrize(
    ("name", "version", "form"),
    [
        ("tensorrt", "10.3.0", "append"),
        ("tensorrt", "10.9.0.34", "append"),
        ("tensorrt", "10.15.1.29", "scatter"),
        ("tensorrt", "11.0.0", "scatter"),
        ("tensorrt_rtx", "1.7.1.116", "scatter"),
    ],
)
def test_the_form_of_the_cache_follows_the_version(name: str, version: str, form: str) -> None:
    assert default_form(tensorrt(version, name)) == form


def test_the_first_tensorrt_that_is_there_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, rtx = tensorrt(), tensorrt("1.7.1", "tensorrt_rtx")
    monkeypatch.setitem(sys.modules, "tensorrt", ours)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", rtx)
    assert load_tensorrt() is ours
    assert load_tensorrt("tensorrt_rtx") is rtx
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert load_tensorrt() is rtx
    with pytest.raises(BackendError, match="tensorrt: .*"):
        load_tensorrt("tensorrt")
