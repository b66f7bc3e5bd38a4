// Vectors of one instruction set, written once over GCC's vector types, and the exponential of them.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace mmgen_kernels::simd {
namespace {  // internal linkage: compiled once per instruction set, and the copies must not be merged

template <class T, int BYTES>
struct Vectors {
  using Real = T;
  typedef T Vec __attribute__((vector_size(BYTES)));  // `using` loses the attribute of a dependent type
  typedef int32_t Bits __attribute__((vector_size(BYTES)));
  static constexpr int width = BYTES / sizeof(T);
  typedef double Wide __attribute__((vector_size(width * sizeof(double))));

  static Vec load(const T* p) {
    Vec v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
  static void store(T* p, Vec v) { std::memcpy(p, &v, sizeof v); }
  static void add(Vec v, Wide& sum) { sum += __builtin_convertvector(v, Wide); }
  static double sum(Vec v) {
    double lane[width];
    for (int i = 0; i < width; ++i) lane[i] = v[i];
    for (int half = width / 2; half > 0; half /= 2)
      for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
    return lane[0];
  }
  static Vec broadcast(T x) { return x - Vec{}; }  // and not x + 0, which has no -0
};

// e^x = 2^n (1 + p) for x <= 88, where n ln 2 is nearest to x; larger x count as 88.37. NaN stays NaN.
// With r = x - n ln 2, |r| <= ln 2 / 2, p = r + r^2 q(r): q is a minimax polynomial, 0.06 of 2^-24 off.
template <class Lanes>
struct PowerAndRest {
  using Vec = typename Lanes::Vec;
  Vec power, rest;

  explicit PowerAndRest(Vec x) {
    using Bits = typename Lanes::Bits;
    const auto all = [](float value) { return Lanes::broadcast(value); };
    constexpr float to_integer = 0x1.8p23f;  // a sum with it has its units in the last bits
    constexpr float ln2_high = 0x1.63p-1f, ln2_low = -0x1.bd0106p-13f;  // n ln2_high is exact
    const Vec limited = x > 88.37f ? all(88.37f) : x;
    const Vec shifted = Lanes::fmadd(limited, all(0x1.715476p0f), all(to_integer));
    const Vec n = shifted - to_integer;
    const Vec r = Lanes::fmadd(n, all(-ln2_low), Lanes::fmadd(n, all(-ln2_high), limited));
    Vec q = Lanes::fmadd(r, all(0x1.6a23cep-10f), all(0x1.123a2p-7f));
    q = Lanes::fmadd(r, q, all(0x1.5558f2p-5f));
    q = Lanes::fmadd(r, q, all(0x1.555492p-3f));
    q = Lanes::fmadd(r, q, all(0x1.fffffcp-2f));
    rest = Lanes::fmadd(r * r, q, r);
    Bits exponent;
    std::memcpy(&exponent, &shifted, sizeof exponent);
    exponent = (exponent + 127) << 23;  // n + 127; the bits of to_integer fall off the end
    std::memcpy(&power, &exponent, sizeof power);
  }
};

// e^x within 1 ulp. Below the smallest normal number the result is 0.
template <class Lanes>
typename Lanes::Vec exponential(typename Lanes::Vec x) {
  if constexpr (sizeof(typename Lanes::Real) == sizeof(double)) {
    for (int i = 0; i < Lanes::width; ++i) x[i] = std::exp(x[i]);
    return x;
  } else {
    const PowerAndRest<Lanes> e(x);
    return x < -87.33654f ? typename Lanes::Vec{} : (e.rest + 1.0f) * e.power;
  }
}

// Within 3 ulp, small x included: e^-2|x| - 1 is not made from e^-2|x|.
template <class Lanes>
typename Lanes::Vec hyperbolic_tangent(typename Lanes::Vec x) {
  using Vec = typename Lanes::Vec;
  if constexpr (sizeof(typename Lanes::Real) == sizeof(double)) {
    for (int i = 0; i < Lanes::width; ++i) x[i] = std::tanh(x[i]);
    return x;
  } else {
    const Vec doubled = -2 * (x < 0 ? -x : x), limited = doubled < -40.0f ? Lanes::broadcast(-40.0f) : doubled;
    const PowerAndRest<Lanes> e(limited);
    const Vec less_one = Lanes::fmadd(e.power, e.rest, e.power - 1);
    const Vec magnitude = -less_one / (less_one + 2);
    return x < 0 ? -magnitude : magnitude;
  }
}

}  // namespace
}  // namespace mmgen_kernels::simd
