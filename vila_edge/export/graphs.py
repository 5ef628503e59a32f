"""The graphs of a bundle: vision_tower, mm_projector and decoder, in one dialect."""

from __future__ import annotations

from collections.abc import Mapping

from vila_edge import architecture, bindings
from vila_edge.config import VilaConfig
from vila_edge.export.graph_ops import GraphOps, StoredTensor
from vila_edge.export.onnxruntime_ops import OnnxruntimeOps
from vila_edge.parameters import parameter_shapes


def write_graphs(
    cfg: VilaConfig, weights: Mapping[str, StoredTensor], dialect: type[GraphOps] = OnnxruntimeOps
) -> dict[str, bytes]:
    """Name -> serialised graph. `weights` says where each stored tensor lies."""
    shapes = parameter_shapes(cfg)
    return {
        "vision_tower": _vision_tower(cfg, dialect(weights, bindings.vision_tower(cfg), shapes)),
        "mm_projector": _mm_projector(cfg, dialect(weights, bindings.mm_projector(cfg), shapes)),
        "decoder": _decoder(cfg, dialect(weights, bindings.decoder(cfg), shapes)),
    }


def _vision_tower(cfg: VilaConfig, ops: GraphOps) -> bytes:
    features = architecture.vision_tower(ops, bindings.PIXEL_VALUES, cfg.vision_tower)
    ops.output(features, bindings.IMAGE_FEATURES)
    return ops.model("vision_tower")


def _mm_projector(cfg: VilaConfig, ops: GraphOps) -> bytes:
    ops.output(architecture.mm_projector(ops, bindings.IMAGE_FEATURES, cfg), bindings.IMAGE_EMBEDS)
    return ops.model("mm_projector")


def _decoder(cfg: VilaConfig, ops: GraphOps) -> bytes:
    hidden_states = architecture.decoder(ops, bindings.INPUTS_EMBEDS, cfg.llm)
    kept = ops.node("Gather", hidden_states, bindings.LOGITS_TO_KEEP, axis=1)
    ops.output(architecture.lm_head(ops, kept, cfg.llm), bindings.LOGITS)
    return ops.model("decoder")
