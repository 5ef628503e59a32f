"""The parity gate again, on a finished bundle: how far it is from a checkpoint. Exit code 1 if a limit is broken.

    python export/verify_bundle.py BUNDLE CHECKPOINT [--recipe NAME] [--calibration DIR] [--json]

A layer at a time, on the held-out samples. Limits are those of the recipe's [gate]. The report is printed also if one
of them is broken; the error names the first. The checkpoint's era and template are taken from the bundle.
"""

from __future__ import annotations

import dataclasses
import json
import math
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from export.common import chosen, run_script, samples_of, threads_or_all
from vila_edge.bundle import Bundle
from vila_edge.cli.console import PhaseDisplay, print_warning
from vila_edge.errors import InputError
from vila_edge.export.checkpoint import Checkpoint
from vila_edge.export.eras import Choices
from vila_edge.export.gate import KL, Gate
from vila_edge.export.source import Source
from vila_edge.export.steps import Relay, Steps
from vila_edge.export.storage import Storage
from vila_edge.export.verify import Verification
from vila_edge.export.workers import workers
from vila_edge.tokenizer import Tokenizer

AT_MOST = ("mean_kl", "max_activation")
# Lets everything pass, so that all of it is reported before a limit is applied.
OPEN = Gate(**{limit.name: math.inf * (1 if limit.name in AT_MOST else -1) for limit in dataclasses.fields(Gate)})


def main(
    bundle: Annotated[Path, typer.Argument()],
    checkpoint: Annotated[Path, typer.Argument()],
    recipe: Annotated[str | None, typer.Option(help="Its limits, calibration and vision tower.")] = None,
    calibration: Annotated[Path | None, typer.Option(help="Folder of samples; default: built-in.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="The report as one object.")] = False,
    threads: Annotated[int, typer.Option(help="Default: all cores.")] = 0,
) -> None:
    """Compare a bundle with a checkpoint."""
    how = chosen(recipe, calibration=calibration)
    samples, sealed = samples_of(how), Bundle.open(bundle)
    opened = checkpoint_of(sealed, checkpoint, how.choices.vision_tower)
    tokenizer = Tokenizer(sealed.tokenizer_json(), config=sealed.config.tokenizer)
    forms = sealed.manifest.quantization
    storage = Storage("int4" if forms.get("bits") == 4 else "fp16", forms.get("lm_head", "fp16"))
    with workers(threads_or_all(threads)) as pool, torch.inference_mode(), tempfile.TemporaryDirectory() as work:

        def report(gate: Gate, progress: Callable[[int, int], None]) -> dict[str, Any]:
            verification = Verification(
                sealed.path,
                sealed.config,
                tokenizer,
                Source(opened),
                samples.held_out,
                gate,
                storage,
                pool,
                sealed=True,
            )
            return verification.report(Relay(Steps(Path(work), "verify"), "verify"), progress)

        with PhaseDisplay() as display:
            found = report(OPEN, partial(display.progress, "verify"))
        if json_:
            print(json.dumps(found, indent=2))
        else:
            show(found, f"{bundle} against {checkpoint}")
        report(how.gate, lambda done, total: None)  # everything is known by now


def checkpoint_of(bundle: Bundle, path: Path, vision_tower: Path | None) -> Checkpoint:
    """The checkpoint, read as the bundle's was. Raises InputError if it is another model."""
    profile = bundle.config.profile
    opened = Checkpoint(path, Choices(profile.era, profile.token_order, profile.template, vision_tower))
    for field in dataclasses.fields(bundle.config):
        mine, theirs = getattr(bundle.config, field.name), getattr(opened.config, field.name)
        if field.name != "profile" and mine != theirs:
            raise InputError(f"{path}: its {field.name} is {theirs}, but that of {bundle.path} is {mine}")
    if bundle.manifest.provenance.get("checkpoint_sha256") != opened.sha256():
        print_warning(f"{bundle.path} was made of another checkpoint, or of other files of this one")
    return opened


def show(report: dict[str, Any], title: str) -> None:
    """The report as a table."""
    table = Table("component", "mean cosine", "min cosine", "max error", "max activation", title=title)
    rows: dict[str, Any] = {name: report[name] for name in ("vision_tower", "mm_projector") if name in report}
    rows |= {f"block {i}": found for i, found in enumerate(report["blocks"])}
    rows |= {name: report[name] for name in ("lm_head", "llm", "llm_int8_cache") if name in report}
    for name, found in rows.items():
        values = (found.get(key) for key in ("mean_cosine", "min_cosine", "max_error", "max_activation"))
        table.add_row(name, *("" if value is None else f"{value:.4g}" for value in values))
    Console().print(table)
    print(f"{report['prompts']} prompts, {report['backend']}")
    for name, what in (("llm", ""), ("llm_int8_cache", "with a kv_cache in 8 bits: ")):
        if found := report.get(name):
            same = f"same most likely token in {found['top1_agreement']:.1%} of positions"
            print(f"{what}{same}, mean {KL} {found['mean_kl']:.3g} nats")


if __name__ == "__main__":
    run_script(main)
