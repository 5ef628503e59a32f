"""Parity: what a bundle computes on onnxruntime, against its checkpoint on the torch reference.

Both go through the model a layer at a time, so that this takes no more memory for a larger model. The graphs and
weights are those that ship; each component is given the reference's input, and at the end the LLM's logits on the
bundle's own activations are compared.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor

from vila_edge import architecture, kv_scales
from vila_edge.bundle import EMBED_TOKENS_FILE, GRAPHS, KV_SCALES_FILE
from vila_edge.config import VilaConfig
from vila_edge.engine.onnxruntime_session import DIALECT, OLDEST_INT8_CACHE
from vila_edge.export.calibration import Sample, join
from vila_edge.export.encoder import CheckpointEncoder, WatchingOps
from vila_edge.export.gate import Difference, Gate, LogitDifference, check_answers, checked, rounded
from vila_edge.export.head import Head
from vila_edge.export.slices import (
    SlicedGraph,
    cached,
    decoder_slices,
    projector_slice,
    run_head,
    run_layer,
    run_layer_in_two,
    vision_slices,
)
from vila_edge.export.source import Source
from vila_edge.export.states import read_states, write_states
from vila_edge.export.steps import Relay, Result
from vila_edge.export.storage import Storage, layer_file
from vila_edge.export.workers import Workers
from vila_edge.prompt import Chunk
from vila_edge.scales import merge_features, tower_input
from vila_edge.stored import StoredParameters
from vila_edge.tensorfile import TensorFile, write_tensors
from vila_edge.tokenizer import Tokenizer
from vila_edge.visual import Looked, Visual, look

POSITIONS = 64  # of each prompt, whose logits are compared
INT8_DECODER = "decoder_int8"

FloatArray = NDArray[np.float32]
Report = dict[str, Any]
Read = tuple[list[Chunk], list[Visual]]  # a sample


class Verification:
    """A bundle's folder beside its checkpoint."""

    def __init__(
        self,
        folder: Path,
        cfg: VilaConfig,
        tokenizer: Tokenizer,
        source: Source,
        samples: Sequence[Sample],
        gate: Gate,
        storage: Storage,
        pool: Workers,
        sealed: bool = False,
    ) -> None:
        """`sealed`: the bundle is finished, and no byte of it is written. Else its kv_scales are."""
        self.folder, self.cfg, self.tokenizer, self.source = folder, cfg, tokenizer, source
        self.samples, self.gate, self.storage, self.pool = samples, gate, storage, pool
        self.sealed = sealed
        graph, scales = folder / GRAPHS / DIALECT / f"{INT8_DECODER}.onnx", folder / KV_SCALES_FILE
        self.int8_cache = has_int8_cache() and graph.is_file() and (scales.is_file() or not sealed)

    def report(self, relay: Relay, progress: Callable[[int, int], None]) -> Report:
        """All differences, layer by layer. Raises ParityError that names the component which is out of its limits."""
        cfg, gate, layers = self.cfg, self.gate, self.cfg.llm.num_hidden_layers
        int4, int4_head = self.storage.decoder == "int4", self.storage.lm_head == "int4"
        steps = layers + 2
        progress(0, steps)
        report: Report = {
            "reference": "torch, float32",
            "backend": f"onnxruntime {onnxruntime.__version__}, CPU, a layer at a time",
            "prompts": len(self.samples),
        }
        # Limits are applied to what was found, now or before an interruption: they may be others than they were.
        first = f"images.{self.storage.vision}.{onnxruntime.__version__}"
        for name, found in relay.run(first, self._images).items():
            report[name] = checked(name, found, getattr(gate, name), gate)
        progress(1, steps)
        decoder = decoder_slices(self.folder, cfg)
        report["blocks"] = []
        largest: list[Any] = []  # keys and values, by layer
        for layer in range(layers):
            found = relay.run(f"layers.{layer:03}", partial(self._layer, layer, decoder, largest))
            largest.append(found.pop("largest_cached"))
            limit = gate.block_int4 if int4 else gate.block
            report["blocks"].append(checked(f"{architecture.LLM}.layers.{layer}", found, limit, gate))
            progress(layer + 2, steps)
        found = relay.run("lm_head", partial(self._lm_head, decoder), last=True)
        report["lm_head"] = checked("lm_head", found["lm_head"], gate.lm_head_int4 if int4_head else gate.lm_head, gate)
        report["llm"] = checked("llm", found["llm"], gate.llm_int4 if int4 else gate.llm, gate)
        check_answers("llm", report["llm"], gate, self.storage.lm_head)
        if self.int8_cache:
            name = "llm_int8_cache"
            report[name] = checked(name, found[name], gate.llm_int8_cache, gate)
            check_answers(name, report[name], dataclasses.replace(gate, top1_agreement=0.0), self.storage.lm_head)
        self._write_kv_scales(largest)
        progress(steps, steps)
        return report

    def _images(self, _: Path | None, after: Path | None) -> Result:
        """Tower and projector on every image; and the prompts as the decoder sees them, by checkpoint and bundle."""
        assert after
        cfg, reference = self.cfg, CheckpointEncoder(self.cfg, self.source, self.pool)
        read = [sample.read(self.tokenizer, cfg) for sample in self.samples]
        seen = [[look(visual, reference, cfg) for visual in visuals] for _, visuals in read]
        self.source.forget()
        own, report = self._look(read, seen)
        for name in report:
            report[name]["max_activation"] = rounded(reference.largest[name])
        table = _Table(self.folder, cfg)
        theirs = [
            join(chunks, visuals, [looked.image_embeds for looked in of_sample], cfg, self.tokenizer, reference)
            for (chunks, visuals), of_sample in zip(read, seen, strict=True)
        ]
        ours = [
            join(chunks, visuals, of_sample, cfg, self.tokenizer, table)
            for (chunks, visuals), of_sample in zip(read, own, strict=True)
        ]
        self._write(after, [*theirs, *ours, *(ours if self.int8_cache else ())])
        return report

    def _look(self, read: Sequence[Read], seen: Sequence[Sequence[Looked]]) -> tuple[list[list[FloatArray]], Report]:
        """The bundle's image_embeds of every sample's images, and how far tower and projector are off."""
        looked = [one for of_sample in seen for one in of_sample]
        if not looked:
            return [[] for _ in seen], {}
        tower, projector = vision_slices(self.folder, self.cfg), projector_slice(self.folder)
        x = [tile[None] for one in looked for tile in tower_input(one.pixel_values, self.cfg)]
        for index in range(len(tower)):
            x = list(self.pool.map(tower.load(index).run, x))
        features = iter(x)
        vision_difference, projector_difference = Difference(), Difference()
        own: list[list[FloatArray]] = []
        for (_, visuals), of_sample in zip(read, seen, strict=True):
            own.append([])
            for visual, one in zip(visuals, of_sample, strict=True):
                mine = np.concatenate([next(features) for _ in one.tower_features])
                vision_difference.add(one.tower_features, mine)
                projector_difference.add(one.image_embeds, projector.run(one.image_features))
                own[-1].append(projector.run(merge_features(mine, visual.layout, self.cfg)))
        return own, {
            "vision_tower": vision_difference.report(),
            "mm_projector": projector_difference.report(),
        }

    def _layer(
        self, layer: int, decoder: SlicedGraph, known: Sequence[Any], before: Path | None, after: Path | None
    ) -> Result:
        """A decoder block: what it makes of the reference's states, and all chains one block further.

        `known`: the largest keys and values of the layers before.
        """
        assert before and after
        theirs, ours, ours_int8 = self._chains(before)
        block = self.source.layer(f"{architecture.LLM}.layers.{layer}.")

        def reference(x: FloatArray) -> tuple[FloatArray, float, FloatArray]:
            ops = WatchingOps(block)
            y = architecture.decoder_layer(ops, torch.from_numpy(np.array(x))[None], layer, self.cfg.llm)
            return y[0].numpy(), ops.largest, ops.largest_cached(layer)

        want, largest, keys_and_values = zip(*self.pool.map(reference, theirs), strict=True)
        if self.storage.decoder == "int4":  # the search divides what norms and linears give out: that may be larger
            block = self._stored_block(layer)
            largest += tuple(seen for _, seen, _ in self.pool.map(reference, theirs))
        block = {}
        found = {
            "max_activation": rounded(float(np.max(largest))),
            "largest_cached": np.nan_to_num(np.max(keys_and_values, 0)).tolist(),
        }
        difference, chains = self._bundle_layer(layer, decoder, theirs, want, ours)
        if self.int8_cache:
            self._write_kv_scales([*known, found["largest_cached"]])
            chains += self._int8_layer(layer, ours_int8)
        self._write(after, [*want, *chains])
        return difference.report() | found

    def _bundle_layer(
        self,
        layer: int,
        decoder: SlicedGraph,
        theirs: Sequence[FloatArray],
        want: Sequence[FloatArray],
        ours: Sequence[FloatArray],
    ) -> tuple[Difference, list[FloatArray]]:
        """How far a block of the bundle is off on the reference's states, and its own chain behind it."""
        difference, piece = Difference(), decoder.load(layer)

        def run(x: FloatArray) -> FloatArray:
            return run_layer(piece, x, layer, self.cfg)

        for w, g in zip(want, self.pool.map(run, theirs), strict=True):
            difference.add(w, g)
        return difference, list(self.pool.map(run, ours))

    def _int8_layer(self, layer: int, states: Sequence[FloatArray]) -> list[FloatArray]:
        """A block of the decoder with a kv_cache in 8 bits."""
        decoder = decoder_slices(self.folder, self.cfg, INT8_DECODER)
        piece = decoder.load(layer, [f"present_{name}" for name in cached(layer)])
        return list(self.pool.map(lambda x: run_layer_in_two(piece, x, layer, self.cfg), states))

    def _chains(self, path: Path) -> tuple[Sequence[FloatArray], Sequence[FloatArray], Sequence[FloatArray]]:
        """The prompts' states: the reference's, the bundle's, and the bundle's with a kv_cache in 8 bits."""
        states, count = read_states(path), len(self.samples)
        return states[:count], states[count : 2 * count], states[2 * count :]

    def _stored_block(self, layer: int) -> dict[str, Tensor]:
        """A decoder block as the bundle has it, in float32."""
        stored = StoredParameters([TensorFile(self.folder / layer_file(layer))])
        names = [name for name in self.source.shapes if name.startswith(f"{architecture.LLM}.layers.{layer}.")]
        return {name: torch.from_numpy(stored.float32(name, self.source.shapes[name])) for name in names}

    def _lm_head(self, decoder: SlicedGraph, before: Path | None, _: Path | None) -> Result:
        """The head on the reference's states, and the LLM's answers on the bundle's own."""
        assert before
        piece = decoder.load(len(decoder) - 1)
        head = Head(self.source, self.cfg.llm, self.pool)
        names = ["lm_head", "llm", *(["llm_int8_cache"] if self.int8_cache else [])]
        differences = [LogitDifference() for _ in names]
        for of_sample in zip(*self._chains(before)[: len(names)], strict=True):
            kept = np.unique(np.linspace(0, len(of_sample[0]) - 1, POSITIONS).astype(np.int64))
            want = head.logits(of_sample[0][kept])
            for difference, x in zip(differences, of_sample, strict=True):
                difference.add(want, run_head(piece, x[kept]))
        found = {name: difference.report() for name, difference in zip(names, differences, strict=True)}
        found["lm_head"]["max_activation"] = rounded(head.largest)
        return found

    def _write_kv_scales(self, largest: Sequence[Any]) -> None:
        """What a kv_cache in 8 bits needs. `largest`: of each layer's keys and values, [2, H_kv, dim].

        The layers that are still to come get a place.
        """
        if self.sealed:
            return
        llm = self.cfg.llm
        missing = np.zeros((llm.num_hidden_layers - len(largest), 2, llm.num_key_value_heads, llm.head_dim))
        scales = {
            kv_scales.name(part, layer): kv_scales.from_largest(np.asarray(values, np.float32))
            for layer, both in enumerate([*largest, *missing])
            for part, values in zip(("key", "value"), both, strict=True)
        }
        write_tensors(self.folder / KV_SCALES_FILE, scales)

    def _write(self, path: Path, states: Sequence[FloatArray]) -> None:
        write_states(path, states, [len(x) for x in states], self.cfg.llm.hidden_size)


def has_int8_cache() -> bool:
    """Whether this onnxruntime runs decoders with a kv_cache in 8 bits."""
    return tuple(map(int, onnxruntime.__version__.split(".")[:2])) >= OLDEST_INT8_CACHE


class _Table:
    """The `Embedder` of a bundle."""

    def __init__(self, folder: Path, cfg: VilaConfig) -> None:
        self._stored = StoredParameters([TensorFile(folder / EMBED_TOKENS_FILE)])
        self._shape = (cfg.llm.vocab_size, cfg.llm.hidden_size)

    def embed_tokens(self, input_ids: Sequence[int]) -> FloatArray:
        return self._stored.float32(f"{architecture.EMBED_TOKENS}.weight", self._shape, np.asarray(input_ids, np.int64))
