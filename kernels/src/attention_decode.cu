// Decode: one query row of each sequence of a batch attends over its kv_cache. See include/ve_attention.cuh.
//
// A block takes SPLIT positions of one key_value head for the whole group of queries that share it, so that a byte of
// the cache is read once. Keys are the A operand of the mma and the group is its eight columns. A warp takes every
// fourth 16 positions, and asks for all their keys and values at once: what a block holds is what it has in flight.
// The block of the row's own position takes that key and value from the row itself, and stores them in the cache.
#include "ve_attention.cuh"
#include "ve_reduce.cuh"

namespace {
constexpr int SPLIT = 128;  // positions of a block: fixed, so that a result does not depend on how many blocks there are
constexpr int WARPS = 4;
constexpr int TILES = SPLIT / VE_STEP / WARPS;  // of 16 positions, of a warp
constexpr int GROUP = 8;                        // queries of a head: columns of an mma

// How many positions a row attends over; 0 if it is no row of a sequence, or what the host must not ask for.
__device__ __forceinline__ int attended(int position, int capacity, int splits) {
  return position < 0 || position >= capacity || position / SPLIT >= splits ? 0 : position + 1;
}

// The results of splits, to be combined.
struct Partial {
  float* sums;     // [batch, query heads, splits, dim]: values, weighted by 2^(scale (score - top score))
  float2* totals;  // [batch, query heads, splits]: scale times the top score, and the sum of the weights

  __device__ __forceinline__ Partial(float* scratch, size_t rows, int dim)
      : sums(scratch), totals(reinterpret_cast<float2*>(scratch + rows * dim)) {}
};

template <class T, int DIM>
struct Decode {
  using Tile = VeTile<T, DIM>;
  static constexpr int TILE = VE_STEP * Tile::UNITS;  // units of 16 positions
  static constexpr int PITCH = DIM + 4;               // floats between queries of a warp's result
  static_assert(sizeof(float) * GROUP * PITCH <= sizeof(uint4) * 2 * TILES * TILE, "a result takes its tiles' place");

  const VeHead<T> head;
  const int length, first;  // positions: of the sequence, the first one of this split

  // Asks for the rows of 16 positions, but for the last one of the sequence. What lies beyond becomes zeros.
  __device__ __forceinline__ void load(uint4* tile, const T* rows, int start) const {
    constexpr int at_once = 32 / Tile::UNITS;  // rows
    const int lane = threadIdx.x % 32, row = lane / Tile::UNITS, unit = lane % Tile::UNITS;
    if (at_once > VE_STEP && row >= VE_STEP) return;
    const T* const from = rows + (size_t)(start + row) * DIM + unit * Tile::UNIT;
    if (start + VE_STEP < length) {
#pragma unroll
      for (int i = 0; i < VE_STEP; i += at_once)
        ve_cp_async16(tile + Tile::place(row + i, unit), from + i * DIM, true);
      return;
    }
#pragma unroll 1
    for (int i = 0; i < VE_STEP; i += at_once)
      if (start + row + i != length - 1)
        ve_cp_async16(tile + Tile::place(row + i, unit), from + i * DIM, start + row + i < length);
  }
  // Puts the last position's key and value into their tiles and into the cache.
  __device__ __forceinline__ void put(uint4* keys, uint4* values, const __half* key, const __half* value, int row) {
    const int lane = threadIdx.x % 32, number = lane % Tile::UNITS * Tile::UNIT;
    if (lane >= 2 * Tile::UNITS) return;
    const bool second = lane >= Tile::UNITS;
    const uint4 stored =
        ve_stored((second ? value : key) + number, (second ? head.value_scales : head.key_scales) + number, T());
    (second ? values : keys)[Tile::place(row, lane % Tile::UNITS)] = stored;
    *reinterpret_cast<uint4*>((second ? head.values : head.keys) + (size_t)(length - 1) * DIM + number) = stored;
  }

