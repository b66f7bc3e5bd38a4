// Some 32-bit sums, or pairs of 16-bit integers, in plain C++.
#pragma once

#include <algorithm>
#include <cstdint>

namespace mmgen_kernels::simd {

template <int WIDTH>
struct IntScalar {
  static constexpr int width = WIDTH;
  int32_t lane[width];

  static IntScalar load(const int32_t* p) {
    IntScalar out;
    std::copy_n(p, width, out.lane);
    return out;
  }
  static IntScalar broadcast(int32_t x) {
    IntScalar out;
    for (int32_t& lane : out.lane) lane = x;
    return out;
  }
  // out = self * unit; lowest = min(lowest, that)
  void store_scaled(float unit, float* out, float* lowest) const {
    for (int i = 0; i < width; ++i) {
      out[i] = static_cast<float>(lane[i]) * unit;
      lowest[i] = std::min(lowest[i], out[i]);
    }
  }
};

// sum + the products of the pairs of a and b
template <int W>
inline IntScalar<W> add_products(IntScalar<W> a, IntScalar<W> b, IntScalar<W> sum) {
  for (int i = 0; i < W; ++i)
    sum.lane[i] += int16_t(a.lane[i]) * int16_t(b.lane[i]) + (a.lane[i] >> 16) * (b.lane[i] >> 16);
  return sum;
}
template <int W>
inline IntScalar<W> min(IntScalar<W> a, IntScalar<W> b) {
  for (int i = 0; i < W; ++i) a.lane[i] = std::min(a.lane[i], b.lane[i]);
  return a;
}

}  // namespace mmgen_kernels::simd
