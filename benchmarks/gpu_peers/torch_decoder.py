"""What torch takes on a GPU for the decoders that `vila-edge bench decoder` measures.

    python -m benchmarks.gpu_peers.torch_decoder JOB       JOB as JSON; prints JSON

JOB: {"models": [...], "contexts": [...], "batches": [...], "prompt_tokens": 1024, "new_tokens": 64, "repeat": 5}.

Decode is eager, in 16 bits: each step chooses the most likely token, which stays on the GPU; the host waits at the end
alone, which is in torch's favour. Prefill is eager too, once in 16 bits, once with the weights of the blocks kept in 4
bits: each is taken apart before its product, by one kernel of torch.compile where that works. It needs torch 2.5.
"""

from __future__ import annotations

import gc
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.gpu_peers.torch_gpu import compile_every_shape, compiled_dequantise
from benchmarks.gpu_peers.torch_model import Dequantise, TorchDecoder, make
from vila_edge.bench.decoder.shapes import MODELS, DecoderModel, chosen

WARM = 4  # steps

Synchronize = Callable[[], object]


class Clock:
    """The host's, when the GPU is done."""

    def __init__(self, repeat: int, synchronize: Synchronize = torch.cuda.synchronize) -> None:
        self._repeat, self._synchronize = repeat, synchronize

    def median(self, work: Callable[[], object], prepare: Callable[[], object]) -> float:
        """Seconds of `work`, which runs once before for nothing; `prepare` goes before each."""
        took = list[float]()
        for _ in range(1 + self._repeat):
            prepare()
            self._synchronize()
            start = time.perf_counter()
            work()
            self._synchronize()
            took.append(time.perf_counter() - start)
        return statistics.median(took[1:])


def tokens_per_s(decoder: TorchDecoder, batch: int, context: int, new_tokens: int, clock: Clock) -> float:
    """Of all sequences together, behind `context` positions of random keys and values."""
    device = decoder.lm_head.weight.device
    cache = decoder.new_cache(batch, context + WARM + new_tokens)
    ids = torch.zeros(batch, dtype=torch.long, device=device)

    def steps(count: int) -> None:
        found = ids
        for _ in range(count):
            found = decoder.step(found, cache)

    def prepare() -> None:
        cache.length = context
        steps(WARM)

    return batch * new_tokens / clock.median(lambda: steps(new_tokens), prepare)


def prefill_ms(decoder: TorchDecoder, tokens: int, clock: Clock) -> float:
    weight = decoder.lm_head.weight
    embeds = torch.randn(1, tokens, decoder.llm.hidden_size, dtype=weight.dtype, device=weight.device)
    cache = decoder.new_cache(1, tokens)
    return 1e3 * clock.median(lambda: decoder(embeds, cache), lambda: setattr(cache, "length", 0))


def measure_model(
    model: DecoderModel, job: dict[str, Any], clock: Clock, by: Dequantise, device: str
) -> dict[str, Any]:
    """`decode` by "batch x context" and `prefill` by tokens; `absent` says what had no room."""
    found: dict[str, Any] = {"decode": {}, "prefill": {}, "absent": None}
    tokens = sorted({job["prompt_tokens"], model.projection.config.tokens_per_image})
    for part in (_in_16_bits, _in_4_bits):  # never both in memory
        try:
            part(found, model, tokens, job, clock, by, device)
        except torch.OutOfMemoryError as error:
            found["absent"] = found["absent"] or str(error).splitlines()[0]
        _give_back()
    return found


def _in_16_bits(
    found: Any, model: DecoderModel, tokens: list[int], job: Any, clock: Clock, by: Dequantise, device: str
) -> None:
    decoder = make(model.llm, device)
    for count in tokens:
        found["prefill"].setdefault(str(count), {})["library_ms"] = prefill_ms(decoder, count, clock)
    for batch, context in itertools.product(job["batches"], job["contexts"]):
        rate = tokens_per_s(decoder, batch, context, job["new_tokens"], clock)
        found["decode"][f"{batch}x{context}"] = rate


def _in_4_bits(
    found: Any, model: DecoderModel, tokens: list[int], job: Any, clock: Clock, by: Dequantise, device: str
) -> None:
    decoder = make(model.llm, device, by)
    for count in tokens:
        found["prefill"].setdefault(str(count), {})["dequantise_ms"] = prefill_ms(decoder, count, clock)


def measure(models: Sequence[DecoderModel], job: dict[str, Any], clock: Clock, by: Dequantise, device: str) -> Any:
    found = dict[str, Any]()
    for model in models:
        print(f"torch, {model.name}", file=sys.stderr, flush=True)
        found[model.name] = measure_model(model, job, clock, by, device)
    return found


def _give_back() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@torch.inference_mode()
def main(job: dict[str, Any]) -> dict[str, Any]:
    if not torch.cuda.is_available():
        return {"absent": f"torch {torch.__version__} finds no GPU"}
    compile_every_shape()
    dequantise, by = compiled_dequantise("cuda")
    found = measure(chosen(job["models"], MODELS), job, Clock(job["repeat"]), dequantise, "cuda")
    origin = {"version": torch.__version__, "cuda": torch.version.cuda, "gpu": torch.cuda.get_device_name()}
    return origin | {"dequantise_by": by, "models": found}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(json.loads(sys.argv[1]))))
