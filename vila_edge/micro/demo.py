"""The demo: train the micro VILA, export it, measure both, and show what it answers."""

from __future__ import annotations

import hashlib
import os
import platform
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime
import torch
import transformers

from vila_edge import fsio
from vila_edge.errors import InputError
from vila_edge.eval.run import GREEDY, Prompt, accuracy
from vila_edge.export.calibration import write_samples
from vila_edge.export.checkpoint import Checkpoint
from vila_edge.export.recipe import Recipe as ExportRecipe
from vila_edge.export.run import export_bundle
from vila_edge.micro.contact_sheet import Card, contact_sheet
from vila_edge.micro.digits import Digits, load_splits
from vila_edge.micro.instructions import conversation
from vila_edge.micro.recipe import MicroTraining, Recipe
from vila_edge.micro.tasks import make_prompts
from vila_edge.parameters import count_parameters
from vila_edge.phases import Display, Phases
from vila_edge.pipeline import Pipeline, load
from vila_edge.prompt import IMAGE_MARK
from vila_edge.reference.engine import ReferenceEngine
from vila_edge.reference.torch_ops import TorchOps
from vila_edge.version import __version__

CHECKPOINT, BUNDLE, IMAGES, CALIBRATION = "checkpoint", "bundle", "images", "calibration"
CONTACT_SHEET, REPORT, TRAINING = "contact_sheet.png", "report.json", "training.json"
CALIBRATION_SAMPLES = 96
IMAGES_PER_DIGIT = 2
LICENSE_NOTE = "Apache-2.0; trained on the digits of scikit-learn (UCI, CC BY 4.0)"
# What the micro VILA is expected to reach on every machine; below it, the demo says so.
FLOORS = {"naming": 0.95, "sum": 0.9, "compare": 0.9, "icl_4shot": 0.75, "icl_4shot_seen": 0.9, "text": 0.95}


@dataclass(frozen=True)
class DemoResult:
    """Where everything lies, and the report as it is written to JSON."""

    folder: Path
    report: dict[str, Any]

    @property
    def bundle(self) -> Path:
        return self.folder / BUNDLE

    @property
    def below_floor(self) -> list[str]:
        """Tasks that either model does worse than expected."""
        scores = self.report["accuracy"]
        return [task for task, floor in FLOORS.items() if min(scores["fp32"][task], scores["int4"][task]) < floor]


def run_demo(folder: Path, recipe: Recipe, display: Display, retrain: bool = False) -> DemoResult:
    """Fill `folder` with checkpoint, bundle, images, contact sheet and report.

    A checkpoint that the same recipe and code made before is used again, unless `retrain`.
    """
    torch.set_num_threads(1)  # the model is small: more threads would mostly wait for each other
    phases = Phases(display)
    splits = load_splits()
    fsio.make_folder(folder)
    reused = not retrain and _training_digest(folder) == _digest(recipe)
    if not reused:
        _train(folder / CHECKPOINT, splits.train, recipe, phases)
    with phases.run("export") as progress:
        _write_calibration(folder / CALIBRATION, splits.train)
        export_recipe = ExportRecipe(calibration=folder / CALIBRATION, name="micro-vila", license_note=LICENSE_NOTE)
        bundle = export_bundle(
            folder / CHECKPOINT, folder / BUNDLE, export_recipe, lambda _, done, total: progress(done, total), True
        )
    int4 = load(folder / BUNDLE, threads=1)
    prompts = make_prompts(splits.test)
    report: dict[str, Any] = {
        "vila_edge": __version__,
        "seed": recipe.seed,
        "reused_checkpoint": reused,
        "parameters": count_parameters(int4.config),
        "bytes": {"checkpoint_fp32": _size(folder / CHECKPOINT), "bundle_int4": _size(folder / BUNDLE)},
        "prompts_per_task": len(prompts["naming"]),
        "accuracy": {
            "fp32": _measure(_fp32_pipeline(folder / CHECKPOINT), prompts, phases, "evaluate fp32"),
            "int4": _measure(int4, prompts, phases, "evaluate int4"),
        },
        "parity": bundle.manifest.parity,
        "machine": _machine(),
    }
    with phases.run("contact sheet"):
        _write_images(folder / IMAGES, splits.test)
        contact_sheet("vila-edge micro VILA, 4 bits: held-out digits", _cards(int4, prompts)).save(
            folder / CONTACT_SHEET
        )
    report |= {
        "seconds": round(phases.seconds, 2),
        "peak_memory_mib": round(phases.peak_memory_mib, 1),
        "phases": phases.as_dicts(),
    }
    fsio.replace_bytes(folder / REPORT, fsio.json_bytes(report))
    return DemoResult(folder, report)


