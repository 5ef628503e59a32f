"""The decoder on our kernels: its weights, prefill in chunks, and a step of decode as one CUDA graph.

All memory is there when this is made, but that of kv_caches. A step reads from the device which sequences it is of, so
one graph serves any of them: there is one for each number of sequences and of attention's splits, in powers of two.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from vila_edge.caches import check_capacity, check_room, kept_positions
from vila_edge.config import LlmConfig
from vila_edge.engine.cuda.device import Arena, Device, Graph, Staging, Stream
from vila_edge.engine.cuda.kernels import Kernels
from vila_edge.engine.cuda.kv_cache import CachePool, CudaCache
from vila_edge.engine.cuda.packed_weights import DecoderWeights
from vila_edge.engine.cuda.upload import Upload
from vila_edge.errors import BackendError
from vila_edge.kernels import attention, elementwise, sampling
from vila_edge.kernels.attention import AttentionShape, Caches, KvCache
from vila_edge.kernels.decoder import CHUNK, DecoderLaunches, Memory
from vila_edge.kernels.decoder_weights import EMBED_TOKENS, KEY_SCALES, VALUE_SCALES
from vila_edge.kernels.launch import Launch
from vila_edge.kernels.sampling import RING, SETTINGS, State
from vila_edge.kernels.w4 import MAX_BATCH

# Where a step begins and ends: an embedding of the host and logits for it, or the last token and the next one.
Step = Literal["logits", "greedy", "sample"]

FloatArray = NDArray[np.float32]


class Decoder:
    """One model's decoder on a device. Work is put on one stream; calls come one at a time."""

    def __init__(
        self,
        packed: DecoderWeights,
        device: Device,
        stream: Stream,
        kernels: Kernels,
        resources: contextlib.ExitStack,
        context: int,
        kv_cache: KvCache = "float16",
        chunk: int = CHUNK,
    ) -> None:
        """`context`: positions of the longest kv_cache; `resources` gives back what is taken here.

        Raises BackendError if the kernels cannot compute the model, have no code for the GPU, or it no room.
        """
        layout, llm = packed.layout, packed.layout.llm
        self.llm, self.context = llm, context
        self.chunk = chunk = min(chunk, context)
        self._device, self._stream, self._kernels = device, stream, kernels
        self._shape = attention_shape(llm, kv_cache)
        self._splits = attention.splits(context)
        self._weights = dict[str, int]()
        gamma_scales = dict[str, float]()
        with Upload(device, stream) as upload:
            for part, arrays in packed:
                prefix = f"{part}." if part.startswith("layers.") else ""
                memory = Arena(device, {name: array.nbytes for name, array in arrays.items()})
                resources.callback(memory.free)
                for name, array in arrays.items():
                    upload(memory[name], array)
                    self._weights[f"{prefix}{name}"] = memory[name]
                    if name.endswith(".scale"):
                        gamma_scales[f"{prefix}{name.removesuffix('.scale')}"] = float(array[0])
        if kv_cache == "int8" and KEY_SCALES not in self._weights:
            raise BackendError(
                "the bundle has no scales for a kv_cache in int8",
                "export the checkpoint again, or leave --kv-cache int8 out",
            )
        self._launches = DecoderLaunches(layout, self._weights, gamma_scales, self._shape)
        sizes = Memory.sizes(layout, self._shape, chunk, self._splits)
        sizes["sampling"] = sampling.scratch_bytes(llm.vocab_size, MAX_BATCH)
        beside = Arena(device, {name: size for name, size in sizes.items() if name not in _STAGED})
        resources.callback(beside.free)
        self.staging = Staging(device, _staged(llm, chunk))
        resources.callback(self.staging.free)
        self._caches = self._tables()
        at = {name: self.staging.memory[name] if name in _STAGED else beside[name] for name in sizes}
        self._scratch = at.pop("sampling")
        self._prefill = Memory(**at)
        self._decode = Memory(**at | {"positions": self.staging.memory["sequence_positions"]})
        self._pool = CachePool(device, stream, self._shape, llm.num_hidden_layers)
        resources.callback(self._pool.free)
        self._graphs = dict[tuple[int, int, Step], Graph]()
        resources.callback(self._free_graphs)
        self.launches_per_token = 0  # of the last graph that was captured
        self.owner: object = None  # whose sequences the tables on the device are
        self._warm_up()

    def _tables(self) -> Caches:
        at = self.staging.memory
        scales = {}
        if self._shape.kv_cache == "int8":
            scales = {"key_scales": self._weights[KEY_SCALES], "value_scales": self._weights[VALUE_SCALES]}
        return Caches(at["layers_at"], at["capacities"], self.llm.num_hidden_layers, **scales)

    def _warm_up(self) -> None:
        """A prompt of two positions and a step, for nothing: code is loaded, and errors show now."""
        cache = self.new_cache(min(3, self.context))
        for new in (2, 1)[: cache.capacity - 1]:
            self.forward(np.zeros((new, self.llm.hidden_size), np.float32), cache, (-1,))
        del cache
        self._pool.give_back()

    def new_cache(self, capacity: int) -> CudaCache:
        """Raises UsageError if the engine has none of that size, BackendError if the device has no room."""
        return self._pool.new(check_capacity(capacity, self.context))

    def forward(self, inputs_embeds: FloatArray, cache: CudaCache, logits_to_keep: Sequence[int]) -> FloatArray:
        """As in `Engine`."""
        new = len(inputs_embeds)
        kept = kept_positions(logits_to_keep, new)
        check_room(cache.length, new, cache.capacity)
        self.place([cache])
        if new == 1:
            row = self._step_for_logits(inputs_embeds, cache)
            return row[np.zeros(len(kept), np.intp)]
        rows = dict[int, FloatArray]()
        for start in range(0, new, self.chunk):
            part = inputs_embeds[start : start + self.chunk]
            wanted = sorted({position - start for position in kept if 0 <= position - start < len(part)})
            logits = self._chunk(part, cache, wanted)
            rows.update(zip((start + position for position in wanted), logits, strict=True))
        return np.array([rows[position] for position in kept], np.float32).reshape(-1, self.llm.vocab_size)

    def _chunk(self, inputs_embeds: FloatArray, cache: CudaCache, wanted: Sequence[int]) -> FloatArray:
        """Positions behind a cache, waited for; logits of the `wanted` ones."""
        new, staging, stream = len(inputs_embeds), self.staging, self._stream
        staging.host["x"][:new] = inputs_embeds
        staging.host["positions"][:new] = np.arange(cache.length, cache.length + new)
        staging.to_device("x", (new, self.llm.hidden_size), stream)
        staging.to_device("positions", (new,), stream)
        self._kernels.run(self._launches.prefill(self._prefill, self._caches, new), stream)
        found = np.empty((len(wanted), self.llm.vocab_size), np.float32)
        for start in range(0, len(wanted), MAX_BATCH):
            rows = wanted[start : start + MAX_BATCH]
            width = 2 * self.llm.hidden_size
            for place, row in enumerate(rows):
                source, target = self._prefill.x + row * width, self._prefill.normed + place * width
                self._device.copy_on_device_async(target, source, width, stream)
            self._kernels.run([self._launches.head(self._prefill.normed, self._prefill.logits, len(rows))], stream)
            staging.to_host("logits", (len(rows), self.llm.vocab_size), stream)
            stream.synchronize()
            found[start : start + len(rows)] = staging.host["logits"][: len(rows)]
        stream.synchronize()
        cache.length += new
        return found

    def _step_for_logits(self, inputs_embeds: FloatArray, cache: CudaCache) -> FloatArray:
        staging, stream = self.staging, self._stream
        staging.host["x"][:1] = inputs_embeds
        staging.host["sequence_positions"][0] = cache.length
        staging.to_device("x", (1, self.llm.hidden_size), stream)
        staging.to_device("sequence_positions", (1,), stream)
        self.graph(1, cache.length + 1, "logits").launch(stream)
        stream.synchronize()
        cache.length += 1
        logits: FloatArray = staging.host["logits"][:1].copy()
        return logits

    def place(self, caches: Sequence[CudaCache], owner: object = None) -> None:
        """Make these the sequences of the next steps. Whatever was launched ahead for others is waited for."""
        staging, stream, layers = self.staging, self._stream, self.llm.num_hidden_layers
        stream.synchronize()  # of what is still under way on the pinned memory
        self.owner = owner
        for row, cache in enumerate(caches):
            staging.host["layers_at"][row] = cache.layers_at
            staging.host["capacities"][row] = cache.capacity
        staging.to_device("layers_at", (len(caches), layers), stream)
        staging.to_device("capacities", (len(caches),), stream)

    def graph(self, batch: int, longest: int, step: Step) -> Graph:
        """A step of so many sequences, the longest of which has that many positions with the new one."""
        splits = min(_power_of_two(attention.splits(longest)), self._splits)
        key = (batch, splits, step)
        if key not in self._graphs:
            self._graphs[key] = self._capture(*key)
        return self._graphs[key]

    def _capture(self, batch: int, splits: int, step: Step) -> Graph:
        """The launches of a step as a graph, and the copy of what the host wants of it."""
        launches = self._launches.decode(self._decode, self._caches, batch, splits)
        if step != "logits":
            launches = [self._embed(batch), *launches, *self._sample(batch, step)]
        ready = [self._kernels.prepare(launch) for launch in launches]
        with self._device.current(), self._stream.capture() as capture:
            for launch in ready:
                launch.launch(self._stream)
            if step == "logits":
                self.staging.to_host("logits", (batch, self.llm.vocab_size), self._stream)
            else:
                self.staging.to_host("ring", (RING * batch,), self._stream)
        assert capture.graph is not None
        self.launches_per_token = len(launches)
        return capture.graph

    def _embed(self, batch: int) -> Launch:
        table = self._weights[EMBED_TOKENS]
        ids = self.staging.memory["ids"]
        return elementwise.embed(ids, table, self._decode.x, batch, self.llm.vocab_size, self.llm.hidden_size)

    def _sample(self, batch: int, step: Step) -> list[Launch]:
        at, logits = self.staging.memory, self._decode.logits
        state = State(
            ids=at["ids"],
            positions=at["sequence_positions"],
            step=at["step"],
            ring=at["ring"],
            settings=at["settings"],
            scratch=self._scratch,
        )
        make = sampling.greedy if step == "greedy" else sampling.sample
        return make(logits, state, self.llm.vocab_size, batch)

    def _free_graphs(self) -> None:
        for graph in self._graphs.values():
            graph.free()
        self._graphs.clear()


