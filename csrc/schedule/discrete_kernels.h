// The loops of discrete_tables.h, written once over vectors; each discrete_<instruction set>.cpp instantiates them.
#pragma once

#include <limits>

#include "schedule/discrete_tables.h"
#include "schedule/kernels.h"
#include "simd/exchange.h"

namespace mmgen_kernels::schedule::discrete {
namespace {  // internal linkage: compiled once per instruction set

template <class Lanes, class T>
void gather(const void* base, int64_t across, int64_t along, int64_t rows, int64_t count, typename Lanes::Real* out, int64_t stride) {
  using Vec = typename Lanes::Vec;
  constexpr int W = Lanes::width;
  const auto* from = static_cast<const T*>(base);
  int64_t k = 0;
  if (across == 1 && rows == W)
    for (; k + W <= count; k += W) {
      Vec tile[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) tile[i] = simd::load<Lanes>(simd::Whole<Lanes>{}, from + (k + i) * along);
      simd::transpose(tile);
#pragma GCC unroll 16
      for (int r = 0; r < W; ++r) Lanes::store(out + r * stride + k, tile[r]);
    }
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = k; i < count; ++i) out[r * stride + i] = simd::load<Lanes>(simd::Part<Lanes>{1}, from + r * across + i * along)[0];
}

template <class Lanes>
Softmax<typename Lanes::Real> exponentials(typename Lanes::Real* w, int64_t count, typename Lanes::Real scale) {
  using Real = typename Lanes::Real;
  using Vec = typename Lanes::Vec;
  constexpr int W = Lanes::width, N = 4;
  Vec most[N];
  for (Vec& m : most) m = Lanes::broadcast(-std::numeric_limits<Real>::infinity());
  for (int64_t k = 0; k < count; k += N * W)
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v) {
      const Vec x = Lanes::load(w + k + v * W);
      most[v] = x > most[v] ? x : most[v];
    }
  Real largest = most[0][0];
  for (const Vec& m : most)
    for (int i = 0; i < W; ++i) largest = std::max<Real>(largest, m[i]);

  const Vec highest = Lanes::broadcast(largest), factor = Lanes::broadcast(scale);
  typename Lanes::Wide sum{};
  for (int64_t k = 0; k < count; k += N * W) {
    Vec x[N];
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v) x[v] = (Lanes::load(w + k + v * W) - highest) * factor;  // NaN where the largest is infinite
    simd::exponentials<Lanes, N>(x);
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v) Lanes::store(w + k + v * W, x[v]);
    Lanes::add((x[0] + x[1]) + (x[2] + x[3]), sum);
  }
  double total = 0;
  for (int i = 0; i < W; ++i) total += sum[i];
  return {largest, total};
}

template <class Lanes>
Winner<typename Lanes::Real> race(const typename Lanes::Real* w, const typename Lanes::Real* e, int64_t count,
                                  typename Lanes::Real share, typename Lanes::Real even) {
  using Real = typename Lanes::Real;
  using Vec = typename Lanes::Vec;
  constexpr int W = Lanes::width, N = 2;  // two chains of comparisons, each of which waits for its last one
  constexpr Real least = -std::numeric_limits<Real>::infinity();
  const Vec slope = Lanes::broadcast(share), constant = Lanes::broadcast(even);
  Vec best[N], at[N];  // in which group of vectors: a whole number, exact below 2^24
  for (int v = 0; v < N; ++v) best[v] = Lanes::broadcast(least), at[v] = Vec{};
  Vec group{};
  for (int64_t k = 0; k < count; k += N * W, group = group + Real(1))
#pragma GCC unroll 2
    for (int v = 0; v < N; ++v) {
      const Vec score = Lanes::fmadd(slope, Lanes::load(w + k + v * W), constant) / Lanes::load(e + k + v * W);
      at[v] = score > best[v] ? group : at[v];
      best[v] = score > best[v] ? score : best[v];
    }
  Winner<Real> winner{least, 0};
  for (int v = 0; v < N; ++v)
    for (int i = 0; i < W; ++i) {
      const int64_t index = (static_cast<int64_t>(at[v][i]) * N + v) * W + i;
      if (best[v][i] > winner.score || (best[v][i] == winner.score && index < winner.index)) winner = {best[v][i], index};
    }
  return winner;
}

template <class Lanes>
constexpr Kernels<typename Lanes::Real> kernels() {
  static_assert(row_step % (4 * Lanes::width) == 0);
  return {Lanes::width,
          {widen<Lanes, double>, widen<Lanes, float>, widen<Lanes, simd::Bf16>, widen<Lanes, simd::Fp16>},
          {gather<Lanes, double>, gather<Lanes, float>, gather<Lanes, simd::Bf16>, gather<Lanes, simd::Fp16>},
          exponentials<Lanes>,
          race<Lanes>};
}

}  // namespace
}  // namespace mmgen_kernels::schedule::discrete
