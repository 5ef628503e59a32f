// The next token of each sequence: its largest logit, or a draw among the likeliest. Then the step's state moves on.
//
// A draw walks through the tokens from the likeliest on, equal ones by index, until what lies behind it, tokens or
// their masses, exceeds a target. Three such walks are all there is: top_k asks for the mass of k tokens, top_p for the
// mass up to the token that reaches it, and the random number for a token. A walk needs no sorting. A histogram over
// the distance from the largest logit, made once, says which bin it ends in; a bin's tokens are then compared with each
// other. If they are too many they are told apart by 11 bits of (key, index) at a time, in further histograms.
#include "ve_sampling.cuh"

namespace {
constexpr int MAX_THREADS = 256, SLICE = 4096;   // of ve_sample_max_f32: logits of a block
constexpr int THREADS = 1024, WARPS = THREADS / 32;
constexpr int BITS = 11, BINS = 1 << BITS;
constexpr float BINS_PER_OCTAVE = 46.f;
static_assert(VE_OCTAVES * BINS_PER_OCTAVE <= BINS, "");
constexpr int INDEX_BITS = 18, ORDER_BITS = 32 + INDEX_BITS;
constexpr int IN_FLIGHT = 4;  // logits that a thread has asked for at once
constexpr int LIST = 512;  // tokens that are compared with each other

// The order of a walk, the first being the largest: by logit, then by index.
__device__ __forceinline__ ve_u64 order_of(unsigned key, int token) {
  return (ve_u64)key << INDEX_BITS | ((1u << INDEX_BITS) - 1 - token);
}
__device__ __forceinline__ int token_of(ve_u64 order) {
  return (1 << INDEX_BITS) - 1 - (int)(order & ((1u << INDEX_BITS) - 1));
}

__device__ __forceinline__ ve_u64 warp_max(ve_u64 v) {
#pragma unroll
  for (int lanes = 16; lanes; lanes /= 2) {
    const ve_u64 other = __shfl_xor_sync(0xffffffffu, v, lanes);
    v = other > v ? other : v;
  }
  return v;
}
// Of the slices of this block's sequence, in every lane. The key is 0 if no token is allowed.
__device__ __forceinline__ ve_u64 largest_of(const ve_u64* partials, int slices) {
  ve_u64 best = 0;
  for (int i = threadIdx.x % 32; i < slices; i += 32) {
    const ve_u64 other = partials[(size_t)blockIdx.x * slices + i];
    best = other > best ? other : best;
  }
  return warp_max(best);
}
__device__ __forceinline__ bool refused(ve_u64 best) {
  const unsigned key = (unsigned)(best >> INDEX_BITS);
  return key == 0 || key == VE_NOT_FINITE;
}

// Tokens and their mass, per bin. A sum of 64 bits is two of 32 and a carry: integers, so that no order matters.
struct Histogram {
  unsigned count[BINS], low[BINS], high[BINS];

  __device__ __forceinline__ void clear() {
    for (int i = threadIdx.x; i < BINS; i += THREADS) count[i] = low[i] = high[i] = 0;
  }
  __device__ __forceinline__ void add(int bin, ve_u64 mass) {
    atomicAdd(count + bin, 1u);
    const unsigned low_part = (unsigned)mass, before = atomicAdd(low + bin, low_part);
    const unsigned high_part = (unsigned)(mass >> 32) + (before > ~low_part);
    if (high_part) atomicAdd(high + bin, high_part);
  }
};

struct Sum {
  ve_u64 mass;
  unsigned count;

  __device__ __forceinline__ Sum operator+(const Sum& b) const { return {mass + b.mass, count + b.count}; }
};
struct Target {
  bool by_count;
  ve_u64 value;

  // Whether the walk ends in `part`, when it has come past `before`.
  __device__ __forceinline__ bool within(const Sum& before, const Sum& part) const {
    const ve_u64 from = by_count ? before.count : before.mass, size = by_count ? part.count : part.mass;
    return from <= value && value - from < size;
  }
};
struct Found {
  Sum before, part;
  int at;  // a bin, or a token
};
struct Shared {
  Sum warps[WARPS];
  Found bin, token;
  unsigned listed;
};
struct Listed {
  ve_u64 order, mass;
};
struct Memory {  // dynamic
  Histogram all, some;
  Listed list[LIST];
};

// A thread's two bins of a histogram, and what lies before them.
struct Bins {
  Sum before, parts[2], total;

