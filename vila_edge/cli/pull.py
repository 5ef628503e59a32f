"""vila-edge pull ORG/NAME[@REV]"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vila_edge import fsio
from vila_edge.cli.console import PROGRAM, console, print_note, print_warning
from vila_edge.cli.interrupt import INTERRUPTED
from vila_edge.errors import InputError, UsageError

if TYPE_CHECKING:
    from vila_edge.export.hub import Plan, RemoteFile

LICENCE_NOTICE = (
    "VILA weights are usually CC-BY-NC-4.0 or CC-BY-NC-SA-4.0, not for commercial use, and bound by the licence of "
    "their LLM as well. Apache-2.0, of the code of vila-edge, is not the licence of the weights."
)


def pull(
    repo: Annotated[str, typer.Argument(metavar="ORG/NAME[@REV]", help="A repository, at a branch, tag or commit.")],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="The folder to make. Default: ./NAME.")] = None,
    torch_files: Annotated[
        bool, typer.Option("--torch-files", help="Fetch weights in *.bin and *.pt too; they are never unpickled.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a checkpoint that exists.")] = False,
) -> None:
    """Download a checkpoint from the Hugging Face hub: weights, configs and tokenizer, no code.

    If it is interrupted, the same command goes on where it stopped; what is complete is not fetched again. HF_ENDPOINT,
    HF_TOKEN, HF_HUB_OFFLINE and the cache of huggingface_hub are heeded.
    """
    try:
        from vila_edge.export.hub import make_plan, parse_id
        from vila_edge.export.hub_fetch import check_target, fetch, staging_folder
    except ModuleNotFoundError as error:
        raise UsageError(
            f"pull needs the package {error.name!r}, which is not installed", "pip install 'vila-edge[export]'"
        ) from None
    name, revision = parse_id(repo)
    target = output or Path(name.partition("/")[2])
    if target.name in ("", ".."):
        raise UsageError(f"-o {output}: expected the name of a folder")
    try:
        check_target(target, force)
        plan = make_plan(name, revision, torch_files)
        _announce(plan)

        def started(number: int, file: RemoteFile) -> None:
            print_note(f"({number}/{len(plan.files)}) {file.path}, {_size(file.size)}")  # the bar is huggingface_hub's

        fetch(plan, target, force, started)
    except KeyboardInterrupt:
        kept = staging_folder(target)
        kept_too = f"; {kept} keeps what is complete, and the same command goes on from there" if kept.is_dir() else ""
        print_note(f"stopped{kept_too}")
        raise typer.Exit(INTERRUPTED) from None
    _line(f"{target}: {len(plan.files)} files, {_size(plan.size)}")
    _name_tower(target)
    _line(f"export it:  {PROGRAM} export {shlex.quote(str(target))} -o {shlex.quote(target.name + '.bundle')}")


def _announce(plan: Plan) -> None:
    """What is about to be fetched, and under which licence."""
    if plan.cached:
        print_warning("the hub cannot be reached: the files come from the cache, as they were when it was filled")
    _line(f"{plan.repo} at commit {plan.commit}: {len(plan.files)} files, {_size(plan.size)}")
    link = f" ({plan.license_link})" if plan.license_link else ""
    _line(f"licence, by its model card: {plan.license}{link}")
    print_note(LICENCE_NOTICE)


def _name_tower(target: Path) -> None:
    """A v1.0 checkpoint has its vision tower in another repository: say how to get that."""
    try:
        tower = fsio.read_json(target / "config.json").get("mm_vision_tower")
    except InputError:
        return
    if not isinstance(tower, str) or (target / "llm").is_dir() or (target / tower).is_dir():
        return
    place = target.parent / tower.rpartition("/")[2]
    if tower.count("/") == 1 and tower.isprintable() and not place.is_dir():
        _line(
            f"its vision tower is another repository:  {PROGRAM} pull {shlex.quote(tower)} "
            f"-o {shlex.quote(str(place))} --torch-files"
        )


def _size(size: int) -> str:
    unit, name = next(((unit, name) for unit, name in ((1e9, "GB"), (1e6, "MB")) if size >= unit), (1e3, "kB"))
    return f"{size / unit:,.1f} {name}"


def _line(text: str) -> None:
    console.print(text, markup=False, soft_wrap=True)
