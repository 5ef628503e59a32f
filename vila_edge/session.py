"""A conversation: turns and images so far, and the kv_cache that saves reading them again."""

from __future__ import annotations

from collections.abc import Sequence

from vila_edge.pipeline import MediaSource, Pipeline, Reply, Shot
from vila_edge.prompt import Turn
from vila_edge.sampler import Sampling
from vila_edge.visual import Medium


class Session:
    """Ask, and ask again: each question sees all that was said and shown before."""

    def __init__(self, pipeline: Pipeline, sampling: Sampling | None = None) -> None:
        self.pipeline = pipeline
        self.sampling = sampling or Sampling()
        self._prefix = pipeline.new_prefix()
        self.media: list[Medium] = []
        self._turns: list[Turn] = []
        self._reply: Reply | None = None

    def ask(self, text: str, media: Sequence[MediaSource] = (), shots: Sequence[Shot] = ()) -> Reply:
        """The reply to one more turn. What is raised leaves the conversation as it was.

        The turn becomes part of the conversation; so does its answer, as far as it was taken.
        """
        turn, shown = self.pipeline.ask(text, media, shots)
        turns = [*self.history, turn]
        reply = self.pipeline.stream(turns, [*self.media, *shown], self.sampling, self._prefix)
        self._turns, self.media, self._reply = turns, list(reply.media), reply
        return reply

    def clear(self) -> None:
        """Forget everything that was said and shown."""
        self._turns, self.media, self._reply = [], [], None

    @property
    def history(self) -> list[Turn]:
        """All turns so far, the last answer as far as it was taken."""
        if self._reply is None:
            return self._turns
        return [*self._turns, Turn("assistant", self._reply.text)]

    @property
    def positions_used(self) -> int:
        """Positions of the context that the conversation takes."""
        return len(self._prefix.keys) if self._turns else 0
