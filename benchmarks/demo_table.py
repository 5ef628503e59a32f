"""The README's table of the demo, from a report that the demo wrote.

    python benchmarks/demo_table.py [REPORT]      takes the report over as results/demo.json, rewrites the README

Without a report, the committed one is rendered again.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from vila_edge.cli.demo import ROWS

ROOT = Path(__file__).parents[1]
README, RESULT = ROOT / "README.md", ROOT / "benchmarks" / "results" / "demo.json"
BEGIN, END = "<!-- demo table: made by benchmarks/demo_table.py -->", "<!-- end of demo table -->"


def main(report: Annotated[Path | None, typer.Argument(help="Written by vila-edge demo --report.")] = None) -> None:
    if report:
        shutil.copyfile(report, RESULT)
    README.write_text(with_table(README.read_text(), json.loads(RESULT.read_text())))


def with_table(readme: str, report: dict[str, Any]) -> str:
    """The README with the report's table between its marks."""
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n{render(report)}\n{END}{rest.split(END)[1]}"


def render(report: dict[str, Any]) -> str:
    accuracy, machine = report["accuracy"], report["machine"]
    lines = [
        f"| {report['prompts_per_task']} held-out prompts a row | fp32 | int4 |",
        "|---|---|---|",
        *(f"| {text} | {accuracy['fp32'][task]:.1%} | {accuracy['int4'][task]:.1%} |" for task, text in ROWS.items()),
        "",
        f"{report['parameters'] / 1e6:.2f} M parameters; {report['bytes']['checkpoint_fp32'] / 1e6:.1f} MB of checkpoint,"
        f" {report['bytes']['bundle_int4'] / 1e6:.1f} MB of bundle; {report['seconds']:.0f} s and "
        f"{report['peak_memory_mib']:.0f} MiB on {machine['cores']} cores ({machine['architecture']}, Python "
        f"{machine['python']}, torch {machine['torch']}, onnxruntime {machine['onnxruntime']}).",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(main)
