#include <immintrin.h>

#include "philox/fill.h"

namespace mmgen_kernels::philox {
namespace {

struct Lanes : Vectors<16> {
  static PHILOX_HOST_DEVICE Wide multiply(Wide a, uint32_t b) {
    return (Wide)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b));
  }
  static PHILOX_HOST_DEVICE Float to_float(Int i) { return (Float)_mm512_cvtepi32_ps((__m512i)i); }
  static PHILOX_HOST_DEVICE Float root(Float f) { return (Float)_mm512_sqrt_ps((__m512)f); }
  // A 4 x 4 transposition in each 128-bit lane.
  static PHILOX_HOST_DEVICE void interleave(const Word (&words)[4], uint32_t* out) {
    const __m512i a = (__m512i)words[0], b = (__m512i)words[1], c = (__m512i)words[2], d = (__m512i)words[3];
    const __m512i low_ab = _mm512_unpacklo_epi32(a, b), high_ab = _mm512_unpackhi_epi32(a, b);
    const __m512i low_cd = _mm512_unpacklo_epi32(c, d), high_cd = _mm512_unpackhi_epi32(c, d);
    _mm512_storeu_si512(out, _mm512_unpacklo_epi64(low_ab, low_cd));
    _mm512_storeu_si512(out + 16, _mm512_unpackhi_epi64(low_ab, low_cd));
    _mm512_storeu_si512(out + 32, _mm512_unpacklo_epi64(high_ab, high_cd));
    _mm512_storeu_si512(out + 48, _mm512_unpackhi_epi64(high_ab, high_cd));
  }
  template <int COUNT>
  static PHILOX_HOST_DEVICE void to_half(const float* values, uint16_t* out) {
    for (int i = 0; i < COUNT; i += width) {
      const __m256i halves = _mm512_cvtps_ph(_mm512_loadu_ps(values + i), _MM_FROUND_TO_NEAREST_INT);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), halves);
    }
  }
};

}  // namespace
const Kernels avx512_kernels = kernels<Lanes>();
}  // namespace mmgen_kernels::philox
