// The loops of discrete_loss_tables.h, written once over vectors; each discrete_loss_<instruction set>.cpp instantiates them.
#pragma once

#include <algorithm>
#include <limits>

#include "schedule/discrete_loss_tables.h"
#include "schedule/discrete_tables.h"
#include "simd/elementary.h"
#include "simd/exchange.h"
#include "simd/storage.h"

namespace mmgen_kernels::schedule::discrete {
namespace {  // internal linkage: compiled once per instruction set

constexpr int at_once = 4;  // vectors, which hide each other's latencies and are added up in pairs before they go into fp64

template <class Lanes>
typename Lanes::Real largest(const typename Lanes::Real* w, int64_t count) {
  using Real = typename Lanes::Real;
  using Vec = typename Lanes::Vec;
  Vec most[at_once];
  for (Vec& m : most) m = Lanes::broadcast(-std::numeric_limits<Real>::infinity());
  for (int64_t k = 0; k < count; k += at_once * Lanes::width)
#pragma GCC unroll 4
    for (int v = 0; v < at_once; ++v) {
      const Vec x = Lanes::load(w + k + v * Lanes::width);
      most[v] = x > most[v] ? x : most[v];
    }
  Real found = most[0][0];
  for (const Vec& m : most)
    for (int i = 0; i < Lanes::width; ++i) found = std::max<Real>(found, m[i]);
  return found;
}

// e^(w - largest) of four vectors.
template <class Lanes>
inline __attribute__((always_inline)) void exponentials_at(const typename Lanes::Real* w, typename Lanes::Vec highest,
                                                           typename Lanes::Vec* e) {
#pragma GCC unroll 4
  for (int v = 0; v < at_once; ++v) e[v] = Lanes::load(w + v * Lanes::width) - highest;  // NaN where the largest is infinite
  simd::exponentials<Lanes, at_once>(e);
}

template <class Lanes>
double total_of(typename Lanes::Wide sum) {
  double total = 0;
  for (int i = 0; i < Lanes::width; ++i) total += sum[i];
  return total;
}

template <class Lanes>
double exponentials(typename Lanes::Real* w, int64_t count, typename Lanes::Real largest) {
  using Vec = typename Lanes::Vec;
  const Vec highest = Lanes::broadcast(largest);
  typename Lanes::Wide sum{};
  for (int64_t k = 0; k < count; k += at_once * Lanes::width) {
    Vec e[at_once];
    exponentials_at<Lanes>(w + k, highest, e);
#pragma GCC unroll 4
    for (int v = 0; v < at_once; ++v) Lanes::store(w + k + v * Lanes::width, e[v]);
    Lanes::add((e[0] + e[1]) + (e[2] + e[3]), sum);
  }
  return total_of<Lanes>(sum);
}

template <class Lanes>
BentSums sums(const typename Lanes::Real* e, int64_t count, typename Lanes::Real rise) {
  using Vec = typename Lanes::Vec;
  const Vec slope = Lanes::broadcast(rise);
  typename Lanes::Wide logarithms{}, turned{};
  for (int64_t k = 0; k < count; k += at_once * Lanes::width) {
    Vec logarithm[at_once], turn[at_once];
#pragma GCC unroll 4
    for (int v = 0; v < at_once; ++v) {
      const Vec p = Lanes::load(e + k + v * Lanes::width), u = slope * p, w = 1 + u, inverse = 1 / w;
      logarithm[v] = Lanes::fmadd(u - (w - 1), inverse, simd::logarithm<Lanes>(w));  // what 1 + u has lost of a small u
      turn[v] = p * (u * inverse);
    }
    Lanes::add((logarithm[0] + logarithm[1]) + (logarithm[2] + logarithm[3]), logarithms);
    Lanes::add((turn[0] + turn[1]) + (turn[2] + turn[3]), turned);
  }
  return {total_of<Lanes>(logarithms), total_of<Lanes>(turned)};
}

template <class Lanes, bool BENT>
void slopes_of(typename Lanes::Real* w, int64_t count, typename Lanes::Real largest, typename Lanes::Real rise,
               typename Lanes::Real even, typename Lanes::Real bent) {
  using Vec = typename Lanes::Vec;
  const Vec highest = Lanes::broadcast(largest), slope = Lanes::broadcast(rise), level = Lanes::broadcast(even),
            bend = Lanes::broadcast(bent);
  for (int64_t k = 0; k < count; k += at_once * Lanes::width) {
    Vec e[at_once];
    exponentials_at<Lanes>(w + k, highest, e);
#pragma GCC unroll 4
    for (int v = 0; v < at_once; ++v) {
      Vec factor = level;
      if constexpr (BENT) {
        const Vec u = slope * e[v];
        factor = Lanes::fmadd(bend, u / (1 + u), level);
      }
      Lanes::store(w + k + v * Lanes::width, e[v] * factor);
    }
  }
}

template <class Lanes>
void slopes(typename Lanes::Real* w, int64_t count, typename Lanes::Real largest, typename Lanes::Real rise,
            typename Lanes::Real even, typename Lanes::Real bent) {
  if (bent == 0) slopes_of<Lanes, false>(w, count, largest, rise, even, bent);
  else slopes_of<Lanes, true>(w, count, largest, rise, even, bent);
}

template <class Lanes, class T>
void scatter(const typename Lanes::Real* from, int64_t stride, int64_t rows, int64_t count, void* base, int64_t along) {
  using Vec = typename Lanes::Vec;
  constexpr int W = Lanes::width;
  auto* const out = static_cast<T*>(base);
  int64_t k = 0;
  if (rows == W)
    for (; k + W <= count; k += W) {
      Vec tile[W];
#pragma GCC unroll 16
      for (int r = 0; r < W; ++r) tile[r] = Lanes::load(from + r * stride + k);
      simd::transpose(tile);
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) simd::store<Lanes>(simd::Whole<Lanes>{}, out + (k + i) * along, tile[i]);
    }
  for (; k < count; ++k)
    for (int64_t r = 0; r < rows; ++r)
      simd::store<Lanes>(simd::Part<Lanes>{1}, out + k * along + r, Lanes::broadcast(from[r * stride + k]));
}

template <class Lanes>
constexpr LossKernels<typename Lanes::Real> loss_kernels() {
  static_assert(row_step % (at_once * Lanes::width) == 0);
  return {largest<Lanes>,
          exponentials<Lanes>,
          sums<Lanes>,
          slopes<Lanes>,
          {scatter<Lanes, double>, scatter<Lanes, float>, scatter<Lanes, simd::Bf16>, scatter<Lanes, simd::Fp16>}};
}

}  // namespace
}  // namespace mmgen_kernels::schedule::discrete
