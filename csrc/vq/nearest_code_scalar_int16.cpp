// The pass in 16-bit integers in plain C++, for tests on any machine.
#include "simd/vec_scalar.h"
#include "vq/int16_pass.h"

namespace mmgen_kernels::vq {
namespace {

struct Int {
  static constexpr int width = 4;
  int32_t lane[width];

  static Int load(const int32_t* p) { return {{p[0], p[1], p[2], p[3]}}; }
  static Int broadcast(int32_t x) { return {{x, x, x, x}}; }
  // out = self * unit; lowest = min(lowest, that)
  void store_scaled(float unit, float* out, float* lowest) const {
    for (int i = 0; i < width; ++i) {
      out[i] = static_cast<float>(lane[i]) * unit;
      lowest[i] = std::min(lowest[i], out[i]);
    }
  }
};
inline Int add_products(Int a, Int b, Int sum) {
  for (int i = 0; i < Int::width; ++i)
    sum.lane[i] += int16_t(a.lane[i]) * int16_t(b.lane[i]) + (a.lane[i] >> 16) * (b.lane[i] >> 16);
  return sum;
}
inline Int min(Int a, Int b) {
  for (int i = 0; i < Int::width; ++i) a.lane[i] = std::min(a.lane[i], b.lane[i]);
  return a;
}

}  // namespace

const Kernels scalar_int16_kernels = int16_kernels<simd::VecScalar, Int, 2, 4>("scalar_int16");

}  // namespace mmgen_kernels::vq
