"""A thin facade over CUDA: one device, its memory, streams and graphs. Nothing of CUDA is imported before it is used."""

from vila_edge.engine.cuda.pycuda_device import open_device

__all__ = ["open_device"]
