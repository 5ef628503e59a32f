"""Edge inference runtime for VILA visual language models.

>>> import vila_edge
>>> pipeline = vila_edge.load("my-bundle")                                             # doctest: +SKIP
>>> pipeline.generate("Which image shows the larger digit?", ["a.png", "b.png"]).text  # doctest: +SKIP
'the first'
"""

from vila_edge.errors import VilaEdgeError
from vila_edge.media.video import Video, load_video
from vila_edge.pipeline import Pipeline, Reply, Shot, load
from vila_edge.prompt import Turn, think_step_by_step
from vila_edge.sampler import Sampling
from vila_edge.session import Session
from vila_edge.version import __version__

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