def _train(target: Path, digits: Digits, recipe: Recipe, phases: Phases) -> None:
    with phases.run("prepare"):
        training = MicroTraining(digits, recipe)
    stages: list[tuple[str, Callable[[Callable[[int, int], None]], None]]] = [
        ("base: text LLM and vision tower", training.base),
        ("stage 0: align", training.align),
        ("stage 1: pretrain", training.pretrain),
        ("stage 2: sft", training.sft),
    ]
    for name, stage in stages:
        with phases.run(name) as progress:
            stage(progress)
    with fsio.new_folder(target, replace=True) as folder:
        training.save(folder)
        fsio.write_bytes(folder / TRAINING, fsio.json_bytes({"digest": _digest(recipe)}))


def _digest(recipe: Recipe) -> str:
    """Stands for all that decides what is trained: the recipe, the code, and the libraries that compute."""
    digest = hashlib.sha256(f"{recipe} {torch.__version__} {transformers.__version__}".encode())
    package = Path(__file__).parents[1]
    for path in sorted(
        [
            *package.glob("*.py"),
            *package.glob("micro/*.py"),
            *package.glob("train/*.py"),
            *package.glob("reference/*.py"),
        ]
    ):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _training_digest(folder: Path) -> str | None:
    """The digest of the training that made the checkpoint in `folder`, if there is a whole one."""
    try:
        Checkpoint(folder / CHECKPOINT)
        return str(fsio.read_json(folder / CHECKPOINT / TRAINING).get("digest"))
    except InputError:
        return None


def _write_calibration(target: Path, digits: Digits) -> None:
    """Conversations of the SFT mixture about training digits."""
    rng, by_label = random.Random(0), digits.by_label()
    samples = []
    for _ in range(CALIBRATION_SAMPLES):
        exchange = conversation(rng)[0]
        pictures = [digits.picture(rng.choice(by_label[digit])) for digit in exchange.digits]
        samples.append((exchange.question, exchange.answer, pictures))
    with fsio.new_folder(target, replace=True) as folder:
        write_samples(folder, samples)


def _fp32_pipeline(path: Path) -> Pipeline:
    """The checkpoint itself, in float32 on the torch reference."""
    checkpoint = Checkpoint(path)
    params = {name: torch.from_numpy(value) for name, value in checkpoint.parameters().items()}
    engine = ReferenceEngine(
        checkpoint.config,
        "torch (reference)",
        lambda cache: TorchOps(params, cache),
        torch.from_numpy,
        torch.Tensor.numpy,
    )
    return Pipeline("micro", checkpoint.config, checkpoint.tokenizer(), engine)


def _measure(
    pipeline: Pipeline, prompts: Mapping[str, Sequence[Prompt]], phases: Phases, name: str
) -> dict[str, float]:
    total, done = sum(map(len, prompts.values())), 0
    with phases.run(name) as progress, torch.inference_mode():

        def step() -> None:
            nonlocal done
            done += 1
            progress(done, total)

        return {task: round(accuracy(pipeline, of_task, step), 4) for task, of_task in prompts.items()}


def _cards(pipeline: Pipeline, prompts: Mapping[str, Sequence[Prompt]]) -> list[Card]:
    """Two prompts of each kind with what the model answers."""
    cards = []
    for task, of_task in prompts.items():
        for prompt in of_task[:2]:
            reply = pipeline.generate(prompt.question, prompt.images, GREEDY)
            question = prompt.question.replace(f"{IMAGE_MARK}\n", "").replace(IMAGE_MARK, "[image]")
            cards.append(
                Card(task, question, tuple(visual.frames[0] for visual in reply.visuals), reply.text, prompt.answer)
            )
    return cards


def _write_images(target: Path, digits: Digits) -> None:
    """Some held-out digits as files, to ask about: `7a.png` shows a seven."""
    with fsio.new_folder(target, replace=True) as folder:
        for label, indices in enumerate(digits.by_label()):
            for letter, index in zip("abcdefgh"[:IMAGES_PER_DIGIT], indices, strict=False):
                digits.picture(index).save(folder / f"{label}{letter}.png")


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _machine() -> dict[str, Any]:
    return {
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "onnxruntime": onnxruntime.__version__,
    }
