// Every instruction that CUDA C++ has no name for. Nothing else in kernels/ uses asm: the host twin of each
// function here is in host/cuda_on_host.hpp, and so every kernel runs on a CPU for its tests.
#pragma once

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#include <cuda_fp16.h>

#define VE_EXPORT(name)  // on the host: how tests and the fake driver call the kernel
// The dynamic shared memory, and a static array of it. Both are poison (all bits set) on the host at the start.
#define VE_DYN_SMEM(name) extern __shared__ __align__(128) unsigned char name[]
#define VE_SHARED(type, name, count) __shared__ __align__(16) type name[count]

// (a & b) | c
__device__ __forceinline__ unsigned ve_lop3_and_or(unsigned a, unsigned b, unsigned c) {
  unsigned r;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
  return r;
}

// 2^x to 2 units of the last place; exactly 1 for 0, and 0 for what is below 2^-126.
__device__ __forceinline__ float ve_exp2(float x) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}

// Sixteen bytes that are read once: they pass the L1 cache by, and DRAM is asked for 128 bytes.
__device__ __forceinline__ uint4 ve_ld_stream(const uint4* p) {
  uint4 r;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w)
               : "l"(p));
  return r;
}

// Sixteen bytes of shared memory. The host counts bank conflicts, so all 32 lanes of a warp must come here.
__device__ __forceinline__ uint4 ve_ld_shared(const void* p) { return *reinterpret_cast<const uint4*>(p); }

// Sixteen bytes from global to shared memory, there after ve_cp_wait; zeros if not `pred`, and `s` is not read.
__device__ __forceinline__ void ve_cp_async16(void* d, const void* s, bool pred) {
  unsigned address = (unsigned)__cvta_generic_to_shared(d);
  int bytes = pred ? 16 : 0;
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(address), "l"(s), "r"(bytes) : "memory");
}
__device__ __forceinline__ void ve_cp_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most N of this thread's committed groups are still on their way.
template <int N>
__device__ __forceinline__ void ve_cp_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// Four 8x8 matrices of halves: lane i names row i % 8 of matrix i / 8, and gets elements 2(i % 4), +1 of row i / 4 of
// each.
__device__ __forceinline__ void ve_ldmatrix_x4(unsigned (&r)[4], const void* p) {
  unsigned address = (unsigned)__cvta_generic_to_shared(p);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
// The same of transposed matrices: lane i gets elements (2(i % 4), i / 4) and (2(i % 4) + 1, i / 4) of each.
__device__ __forceinline__ void ve_ldmatrix_x4_trans(unsigned (&r)[4], const void* p) {
  unsigned address = (unsigned)__cvta_generic_to_shared(p);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
// An 8x8 matrix of halves, transposed: lane i gives elements 2(i % 4), +1 of row i / 4, and gets those of column i / 4.
__device__ __forceinline__ unsigned ve_transpose(unsigned pair) {
  unsigned r;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(pair));
  return r;
}

// c[16, 8] += a[16, 16] b[16, 8], fp32 sums. Lane (g, t) = (lane / 4, lane % 4) holds c: (g, 2t), (g, 2t+1), (g+8, 2t),
// (g+8, 2t+1); a: (g, 2t..), (g+8, 2t..), (g, 2t+8..), (g+8, 2t+8..); b: (2t.., g), (2t+8.., g).
__device__ __forceinline__ void ve_mma16816(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
#else
#include "cuda_on_host.hpp"
#endif

// The same bits as another type.
template <class To, class From>
__device__ __forceinline__ To ve_bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}
