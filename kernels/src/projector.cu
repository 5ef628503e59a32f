// One linear of a projector, with everything around it: out[t, n] = gelu(norm(x[t]) . w[n] + b[n]).
//
// x[t] is gathered on its way to shared memory: `block` x `block` neighbouring patches are one row, patches beyond
// the image are zeros (they count in the norm). The LayerNorm is moved behind the product: gamma is folded into w,
// beta into b, and  norm(x) . w = rstd * (x . w' - mean * sum(w')),  with mean and rstd taken from the tiles as they
// pass through.
// See kernels/README.md for the maths and the drawing.
//
// The outputs are the rows and the tokens the columns of each mma, so a warp's tokens may be any multiple of 8.
#include "ve_ptx.cuh"

namespace {
constexpr int K_STEP = 64;        // numbers of a row in a tile: 128 bytes, eight chunks of 16
constexpr int CHUNKS = 8;
constexpr int WIDTH_STEP = 128;   // weights [steps][outputs, filled up to a multiple of this][K_STEP]: a tile is whole
constexpr int NORM_ROWS = 4;      // rows that a warp takes statistics of at once, eight lanes each
constexpr int TALL = 8;           // tiles of tokens that pass before the next tile of outputs: its weights stay in L2
constexpr int STAGED_PAD = 4;     // floats behind each row of the staged output: a warp's writes meet in no bank

struct Arguments {
  const __half *x, *weight;
  const float *bias, *weight_sum;
  const int* first_rows;
  __half* out;
  int rows, outputs, depth, steps, channels, grid, block, column_major, tokens, stride, gelu;
  float eps;
};

// Where a chunk of a row lies in its tile: neither the same chunk of eight rows nor the eight of a row meet in a bank.
__device__ __forceinline__ int swizzled(int row, int chunk) { return row * K_STEP + (chunk ^ (row & 7)) * 8; }

// What the rows of a block's tile read and write. Offsets are in chunks of 8 halves.
template <int TOKENS>
struct RowTable {
  int source[TOKENS];  // of the first patch
  int inside[TOKENS];  // a bit for each patch of the row that is in the image; none for a row beyond the last
  int target[TOKENS];  // the row of `out`

  __device__ __forceinline__ void fill(const Arguments& a, int first, int i) {
    const int row = first + i, chunks = a.channels / 8;
    source[i] = inside[i] = target[i] = 0;
    if (row >= a.rows) return;
    const int image = row / a.tokens, token = row % a.tokens;
    target[i] = a.first_rows ? a.first_rows[image] + token : row;
    if (a.block == 1) {
      source[i] = row * chunks;
      inside[i] = 1;
      return;
    }
    const int side = (a.grid + a.block - 1) / a.block;
    const int y = (a.column_major ? token % side : token / side) * a.block;
    const int x = (a.column_major ? token / side : token % side) * a.block;
    source[i] = ((image * a.grid + y) * a.grid + x) * chunks;
    for (int dy = 0; dy < a.block; ++dy)
      for (int dx = 0; dx < a.block; ++dx)
        if (y + dy < a.grid && x + dx < a.grid) inside[i] |= 1 << (dy * a.block + dx);
  }
};

// The chunk of every row that a thread loads next, the same in all rows: which patch, and how far from the first.
struct Cursor {
  int patch = 0, column = 0, corner = 0, chunk;

  __device__ __forceinline__ explicit Cursor(const Arguments& a, int first) : chunk(first) { settle(a); }
  __device__ __forceinline__ void settle(const Arguments& a) {
    const int chunks = a.channels / 8;
    while (chunk >= chunks) {
      chunk -= chunks;
      ++patch;
      corner += chunks;
      if (++column == a.block) {
        column = 0;
        corner += (a.grid - a.block) * chunks;
      }
    }
  }
  __device__ __forceinline__ void advance(const Arguments& a) {
    chunk += CHUNKS;
    settle(a);
  }
};

// Mean and sum of squared distances of the numbers seen so far. No difference of large sums is ever taken.
struct Moments {
  float mean = 0.f, squares = 0.f;

