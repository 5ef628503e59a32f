"""The contracts on who may import whom, and that the runtime really runs without torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_import_contracts_hold() -> None:
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def test_the_walk_of_a_prompt_imports_no_package_of_the_workstation(tiny_bundle: Path, pictures: list[Path]) -> None:
    program = """
import sys
for name in ("torch", "transformers", "onnx", "accelerate", "sklearn", "psutil"):
    sys.modules[name] = None
import vila_edge
session = vila_edge.Session(vila_edge.load(sys.argv[1]), vila_edge.Sampling(max_new_tokens=5))
for question in ("What is <image>?", "And <image>?"):
    assert session.ask(question, [sys.argv[2]]).finish().finish_reason
"""
    subprocess.run([sys.executable, "-c", program, str(tiny_bundle), str(pictures[0])], check=True)


def test_media_is_decoded_in_one_place() -> None:
    """One door for media, so that its limits hold everywhere (contact_sheet and digits make images, no more)."""
    found = [
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "vila_edge").rglob("*.py")
        if any(opener in path.read_text() for opener in ("Image.open(", "urlopen", "import requests", "import httpx"))
    ]
    assert found == ["vila_edge/media/image.py"]
