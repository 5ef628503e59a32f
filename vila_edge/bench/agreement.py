"""What a kv_cache in 8 bits costs: the model answers with one in 32 bits, and is then asked how it would have gone on.

    python -m vila_edge.bench.agreement REQUEST FILE      the answer with a kv_cache in 32 bits, as .npz

The question is about an image of noise, if any is to be looked at, and the answer goes on behind its end: what counts
is that the model wrote it. The two engines are never in memory together.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
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

FloatArray = NDArray[np.float32]


def compare_caches(bundle: Path, options: Options, pipeline: Pipeline) -> dict[str, Any]:
    """How `pipeline` goes on with the answer that a kv_cache in 32 bits gave, position by position.

    `top1_agreement`: how often its most likely token is the same; `mean_kl`: divergence in nats. Raises BackendError.
    """
    images = min(1, options.images)
    with tempfile.TemporaryDirectory(prefix="vila-edge-bench-") as folder:
        file = Path(folder) / "answer.npz"
        request = {"bundle": str(bundle), "threads": options.threads, "images": images}
        done = subprocess.run(
            [sys.executable, "-m", __name__, json.dumps(request), str(file)], capture_output=True, text=True
        )
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise BackendError(f"the answer with a kv_cache in 32 bits, to compare with, was not given: {reason}")
        with np.load(file, allow_pickle=False) as found:
            ids, want = found["ids"], found["logits"]
    _, got = answer(pipeline, images, [int(token) for token in ids])
    p, q = _log_softmax(want), _log_softmax(got)
    return {
        "positions": len(want),
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


def _log_softmax(logits: FloatArray) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    found: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return found


def main() -> None:
    request = json.loads(sys.argv[1])
    pipeline = load(request["bundle"], "onnxruntime", request["threads"])
    ids, logits = answer(pipeline, request["images"])
    np.savez(sys.argv[2], ids=np.asarray(ids), logits=logits)


if __name__ == "__main__":
    main()