  // Eight more, after `before` chunks of eight; `share` is 1 / (before + 1).
  __device__ __forceinline__ void add(const uint4& eight, int before, float share) {
    const unsigned words[4] = {eight.x, eight.y, eight.z, eight.w};
    float v[8], sum = 0.f, own = 0.f;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = __half22float2(ve_bits<__half2>(words[i]));
      v[2 * i] = pair.x;
      v[2 * i + 1] = pair.y;
      sum += pair.x + pair.y;
    }
    const float middle = sum * 0.125f;
#pragma unroll
    for (int i = 0; i < 8; ++i) own += (v[i] - middle) * (v[i] - middle);
    const float apart = middle - mean;
    mean += apart * share;
    squares += own + apart * apart * (8.f * before * share);
  }
  // The same, of as many numbers (`count`), that another lane has seen.
  __device__ __forceinline__ void join(int lanes, float count) {
    const float other = __shfl_xor_sync(0xffffffffu, mean, lanes), apart = other - mean;
    squares += __shfl_xor_sync(0xffffffffu, squares, lanes) + apart * apart * (count * 0.5f);
    mean = (mean + other) * 0.5f;
  }
};

__device__ __forceinline__ float gelu_exact(float v) { return 0.5f * v * (1.f + erff(v * 0.70710678f)); }

