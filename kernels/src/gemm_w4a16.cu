// Prefill: y[m, n] = sum_k w[n, k] x[m, k] over the weight that decode reads, for any number of tokens m.
//
// A block computes 128 rows of the weight for TOKENS tokens; chunks of 64 inputs travel to shared memory in STAGES
// stages. The weights stay the A operand of the mma. As in the GEMV sums are of integers times halves in fp32, and the
// scale of a group is applied to its sum: nothing is rounded before the epilogue. That costs a second set of sums, and
// half the multiplications of scaling the weights.
#include "ve_epilogue.cuh"
#include "ve_pack.cuh"

template <int TOKENS, int WARP_TOKENS, int STAGES>
struct VeGemm {
  static constexpr int TILES = 8, WARP_TILES = 4;  // of 16 rows: of a block, of a warp
  static constexpr int THREADS = 32 * (TILES / WARP_TILES) * (TOKENS / WARP_TOKENS);
  static constexpr int N8 = WARP_TOKENS / 8;
  // Floats between tokens of the result: lanes t store to tokens 2 t, eight banks apart, and lanes g fill these.
  static constexpr int PITCH = TILES * VE_TILE + 4;
  struct Stage {
    uint4 q[TILES][32];
    __half2 scales[TILES][8];
    uchar2 zeros[TILES][8];
    uint4 x[TOKENS][8];  // units swizzled by ve_swizzle
  };
  static_assert(sizeof(float) * TOKENS * PITCH <= sizeof(Stage) * STAGES,
                "the result passes through the stages' memory");

  const uint4* qweight;
  const __half2* scales;
  const uchar2* zeros;
  const __half* x;
  int k, m, tiles, first_tile, first_token;

  // What is beyond the last row or token is not read: its copies write zeros.
  __device__ __forceinline__ void load(Stage& stage, int chunk) const {
    const int thread = threadIdx.x, groups = k / VE_GROUP;
    const uint4* q = qweight + ((size_t)(first_tile + thread / 32) * (2 * groups) + chunk) * 32 + thread % 32;
#pragma unroll
    for (int part = 0; part < TILES * 32 / THREADS; ++part, q += (size_t)(THREADS / 32) * groups * 64)
      ve_cp_async16(&stage.q[thread / 32 + part * (THREADS / 32)][thread % 32], q,
                    first_tile + thread / 32 + part * (THREADS / 32) < tiles);
    const int row = thread / 8, unit = ve_swizzle(row, thread % 8);  // the same THREADS / 8 rows further on
    const __half* from = x + (size_t)(first_token + row) * k + chunk * VE_CHUNK + thread % 8 * 8;
#pragma unroll
    for (int part = 0; part < TOKENS * 8 / THREADS; ++part, from += (size_t)(THREADS / 8) * k)
      ve_cp_async16(&stage.x[row + part * (THREADS / 8)][unit], from, first_token + row + part * (THREADS / 8) < m);
    if (thread < TILES * 3) {  // of a tile 32 bytes of scales, 16 of zeros
      const int tile = thread / 3, part = thread % 3;
      const bool there = first_tile + tile < tiles;
      const size_t at = ((size_t)(first_tile + tile) * groups + chunk / 2) * 8;
      const void* from = part < 2 ? (const void*)(scales + at + 4 * part) : zeros + at;
      ve_cp_async16(part < 2 ? (void*)&stage.scales[tile][4 * part] : &stage.zeros[tile][0], from, there);
    }
  }

  // Adds a chunk to the sums of its group.
  __device__ __forceinline__ void multiply(const Stage& stage, float (&sums)[WARP_TILES][N8][4], int tile,
                                           int token) const {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    uint4 q[WARP_TILES];
#pragma unroll
    for (int i = 0; i < WARP_TILES; ++i) q[i] = ve_ld_shared(&stage.q[tile + i][lane]);
#pragma unroll
    for (int run = 0; run < 2; ++run) {
      unsigned a[WARP_TILES][2][4];
#pragma unroll
      for (int i = 0; i < WARP_TILES; ++i) {
        const VeZeros4 zero(stage.zeros[tile + i][g]);
        ve_unpack4(a[i][0], run ? q[i].z : q[i].x, zero);
        ve_unpack4(a[i][1], run ? q[i].w : q[i].y, zero);
      }
#pragma unroll
      for (int n = 0; n < N8; ++n) {
        const uint4 b = ve_ld_shared(&stage.x[token + n * 8 + g][ve_swizzle(g, 4 * run + t)]);
#pragma unroll
        for (int i = 0; i < WARP_TILES; ++i) ve_mma16816(sums[i][n], a[i][0], b.x, b.y);
#pragma unroll
        for (int i = 0; i < WARP_TILES; ++i) ve_mma16816(sums[i][n], a[i][1], b.z, b.w);
      }
    }
  }

