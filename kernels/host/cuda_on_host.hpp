// CUDA on a CPU, as far as the kernels here use it: their sources compile with g++, for tests and the fake driver.
//
// Made to find mistakes, not to be fast. Shared memory starts as poison. cp.async reads and lands as late as the rules
// allow (at ve_cp_wait), in reverse order as early as they allow (at once), shuffled it reads early and lands late. Bank
// conflicts of ldmatrix and ve_ld_shared are counted. One barrier interval runs thread by thread, so only races that an
// order shows are seen: run three orders.
#pragma once
#include "fibers.hpp"

#define __global__
#define __device__
#define __host__
#define __constant__ static const
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

// __shared__ itself is not here: VE_SHARED can be poisoned, by the first thread of each block that comes along.
#define VE_DYN_SMEM(name) unsigned char* name = ve_host::dynamic_shared
#define VE_SHARED(type, name, count)    \
  alignas(128) static type name[count]; \
  static unsigned name##_last_block;    \
  ve_host::poison_once(name, sizeof name, name##_last_block)

inline void __syncthreads(unsigned line = __builtin_LINE()) { ve_host::block_barrier(line); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { ve_host::warp_barrier(mask, "__syncwarp"); }

namespace ve_host {
template <class T>
inline T shuffle(T value, unsigned source, unsigned mask) {
  auto slots = exchange(&value, sizeof value, mask, "a shuffle");
  T result;
  memcpy(&result, slots[source & 31], sizeof result);
  return result;
}
}  // namespace ve_host
template <class T>
inline T __shfl_sync(unsigned mask, T value, int source, int = 32) {
  return ve_host::shuffle(value, source, mask);
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int lanes, int = 32) {
  return ve_host::shuffle(value, ve_host::current->lane ^ lanes, mask);
}
template <class T>
inline T __shfl_down_sync(unsigned mask, T value, int lanes, int = 32) {
  const unsigned lane = ve_host::current->lane, source = lane + lanes;
  return ve_host::shuffle(value, source < 32 ? source : lane, mask);
}
template <class T>
inline T __shfl_up_sync(unsigned mask, T value, int lanes, int = 32) {
  const unsigned lane = ve_host::current->lane;
  return ve_host::shuffle(value, lane >= (unsigned)lanes ? lane - lanes : lane, mask);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  auto slots = ve_host::exchange(&predicate, sizeof predicate, mask, "__ballot_sync");
  unsigned result = 0;
  for (int i = 0; i < 32; ++i) {
    int p;
    memcpy(&p, slots[i], sizeof p);
    if (p && mask >> i & ve_host::warps[ve_host::current->warp].lanes >> i & 1) result |= 1u << i;
  }
  return result;
}

// Of integers in shared memory alone, where no order shows. One between blocks is a mistake, floats do not compile.
inline unsigned atomicAdd(unsigned* place, unsigned value) {
  ve_host::must_be_shared(place, sizeof *place);
  const unsigned before = *place;
  *place += value;
  return before;
}
inline float atomicAdd(float*, float) = delete;

// ---- the twins of ve_ptx.cuh ---------------------------------------------------------------------------------------
inline unsigned ve_lop3_and_or(unsigned a, unsigned b, unsigned c) { return (a & b) | c; }
inline float ve_exp2(float x) { return x < -126.f ? 0.f : exp2f(x); }
inline uint4 ve_ld_stream(const uint4* p) {
  ve_host::must_be_aligned(p, 16);
  return *p;
}

namespace ve_host {
// Eight lanes read 128 bytes at once if they meet in no bank, or in the same word.
inline void count_conflicts(const uintptr_t* address, int lanes) {
  for (int first = 0; first < lanes; first += 8) {
    ++stats.shared_reads;
    bool conflict = false;
    for (int i = first; i < first + 8; ++i)
      for (int j = first; j < i; ++j)
        conflict |= address[i] != address[j] && address[i] / 16 % 8 == address[j] / 16 % 8;
    stats.bank_conflicts += conflict;
  }
}
inline void land(Copy& copy) {
  copy.pred ? memcpy(copy.to, copy.was_read ? copy.bytes : copy.from, 16) : memset(copy.to, 0, 16);
}
}  // namespace ve_host

inline uint4 ve_ld_shared(const void* p) {
  ve_host::must_be_aligned(p, 16);
  auto* fiber = ve_host::current;
  auto& read = ve_host::warps[fiber->warp].reads[fiber->shared_reads++ % 256];
  read.address[fiber->lane] = (uintptr_t)p;
  if (++read.lanes == 32) ve_host::count_conflicts(read.address, 32), read.lanes = 0;
  return *(const uint4*)p;
}
inline void ve_cp_async16(void* to, const void* from, bool pred) {
  ve_host::must_be_aligned(to, 16);
  if (pred) ve_host::must_be_aligned(from, 16);
  ve_host::Copy copy{to, from, pred, pred && ve_host::order == ve_host::SHUFFLED, {}};
  if (ve_host::order == ve_host::REVERSE) return ve_host::land(copy);
  if (copy.was_read) memcpy(copy.bytes, from, 16);
  ve_host::current->copies.push_back(copy);
}
inline void ve_cp_commit() { ve_host::current->groups.push_back(ve_host::current->copies.size()); }
template <int N>
inline void ve_cp_wait() {
  auto& copies = ve_host::current->copies;
  auto& groups = ve_host::current->groups;
  if (groups.size() <= (size_t)N) return;
  const size_t landed_groups = groups.size() - N, landed = groups[landed_groups - 1];
  for (size_t i = 0; i < landed; ++i) ve_host::land(copies[i]);
  copies.erase(copies.begin(), copies.begin() + landed);
  groups.erase(groups.begin(), groups.begin() + landed_groups);
  for (auto& end : groups) end -= landed;
}
namespace ve_host {
// Lane i gets elements 2(i % 4), +1 of row i / 4 of each matrix; with `trans`, of column i / 4.
inline void ldmatrix(unsigned (&r)[4], const void* p, bool trans) {
  must_be_aligned(p, 16);
  auto slots = exchange(&p, sizeof p, 0xffffffffu, trans ? "ldmatrix.trans" : "ldmatrix");
  const unsigned lane = current->lane;
  for (int i = 0; i < 4; ++i) {
    uint16_t pair[2];
    for (unsigned e = 0; e < 2; ++e) {
      const unsigned row = trans ? lane % 4 * 2 + e : lane / 4, column = trans ? lane / 4 : lane % 4 * 2 + e;
      const uint16_t* from;
      memcpy(&from, slots[8 * i + row], sizeof from);
      pair[e] = from[column];
    }
    memcpy(&r[i], pair, sizeof pair);
  }
  if (lane) return;
  uintptr_t address[32];
  for (int i = 0; i < 32; ++i) memcpy(&address[i], slots[i], sizeof address[i]);
  count_conflicts(address, 32);
}
}  // namespace ve_host
inline void ve_ldmatrix_x4(unsigned (&r)[4], const void* p) { ve_host::ldmatrix(r, p, false); }
inline void ve_ldmatrix_x4_trans(unsigned (&r)[4], const void* p) { ve_host::ldmatrix(r, p, true); }
inline unsigned ve_transpose(unsigned pair) {
  auto slots = ve_host::exchange(&pair, sizeof pair, 0xffffffffu, "movmatrix");
  const unsigned lane = ve_host::current->lane, column = lane / 4;
  unsigned result = 0;
  for (unsigned e = 0; e < 2; ++e) {
    uint16_t element;
    memcpy(&element, slots[(lane % 4 * 2 + e) * 4 + column / 2] + 2 * (column % 2), sizeof element);
    result |= (unsigned)element << (16 * e);
  }
  return result;
}
inline void ve_mma16816(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  const unsigned mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
  auto slots = ve_host::exchange(mine, sizeof mine, 0xffffffffu, "mma");
  const unsigned lane = ve_host::current->lane, g = lane / 4, t = lane % 4;
  for (unsigned e = 0; e < 4; ++e) {
    const unsigned lower = e >> 1, column = 2 * t + (e & 1);
    float sum = 0;
    for (unsigned word = 0; word < 8; ++word) {  // two k each: 0..7 then 8..15
      const unsigned quad = word % 4, upper_k = word / 4;
      _Float16 x[2], y[2];
      memcpy(x, slots[g * 4 + quad] + 4 * (lower + 2 * upper_k), 4);
      memcpy(y, slots[column * 4 + quad] + 16 + 4 * upper_k, 4);
      sum += (float)x[0] * (float)y[0];
      sum += (float)x[1] * (float)y[1];
    }
    c[e] += sum;
  }
}

// How tests and the fake driver call a kernel: `order` is of ve_host::Order, the result of ve_host::Result.
#define VE_EXPORT(name)                                                                                       \
  extern "C" unsigned ve_args_##name(unsigned* offsets) { return ve_host::argument_offsets(name, offsets); }  \
  extern "C" int ve_host_##name(const unsigned* grid, const unsigned* block, size_t shared, void** arguments, \
                                int order) {                                                                  \
    return ve_host::launch(name, grid, block, shared, arguments, order);                                      \
  }
// Of the last launch: fiber switches, reads of 128 bytes of shared memory by eight lanes, and how many met in a bank.
extern "C" __attribute__((weak)) void ve_host_stats(unsigned long long* out) {
  out[0] = ve_host::stats.switches, out[1] = ve_host::stats.shared_reads, out[2] = ve_host::stats.bank_conflicts;
}
extern "C" __attribute__((weak)) const char* ve_host_message() { return ve_host::message; }