// WARPS_T x WARPS_N warps share a tile of TOKENS x OUTPUTS.
template <int TOKENS, int OUTPUTS, int STAGES, int WARPS_T, int WARPS_N, bool NORM>
__device__ __forceinline__ void project(const Arguments& a) {
  constexpr int THREADS = WARPS_T * WARPS_N * 32, WARPS = WARPS_T * WARPS_N;
  constexpr int WARP_T = TOKENS / WARPS_T, WARP_N = OUTPUTS / WARPS_N;
  constexpr int T8 = WARP_T / 8, N16 = WARP_N / 16;
  constexpr int X_TILE = TOKENS * K_STEP, STAGE = (TOKENS + OUTPUTS) * K_STEP, ROWS_AT_ONCE = THREADS / CHUNKS;
  constexpr int PASSES = (TOKENS + WARPS * NORM_ROWS - 1) / (WARPS * NORM_ROWS);
  static_assert(WARP_T % 8 == 0 && WARP_N % 16 == 0 && OUTPUTS % ROWS_AT_ONCE == 0, "");
  constexpr int STAGED = OUTPUTS + STAGED_PAD;
  static_assert(TOKENS * STAGED * 2 <= STAGES * STAGE, "the output is staged where the tiles were");

  VE_DYN_SMEM(shared);
  __half* const tiles = reinterpret_cast<__half*>(shared);
  RowTable<TOKENS>& table = *reinterpret_cast<RowTable<TOKENS>*>(tiles + STAGES * STAGE);
  float* const row_mean = reinterpret_cast<float*>(&table + 1);
  float* const row_rstd = row_mean + TOKENS;

  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int warp_t = warp / WARPS_N * WARP_T, warp_n = warp % WARPS_N * WARP_N;
  const int number = blockIdx.y * gridDim.x + blockIdx.x, span = TALL * gridDim.y, group = number / span;
  const int height = min(TALL, (int)gridDim.x - group * TALL);
  const int first_row = (group * TALL + number % span % height) * TOKENS;
  const int first_output = number % span / height * OUTPUTS;

  for (int i = thread; i < TOKENS; i += THREADS) table.fill(a, first_row, i);
  __syncthreads();

  const size_t panel = (size_t)((a.outputs + WIDTH_STEP - 1) / WIDTH_STEP * WIDTH_STEP) * K_STEP;
  const __half* weight = a.weight + (size_t)first_output * K_STEP;
  Cursor cursor(a, thread % CHUNKS);
  auto load = [&](int step) {
    __half* const x = tiles + step % STAGES * STAGE;
    __half* const w = x + X_TILE;
    const int chunk = thread % CHUNKS, row = thread / CHUNKS;
#pragma unroll
    for (int i = 0; i < TOKENS; i += ROWS_AT_ONCE) {
      if (i + ROWS_AT_ONCE > TOKENS && i + row >= TOKENS) break;
      const bool inside = table.inside[i + row] >> cursor.patch & 1;
      const size_t offset = inside ? table.source[i + row] + cursor.corner + cursor.chunk : 0;
      ve_cp_async16(x + swizzled(i + row, chunk), a.x + offset * 8, inside);
    }
#pragma unroll
    for (int i = 0; i < OUTPUTS; i += ROWS_AT_ONCE)
      ve_cp_async16(w + swizzled(i + row, chunk), weight + (i + row) * K_STEP + chunk * 8, true);
    weight += panel;
    cursor.advance(a);
  };

  float sums[N16][T8][4] = {};
  Moments moments[NORM ? PASSES : 1];
#pragma unroll
  for (int step = 0; step < STAGES - 1; ++step) {
    if (step < a.steps) load(step);
    ve_cp_commit();
  }
  for (int step = 0; step < a.steps; ++step) {
    ve_cp_wait<STAGES - 2>();
    __syncthreads();  // the tile is there for all, and nobody reads the one that is loaded over
    if (step + STAGES - 1 < a.steps) load(step + STAGES - 1);
    ve_cp_commit();
    const __half* const x = tiles + step % STAGES * STAGE;
    const __half* const w = x + X_TILE;
    if (NORM) {
      const float share = __fdividef(1.f, step + 1.f);
#pragma unroll
      for (int pass = 0; pass < PASSES; ++pass) {
        const int row = (pass * WARPS + warp) * NORM_ROWS + lane / CHUNKS;
        if ((pass + 1) * WARPS * NORM_ROWS <= TOKENS || row < TOKENS)  // whole warps
          moments[pass].add(ve_ld_shared(x + swizzled(row, lane % CHUNKS)), step, share);
      }
    }
#pragma unroll
    for (int k = 0; k < CHUNKS; k += 2) {
      unsigned weights[N16][4], tokens[(T8 + 1) / 2][4];
#pragma unroll
      for (int n = 0; n < N16; ++n)
        ve_ldmatrix_x4(weights[n], w + swizzled(warp_n + n * 16 + lane % 16, k + lane / 16));
#pragma unroll
      for (int t = 0; t < T8; t += 2) {  // an odd last one is loaded twice
        const int matrix = t + 1 < T8 ? lane / 16 : 0;
        ve_ldmatrix_x4(tokens[t / 2], x + swizzled(warp_t + (t + matrix) * 8 + lane % 8, k + lane / 8 % 2));
      }
#pragma unroll
      for (int n = 0; n < N16; ++n)
#pragma unroll
        for (int t = 0; t < T8; ++t)
          ve_mma16816(sums[n][t], weights[n], tokens[t / 2][t % 2 * 2], tokens[t / 2][t % 2 * 2 + 1]);
    }
  }
  ve_cp_wait<0>();

  if (NORM) {
    const float padded = a.steps * (float)K_STEP, depth = a.depth;
#pragma unroll
    for (int pass = 0; pass < PASSES; ++pass) {
      Moments m = moments[pass];
      m.join(1, padded / 8);
      m.join(2, padded / 4);
      m.join(4, padded / 2);
      // Zeros behind the row's end were counted too: take them out.
      const float mean = m.mean * (padded / depth);
      const float variance = fmaxf((m.squares - mean * mean * (depth / padded) * (padded - depth)) / depth, 0.f);
      const int row = (pass * WARPS + warp) * NORM_ROWS + lane / CHUNKS;
      if (lane % CHUNKS == 0 && row < TOKENS) {
        row_mean[row] = mean;
        row_rstd[row] = rsqrtf(variance + a.eps);
      }
    }
  }
  __syncthreads();

  float* const staged = reinterpret_cast<float*>(tiles);
#pragma unroll
  for (int n = 0; n < N16; ++n)
#pragma unroll
    for (int t = 0; t < T8; ++t)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int token = warp_t + t * 8 + lane % 4 * 2 + e % 2, output = warp_n + n * 16 + e / 2 * 8 + lane / 4;
        staged[token * STAGED + output] = sums[n][t][e];
      }
  __syncthreads();
  constexpr int VECTORS = OUTPUTS / 8;
  static_assert(THREADS % VECTORS == 0, "a thread's outputs stay the same");
  const int vector = thread % VECTORS * 8, output = first_output + vector;
  if (output >= a.outputs) return;
  float bias[8], weight_sum[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    bias[i] = __ldg(a.bias + output + i);
    weight_sum[i] = NORM ? __ldg(a.weight_sum + output + i) : 0.f;
  }
