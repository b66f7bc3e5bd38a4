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

// q of e^r = 1 + r + r^2 q(r) for |r| <= ln 2 / 2: a minimax polynomial, 0.06 of 2^-24 off.
template <class Lanes, class V>
V rest_of_exponential(V r) {
  const auto step = [&](V q, float next) {
    if constexpr (sizeof(V) == sizeof(typename Lanes::Vec)) return Lanes::fmadd(r, q, Lanes::broadcast(next));
    else return r * q + next;
  };
  V q = step(0x1.6a23cep-10f - V{}, 0x1.123a2p-7f);
  q = step(q, 0x1.5558f2p-5f);
  q = step(q, 0x1.555492p-3f);
  return step(q, 0x1.fffffcp-2f);
}

// e^x within 1 ulp for x <= 88; larger x count as 88.37. Below the smallest normal number the result is 0. NaN stays NaN.
// x = n ln 2 + r with |r| <= ln 2 / 2.
template <class Lanes>
typename Lanes::Vec exponential(typename Lanes::Vec x) {
  using Vec = typename Lanes::Vec;
  if constexpr (sizeof(typename Lanes::Real) == sizeof(double)) {
    for (int i = 0; i < Lanes::width; ++i) x[i] = std::exp(x[i]);
    return x;
  } else {
    using Bits = typename Lanes::Bits;
    const auto all = [](float value) { return Lanes::broadcast(value); };
    constexpr float to_integer = 0x1.8p23f;  // a sum with it has its units in the last bits
    constexpr float ln2_high = 0x1.63p-1f, ln2_low = -0x1.bd0106p-13f;  // n ln2_high is exact
    const Vec limited = x > 88.37f ? all(88.37f) : x;
    const Vec shifted = Lanes::fmadd(limited, all(0x1.715476p0f), all(to_integer));
    const Vec n = shifted - to_integer;
    const Vec r = Lanes::fmadd(n, all(-ln2_low), Lanes::fmadd(n, all(-ln2_high), limited));
    const Vec value = Lanes::fmadd(r * r, rest_of_exponential<Lanes>(r), r) + 1.0f;
    Bits exponent;
    std::memcpy(&exponent, &shifted, sizeof exponent);
    exponent = (exponent + 127) << 23;  // n + 127; the bits of to_integer fall off the end
    Vec power;
    std::memcpy(&power, &exponent, sizeof power);
    return x < -87.33654f ? Vec{} : value * power;
  }
}

// e^x - 1 for |x| <= 700 with an error of 2^-28 of the result, small x included: what is made of it rounds to fp32 once.
template <class Lanes>
typename Lanes::Wide exponential_less_one(typename Lanes::Wide x) {
  using Wide = typename Lanes::Wide;
  typedef int64_t Bits __attribute__((vector_size(sizeof(Wide))));
  constexpr double to_integer = 0x1.8p52;
  const Wide shifted = x * 0x1.71547652b82fep0 + to_integer, n = shifted - to_integer, r = x - n * 0x1.62e42fefa39efp-1;
  const Wide rest = r + r * r * rest_of_exponential<Lanes>(r);
  const Wide power = (Wide)(((Bits)shifted + 1023) << 52);
  return power * rest + (power - 1);
}

}  // namespace
}  // namespace mmgen_kernels::simd
