"""A bundle's decoder in the layout of the kernels: packed once, a block at a time, and kept in this user's cache.

$XDG_CACHE_HOME/vila-edge/packed/<digest of the bundle>-<layout>/   layers.0.safetensors ... rest.safetensors

The folder is as large as the decoder and can be removed at any time.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Protocol

from vila_edge import fsio, kv_scales
from vila_edge.bundle import KV_SCALES_FILE, WEIGHTS, Bundle
from vila_edge.errors import BackendError, InputError, VilaEdgeError
from vila_edge.kernels import decoder_weights
from vila_edge.kernels.decoder_weights import Arrays, DecoderLayout
from vila_edge.stored import StoredParameters
from vila_edge.tensorfile import TensorFile, write_tensors

REST = "rest"  # the part that is no block


class DecoderWeights(Protocol):
    """Arrays of `kernels.decoder_weights`, wherever they are from."""

    @property
    def layout(self) -> DecoderLayout: ...

    def __iter__(self) -> Iterator[tuple[str, Arrays]]:
        """Each part with its arrays: `layers.0`, ..., `REST`. Raises BackendError."""
        ...


class PackedWeights:
    """Arrays of `kernels.decoder_weights`, part by part."""

    def __init__(self, bundle: Bundle, root: Path | None = None) -> None:
        """`root`: where packed weights are kept, by default in the user's cache. Nothing is read yet.

        Raises BackendError if the kernels cannot compute the bundle's decoder.
        """
        decoder_weights.check_sizes(bundle.config.llm)
        self.layout = DecoderLayout(bundle.config.llm)
        self._bundle, self._root = bundle, root
        self.origin = ""  # for people, when all was read

    @property
    def parts(self) -> list[str]:
        return [*(f"layers.{layer}" for layer in range(self.layout.llm.num_hidden_layers)), REST]

    def __iter__(self) -> Iterator[tuple[str, Arrays]]:
        """Each part with its arrays. Raises BackendError if the weights are not in 4 bits, or what was kept is damaged."""
        try:
            folder = self._folder()
            if not folder.is_dir():
                self._keep(folder)
        except (BackendError, InputError):
            raise
        except (VilaEdgeError, OSError, RuntimeError) as error:
            for part in self.parts:  # it works without, only slower the next time
                yield part, self._pack(part)
            self.origin = f"weights packed, and not kept for next time: {getattr(error, 'message', error)}"
            return
        for part in self.parts:
            yield part, _read(folder / f"{part}.safetensors", folder)
        self.origin = f"weights packed in {folder}"

    def _folder(self) -> Path:
        root = self._root or fsio.user_cache() / "packed"
        return root / f"{self._bundle.manifest.digest}-{decoder_weights.LAYOUT}"

    def _keep(self, folder: Path) -> None:
        """Pack every part into a folder, which is there whole or not at all."""
        Bundle.open(self._bundle.path)  # what is kept outlives this process: no byte of it may be unchecked
        with fsio.new_folder(folder) as making:
            for part in self.parts:
                write_tensors(making / f"{part}.safetensors", self._pack(part))

    @cached_property
    def _stored(self) -> StoredParameters:
        files = [f for f in self._bundle.manifest.files if f.startswith(f"{WEIGHTS}/") and f != KV_SCALES_FILE]
        return StoredParameters(TensorFile(self._bundle.file(name)) for name in files)

    def _pack(self, part: str) -> Arrays:
        if part != REST:
            return decoder_weights.block(self._stored, self.layout, int(part.partition(".")[2]))
        scales = {}
        if KV_SCALES_FILE in self._bundle.manifest.files:
            file = TensorFile(self._bundle.file(KV_SCALES_FILE))
            scales = {name: file.array(name) for name in kv_scales.specs(self.layout.llm)}
        return decoder_weights.rest(self._stored, self.layout, scales)


def _read(path: Path, folder: Path) -> Arrays:
    try:
        file = TensorFile(path)
    except InputError as error:
        raise BackendError(error.message, f"remove it, and the weights are packed again: rm -r {folder}") from None
    return {name: file.array(name) for name in file.entries}
