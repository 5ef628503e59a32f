"""The projector of a bundle as our own kernels: in place of an engine's, and for one that hands on device addresses."""

from __future__ import annotations

import contextlib

import numpy as np
from numpy.typing import NDArray

from vila_edge import bindings
from vila_edge.bundle import WEIGHTS, Bundle
from vila_edge.engine.cuda.batches import Batches
from vila_edge.engine.cuda.device import Arena, Device, Stream
from vila_edge.engine.cuda.kernels import Kernels
from vila_edge.engine.cuda.upload import Upload
from vila_edge.errors import BackendError
from vila_edge.kernels.launch import Launch
from vila_edge.kernels.projector import FILE, Projector, fold_projector
from vila_edge.parameters import component, parameter_shapes
from vila_edge.stored import StoredParameters
from vila_edge.tensorfile import TensorFile

FloatArray = NDArray[np.float32]

COMPONENT = "mm_projector"
WITHOUT = "use TensorRT's engine of it: --projector engine, and vila-edge build BUNDLE if there is none yet"
_SCRATCH = "scratch"  # no name of a weight


def bundle_projector(bundle: Bundle) -> Projector:
    """The projector of a bundle, folded, whether it is stored in floats or in 8 bits.

    Raises BackendError if the kernels cannot compute it.
    """
    names = (f for f in bundle.manifest.files if f.startswith(f"{WEIGHTS}/{COMPONENT}."))
    stored = StoredParameters([TensorFile(bundle.file(name)) for name in names])
    shapes = {name: shape for name, shape in parameter_shapes(bundle.config).items() if component(name) == COMPONENT}
    try:
        return fold_projector(bundle.config, {name: stored.float32(name, shape) for name, shape in shapes.items()})
    except ValueError as error:
        raise BackendError(f"the kernels cannot compute this projector: {error}", WITHOUT) from None


class KernelProjector:
    """A bundle's projector on a device, its weights folded and packed there."""

    def __init__(self, bundle: Bundle, device: Device, stream: Stream, kernels: Kernels, images: int = 1) -> None:
        """`images`: as many as are computed at once. Code is loaded now, not with the first image.

        Raises BackendError if the kernels cannot compute this projector, have no code for this GPU, or it no room.
        """
        self._device, self._stream, self._kernels, self._images = device, stream, kernels, images
        projector = bundle_projector(bundle)
        self._shape, arrays = projector.shape, projector.arrays
        sizes = {name: array.nbytes for name, array in arrays.items()} | {_SCRATCH: self._shape.scratch_bytes(images)}
        with contextlib.ExitStack() as resources:
            memory = Arena(device, sizes)
            resources.callback(memory.free)
            layout = bindings.mm_projector(bundle.config, "float16")
            self._batches = Batches(device, layout, images, stream, self._compute)
            resources.callback(self._batches.free)
            self._scratch, self._weights = memory[_SCRATCH], {name: memory[name] for name in arrays}
            for launch in self._launches(*self._batches.addresses, images):
                kernels.prepare(launch)
            with Upload(device, stream) as upload:
                for name, array in arrays.items():
                    upload(memory[name], array)
            self._close = resources.pop_all().close

    @property
    def origin(self) -> str:
        """Where the kernels' code is from: shipped, built, ..."""
        return self._kernels.images[FILE].origin

    def launch(self, image_features: int, image_embeds: int, images: int, stride: int = 0, first_rows: int = 0) -> None:
        """Put a run on the stream: float16 at one address, [images, P, D_vision], to float16 at another.

        `images` are at most those of the constructor. Rows are `stride` numbers apart, D if 0. `first_rows`: the
        address of int32 [images], the row where each image begins; 0: they lie one behind the other. So an engine can
        have images written right among the embeddings of its tokens. Raises BackendError, or ValueError for a stride
        or an address that the kernels cannot use.
        """
        assert 1 <= images <= self._images, f"{images} images, made for {self._images}"
        launches = self._launches(image_features, image_embeds, images, stride, first_rows)
        self._kernels.run(launches, self._stream)

    def _launches(self, x: int, out: int, images: int, stride: int = 0, first_rows: int = 0) -> list[Launch]:
        count = self._device.multiprocessors
        return self._shape.launches(self._weights, x, self._scratch, out, images, stride, first_rows, count)

    def __call__(self, image_features: FloatArray) -> FloatArray:
        """[N, P, D_vision] to [N, T, D], float32, as many at once as there is room for."""
        return self._batches(image_features)

    def _compute(self, images: int) -> None:
        self.launch(*self._batches.addresses, images)

    def free(self) -> None:
        """Give its memory back. The kernels are their owner's."""
        self._close()
