// Prefill: rows of one sequence attend over its kv_cache, which holds them already. See include/ve_attention.cuh.
//
// The queries that share a key_value head are packed: row r of a block's tile is query r % group of token r / group, so
// one read of the cache serves the whole group, whatever its size. A warp has 16 rows, as the A operand, and their
// queries stay in registers. 64 positions at a time pass through shared memory, the next ones while these are used.
#include "ve_attention.cuh"

namespace {
constexpr int WARPS = 4, THREADS = WARPS * 32;
constexpr int ROWS = WARPS * 16;
constexpr int POSITIONS = 64;  // of a stage
constexpr int N8 = POSITIONS / 8, N16 = POSITIONS / 16;

template <class T, int DIM>
struct Prefill {
  using Tile = VeTile<T, DIM>;
  static constexpr int SIDE = POSITIONS * Tile::UNITS;  // units of keys, or of values, of a stage

  const VeHead<T> head;
  const int end;  // positions of the cache that somebody here sees

  // What lies beyond becomes zeros: a weight of 0 times whatever is there might be NaN.
  __device__ __forceinline__ void load(uint4* stage, int first) const {
    constexpr int at_once = THREADS / Tile::UNITS;  // rows: places repeat after 8
    const int row = threadIdx.x / Tile::UNITS, unit = threadIdx.x % Tile::UNITS;
    if (at_once > POSITIONS && row >= POSITIONS) return;
    const size_t from = (size_t)(first + row) * DIM + unit * Tile::UNIT;
    uint4* const to = stage + Tile::place(row, unit);
#pragma unroll
    for (int i = 0; i < POSITIONS; i += at_once) {
      ve_cp_async16(to + i * Tile::UNITS, head.keys + from + i * DIM, first + row + i < end);
      ve_cp_async16(to + SIDE + i * Tile::UNITS, head.values + from + i * DIM, first + row + i < end);
    }
  }

  // Rows g and g + 8 of the warp: their queries, the last positions that they see, and where their results go.
  __device__ __forceinline__ void run(const __half* const (&queries)[2], const int (&last)[2], __half* const (&out)[2],
                                      int warp_first, float scale) const {
    VE_DYN_SMEM(memory);
    uint4* const stages = reinterpret_cast<uint4*>(memory);
    const int t = threadIdx.x % 4;
    load(stages, 0);
    ve_cp_commit();
    VeQuery<T, DIM> query[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) query[i].load(queries[i], head.key_scales);

    float sums[2 * Tile::STEPS][4] = {}, total[2] = {}, top[2] = {ve_minus_infinity(), ve_minus_infinity()};
    for (int first = 0, stage = 0; first < end; first += POSITIONS, stage ^= 1) {
      const uint4* const keys = stages + stage * 2 * SIDE;
      ve_cp_wait<0>();
      __syncthreads();  // the stage is there for all, and nobody reads the one before it any more
      if (first + POSITIONS < end) load(stages + (stage ^ 1) * 2 * SIDE, first + POSITIONS);
      ve_cp_commit();

      float scores[N8][4] = {};
#pragma unroll
      for (int step = 0; step < Tile::STEPS; step += Tile::AT_ONCE)
#pragma unroll
        for (int n = 0; n < N16; ++n) {
          unsigned b[Tile::AT_ONCE][4];
          Tile::template keys<true>(b, keys, n * 16, step);
#pragma unroll
          for (int next = 0; next < Tile::AT_ONCE; ++next)
#pragma unroll
            for (int part = 0; part < Tile::PARTS; ++part) {
              const unsigned(&q)[2] = query[0].words[step + next][part], (&r)[2] = query[1].words[step + next][part];
              const unsigned a[4] = {q[0], r[0], q[1], r[1]};
              ve_mma16816(scores[2 * n], a, b[next][0], b[next][1]);
              ve_mma16816(scores[2 * n + 1], a, b[next][2], b[next][3]);
            }
        }
      if (first + POSITIONS - 1 > warp_first) {  // some rows of the warp do not see all of them
#pragma unroll
        for (int n = 0; n < N8; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e)
            if (first + n * 8 + 2 * t + e % 2 > last[e / 2]) scores[n][e] = ve_minus_infinity();
      }
      float factor[2] = {top[0], top[1]};
#pragma unroll
      for (int n = 0; n < N8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) top[e / 2] = fmaxf(top[e / 2], scores[n][e]);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        top[i] = fmaxf(top[i], __shfl_xor_sync(0xffffffffu, top[i], 1));
        top[i] = fmaxf(top[i], __shfl_xor_sync(0xffffffffu, top[i], 2));
        factor[i] = ve_exp2((factor[i] - top[i]) * scale);
        total[i] *= factor[i];
      }
      if (__ballot_sync(0xffffffffu, factor[0] != 1.f || factor[1] != 1.f)) {  // seldom, after the first positions
#pragma unroll
        for (int n = 0; n < 2 * Tile::STEPS; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e) sums[n][e] *= factor[e / 2];
      }
#pragma unroll
      for (int n = 0; n < N16; ++n) {
        unsigned a[4];  // (g, first eight positions), (g + 8, first eight), (g, last eight), (g + 8, last eight)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* pair = scores[2 * n + i / 2] + i % 2 * 2;
          float2 weights;
          a[i] = ve_weights(pair[0], pair[1], scale, scale * top[i % 2], scale * top[i % 2], weights);
          total[i % 2] += weights.x + weights.y;
        }
#pragma unroll
        for (int step = 0; step < Tile::STEPS; step += Tile::AT_ONCE) {
          unsigned b[Tile::AT_ONCE][4];
          Tile::template values<true>(b, keys + SIDE, n * 16, step);
#pragma unroll
          for (int next = 0; next < Tile::AT_ONCE; ++next) {
            ve_mma16816(sums[2 * (step + next)], a, b[next][0], b[next][1]);
            ve_mma16816(sums[2 * (step + next) + 1], a, b[next][2], b[next][3]);
          }
        }
      }
    }
    ve_cp_wait<0>();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float sum = total[i] + __shfl_xor_sync(0xffffffffu, total[i], 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      if (out[i]) store(sums, i, out[i], sum > 0.f ? 1.f / sum : 0.f);
    }
  }

  // A lane has four numbers of each step: four that follow each other in 8 bits, twice two in 16.
  __device__ __forceinline__ void store(const float (&sums)[2 * Tile::STEPS][4], int row, __half* out,
                                        float factor) const {
    const int t = threadIdx.x % 4;
#pragma unroll
    for (int step = 0; step < Tile::STEPS; ++step) {
      const float *low = sums[2 * step] + 2 * row, *high = sums[2 * step + 1] + 2 * row;
      if (Tile::BYTES) {
        const int number = Tile::number(step, 2 * t);
        const float4 scale = *reinterpret_cast<const float4*>(head.value_scales + number);
        const __half2 first = __floats2half2_rn(low[0] * factor * scale.x, high[0] * factor * scale.y);
        const __half2 second = __floats2half2_rn(low[1] * factor * scale.z, high[1] * factor * scale.w);
        *reinterpret_cast<uint2*>(out + number) = uint2{ve_bits<unsigned>(first), ve_bits<unsigned>(second)};
      } else {
        __half2* const to = reinterpret_cast<__half2*>(out + step * VE_STEP) + t;
        to[0] = __floats2half2_rn(low[0] * factor, low[1] * factor);
        to[4] = __floats2half2_rn(high[0] * factor, high[1] * factor);
      }
    }
  }
};