  // Barriers stand around it.
  __device__ __forceinline__ void scan(const Histogram& histogram, Shared& shared) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int bin = 2 * threadIdx.x + i;
      parts[i] = {(ve_u64)histogram.high[bin] << 32 | histogram.low[bin], histogram.count[bin]};
    }
    const Sum mine = parts[0] + parts[1];
    Sum sum = mine;
#pragma unroll
    for (int lanes = 1; lanes < 32; lanes *= 2) {
      const Sum other{__shfl_up_sync(0xffffffffu, sum.mass, lanes), __shfl_up_sync(0xffffffffu, sum.count, lanes)};
      if (lane >= lanes) sum = sum + other;
    }
    if (lane == 31) shared.warps[warp] = sum;
    __syncthreads();
    before = total = {0, 0};
    for (int w = 0; w < WARPS; ++w) {
      if (w < warp) before = before + shared.warps[w];
      total = total + shared.warps[w];
    }
    before = {before.mass + sum.mass - mine.mass, before.count + sum.count - mine.count};
  }
  // The bin that a walk ends in, which is in exactly one thread; `base` lies before the first.
  __device__ __forceinline__ Found find(const Target& target, const Sum& base, Shared& shared) const {
    Sum from = base + before;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (target.within(from, parts[i])) shared.bin = {from, parts[i], 2 * (int)threadIdx.x + i};
      from = from + parts[i];
    }
    if (threadIdx.x == 0) shared.listed = 0;
    __syncthreads();
    return shared.bin;
  }
};

struct Row {
  const float* logits;
  const unsigned* mask;
  int vocab;
  float largest, rate;

  // Hands each token that can be drawn to `use(token, key, octaves)`.
  template <class Use>
  __device__ __forceinline__ void each(Use use) const {
    const float nothing = ve_bits<float>(0xff800000u);  // -infinity
    for (int first = threadIdx.x; first < vocab; first += IN_FLIGHT * THREADS) {
      float held[IN_FLIGHT];
#pragma unroll
      for (int i = 0; i < IN_FLIGHT; ++i) {
        const int token = first + i * THREADS;
        held[i] = token < vocab ? __ldg(logits + token) : nothing;
      }
#pragma unroll
      for (int i = 0; i < IN_FLIGHT; ++i) {
        const int token = first + i * THREADS;
        const float octaves = __fmul_rn(__fsub_rn(largest, held[i]), rate);
        if (octaves < VE_OCTAVES && ve_allowed(mask, token)) use(token, ve_logit_key(held[i]), octaves);
      }
    }
  }
};
__device__ __forceinline__ int bin_of(float octaves) { return (int)__fmul_rn(octaves, BINS_PER_OCTAVE); }

// The token that a walk ends at. `bins` are those of all tokens.
__device__ __forceinline__ Found walk(const Row& row, const Bins& bins, const Target& target, Memory& memory,
                                      Shared& shared) {
  Found found = bins.find(target, {0, 0}, shared);
  const int first_bin = found.at;
  ve_u64 prefix = 0;
  int shift = ORDER_BITS;  // the bits from here on are known to be `prefix`
  while (found.part.count > LIST && shift > BITS) {  // 6 bits are left at last, or 64 tokens
    memory.some.clear();
    __syncthreads();
    row.each([&](int token, unsigned key, float octaves) {
      const ve_u64 order = order_of(key, token);
      if (bin_of(octaves) != first_bin || order >> shift != prefix) return;
      memory.some.add(BINS - 1 - (int)(order >> (shift - BITS) & (BINS - 1)), ve_mass(octaves));
    });
    __syncthreads();
    Bins parts;
    parts.scan(memory.some, shared);
    found = parts.find(target, found.before, shared);
    prefix = prefix << BITS | (BINS - 1 - found.at);
    shift -= BITS;
  }
  row.each([&](int token, unsigned key, float octaves) {
    const ve_u64 order = order_of(key, token);
    if (bin_of(octaves) != first_bin || order >> shift != prefix) return;
    memory.list[atomicAdd(&shared.listed, 1u)] = {order, ve_mass(octaves)};
  });
  __syncthreads();
  if (threadIdx.x < found.part.count) {
    const Listed mine = memory.list[threadIdx.x];
    Sum before = found.before;
    for (unsigned i = 0; i < found.part.count; ++i) {
      const Listed other = memory.list[i];
      if (other.order > mine.order) before = before + Sum{other.mass, 1};
    }
    const Sum part{mine.mass, 1};
    if (target.within(before, part)) shared.token = {before, part, token_of(mine.order)};
  }
  __syncthreads();
  return shared.token;
}

