"""vila-edge chat BUNDLE [PROMPT] [-i IMAGE]..."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from vila_edge.backends import reason
from vila_edge.cli.console import console, print_note
from vila_edge.cli.interrupt import INTERRUPTED, stops_reply
from vila_edge.cli.request import Request, parse_shot
from vila_edge.errors import UsageError
from vila_edge.media.video import Video
from vila_edge.pipeline import Pipeline, Reply, load
from vila_edge.prompt import think_step_by_step
from vila_edge.sampler import Sampling
from vila_edge.session import Session
from vila_edge.visual import Visual


def chat(
    bundle: Annotated[Path, typer.Argument(help="A bundle, made by vila-edge export.")],
    prompt: Annotated[
        str | None, typer.Argument(help="Ask this and leave; <image> in it is the place of an image.")
    ] = None,
    image: Annotated[list[str] | None, typer.Option("-i", "--image", help="An image file; may be repeated.")] = None,
    video: Annotated[
        list[str] | None, typer.Option(help="A video file or a folder of frames; behind the images.")
    ] = None,
    frames: Annotated[int | None, typer.Option(help="Frames of a video. Default: the model's.")] = None,
    fps: Annotated[float | None, typer.Option(help="At most this many frames a second. Default: the model's.")] = None,
    shot: Annotated[
        list[str] | None, typer.Option(help="IMAGE=ANSWER, an answered example in front; may be repeated.")
    ] = None,
    think: Annotated[bool, typer.Option("--think", help="Add the cue 'Think step-by-step.'.")] = False,
    file: Annotated[
        Path | None, typer.Option("-f", "--file", help="JSON with prompt, images, videos and shots.")
    ] = None,
    max_tokens: Annotated[int, typer.Option("-n", "--max-tokens", help="Longest answer.")] = 512,
    temperature: Annotated[float, typer.Option("--temperature", "--temp", help="0 takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Keep the likeliest tokens of this total probability.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Keep this many tokens; 0 keeps all.")] = 0,
    seed: Annotated[int | None, typer.Option(help="Same seed, same answer.")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="One JSON object with answer and timings.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="No notes and no statistics.")] = False,
    backend: Annotated[
        str,
        typer.Option(
            help="auto, onnxruntime, onnxruntime-cuda, tensorrt, tensorrt_rtx, cuda (vila-edge's own kernels) or numpy "
            "(slow reference)."
        ),
    ] = "auto",
    threads: Annotated[int | None, typer.Option("-t", "--threads", help="Threads; all cores by default.")] = None,
    ctx_size: Annotated[int, typer.Option("-c", "--ctx-size", help="Positions of the context; 0: the model's.")] = 0,
    kv_cache: Annotated[
        str,
        typer.Option(help="float32 (16 bits on a GPU), or int8: less memory, and faster in a long context."),
    ] = "float32",
    projector: Annotated[
        str, typer.Option(help="With --backend tensorrt: its engine, or kernel: vila-edge's own, which need none.")
    ] = "engine",
    tower: Annotated[
        str, typer.Option(help="With --backend cuda: tensorrt or onnxruntime; auto takes the first that can.")
    ] = "auto",
) -> None:
    """Ask about images: once with a PROMPT (or one on stdin), otherwise in a conversation."""
    sampling = Sampling(temperature, top_p, top_k, max_tokens, seed)
    if frames is not None and frames < 1:
        raise UsageError(f"--frames {frames}: expected at least 1")
    request = Request(prompt, image or [], video or [], [parse_shot(text) for text in shot or []])
    request = request.with_file(file) if file else request
    prompt = request.prompt
    if prompt is None and not sys.stdin.isatty():
        prompt = sys.stdin.read().strip()
        if not prompt:
            raise UsageError("no prompt", "give one behind the bundle, or start the chat in a terminal")
    if think and prompt is None:
        raise UsageError("--think goes with a PROMPT", "in a conversation, type the cue: Think step-by-step.")
    if threads is not None and threads < 1:
        raise UsageError(f"--threads {threads}: expected at least 1")
    pipeline = load(bundle, backend, threads, ctx_size, kv_cache, projector, tower)
    if not quiet and not json_output:
        print_note(f"{pipeline.name} on {pipeline.engine.backend} ({reason(backend)})")
    videos = [pipeline.load_video(source, frames, fps) for source in request.videos]
    media: list[str | Video] = [*request.images, *videos]
    if prompt is None:
        from vila_edge.cli.repl import Repl

        Repl(Session(pipeline, sampling), media, quiet, request.shots).run()
        return
    session = Session(pipeline, sampling)
    reply = session.ask(think_step_by_step(prompt) if think else prompt, media, request.shots)
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
    print_note(f"{pipeline.name} on {pipeline.engine.backend} ({reason('auto')})")
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
        "images": [_visual_json(v) for v in reply.visuals if not isinstance(v.medium, Video)],
        "videos": [_visual_json(v) for v in reply.visuals if isinstance(v.medium, Video)],
        "seed": reply.seed,
    }


def _visual_json(visual: Visual) -> dict[str, Any]:
    width, height = visual.frames[0].size
    found = {"path": visual.medium.source, "width": width, "height": height, "tokens": visual.tokens}
    if isinstance(visual.medium, Video):
        found["frames"] = len(visual.frames)
    return found | {"sha256": visual.medium.sha256}
