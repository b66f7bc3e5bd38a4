// The loops of tables.h, written once over vectors; each schedule_<instruction set>.cpp instantiates them.
#pragma once

#if defined(__AVX__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <utility>

#include "schedule/tables.h"
#include "simd/rows.h"

namespace mmgen_kernels::schedule {
namespace {  // internal linkage: compiled once per instruction set

using simd::each_vector;
using simd::load;
using simd::store;

#if defined(__AVX__)
// A whole vector whose memory is not read first to be written.
template <class Lanes>
struct Streamed : simd::Whole<Lanes> {
  template <class T>
  static void write(T* p, typename simd::Storage<Lanes, T>::Packed v) {
    void* const to = static_cast<void*>(p);
#if defined(__AVX512F__)
    if constexpr (sizeof v == 64) return _mm512_stream_si512(static_cast<__m512i*>(to), (__m512i)v);
#endif
    if constexpr (sizeof v == 32) return _mm256_stream_si256(static_cast<__m256i*>(to), (__m256i)v);
    if constexpr (sizeof v == 16) return _mm_stream_si128(static_cast<__m128i*>(to), (__m128i)v);
    std::memcpy(to, &v, sizeof v);
  }
};
#endif

// `VECTORS` vectors of each input from element i on. PLAIN: there is neither guidance, nor a derived value, nor a stream's noise.
template <class Lanes, class T, int INPUTS, int VECTORS, bool PLAIN, class Place>
inline __attribute__((always_inline)) void combine_at(const Place& place, const Combination<typename Lanes::Real>& c,
                                                      const T* const (&in)[INPUTS], const typename Lanes::Real* noise,
                                                      void* const (&out)[max_outputs], int64_t i) {
  using Vec = typename Lanes::Vec;
  using C = Combination<typename Lanes::Real>;
  Vec x[INPUTS][VECTORS], z[VECTORS], d[VECTORS];
#pragma GCC unroll 8
  for (int j = 0; j < INPUTS; ++j)
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) x[j][v] = load<Lanes>(place, in[j] + i + v * Lanes::width);

  const auto add = [&](int k, int j, const Vec(&terms)[VECTORS], Vec(&sum)[VECTORS]) __attribute__((always_inline)) {
    if (!(c.present[k] >> j & 1)) return;
    const Vec factor = Lanes::broadcast(c.factor[k][j]);
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) sum[v] = Lanes::fmadd(factor, terms[v], sum[v]);
  };
  const auto add_inputs = [&](int k, Vec(&sum)[VECTORS]) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) sum[v] = Vec{};
#pragma GCC unroll 8
    for (int j = 0; j < INPUTS; ++j) add(k, j, x[j], sum);
    if constexpr (!PLAIN) add(k, C::noise, z, sum);
  };

  if constexpr (!PLAIN) {
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) {
      z[v] = noise ? load<Lanes>(place, noise + i + v * Lanes::width) : Vec{};
      d[v] = Vec{};
      const Vec u = x[INPUTS - 1][v];
      if (c.guides) x[0][v] = Lanes::fmadd(Lanes::broadcast(c.scale), x[0][v] - u, u);
    }
    if (c.derives) {
      add_inputs(0, d);
      const Vec high = Lanes::broadcast(c.bound), low = Lanes::broadcast(-c.bound), divisor = Lanes::broadcast(c.divisor);
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) {
        d[v] = d[v] > high ? high : d[v];  // NaN stays
        d[v] = d[v] < low ? low : d[v];
        if (c.divides) d[v] = d[v] / divisor;
      }
    }
  }
#pragma GCC unroll 3
  for (int k = 1; k <= max_outputs; ++k) {
    if (k > c.outputs) break;
    Vec sum[VECTORS];
    add_inputs(k, sum);
    if constexpr (!PLAIN) add(k, C::derived, d, sum);
    const auto write = [&](auto* to) __attribute__((always_inline)) {
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) store<Lanes>(place, to + i + v * Lanes::width, sum[v]);
    };
    if (c.wide >> (k - 1) & 1) write(static_cast<typename Lanes::Real*>(out[k - 1]));
    else write(static_cast<T*>(out[k - 1]));
  }
}

// Vectors at once: what the registers hold beside noise, derived, a sum and a factor.
template <class Lanes, int INPUTS>
constexpr int unrolled = std::clamp(Lanes::registers / (INPUTS + 4), 1, 4);

template <class Lanes, class T, int INPUTS, bool PLAIN, class Place = simd::Whole<Lanes>>
void combine_as(const Combination<typename Lanes::Real>& c, const T* const (&in)[INPUTS], const typename Lanes::Real* noise,
                void* const (&out)[max_outputs], int64_t count) {
  constexpr int vectors = unrolled<Lanes, INPUTS>, step = vectors * Lanes::width;
  int64_t i = 0;
  for (; i + step <= count; i += step) combine_at<Lanes, T, INPUTS, vectors, PLAIN>(Place{}, c, in, noise, out, i);
  for (; i + Lanes::width <= count; i += Lanes::width)
    combine_at<Lanes, T, INPUTS, 1, PLAIN>(simd::Whole<Lanes>{}, c, in, noise, out, i);
  if (i < count) combine_at<Lanes, T, INPUTS, 1, PLAIN>(simd::Part<Lanes>{count - i}, c, in, noise, out, i);
}

