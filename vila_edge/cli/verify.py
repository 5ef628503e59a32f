"""vila-edge verify BUNDLE..."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vila_edge.cli.console import console, print_note
from vila_edge.errors import BundleError

if TYPE_CHECKING:
    from vila_edge.inspection import Check, Inspection

MOST = 20  # problems of a check that are printed: a lost file can be hundreds of parameters


def verify(
    bundles: Annotated[list[Path], typer.Argument(metavar="BUNDLE...", help="Made by vila-edge export.")],
    json_output: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Check bundles as far as that goes without running them: files, parameters, graphs, tokenizer.

    Nothing is written. Exit code 3 if anything is wrong.
    """
    from vila_edge.inspection import inspect

    found = []
    for bundle in bundles:
        if not json_output and console.is_terminal:
            print_note(f"checking {bundle}")  # every byte is read: for a large bundle that takes a while
        found.append(inspect(bundle))
        if not json_output:
            _show(found[-1])
    passed = all(inspection.passed for inspection in found)
    if json_output:
        print(json.dumps({"passed": passed, "bundles": [_as_json(one) for one in found]}, ensure_ascii=False))
    if not passed:
        raise typer.Exit(BundleError.exit_code)


def _show(inspection: Inspection) -> None:
    """A line for each check, a line for each problem, and what to do about them on stderr."""
    print(f"{inspection.path}: {'ok' if inspection.passed else 'FAILED'}")
    for check in inspection.checks:
        print(f"  {check.name:<11}{_state(check):<8}{_remark(check)}".rstrip())
        for problem in check.problems[:MOST]:
            print(f"    {problem.message}")
        if len(check.problems) > MOST:
            print(f"    and {len(check.problems) - MOST} more: --json has them all")
    hints = dict.fromkeys(problem.hint for check in inspection.checks for problem in check.problems if problem.hint)
    for hint in hints:
        console.print(f"hint: {hint}", markup=False, soft_wrap=True)


def _state(check: Check) -> str:
    if check.problems:
        return "FAILED"
    return "skipped" if check.skipped else "ok"


def _remark(check: Check) -> str:
    """What was looked at, for a check that is through; what was not, for one that is not whole."""
    if check.skipped:
        return f"not whole: {check.skipped}" if check.note else check.skipped
    return "" if check.problems else check.note


def _as_json(inspection: Inspection) -> dict[str, Any]:
    return {
        "bundle": str(inspection.path),
        "bundle_sha256": inspection.digest or None,
        "passed": inspection.passed,
        "checks": [
            {
                "check": check.name,
                "passed": check.passed,
                "note": check.note,
                "skipped": check.skipped or None,
                "problems": [{"file": problem.file, "message": problem.message} for problem in check.problems],
            }
            for check in inspection.checks
        ],
    }
