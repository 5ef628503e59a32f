"""The bootstrap ./run: one set-up, then at once; a plain word where something fails."""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Callable
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module, with an environment folder of its own."""
    monkeypatch.setenv("VILA_EDGE_VENV", str(tmp_path / "venv"))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    loader = SourceFileLoader("run", str(ROOT / "run"))
    spec = spec_from_loader("run", loader)
    assert spec
    module = module_from_spec(spec)
    loader.exec_module(module)
    return module


@pytest.fixture
def pip_calls(run: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """What pip is asked for. It always succeeds."""
    calls: list[tuple[str, ...]] = []

    def pip(*arguments: str) -> bool:
        calls.append(arguments)
        return True

    monkeypatch.setattr(run, "pip", pip)
    return calls


def no_torch(run: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fresh environment: `import torch` fails in it."""
    real: Callable[..., subprocess.CompletedProcess[bytes]] = subprocess.run

    def fake(command: list[str], **options: object) -> subprocess.CompletedProcess[bytes]:
        if command[-1] == "import torch":
            return subprocess.CompletedProcess(command, 1)
        return real(command, **options)

    monkeypatch.setattr(run.subprocess, "run", fake)


def test_it_needs_only_the_standard_library() -> None:
    program = f"import runpy; runpy.run_path({str(ROOT / 'run')!r}, run_name='run')"
    subprocess.run([sys.executable, "-I", "-S", "-c", program], check=True)


def test_without_a_command_it_explains_itself() -> None:
    done = subprocess.run([sys.executable, str(ROOT / "run")], capture_output=True, text=True)
    assert done.returncode == 1
    assert "./run demo, ./run test" in done.stderr


def test_set_up_happens_once(
    run: ModuleType,
    pip_calls: list[tuple[str, ...]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    no_torch(run, monkeypatch)
    run.set_up(allow_cuda=False)
    assert Path(run.PYTHON).exists()
    assert [call[0] for call in pip_calls] == ["install", "install"]
    assert "torch==2.13.0+cpu" in pip_calls[0]
    assert "--constraint" in pip_calls[1]
    assert "Ready after" in capsys.readouterr().err
    run.set_up(allow_cuda=False)
    assert len(pip_calls) == 2
    assert capsys.readouterr().err == ""
    Path(run.STAMP).write_text("another constraints.txt")
    run.set_up(allow_cuda=False)
    assert len(pip_calls) == 4


def test_a_cpu_build_of_torch_is_looked_for_in_two_places(run: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, ...]] = []
    no_torch(run, monkeypatch)

    def pip(*arguments: str) -> bool:
        calls.append(arguments)
        return False

    monkeypatch.setattr(run, "pip", pip)
    monkeypatch.setattr(run.sys, "platform", "linux")
    assert not run.install_torch(allow_cuda=False)
    assert ["https://download.pytorch.org/whl/cpu" in call for call in calls] == [False, True]
    assert all("torch==2.13.0+cpu" in call for call in calls)  # the build with CUDA can never match
    calls.clear()
    assert not run.install_torch(allow_cuda=True)
    assert "torch==2.13.0" in calls[-1]


def test_no_cpu_build_anywhere_is_said_with_a_remedy(run: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    no_torch(run, monkeypatch)
    monkeypatch.setattr(run, "pip", lambda *arguments: False)
    monkeypatch.setattr(run, "find_pythons", lambda: [(sys.executable, platform.python_version())])
    with pytest.raises(SystemExit, match="No CPU build of torch could be installed") as left:
        run.set_up(allow_cuda=False)
    assert "--allow-cuda" in str(left.value)
    assert not Path(run.STAMP).exists()


def test_an_old_python_is_refused_and_a_tested_one_preferred(run: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run.shutil, "which", lambda name: None)
    monkeypatch.setattr(run.sys, "version_info", (3, 9, 1))
    with pytest.raises(SystemExit, match=r"needs Python 3\.10 or newer, this is 3\.9\.1"):
        run.find_pythons()
    monkeypatch.setattr(run.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(run, "python_version", lambda path: (3, int(path[-2:]), 0) if path[-2:] != "12" else None)
    assert run.find_pythons() == [("/bin/python3.11", "3.11.0"), ("/bin/python3.10", "3.10.0")]
    monkeypatch.setattr(run.sys, "version_info", (3, 14, 0))
    assert run.find_pythons()[0] == ("/bin/python3.11", "3.11.0")
    monkeypatch.setattr(run.shutil, "which", lambda name: None)
    assert run.find_pythons() == [(sys.executable, "3.14.0")]


def test_versions_that_the_index_lacks_are_not_the_end(
    run: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[tuple[str, ...]] = []

    def pip(*arguments: str) -> bool:
        calls.append(arguments)
        return len(calls) == 2

    monkeypatch.setattr(run, "pip", pip)
    monkeypatch.setattr(run, "read", lambda path: "ERROR: No matching distribution found for numpy==2.4.6")
    monkeypatch.setattr(run, "torch_alone", lambda: "torch.txt")
    run.install_rest()
    assert calls[1][-2:] == ("--constraint", "torch.txt")
    assert "lacks one of the exact versions" in capsys.readouterr().err


def test_the_constraints_cover_every_dependency() -> None:
    """Each requirement of pyproject.toml has an exact version, and the CUDA build of torch brings none."""
    from packaging.requirements import Requirement

    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {Requirement(line).name: line for line in lines if line and not line.startswith("#")}
    text = (ROOT / "pyproject.toml").read_text()
    for name in (
        "numpy",
        "onnxruntime",
        "pillow",
        "tokenizers",
        "typer",
        "torch",
        "transformers",
        "scikit-learn",
        "pytest",
    ):
        assert f'"{name}' in text
        assert "==" in pinned[name]
    assert not any(name.startswith(("nvidia", "cuda", "triton")) for name in pinned)