template <class Lanes, class T, int INPUTS>
void combine(const Combination<typename Lanes::Real>& given, const void* const* inputs, const typename Lanes::Real* noise,
             void* const* outputs, int64_t count) {
  const auto c = given;  // its own: what is stored cannot change it
  const T* in[INPUTS];
  void* out[max_outputs] = {};
  for (int j = 0; j < INPUTS; ++j) in[j] = static_cast<const T*>(inputs[j]);
  for (int k = 0; k < c.outputs; ++k) out[k] = outputs[k];
  if (noise || c.derives || c.guides) return combine_as<Lanes, T, INPUTS, false>(c, in, noise, out, count);
#if defined(__AVX__)
  // Lines of which an iteration writes a part are slower streamed: 5 inputs and 3 results in bf16 took 1.8 times as long.
  constexpr bool whole_lines = unrolled<Lanes, INPUTS> * sizeof(typename simd::Storage<Lanes, T>::Packed) % 64 == 0;
  if constexpr (whole_lines)
    if (c.streams) return combine_as<Lanes, T, INPUTS, true, Streamed<Lanes>>(c, in, noise, out, count);
#endif
  combine_as<Lanes, T, INPUTS, true>(c, in, noise, out, count);
}

template <class Lanes, class T>
void widen(const void* row, int64_t count, typename Lanes::Real* out) {
  each_vector<Lanes>(count, [&](const auto& place, int64_t i) {
    store<Lanes>(place, out + i, load<Lanes>(place, static_cast<const T*>(row) + i));
  });
}

template <class Lanes, class T>
void narrow(const typename Lanes::Real* row, int64_t count, void* out) {
  each_vector<Lanes>(count, [&](const auto& place, int64_t i) {
    store<Lanes>(place, static_cast<T*>(out) + i, load<Lanes>(place, row + i));
  });
}

template <class Lanes>
void spread(const typename Lanes::Real* v, typename Lanes::Real middle, typename Lanes::Real slope, int64_t count,
            typename Lanes::Real* z) {
  each_vector<Lanes>(count, [&](const auto& place, int64_t i) {
    const auto exponent = Lanes::fmadd(Lanes::broadcast(slope), load<Lanes>(place, v + i), Lanes::broadcast(middle));
    store<Lanes>(place, z + i, load<Lanes>(place, z + i) * simd::exponential<Lanes>(exponent));
  });
}

template <class Lanes>
Sums guided_sums(const typename Lanes::Real* conditional, typename Lanes::Real* unconditional, typename Lanes::Real scale,
                 int64_t count) {
  using Wide = typename Lanes::Wide;
  Wide sum[4] = {};
  each_vector<Lanes>(count, [&](const auto& place, int64_t i) {
    const auto a = load<Lanes>(place, conditional + i), u = load<Lanes>(place, unconditional + i);
    const auto b = place.only(Lanes::fmadd(Lanes::broadcast(scale), a - u, u));
    store<Lanes>(place, unconditional + i, b);
    const Wide wide_a = __builtin_convertvector(a, Wide), wide_b = __builtin_convertvector(b, Wide);
    sum[0] += wide_a, sum[1] += wide_a * wide_a, sum[2] += wide_b, sum[3] += wide_b * wide_b;
  });
  Sums sums;
  double* const total[4] = {&sums.first, &sums.first_squares, &sums.second, &sums.second_squares};
  for (int s = 0; s < 4; ++s)
    for (int l = 0; l < Lanes::width; ++l) *total[s] += sum[s][l];
  return sums;
}

template <class Lanes, class T, size_t... I>
constexpr void fill(Kernels<typename Lanes::Real>& k, int dtype, std::index_sequence<I...>) {
  // what is computed in double is fp64 or mixed, and what is mixed is widened first
  constexpr bool computed_in = (sizeof(T) == sizeof(double)) == (sizeof(typename Lanes::Real) == sizeof(double));
  if constexpr (computed_in) ((k.combine[dtype][I] = combine<Lanes, T, I + 1>), ...);
  k.widen[dtype] = widen<Lanes, T>;
  k.narrow[dtype] = narrow<Lanes, T>;
}

template <class Lanes>
constexpr Kernels<typename Lanes::Real> kernels() {
  Kernels<typename Lanes::Real> k{};
  constexpr auto inputs = std::make_index_sequence<max_inputs>();
  fill<Lanes, double>(k, 0, inputs);  // csrc/floats.h
  fill<Lanes, float>(k, 1, inputs);
  fill<Lanes, simd::Bf16>(k, 2, inputs);
  fill<Lanes, simd::Fp16>(k, 3, inputs);
  k.spread = spread<Lanes>;
  k.guided_sums = guided_sums<Lanes>;
  return k;
}

}  // namespace
}  // namespace mmgen_kernels::schedule
