// Prefill: keys and values of the rows of one sequence go into its kv_cache. See include/ve_attention.cuh.
//
// A block takes a row, in which all keys and then all values lie behind the queries. A row whose position is below 0
// or beyond the capacity is left out.
#include "ve_attention.cuh"

namespace {
constexpr int THREADS = 128;

template <class T>
__device__ __forceinline__ void write(const VeCaches& caches, const __half* qkv, const int* positions, int query_heads,
                                      int dim, int sequence) {
  constexpr int unit = 16 / sizeof(T);
  const int position = positions[blockIdx.x], units = dim / unit;
  if (position < 0 || position >= caches.capacities[sequence]) return;
  const __half* row = qkv + (size_t)blockIdx.x * (query_heads + 2 * caches.heads) * dim + (size_t)query_heads * dim;
  for (int i = threadIdx.x; i < 2 * caches.heads * units; i += THREADS) {
    const bool value = i >= caches.heads * units;
    const VeHead<T> head(caches, sequence, i / units % caches.heads, dim);
    const int number = i % units * unit;
    const uint4 stored = ve_stored(row + i * unit, (value ? head.value_scales : head.key_scales) + number, T());
    *reinterpret_cast<uint4*>((value ? head.values : head.keys) + (size_t)position * dim + number) = stored;
  }
}
}  // namespace

#define VE_KV_WRITE(name, T)                                                                                         \
  extern "C" __global__ void __launch_bounds__(THREADS)                                                              \
      name(const long long* layers_at, const int* capacities, const float* key_scales, const float* value_scales,    \
           const __half* qkv, const int* positions, int layer, int layers, int query_heads, int heads, int dim,      \
           int sequence) {                                                                                           \
    write<T>(VeCaches{layers_at, capacities, key_scales, value_scales, layer, layers, heads}, qkv, positions,        \
             query_heads, dim, sequence);                                                                            \
  }                                                                                                                  \
  VE_EXPORT(name)
VE_KV_WRITE(ve_kv_write_f16, __half)
VE_KV_WRITE(ve_kv_write_i8, signed char)
