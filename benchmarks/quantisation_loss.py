"""What 4 bits cost the micro VILA: calibrated on text and images, on text alone, and rounded to nearest.

    python benchmarks/quantisation_loss.py CHECKPOINT [--group-size 32] [--json FILE]

Exit code 1 if KL(int4 || 16 bits) does not grow from the first to the last of them. Groups of 32 by default: rows of the
micro VILA are as short as 128 inputs, one group of a real model, which leaves a search next to nothing to choose.
CHECKPOINT is the one that `vila-edge demo` leaves in its folder. Both searches see as many positions of
conversations about training digits; what is measured is the LLM with float32 activations, against the checkpoint's
in 16 bits, on conversations about test digits, text and images together. KL is in nats, a mean over all positions.
"""

from __future__ import annotations

import dataclasses
import json
import random
import tempfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.table import Table

from vila_edge.bundle import Bundle
from vila_edge.cores import usable_cores
from vila_edge.engine.protocol import Engine
from vila_edge.errors import VilaEdgeError
from vila_edge.export.calibration import Sample, embed, write_samples
from vila_edge.export.checkpoint import Checkpoint
from vila_edge.export.recipe import Recipe
from vila_edge.export.run import export_bundle
from vila_edge.micro.digits import Digits, load_splits
from vila_edge.micro.instructions import Exchange, conversation, text_only
from vila_edge.prompt import Turn
from vila_edge.reference.engine import bundle_parameters
from vila_edge.reference.torch_engine import numpy_parameters_engine

LINES = {"image+text": "AWQ, images and text", "text": "AWQ, text alone", "rtn": "rounded to nearest"}
CALIBRATION = 400  # conversations to choose from

Array = NDArray[np.float64]


def main(
    checkpoint: Annotated[Path, typer.Argument(help="A micro VILA.")],
    group_size: Annotated[int, typer.Option("-g", "--group-size")] = 32,
    symmetric: Annotated[bool, typer.Option("--symmetric")] = False,
    tokens: Annotated[int, typer.Option(help="Positions that a search sees.")] = 8192,
    held_out: Annotated[int, typer.Option(help="Conversations to measure on.")] = 200,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the figures there.")] = None,
) -> None:
    """Export three times, compare, print."""
    opened = Checkpoint(checkpoint)
    cfg, tokenizer = opened.config, opened.tokenizer()
    reference, splits = numpy_parameters_engine(cfg, halves(opened)), load_splits()
    prompts = [
        embed(sample, cfg, tokenizer, reference) for sample in samples_of(splits.test, held_out, conversation_start)
    ]
    want = [log_softmax(logits(reference, x)) for x in prompts]
    base = Recipe(group_size=group_size, symmetric=symmetric, lm_head="fp16", calibration_tokens=tokens)
    rows: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        ways = {"rtn": dataclasses.replace(base, method="rtn")}
        for way, draw in (("text", text_only), ("image+text", conversation_start)):
            folder = Path(scratch) / way
            folder.mkdir()
            write_samples(folder, [line_of(sample) for sample in samples_of(splits.train, CALIBRATION, draw)])
            ways[way] = dataclasses.replace(base, calibration=folder)
        for way in LINES:
            bundle = export_bundle(
                checkpoint, Path(scratch) / f"{way}.bundle", ways[way], lambda *_: None, threads=usable_cores()
            )
            rows[way] = compare(want, [log_softmax(logits(engine_of(bundle), x)) for x in prompts])
    table = Table(title=f"4 bits against 16, {len(prompts)} held-out conversations, {sum(map(len, prompts))} positions")
    for column in ("", "KL(int4 || 16 bits)", "KL(16 bits || int4)", "same most likely token"):
        table.add_column(column, justify="left" if not column else "right")
    for way, row in rows.items():
        table.add_row(LINES[way], f"{row['kl']:.5f}", f"{row['reverse_kl']:.5f}", f"{row['top1_agreement']:.2%}")
    Console(width=112).print(table)
    if json_file:
        json_file.write_text(json.dumps(rows, indent=2) + "\n")
    if problem := wrong_order({way: row["kl"] for way, row in rows.items()}):
        raise SystemExit(problem)


def wrong_order(kl: dict[str, float]) -> str:
    """What is wrong with the claim that each way loses no more than the next one of LINES, or ""."""
    for better, worse in pairwise(LINES):
        if not kl[better] <= kl[worse]:
            found, expected = f"{LINES[better]}: KL {kl[better]:.5f}", f"{kl[worse]:.5f} ({LINES[worse]})"
            return f"the claim does not hold: {found}, expected at most {expected}"
    return ""


def conversation_start(rng: random.Random) -> Exchange:
    """The first exchange of a conversation of the SFT mixture: with images, or without."""
    return conversation(rng)[0]


def samples_of(digits: Digits, count: int, draw: Callable[[random.Random], Exchange]) -> list[Sample]:
    """Conversations, with pictures of their digits."""
    rng, by_label = random.Random(1), digits.by_label()
    samples = []
    for _ in range(count):
        exchange = draw(rng)
        pictures = tuple(digits.picture(rng.choice(by_label[digit])) for digit in exchange.digits)
        samples.append(
            Sample(turns=(Turn("user", exchange.question), Turn("assistant", exchange.answer)), images=pictures)
        )
    return samples


def line_of(sample: Sample) -> tuple[str, str, list[Image.Image]]:
    """A sample as a folder has it."""
    question, answer = (turn.text for turn in sample.turns)
    return question, answer, [image for image in sample.images if isinstance(image, Image.Image)]


def halves(checkpoint: Checkpoint) -> dict[str, NDArray[np.float32]]:
    """The checkpoint in 16 bits."""
    return {name: value.astype(np.float16).astype(np.float32) for name, value in checkpoint.parameters().items()}


def engine_of(bundle: Bundle) -> Engine:
    return numpy_parameters_engine(bundle.config, bundle_parameters(bundle))


def logits(engine: Engine, inputs_embeds: NDArray[np.float32]) -> NDArray[np.float32]:
    positions = range(len(inputs_embeds))
    return engine.forward(inputs_embeds, engine.new_cache(len(inputs_embeds)), positions)


def log_softmax(values: NDArray[np.float32]) -> Array:
    shifted = values.astype(np.float64) - values.max(-1, keepdims=True)
    found: Array = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return found


def compare(want: list[Array], got: list[Array]) -> dict[str, float]:
    """Means over all positions."""
    p, q = np.concatenate(want), np.concatenate(got)
    return {
        "kl": float((np.exp(q) * (q - p)).sum(-1).mean()),
        "reverse_kl": float((np.exp(p) * (p - q)).sum(-1).mean()),
        "top1_agreement": float((p.argmax(-1) == q.argmax(-1)).mean()),
    }


def run() -> None:
    """Errors that a user can act on come as one line."""
    try:
        typer.run(main)
    except VilaEdgeError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    run()
