#include <immintrin.h>

#include "philox/fill.h"

namespace mmgen_kernels::philox {
namespace {

struct Lanes : Vectors<8> {
  static PHILOX_HOST_DEVICE Wide multiply(Wide a, uint32_t b) {
    return (Wide)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
  }
  static PHILOX_HOST_DEVICE Float to_float(Int i) { return (Float)_mm256_cvtepi32_ps((__m256i)i); }
  static PHILOX_HOST_DEVICE Float root(Float f) { return (Float)_mm256_sqrt_ps((__m256)f); }
  // A 4 x 4 transposition in each 128-bit lane.
  static PHILOX_HOST_DEVICE void interleave(const Word (&words)[4], uint32_t* out) {
    const __m256i a = (__m256i)words[0], b = (__m256i)words[1], c = (__m256i)words[2], d = (__m256i)words[3];
    const __m256i low_ab = _mm256_unpacklo_epi32(a, b), high_ab = _mm256_unpackhi_epi32(a, b);
    const __m256i low_cd = _mm256_unpacklo_epi32(c, d), high_cd = _mm256_unpackhi_epi32(c, d);
    __m256i* to = reinterpret_cast<__m256i*>(out);
    _mm256_storeu_si256(to, _mm256_unpacklo_epi64(low_ab, low_cd));
    _mm256_storeu_si256(to + 1, _mm256_unpackhi_epi64(low_ab, low_cd));
    _mm256_storeu_si256(to + 2, _mm256_unpacklo_epi64(high_ab, high_cd));
    _mm256_storeu_si256(to + 3, _mm256_unpackhi_epi64(high_ab, high_cd));
  }
  template <int COUNT>
  static PHILOX_HOST_DEVICE void to_half(const float* values, uint16_t* out) {
    for (int i = 0; i < COUNT; i += width) {
      const __m128i halves = _mm256_cvtps_ph(_mm256_loadu_ps(values + i), _MM_FROUND_TO_NEAREST_INT);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), halves);
    }
  }
};

}  // namespace
const Kernels avx2_kernels = kernels<Lanes>();
}  // namespace mmgen_kernels::philox
