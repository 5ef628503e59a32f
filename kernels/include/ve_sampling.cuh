// What choosing a token means, apart from how a block goes about it: keys, masses, the generator, and what follows.
// All of it is integers, or floats that are rounded after every operation: a CPU and any GPU agree in every bit.
#pragma once
#include "ve_ptx.cuh"

using ve_u64 = unsigned long long;

constexpr int VE_STOPS = 8;
constexpr unsigned VE_RING = 64;
constexpr int VE_REFUSED = -1;   // logits that are not finite, or a mask that allows nothing
constexpr int VE_INACTIVE = -2;  // no token: the sequence had ended before

// Of one sequence: SETTINGS of vila_edge/kernels/sampling.py.
struct VeSettings {
  float rate;  // octaves that a logit's distance of 1 to the largest is worth: log2(e) / temperature. 0: greedy
  int top_k;   // 0: all
  int masked, limit;
  ve_u64 seed, top_p;  // top_p in units of 2^-64; 0: all
  int stops[VE_STOPS];
};

// Larger for a larger logit, the same for both zeros. No finite logit has the key 0, or that of one that is not.
constexpr unsigned VE_NOT_FINITE = ~0u;
__device__ __forceinline__ unsigned ve_logit_key(float logit) {
  unsigned bits = ve_bits<unsigned>(logit);
  if ((bits & 0x7f800000u) == 0x7f800000u) return VE_NOT_FINITE;
  if (bits == 0x80000000u) bits = 0;
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float ve_logit_of(unsigned key) {
  return ve_bits<float>(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

__device__ __forceinline__ bool ve_allowed(const unsigned* mask, int token) {
  return !mask || mask[token / 32] >> (token % 32) & 1;
}

// The weight 2^-octaves of a token in units of 2^-44: that of the likeliest is 2^44, and 2^18 of those fit a sum.
constexpr int VE_OCTAVES = 44;  // from here on a weight is 0
__device__ __forceinline__ ve_u64 ve_mass(float octaves) {
  const int whole = (int)octaves;
  const float part = __fsub_rn(octaves, (float)whole);
  const float c[] = {1.f,           -0.693147063f,   0.240224361f,  -0.0554907583f,
                     0.00957917888f, -0.00127474801f, 0.00010902313f};  // 2^-part to 2e-7 of it
  float r = c[6];
#pragma unroll
  for (int i = 5; i >= 0; --i) r = __fadd_rn(__fmul_rn(r, part), c[i]);
  return (ve_u64)(unsigned)__fmul_rn(r, 1073741824.f) << (VE_OCTAVES - 30) >> whole;
}

// Two of the four words that Philox4x32-10 makes of a key and a counter (Salmon et al., SC 2011).
__device__ __forceinline__ ve_u64 ve_philox(ve_u64 key, unsigned counter) {
  unsigned a = counter, b = 0, c = 0, d = 0, key_low = (unsigned)key, key_high = (unsigned)(key >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const ve_u64 p = (ve_u64)0xD2511F53u * a, q = (ve_u64)0xCD9E8D57u * c;
    a = (unsigned)(q >> 32) ^ b ^ key_low, b = (unsigned)q;
    c = (unsigned)(p >> 32) ^ d ^ key_high, d = (unsigned)p;
    key_low += 0x9E3779B9u, key_high += 0xBB67AE85u;
  }
  return (ve_u64)b << 32 | a;
}

// The state of a batch, and what becomes of it. Each sequence has its own numbers: blocks do not meet.
struct VeState {
  int *ids, *positions, *step;
  long long* ring;  // [VE_RING, batch]

  // One thread says which token sequence `b` of `batch` got. A sequence that ends has the position -1 from then on.
  __device__ __forceinline__ void advance(int token, const VeSettings& settings, int b, int batch) const {
    const int position = positions[b];
    if (position < 0) {
      token = VE_INACTIVE;
    } else {
      bool ends = token < 0 || position + 1 >= settings.limit;
#pragma unroll
      for (int i = 0; i < VE_STOPS; ++i) ends |= token == settings.stops[i];
      ids[b] = token;
      positions[b] = ends ? -1 : position + 1;
    }
    const unsigned now = (unsigned)step[b];
    step[b] = (int)(now + 1);
    ring[(size_t)(now % VE_RING) * batch + b] = (long long)((ve_u64)(now + 1) << 32 | (unsigned)token);
  }
};
