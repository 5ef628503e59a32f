// What becomes of a product before it is stored. Two values that meet (gate and up, both halves of a rotation) are rows
// g and g + 8 of a tile, because the weight is packed so: they sit in one lane.
#pragma once
#include "ve_ptx.cuh"

__device__ __forceinline__ void ve_store(__half* p, float v) { *p = __float2half_rn(v); }
__device__ __forceinline__ void ve_store(float* p, float v) { *p = v; }

// Every address but y may be null: then that step is left out.
template <class Y>
struct VeEpilogue {
  const float* bias;       // [tiles, 16], in the order in which rows are packed
  const __half* residual;  // [m, n], added last; may be y
  const float* cosines;    // [positions, head_dim / 2]
  const float* sines;
  const int* positions;  // [m]
  Y* y;                  // [m, n]
  int n;                 // columns of y
  int swiglu;            // not 0: rows g are gates, rows g + 8 what they let through
  int head_dim;          // a multiple of 16
  int rotated_tiles;     // the first tiles, of whole heads, are rotated

  __device__ __forceinline__ void put(int m, int column, float v) const {
    if (column >= n) return;
    const size_t at = (size_t)m * n + column;
    if (residual) v += __half2float(residual[at]);
    ve_store(y + at, v);
  }
  // Stores row m of the batch for rows g (a) and g + 8 (b) of a tile.
  __device__ __forceinline__ void finish(int tile, int g, int m, float a, float b) const {
    if (bias) a += bias[tile * 16 + g], b += bias[tile * 16 + g + 8];
    if (swiglu) return put(m, tile * 8 + g, __fdividef(a, 1.f + __expf(-a)) * b);
    if (tile >= rotated_tiles) {
      put(m, tile * 16 + g, a);
      put(m, tile * 16 + g + 8, b);
      return;
    }
    const int half = head_dim / 2, head = tile * 16 / head_dim, i = tile * 8 % half + g;
    const size_t angle = (size_t)positions[m] * half + i;
    const float c = cosines[angle], s = sines[angle];
    put(m, head * head_dim + i, a * c - b * s);
    put(m, head * head_dim + half + i, b * c + a * s);
  }
};
