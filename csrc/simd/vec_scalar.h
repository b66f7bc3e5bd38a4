// Four floats in plain C++: runs anywhere, and compilers turn it into SSE2 or NEON.
#pragma once

#include <cstdint>

namespace mmgen_kernels::simd {

struct VecScalar {
  static constexpr int width = 4;
  float lane[width];

  static VecScalar load(const float* p) { return {{p[0], p[1], p[2], p[3]}}; }
  static VecScalar broadcast(float x) { return {{x, x, x, x}}; }
  void store(float* p) const {
    for (int i = 0; i < width; ++i) p[i] = lane[i];
  }
};

inline VecScalar fmadd(VecScalar a, VecScalar b, VecScalar c) {
  for (int i = 0; i < VecScalar::width; ++i) c.lane[i] += a.lane[i] * b.lane[i];
  return c;
}
inline VecScalar add(VecScalar a, VecScalar b) {
  for (int i = 0; i < VecScalar::width; ++i) a.lane[i] += b.lane[i];
  return a;
}
inline VecScalar min(VecScalar a, VecScalar b) {
  for (int i = 0; i < VecScalar::width; ++i) a.lane[i] = b.lane[i] < a.lane[i] ? b.lane[i] : a.lane[i];
  return a;
}
// Bit i: a[i] <= b[i].
inline uint32_t less_equal(VecScalar a, VecScalar b) {
  uint32_t bits = 0;
  for (int i = 0; i < VecScalar::width; ++i) bits |= uint32_t(a.lane[i] <= b.lane[i]) << i;
  return bits;
}

}  // namespace mmgen_kernels::simd
