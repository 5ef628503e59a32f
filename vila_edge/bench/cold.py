"""The first token of a fresh process, from the start of the process on.

    python -m vila_edge.bench.cold REQUEST      one JSON object as soon as the first token is there

What the files of the bundle are read from is not in its hands: here they were just read, so they come from memory as
far as that holds them. A start that is not the first one also believes the digests of weights that nothing touched.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from vila_edge.bench.machine import process_memory
from vila_edge.bench.stages import prefill, see
from vila_edge.bench.workload import Options, Workload, random_ids
from vila_edge.errors import BackendError, InputError, UsageError, VilaEdgeError
from vila_edge.pipeline import load

ERRORS = {error.exit_code: error for error in (VilaEdgeError, UsageError, InputError, BackendError)}


def command(bundle: Path, options: Options, work: Workload) -> list[str]:
    """What starts such a process."""
    request = {
        "bundle": str(bundle),
        "load": {
            "backend": options.backend,
            "threads": options.threads,
            "kv_cache": options.kv_cache,
            "projector": options.projector,
        },
        "images": work.images,
        "positions": work.first_prompt,
    }
    return [sys.executable, "-m", __name__, json.dumps(request)]


def cold_start(bundle: Path, options: Options, work: Workload) -> dict[str, Any]:
    """Milliseconds and bytes of one fresh process.

    Raises the error that ended it: one of `vila_edge.errors`, BackendError for any other.
    """
    with tempfile.TemporaryFile("w+") as said:
        start = time.perf_counter()
        with subprocess.Popen(
            command(bundle, options, work), stdout=subprocess.PIPE, stderr=said, text=True
        ) as process:
            assert process.stdout is not None
            line = process.stdout.readline()
            seconds = time.perf_counter() - start
        if not line:
            said.seek(0)
            reason = (said.read().strip().splitlines() or [f"exit code {process.returncode}"])[-1]
            raise BackendError(f"a fresh process did not answer: {reason}")
    found = json.loads(line)
    if "error" in found:
        raise ERRORS[found["error"]](found["message"], found["hint"])
    return {"first_token_ms": seconds * 1e3, **found}


def first_token(request: dict[str, Any]) -> dict[str, Any]:
    """Load, look, prefill, choose: what each took in milliseconds, and the most memory that it needed."""
    start = time.perf_counter()
    pipeline = load(request["bundle"], **request["load"])
    loaded = time.perf_counter()
    _, embeds = see(pipeline, request["images"])
    seen = time.perf_counter()
    text = random_ids(pipeline.config, request["positions"] - sum(map(len, embeds)))
    inputs_embeds = np.concatenate([*embeds, pipeline.engine.embed_tokens(text)])
    logits = prefill(pipeline.engine, inputs_embeds, pipeline.engine.new_cache(request["positions"]))
    token = int(logits.argmax())
    return {
        "load_ms": (loaded - start) * 1e3,
        "images_ms": (seen - loaded) * 1e3,
        "prefill_ms": (time.perf_counter() - seen) * 1e3,
        "positions": request["positions"],
        "images": request["images"],
        "token": token,
        "memory": process_memory(),
    }


def main() -> None:
    try:
        found = first_token(json.loads(sys.argv[1]))
    except VilaEdgeError as error:
        found = {"error": error.exit_code, "message": error.message, "hint": error.hint}
    print(json.dumps(found), flush=True)  # noqa: T201 - the answer to the parent


if __name__ == "__main__":
    main()
