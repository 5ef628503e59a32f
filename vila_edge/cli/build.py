"""vila-edge build BUNDLE"""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from vila_edge.cli.console import PROGRAM, QUIET_SECONDS, console, print_note, print_warning
from vila_edge.errors import UsageError

if TYPE_CHECKING:
    from vila_edge.bundle import Bundle
    from vila_edge.engine.tensorrt_options import BuildOptions
    from vila_edge.export.build_job import Built, Target

T = TypeVar("T", bound=str)


def build(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Made by vila-edge export.")],
    runtime: Annotated[
        str, typer.Option(help="tensorrt, tensorrt_rtx, or auto: the first of them that is installed.")
    ] = "auto",
    sm: Annotated[
        int | None,
        typer.Option(
            "--sm", min=10, help="Build ahead of time for this compute capability, 86 for 8.6. Default: the GPU here."
        ),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(
            "--context", min=1, help="Positions of a conversation, at most. Default: the model's, up to 4096."
        ),
    ] = None,
    chunk: Annotated[
        int | None,
        typer.Option("--chunk", min=1, help="Positions of a prompt that are computed at a time. Default: 512."),
    ] = None,
    images: Annotated[
        int | None,
        typer.Option(
            "--images",
            min=1,
            help="Images or tiles that are encoded at a time, up to 16. Default: the tiles of one image.",
        ),
    ] = None,
    kv_form: Annotated[
        str,
        typer.Option(help="How the kv_cache is written: scatter, append (any TensorRT from 10.3 on), or auto."),
    ] = "auto",
    projector: Annotated[
        str,
        typer.Option(help="graph: TensorRT's own layers; plugin: vila-edge's kernels, whose code the engine carries."),
    ] = "graph",
    workspace_mib: Annotated[
        int | None,
        typer.Option("--workspace-mib", min=1, help="Memory for scratch, at most. Default: TensorRT's choice."),
    ] = None,
    component: Annotated[
        list[str] | None, typer.Option(help="vision_tower, mm_projector or decoder. Repeatable. Default: all.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Build again what was built before.")] = False,
    no_memory_check: Annotated[
        bool, typer.Option("--no-memory-check", help="Build even where memory seems too small, with swap space.")
    ] = False,
    json_output: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Build the TensorRT engines of a bundle for the GPU of this machine.

    They are kept in $XDG_CACHE_HOME/vila-edge/engines (~/.cache). An engine is code for one GPU and one TensorRT: build
    where you run, and again after an update of TensorRT or vila-edge. What is there already is not built again.
    """
    from vila_edge.bundle import Bundle
    from vila_edge.engine.engine_cache import EngineCache
    from vila_edge.engine.tensorrt_options import (
        COMPONENTS,
        KV_CHOICES,
        PROJECTOR_FORMS,
        RUNTIME_CHOICES,
        load_tensorrt,
    )
    from vila_edge.export.build_job import build_engines, choose_options, find_target

    components = [_one_of("--component", name, COMPONENTS) for name in dict.fromkeys(component or COMPONENTS)]
    module = _one_of("--runtime", runtime, RUNTIME_CHOICES)
    form = _one_of("--kv-form", kv_form, KV_CHOICES)
    projector_form = _one_of("--projector", projector, PROJECTOR_FORMS)
    trt = load_tensorrt(module)
    opened = Bundle.open(bundle)
    target = find_target(trt, sm)
    options = choose_options(
        opened.config,
        trt,
        context=context,
        chunk=chunk,
        images=images,
        form=None if form == "auto" else form,
        workspace=None if workspace_mib is None else workspace_mib << 20,
        projector=projector_form,
    )
    print_note(_target_line(target))
    if target.ahead_of_time:
        print_note(
            "these engines load on this machine alone, which seals them; for another one, run the same command there"
        )
    print_note(_options_line(options, components))
    if "decoder" in components and opened.manifest.quantization.get("symmetric") is False:
        print_note(
            "the 4-bit weights are asymmetric: their zero points become a second product, and the build takes longer; "
            f"{PROGRAM} export --symmetric avoids that"
        )
    with BuildDisplay() as display:
        made = build_engines(
            opened,
            target,
            options,
            components,
            EngineCache(),
            force=force,
            memory_check=not no_memory_check,
            progress=display.progress,
            say=print_warning,
            done=display.finish,
        )
    if json_output:
        print(json.dumps(_as_json(opened, target, options, made), ensure_ascii=False))


class BuildDisplay:
    """A progress bar for each component on a terminal, now and then a line elsewhere; a line for what is done."""

    def __init__(self) -> None:
        self._tasks: dict[str, TaskID] = {}
        self._told = time.monotonic()
        self._progress = Progress(
            TextColumn("{task.description:<14}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[phase]}", markup=False),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )

    def __enter__(self) -> BuildDisplay:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def progress(self, component: str, phase: str, done: int, total: int) -> None:
        if component not in self._tasks:
            self._tasks[component] = self._progress.add_task(component, total=None, phase="")
        self._progress.update(self._tasks[component], completed=done, total=total or None, phase=phase)
        now = time.monotonic()
        if not console.is_terminal and now - self._told > QUIET_SECONDS:
            self._told = now
            console.print(f"{component:<14}{phase} {done}/{total}", markup=False, soft_wrap=True)

    def finish(self, built: Built) -> None:
        if built.component in self._tasks:
            self._progress.remove_task(self._tasks.pop(built.component))
        how = "was there" if built.cached else f"built in {built.seconds:,.1f} s"
        line = f"{built.component:<14}{how:<18}{built.size / 1e6:>9,.1f} MB  {built.path}"
        console.print(line, markup=False, soft_wrap=True)


def _target_line(target: Target) -> str:
    trt = target.trt
    why = "ahead of time, as --sm says" if target.ahead_of_time else "the GPU of this machine"
    return f"{trt.__name__} {trt.__version__}, for compute capability {target.sm / 10:.1f} (SM {target.sm}): {why}"


def _options_line(options: BuildOptions, components: list[str]) -> str:
    parts = [f"up to {options.images} images at a time"] if components != ["decoder"] else []
    if options.projector == "plugin" and "mm_projector" in components:
        parts.append("the projector in our kernels")
    if "decoder" in components:
        parts.append(
            f"a context of {options.context:,}, {options.chunk:,} of a prompt at a time, kv_cache {options.form}"
        )
    return "for " + "; ".join(parts)


def _as_json(bundle: Bundle, target: Target, options: BuildOptions, made: list[Built]) -> dict[str, Any]:
    return {
        "bundle": str(bundle.path),
        "bundle_sha256": bundle.manifest.digest,
        "runtime": target.trt.__name__,
        "version": str(target.trt.__version__),
        "sm": target.sm,
        "ahead_of_time": target.ahead_of_time,
        "options": dataclasses.asdict(options),
        "engines": [
            {
                "component": built.component,
                "built": not built.cached,
                "path": str(built.path),
                "bytes": built.size,
                "seconds": round(built.seconds, 3),
            }
            for built in made
        ],
    }


def _one_of(option: str, value: str, known: tuple[T, ...]) -> T:
    found = next((choice for choice in known if choice == value), None)
    if found is None:
        raise UsageError(f"{option} {value}: expected one of {', '.join(known)}")
    return found
