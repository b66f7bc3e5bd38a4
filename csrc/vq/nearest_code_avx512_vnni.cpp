// The pass in 16-bit integers with AVX-512 VNNI.
#include "simd/vec_avx512.h"
#include "vq/int16_pass.h"

namespace mmgen_kernels::vq {
namespace {

// Sixteen sums of 32 bits, or pairs of 16.
struct Int {
  static constexpr int width = 16;
  __m512i v;

  static Int load(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
  static Int broadcast(int32_t x) { return {_mm512_set1_epi32(x)}; }
  // out = self * unit; lowest = min(lowest, that)
  void store_scaled(float unit, float* out, float* lowest) const {
    const __m512 scores = _mm512_mul_ps(_mm512_cvtepi32_ps(v), _mm512_set1_ps(unit));
    _mm512_storeu_ps(out, scores);
    _mm512_storeu_ps(lowest, _mm512_min_ps(scores, _mm512_loadu_ps(lowest)));
  }
};
// Written out: for _mm512_dpwssd_epi32, g++ 12 keeps a copy of every sum on the stack.
inline Int add_products(Int a, Int b, Int sum) {
  asm("vpdpwssd %2, %1, %0" : "+v"(sum.v) : "v"(a.v), "v"(b.v));
  return sum;
}
inline Int min(Int a, Int b) { return {_mm512_min_epi32(a.v, b.v)}; }

}  // namespace

const Kernels avx512_vnni_kernels = int16_kernels<simd::VecAvx512, Int, 3, 9>("avx512_vnni");

}  // namespace mmgen_kernels::vq
