"""nvidia-modelopt's `awq_full` on the CPU: awq_lite, then awq_clip, on its preset INT4_AWQ_CFG.

20 ratios (0, 1/19 .. 1; its default is 11) of mean|x| over mean|w|, each linear by itself on its own output, so that
q, k and v have three scales, which are kept as a factor of their inputs. Then 10 clipping steps (its default is 11)
on 512 tokens, of q and k too. Its 4 bits are symmetric. Timed is the whole of `quantize`. All sequences go through
at once, and as many rows are clipped at a time as is fastest here; its defaults take longer. Nothing is changed.
"""

from __future__ import annotations

import copy
import importlib
from typing import Any

import torch

from benchmarks.awq_peers.common import LINEARS, NORMS, Measured, finish, load_llama, measure, read_job

CLIP_TOKENS = 512
CLIP_ROWS = 256


def main() -> None:
    job, measured = read_job(), Measured()
    mtq: Any = importlib.import_module("modelopt.torch.quantization")
    model = load_llama(job)
    config = copy.deepcopy(mtq.INT4_AWQ_CFG)
    config["algorithm"] = {
        "method": "awq_full",
        "alpha_step": 1 / 19,
        "min_clip_ratio": 0.55,
        "max_tokens_per_batch": CLIP_TOKENS,
        "max_co_batch_size": CLIP_ROWS,
    }
    for entry in config["quant_cfg"]:
        if entry["quantizer_name"] == "*weight_quantizer":
            entry["cfg"]["block_sizes"][-1] = job.group_size
    ids = torch.tensor(job.ids)

    def forward(model: Any) -> None:
        model.model(ids, use_cache=False)

    with torch.no_grad(), measure(measured):
        mtq.quantize(model, config, forward)
    layer = model.model.layers[0]
    block = {f"{name}.weight": layer.get_submodule(name).weight for name in NORMS}
    with torch.no_grad():
        for name in LINEARS:
            linear = layer.get_submodule(name)
            block[f"{name}.weight"] = linear.weight_quantizer(linear.weight) * linear.input_quantizer.pre_quant_scale
    finish(job, block, measured, ["nvidia-modelopt", "transformers"])


if __name__ == "__main__":
    main()