  // The row's queries, its key and its value of this head; results go to `out`, or to place `at` of `partial`.
  __device__ __forceinline__ void run(const __half* queries, const __half* key, const __half* value, __half* out,
                                      Partial partial, size_t at, int group, float scale) {
    VE_DYN_SMEM(memory);
    VE_SHARED(float, tops, WARPS* GROUP);
    VE_SHARED(float, totals, WARPS* GROUP);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    uint4* const keys = reinterpret_cast<uint4*>(memory) + warp * 2 * TILES * TILE;
    uint4* const values = keys + TILES * TILE;
    int start[TILES];
#pragma unroll
    for (int i = 0; i < TILES; ++i) {
      start[i] = first + (i * WARPS + warp) * VE_STEP;
      if (start[i] < length) load(keys + i * TILE, head.keys, start[i]);
    }
    ve_cp_commit();
#pragma unroll
    for (int i = 0; i < TILES; ++i) {
      if (start[i] >= length) break;
      load(values + i * TILE, head.values, start[i]);
      if (length - start[i] <= VE_STEP) put(keys + i * TILE, values + i * TILE, key, value, length - 1 - start[i]);
    }
    ve_cp_commit();
    VeQuery<T, DIM> query;
    query.load(g < group ? queries + g * DIM : nullptr, head.key_scales);

    ve_cp_wait<1>();
    __syncwarp();  // the keys of all lanes are there
    float scores[TILES][4] = {}, top[2] = {ve_minus_infinity(), ve_minus_infinity()};
#pragma unroll
    for (int i = 0; i < TILES; ++i) {
      if (start[i] >= length) continue;
#pragma unroll
      for (int step = 0; step < Tile::STEPS; step += Tile::AT_ONCE) {
        unsigned a[Tile::AT_ONCE][4];
        Tile::template keys<false>(a, keys + i * TILE, 0, step);
#pragma unroll
        for (int next = 0; next < Tile::AT_ONCE; ++next)
#pragma unroll
          for (int part = 0; part < Tile::PARTS; ++part) {
            const unsigned(&b)[2] = query.words[step + next][part];
            ve_mma16816(scores[i], a[next], b[0], b[1]);
          }
      }
    }
#pragma unroll
    for (int i = 0; i < TILES; ++i)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const bool seen = start[i] + g + e / 2 * 8 < length;
        if (!seen) scores[i][e] = ve_minus_infinity();
        top[e % 2] = fmaxf(top[e % 2], scores[i][e]);
      }
#pragma unroll
    for (int lanes = 4; lanes < 32; lanes *= 2)
#pragma unroll
      for (int e = 0; e < 2; ++e) top[e] = fmaxf(top[e], __shfl_xor_sync(0xffffffffu, top[e], lanes));
    if (g == 0) tops[warp * GROUP + 2 * t] = top[0], tops[warp * GROUP + 2 * t + 1] = top[1];
    __syncthreads();  // every warp's top is there: all of them weigh alike
#pragma unroll
    for (int w = 0; w < WARPS; ++w)
#pragma unroll
      for (int e = 0; e < 2; ++e) top[e] = fmaxf(top[e], tops[w * GROUP + 2 * t + e]);
    top[0] *= scale, top[1] *= scale;

