"""What every tool is given, how it is timed, and what it hands back. Nothing of vila-edge is imported here."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

# The tensors of a block, by their names inside a layer of a LLaMA checkpoint.
ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
LINEARS = (*ATTENTION, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
NORMS = ("input_layernorm", "post_attention_layernorm")


@dataclass(frozen=True)
class Job:
    """A folder with `config.json` and `model.safetensors` of one layer, and `job.json`; where the result goes."""

    folder: Path
    output: Path
    dtype: str  # float32, bfloat16 or float16
    threads: int
    group_size: int
    ids: list[list[int]]  # calibration, sequences of one length

    @property
    def torch_dtype(self) -> torch.dtype:
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[self.dtype]


@dataclass
class Measured:
    """Wall time, what it and all others took of the cores' time, resident memory before, and the most of it."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    other_cpu_seconds: float = 0.0
    before_mib: float = 0.0
    peak_mib: float = 0.0
    notes: dict[str, float] = field(default_factory=dict)


def read_job() -> Job:
    """From the command line; torch gets its threads."""
    folder, output, dtype, threads = sys.argv[1:]
    values = json.loads((Path(folder) / "job.json").read_text())
    torch.set_num_threads(int(threads))
    return Job(Path(folder), Path(output), dtype, int(threads), values["group_size"], values["ids"])


def load_llama(job: Job) -> Any:
    """The model as transformers reads it, in the job's precision."""
    transformers = importlib.import_module("transformers")
    return transformers.LlamaForCausalLM.from_pretrained(job.folder, torch_dtype=job.torch_dtype).eval()


@contextlib.contextmanager
def measure(measured: Measured) -> Iterator[None]:
    """Adds what happens inside."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak of loading
    measured.before_mib = measured.before_mib or _memory("VmRSS")
    started, own, everyone = time.perf_counter(), time.process_time(), _busy_seconds()
    yield
    measured.seconds += time.perf_counter() - started
    own = time.process_time() - own
    measured.cpu_seconds += own
    measured.other_cpu_seconds += max(0.0, _busy_seconds() - everyone - own)
    measured.peak_mib = max(measured.peak_mib, _memory("VmHWM"))


def finish(job: Job, block: Mapping[str, Tensor], measured: Measured, packages: Sequence[str]) -> None:
    """Write the block as floats that compute what its integers do; print the measurement as the last line."""
    expected = {f"{name}.weight" for name in (*LINEARS, *NORMS)}
    assert set(block) == expected, set(block) ^ expected
    arrays: dict[str, Any] = {name: value.detach().float().numpy() for name, value in block.items()}
    np.savez(job.output, **arrays)
    versions = {name: importlib.metadata.version(name) for name in ("torch", *packages)}
    line = {
        "seconds": measured.seconds,
        "cpu_seconds": measured.cpu_seconds,
        "other_cpu_seconds": measured.other_cpu_seconds,
        "peak_mib": measured.peak_mib,
        "before_mib": measured.before_mib,
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version()} | versions,
        "notes": measured.notes,
    }
    print(json.dumps(line), flush=True)


def _busy_seconds() -> float:
    """Of all cores together, since the machine started."""
    user, nice, system, _idle, _waiting, *interrupts = Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
    return sum(map(int, (user, nice, system, *interrupts))) / os.sysconf("SC_CLK_TCK")


def _memory(key: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) / 1024
    return 0.0
