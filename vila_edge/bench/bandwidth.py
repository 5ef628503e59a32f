"""How fast this machine reads memory: decode reads every weight for each token, so this is its limit.

    python -m vila_edge.bench.bandwidth THREADS      samples in bytes a second, as JSON

The probe is a process of its own, so that its arrays do not count to the memory of what is measured.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from vila_edge.errors import BackendError

PASSES = 12
LEAST = 256 << 20  # bytes that one pass reads, all threads together
CACHES = 4  # or so many times the largest cache, so that little of a pass is found there again
CPU_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


def read_bandwidth(threads: int) -> list[float]:
    """Bytes a second of each pass over memory, by a process of its own. The largest counts: others were disturbed.

    Raises BackendError if it cannot run, for lack of memory for example.
    """
    done = subprocess.run([sys.executable, "-m", __name__, str(threads)], capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise BackendError(f"the bandwidth of the memory could not be measured: {reason}")
    return [float(sample) for sample in json.loads(done.stdout)]


def probe(threads: int, size: int | None = None, passes: int = PASSES) -> list[float]:
    """Bytes a second of each pass: every thread sums an array of its own, of `size` / `threads` bytes."""
    count = (size or more_than_caches()) // threads // 8
    arrays = [np.ones(count, np.uint64) for _ in range(threads)]
    samples = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(passes):
            start = time.perf_counter()
            sums = list(pool.map(np.sum, arrays))  # numpy lets go of the interpreter meanwhile
            samples.append(8 * count * threads / (time.perf_counter() - start))
            assert sums == [count] * threads
    return samples


def more_than_caches() -> int:
    """Bytes of which little is found in a cache again when all were read."""
    return max(LEAST, CACHES * _largest_cache())


def _largest_cache() -> int:
    """Bytes; 0 where the system does not tell."""
    sizes = [0]
    for file in CPU_CACHES.glob("index*/size"):
        text = file.read_text().strip()
        if text.endswith("K") and text[:-1].isdigit():
            sizes.append(int(text[:-1]) << 10)
    return max(sizes)


if __name__ == "__main__":
    print(json.dumps(probe(int(sys.argv[1]))))  # noqa: T201 - the answer to the parent