    ve_cp_wait<0>();
    __syncwarp();  // the values of all lanes are there
    float sums[Tile::STEPS][4] = {}, total[2] = {};
#pragma unroll
    for (int i = 0; i < TILES; ++i) {
      if (start[i] >= length) continue;
      unsigned b[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float2 weights;
        b[half] = ve_transpose(
            ve_weights(scores[i][2 * half], scores[i][2 * half + 1], scale, top[0], top[1], weights));
        total[0] += weights.x, total[1] += weights.y;
      }
#pragma unroll
      for (int step = 0; step < Tile::STEPS; step += Tile::AT_ONCE) {
        unsigned a[Tile::AT_ONCE][4];
        Tile::template values<false>(a, values + i * TILE, 0, step);
#pragma unroll
        for (int next = 0; next < Tile::AT_ONCE; ++next) ve_mma16816(sums[step + next], a[next], b[0], b[1]);
      }
    }
#pragma unroll
    for (int lanes = 4; lanes < 32; lanes *= 2)
#pragma unroll
      for (int e = 0; e < 2; ++e) total[e] += __shfl_xor_sync(0xffffffffu, total[e], lanes);
    if (g == 0) totals[warp * GROUP + 2 * t] = total[0], totals[warp * GROUP + 2 * t + 1] = total[1];
    __syncwarp();  // nobody of the warp reads its tiles any more
    float* const result = reinterpret_cast<float*>(keys);
#pragma unroll
    for (int step = 0; step < Tile::STEPS; ++step)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        result[(2 * t + e % 2) * PITCH + Tile::number(step, g + e / 2 * 8)] = sums[step][e];
    __syncthreads();
    finish(reinterpret_cast<float*>(memory), tops, totals, out, partial, at, group, scale);
  }

  // Adds up what the warps have, and stores it: the result, or what is to be combined.
  __device__ __forceinline__ void finish(const float* results, const float* tops, const float* totals, __half* out,
                                         Partial partial, size_t at, int group, float scale) const {
    constexpr int next = 2 * TILES * TILE * (int)(sizeof(uint4) / sizeof(float));  // floats between warps' results
    for (int i = threadIdx.x; i < group * DIM / 2; i += WARPS * 32) {
      const int query = i / (DIM / 2), number = i % (DIM / 2) * 2;
      float2 sum{0.f, 0.f};
      float total = 0.f, top = tops[query];
#pragma unroll
      for (int w = 0; w < WARPS; ++w) {
        const float* from = results + w * next + query * PITCH + number;
        sum.x += from[0], sum.y += from[1];
        total += totals[w * GROUP + query], top = fmaxf(top, tops[w * GROUP + query]);
      }
      if (Tile::BYTES) sum.x *= head.value_scales[number], sum.y *= head.value_scales[number + 1];
      if (gridDim.x == 1) {
        *reinterpret_cast<__half2*>(out + query * DIM + number) = __floats2half2_rn(sum.x / total, sum.y / total);
        continue;
      }
      const size_t place = at + (size_t)query * gridDim.x;
      *reinterpret_cast<float2*>(partial.sums + place * DIM + number) = sum;
      if (number == 0) partial.totals[place] = float2{top * scale, total};
    }
  }
};

template <class T, int DIM>
__device__ __forceinline__ void decode(const VeCaches& caches, const __half* qkv, const int* positions, __half* out,
                                       float* scratch, int query_heads, float scale) {
  const int split = blockIdx.x, head = blockIdx.y, row = blockIdx.z, splits = gridDim.x;
  const int group = query_heads / caches.heads, query = row * query_heads + head * group;
  const int length = attended(positions[row], caches.capacities[row], splits);
  out += (size_t)query * DIM;
  if (split * SPLIT >= length) {
    if (length == 0 && splits == 1)
#pragma unroll 1
      for (int i = threadIdx.x; i < group * DIM; i += WARPS * 32) out[i] = __float2half_rn(0.f);
    return;
  }
  const __half* in = qkv + (size_t)row * (query_heads + 2 * caches.heads) * DIM;
  const __half* key = in + (size_t)(query_heads + head) * DIM;
  Decode<T, DIM>{VeHead<T>(caches, row, head, DIM), length, split * SPLIT}.run(
      in + (size_t)head * group * DIM, key, key + (size_t)caches.heads * DIM, out,
      Partial(scratch, (size_t)gridDim.z * query_heads * splits, DIM), (size_t)query * splits + split, group, scale);
}
}  // namespace

