// 16 bytes, which are a register of SSE2 and of NEON.
#pragma once

#include "simd/storage.h"

namespace mmgen_kernels::simd {
namespace {  // internal linkage: compiled once per instruction set, and the copies must not be merged

template <class T>
struct LanesScalar : Vectors<T, 16>, Words<16 / sizeof(T)> {
  static constexpr int registers = 16;
  using Vec = typename Vectors<T, 16>::Vec;
  static Vec fmadd(Vec a, Vec b, Vec c) { return a * b + c; }
};

}  // namespace
}  // namespace mmgen_kernels::simd
