"""Edge inference runtime for VILA visual language models.

>>> import vila_edge
>>> pipeline = vila_edge.load("my-bundle")                                             # doctest: +SKIP
>>> pipeline.generate("Which image shows the larger digit?", ["a.png", "b.png"]).text  # doctest: +SKIP
'the first'
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from vila_edge.version import __version__

if TYPE_CHECKING:
    from vila_edge.errors import VilaEdgeError
    from vila_edge.media.video import Video, load_video
    from vila_edge.pipeline import Pipeline, Reply, Shot, load
    from vila_edge.prompt import Turn, think_step_by_step
    from vila_edge.sampler import Sampling
    from vila_edge.session import Session

__all__ = [
    "Pipeline",
    "Reply",
    "Sampling",
    "Session",
    "Shot",
    "Turn",
    "Video",
    "VilaEdgeError",
    "__version__",
    "load",
    "load_video",
    "think_step_by_step",
]

_HOMES = {
    "errors": ("VilaEdgeError",),
    "media.video": ("Video", "load_video"),
    "pipeline": ("Pipeline", "Reply", "Shot", "load"),
    "prompt": ("Turn", "think_step_by_step"),
    "sampler": ("Sampling",),
    "session": ("Session",),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    """A public name from its module, which is imported when it is first asked for: a command starts sooner."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
