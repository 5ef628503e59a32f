"""An export: a bundle, or an AutoAWQ directory, made in a working folder and put in its place when it is whole."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from vila_edge import fsio
from vila_edge.bundle import WEIGHTS, Bundle
from vila_edge.errors import UsageError
from vila_edge.export.autoawq_folder import LlmWeights, weight_bytes, write_autoawq
from vila_edge.export.calibration import too_few
from vila_edge.export.job import Export, Progress, Say
from vila_edge.export.recipe import Recipe
from vila_edge.export.steps import StartOver, discard, empty, working_folder
from vila_edge.export.target import check_target
from vila_edge.export.workers import workers
from vila_edge.stored import StoredParameters
from vila_edge.tensorfile import TensorFile


def export_bundle(
    checkpoint_path: Path,
    bundle_path: Path,
    recipe: Recipe,
    progress: Progress,
    replace: bool = False,
    warn: Say = lambda message: None,
    threads: int = 1,
    device: str = "cpu",
) -> Bundle:
    """Write a bundle, whole or not at all, and open it. `warn` is told what the files of the checkpoint leave open.

    An export that was interrupted goes on where it stopped. `threads` changes nothing in the bundle; `device`,
    of torch, searches.

    Raises CheckpointError, ConfigError or InputError for what cannot be read, UsageError for a recipe that does
    not fit the model, ParityError if the result does not compute what the checkpoint does.
    """
    with _made(checkpoint_path, bundle_path, recipe, progress, replace, warn, threads, device) as (_, folder):
        fsio.place_folder(folder, bundle_path, folder.with_name(fsio.RETIRED))
    return Bundle.open(bundle_path)


def export_autoawq(
    checkpoint_path: Path,
    target: Path,
    recipe: Recipe,
    progress: Progress,
    replace: bool = False,
    warn: Say = lambda message: None,
    threads: int = 1,
    device: str = "cpu",
) -> None:
    """Write the LLM as a directory that transformers and vLLM load. Arguments and errors are those of `export_bundle`.

    It is made from a bundle that passed the parity gate. Raises UsageError if the recipe is not of 4 bits.
    """
    if recipe.quantization != "int4" or recipe.lm_head not in ("auto", "fp16") or recipe.vision != "fp16":
        raise UsageError(
            "--to autoawq: that format has decoder blocks in 4 bits and the rest in 16",
            "leave --quant, --lm-head and --vision away",
        )
    recipe = dataclasses.replace(recipe, lm_head="fp16")
    with _made(checkpoint_path, target, recipe, progress, replace, warn, threads, device, True) as (export, folder):
        files = [TensorFile(path) for path in sorted((folder / WEIGHTS).glob("*.safetensors"))]
        stored, llm = StoredParameters(files), export.checkpoint.files.configs["llm"].data
        group_size = export.storage_plan("fp16").storage.group_size
        source = LlmWeights(
            export.cfg.llm, group_size, lambda name: stored.float32(name, export.source.shapes[name]), stored.int4
        )
        tokenizer, ids = export.checkpoint.files.tokenizer, (llm.get("bos_token_id"), llm.get("eos_token_id"))
        write_autoawq(target, source, tokenizer, *ids, replace, within=folder.parent)


@contextmanager
def _made(
    checkpoint_path: Path,
    target: Path,
    recipe: Recipe,
    progress: Progress,
    replace: bool,
    warn: Say,
    threads: int,
    device: str,
    to_autoawq: bool = False,
) -> Iterator[tuple[Export, Path]]:
    """A finished bundle in a folder beside `target`, which goes when the block ends well."""
    check_target(target, replace, checkpoint_path, recipe)
    with workers(threads) as pool, torch.inference_mode():
        export = Export(checkpoint_path, recipe, progress, warn, pool, device)
        if recipe.calibration and len(export.search) == len(export.samples.search):
            few = too_few(export.search, export.cfg, export.tokenizer)
            if few:
                warn(few)
        with working_folder(target, export.key, warn) as (work, resumed):
            if resumed:
                warn(f"going on with what is finished in {work}")
            group_size = export.storage_plan("fp16").storage.group_size
            export.check_space(work, weight_bytes(export.cfg.llm, group_size) if to_autoawq else 0)
            folder = _run(export, work)
            check_target(target, replace, checkpoint_path, recipe)  # hours may have passed
            yield export, folder
            discard(work)


def _run(export: Export, work: Path) -> Path:
    try:
        return export.run(work)
    except StartOver:
        export.warn(f"what was left in {work} is damaged: starting anew")
        empty(work)
        return export.run(work)
