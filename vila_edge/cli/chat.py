"""vila-edge chat BUNDLE [PROMPT] [-i IMAGE]..."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from vila_edge.cli.console import console, print_note
from vila_edge.cli.interrupt import INTERRUPTED, stops_reply
from vila_edge.errors import UsageError
from vila_edge.media.image import RgbImage
from vila_edge.pipeline import Pipeline, Reply, load
from vila_edge.sampler import Sampling
from vila_edge.session import Session


def chat(
    bundle: Annotated[Path, typer.Argument(help="A bundle, made by vila-edge export.")],
    prompt: Annotated[
        str | None, typer.Argument(help="Ask this and leave; <image> in it is the place of an image.")
    ] = None,
    image: Annotated[list[str] | None, typer.Option("-i", "--image", help="An image file; may be repeated.")] = None,
    max_tokens: Annotated[int, typer.Option("-n", "--max-tokens", help="Longest answer.")] = 512,
    temperature: Annotated[float, typer.Option("--temperature", "--temp", help="0 takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Keep the likeliest tokens of this total probability.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Keep this many tokens; 0 keeps all.")] = 0,
    seed: Annotated[int | None, typer.Option(help="Same seed, same answer.")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="One JSON object with answer and timings.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="No notes and no statistics.")] = False,
    backend: Annotated[str, typer.Option(help="auto, onnxruntime or numpy (slow reference).")] = "auto",
    threads: Annotated[int | None, typer.Option("-t", "--threads", help="Threads; all cores by default.")] = None,
    ctx_size: Annotated[int, typer.Option("-c", "--ctx-size", help="Positions of the context; 0: the model's.")] = 0,
) -> None:
    """Ask about images: once with a PROMPT (or one on stdin), otherwise in a conversation."""
    sampling = Sampling(temperature, top_p, top_k, max_tokens, seed)
    images = image or []
    if prompt is None and not sys.stdin.isatty():
        prompt = sys.stdin.read().strip()
        if not prompt:
            raise UsageError("no prompt", "give one behind the bundle, or start the chat in a terminal")
    if threads is not None and threads < 1:
        raise UsageError(f"--threads {threads}: expected at least 1")
    pipeline = load(bundle, backend, threads, ctx_size)
    if not quiet and not json_output:
        print_note(f"{pipeline.name} on {pipeline.engine.backend} ({_reason(backend)})")
    if prompt is None:
        from vila_edge.cli.repl import Repl

        Repl(Session(pipeline, sampling), images, quiet).run()
        return
    session = Session(pipeline, sampling)
    reply = session.ask(prompt, images)
    if json_output:
        with stops_reply(reply):
            reply.finish()
        print(json.dumps(as_json(pipeline, reply), ensure_ascii=False))
    else:
        stream_to_stdout(reply)
        if not quiet:
            print_note(stats_line(reply, session.positions_used, pipeline.context))
    if reply.finish_reason == "cancelled":
        raise typer.Exit(INTERRUPTED)


def chat_with(bundle: Path) -> None:
    """A conversation with default settings."""
    from vila_edge.cli.repl import Repl

    pipeline = load(bundle)
    print_note(f"{pipeline.name} on {pipeline.engine.backend} ({_reason('auto')})")
    Repl(Session(pipeline), [], quiet=False).run()


def stream_to_stdout(reply: Reply) -> None:
    """Write an answer as it comes; Ctrl-C stops it."""
    with stops_reply(reply):
        for piece in reply:
            print(piece, end="", flush=True)
    print()
    if reply.finish_reason == "cancelled":
        console.print("\\[stopped]", style="dim")


def stats_line(reply: Reply, used: int, context: int) -> str:
    """Tokens, rate, and where the time to the first token went."""
    t = reply.timings
    parts = {
        "load": t.load_ms,
        "preprocess": t.preprocess_ms,
        "vision": t.vision_ms,
        "projector": t.projector_ms,
        "prefill": t.prefill_ms,
    }
    split = " + ".join(f"{name} {value:.0f}" for name, value in parts.items() if value >= 0.5)
    return (
        f"{t.new_tokens} tokens, {t.tokens_per_s:.1f} tokens/s | TTFT {t.ttft_ms:.0f} ms ({split or 'below 1 each'}) | "
        f"context {used}/{context}"
    )


def as_json(pipeline: Pipeline, reply: Reply) -> dict[str, Any]:
    """What `--json` prints."""
    return {
        "model": pipeline.name,
        "bundle_sha256": pipeline.bundle_digest,
        "backend": pipeline.engine.backend,
        "text": reply.text,
        "finish_reason": reply.finish_reason,
        "token_ids": reply.token_ids,
        "usage": {
            "prompt_tokens": reply.timings.prompt_tokens,
            "completion_tokens": reply.timings.new_tokens,
            "image_tokens": reply.timings.image_tokens,
        },
        "timings": reply.timings.as_dict(),
        "images": [_image_json(image, pipeline.config.tokens_per_image) for image in reply.images],
        "seed": reply.seed,
    }


def _image_json(image: RgbImage, tokens: int) -> dict[str, Any]:
    width, height = image.size
    return {"path": image.source, "width": width, "height": height, "tokens": tokens, "sha256": image.sha256}


def _reason(backend: str) -> str:
    return "auto: the CPU engine is the only one of this version" if backend == "auto" else "as asked"
