"""What engines on a GPU have in common: memory that is given back, tokens looked up on the host, calls that end whole."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from vila_edge import architecture
from vila_edge.bundle import EMBED_TOKENS_FILE, Bundle
from vila_edge.caches import check_ids
from vila_edge.engine.cuda.device import Device, Stream
from vila_edge.errors import BackendError
from vila_edge.stored import StoredParameters
from vila_edge.tensorfile import TensorFile

FloatArray = NDArray[np.float32]

Self = TypeVar("Self", bound="DeviceEngine")


class DeviceEngine:
    """The base of such an engine, which calls `_own` at the end of its constructor. `close` gives the GPU's memory back."""

    def _own(self, bundle: Bundle, device: Device, stream: Stream, resources: contextlib.ExitStack) -> None:
        """`resources` gives back all that the engine has. All of its work is on `stream`."""
        resources.callback(stream.synchronize)
        self.cfg, self._device, self._stream = bundle.config, device, stream
        self._embed_tokens = StoredParameters([TensorFile(bundle.file(EMBED_TOKENS_FILE), keep_mapped=True)])
        self._close: weakref.finalize[Any, Any] = weakref.finalize(self, resources.pop_all().close)

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Give everything back, caches included. Once is enough, more often does no harm."""
        self._close()

    def embed_tokens(self, input_ids: Sequence[int]) -> FloatArray:
        """As in `Engine`."""
        table = (self.cfg.llm.vocab_size, self.cfg.llm.hidden_size)
        return self._embed_tokens.float32(f"{architecture.EMBED_TOKENS}.weight", table, check_ids(input_ids, table[0]))

    @contextlib.contextmanager
    def _at_work(self) -> Iterator[None]:
        assert self._close.alive, "the engine is closed"
        with self._device.current(), settled(self._stream):
            yield


@contextlib.contextmanager
def settled(stream: Stream) -> Iterator[None]:
    """Whatever the block raises, none of its work is under way any more when the next call comes, or memory is freed."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(BackendError):
            stream.synchronize()
        raise
