// What the memory of this GPU gives: reading alone, and copying. Other kernels are measured against these.
#include "ve_ptx.cuh"

namespace {
constexpr int THREADS = 256;
constexpr int IN_FLIGHT = 8;  // vectors of 16 bytes that a thread has asked for at once

// Hands every vector, once, to `use(value, index)`. Over the whole grid, the vectors of one request are neighbours.
template <class Use>
__device__ __forceinline__ void stream(const uint4* from, long long vectors, Use use) {
  const long long step = (long long)gridDim.x * THREADS;
  long long at = (long long)blockIdx.x * THREADS + threadIdx.x;
  for (; at + (IN_FLIGHT - 1) * step < vectors; at += IN_FLIGHT * step) {
    uint4 held[IN_FLIGHT];
#pragma unroll
    for (int i = 0; i < IN_FLIGHT; ++i) held[i] = ve_ld_stream(from + at + i * step);
#pragma unroll
    for (int i = 0; i < IN_FLIGHT; ++i) use(held[i], at + i * step);
  }
  for (; at < vectors; at += step) use(ve_ld_stream(from + at), at);
}
}  // namespace

// sums [blocks]: of the 32-bit words that a block read, modulo 2^32, so that no read can be left out.
extern "C" __global__ void __launch_bounds__(THREADS)
    ve_stream_read(const uint4* from, unsigned* sums, long long vectors) {
  VE_SHARED(unsigned, partial, THREADS / 32);
  unsigned sum = 0;
  stream(from, vectors, [&](const uint4& v, long long) { sum += v.x + v.y + v.z + v.w; });
#pragma unroll
  for (int lanes = 16; lanes; lanes /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x) return;
  sum = 0;
  for (int warp = 0; warp < THREADS / 32; ++warp) sum += partial[warp];
  sums[blockIdx.x] = sum;
}
VE_EXPORT(ve_stream_read)

extern "C" __global__ void __launch_bounds__(THREADS) ve_stream_copy(const uint4* from, uint4* to, long long vectors) {
  stream(from, vectors, [&](const uint4& v, long long at) { to[at] = v; });
}
VE_EXPORT(ve_stream_copy)
