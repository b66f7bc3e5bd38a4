// Sixteen 32-bit sums, or pairs of 16-bit integers, with AVX-512; add_products is of VNNI.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace mmgen_kernels::simd {

struct IntAvx512 {
  static constexpr int width = 16;
  __m512i v;

  static IntAvx512 load(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
  static IntAvx512 broadcast(int32_t x) { return {_mm512_set1_epi32(x)}; }
  // out = self * unit; lowest = min(lowest, that)
  void store_scaled(float unit, float* out, float* lowest) const {
    const __m512 scores = _mm512_mul_ps(_mm512_cvtepi32_ps(v), _mm512_set1_ps(unit));
    _mm512_storeu_ps(out, scores);
    _mm512_storeu_ps(lowest, _mm512_min_ps(scores, _mm512_loadu_ps(lowest)));
  }
};

// sum + the products of the pairs of a and b. Written out: for _mm512_dpwssd_epi32, g++ 12 keeps a copy of every sum on the stack.
inline IntAvx512 add_products(IntAvx512 a, IntAvx512 b, IntAvx512 sum) {
  asm("vpdpwssd %2, %1, %0" : "+v"(sum.v) : "v"(a.v), "v"(b.v));
  return sum;
}
inline IntAvx512 min(IntAvx512 a, IntAvx512 b) { return {_mm512_min_epi32(a.v, b.v)}; }

}  // namespace mmgen_kernels::simd
