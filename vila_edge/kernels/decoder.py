"""Launches of a whole decoder: what a token, or a chunk of a prompt, takes from its embeddings to its logits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vila_edge.kernels import attention, elementwise, w4, w8
from vila_edge.kernels.attention import AttentionShape, Caches
from vila_edge.kernels.decoder_weights import COSINES, LM_HEAD, NORM, NORMS, SINES, DecoderLayout
from vila_edge.kernels.epilogue import Epilogue, Rms, Rope
from vila_edge.kernels.launch import Launch
from vila_edge.kernels.w4 import MAX_BATCH

CHUNK = 512  # positions of a prefill that are computed at once: a wide GEMM has its full rate, and memory stays small


@dataclass(frozen=True)
class Memory:
    """Addresses of what goes from launch to launch; float16 [rows, ...] where nothing else is said."""

    x: int  # the residual stream, D numbers a row
    normed: int  # D
    qkv: int
    attended: int  # query heads * dim
    gated: int  # intermediate_size
    positions: int  # int32 [rows]
    logits: int  # float32 [MAX_BATCH, V]
    splits: int  # `attention.decode_scratch_bytes`

    @staticmethod
    def sizes(layout: DecoderLayout, shape: AttentionShape, rows: int, splits: int) -> dict[str, int]:
        """Bytes of each, for so many rows at once, and so many splits of a decode."""
        products, llm = layout.products, layout.llm
        halves = {
            "x": llm.hidden_size,
            "normed": llm.hidden_size,
            "qkv": products["qkv_proj"].outputs,
            "attended": products["o_proj"].inputs,
            "gated": products["down_proj"].inputs,
        }
        most = max(rows, MAX_BATCH)
        return {name: 2 * most * width for name, width in halves.items()} | {
            "positions": 4 * most,
            "logits": 4 * MAX_BATCH * llm.vocab_size,
            "splits": attention.decode_scratch_bytes(shape, MAX_BATCH, splits),
        }


class DecoderLaunches:
    """Launches over weights on a device."""

    def __init__(
        self,
        layout: DecoderLayout,
        weights: Mapping[str, int],
        gamma_scales: Mapping[str, float],
        shape: AttentionShape,
    ) -> None:
        """`weights`: address of each array of `decoder_weights`; `gamma_scales`: of each norm, by its full name."""
        self.layout, self._at, self._gamma_scales, self._shape = layout, weights, gamma_scales, shape

    def decode(self, memory: Memory, caches: Caches, batch: int, splits: int) -> list[Launch]:
        """One new position in each of 1 to 8 sequences, from `memory.x` to `memory.logits`: five launches a block,
        six where attention has more than one split."""
        launches: list[Launch] = []
        for layer in range(self.layout.llm.num_hidden_layers):
            launches.append(self._gemv(layer, "qkv_proj", memory.x, memory.qkv, batch, memory, NORMS[0]))
            launches += attention.decode(
                self._shape, caches, layer, memory.qkv, memory.positions, memory.attended, batch, splits, memory.splits
            )
            launches.append(self._gemv(layer, "o_proj", memory.attended, memory.x, batch, memory))
            launches.append(self._gemv(layer, "gate_up_proj", memory.x, memory.gated, batch, memory, NORMS[1]))
            launches.append(self._gemv(layer, "down_proj", memory.gated, memory.x, batch, memory))
        launches.append(self.head(memory.x, memory.logits, batch))
        return launches

    def prefill(self, memory: Memory, caches: Caches, rows: int, sequence: int = 0) -> list[Launch]:
        """`rows` new positions of one sequence, from `memory.x` to the hidden states in its place: eight launches a
        block, or six for 8 rows or less, whose products read the weights as decode does."""
        launches: list[Launch] = []
        for layer in range(self.layout.llm.num_hidden_layers):
            launches += self._product(layer, "qkv_proj", memory.x, memory.qkv, rows, memory, NORMS[0])
            at = (self._shape, caches, layer, memory.qkv, memory.positions)
            launches.append(attention.write_kv(*at, rows, sequence))
            launches.append(attention.prefill(*at, memory.attended, rows, sequence))
            launches += self._product(layer, "o_proj", memory.attended, memory.x, rows, memory)
            launches += self._product(layer, "gate_up_proj", memory.x, memory.gated, rows, memory, NORMS[1])
            launches += self._product(layer, "down_proj", memory.gated, memory.x, rows, memory)
        return launches

    def _product(
        self, layer: int, product: str, x: int, y: int, rows: int, memory: Memory, norm: str = ""
    ) -> list[Launch]:
        """A product of any number of rows, with a norm before it if there is one."""
        if rows <= MAX_BATCH:
            return [self._gemv(layer, product, x, y, rows, memory, norm)]
        if not norm:
            return [self._gemm(layer, product, x, y, rows, memory)]
        return [self._norm(layer, norm, memory, rows), self._gemm(layer, product, memory.normed, y, rows, memory)]

    def head(self, x: int, logits: int, rows: int) -> Launch:
        """Logits float32 [rows, V] of hidden states [rows, D], through the last norm. `rows`: 1 to 8."""
        layout, llm = self.layout, self.layout.llm
        weight = w8.Weight(
            self._at[f"{LM_HEAD}.qweight"], self._at[f"{LM_HEAD}.scales"], layout.head_rows, layout.head_columns
        )
        return w8.gemv(weight, x, logits, llm.vocab_size, llm.hidden_size, rows, self._rms(NORM))

    def _gemv(self, layer: int, product: str, x: int, y: int, batch: int, memory: Memory, norm: str = "") -> Launch:
        rms = self._rms(f"layers.{layer}.{norm}") if norm else None
        return w4.gemv(self._weight(layer, product), x, y, batch, self._epilogue(layer, product, memory), rms)

    def _gemm(self, layer: int, product: str, x: int, y: int, rows: int, memory: Memory) -> Launch:
        return w4.gemm(self._weight(layer, product), x, y, rows, self._epilogue(layer, product, memory))

    def _norm(self, layer: int, norm: str, memory: Memory, rows: int) -> Launch:
        weight, llm = self._at[f"layers.{layer}.{norm}.weight"], self.layout.llm
        return elementwise.rmsnorm(memory.x, weight, memory.normed, rows, llm.hidden_size, llm.rms_norm_eps)

    def _rms(self, norm: str) -> Rms:
        return Rms(self._at[f"{norm}.gamma"], self._gamma_scales[norm], self.layout.llm.rms_norm_eps)

    def _weight(self, layer: int, product: str) -> w4.Weight:
        at, sizes = f"layers.{layer}.{product}", self.layout.products[product]
        qweight, scales, qzeros = (self._at[f"{at}.{part}"] for part in ("qweight", "scales", "qzeros"))
        return w4.Weight(qweight, scales, qzeros, sizes.packed_rows, sizes.inputs)

    def _epilogue(self, layer: int, product: str, memory: Memory) -> Epilogue:
        """RoPE behind q, k and v, SwiGLU behind gate and up, the residual behind the other two."""
        outputs, dim = self.layout.products[product].outputs, self.layout.llm.head_dim
        if product == "qkv_proj":
            before = 4 * (dim // 2)  # bytes of the row that stands for position -1
            cosines, sines = self._at[COSINES] + before, self._at[SINES] + before
            rope = Rope(cosines, sines, memory.positions, dim, self.layout.rotated_heads)
            return Epilogue(outputs, bias=self._at.get(f"layers.{layer}.qkv_proj.bias", 0), rope=rope)
        if product == "gate_up_proj":
            return Epilogue(outputs, swiglu=True)
        return Epilogue(outputs, residual=memory.x)
