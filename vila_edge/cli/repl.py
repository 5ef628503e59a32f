"""The interactive chat: lines in, streamed answers out, commands behind a slash."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import Completer, NestedCompleter, PathCompleter
from prompt_toolkit.history import FileHistory, History, InMemoryHistory

from vila_edge.cli.attachments import find_images
from vila_edge.cli.chat import stats_line, stream_to_stdout
from vila_edge.cli.console import console, print_error, print_note, print_warning
from vila_edge.errors import UsageError, VilaEdgeError
from vila_edge.media.image import load_image
from vila_edge.media.video import Video
from vila_edge.pipeline import Reply, Shot, mark_of
from vila_edge.prompt import IMAGE_MARK
from vila_edge.session import Session
from vila_edge.visual import Medium

PARAMETERS = {"temperature": float, "top_p": float, "top_k": int, "max_new_tokens": int, "seed": int}


class Repl:
    """A conversation at the terminal."""

    def __init__(self, session: Session, media: Sequence[str | Video], quiet: bool, shots: Sequence[Shot] = ()) -> None:
        """`media` and `shots` belong to the first question."""
        self.session, self.quiet, self.shots = session, quiet, tuple(shots)
        self.attached: list[Medium] = []
        self.last: Reply | None = None
        self.commands: dict[str, tuple[str, Callable[[str], None]]] = {
            "/image": ("PATH   show an image with the next question", self._image),
            "/images": ("       images shown so far and attached", self._images),
            "/drop": ("        take the attached images back", self._drop),
            "/clear": ("       forget the conversation", self._clear),
            "/set": ("KEY VALUE   " + ", ".join(PARAMETERS), self._set),
            "/stats": ("       what the last answer took", self._stats),
            "/help": ("        this list", self._help),
            "/exit": ("        leave (also /bye, /quit, Ctrl-D)", self._exit),
        }
        self._aliases = {"/bye": "/exit", "/quit": "/exit", "/?": "/help"}
        for medium in media:
            if isinstance(medium, Video):
                self._attach(medium)
            else:
                self._image(str(medium))

    def run(self) -> None:
        """Until the user leaves."""
        print_note("Type a question; image paths in it become images. /help lists commands, Ctrl-D leaves.")
        completions: dict[str, Completer | None] = {
            **dict.fromkeys(self.commands),
            "/image": PathCompleter(expanduser=True),
        }
        prompts: PromptSession[str] = PromptSession(
            history=_history(), completer=NestedCompleter(completions), complete_while_typing=False
        )
        while True:
            try:
                line = prompts.prompt(">>> ").strip()
            except KeyboardInterrupt:
                print_note("Ctrl-D or /exit leaves")
                continue
            except EOFError:
                return
            try:
                self.handle(line)
            except SystemExit:
                return

    def handle(self, line: str) -> None:
        """One line of input. Errors are printed, the conversation goes on; SystemExit if the user leaves."""
        try:
            word, _, argument = line.partition(" ")
            word = self._aliases.get(word, word)
            if word in self.commands:
                self.commands[word][1](argument.strip())
            elif line.startswith("/") and not find_images(line).images:
                raise UsageError(f"unknown command {word}", "/help lists the commands")
            elif line or self.attached:
                self._ask(line)
        except VilaEdgeError as error:
            print_error(error.message, error.hint)
        except KeyboardInterrupt:
            print_note("[stopped]")

    def _ask(self, line: str) -> None:
        found = find_images(line)
        for path in found.missing:
            print_warning(f"{path} looks like an image, but there is no such file; it stays text")
        text, images = found.text, [*self.attached, *(load_image(path) for path in found.images)]
        if self.attached and IMAGE_MARK in text:
            text = "".join(f"{mark_of(medium)}\n" for medium in self.attached) + text
        self.last = self.session.ask(text, images, self.shots)
        self.attached, self.shots = [], ()
        stream_to_stdout(self.last)
        if not self.quiet:
            self._stats("")

    def _image(self, path: str) -> None:
        if not path:
            raise UsageError("/image needs a path")
        found = find_images(path)
        self._attach(load_image(found.images[0] if found.images else Path(path).expanduser()))

    def _attach(self, medium: Medium) -> None:
        """Show something with the next question, and say what it costs as things stand."""
        self.attached.append(medium)
        visual = self.session.pipeline.plan([*self.session.media, *self.attached])[-1]
        width, height = visual.frames[0].size
        frames = f"{len(visual.frames)} frames of " if isinstance(medium, Video) else ""
        tiles = f" in {len(visual.slot_lengths)} tiles" if visual.layout.kind == "tiles" else ""
        print_note(
            f"attached {medium.source} ({frames}{width} x {height}, {visual.tokens} tokens{tiles}) to the next question"
        )

    def _images(self, _: str) -> None:
        for state, images in (("shown", self.session.media), ("attached", self.attached)):
            for image in images:
                print_note(f"{state:<9}{image.source}")

    def _drop(self, _: str) -> None:
        print_note(f"{len(self.attached)} images taken back")
        self.attached = []

    def _clear(self, _: str) -> None:
        self.session.clear()
        self.attached = []
        print_note("the conversation is forgotten")

    def _set(self, argument: str) -> None:
        key, _, value = argument.partition(" ")
        if key not in PARAMETERS:
            raise UsageError(f"/set {key}: expected one of {', '.join(PARAMETERS)}")
        try:
            number = PARAMETERS[key](value)
        except ValueError:
            raise UsageError(f"/set {key} {value}: expected a number") from None
        self.session.sampling = dataclasses.replace(self.session.sampling, **{key: number})
        print_note(f"{key} is {number}")

    def _stats(self, _: str) -> None:
        if self.last:
            print_note(stats_line(self.last, self.session.positions_used, self.session.pipeline.context))

    def _help(self, _: str) -> None:
        for name, (description, _command) in self.commands.items():
            console.print(f"{name} {description}", markup=False)

    def _exit(self, _: str) -> None:
        raise SystemExit


def _history() -> History:
    """Lines typed before, in a file that only the user can read; in memory where there is no place for it."""
    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "vila-edge"
    try:
        state.mkdir(parents=True, exist_ok=True)
        file = state / "history"
        file.touch(mode=0o600)
    except OSError:
        return InMemoryHistory()
    return FileHistory(str(file))
