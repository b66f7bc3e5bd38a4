// Some floats in plain C++: runs anywhere, and compilers turn it into SSE2 or NEON.
#pragma once

#include <cstdint>

namespace mmgen_kernels::simd {

template <int WIDTH>
struct Scalar {
  static constexpr int width = WIDTH;
  float lane[width];

  static Scalar load(const float* p) {
    Scalar out;
    for (int i = 0; i < width; ++i) out.lane[i] = p[i];
    return out;
  }
  static Scalar broadcast(float x) {
    Scalar out;
    for (float& lane : out.lane) lane = x;
    return out;
  }
  void store(float* p) const {
    for (int i = 0; i < width; ++i) p[i] = lane[i];
  }
};

using VecScalar = Scalar<4>;

template <int W>
inline Scalar<W> fmadd(Scalar<W> a, Scalar<W> b, Scalar<W> c) {
  for (int i = 0; i < W; ++i) c.lane[i] += a.lane[i] * b.lane[i];
  return c;
}
template <int W>
inline Scalar<W> add(Scalar<W> a, Scalar<W> b) {
  for (int i = 0; i < W; ++i) a.lane[i] += b.lane[i];
  return a;
}
template <int W>
inline Scalar<W> min(Scalar<W> a, Scalar<W> b) {
  for (int i = 0; i < W; ++i) a.lane[i] = b.lane[i] < a.lane[i] ? b.lane[i] : a.lane[i];
  return a;
}
// Bit i: a[i] <= b[i].
template <int W>
inline uint32_t less_equal(Scalar<W> a, Scalar<W> b) {
  uint32_t bits = 0;
  for (int i = 0; i < W; ++i) bits |= uint32_t(a.lane[i] <= b.lane[i]) << i;
  return bits;
}

}  // namespace mmgen_kernels::simd
