// Decode: 4-bit weights times a batch of 1 to 8. See include/ve_gemv.cuh; the number after r is tiles per block.
#include "ve_gemv.cuh"

#define VE_GEMV_W4A16(name, R, SLOTS, BLOCKS)                                                                        \
  extern "C" __global__ void __launch_bounds__(VE_GEMV_WARPS * 32, BLOCKS)                                           \
      name(const uint4* qweight, const __half2* scales, const uchar2* qzeros, const __half* x, const float* bias,    \
           const __half* residual, const float* cosines, const float* sines, const int* positions, __half* y, int n, \
           int k, int m, int swiglu, int head_dim, int rotated_tiles) {                                              \
    const VeWeight4 weight{qweight, scales, qzeros, k / VE_GROUP};                                                   \
    const VeEpilogue<__half> epilogue{                                                                               \
        bias, residual, cosines, sines, positions, y, n, swiglu, head_dim, rotated_tiles};                           \
    ve_gemv<R, SLOTS, false>(weight, x, VeRms{}, epilogue, k, m);                                                    \
  }                                                                                                                  \
  VE_EXPORT(name)
VE_GEMV_W4A16(ve_gemv_w4a16_r1, 1, 3, 3)
VE_GEMV_W4A16(ve_gemv_w4a16_r2, 2, 2, 2)

#define VE_GEMV_W4A16_RMS(name, R, SLOTS, BLOCKS)                                                                  \
  extern "C" __global__ void __launch_bounds__(VE_GEMV_WARPS * 32, BLOCKS) name(                                   \
      const uint4* qweight, const __half2* scales, const uchar2* qzeros, const __half* x, const __half* gamma,     \
      const float* bias, const __half* residual, const float* cosines, const float* sines, const int* positions,   \
      __half* y, int n, int k, int m, int swiglu, int head_dim, int rotated_tiles, float eps, float gamma_scale) { \
    const VeWeight4 weight{qweight, scales, qzeros, k / VE_GROUP};                                                 \
    const VeEpilogue<__half> epilogue{                                                                             \
        bias, residual, cosines, sines, positions, y, n, swiglu, head_dim, rotated_tiles};                         \
    ve_gemv<R, SLOTS, true>(weight, x, VeRms{gamma, eps, gamma_scale}, epilogue, k, m);                            \
  }                                                                                                                \
  VE_EXPORT(name)
VE_GEMV_W4A16_RMS(ve_gemv_w4a16_rms_r1, 1, 3, 3)
VE_GEMV_W4A16_RMS(ve_gemv_w4a16_rms_r2, 2, 2, 2)
