"""An export, step by step: checkpoint, calibration, AWQ block by block, weights, graphs, parity, manifest.

Tensors are read and written one decoder block at a time, and every finished step stays on the disk, beside the
bundle that is to be made, until the whole is there.
"""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from vila_edge import architecture, fsio
from vila_edge.bundle import EMBED_TOKENS_FILE, FORMAT_VERSION, TOKENIZER, WEIGHTS, Bundle, write_manifest
from vila_edge.errors import InputError, UsageError, VilaEdgeError
from vila_edge.export.autoawq_folder import LlmWeights, write_autoawq
from vila_edge.export.awq import quantise_block
from vila_edge.export.built_in_samples import built_in
from vila_edge.export.calibration import choose, embed, read_samples
from vila_edge.export.checkpoint import Checkpoint
from vila_edge.export.encoder import CheckpointEncoder
from vila_edge.export.gate import GateError
from vila_edge.export.grid import Grid
from vila_edge.export.layouts import PULLED_FROM
from vila_edge.export.recipe import Recipe
from vila_edge.export.source import Source
from vila_edge.export.states import read_states, write_states
from vila_edge.export.steps import Relay, Result, StartOver, Steps, discard, empty, working_folder
from vila_edge.export.storage import LLM_FILE, StoragePlan, layer_file
from vila_edge.export.verify import Verification
from vila_edge.export.weights import write_converted, write_graph_files, write_layer
from vila_edge.export.workers import Workers, workers
from vila_edge.stored import Form, StoredParameters
from vila_edge.tensorfile import TensorFile
from vila_edge.version import __version__

Progress = Callable[[str, int, int], None]  # phase, steps done, steps in all
Say = Callable[[str], None]

TOWER_FILES = (f"{WEIGHTS}/vision_tower.safetensors", f"{WEIGHTS}/mm_projector.safetensors")


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
        fsio.place_folder(folder, bundle_path)
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
    with _made(checkpoint_path, target, recipe, progress, replace, warn, threads, device) as (export, folder):
        files = [TensorFile(path) for path in sorted((folder / WEIGHTS).glob("*.safetensors"))]
        stored, llm = StoredParameters(files), export.checkpoint.files.configs["llm"].data
        group_size = export.storage_plan("fp16").storage.group_size
        source = LlmWeights(
            export.cfg.llm, group_size, lambda name: stored.float32(name, export.source.shapes[name]), stored.int4
        )
        tokenizer = export.checkpoint.files.tokenizer
        write_autoawq(target, source, tokenizer, llm.get("bos_token_id"), llm.get("eos_token_id"), replace)


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
) -> Iterator[tuple[Export, Path]]:
    """A finished bundle in a folder beside `target`, which goes when the block ends well."""
    fsio.check_absent(target, replace)
    with workers(threads) as pool, torch.inference_mode():
        export = Export(checkpoint_path, recipe, progress, warn, pool, device)
        with working_folder(target, export.key) as (work, resumed):
            if resumed:
                warn(f"going on with what is finished in {work}")
            export.check_space(work)
            try:
                yield export, _run(export, work)
            except InputError:  # will be so the next time too
                discard(work)
                raise
            discard(work)


def _run(export: Export, work: Path) -> Path:
    try:
        return export.run(work)
    except StartOver:
        export.warn(f"what was left in {work} is damaged: starting anew")
        empty(work)
        return export.run(work)