template <class T, int DIM>
__device__ __forceinline__ void prefill(const VeCaches& caches, const __half* qkv, const int* positions, __half* out,
                                        int query_heads, int rows, int sequence, float scale) {
  const int tile = gridDim.x - 1 - blockIdx.x;  // the last rows see most: they begin first
  const int head = blockIdx.y, group = query_heads / caches.heads, past = positions[0];
  const int lane = threadIdx.x % 32, warp_row = tile * ROWS + (int)threadIdx.x / 32 * 16, last_row = rows * group - 1;
  const __half* queries[2];
  __half* to[2];
  int last[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = warp_row + lane / 4 + 8 * i, token = min(row, last_row) / group;  // those beyond are not stored
    const size_t query = head * group + min(row, last_row) % group;
    queries[i] = qkv + ((size_t)token * (query_heads + 2 * caches.heads) + query) * DIM;
    to[i] = row <= last_row ? out + ((size_t)token * query_heads + query) * DIM : nullptr;
    last[i] = past + token;
  }
  const VeHead<T> cache(caches, sequence, head, DIM);
  const int seen = past + min((tile + 1) * ROWS - 1, last_row) / group + 1;
  const int end = past < 0 ? 0 : min(seen, cache.capacity);  // without a sequence all becomes zeros
  Prefill<T, DIM>{cache, end}.run(queries, last, to, past + min(warp_row, last_row) / group, scale);
}
}  // namespace

#define VE_ATTENTION_PREFILL(name, T, DIM, BLOCKS)                                                                   \
  extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)                                                      \
      name(const long long* layers_at, const int* capacities, const float* key_scales, const float* value_scales,    \
           const __half* qkv, const int* positions, __half* out, int layer, int layers, int query_heads, int heads,  \
           int rows, int sequence, float scale) {                                                                    \
    prefill<T, DIM>(VeCaches{layers_at, capacities, key_scales, value_scales, layer, layers, heads}, qkv, positions, \
                    out, query_heads, rows, sequence, scale);                                                        \
  }                                                                                                                  \
  VE_EXPORT(name)
VE_ATTENTION_PREFILL(ve_attention_prefill_f16_16, __half, 16, 2)
VE_ATTENTION_PREFILL(ve_attention_prefill_f16_32, __half, 32, 2)
VE_ATTENTION_PREFILL(ve_attention_prefill_f16_64, __half, 64, 2)
VE_ATTENTION_PREFILL(ve_attention_prefill_f16_128, __half, 128, 2)
VE_ATTENTION_PREFILL(ve_attention_prefill_i8_16, signed char, 16, 2)
VE_ATTENTION_PREFILL(ve_attention_prefill_i8_32, signed char, 32, 2)
VE_ATTENTION_PREFILL(ve_attention_prefill_i8_64, signed char, 64, 2)
VE_ATTENTION_PREFILL(ve_attention_prefill_i8_128, signed char, 128, 2)