# What the host writes or reads; the rest stays on the device.
_STAGED = ("x", "positions", "logits")


def _staged(llm: LlmConfig, chunk: int) -> dict[str, tuple[tuple[int, ...], str]]:
    rows = max(chunk, MAX_BATCH)
    return {
        "x": ((rows, llm.hidden_size), "float16"),
        "positions": ((rows,), "int32"),
        "logits": ((MAX_BATCH, llm.vocab_size), "float32"),
        "layers_at": ((MAX_BATCH, llm.num_hidden_layers), "int64"),
        "capacities": ((MAX_BATCH,), "int32"),
        "sequence_positions": ((MAX_BATCH,), "int32"),
        "ids": ((MAX_BATCH,), "int32"),
        "step": ((MAX_BATCH,), "int32"),
        "settings": ((MAX_BATCH, SETTINGS.itemsize), "uint8"),
        "ring": ((RING * MAX_BATCH,), "int64"),
    }


def attention_shape(llm: LlmConfig, kv_cache: KvCache) -> AttentionShape:
    """Raises BackendError for heads that the kernels do not have."""
    try:
        return AttentionShape(llm.heads, kv_cache)
    except ValueError as error:
        raise BackendError(f"the cuda engine cannot compute this model: {error}", "take another --backend") from None


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
