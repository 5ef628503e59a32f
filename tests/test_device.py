"""What a device gets: the wheel and its declared dependencies, without a package of the workstation."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterator
from importlib.metadata import Distribution, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from vila_edge.pipeline import Pipeline
from vila_edge.sampler import Sampling

ROOT = Path(__file__).parents[1]
WORKSTATION = ("torch", "transformers", "onnx", "accelerate", "sklearn", "psutil")


def closure(name: str, seen: set[str]) -> Iterator[Distribution]:
    """A distribution and all that it requires without extras."""
    found = distribution(name)
    if found.metadata["Name"].lower() in seen:
        return
    seen.add(found.metadata["Name"].lower())
    yield found
    for text in found.requires or []:
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield from closure(requirement.name, seen)


def copy_distribution(found: Distribution, site: Path) -> None:
    for file in found.files or []:
        source = Path(str(found.locate_file(file)))
        if ".." not in file.parts and "__pycache__" not in file.parts and source.is_file():
            target = site / file
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)


@pytest.fixture(scope="module")
def device_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel and what it requires, copied from here: no network is needed."""
    folder = tmp_path_factory.mktemp("device")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        cwd=ROOT,
        check=True,
        capture_output=True,
        env={**os.environ, "VILA_EDGE_WHEEL_WITHOUT_CODE": "1"},  # of kernels, which take a minute to build
    )
    (wheel,) = folder.glob("*.whl")
    assert wheel.stat().st_size < 1 << 20
    venv.create(folder / "env", with_pip=False, symlinks=True)
    (site,) = (folder / "env").glob("lib/python*/site-packages")
    for found in closure("vila-edge", set()):
        if found.metadata["Name"] != "vila-edge":
            copy_distribution(found, site)
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(site), str(wheel)],
        check=True,
    )
    return folder / "env" / "bin" / "python"


def run(python: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/")}
    return subprocess.run(
        [python, "-I", *arguments], capture_output=True, text=True, env=environment, cwd="/", stdin=subprocess.DEVNULL
    )


def test_the_workstations_packages_are_absent(device_python: Path) -> None:
    found = run(device_python, "-c", f"import importlib.util as u; print([u.find_spec(n) for n in {WORKSTATION}])")
    assert found.stdout.strip() == str([None] * len(WORKSTATION))


def test_chat_answers_as_on_the_workstation(
    device_python: Path, tiny_bundle: Path, pictures: list[Path], pipeline: Pipeline
) -> None:
    options = ["--json", "--temp", "1.5", "--seed", "3", "-n", "12", "-t", "1"]
    done = run(device_python, "-m", "vila_edge", "chat", tiny_bundle, "-i", pictures[0], "What is <image>?", *options)
    assert done.returncode == 0, done.stderr
    want = pipeline.generate("What is <image>?", pictures[:1], Sampling(1.5, seed=3, max_new_tokens=12))
    assert json.loads(done.stdout)["token_ids"] == want.token_ids


def test_the_numpy_backend_and_the_library_work_there_too(device_python: Path, tiny_bundle: Path) -> None:
    program = "import vila_edge, sys; print(vila_edge.load(sys.argv[1], 'numpy').generate('Hi').finish_reason)"
    done = run(device_python, "-c", program, tiny_bundle)
    assert done.stdout.strip() in ("stop", "length"), done.stderr


@pytest.mark.parametrize(("command", "package"), [("export", "onnx"), ("demo", "sklearn")])
def test_what_needs_the_workstation_says_so(command: str, package: str, device_python: Path, tmp_path: Path) -> None:
    output = str(tmp_path / "out")
    arguments = ["nowhere", "-o", output] if command == "export" else ["--out", output]
    done = run(device_python, "-m", "vila_edge", command, *arguments)
    assert done.returncode == 2
    assert "which is not installed" in done.stderr
    assert "pip install 'vila-edge[export" in done.stderr
    assert "Traceback" not in done.stderr