// A walk each for top_k, top_p and the random number, as far as they are wanted.
__device__ __forceinline__ int draw(const Row& row, const VeSettings& settings, unsigned position, Memory& memory,
                                    Shared& shared) {
  memory.all.clear();
  __syncthreads();
  row.each([&](int, unsigned, float octaves) { memory.all.add(bin_of(octaves), ve_mass(octaves)); });
  __syncthreads();
  Bins bins;
  bins.scan(memory.all, shared);
  ve_u64 mass = bins.total.mass;
  Found found{};
#pragma unroll 1
  for (int stage = 0; stage < 3; ++stage) {
    Target target{stage == 0, 0};
    if (stage == 0) {
      if (settings.top_k == 0 || (unsigned)settings.top_k >= bins.total.count) continue;
      target.value = settings.top_k - 1;
    } else if (stage == 1) {
      if (settings.top_p == 0) continue;
      // A token is in if the mass before it is less than top_p of all: the last one holds the largest such number.
      target.value = __umul64hi(mass, settings.top_p) - (mass * settings.top_p == 0);
    } else {
      target.value = __umul64hi(mass, ve_philox(settings.seed, position));
    }
    found = walk(row, bins, target, memory, shared);
    mass = found.before.mass + found.part.mass;
  }
  return found.at;
}
}  // namespace

// partials [batch, slices]: of each slice, the order of its largest logit among the allowed.
extern "C" __global__ void __launch_bounds__(MAX_THREADS)
    ve_sample_max_f32(const float* logits, const VeSettings* settings, const unsigned* masks, const int* positions,
                      ve_u64* partials, int vocab) {
  VE_SHARED(ve_u64, bests, MAX_THREADS / 32);
  const int b = blockIdx.y;
  if (positions[b] < 0) return;
  const float* const row = logits + (size_t)b * vocab;
  const unsigned* const mask = masks && settings[b].masked ? masks + (size_t)b * ((vocab + 31) / 32) : nullptr;
  ve_u64 best = 0;
#pragma unroll
  for (int i = 0; i < SLICE / MAX_THREADS; ++i) {
    const int token = blockIdx.x * SLICE + i * MAX_THREADS + threadIdx.x;
    if (token >= vocab) break;
    const unsigned key = ve_logit_key(row[token]);
    if (key != VE_NOT_FINITE && !ve_allowed(mask, token)) continue;
    const ve_u64 order = order_of(key, token);
    best = order > best ? order : best;
  }
  best = warp_max(best);
  if (threadIdx.x % 32 == 0) bests[threadIdx.x / 32] = best;
  __syncthreads();
  if (threadIdx.x >= 32) return;
  best = warp_max(threadIdx.x < MAX_THREADS / 32 ? bests[threadIdx.x] : 0);
  if (threadIdx.x == 0) partials[(size_t)b * gridDim.x + blockIdx.x] = best;
}
VE_EXPORT(ve_sample_max_f32)

extern "C" __global__ void __launch_bounds__(32)
    ve_sample_greedy(const ve_u64* partials, const VeSettings* settings, int* ids, int* positions, int* step,
                     long long* ring, int slices) {
  const ve_u64 best = largest_of(partials, slices);
  if (threadIdx.x) return;
  const int token = refused(best) ? VE_REFUSED : token_of(best);
  VeState{ids, positions, step, ring}.advance(token, settings[blockIdx.x], blockIdx.x, gridDim.x);
}
VE_EXPORT(ve_sample_greedy)

extern "C" __global__ void __launch_bounds__(THREADS)
    ve_sample_f32(const float* logits, const ve_u64* partials, const VeSettings* settings, const unsigned* masks,
                  int* ids, int* positions, int* step, long long* ring, int vocab, int slices) {
  VE_DYN_SMEM(memory);
  VE_SHARED(Shared, shared, 1);
  const int b = blockIdx.x, position = positions[b];
  const VeSettings& mine = settings[b];
  const ve_u64 best = largest_of(partials, slices);
  int token = refused(best) ? VE_REFUSED : token_of(best);
  if (position >= 0 && token >= 0 && mine.rate > 0) {
    const unsigned* const mask = masks && mine.masked ? masks + (size_t)b * ((vocab + 31) / 32) : nullptr;
    const Row row{logits + (size_t)b * vocab, mask, vocab, ve_logit_of((unsigned)(best >> INDEX_BITS)), mine.rate};
    token = draw(row, mine, (unsigned)position + 1, *reinterpret_cast<Memory*>(memory), *shared);
  } else {
    __syncthreads();  // all have read the position that is written below, though none would do otherwise
  }
  if (threadIdx.x == 0) VeState{ids, positions, step, ring}.advance(token, mine, b, gridDim.x);
}
VE_EXPORT(ve_sample_f32)
