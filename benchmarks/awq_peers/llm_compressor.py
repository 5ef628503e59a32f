"""llm-compressor's AWQModifier on the CPU.

20 ratios (0, 1/19 .. 1) of mean|x|, `duo_scaling` off as in the published search. It has no clipping: it does less
work than the others. Timed is its search (`_apply_smoothing`); its tracing of the model, the calibration forward
and the events around them are in `notes.oneshot_seconds`, the whole call. All sequences go through at once, twice
as fast here as its default of one by one. One thing is changed: pinning of memory, which torch refuses to do where
there is no accelerator, is left out.
"""

from __future__ import annotations

import importlib
import time
from typing import Any

import torch
from torch.utils.data import DataLoader

from benchmarks.awq_peers.common import LINEARS, NORMS, Measured, finish, load_llama, measure, read_job


def main() -> None:
    job, measured = read_job(), Measured()
    oneshot: Any = importlib.import_module("llmcompressor").oneshot
    modifier: Any = importlib.import_module("llmcompressor.modifiers.transform.awq").AWQModifier
    rounding: Any = importlib.import_module("llmcompressor.modifiers.quantization").QuantizationModifier
    forward_quantize: Any = importlib.import_module("compressed_tensors.quantization").forward_quantize
    cache: Any = importlib.import_module("llmcompressor.pipelines.cache").IntermediatesCache
    cache.pin_memory = lambda self, index: None  # torch refuses to pin where there is no accelerator
    model = load_llama(job)

    class Timed(modifier):  # type: ignore[misc]
        def _apply_smoothing(self, *args: Any, **kwargs: Any) -> None:
            with measure(measured):
                super()._apply_smoothing(*args, **kwargs)

    weights = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": job.group_size}
    scheme = {"targets": ["Linear"], "weights": weights}
    recipe = [
        Timed(duo_scaling=False, n_grid=20),
        rounding(config_groups={"group_0": scheme}, ignore=["lm_head"]),
    ]
    samples: Any = [{"input_ids": torch.tensor(ids)} for ids in job.ids]
    started = time.perf_counter()
    oneshot(
        model=model,
        recipe=recipe,
        processor=object(),  # it wants one, and uses none for data that is tokens
        dataset=DataLoader(samples, batch_size=len(samples)),
        pipeline="sequential",
    )
    measured.notes["oneshot_seconds"] = time.perf_counter() - started
    layer = model.model.layers[0]
    block = {f"{name}.weight": layer.get_submodule(name).weight for name in NORMS}
    with torch.no_grad():
        for name in LINEARS:
            linear = layer.get_submodule(name)
            scheme = linear.quantization_scheme.weights
            block[f"{name}.weight"] = forward_quantize(linear, linear.weight, "weight", scheme)
    finish(job, block, measured, ["llmcompressor", "compressed-tensors", "transformers"])


if __name__ == "__main__":
    main()