#define VE_ATTENTION_DECODE(name, T, DIM, BLOCKS)                                                                    \
  extern "C" __global__ void __launch_bounds__(WARPS * 32, BLOCKS)                                                   \
      name(const long long* layers_at, const int* capacities, const float* key_scales, const float* value_scales,    \
           const __half* qkv, const int* positions, __half* out, float* scratch, int layer, int layers,              \
           int query_heads, int heads, float scale) {                                                                \
    decode<T, DIM>(VeCaches{layers_at, capacities, key_scales, value_scales, layer, layers, heads}, qkv, positions,  \
                   out, scratch, query_heads, scale);                                                                \
  }                                                                                                                  \
  VE_EXPORT(name)
VE_ATTENTION_DECODE(ve_attention_decode_f16_16, __half, 16, 4)
VE_ATTENTION_DECODE(ve_attention_decode_f16_32, __half, 32, 4)
VE_ATTENTION_DECODE(ve_attention_decode_f16_64, __half, 64, 4)
VE_ATTENTION_DECODE(ve_attention_decode_f16_128, __half, 128, 2)
VE_ATTENTION_DECODE(ve_attention_decode_i8_16, signed char, 16, 4)
VE_ATTENTION_DECODE(ve_attention_decode_i8_32, signed char, 32, 4)
VE_ATTENTION_DECODE(ve_attention_decode_i8_64, signed char, 64, 4)
VE_ATTENTION_DECODE(ve_attention_decode_i8_128, signed char, 128, 4)

// out [batch, heads, dim]: the splits of each row, weighed alike and divided by the sum of their weights. A block takes
// a head, a thread two numbers; eight splits are asked for at once. One split in use gives the bits that its block would
// have stored: it is multiplied by 1.
extern "C" __global__ void __launch_bounds__(64)
    ve_attention_combine_f16(const int* positions, const int* capacities, const float* scratch, __half* out, int batch,
                             int heads, int splits, int dim) {
  constexpr int at_once = 8;
  const int row = blockIdx.x, lane = threadIdx.x % 32, number = threadIdx.x * 2;
  const Partial partial(const_cast<float*>(scratch), (size_t)batch * heads * splits, dim);
  const int length = attended(positions[row / heads], capacities[row / heads], splits);
  const int used = (length + SPLIT - 1) / SPLIT;
  const float2* totals = partial.totals + (size_t)row * splits;
  const float* sums = partial.sums + (size_t)row * splits * dim + number;
  float top = ve_minus_infinity(), total = 0.f;
  for (int split = lane; split < used; split += 32) top = fmaxf(top, totals[split].x);
#pragma unroll
  for (int lanes = 16; lanes; lanes /= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, lanes));
  float2 sum{0.f, 0.f};
  for (int first = 0; first < used; first += 32) {
    const float2 mine = first + lane < used ? totals[first + lane] : float2{top, 0.f};
    const float factor = first + lane < used ? ve_exp2(mine.x - top) : 0.f;
    total += factor * mine.y;
    for (int next = 0; next < 32 && first + next < used; next += at_once) {
      float2 v[at_once];
#pragma unroll
      for (int i = 0; i < at_once; ++i) {
        const int split = first + next + i;
        v[i] = split < used && number < dim ? *reinterpret_cast<const float2*>(sums + (size_t)split * dim)
                                            : float2{0.f, 0.f};
      }
#pragma unroll
      for (int i = 0; i < at_once; ++i) {
        const float f = __shfl_sync(0xffffffffu, factor, next + i);
        sum.x += f * v[i].x, sum.y += f * v[i].y;
      }
    }
  }
  total = ve_lane_sum(total);
  if (number < dim)
    *reinterpret_cast<__half2*>(out + (size_t)row * dim + number) =
        used ? __floats2half2_rn(sum.x / total, sum.y / total) : __float2half2_rn(0.f);
}
VE_EXPORT(ve_attention_combine_f16)
