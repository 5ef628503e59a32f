// Sums over lanes and threads, in an order that does not depend on timing: the same input gives the same bits.
#pragma once
#include "ve_ptx.cuh"

// The sum over aligned groups of LANES lanes, in every one of them.
template <int LANES = 32>
__device__ __forceinline__ float ve_lane_sum(float v) {
#pragma unroll
  for (int lanes = LANES / 2; lanes; lanes /= 2) v += __shfl_xor_sync(0xffffffffu, v, lanes);
  return v;
}

// The sum over a block of THREADS threads, in every one of them. `shared` holds THREADS / 32 floats, for this sum
// alone: whoever uses it twice puts a barrier between.
template <int THREADS>
__device__ __forceinline__ float ve_block_sum(float v, float* shared) {
  v = ve_lane_sum(v);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = v;
  __syncthreads();
  float sum = 0.f;
#pragma unroll
  for (int warp = 0; warp < THREADS / 32; ++warp) sum += shared[warp];
  return sum;
}
