// Eight floats with AVX2.
#pragma once

#include <immintrin.h>

#include "simd/storage.h"

namespace mmgen_kernels::simd {
namespace {  // internal linkage: compiled once per instruction set, and the copies must not be merged

struct LanesAvx2 : Vectors<float, 32>, Words<8> {
  static constexpr int registers = 16;
  static Vec fmadd(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
  static Vec from_bf16(Half h) { return (Vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)h), 16); }
  static Half to_bf16(Vec v) {
    const __m256i bits = (__m256i)bf16_bits(v), packed = _mm256_packus_epi32(bits, bits);  // within each half
    return (Half)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0b1000));
  }
  static Vec from_half(Half h) { return _mm256_cvtph_ps((__m128i)h); }
  static Half to_half(Vec v) { return (Half)_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }
};

}  // namespace
}  // namespace mmgen_kernels::simd