#pragma unroll 1  // GELU is long: eight of it are enough code
  for (int token = thread / VECTORS; token < TOKENS && first_row + token < a.rows; token += THREADS / VECTORS) {
    __half2 rounded[4];
#pragma unroll
    for (int i = 0; i < 8; i += 2) {
      float v[2] = {staged[token * STAGED + vector + i], staged[token * STAGED + vector + i + 1]};
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if (NORM) v[e] = row_rstd[token] * (v[e] - row_mean[token] * weight_sum[i + e]);
        v[e] += bias[i + e];
        if (a.gelu) v[e] = gelu_exact(v[e]);
      }
      rounded[i / 2] = __floats2half2_rn(v[0], v[1]);
    }
    *reinterpret_cast<uint4*>(a.out + (size_t)table.target[token] * a.stride + output) =
        uint4{ve_bits<unsigned>(rounded[0]), ve_bits<unsigned>(rounded[1]), ve_bits<unsigned>(rounded[2]),
              ve_bits<unsigned>(rounded[3])};
  }
}
}  // namespace

// first_rows: the row of `out` for the first token of each image, or null if images lie one behind the other.
#define VE_PROJECT(name, TOKENS, OUTPUTS, STAGES, WARPS_T, WARPS_N, MIN_BLOCKS, NORM)                                 \
  extern "C" __global__ void __launch_bounds__(WARPS_T* WARPS_N * 32, MIN_BLOCKS)                                     \
      name(const __half* x, const __half* weight, const float* bias, const float* weight_sum, const int* first_rows,  \
           __half* out, int rows, int outputs, int depth, int steps, int channels, int grid, int block,               \
           int column_major, int tokens, int stride, int gelu, float eps) {                                           \
    project<TOKENS, OUTPUTS, STAGES, WARPS_T, WARPS_N, NORM>(                                                         \
        Arguments{x, weight, bias, weight_sum, first_rows, out, rows, outputs, depth, steps, channels, grid, block,   \
                  column_major, tokens, stride, gelu, eps});                                                          \
  }                                                                                                                   \
  VE_EXPORT(name)

VE_PROJECT(ve_project_f16_64x64, 64, 64, 4, 2, 2, 2, false)
VE_PROJECT(ve_project_f16_64x128, 64, 128, 3, 2, 2, 2, false)
VE_PROJECT(ve_project_f16_112x64, 112, 64, 3, 2, 2, 2, false)
VE_PROJECT(ve_project_f16_112x128, 112, 128, 3, 2, 4, 1, false)
VE_PROJECT(ve_project_f16_norm_64x64, 64, 64, 4, 2, 2, 2, true)
VE_PROJECT(ve_project_f16_norm_64x128, 64, 128, 3, 2, 2, 2, true)
VE_PROJECT(ve_project_f16_norm_112x64, 112, 64, 3, 2, 2, 2, true)
VE_PROJECT(ve_project_f16_norm_112x128, 112, 128, 3, 2, 4, 1, true)
