"""autoawq's AwqQuantizer on the CPU.

20 ratios (0, 0.05 .. 0.95) of mean|x|, `duo_scaling` off as in the published search, then 10 clipping steps on 512
tokens, not on q and k. All sequences go through at once, which is its default. `export_compatible` leaves out its
packing, which is not timed: the rounding of its `_apply_quant` is done after the clock. No code of it is changed;
without a GPU its `get_best_device` says "cpu".
"""

from __future__ import annotations

import importlib
import logging
from typing import Any

import torch

from benchmarks.awq_peers.common import LINEARS, NORMS, Measured, finish, load_llama, measure, read_job


def main() -> None:
    job, measured = read_job(), Measured()
    awq_model: Any = importlib.import_module("awq.models.llama").LlamaAWQForCausalLM
    quantizer_class: Any = importlib.import_module("awq.quantize.quantizer").AwqQuantizer
    model = load_llama(job)
    logging.disable(logging.WARNING)  # "Token indices sequence length ..."
    # Samples of exactly max_calib_seq_len tokens: none is dropped, none is cut.
    quantizer = quantizer_class(
        _Adapter(awq_model),
        model,
        tokenizer=None,
        w_bit=4,
        group_size=job.group_size,
        zero_point=True,
        version="gemm",
        calib_data=job.ids,
        split="train",
        text_column="text",
        duo_scaling=False,
        export_compatible=True,
        apply_clip=True,
        max_calib_samples=len(job.ids),
        max_calib_seq_len=len(job.ids[0]),
    )
    assert quantizer.inps.shape[:2] == (len(job.ids), len(job.ids[0]))
    with measure(measured):
        quantizer.quantize()
    layer = model.model.layers[0]
    block = {f"{name}.weight": layer.get_submodule(name).weight for name in NORMS}
    with torch.no_grad():
        for name in LINEARS:
            weight = layer.get_submodule(name).weight.half()  # as its _apply_quant does
            block[f"{name}.weight"] = quantizer.pseudo_quantize_tensor(weight)[0]
    finish(job, block, measured, ["autoawq", "transformers"])


class _Adapter:
    """What the quantiser asks of a model class; the class itself wants a checkpoint to be loaded by it."""

    model_type = "llama"

    def __init__(self, model_class: Any) -> None:
        self.get_model_layers = model_class.get_model_layers
        self.get_layers_for_scaling = model_class.get_layers_for_scaling
        self.move_embed = model_class.move_embed


if __name__ == "__main__":
    main()
