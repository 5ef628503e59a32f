// y[m, n] = sum_k w[n, k] x[m, k] for m of 1 to 8, a read of the weights: they are the A operand of the mma, x is B, so
// that a batch of 8 costs the tensor cores what a batch of 1 does, and a row's result does not depend on the others.
//
// The warps of a block take the groups of its R tiles in turn, each with SLOTS groups on their way in registers. Sums
// are of integers times halves, in fp32; a group's scale is applied to its sum. Partial sums of the warps meet in
// shared memory.
#pragma once
#include "ve_epilogue.cuh"
#include "ve_pack.cuh"
#include "ve_reduce.cuh"

constexpr int VE_GEMV_WARPS = 8;
constexpr int VE_GEMV_BATCH = 8;

// RMSNorm of x on the way: gamma times x is rounded to a half, as a norm by itself rounds its result; 1 / rms, the same
// for a row of the batch, is applied to the sum. gamma comes divided by a power of two, `scale`, which leaves nothing
// above 1: x can then not overflow.
struct VeRms {
  const __half* gamma;  // [k]
  float eps, scale;
};

// The squares of eight halves, added to `sum`.
__device__ __forceinline__ void ve_add_squares(float& sum, const uint4& v) {
  const unsigned words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 f = __half22float2(ve_bits<__half2>(words[i]));
    sum += f.x * f.x;
    sum += f.y * f.y;
  }
}
__device__ __forceinline__ uint4 ve_multiply(const uint4& v, const uint4& by) {
  const unsigned x[4] = {v.x, v.y, v.z, v.w}, factor[4] = {by.x, by.y, by.z, by.w};
  unsigned result[4];
#pragma unroll
  for (int i = 0; i < 4; ++i)
    result[i] = ve_bits<unsigned>(__hmul2(ve_bits<__half2>(x[i]), ve_bits<__half2>(factor[i])));
  return uint4{result[0], result[1], result[2], result[3]};
}

template <int R, int SLOTS, bool RMS, class Weight, class Y>
__device__ __forceinline__ void ve_gemv(const Weight& weight, const __half* x, const VeRms& rms,
                                        const VeEpilogue<Y>& epilogue, int k, int batch) {
  constexpr int WARPS = VE_GEMV_WARPS, BATCH = VE_GEMV_BATCH;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4, first_tile = blockIdx.x * R;
  typename Weight::Group ring[SLOTS][R];
  VE_SHARED(float, partial, WARPS * R * VE_TILE * BATCH);  // [warp][tile][row][m]
  VE_SHARED(float, squares, RMS ? WARPS * BATCH : 1);      // [warp][m]
  float sums[R][4] = {};

#pragma unroll
  for (int slot = 0; slot < SLOTS; ++slot)
#pragma unroll
    for (int r = 0; r < R; ++r)
      if (warp + slot * WARPS < weight.groups) ring[slot][r] = weight.fetch(first_tile + r, warp + slot * WARPS, lane);

  if (RMS)  // while the first weights are on their way
    for (int m = 0; m < batch; ++m) {
      float sum = 0.f;
      for (int i = threadIdx.x; i < k / 8; i += WARPS * 32)
        ve_add_squares(sum, __ldg(reinterpret_cast<const uint4*>(x) + m * (k / 8) + i));
      sum = ve_lane_sum(sum);
      if (lane == 0) squares[warp * BATCH + m] = sum;
    }

  for (int first = warp; first < weight.groups; first += WARPS * SLOTS) {
#pragma unroll
    for (int slot = 0; slot < SLOTS; ++slot) {
      const int group = first + slot * WARPS, next = group + SLOTS * WARPS;
      if (group >= weight.groups) break;
      float group_sums[R][4] = {};
#pragma unroll
      for (int chunk = 0; chunk < 2; ++chunk) {
        VeInputs inputs;
#pragma unroll
        for (int run = 0; run < 2; ++run) {
          const int at = group * VE_GROUP + chunk * VE_CHUNK + run * 32 + t * 8;
          uint4 v{0, 0, 0, 0};
          if (g < batch && (!Weight::FILLED_UP || at < k)) {
            v = __ldg(reinterpret_cast<const uint4*>(x + (size_t)g * k + at));
            if (RMS) v = ve_multiply(v, __ldg(reinterpret_cast<const uint4*>(rms.gamma + at)));
          }
          inputs.set(run, v);
        }
#pragma unroll
        for (int r = 0; r < R; ++r)
#pragma unroll
          for (int step = 0; step < 4; ++step) {
            unsigned a[4];
            ring[slot][r].unpack(a, chunk, step);
            ve_mma16816(group_sums[r], a, inputs.words[2 * step], inputs.words[2 * step + 1]);
          }
      }
#pragma unroll
      for (int r = 0; r < R; ++r) {
        const float2 scale = __half22float2(ring[slot][r].scale);
        sums[r][0] += scale.x * group_sums[r][0], sums[r][1] += scale.x * group_sums[r][1];
        sums[r][2] += scale.y * group_sums[r][2], sums[r][3] += scale.y * group_sums[r][3];
        if (next < weight.groups) ring[slot][r] = weight.fetch(first_tile + r, next, lane);
      }
    }
  }

#pragma unroll
  for (int r = 0; r < R; ++r)
#pragma unroll
    for (int e = 0; e < 4; ++e)
      partial[((warp * R + r) * VE_TILE + g + e / 2 * 8) * BATCH + 2 * t + e % 2] = sums[r][e];
  __syncthreads();

  for (int i = threadIdx.x; i < R * 8 * BATCH; i += WARPS * 32) {
    const int m = i % BATCH, row = i / BATCH % 8, r = i / (8 * BATCH);
    if (m >= batch) continue;
    float a = 0.f, b = 0.f, factor = 1.f;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) {
      const float* tile = partial + (w * R + r) * VE_TILE * BATCH;
      a += tile[row * BATCH + m], b += tile[(row + 8) * BATCH + m];
    }
    if (RMS) {
      float sum = 0.f;
#pragma unroll
      for (int w = 0; w < WARPS; ++w) sum += squares[w * BATCH + m];
      factor = rms.scale * rsqrtf(sum / (float)k + rms.eps);
    }
    epilogue.finish(first_tile + r, row, m, a * factor, b * factor);
  }
}
