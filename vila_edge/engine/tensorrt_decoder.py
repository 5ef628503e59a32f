"""The decoder in TensorRT: its kv_caches, prefill in chunks, and decode, in a CUDA graph where it can be captured.

All that a call needs is allocated before it: staging once, and for each kv_cache that is in use at once a slot.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from vila_edge.bindings import INPUTS_EMBEDS, LOGITS, LOGITS_TO_KEEP, POSITION_IDS, Binding, GraphBindings
from vila_edge.caches import check_room, kept_length, kept_positions
from vila_edge.engine.cuda.device import ALIGNMENT, Arena, Graph, Staging, Stream, nbytes
from vila_edge.engine.tensorrt_options import MAX_KEPT, BuildOptions
from vila_edge.engine.tensorrt_session import LoadedEngine, Session
from vila_edge.errors import BackendError, UsageError

PREFILL, DECODE = 0, 1  # optimisation profiles of the engine
PAST = "past_"

FloatArray = NDArray[np.float32]


class TensorrtCache:
    """Keys and values of a sequence, in a slot of the decoder that is taken for as long as this object lives."""

    def __init__(self, slot: Slot, capacity: int) -> None:
        self.slot, self.capacity = slot, capacity
        self.length = 0

    def truncate(self, length: int) -> None:
        self.length = kept_length(length, self.length)


class Slot:
    """Memory of one kv_cache, and its own context for decode: a captured graph needs both to stay as they are."""

    def __init__(self, memory: Arena, decode: Session) -> None:
        self.memory, self.decode = memory, decode
        self.graph: Graph | None = None

    def free(self) -> None:
        if self.graph is not None:
            self.graph.free()
        self.decode.close()
        self.memory.free()


class Decoder:
    """A decoder engine and its kv_caches, one of which is at work at a time."""

    def __init__(
        self,
        engine: LoadedEngine,
        layout: GraphBindings,
        options: BuildOptions,
        stream: Stream,
        scratch: int,
        resources: contextlib.ExitStack,
    ) -> None:
        """`scratch`: address of the contexts' memory; `resources` gives back what is taken here. Raises BackendError."""
        self._engine, self._options, self._stream, self._scratch = engine, options, stream, scratch
        self._device = engine.runtime.device
        self._inputs = [binding for binding in layout.inputs if not binding.name.startswith(PAST)]
        self._kv = {b.name.removeprefix(PAST): b for b in layout.inputs if b.name.startswith(PAST)}
        self._logits = layout.outputs[0]
        limits = {"sequence": options.chunk, "kept": MAX_KEPT}
        self._staging = Staging(
            self._device, {b.name: (b.sized(**limits), b.dtype) for b in (*self._inputs, self._logits)}
        )
        resources.callback(self._staging.free)
        self._prefill = engine.session(PREFILL, stream, scratch)
        resources.callback(self._prefill.close)
        self._beside = self._scratch_outputs()
        if self._beside is not None:
            resources.callback(self._beside.free)
        self._slots: list[Slot] = []
        self._idle: list[Slot] = []
        resources.callback(self._free_slots)
        self.not_captured = "" if options.form == "scatter" else "the shapes of form append change with every step"
        self._warm_up()

    def new_cache(self, capacity: int) -> TensorrtCache:
        """An empty cache. Raises UsageError if it is to hold more than the engine was built for."""
        if not 1 <= capacity <= self._options.context:
            raise UsageError(
                f"a context of {capacity:,} positions: the engine was built for {self._options.context:,}",
                "use a shorter context, or build engines for a longer one: vila-edge build BUNDLE --context",
            )
        slot = self._idle.pop() if self._idle else self._new_slot()
        # What is masked is multiplied with 0 all the same, so it must not be infinite.
        slot.memory.clear(self._stream)
        cache = TensorrtCache(slot, capacity)
        weakref.finalize(cache, self._idle.append, slot).atexit = False
        return cache

    def forward(self, inputs_embeds: FloatArray, cache: TensorrtCache, logits_to_keep: Sequence[int]) -> FloatArray:
        """As in `Engine`. Raises ContextError if the cache has no room for the new positions."""
        new = len(inputs_embeds)
        kept = kept_positions(logits_to_keep, new)
        check_room(cache.length, new, cache.capacity)
        rows = dict[int, FloatArray]()
        for start, stop, wanted in runs(new, sorted(set(kept)), self._options.chunk):
            logits = self._run(inputs_embeds[start:stop], cache, [position - start for position in wanted])
            rows.update(zip(wanted, logits, strict=True))
        return np.array([rows[position] for position in kept], np.float32).reshape(-1, self._vocab_size)

    @property
    def _vocab_size(self) -> int:
        return int(self._staging.host[LOGITS].shape[-1])

    def _run(self, inputs_embeds: FloatArray, cache: TensorrtCache, wanted: Sequence[int]) -> FloatArray:
        """One run of the engine, waited for; logits of the `wanted` positions, at most MAX_KEPT."""
        new, host, slot = len(inputs_embeds), self._staging.host, cache.slot
        kept = wanted or [new - 1]  # the engine gives one at least
        host[INPUTS_EMBEDS][0, :new] = inputs_embeds
        host[POSITION_IDS][0, :new] = np.arange(cache.length, cache.length + new)
        host[LOGITS_TO_KEEP][: len(kept)] = kept
        if new > 1:
            self._enqueue(self._prefill, slot, cache.length, new, len(kept))
        elif slot.graph is None:
            self._enqueue(slot.decode, slot, cache.length, 1, 1)
        else:
            slot.graph.launch(self._stream)
        self._stream.synchronize()
        cache.length += new
        logits: FloatArray = host[LOGITS][0, : len(wanted)].copy()
        if new == 1 and slot.graph is None and not self.not_captured:
            self._capture(slot)
        return logits

    def _enqueue(self, session: Session, slot: Slot, past: int, new: int, kept: int) -> None:
        """Put a run on the stream: inputs from the staging, keys and values in the slot, logits to the staging."""
        staging, stream = self._staging, self._stream
        for binding in self._inputs:
            shape = binding.sized(sequence=new, kept=kept)
            staging.to_device(binding.name, shape, stream)
            session.bind(binding.name, staging.memory[binding.name], shape)
        session.bind(LOGITS, staging.memory[LOGITS])
        if self._options.form == "scatter":
            self._bind_in_place(session, slot)
        else:
            self._bind_behind(session, slot, past)
        session.run()
        if self._beside is not None:
            for name, binding in self._kv.items():
                row = _row_bytes(binding)
                target, source = slot.memory[name] + past * row, self._beside[name]
                self._device.copy_on_device_async(target, source, new * row, stream)
        staging.to_host(LOGITS, self._logits.sized(kept=kept), stream)

    def _bind_in_place(self, session: Session, slot: Slot) -> None:
        """Form `scatter`: what comes out is what went in, with new rows."""
        for name in self._kv:
            session.bind(f"{PAST}{name}", slot.memory[name])
            session.bind(f"present_{name}", slot.memory[name])

    def _bind_behind(self, session: Session, slot: Slot, past: int) -> None:
        """Form `append`: what comes out goes right behind what went in, or beside it if it may not begin there."""
        for name, binding in self._kv.items():
            behind = slot.memory[name] + past * _row_bytes(binding)
            session.bind(binding.name, slot.memory[name], binding.sized(past=past))
            session.bind(f"new_{name}", behind if self._beside is None else self._beside[name])

    def _scratch_outputs(self) -> Arena | None:
        """TensorRT takes aligned addresses alone. Where positions are not all aligned, outputs need another place."""
        if self._options.form == "scatter" or all(_row_bytes(b) % ALIGNMENT == 0 for b in self._kv.values()):
            return None
        return Arena(self._device, {name: self._options.chunk * _row_bytes(b) for name, b in self._kv.items()})

    def _capture(self, slot: Slot) -> None:
        """Make decode a CUDA graph, which TensorRT allows after a first run; if it does not, go on without."""
        if not slot.decode.can_be_captured():
            return  # TensorRT-RTX is not ready for it; asked again after the next step
        try:
            with self._stream.capture() as capture:
                self._enqueue(slot.decode, slot, 0, 1, 1)
        except BackendError as error:
            self.not_captured = error.message
        else:
            slot.graph = capture.graph

    def _new_slot(self) -> Slot:
        sizes = {name: nbytes(b.sized(past=self._options.context), b.dtype) for name, b in self._kv.items()}
        memory = Arena(self._device, sizes)
        try:
            slot = Slot(memory, self._engine.session(DECODE, self._stream, self._scratch, always_alike=True))
        except BaseException:
            memory.free()
            raise
        self._slots.append(slot)
        return slot

    def _free_slots(self) -> None:
        for slot in self._slots:
            slot.free()

    def _warm_up(self) -> None:
        """One step, for nothing: the first slot is there, errors show now, and the graph is captured."""
        width = self._staging.host[INPUTS_EMBEDS].shape[-1]
        self._run(np.zeros((1, width), np.float32), self.new_cache(1), [])

    @property
    def captured(self) -> bool:
        """Whether decode is a CUDA graph."""
        return any(slot.graph is not None for slot in self._slots)


def runs(new: int, wanted: Sequence[int], chunk: int) -> Iterator[tuple[int, int, list[int]]]:
    """Cut new positions into start, stop and those of the sorted `wanted` between: at most `chunk` and MAX_KEPT."""
    start = 0
    while start < new:
        stop = min(start + chunk, new)
        inside = [position for position in wanted if start <= position < stop]
        if len(inside) > MAX_KEPT:
            stop, inside = inside[MAX_KEPT], inside[:MAX_KEPT]
        yield start, stop, inside
        start = stop


def _row_bytes(binding: Binding) -> int:
    """Of one position, in form `append`."""
    return nbytes(binding.sized(past=1), binding.dtype)
