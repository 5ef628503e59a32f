"""How long AWQ tools search one decoder block, and how good their result is, side by side in one run.

    python benchmarks/awq_tools.py [--peer autoawq=PYTHON] [--peer llm_compressor=PYTHON] [--peer modelopt=PYTHON]
                                   [--dtype float32 --dtype bfloat16] [-r 1] [--json FILE]

PYTHON is an interpreter with the tool in it; `awq_peers/` has a script for each tool. All get the same random LLaMA
block (by default of the dimensions of VILA1.5-3B), the same token ids and the same number of threads, each in a
process of its own, one at a time. Clocks run while a tool searches: not while it imports, loads or packs. Ours
makes its integers inside the clock; what the others do after their search is left out.

The error is measured here, for all alike: the block is run with the weights that a tool left, on token ids that none
of them saw; the squared difference to the unquantised block's output, relative to what the block adds to its input.

`busy` is the share of the machine that went to other programs meanwhile: figures of a busy machine are worth little,
seconds less than CPU seconds, and tools that spread one product over all cores lose more by it than ours. `x scales`
is over what our search for scales alone took, without clipping: some tools do no more. The last column is the error relative to that of plain rounding.

What this is not: the weights are random, so the errors show that the tools did comparable work and say nothing about
a trained model. Tools do not all search the same; each script says what its tool does. They are made for GPUs and
run here on the CPU: in float32, and with `--dtype bfloat16` in the precision that some are faster in. Torch is told
to use huge pages, for all alike: others make temporaries of gigabytes, and autoawq can be twice as fast with them.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor

from vila_edge import architecture, int4
from vila_edge.config import LlmConfig, RopeConfig
from vila_edge.reference.torch_ops import TorchOps

ROOT = Path(__file__).resolve().parent.parent
LAYER = f"{architecture.LLM}.layers.0"
OURS = "ours"

Params = dict[str, Tensor]


@dataclass(frozen=True)
class Run:
    """One tool in one precision, and what each repetition measured."""

    tool: str
    dtype: str
    python: str
    repetitions: list[dict[str, Any]] = field(default_factory=list)

    def median(self, key: str) -> float:
        return statistics.median(found[key] for found in self.repetitions)


def main(
    peer: Annotated[list[str] | None, typer.Option(help="NAME=PYTHON: a script of awq_peers, its interpreter.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="Of the peers: float32, bfloat16, float16.")] = None,
    hidden_size: Annotated[int, typer.Option()] = 2560,
    intermediate_size: Annotated[int, typer.Option()] = 6912,
    heads: Annotated[int, typer.Option()] = 20,
    vocab: Annotated[int, typer.Option()] = 1000,
    sequences: Annotated[int, typer.Option(help="Of calibration; half as many are held out.")] = 8,
    tokens: Annotated[int, typer.Option(help="Of each sequence.")] = 256,
    group_size: Annotated[int, typer.Option()] = 128,
    seed: Annotated[int, typer.Option()] = 0,
    repetitions: Annotated[int, typer.Option("-r", "--repetitions")] = 1,
    threads: Annotated[int, typer.Option("-t", "--threads")] = os.cpu_count() or 1,
    huge_pages: Annotated[bool, typer.Option(help="Let torch's temporaries have huge pages.")] = True,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    cfg = llm_config(hidden_size, intermediate_size, heads, vocab, tokens)
    generator = torch.Generator().manual_seed(seed)
    params = random_parameters(cfg, generator)
    ids = torch.randint(0, vocab, (sequences + (sequences + 1) // 2, tokens), generator=generator)
    runs: list[Run] = []
    for precision in dtype or ["float32"]:
        runs.append(Run(OURS, precision, sys.executable))
        runs += [Run(name, precision, python) for name, python in (named.split("=", 1) for named in peer or [])]
    held_out = params[f"{architecture.EMBED_TOKENS}.weight"][ids[sequences:]]
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        write_job(Path(folder), cfg, params, ids[:sequences], group_size)
        for _ in range(repetitions):
            for run in runs:
                found, block = run_tool(run, Path(folder), threads, huge_pages)
                found["error"] = block_error(params, block, held_out, cfg)
                run.repetitions.append(found)
                print(f"{run.tool} {run.dtype}: {json.dumps(found)}", file=sys.stderr)
        rounded = block_error(params, round_block(params, group_size), held_out, cfg)
    sizes = f"hidden {hidden_size}, ffn {intermediate_size}, {heads} heads, {sequences} x {tokens} tokens"
    Console().print(make_table(runs, rounded, f"{sizes}, group {group_size}, {threads} threads"))
    if json_file:
        options = {"hidden_size": hidden_size, "intermediate_size": intermediate_size, "heads": heads}
        options |= {
            "huge_pages": huge_pages,
            "sequences": sequences,
            "tokens": tokens,
            "group_size": group_size,
            "threads": threads,
        }
        json_file.write_text(json.dumps(report(runs, rounded, options), indent=2) + "\n")


def llm_config(hidden_size: int, intermediate_size: int, heads: int, vocab: int, tokens: int) -> LlmConfig:
    return LlmConfig(
        model_type="llama",
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=hidden_size // heads,
        vocab_size=vocab,
        context_length=tokens,
        rms_norm_eps=1e-5,
        rope=RopeConfig(10000.0),
        tie_word_embeddings=True,
    )


def random_parameters(cfg: LlmConfig, generator: torch.Generator) -> Params:
    """A block that keeps the scale of its input; a few channels of the embeddings are many times the others."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    width, inner = cfg.hidden_size, cfg.intermediate_size
    shapes = {f"self_attn.{part}_proj": (width, width) for part in "qkvo"}
    shapes |= {"mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width), "mlp.down_proj": (width, inner)}
    params = {f"{LAYER}.{name}.weight": normal(*shape) / shape[1] ** 0.5 for name, shape in shapes.items()}
    for norm in (f"{LAYER}.input_layernorm", f"{LAYER}.post_attention_layernorm", f"{architecture.LLM}.norm"):
        params[f"{norm}.weight"] = 1 + 0.1 * normal(width)
    params[f"{architecture.EMBED_TOKENS}.weight"] = normal(cfg.vocab_size, width) * normal(width).exp()
    return params


def write_job(folder: Path, cfg: LlmConfig, params: Mapping[str, Tensor], ids: Tensor, group_size: int) -> None:
    """A checkpoint as transformers reads it, and what to do with it."""
    tensors = {name.removeprefix("llm."): value for name, value in params.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": cfg.hidden_size,
        "intermediate_size": cfg.intermediate_size,
        "num_hidden_layers": 1,
        "num_attention_heads": cfg.num_attention_heads,
        "num_key_value_heads": cfg.num_key_value_heads,
        "vocab_size": cfg.vocab_size,
        "max_position_embeddings": cfg.context_length,
        "rms_norm_eps": cfg.rms_norm_eps,
        "rope_theta": cfg.rope.rope_theta,
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "job.json").write_text(json.dumps({"group_size": group_size, "ids": ids.tolist()}))


def run_tool(run: Run, folder: Path, threads: int, huge_pages: bool) -> tuple[dict[str, Any], Params]:
    """What the tool measured, and the block it left."""
    output = folder / "block.npz"
    output.unlink(missing_ok=True)
    script = f"benchmarks.awq_peers.{run.tool}"
    command = [run.python, "-m", script, str(folder), str(output), run.dtype, str(threads)]
    env = os.environ | {"OMP_NUM_THREADS": str(threads), "THP_MEM_ALLOC_ENABLE": str(int(huge_pages))}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{run.tool}: exit {done.returncode}\n{done.stderr[-4000:]}")
    with np.load(output) as arrays:
        block = {f"{LAYER}.{name}": torch.from_numpy(arrays[name]) for name in arrays.files}
    return json.loads(done.stdout.splitlines()[-1]), block


def round_block(params: Params, group_size: int) -> Params:
    """The block rounded to nearest, with no search."""
    linears = [name for name in params if name.endswith("_proj.weight")]
    return {n: torch.from_numpy(int4.quantize(params[n].numpy(), group_size).dequantize()) for n in linears}


def block_error(params: Params, block: Params, x: Tensor, cfg: LlmConfig) -> float:
    want, got = (architecture.decoder_layer(TorchOps(p), x, 0, cfg) for p in (params, params | block))
    return float((got - want).square().sum() / (want - x).square().sum())


def make_table(runs: list[Run], rounded: float, title: str) -> Table:
    table = Table(title=title)
    for column in ("tool", "dtype"):
        table.add_column(column, no_wrap=True)
    for column in ("seconds", "x ours", "x scales", "CPU s", "x ours", "busy", "peak MiB", "/ rounded"):
        table.add_column(column, justify="right", no_wrap=True)
    for run in runs:
        ours, ours_cpu = ours_in(run.dtype, runs)
        seconds, cpu = run.median("seconds"), run.median("cpu_seconds")
        table.add_row(
            f"{run.tool} {tool_version(run)}",
            run.dtype,
            f"{seconds:.1f}",
            f"{seconds / ours:.2f}",
            f"{seconds / our_scales(run.dtype, runs):.2f}",
            f"{cpu:.1f}",
            f"{cpu / ours_cpu:.2f}",
            f"{run.median('other_cpu_seconds') / seconds / (os.cpu_count() or 1):.0%}",
            f"{run.median('peak_mib'):.0f}",
            f"{run.median('error') / rounded:.3f}",
        )
    table.add_row("(rounded, no search)", *[""] * 8, "1.000")
    return table


def tool_version(run: Run) -> str:
    """Of the tool: the versions come in the order Python, torch, the tool, what it needs."""
    return list(run.repetitions[0]["versions"].values())[2]


def ours_in(dtype: str, runs: list[Run]) -> tuple[float, float]:
    """Seconds and CPU seconds of our own search in the same precision."""
    own = next(run for run in runs if (run.tool, run.dtype) == (OURS, dtype))
    return own.median("seconds"), own.median("cpu_seconds")


def our_scales(dtype: str, runs: list[Run]) -> float:
    """Seconds of our own search for scales, without clipping: what a tool that does not clip is to be compared with."""
    own = next(run for run in runs if (run.tool, run.dtype) == (OURS, dtype))
    return statistics.median(found["notes"]["scales_alone_seconds"] for found in own.repetitions)


def report(runs: list[Run], rounded: float, options: dict[str, int]) -> dict[str, Any]:
    tools = [
        {
            "tool": run.tool,
            "dtype": run.dtype,
            "seconds_over_ours": run.median("seconds") / ours_in(run.dtype, runs)[0],
            "seconds_over_our_scales_alone": run.median("seconds") / our_scales(run.dtype, runs),
            "cpu_seconds_over_ours": run.median("cpu_seconds") / ours_in(run.dtype, runs)[1],
            "error_over_rounded": run.median("error") / rounded,
            "repetitions": run.repetitions,
        }
        for run in runs
    ]
    return {"options": options, "error_rounded": rounded, "tools": tools}


if __name__ == "__main__":
    typer.run(main)
