// The words that GPU kernels are written in: who am I, barriers, exchanges within a warp, the matrix instruction. nvcc makes
// them instructions; any other C++ compiler makes them calls of simt/fibers.h, so that tests run whole kernels without a GPU.
//
// A kernel is a function `void kernel(const Problem&, Shared&)` of DEVICE linkage; Shared lives in shared memory.
#pragma once

#include <cstdint>

#include "simt/host_device.h"

#if defined(__CUDACC__)

#define DEVICE __device__ __forceinline__
#define UNROLL _Pragma("unroll")

namespace mmgen_kernels::simt {

DEVICE int thread() { return static_cast<int>(threadIdx.x); }
DEVICE int threads() { return static_cast<int>(blockDim.x); }
DEVICE int64_t block_x() { return blockIdx.x; }
DEVICE int64_t block_y() { return blockIdx.y; }
DEVICE int64_t block_z() { return blockIdx.z; }

// Every thread of the block gets here before any goes on, and sees what the others wrote.
DEVICE void sync() { __syncthreads(); }
// The same for the 32 threads of a warp.
DEVICE void sync_warp() { __syncwarp(); }

// The value of the lane whose number differs by the bits of `mask`. All lanes take part, here and below.
DEVICE float exchange(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
DEVICE double exchange(double value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
DEVICE int64_t exchange(int64_t value, int mask) {
  return static_cast<int64_t>(__shfl_xor_sync(0xffffffffu, static_cast<long long>(value), mask));
}
// Bit i: whether lane i says yes.
DEVICE uint32_t ballot(bool yes) { return __ballot_sync(0xffffffffu, yes); }
DEVICE int lowest_bit(uint32_t mask) { return __ffs(static_cast<int>(mask)) - 1; }

// Copies BYTES, 8 or a multiple of 16, between addresses that are multiples of 8 or 16, as wide as the hardware can.
template <int BYTES>
DEVICE void copy(void* to, const void* from) {
  static_assert(BYTES == 8 || BYTES % 16 == 0);
  if constexpr (BYTES == 8) {
    *static_cast<uint2*>(to) = *static_cast<const uint2*>(from);
  } else {
    UNROLL for (int i = 0; i < BYTES / 16; ++i) static_cast<uint4*>(to)[i] = static_cast<const uint4*>(from)[i];
  }
}

// sum += a b, 16 x 8 of 16 x 16 by 16 x 8, fp16 products and fp32 sums. With g = lane / 4 and t = lane % 4 a lane holds
//   a    rows g and g + 8 (registers 0, 1), columns 2t, 2t + 1; registers 2, 3: the same of columns + 8
//   b    column g, rows 2t, 2t + 1 (register 0) and 2t + 8, 2t + 9 (register 1)
//   sum  row g, columns 2t, 2t + 1; then row g + 8
DEVICE void multiply_add(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace mmgen_kernels::simt

#else

#define DEVICE inline
#define UNROLL
#include "simt/fibers.h"

#endif
