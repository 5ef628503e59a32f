// The kv_cache of attention, in 16 bits (T = __half) or 8 (signed char), and how its tiles reach the tensor cores.
//
// A layer of a sequence is one piece of memory: keys [heads, capacity, DIM], then values of the same shape. Tables on
// the device name these pieces, so that a graph of launches serves any sequences. A number in 8 bits stands for itself
// times a scale of its layer, head and channel. Scales of keys are multiplied into the query, those of values into the
// result: the tensor cores see the integers, which are exact as halves.
#pragma once
#include "ve_ptx.cuh"

constexpr int VE_STEP = 16;  // positions, or numbers of a head, that an mma takes at once
__device__ __forceinline__ float ve_minus_infinity() { return __int_as_float((int)0xff800000u); }

// What every kernel is told of the caches.
struct VeCaches {
  const long long* layers_at;              // [batch, layers]: addresses
  const int* capacities;                   // [batch]
  const float *key_scales, *value_scales;  // [layers, heads, DIM], of 8 bits
  int layer, layers, heads;
};

// Keys and values of one head of a layer.
template <class T>
struct VeHead {
  T *keys, *values;  // [capacity, dim]
  const float *key_scales, *value_scales;
  int capacity;

  __device__ __forceinline__ VeHead(const VeCaches& caches, int sequence, int head, int dim)
      : key_scales(nullptr), value_scales(nullptr), capacity(caches.capacities[sequence]) {
    const size_t size = (size_t)capacity * dim, channel = ((size_t)caches.layer * caches.heads + head) * dim;
    keys = reinterpret_cast<T*>(caches.layers_at[(size_t)sequence * caches.layers + caches.layer]) + head * size;
    values = keys + caches.heads * size;
    if (sizeof(T) == 1) key_scales = caches.key_scales + channel, value_scales = caches.value_scales + channel;
  }
};

// Sixteen bytes of a row as the cache stores it. In 8 bits: clip(round_half_even(x / scale), -128, 127).
__device__ __forceinline__ uint4 ve_stored(const __half* x, const float*, __half) {
  return *reinterpret_cast<const uint4*>(x);
}
__device__ __forceinline__ uint4 ve_stored(const __half* x, const float* scales, signed char) {
  unsigned words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint2 four = *reinterpret_cast<const uint2*>(x + 4 * i);
    const float2 low = __half22float2(ve_bits<__half2>(four.x)), high = __half22float2(ve_bits<__half2>(four.y));
    const float v[4] = {low.x, low.y, high.x, high.y};
    words[i] = 0;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int q = __float2int_rn(fminf(fmaxf(v[e] / scales[4 * i + e], -128.f), 127.f));
      words[i] |= ((unsigned)q & 0xffu) << (8 * e);
    }
  }
  return uint4{words[0], words[1], words[2], words[3]};
}

// Two of the four signed bytes of a word as halves; SELECTOR names them, between bytes 4: 0x4B4A with A below B. With
// its sign flipped a byte counts from 0 to 255, and or-ed into 0x6400 it is that much more than 1024.
template <unsigned SELECTOR>
__device__ __forceinline__ unsigned ve_two_bytes(unsigned word) {
  const unsigned q = __byte_perm(word ^ 0x80808080u, 0x64646464u, SELECTOR);
  return ve_bits<unsigned>(__hsub2(ve_bits<__half2>(q), __float2half2_rn(1024.f + 128.f)));
}

// Rows of shared memory, one for each position, in units of 16 bytes.
//
// keys() gives [16 positions, 16 numbers], values() [16 numbers, 16 positions]: an A operand, or with B two B operands
// of the transposed product. An mma may take the numbers of a step in any order, and in 8 bits ldmatrix has one: lane t
// has numbers 4 t .. 4 t + 3 of a key, and rows g, g + 8 of a step of values are numbers 2 g, 2 g + 1. VeQuery and
// number() follow it.
template <class T, int DIM>
struct VeTile {
  static constexpr bool BYTES = sizeof(T) == 1;
  static constexpr int UNIT = 16 / sizeof(T), UNITS = DIM / UNIT;
  static constexpr int STEPS = DIM / VE_STEP;                 // of a row
  static constexpr int AT_ONCE = BYTES && STEPS > 1 ? 2 : 1;  // steps that one ldmatrix brings
  static constexpr int PARTS = BYTES ? 2 : 1;                 // halves that together are a number of a query

  // Where a unit lies. The eight rows that ldmatrix reads at once meet in no bank: rows that share 128 bytes lie in
  // them side by side, and of those that do not the unit's bits are flipped by the row's.
  static __device__ __forceinline__ int place(int row, int unit) {
    constexpr int line = UNITS < 8 ? 8 / UNITS : 1, flips = UNITS < 8 ? UNITS : 8;
    return row * UNITS + (unit ^ (row / line & (flips - 1)));
  }
  // The same of a row behind `first`, a multiple of 8, and of a step's first unit or the one behind it: a row of
  // units is a power of two, so that all of it but an exclusive or is known when the code is built.
  static __device__ __forceinline__ const uint4* at(const uint4* tile, int first, int step, int row, int further) {
    return tile + first * UNITS + (UNITS == 1 ? row : place(row, further) ^ (step * VE_STEP / UNIT));
  }

