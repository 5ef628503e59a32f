"""What an export needs: peak memory above the bare interpreter with torch, and time, by number of decoder blocks.

    python benchmarks/export_memory.py WORK_DIR [--layers 8 --layers 32] [--json FILE]

Checkpoints of VILA1.5-3B's dimensions with random weights are made in WORK_DIR (6.3 GB with 32 layers) and
exported, each by a process of its own, with the built-in calibration. Exit code 1 if one needs more than 2 GiB, or the
deepest more than 5 % above the flattest.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

MOST_MIB, MOST_GROWTH = 2048, 1.05  # what is claimed

# What must be there before anything is exported: the difference to it is the export's own.
BARE = "import torch, onnxruntime, onnx, numpy, tokenizers, PIL.Image, typer, rich"


def main(
    folder: Annotated[Path, typer.Argument(help="Where checkpoints and bundles are made.")],
    layers: Annotated[list[int] | None, typer.Option()] = None,
    calibration_tokens: Annotated[int, typer.Option(help="Positions that the search sees.")] = 2048,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the figures there.")] = None,
) -> None:
    """Export, measure, print."""
    bare = measure([sys.executable, "-c", BARE])["peak_mib"]
    rows = []
    for count in layers or [8, 32]:
        checkpoint, bundle = folder / f"checkpoint-{count}", folder / f"bundle-{count}"
        if not checkpoint.is_dir():
            maker = Path(__file__).with_name("random_checkpoint.py")
            subprocess.run([sys.executable, str(maker), str(checkpoint), "--layers", str(count)], check=True)
        command = [sys.executable, "-m", "vila_edge", "export", str(checkpoint), "-o", str(bundle), "--force"]
        found = measure([*command, "--calibration-tokens", str(calibration_tokens)])
        manifest = json.loads((bundle / "manifest.json").read_text())
        size = sum(file["size"] for file in manifest["files"].values())
        rows.append(
            {
                "layers": count,
                "above_bare_mib": round(found["peak_mib"] - bare, 1),
                **found,
                "bundle_bytes": size,
                "bytes_over_least": round(size / manifest["quantization"]["parameter_bytes"], 4),
                "digest": manifest["digest"],
            }
        )
    report = {
        "bare_mib": bare,
        "calibration_tokens": calibration_tokens,
        "exports": rows,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }
    table = Table(title=f"int4 export, VILA1.5-3B dimensions; interpreter with torch alone: {bare:.0f} MiB")
    for column in ("layers", "peak above that, MiB", "seconds", "bundle / parameters"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            str(row["layers"]), f"{row['above_bare_mib']:.0f}", f"{row['seconds']:.0f}", str(row["bytes_over_least"])
        )
    Console().print(table)
    if json_file:
        json_file.write_text(json.dumps(report, indent=2) + "\n")
    if problem := too_much({row["layers"]: row["above_bare_mib"] for row in rows}):
        raise SystemExit(problem)


def too_much(peaks: dict[int, float]) -> str:
    """What is wrong with the claims about peak memory, MiB by number of layers, or ""."""
    for layers, peak in peaks.items():
        if not peak <= MOST_MIB:
            return f"the claim does not hold: {peak:.0f} MiB with {layers} layers, expected at most {MOST_MIB}"
    few, many = min(peaks), max(peaks)
    growth = peaks[many] / peaks[few]
    if not growth <= MOST_GROWTH:
        expected = f"expected at most {MOST_GROWTH - 1:.0%}"
        return f"the claim does not hold: {growth - 1:+.1%} from {few} to {many} layers, {expected}"
    return ""


def measure(command: list[str]) -> dict[str, Any]:
    """Run a command to its end: its seconds, and the most memory it held."""
    start = time.monotonic()
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)}: failed")
    return {"seconds": round(time.monotonic() - start, 1), "peak_mib": round(usage.ru_maxrss / 1024, 1)}


if __name__ == "__main__":
    typer.run(main)
