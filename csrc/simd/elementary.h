// Logarithms, and exponentials with what they are less one, of vectors.
#pragma once

#include "simd/vectors.h"

namespace mmgen_kernels::simd {
namespace {  // internal linkage: compiled once per instruction set, and the copies must not be merged

template <class Lanes, class F>
typename Lanes::Vec each_lane(typename Lanes::Vec v, const F& f) {
  typename Lanes::Real lane[Lanes::width];
  std::memcpy(lane, &v, sizeof v);
  for (auto& x : lane) x = f(x);
  std::memcpy(&v, lane, sizeof v);
  return v;
}

template <class Lanes>
typename Lanes::Vec square_root(typename Lanes::Vec v) {
  return each_lane<Lanes>(v, [](auto x) { return std::sqrt(x); });  // GCC makes one instruction of it
}

// e^x within 1 ulp, and e^x - 1 within 2 ulp, small x included. From 88.37 on both are infinite; below -87.33 e^x stays 2^-126.
// Of N vectors at a time, step by step, as exponentials() has it, and for the same reason.
template <class Lanes, int N = 1>
struct Exponential {
  using Vec = typename Lanes::Vec;
  Vec value[N], less_one[N];

  __attribute__((always_inline)) explicit Exponential(const Vec (&x)[N]) {
#define EACH _Pragma("GCC unroll 8") for (int v = 0; v < N; ++v)
    if constexpr (sizeof(typename Lanes::Real) == sizeof(double)) {
      EACH value[v] = each_lane<Lanes>(x[v], [](double y) { return std::exp(y); });
      EACH less_one[v] = each_lane<Lanes>(x[v], [](double y) { return std::expm1(y); });
    } else {  // e^x = 2^n (1 + rest)
      constexpr float to_integer = 0x1.8p23f, ln2_high = 0x1.63p-1f, ln2_low = -0x1.bd0106p-13f, lowest = -87.33654f;
      const auto all = [](float y) { return Lanes::broadcast(y); };
      Vec limited[N], shifted[N], r[N], rest[N], power[N];
      EACH limited[v] = x[v] > 88.37f ? all(89) : x[v];  // whose 2^n is infinite, and whose rest is above 0
      EACH limited[v] = lowest > limited[v] ? all(lowest) : limited[v];
      EACH shifted[v] = Lanes::fmadd(limited[v], all(0x1.715476p0f), all(to_integer));
      EACH rest[v] = shifted[v] - to_integer;  // n
      EACH r[v] = Lanes::fmadd(rest[v], all(-ln2_high), limited[v]);
      EACH r[v] = Lanes::fmadd(rest[v], all(-ln2_low), r[v]);
      EACH rest[v] = all(rest_of_exponential[0]);
#pragma GCC unroll 4
      for (int i = 1; i < 5; ++i) EACH rest[v] = Lanes::fmadd(r[v], rest[v], all(rest_of_exponential[i]));
      EACH rest[v] = Lanes::fmadd(r[v] * r[v], rest[v], r[v]);
      EACH {
        typename Lanes::Bits exponent;
        std::memcpy(&exponent, &shifted[v], sizeof exponent);
        exponent = (exponent + 127) << 23;
        std::memcpy(&power[v], &exponent, sizeof exponent);
      }
      EACH value[v] = (rest[v] + 1.0f) * power[v];
      EACH less_one[v] = Lanes::fmadd(power[v], rest[v], power[v] - 1.0f);
    }
#undef EACH
  }
};

// ln x of normal positive x within 1 ulp, or 2^-25 near 1. NaN stays NaN.
template <class Lanes>
typename Lanes::Vec logarithm(typename Lanes::Vec x) {
  using Vec = typename Lanes::Vec;
  if constexpr (sizeof(typename Lanes::Real) == sizeof(double)) {
    return each_lane<Lanes>(x, [](double v) { return std::log(v); });
  } else {  // x = 2^n (1 + f) with 1 + f between the roots of 1/2 and of 2; ln (1 + f) = 2 artanh(s)
    using Bits = typename Lanes::Bits;
    constexpr int32_t root = 0x3f3504f3;  // of 1/2
    constexpr float ln2_high = 0x1.63p-1f, ln2_low = -0x1.bd0106p-13f;
    Bits bits;
    std::memcpy(&bits, &x, sizeof bits);
    const Bits above = bits - root, mantissa = (above & 0x7fffff) + root;
    Vec f;
    std::memcpy(&f, &mantissa, sizeof f);
    f -= 1.0f;
    const Vec n = __builtin_convertvector(above >> 23, Vec), s = f / (f + 2.0f), t = s * s, half = 0.5f * f * f;
    Vec rest = Lanes::broadcast(2.0f / 9);
    for (const float c : {2.0f / 7, 2.0f / 5, 2.0f / 3}) rest = Lanes::fmadd(t, rest, Lanes::broadcast(c));
    rest = s * Lanes::fmadd(t, rest, half);  // so that ln (1 + f) = f - (half - rest), in which f is exact
    const Vec found = Lanes::fmadd(n, Lanes::broadcast(ln2_high), f - (half - Lanes::fmadd(n, Lanes::broadcast(ln2_low), rest)));
    return x == x ? found : x;
  }
}

}  // namespace
}  // namespace mmgen_kernels::simd