  // The register of half `outer` of 16 rows and half `inner` of what is summed over.
  template <bool B>
  static __device__ __forceinline__ int reg(int outer, int inner) {
    return B ? 2 * outer + inner : outer + 2 * inner;
  }
  template <bool B>
  static __device__ __forceinline__ void keys(unsigned (&a)[AT_ONCE][4], const uint4* tile, int first, int step) {
    const int lane = threadIdx.x % 32, outer = B ? lane / 16 : lane / 8 % 2, inner = B ? lane / 8 % 2 : lane / 16;
    unsigned words[4];
    ve_ldmatrix_x4(words, at(tile, first, step, lane % 8 + 8 * outer, inner));
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i)
#pragma unroll
      for (int o = 0; o < 2; ++o) {
        const unsigned two_steps = words[reg<B>(o, i)];
        a[i][reg<B>(o, 0)] = BYTES ? ve_two_bytes<0x4140>(two_steps) : words[reg<B>(o, 0)];
        a[i][reg<B>(o, 1)] = BYTES ? ve_two_bytes<0x4342>(two_steps) : words[reg<B>(o, 1)];
      }
  }
  template <bool B>
  static __device__ __forceinline__ void values(unsigned (&a)[AT_ONCE][4], const uint4* tile, int first, int step) {
    const int lane = threadIdx.x % 32, outer = B ? lane / 16 : lane / 8 % 2, inner = B ? lane / 8 % 2 : lane / 16;
    unsigned words[4];
    ve_ldmatrix_x4_trans(words, at(tile, first, step, lane % 8 + 8 * inner, outer));
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i)
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const unsigned two_steps = words[reg<B>(i, k)];
        a[i][reg<B>(0, k)] = BYTES ? ve_two_bytes<0x4240>(two_steps) : words[reg<B>(0, k)];
        a[i][reg<B>(1, k)] = BYTES ? ve_two_bytes<0x4341>(two_steps) : words[reg<B>(1, k)];
      }
  }
  // The number of a head that row 0..15 of a step of values is.
  static __device__ __forceinline__ int number(int step, int row) {
    return step * VE_STEP + (BYTES ? row % 8 * 2 + row / 8 : row);
  }
};

// One query as lane t of four wants it for each step: two words, which meet the two halves of a key. In 8 bits each
// number times its key's scale is a half, and a second one for what rounding took off.
template <class T, int DIM>
struct VeQuery {
  using Tile = VeTile<T, DIM>;
  unsigned words[Tile::STEPS][2][2];  // step, part, word: the second part is of 8 bits alone

  // Zeros if x is null.
  __device__ __forceinline__ void load(const __half* x, const float* scales) {
    const int t = threadIdx.x % 4;
#pragma unroll
    for (int step = 0; step < Tile::STEPS; ++step) {
      if (!Tile::BYTES) {
        const unsigned* from = reinterpret_cast<const unsigned*>(x + step * VE_STEP) + t;
        words[step][0][0] = x ? from[0] : 0u, words[step][0][1] = x ? from[4] : 0u;
        continue;
      }
      const int first = step * VE_STEP + 4 * t;
      const uint2 four = x ? *reinterpret_cast<const uint2*>(x + first) : uint2{0u, 0u};
      const float4 scale = *reinterpret_cast<const float4*>(scales + first);
      split(step, 0, four.x, scale.x, scale.y), split(step, 1, four.y, scale.z, scale.w);
    }
  }
  __device__ __forceinline__ void split(int step, int word, unsigned pair, float scale_x, float scale_y) {
    float2 v = __half22float2(ve_bits<__half2>(pair));
    v.x *= scale_x, v.y *= scale_y;
    const __half2 high = __floats2half2_rn(v.x, v.y);
    const float2 taken = __half22float2(high);
    words[step][0][word] = ve_bits<unsigned>(high);
    words[step][1][word] = ve_bits<unsigned>(__floats2half2_rn(v.x - taken.x, v.y - taken.y));
  }
};

// Weights 2^(scale a - top_a), 2^(scale b - top_b) as halves, and as the numbers that these are: what is summed up is
// what multiplies the values.
__device__ __forceinline__ unsigned ve_weights(float a, float b, float scale, float top_a, float top_b,
                                               float2& taken) {
  const __half2 pair = __floats2half2_rn(ve_exp2(fmaf(a, scale, -top_a)), ve_exp2(fmaf(b, scale, -top_b)));
  taken = __half22float2(pair);
  return ve_bits<unsigned>(pair);
}
