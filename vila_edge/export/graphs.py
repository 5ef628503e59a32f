"""The graphs of a bundle: vision_tower, mm_projector, and decoder for each type of kv_cache, in one dialect."""

from __future__ import annotations

from collections.abc import Mapping

from vila_edge import architecture, bindings, kv_scales
from vila_edge.config import VilaConfig
from vila_edge.export.graph_ops import GraphOps, StoredTensor
from vila_edge.export.onnxruntime_ops import OnnxruntimeHalfOps, OnnxruntimeOps
from vila_edge.parameters import parameter_shapes


def write_graphs(
    cfg: VilaConfig, weights: Mapping[str, StoredTensor], dialect: type[GraphOps] = OnnxruntimeOps
) -> dict[str, bytes]:
    """Name -> serialised graph. `weights` says where each stored tensor lies."""
    shapes = parameter_shapes(cfg)
    graphs = {
        "vision_tower": _vision_tower(cfg, dialect(weights, bindings.vision_tower(cfg), shapes)),
        "mm_projector": _mm_projector(cfg, dialect(weights, bindings.mm_projector(cfg), shapes)),
        "decoder": _decoder(cfg, dialect(weights, bindings.decoder(cfg), shapes)),
    }
    if issubclass(dialect, OnnxruntimeOps):
        half = OnnxruntimeHalfOps(weights, bindings.decoder(cfg, "float16"), shapes)
        graphs["decoder_float16"] = _decoder(cfg, half)
    if weights.keys() >= kv_scales.specs(cfg.llm).keys():
        graphs["decoder_int8"] = _decoder(cfg, dialect(weights, bindings.decoder(cfg, "int8"), shapes))
    return graphs


def write_graph(component: str, cfg: VilaConfig, ops: GraphOps) -> bytes:
    """One serialised graph: `vision_tower`, `mm_projector` or `decoder`, with the verbs of `ops` and its bindings."""
    writers = {"vision_tower": _vision_tower, "mm_projector": _mm_projector, "decoder": _decoder}
    return writers[component](cfg, ops)


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
