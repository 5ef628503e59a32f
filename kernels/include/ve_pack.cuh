// Packed weights, and how a lane takes them apart. vila_edge/kernels/w4_layout.py and w8_layout.py write this layout.
//
// A tile is 16 rows of the weight: the A operand of mma.m16n8k16. A chunk is 64 inputs, four steps of an mma; a group,
// two chunks, has a scale (and in 4 bits a zero point) for each row. Lane (g, t) = (lane / 4, lane % 4) holds rows g
// and g + 8, and in step j inputs k0..k3 = 32 (j / 2) + 8 t + 4 (j % 2) + {0, 1, 2, 3} of the chunk. So the lane wants
// x as two runs of eight halves, and the four lanes of a g read 64 bytes of x side by side.
#pragma once
#include "ve_ptx.cuh"

constexpr int VE_TILE = 16;    // rows
constexpr int VE_CHUNK = 64;   // inputs
constexpr int VE_GROUP = 128;  // inputs

// Where 16-byte unit 0..7 of a row of 128 bytes lies in shared memory. Eight lanes read units 4 run + {0..3} of rows r
// and r + 1 at once, r even: the last bit of the row parts the two in different halves of the banks. A copy writes
// whole rows.
__device__ __forceinline__ int ve_swizzle(int row, int unit) { return unit ^ ((row & 1) << 2 | (row >> 1 & 3)); }

// The B operand of a chunk's four steps: what a lane wants of one row of x, in two runs of eight halves.
struct VeInputs {
  unsigned words[8];
  __device__ __forceinline__ void set(int run, const uint4& v) {
    words[4 * run] = v.x, words[4 * run + 1] = v.y, words[4 * run + 2] = v.z, words[4 * run + 3] = v.w;
  }
};

// q - zero of rows g and g + 8, from a word of a step:
//   bits 0, 16: (g, k0), (g, k1)   4, 20: (g+8, k0), (g+8, k1)   8, 24: (g, k2), (g, k3)   12, 28: (g+8, k2), (g+8, k3)
// 0x6400 is 1024 as a half, whose last bits count ones: q or-ed into them is 1024 + q, 16 q is 1024 + 16 q. All exact.
struct VeZeros4 {
  __half2 low, high;  // 1024 + zero of row g; -(64 + zero) of row g + 8, where the last bits count sixteenths
  __device__ __forceinline__ explicit VeZeros4(uchar2 zeros)
      : low(ve_bits<__half2>(0x64006400u + zeros.x * 0x00010001u)),
        high(ve_bits<__half2>(0xd400d400u + zeros.y * 0x00100010u)) {}
};
__device__ __forceinline__ void ve_unpack4(unsigned (&a)[4], unsigned word, const VeZeros4& zeros) {
  const __half2 sixteenth = __float2half2_rn(0.0625f);
#pragma unroll
  for (int pair = 0; pair < 2; ++pair) {
    const unsigned q = word >> (8 * pair);
    const __half2 low = ve_bits<__half2>(ve_lop3_and_or(q, 0x000f000fu, 0x64006400u));
    const __half2 high = ve_bits<__half2>(ve_lop3_and_or(q, 0x00f000f0u, 0x64006400u));
    a[2 * pair] = ve_bits<unsigned>(__hsub2(low, zeros.low));
    a[2 * pair + 1] = ve_bits<unsigned>(__hfma2(high, sixteenth, zeros.high));
  }
}

// q - 128 of rows g and g + 8, from the two words of a step; bytes 0, 1: (g, k), (g, k+1)   2, 3: (g+8, k), (g+8, k+1).
__device__ __forceinline__ void ve_unpack8(unsigned (&a)[4], const unsigned (&words)[2]) {
  const __half2 middle = __float2half2_rn(1024.f + 128.f);
#pragma unroll
  for (int pair = 0; pair < 2; ++pair)
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const unsigned q = __byte_perm(words[pair], 0x64646464u, row ? 0x4342 : 0x4140);
      a[2 * pair + row] = ve_bits<unsigned>(__hsub2(ve_bits<__half2>(q), middle));
    }
}

// A weight of 4 bits in memory: qweight [tiles, chunks, 32 lanes, 4 steps] u32, scales and zeros [tiles, groups, 8, 2].
struct VeWeight4 {
  static constexpr bool FILLED_UP = false;  // x has a value for every input of every group
  const uint4* qweight;
  const __half2* scales;
  const uchar2* zeros;
  int groups;

  struct Group {  // what a lane holds of a group of one tile
    uint4 q[2];
    __half2 scale;
    uchar2 zero;
    __device__ __forceinline__ void unpack(unsigned (&a)[4], int chunk, int step) const {
      const unsigned words[4] = {q[chunk].x, q[chunk].y, q[chunk].z, q[chunk].w};
      ve_unpack4(a, words[step], VeZeros4(zero));
    }
  };
  __device__ __forceinline__ Group fetch(int tile, int group, int lane) const {
    const size_t at = (size_t)tile * groups + group;
    Group result;
    result.q[0] = ve_ld_stream(qweight + at * 64 + lane);
    result.q[1] = ve_ld_stream(qweight + at * 64 + 32 + lane);
    result.scale = __ldg(scales + at * 8 + lane / 4);
    result.zero = __ldg(zeros + at * 8 + lane / 4);
    return result;
  }
};

// A weight of 8 bits in memory: qweight [tiles, chunks, 2 halves of the steps, 32 lanes, 4] u32, scales as above.
struct VeWeight8 {
  static constexpr bool FILLED_UP = true;  // the last group may have inputs that x has not
  const uint4* qweight;
  const __half2* scales;
  int groups;

  struct Group {
    uint4 q[4];
    __half2 scale;
    __device__ __forceinline__ void unpack(unsigned (&a)[4], int chunk, int step) const {
      const uint4& v = q[2 * chunk + step / 2];
      const unsigned words[2] = {step % 2 ? v.z : v.x, step % 2 ? v.w : v.y};
      ve_unpack8(a, words);
    }
  };
  __device__ __forceinline__ Group fetch(int tile, int group, int lane) const {
    const size_t at = (size_t)tile * groups + group;
    Group result;
#pragma unroll
    for (int i = 0; i < 4; ++i) result.q[i] = ve_ld_stream(qweight + at * 128 + i * 32 + lane);
    result.scale = __ldg(scales + at * 8 + lane / 4);
    return result;
  }
};
