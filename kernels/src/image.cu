// RGB images [N, height, width, 3] to what a patch embedding multiplies: patches [N, rows, columns, (channel, y, x)].
//
// A byte has 256 values and a channel one mean, so `levels` [3, 256] holds every result there is, computed as the
// preprocessing on the CPU does: the same bits. A patch is filled up with zeros to `stride`, a multiple of 8.
#include "ve_ptx.cuh"

extern "C" __global__ void __launch_bounds__(256)
    ve_patchify_u8_f16(const unsigned char* pixels, const __half* levels, __half* patches, int images, int height,
                       int width, int patch, int stride) {
  const int rows = height / patch, columns = width / patch, vectors = stride / 8, area = patch * patch;
  const int number = (blockIdx.x * blockDim.x + threadIdx.x) / vectors;
  if (number >= images * rows * columns) return;
  const int first = (blockIdx.x * blockDim.x + threadIdx.x) % vectors * 8;
  const int column = number % columns, row = number / columns % rows, image = number / (rows * columns);
  const unsigned char* const corner = pixels + (((size_t)image * height + row * patch) * width + column * patch) * 3;
  int channel = first / area, y = first % area / patch, x = first % patch;
  __half out[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    out[i] = __float2half_rn(0.f);
    if (channel < 3) out[i] = __ldg(levels + channel * 256 + corner[((size_t)y * width + x) * 3 + channel]);
    if (++x < patch) continue;
    x = 0;
    if (++y < patch) continue;
    y = 0;
    ++channel;
  }
  unsigned words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) words[i] = ve_bits<unsigned>(__halves2half2(out[2 * i], out[2 * i + 1]));
  *reinterpret_cast<uint4*>(patches + (size_t)number * stride + first) = uint4{words[0], words[1], words[2], words[3]};
}
VE_EXPORT(ve_patchify_u8_f16)