  __device__ __forceinline__ void run(const VeEpilogue<__half>& epilogue) const {
    VE_DYN_SMEM(memory);
    Stage* stages = reinterpret_cast<Stage*>(memory);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int tile = warp % 2 * WARP_TILES, token = warp / 2 * WARP_TOKENS, chunks = k / VE_CHUNK;
#pragma unroll
    for (int stage = 0; stage < STAGES - 1; ++stage) {
      if (stage < chunks) load(stages[stage], stage);
      ve_cp_commit();
    }
    float sums[WARP_TILES][N8][4] = {};
    for (int group = 0; group < chunks / 2; ++group) {
      float group_sums[WARP_TILES][N8][4] = {};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int chunk = 2 * group + half, next = chunk + STAGES - 1;
        ve_cp_wait<STAGES - 2>();
        __syncthreads();  // the chunk is there for all, and nobody reads the one before it any more
        if (next < chunks) load(stages[next % STAGES], next);
        ve_cp_commit();
        multiply(stages[chunk % STAGES], group_sums, tile, token);
      }
      const Stage& stage = stages[(2 * group + 1) % STAGES];
#pragma unroll
      for (int i = 0; i < WARP_TILES; ++i) {
        const float2 scale = __half22float2(stage.scales[tile + i][g]);
#pragma unroll
        for (int n = 0; n < N8; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e) sums[i][n][e] += (e / 2 ? scale.y : scale.x) * group_sums[i][n][e];
      }
    }
    ve_cp_wait<0>();
    __syncthreads();

    float* result = reinterpret_cast<float*>(memory);  // [token][row], to be stored in runs of eight columns
#pragma unroll
    for (int i = 0; i < WARP_TILES; ++i)
#pragma unroll
      for (int n = 0; n < N8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          result[(token + n * 8 + 2 * t + e % 2) * PITCH + (tile + i) * VE_TILE + g + e / 2 * 8] = sums[i][n][e];
    __syncthreads();
    for (int i = threadIdx.x; i < TOKENS * TILES * 8; i += THREADS) {
      const int row = i % 8, at_tile = i / 8 % TILES, at_token = i / (8 * TILES);
      const float* from = result + at_token * PITCH + at_tile * VE_TILE + row;
      if (first_token + at_token < m && first_tile + at_tile < tiles)
        epilogue.finish(first_tile + at_tile, row, first_token + at_token, from[0], from[8]);
    }
  }
};

#define VE_GEMM_W4A16(name, TOKENS, WARP_TOKENS, STAGES, BLOCKS)                                                     \
  extern "C" __global__ void __launch_bounds__((VeGemm<TOKENS, WARP_TOKENS, STAGES>::THREADS), BLOCKS)               \
      name(const uint4* qweight, const __half2* scales, const uchar2* qzeros, const __half* x, const float* bias,    \
           const __half* residual, const float* cosines, const float* sines, const int* positions, __half* y, int n, \
           int k, int m, int tiles, int swiglu, int head_dim, int rotated_tiles) {                                   \
    using Gemm = VeGemm<TOKENS, WARP_TOKENS, STAGES>;                                                                \
    const VeEpilogue<__half> epilogue{                                                                               \
        bias, residual, cosines, sines, positions, y, n, swiglu, head_dim, rotated_tiles};                           \
    const int first_tile = blockIdx.y * Gemm::TILES, first_token = blockIdx.x * TOKENS;                              \
    Gemm{qweight, scales, qzeros, x, k, m, tiles, first_tile, first_token}.run(epilogue);                            \
  }                                                                                                                  \
  VE_EXPORT(name)
VE_GEMM_W4A16(ve_gemm_w4a16_128x128, 128, 32, 4, 1)
VE_GEMM_W4A16(ve_gemm_w4a16_128x64, 64, 32, 4, 2)
VE_GEMM_W4A16(ve_gemm_w4a16_128x32, 32, 16, 4, 3)