class Export:
    """One checkpoint on its way to a bundle."""

    def __init__(
        self, checkpoint_path: Path, recipe: Recipe, progress: Progress, warn: Say, pool: Workers, device: str
    ) -> None:
        """Reads configs and tokenizer, and the whole checkpoint for its digest."""
        progress("read", 0, 1)
        self.recipe, self.progress, self.warn, self.pool, self.device = recipe, progress, warn, pool, device
        self.checkpoint = Checkpoint(checkpoint_path, recipe.choices)
        for warning in self.checkpoint.warnings:
            warn(warning)
        self.cfg = self.checkpoint.config
        self.packed = self.checkpoint.packed
        if self.packed and recipe.quantization == "int4":
            warn(
                f"the checkpoint is in 4 bits already ({self.packed.format}, groups of {self.packed.group_size}): "
                "its integers are kept, and nothing is searched"
            )
        recipe.check(self.cfg, self.packed)
        self.tokenizer = self.checkpoint.tokenizer()
        self.tokenizer.check_rows(self.cfg.llm.vocab_size)
        self.samples = read_samples(recipe.calibration) if recipe.calibration else built_in()
        self.search = choose(self.samples.search, self.cfg, self.tokenizer, recipe.calibration_tokens)
        self.source = Source(self.checkpoint)
        self.pulled = self._pulled_from()
        self.provenance: dict[str, Any] = {
            **{key: self.pulled[key] for key in ("repo", "revision") if key in self.pulled},
            "checkpoint_sha256": self.checkpoint.sha256(),
            "calibration": self._calibration(),
            "vila_edge": __version__,
            "onnx": onnx.__version__,
            "torch": torch.__version__,
            "device": torch.device(device).type,
        }
        progress("read", 1, 1)

    @property
    def key(self) -> str:
        """Stands for all that decides what is made. Names and limits do not."""
        recipe = dataclasses.replace(self.recipe, name="", license_note="", gate=type(self.recipe.gate)())
        decides = [FORMAT_VERSION, self.provenance, self.samples.sha256, np.__version__, repr(recipe), repr(self.cfg)]
        return hashlib.sha256(fsio.json_bytes(decides)).hexdigest()

    def check_space(self, work: Path) -> None:
        """Raises VilaEdgeError if the disk has no room for the bundle and for what is in the work folder meanwhile."""
        done = sum(path.stat().st_size for path in work.rglob("*") if path.is_file())
        states = 4 * self.cfg.llm.hidden_size * self.recipe.calibration_tokens
        need = self.storage_plan("fp16").parameter_bytes() + 3 * states - done
        free = shutil.disk_usage(work).free
        if need > free:
            raise VilaEdgeError(
                f"{work.parent}: the export needs {need / 1e6:,.0f} MB more, and {free / 1e6:,.0f} MB are free there",
                "free some space, or choose another place with -o; what is finished is kept",
            )

    def run(self, work: Path) -> Path:
        """Make the bundle in a folder of `work`, or finish it."""
        folder, steps = work / "bundle", Steps(work, self.key)
        fsio.make_folder(folder / WEIGHTS)
        plan = self.storage_plan("fp16")  # lm_head is decided below, and is in none of these files
        for file in TOWER_FILES:
            self._convert(steps, folder, plan, file)
        self._layers(steps, folder, plan)
        plan, parity = self._finish(steps, folder)
        write_manifest(
            folder,
            name=self.recipe.name or self.checkpoint.path.resolve().name,
            config=self.cfg,
            quantization=self._quantization(plan),
            provenance=self.provenance,
            license_note=self.recipe.license_note or self.pulled.get("license", ""),
            parity=parity,
        )
        return folder

    def _convert(self, steps: Steps, folder: Path, plan: StoragePlan, file: str, name: str = "") -> None:
        def work() -> Result:
            write_converted(folder, plan, file, self.source)
            return {}

        steps.run(name or Path(file).stem, work, [folder / file])

    def _layers(self, steps: Steps, folder: Path, plan: StoragePlan) -> None:
        """Every decoder block."""
        layers = self.cfg.llm.num_hidden_layers
        search = self.recipe.quantization == "int4" and self.recipe.method == "awq" and not self.packed
        relay = Relay(steps, "states")
        if search:
            self.progress("calibrate", 0, 1)
            relay.run("calibrate", self._calibrate)
            self.progress("calibrate", 1, 1)
        phase = "quantise" if search else "write"
        for layer in range(layers):
            self.progress(phase, layer, layers)
            file = layer_file(layer)
            if search:
                work = partial(self._search_layer, folder, plan, layer)
                relay.run(Path(file).stem, work, [folder / file], last=layer == layers - 1)
            elif self.recipe.quantization == "int4":
                steps.run(Path(file).stem, partial(self._round_layer, folder, plan, layer), [folder / file])
            else:
                self._convert(steps, folder, plan, file)
        self.progress(phase, layers, layers)

    def _calibrate(self, _: Path | None, after: Path | None) -> Result:
        """What the first block sees of the samples."""
        assert after
        encoder = CheckpointEncoder(self.cfg, self.source, self.pool)
        states = [embed(sample, self.cfg, self.tokenizer, encoder) for sample in self.search]
        self.source.forget()
        write_states(after, states, [len(x) for x in states], self.cfg.llm.hidden_size)
        return {"positions": sum(len(x) for x in states)}

    def _search_layer(
        self, folder: Path, plan: StoragePlan, layer: int, before: Path | None, after: Path | None
    ) -> Result:
        """AWQ on one block; the states move on."""
        assert before
        grid = Grid(plan.storage.group_size, plan.storage.symmetric)
        block = self.source.layer(f"{architecture.LLM}.layers.{layer}.")
        block = {name: value.to(self.device) for name, value in block.items()}
        quantised, states = quantise_block(block, read_states(before), layer, self.cfg.llm, grid, self.pool)
        write_layer(folder, plan, layer_file(layer), quantised.floats, quantised.linears)
        if after:
            write_states(after, states, [len(x) for x in states], self.cfg.llm.hidden_size)
        return {}

    def _round_layer(self, folder: Path, plan: StoragePlan, layer: int) -> Result:
        """A block as the checkpoint has it in 4 bits already, or rounded to nearest."""
        grid = Grid(plan.storage.group_size, plan.storage.symmetric)
        floats, linears = {}, {}
        for name in plan.parameters[layer_file(layer)]:
            if plan.form(name) == "int4":
                linear = name.removesuffix(".weight")
                packed = self.checkpoint.int4(linear)
                linears[linear] = packed or grid.quantize(torch.from_numpy(self.checkpoint.parameter(name)), self.pool)
            else:
                floats[name] = self.checkpoint.parameter(name)
        write_layer(folder, plan, layer_file(layer), floats, linears)
        return {}

    def _finish(self, steps: Steps, folder: Path) -> tuple[StoragePlan, dict[str, Any]]:
        """The rest of the LLM, graphs and the parity gate, with the shortest lm_head that the gate lets pass."""
        fsio.replace_bytes(folder / TOKENIZER, self.checkpoint.tokenizer_json.encode())
        chosen = self.recipe.lm_head
        forms: tuple[Form, ...] = ("int8", "fp16") if chosen == "auto" else (chosen,)
        if self.recipe.quantization != "int4":
            forms = (self.recipe.quantization,)
        for form in forms:
            plan = self.storage_plan(form)
            self.progress("write", 0, 1)
            for file in (EMBED_TOKENS_FILE, LLM_FILE):
                self._convert(steps, folder, plan, file, f"{Path(file).stem}.{form}")
            write_graph_files(folder, self.cfg, plan.places())
            self.progress("write", 1, 1)
            try:
                return plan, self._verify(steps, folder, plan)
            except GateError as error:
                if error.component not in ("lm_head", "llm") or form == forms[-1]:
                    raise
                self.warn(f"lm_head stays in 16 bits: with {form}, {error.message}")
        raise AssertionError(forms)

    def _verify(self, steps: Steps, folder: Path, plan: StoragePlan) -> dict[str, Any]:
        verification = Verification(
            folder,
            self.cfg,
            self.tokenizer,
            self.source,
            self.samples.held_out,
            self.recipe.gate,
            plan.storage,
            self.pool,
        )
        return verification.report(Relay(steps, f"verify.{plan.storage.lm_head}"), partial(self.progress, "verify"))

    def storage_plan(self, lm_head: Form) -> StoragePlan:
        """Where everything is stored, with lm_head in a form."""
        return StoragePlan(self.cfg, self.recipe.storage(self.packed, lm_head))

    def _pulled_from(self) -> dict[str, str]:
        """What `vila-edge pull` left in the checkpoint's folder: repo, revision, license."""
        path = self.checkpoint.path / PULLED_FROM
        found = fsio.read_json(path) if path.is_file() else {}
        return {key: value for key, value in found.items() if isinstance(value, str)}

    def _calibration(self) -> str:
        if self.recipe.quantization != "int4":
            return "none"
        if self.packed:
            return f"none: the checkpoint is in 4 bits ({self.packed.format})"
        if self.recipe.method == "rtn":
            return "none: rounded to nearest"
        return f"{self.samples.description}; {len(self.search)} searched with"

    def _quantization(self, plan: StoragePlan) -> dict[str, Any]:
        storage, size = plan.storage, {"parameter_bytes": plan.parameter_bytes()}
        if self.recipe.quantization != "int4":
            dtype = "float16" if self.recipe.quantization == "fp16" else "float32"
            return {"method": "none", "dtype": dtype} | size
        return {
            "method": self.packed.format if self.packed else self.recipe.method,
            "bits": 4,
            "group_size": storage.group_size,
            "symmetric": storage.symmetric,
            "linears": "decoder blocks",
            "lm_head": storage.lm_head,
            "vision": storage.vision,
            "other_weights": "float16",
        } | size
