// Vectors of one instruction set, written once over GCC's vector types, and the exponential of them.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

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
  // In fp64 its lower half added to its upper one, and two of those as a vector.
  typedef double HalfWide __attribute__((vector_size(width * sizeof(double) / 2)));
  static HalfWide halved(Vec v) { return halved(v, std::make_integer_sequence<int, width / 2>()); }
  static HalfWide add_products(Vec a, Vec b, HalfWide sum) {
    const Wide products = __builtin_convertvector(a, Wide) * __builtin_convertvector(b, Wide);
    return sum + halved(products, std::make_integer_sequence<int, width / 2>());
  }
  static Vec narrow(HalfWide low, HalfWide high) { return narrow(low, high, std::make_integer_sequence<int, width>()); }
  static Vec broadcast(T x) { return x - Vec{}; }  // and not x + 0, which has no -0

 private:
  template <class V, int... LANE>
  static HalfWide halved(V v, std::integer_sequence<int, LANE...>) {
    return __builtin_convertvector(__builtin_shufflevector(v, v, LANE...), HalfWide) +
           __builtin_convertvector(__builtin_shufflevector(v, v, (LANE + width / 2)...), HalfWide);
  }
  template <int... LANE>
  static Vec narrow(HalfWide low, HalfWide high, std::integer_sequence<int, LANE...>) {
    return __builtin_convertvector(__builtin_shufflevector(low, high, LANE...), Vec);
  }
};

// q of e^r = 1 + r + r^2 q(r) for |r| <= ln 2 / 2, highest power first: a minimax polynomial, 0.06 of 2^-24 off.
constexpr float rest_of_exponential[] = {0x1.6a23cep-10f, 0x1.123a2p-7f, 0x1.5558f2p-5f, 0x1.555492p-3f, 0x1.fffffcp-2f};

// e^x within 1 ulp for x <= 88; larger x count as 88.37. Below the smallest normal number the result is 0. NaN stays NaN.
// x = n ln 2 + r with |r| <= ln 2 / 2. Of N vectors at a time, step by step: one waits 50 cycles for its own steps, and a
// processor does not look far enough ahead to find those of the next.
template <class Lanes, int N>
__attribute__((always_inline)) inline void exponentials(typename Lanes::Vec* x) {
  using Vec = typename Lanes::Vec;
  if constexpr (sizeof(typename Lanes::Real) == sizeof(double)) {
    for (int v = 0; v < N; ++v) {
      Vec y = x[v];
      for (int i = 0; i < Lanes::width; ++i) y[i] = std::exp(y[i]);
      x[v] = y;
    }
  } else {
    using Bits = typename Lanes::Bits;
    const auto all = [](float value) { return Lanes::broadcast(value); };
    constexpr float to_integer = 0x1.8p23f;  // a sum with it has its units in the last bits
    constexpr float ln2_high = 0x1.63p-1f, ln2_low = -0x1.bd0106p-13f;  // n ln2_high is exact
    Vec limited[N], shifted[N], r[N], value[N], power[N];
#define EACH _Pragma("GCC unroll 8") for (int v = 0; v < N; ++v)
    const Vec highest = all(88.37f);
    EACH limited[v] = highest < x[v] ? highest : x[v];
    EACH shifted[v] = Lanes::fmadd(limited[v], all(0x1.715476p0f), all(to_integer));
    EACH value[v] = shifted[v] - to_integer;  // n
    EACH r[v] = Lanes::fmadd(value[v], all(-ln2_high), limited[v]);
    EACH r[v] = Lanes::fmadd(value[v], all(-ln2_low), r[v]);
    EACH value[v] = all(rest_of_exponential[0]);
#pragma GCC unroll 4
    for (int power = 1; power < 5; ++power)
      EACH value[v] = Lanes::fmadd(r[v], value[v], all(rest_of_exponential[power]));
    EACH {
      Bits exponent;
      std::memcpy(&exponent, &shifted[v], sizeof exponent);
      exponent = (exponent + 127) << 23;  // n + 127; the bits of to_integer fall off the end
      std::memcpy(&power[v], &exponent, sizeof exponent);
    }
    EACH value[v] = Lanes::fmadd(r[v] * r[v], value[v], r[v]);
    EACH value[v] = (value[v] + 1.0f) * power[v];
    EACH x[v] = x[v] < -87.33654f ? Vec{} : value[v];
#undef EACH
  }
}
template <class Lanes>
typename Lanes::Vec exponential(typename Lanes::Vec x) {
  exponentials<Lanes, 1>(&x);
  return x;
}

// e^x - 1 for |x| <= 700 with an error of 2^-28 of the result, small x included: what is made of it rounds to fp32 once.
template <class Lanes>
typename Lanes::Wide exponential_less_one(typename Lanes::Wide x) {
  using Wide = typename Lanes::Wide;
  typedef int64_t Bits __attribute__((vector_size(sizeof(Wide))));
  constexpr double to_integer = 0x1.8p52;
  const Wide shifted = x * 0x1.71547652b82fep0 + to_integer, n = shifted - to_integer, r = x - n * 0x1.62e42fefa39efp-1;
  Wide q = rest_of_exponential[0] - Wide{};
  for (int power = 1; power < 5; ++power) q = r * q + rest_of_exponential[power];
  const Wide rest = r + r * r * q;
  const Wide power = (Wide)(((Bits)shifted + 1023) << 52);
  return power * rest + (power - 1);
}

}  // namespace
}  // namespace mmgen_kernels::simd
