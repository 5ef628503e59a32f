// The lm_head: 8-bit weights times a batch of 1 to 8, logits in fp32. See include/ve_gemv.cuh.
//
// The last group of a row may be filled up: x has k inputs, a multiple of 8, and zeros take the place of the rest.
#include "ve_gemv.cuh"

#define VE_GEMV_W8A16(name, R, SLOTS, BLOCKS)                                                             \
  extern "C" __global__ void __launch_bounds__(VE_GEMV_WARPS * 32, BLOCKS)                                \
      name(const uint4* qweight, const __half2* scales, const __half* x, float* y, int n, int k, int m) { \
    const VeWeight8 weight{qweight, scales, (k + VE_GROUP - 1) / VE_GROUP};                               \
    const VeEpilogue<float> epilogue{nullptr, nullptr, nullptr, nullptr, nullptr, y, n, 0, VE_TILE, 0};   \
    ve_gemv<R, SLOTS, false>(weight, x, VeRms{}, epilogue, k, m);                                         \
  }                                                                                                       \
  VE_EXPORT(name)
VE_GEMV_W8A16(ve_gemv_w8a16_r1, 1, 2, 3)
VE_GEMV_W8A16(ve_gemv_w8a16_r2, 2, 2, 2)

#define VE_GEMV_W8A16_RMS(name, R, SLOTS, BLOCKS)                                                                     \
  extern "C" __global__ void __launch_bounds__(VE_GEMV_WARPS * 32, BLOCKS)                                            \
      name(const uint4* qweight, const __half2* scales, const __half* x, const __half* gamma, float* y, int n, int k, \
           int m, float eps, float gamma_scale) {                                                                     \
    const VeWeight8 weight{qweight, scales, (k + VE_GROUP - 1) / VE_GROUP};                                           \
    const VeEpilogue<float> epilogue{nullptr, nullptr, nullptr, nullptr, nullptr, y, n, 0, VE_TILE, 0};               \
    ve_gemv<R, SLOTS, true>(weight, x, VeRms{gamma, eps, gamma_scale}, epilogue, k, m);                               \
  }                                                                                                                   \
  VE_EXPORT(name)
VE_GEMV_W8A16_RMS(ve_gemv_w8a16_rms_r1, 1, 2, 3)
VE_GEMV_W8A16_RMS(ve_gemv_w8a16_rms_r2, 2, 2, 2)
