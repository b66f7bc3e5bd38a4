// Sixteen floats with AVX-512.
#pragma once

#include <immintrin.h>

#include "simd/storage.h"

namespace mmgen_kernels::simd {
namespace {  // internal linkage: compiled once per instruction set, and the copies must not be merged

struct LanesAvx512 : Vectors<float, 64>, Words<16> {
  static constexpr int registers = 32;
  static Vec fmadd(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
  static HalfWide halved(Vec v) {
    return _mm512_add_pd(_mm512_cvtps_pd(_mm512_castps512_ps256(v)), _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1)));
  }
  static HalfWide add_products(Vec a, Vec b, HalfWide sum) {  // in fp64 a product is exact
    const auto upper = [](Vec v) { return _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1)); };
    const auto lower = [](Vec v) { return _mm512_cvtps_pd(_mm512_castps512_ps256(v)); };
    return _mm512_fmadd_pd(upper(a), upper(b), _mm512_fmadd_pd(lower(a), lower(b), sum));
  }
  static double sum(Vec v) { return _mm512_reduce_add_pd(halved(v)); }
  static Vec from_bf16(Half h) { return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)h), 16); }
  static Half to_bf16(Vec v) { return (Half)_mm512_cvtepi32_epi16((__m512i)bf16_bits(v)); }
  static Vec from_half(Half h) { return _mm512_cvtph_ps((__m256i)h); }
  static Half to_half(Vec v) { return (Half)_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }
};

}  // namespace
}  // namespace mmgen_kernels::simd
