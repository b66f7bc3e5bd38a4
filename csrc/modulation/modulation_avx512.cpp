#include <immintrin.h>

#include "modulation/kernels.h"

namespace mmgen_kernels::modulation {
namespace {

struct Lanes : simd::Vectors<float, 64> {
  using Half = simd::Words<width>::Half;
  static Vec fmadd(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
  static Vec from_half(Half h) { return _mm512_cvtph_ps((__m256i)h); }
  static Half to_half(Vec v) { return (Half)_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }
};

}  // namespace
const Kernels<float> avx512_kernels = kernels<Lanes>();
}  // namespace mmgen_kernels::modulation
