"""What a kv_cache in 8 bits costs: the model answers with a wider one, and is then asked how it would have gone on.

    python -m vila_edge.bench.agreement REQUEST FILE      the answer with the wider kv_cache, as .npz

The wider one is that of the same device: 32 bits on a CPU, 16 on a GPU.

The question is about an image of noise, if any is to be looked at, and the answer goes on behind its end: what counts
is that the model wrote it. The two engines are never in memory together.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vila_edge.bench.stages import prefill, see
from vila_edge.bench.workload import Options, noise_images
from vila_edge.errors import BackendError
from vila_edge.pipeline import Pipeline, load
from vila_edge.prompt import assemble, expand_marks
from vila_edge.visual import splice

QUESTION = "What is in the image?"
POSITIONS = 128  # of the answer
WIDE = {True: "float32", False: "float16"}  # by whether it is on a CPU

FloatArray = NDArray[np.float32]


@dataclass(frozen=True)
class Answer:
    """Tokens of a greedy answer, and the logits [N, V] from which each was chosen."""

    ids: list[int]
    logits: FloatArray


def wider_answer(bundle: Path, options: Options) -> Answer:
    """With the wider kv_cache, in a process of its own: before the narrow one is loaded, so neither has to find room
    beside the other. Raises BackendError."""
    with tempfile.TemporaryDirectory(prefix="vila-edge-bench-") as folder:
        file = Path(folder) / "answer.npz"
        backend = "onnxruntime" if options.on_cpu else options.backend
        request = {"bundle": str(bundle), "backend": backend, "threads": options.threads, "images": _images(options)}
        done = subprocess.run(
            [sys.executable, "-m", __name__, json.dumps(request), str(file)], capture_output=True, text=True
        )
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            wide = WIDE[options.on_cpu].removeprefix("float")
            raise BackendError(f"the answer with a kv_cache in {wide} bits, to compare with, was not given: {reason}")
        with np.load(file, allow_pickle=False) as found:
            return Answer([int(token) for token in found["ids"]], found["logits"])


def compare(wide: Answer, options: Options, pipeline: Pipeline) -> dict[str, Any]:
    """How `pipeline` goes on with the answer that a wider kv_cache gave, position by position.

    `top1_agreement`: how often its most likely token is the same; `mean_kl`: divergence in nats; `against`: the wider
    kv_cache.
    """
    _, got = answer(pipeline, _images(options), wide.ids)
    p, q = _log_softmax(wide.logits), _log_softmax(got)
    return {
        "against": WIDE[options.on_cpu],
        "positions": len(wide.ids),
        "top1_agreement": float((p.argmax(-1) == q.argmax(-1)).mean()),
        "mean_kl": float((np.exp(p) * (p - q)).sum(-1).mean()),
    }


def answer(pipeline: Pipeline, images: int, ids: list[int] | None = None) -> tuple[list[int], FloatArray]:
    """Tokens of a greedy answer, or those given, and the logits [N, V] from which each was chosen."""
    engine, cfg = pipeline.engine, pipeline.config
    _, embeds = see(pipeline, images)
    turn, shown = pipeline.ask(QUESTION, noise_images(images))
    turns = expand_marks([turn], [visual.shown for visual in pipeline.plan(shown)], cfg.profile)
    inputs_embeds = splice(assemble(turns, pipeline.tokenizer, cfg.profile), embeds, engine)
    room = min(POSITIONS, pipeline.context - len(inputs_embeds))
    cache = engine.new_cache(len(inputs_embeds) + room)
    logits = [prefill(engine, inputs_embeds, cache)]
    chosen = list[int]()
    for step in range(room):
        chosen.append(int(logits[-1].argmax()) if ids is None else ids[step])
        if step + 1 < room:
            logits.append(engine.forward(engine.embed_tokens(chosen[-1:]), cache)[0])
    return chosen, np.stack(logits)


def _images(options: Options) -> int:
    return min(1, options.images)


def _log_softmax(logits: FloatArray) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    found: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return found


def main() -> None:
    request = json.loads(sys.argv[1])
    pipeline = load(request["bundle"], request["backend"], request["threads"])
    ids, logits = answer(pipeline, request["images"])
    np.savez(sys.argv[2], ids=np.asarray(ids), logits=logits)


if __name__ == "__main__":
    main()
