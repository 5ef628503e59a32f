// y[m, n] = sum_k w[n, k] x[m, k] for m of 1 to 8, a read of the weights: they are the A operand of the mma, x is B, so that a
// batch of 8 costs the tensor cores what a batch of 1 does, and a row's result does not depend on the others.
//
// The warps of a block take the groups of its R tiles in turn, each with SLOTS groups on their way in registers. Sums are of
// integers times halves, in fp32; a group's scale is applied to its sum. Partial sums of the warps meet in shared memory.
#pragma once
#include "ve_epilogue.cuh"
#include "ve_pack.cuh"
#include "ve_reduce.cuh"

constexpr int VE_GEMV_WARPS = 8;
constexpr int VE_GEMV_BATCH = 8;

// RMSNorm of x on the way: gamma times x is rounded to a half, as a norm by itself rounds its result; 1 / rms, the same for a
// row of the batch, is applied to the sum. gamma comes divided by a power of two, `scale`, which leaves nothing above 1: x
// can then not overflow.
struct VeRms {
  const __half* gamma;  // [k]
  float eps, scale;
};

// Eight halves of row m, or zeros where there is no such row or input.
__device__ __forceinline__ uint4 ve_load_x(const __half* x, int m, int batch, int first, int k) {
  if (m >= batch || first >= k) return uint4{0, 0, 0, 0};
  return __ldg(reinterpret_cast<const uint4*>(x + (size_t)m * k + first));
}

// Multiplies eight halves by gamma, and adds their squares to `squares`.
__device__ __forceinline__ uint4 ve_fold_gamma(const uint4& v, const __half* gamma, float& squares) {
  const uint4 by = __ldg(reinterpret_cast<const uint4*>(gamma));
  const unsigned x[4] = {v.x, v.y, v.z, v.w}, factor[4] = {by.x, by.y, by.z, by.w};
  unsigned result[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 f = __half22float2(ve_bits<__half2>(x[i]));
    squares += f.x * f.x + f.y * f.y;
    result[i] = ve_bits<unsigned>(__hmul2(ve_bits<__half2>(x[i]), ve_bits<__half2>(factor[i])));
  }
  return uint4{result[0], result[1], result[2], result[3]};
}

template <int R, int SLOTS, bool RMS, class Weight, class Y>
__device__ __forceinline__ void ve_gemv(const Weight& weight, const __half* x, const VeRms& rms, const VeEpilogue<Y>& epilogue,
                                        int k, int batch) {
  constexpr int WARPS = VE_GEMV_WARPS, BATCH = VE_GEMV_BATCH;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4, first_tile = blockIdx.x * R;
  typename Weight::Group ring[SLOTS][R];
  float sums[R][4] = {}, squares = 0.f;

#pragma unroll
  for (int slot = 0; slot < SLOTS; ++slot)
#pragma unroll
    for (int r = 0; r < R; ++r)
      if (warp + slot * WARPS < weight.groups) ring[slot][r] = weight.fetch(first_tile + r, warp + slot * WARPS, lane);

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
          uint4 v = ve_load_x(x, g, batch, at, k);
          if (RMS && at < k) v = ve_fold_gamma(v, rms.gamma + at, squares);
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

  VE_SHARED(float, partial, WARPS * R * VE_TILE * BATCH);  // [warp][tile][row][m]
  VE_SHARED(float, partial_squares, WARPS * BATCH);
#pragma unroll
  for (int r = 0; r < R; ++r)
#pragma unroll
    for (int e = 0; e < 4; ++e)
      partial[((warp * R + r) * VE_TILE + g + e / 2 * 8) * BATCH + 2 * t + e % 2] = sums[r][e];
  if (RMS) {  // the four lanes of a g saw inputs of their own of row g
    squares = ve_lane_sum<4>(squares);
    if (t == 0) partial_squares[warp * BATCH + g] = squares;
  }
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
      for (int w = 0; w < WARPS; ++w) sum += partial_squares[w * BATCH + m];
      factor = rms.scale * rsqrtf(sum / (float)k + rms.eps);
    }
    epilogue.finish(first_tile + r, row, m, a * factor, b * factor);
  }
}
