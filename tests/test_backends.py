"""Which engine a name opens, and what it is opened with."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from vila_edge import load
from vila_edge.backends import open_engine
from vila_edge.bundle import Bundle
from vila_edge.engine import tensorrt
from vila_edge.engine.cuda import engine
from vila_edge.errors import BackendError, UsageError


@pytest.mark.parametrize(("backend", "runtime"), [("tensorrt", "auto"), ("tensorrt_rtx", "tensorrt_rtx")])
def test_each_tensorrt_is_opened_by_its_name_for_the_context_that_is_wanted(
    backend: str, runtime: str, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[tuple[Any, ...]] = []
    monkeypatch.setattr(tensorrt, "TensorrtEngine", lambda bundle, name, **asked: opened.append((name, asked)))
    open_engine(Bundle.open(tiny_bundle), backend, context=77, projector="kernel")
    assert opened == [(runtime, {"context": 77, "projector": "kernel"})]


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt_rtx"])
def test_all_that_is_missing_is_named_at_once(backend: str, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tensorrt", "tensorrt_rtx", "pycuda", "pycuda.driver"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(BackendError, match=rf"{backend}: the package .*; the package pycuda is not installed") as error:
        load(tiny_bundle, backend)
    assert "JetPack" in error.value.hint
    assert error.value.hint.endswith("; pip install pycuda")


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_reach_every_session(threads: int, tiny_bundle: Path) -> None:
    opened: Any = open_engine(Bundle.open(tiny_bundle), "onnxruntime", threads)
    sessions = [opened._vision_tower, opened._mm_projector, *(part.session for part in opened._decoder)]
    assert {session.get_session_options().intra_op_num_threads for session in sessions} == {threads}


def test_our_own_kernels_are_opened_with_what_is_asked_of_them(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[tuple[Any, ...]] = []
    monkeypatch.setattr(engine, "CudaEngine", lambda bundle, *asked: opened.append(asked))
    open_engine(Bundle.open(tiny_bundle), "cuda")
    open_engine(Bundle.open(tiny_bundle), "cuda", 3, "int8", 77, "kernel", "onnxruntime")
    assert opened == [("float16", 0, "auto", None), ("int8", 77, "onnxruntime", 3)]


@pytest.mark.parametrize(
    ("backend", "asked", "message"),
    [
        ("cuda", {"tower": "torch"}, "unknown tower 'torch'"),
        ("onnxruntime", {"tower": "tensorrt"}, "--tower tensorrt is not there on --backend onnxruntime"),
        ("tensorrt", {"kv_cache": "int8"}, "a kv_cache in int8 is not there on tensorrt"),
    ],
)
def test_what_a_backend_does_not_have_is_refused(
    backend: str, asked: dict[str, Any], message: str, tiny_bundle: Path
) -> None:
    with pytest.raises(UsageError, match=message) as error:
        open_engine(Bundle.open(tiny_bundle), backend, **asked)
    assert "--backend cuda" in error.value.hint or "tensorrt, onnxruntime" in error.value.hint


def test_without_a_gpu_our_own_kernels_say_what_is_missing(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pycuda", "pycuda.driver"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(BackendError, match="the package pycuda is not installed"):
        load(tiny_bundle, "cuda")
