// The rows of an embedding table that `ids` names, one block each.
#include "ve_ptx.cuh"

// An id below 0 leaves its row of `out` as it is: an image's embeddings are there. One beyond the table makes it NaN.
extern "C" __global__ void __launch_bounds__(128)
    ve_embed_f16(const int* ids, const __half* table, __half* out, int rows, int width, int stride) {
  const int id = ids[blockIdx.x];
  if (id < 0) return;
  const uint4* const from = reinterpret_cast<const uint4*>(table + (size_t)id * width);
  uint4* const to = reinterpret_cast<uint4*>(out + (size_t)blockIdx.x * stride);
  for (int i = threadIdx.x; i < width / 8; i += blockDim.x) {
    uint4 v{~0u, ~0u, ~0u, ~0u};
    if (id < rows) v = __ldg(from + i);
    to[i] = v;
  }
}
VE_EXPORT(ve_embed_f16)
