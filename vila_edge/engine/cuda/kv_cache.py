"""kv_caches of the cuda engine: one piece of memory for each layer, used in place."""

from __future__ import annotations

import weakref

from vila_edge.caches import kept_length
from vila_edge.engine.cuda.device import Arena, Device, Stream
from vila_edge.kernels.attention import AttentionShape


class CudaCache:
    """Keys [H_kv, capacity, dim] of a sequence, then values, for each layer; memory is held for as long as this lives."""

    def __init__(self, memory: Arena, layers: int, capacity: int) -> None:
        self.capacity, self.length = capacity, 0
        self.layers_at = [memory[str(layer)] for layer in range(layers)]

    def truncate(self, length: int) -> None:
        self.length = kept_length(length, self.length)


class CachePool:
    """Memory of kv_caches. What a cache leaves behind is taken by the next one of its capacity, or given back."""

    def __init__(self, device: Device, stream: Stream, shape: AttentionShape, layers: int) -> None:
        """`stream`: that of all work on the caches."""
        self._device, self._stream, self._shape, self._layers = device, stream, shape, layers
        self._idle: dict[int, list[Arena]] = {}
        self._used: set[Arena] = set()

    def new(self, capacity: int) -> CudaCache:
        """Raises BackendError if the device has no room, idle memory given back."""
        idle = self._idle.get(capacity)
        memory = idle.pop() if idle else self._allocate(capacity)
        self._used.add(memory)
        cache = CudaCache(memory, self._layers, capacity)
        weakref.finalize(cache, self._leave, capacity, memory).atexit = False
        return cache

    def _allocate(self, capacity: int) -> Arena:
        self.give_back()  # of other capacities, or there would be one of this
        return Arena(self._device, {str(layer): self._shape.layer_bytes(capacity) for layer in range(self._layers)})

    def _leave(self, capacity: int, memory: Arena) -> None:
        if memory in self._used:  # not yet freed with the engine
            self._used.remove(memory)
            self._idle.setdefault(capacity, []).append(memory)

    def give_back(self) -> None:
        """All memory that no cache has."""
        if self._idle:
            self._stream.synchronize()  # steps that were launched ahead may still write to them
        for memories in self._idle.values():
            for memory in memories:
                memory.free()
        self._idle.clear()

    def free(self) -> None:
        """Give everything back, caches that are still in use included."""
        self.give_back()
        for memory in self._used:
            memory.free()
        self._used.clear()
