"""One checkpoint on its way to a bundle: the steps, in order. See docs/walks.md.

Tensors are read and written one decoder block at a time, and every finished step stays on the disk, beside the
bundle that is to be made, until the whole is there.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from vila_edge import architecture, fsio
from vila_edge.bundle import EMBED_TOKENS_FILE, FORMAT_VERSION, TOKENIZER, WEIGHTS, write_manifest
from vila_edge.errors import VilaEdgeError
from vila_edge.export.awq import quantise_block
from vila_edge.export.built_in_samples import calibration_set
from vila_edge.export.calibration import choose, embed
from vila_edge.export.checkpoint import Checkpoint
from vila_edge.export.encoder import CheckpointEncoder
from vila_edge.export.gate import GateError, OverflowGateError
from vila_edge.export.grid import Grid
from vila_edge.export.layouts import PULLED_FROM
from vila_edge.export.recipe import Recipe
from vila_edge.export.source import Source
from vila_edge.export.states import IN_MEMORY, read_states, write_states
from vila_edge.export.steps import Relay, Result, Steps
from vila_edge.export.storage import LLM_FILE, StoragePlan, layer_file
from vila_edge.export.verify import Verification
from vila_edge.export.weights import write_converted, write_graph_files, write_layer
from vila_edge.export.workers import Workers
from vila_edge.stored import Form
from vila_edge.version import __version__

Progress = Callable[[str, int, int], None]  # phase, steps done, steps in all
Say = Callable[[str], None]

TOWER_FILES = (f"{WEIGHTS}/vision_tower.safetensors", f"{WEIGHTS}/mm_projector.safetensors")


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
        self.samples = calibration_set(recipe.calibration)
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
        """Stands for all that decides the decoder blocks: they take hours.

        Names, paths and limits do not. The forms of lm_head and of the tower are in the names of their own steps.
        """
        how = self.recipe
        search = [how.quantization, how.method, how.group_size, how.symmetric, how.calibration_tokens, how.search_dtype]
        sources = {key: value for key, value in self.provenance.items() if key not in ("repo", "revision")}
        decides = [FORMAT_VERSION, sources, self.samples.sha256, np.__version__, search, repr(self.cfg)]
        return hashlib.sha256(fsio.json_bytes(decides)).hexdigest()

    def check_space(self, work: Path, beside: int = 0) -> None:
        """Raises VilaEdgeError if the disk has no room for the bundle and for what is in the work folder meanwhile.

        `beside`: bytes of what is made of the bundle.
        """
        done = sum(path.stat().st_size for path in work.rglob("*") if path.is_file())
        llm, tokens = self.cfg.llm, self.recipe.calibration_tokens
        states = 4 * llm.hidden_size * tokens
        activations = 5 * states + 4 * llm.intermediate_size * tokens  # of one block: what memory is not taken for
        need = (
            self.storage_plan("fp16").parameter_bytes() + 3 * states + max(0, activations - IN_MEMORY) + beside - done
        )
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
        for file in TOWER_FILES:  # first: it says soon what does not fit
            self._convert(steps, folder, plan, file, f"{Path(file).stem}.{plan.storage.vision}", apart=True)
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

    def _convert(
        self, steps: Steps, folder: Path, plan: StoragePlan, file: str, name: str, apart: bool = False
    ) -> None:
        def work() -> Result:
            write_converted(folder, plan, file, self.source)
            return {}

        steps.run(name, work, [folder / file], apart=apart)

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
                self._convert(steps, folder, plan, file, Path(file).stem)
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
        dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[self.recipe.search_dtype]
        quantised, states = quantise_block(
            block, read_states(before), layer, self.cfg.llm, grid, self.pool, dtype, folder.parent
        )
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
                of_head = error.component in ("lm_head", "llm") and not isinstance(error, OverflowGateError)
                if not of_head or form == forms[-1]:
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
