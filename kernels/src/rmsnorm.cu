// y = x / rms(x) * weight, one block a row. A residual, if there is one, becomes residual + x, rounded, and is normed.
#include "ve_reduce.cuh"

namespace {
constexpr int THREADS = 256;
constexpr int VECTORS = 4;  // of eight halves, that a thread holds: rows of up to 8192

template <bool RESIDUAL>
__device__ __forceinline__ void rmsnorm(const __half* x, const __half* weight, __half* residual, __half* y, int width,
                                        float eps) {
  VE_SHARED(float, partial, THREADS / 32);
  const size_t row = (size_t)blockIdx.x * width;
  __half2 held[VECTORS][4];
  float squares = 0.f;
#pragma unroll
  for (int i = 0; i < VECTORS; ++i) {
    const int column = (i * THREADS + threadIdx.x) * 8;
    if (column >= width) break;
    const uint4 in = *reinterpret_cast<const uint4*>(x + row + column);
    const unsigned words[4] = {in.x, in.y, in.z, in.w};
#pragma unroll
    for (int e = 0; e < 4; ++e) held[i][e] = ve_bits<__half2>(words[e]);
    if (RESIDUAL) {
      uint4* const place = reinterpret_cast<uint4*>(residual + row + column);
      const unsigned old[4] = {place->x, place->y, place->z, place->w};
#pragma unroll
      for (int e = 0; e < 4; ++e) held[i][e] = __hadd2(ve_bits<__half2>(old[e]), held[i][e]);
      *place = uint4{ve_bits<unsigned>(held[i][0]), ve_bits<unsigned>(held[i][1]), ve_bits<unsigned>(held[i][2]),
                     ve_bits<unsigned>(held[i][3])};
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float2 v = __half22float2(held[i][e]);
      squares += v.x * v.x + v.y * v.y;
    }
  }
  const float scale = rsqrtf(ve_block_sum<THREADS>(squares, partial) / width + eps);
#pragma unroll
  for (int i = 0; i < VECTORS; ++i) {
    const int column = (i * THREADS + threadIdx.x) * 8;
    if (column >= width) break;
    const uint4 gamma = __ldg(reinterpret_cast<const uint4*>(weight + column));
    const unsigned words[4] = {gamma.x, gamma.y, gamma.z, gamma.w};
    unsigned out[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float2 v = __half22float2(held[i][e]), g = __half22float2(ve_bits<__half2>(words[e]));
      out[e] = ve_bits<unsigned>(__floats2half2_rn(v.x * scale * g.x, v.y * scale * g.y));
    }
    *reinterpret_cast<uint4*>(y + row + column) = uint4{out[0], out[1], out[2], out[3]};
  }
}
}  // namespace

extern "C" __global__ void __launch_bounds__(THREADS)
    ve_rmsnorm_f16(const __half* x, const __half* weight, __half* y, int width, float eps) {
  rmsnorm<false>(x, weight, nullptr, y, width, eps);
}
VE_EXPORT(ve_rmsnorm_f16)

extern "C" __global__ void __launch_bounds__(THREADS)
    ve_rmsnorm_f16_residual(const __half* x, const __half* weight, __half* residual, __half* y, int width, float eps) {
  rmsnorm<true>(x, weight, residual, y, width, eps);
}
VE_EXPORT(ve_rmsnorm_f16_residual)
