"""`vila-edge bench predict`: costs of models and what they would take on boards, beside what others have published."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vila_edge import fsio
from vila_edge.bench.boards import BOARDS, PUBLISHED
from vila_edge.bench.kernels.shapes import MODELS, Model
from vila_edge.bench.report import DASH, Sheet, markdown_lines
from vila_edge.bench.token_cost import ASSUMED, Constants, Decode, decode_cost, decode_us, fit_kernels, prefill_us
from vila_edge.bundle import MANIFEST, read_manifest
from vila_edge.errors import ConfigError, UsageError
from vila_edge.plain import from_plain

FORMAT = 1
PREDICTION = "PREDICTION, not a measurement"


def find_models(name: str | None) -> Sequence[Model]:
    """A model by its name, that of a bundle, or all. Raises UsageError for neither, BundleError for a broken one."""
    if name is None:
        return MODELS
    found = [model for model in MODELS if model.name.lower() == name.lower()]
    if not found and (Path(name) / MANIFEST).is_file():
        return [Model.of(Path(name).resolve().name, read_manifest(Path(name)).config.llm)]
    if not found:
        names = ", ".join(model.name for model in MODELS)
        raise UsageError(f"{name} is neither a bundle nor one of {names}")
    return found


def read_constants(file: Path) -> Constants:
    """Constants from a JSON of theirs, or fitted to one of `bench kernels`. Raises InputError or ConfigError."""
    data = fsio.read_json(file, 1 << 28)
    if "kernels" in data:
        try:
            return fit_kernels(data)
        except ConfigError as error:
            raise ConfigError(f"{file}: {error.message}") from None
    data = {"math_efficiency": Constants.math_efficiency, "source": str(file), **data}
    return from_plain(Constants, data, str(file))


def predict(models: Sequence[Model], decode: Decode, prompt_tokens: int, constants: Constants) -> dict[str, Any]:
    """All of it as plain data. Raises UsageError as `token_cost` does."""
    found = list[dict[str, Any]]()
    for model in models:
        cost = decode_cost(model, decode)
        boards = dict[str, Any]()
        for board in BOARDS:
            us = decode_us(cost, board, constants)
            boards[board.name] = {
                "predicted_ms": us / 1e3,
                "predicted_tokens_per_s": 1e6 * decode.batch / us,
                "predicted_prefill_ms": prefill_us(model, prompt_tokens, decode, board, constants) / 1e3,
            }
        costs = {"bytes": dict(cost.bytes), "total_bytes": cost.total_bytes, "launches": cost.launches}
        found.append({"model": model.name, **costs, "flops": cost.flops, "boards": boards})
    return {
        "format": FORMAT,
        "what": PREDICTION,
        "constants": asdict(constants),
        "decode": asdict(decode),
        "prompt_tokens": prompt_tokens,
        "boards": [asdict(board) | {"flops_per_s": board.flops_per_s} for board in BOARDS],
        "models": found,
        "published": [asdict(published) for published in PUBLISHED],
    }


def headline(found: dict[str, Any]) -> str:
    """What the numbers rest on, in one line."""
    used, fitted = found["constants"], found["constants"]["source"] != ASSUMED
    return (
        f"{found['what']}: {used['t0_us']:.2f} us a launch, {used['efficiency']:.0%} of the bandwidth ({used['source']}); "
        f"prefill {used['math_efficiency']:.0%} of the tensor cores ({ASSUMED if not fitted else 'not fitted'})"
    )


def sheets(found: dict[str, Any]) -> list[Sheet]:
    """What people want to know of it."""
    return [_cost(found), _boards(found), _published(found), _sources(found)]


def markdown(found: dict[str, Any]) -> str:
    """The whole result as a document."""
    return "\n".join(["# What a token would take", "", headline(found), "", *markdown_lines(sheets(found))])


def _cost(found: dict[str, Any]) -> Sheet:
    parts = list(found["models"][0]["bytes"])
    rows = [(part, *(f"{model['bytes'][part] / 1e6:,.2f}" for model in found["models"])) for part in parts]
    rows += [
        ("all of it", *(f"{model['total_bytes'] / 1e6:,.1f}" for model in found["models"])),
        ("launches", *(f"{model['launches']}" for model in found["models"])),
        ("GFLOP", *(f"{model['flops'] / 1e9:,.2f}" for model in found["models"])),
    ]
    decode = found["decode"]
    title = f"A step of batch {decode['batch']} behind {decode['context']:,} positions, counted: MB"
    forms = f"int4, lm_head int8, kv_cache {decode['kv_cache']}"
    return Sheet(f"{title} ({forms})", ("part", *(model["model"] for model in found["models"])), rows)


def _boards(found: dict[str, Any]) -> Sheet:
    rows = [
        (
            model["model"],
            board,
            f"{times['predicted_ms']:.2f}",
            f"{times['predicted_tokens_per_s']:.1f}",
            _best(found, model["model"], board),
            f"{times['predicted_prefill_ms']:,.0f}",
        )
        for model in found["models"]
        for board, times in model["boards"].items()
    ]
    prefill = f"PREDICTED prefill of {found['prompt_tokens']:,}, ms"
    columns = ("model", "board", "PREDICTED ms", "PREDICTED tokens/s", "published int4 tokens/s", prefill)
    return Sheet("Decode and prefill: PREDICTION", columns, rows)


def _best(found: dict[str, Any], model: str, board: str) -> str:
    """The best that others have published for these very weights and a batch of 1."""
    rates = [
        row["tokens_per_s"]
        for row in found["published"]
        if (row["model"], row["board"], row["weights"]) == (model, board, "int4")
    ]
    return f"{max(rates):.1f}" if rates and found["decode"]["batch"] == 1 else DASH


def _published(found: dict[str, Any]) -> Sheet:
    rows = [
        (
            f"{row['engine']}, {row['model']}",
            row["board"],
            row["weights"],
            f"{row['tokens_per_s']:.1f}",
            row["source"],
        )
        for row in found["published"]
    ]
    return Sheet("Published by others, batch 1", ("engine, model", "board", "weights", "tokens/s", "source"), rows)


def _sources(found: dict[str, Any]) -> Sheet:
    rows = [
        (board["name"], f"{board['bytes_per_s'] / 1e9:.1f}", f"{board['flops_per_s'] / 1e12:.1f}", board["source"])
        for board in found["boards"]
    ]
    return Sheet("Boards: peaks", ("board", "GB/s", "TFLOP/s, counted from clocks", "source"), rows)
