"""Ours and torch, each in a process of its own, one behind the other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def run_ours(arguments: Sequence[str]) -> dict[str, Any]:
    """What a command of vila-edge writes with --json. Raises SystemExit with its exit code if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "result.json"
        command = [sys.executable, "-m", "vila_edge", *arguments, "--json", str(file)]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL)
        if done.returncode:
            raise SystemExit(done.returncode)
        return dict(json.loads(file.read_text()))


def run_peer(python: str, module: str, job: dict[str, Any]) -> dict[str, Any]:
    """What a module prints that is given a job, both as JSON; or `absent` and why."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [python, "-m", module, json.dumps(job)]
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    except OSError as error:
        return {"absent": str(error)}
    if done.returncode:
        return {"absent": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]}
    return dict(json.loads(done.stdout))
