// The inner loops of qk_norm_rope, written once over GCC's vectors; each qk_norm_rope_<instruction set>.cpp instantiates them.
#pragma once

#include <cmath>
#include <type_traits>
#include <utility>

#include "attn/qk_norm_rope_tables.h"
#include "floats.h"
#include "simd/storage.h"

namespace mmgen_kernels::attn::rope {
namespace {  // internal linkage: compiled once per instruction set, and the copies must not be merged

using simd::Bf16;
using simd::Fp16;

#define ALWAYS_INLINE __attribute__((always_inline))

// What is left at the end of a span, as a whole vector that begins earlier: all lanes but the last `fresh` were there before. To copy
// a number of bytes that only a register knows would be a call.
template <class Lanes>
struct Again : simd::Whole<Lanes> {
  using Vec = typename Lanes::Vec;
  using Real = typename Lanes::Real;
  int64_t fresh;

  explicit Again(int64_t fresh) : fresh(fresh) {}
  Vec only(Vec v) const {
    Vec lane;
    for (int i = 0; i < Lanes::width; ++i) lane[i] = static_cast<Real>(i);
    return lane < static_cast<Real>(Lanes::width - fresh) ? Vec{} : v;
  }
};

// f(place, d, chain) for each vector of the channels [begin, end). Sums are kept in four chains, so that none waits for its last
// addition; which chain a channel belongs to depends on its place in the span alone.
constexpr int chains = 4;
template <class Lanes, class F>
ALWAYS_INLINE inline void sweep(int64_t begin, int64_t end, const F& f) {
  constexpr int64_t W = Lanes::width;
  int64_t d = begin;
  for (; d + chains * W <= end; d += chains * W) {
    f(simd::Whole<Lanes>{}, d, std::integral_constant<int, 0>{});
    f(simd::Whole<Lanes>{}, d + W, std::integral_constant<int, 1>{});
    f(simd::Whole<Lanes>{}, d + 2 * W, std::integral_constant<int, 2>{});
    f(simd::Whole<Lanes>{}, d + 3 * W, std::integral_constant<int, 3>{});
  }
  for (; d + W <= end; d += W) f(simd::Whole<Lanes>{}, d, std::integral_constant<int, 0>{});
  if (d == end) return;
  if (end - begin >= W) f(Again<Lanes>(end - d), end - W, std::integral_constant<int, 1>{});
  else f(simd::Part<Lanes>{end - d}, d, std::integral_constant<int, 1>{});
}

template <class Lanes>
struct Loops {
  using Real = typename Lanes::Real;
  using Vec = typename Lanes::Vec;
  using Sums = Vec[chains];

  template <class T, class Place>
  ALWAYS_INLINE static Vec load(const Place& place, const T* p) {
    return simd::load<Lanes, T>(place, p);
  }
  template <class T, class Place>
  ALWAYS_INLINE static void store(const Place& place, T* p, Vec v) {
    simd::store<Lanes, T>(place, p, v);
  }
  static double total(const Sums& sums) { return Lanes::sum((sums[0] + sums[1]) + (sums[2] + sums[3])); }

  template <size_t... I>
  ALWAYS_INLINE static Vec swapped(Vec v, std::index_sequence<I...>) {
    return __builtin_shufflevector(v, v, (I ^ 1)...);
  }
  // Each channel's partner where pairs are neighbours.
  ALWAYS_INLINE static Vec swapped(Vec v) { return swapped(v, std::make_index_sequence<Lanes::width>{}); }

  template <class T>
  static void widen(const void* row, int64_t dim, Real* out) {
    sweep<Lanes>(0, dim, [&](const auto& place, int64_t d, auto) ALWAYS_INLINE {
      store(place, out + d, load(place, static_cast<const T*>(row) + d));
    });
  }
  template <class T>
  static void narrow(const Real* row, int64_t dim, void* out) {
    sweep<Lanes>(0, dim, [&](const auto& place, int64_t d, auto) ALWAYS_INLINE {
      store(place, static_cast<T*>(out) + d, load(place, row + d));
    });
  }

  // Each of half a vector's lanes twice, from lane `begin` on.
  template <int begin, size_t... I>
  ALWAYS_INLINE static Vec doubled(Vec v, std::index_sequence<I...>) {
    return __builtin_shufflevector(v, v, (begin + I / 2)...);
  }
  static Vec alternating(Real even, Real odd) {
    Vec v;
    for (int i = 0; i < Lanes::width; ++i) v[i] = i % 2 ? odd : even;
    return v;
  }

  template <class T>
  static void angles(const void* cos, const void* sin, int64_t pairs, bool interleaved, bool back, Real* out_cos, Real* out_sin) {
    const Real sign = back ? -1 : 1;
    if (interleaved) {
      each_twice<T>(cos, pairs, alternating(1, 1), out_cos);
      each_twice<T>(sin, pairs, alternating(-sign, sign), out_sin);
    } else {
      widen<T>(cos, pairs, out_cos);
      sweep<Lanes>(0, pairs, [&](const auto& place, int64_t i, auto) ALWAYS_INLINE {
        store(place, out_sin + i, load(place, static_cast<const T*>(sin) + i) * sign);
      });
    }
  }
  template <class T>
  ALWAYS_INLINE static void each_twice(const void* row, int64_t pairs, Vec factor, Real* out) {
    constexpr int W = Lanes::width;
    const auto lanes = std::make_index_sequence<W>{};
    const T* from = static_cast<const T*>(row);
    int64_t i = 0;
    for (; i + W <= pairs; i += W) {
      const Vec v = load(simd::Whole<Lanes>{}, from + i);
      store(simd::Whole<Lanes>{}, out + 2 * i, doubled<0>(v, lanes) * factor);
      store(simd::Whole<Lanes>{}, out + 2 * i + W, doubled<W / 2>(v, lanes) * factor);
    }
    if (i == pairs) return;
    const simd::Part<Lanes> rest{pairs - i};
    Real last[W];
    store(simd::Whole<Lanes>{}, last, load(rest, from + i));
    for (int64_t j = 0; j < 2 * rest.count; ++j) out[2 * i + j] = last[j / 2] * factor[j % 2];
  }

  // then(place, d, chain, v) for each vector v of a row of channels load(place, d), turned.
  template <class Load, class Then>
  ALWAYS_INLINE static void turn(const Heads<Real>& h, const Load& load_row, const Then& then) {
    const int64_t turned = 2 * h.pairs;
    if (h.interleaved) {
      sweep<Lanes>(0, turned, [&](const auto& place, int64_t d, auto chain) ALWAYS_INLINE {
        const Vec v = load_row(place, d);
        then(place, d, chain, Lanes::fmadd(v, load(place, h.cos + d), swapped(v) * load(place, h.sin + d)));
      });
    } else {
      sweep<Lanes>(0, h.pairs, [&](const auto& place, int64_t i, auto chain) ALWAYS_INLINE {
        const Vec a = load_row(place, i), b = load_row(place, i + h.pairs);
        const Vec c = load(place, h.cos + i), s = load(place, h.sin + i);
        then(place, i, chain, Lanes::fmadd(a, c, -(b * s)));
        then(place, i + h.pairs, chain, Lanes::fmadd(b, c, a * s));
      });
    }
    sweep<Lanes>(turned, h.dim, [&](const auto& place, int64_t d, auto chain) ALWAYS_INLINE {
      then(place, d, chain, load_row(place, d));
    });
  }

  // (x - about) rstd + below is a channel normalised. The mean is `about` and a rest, as it has too few digits where it is large.
  struct Standard {
    Vec about{}, rstd = Lanes::broadcast(1), below = Lanes::broadcast(Real(-0.0));  // x + -0 is x, and x + 0 is not where x is -0
    ALWAYS_INLINE Vec operator()(Vec x) const { return Lanes::fmadd(x - about, rstd, below); }
  };

  // Of the heads [first, last) as one row.
  template <class T>
  ALWAYS_INLINE static Standard standard(const Heads<Real>& h, int64_t first, int64_t last) {
    Standard s;
    if (h.norm == Norm::none) return s;
    const double count = static_cast<double>((last - first) * h.dim);
    double rest = 0, squares;
    if (h.norm == Norm::layer) {
      Sums sums{};
      for (int64_t i = first; i < last; ++i)
        sweep<Lanes>(0, h.dim, [&](const auto& place, int64_t d, auto chain) ALWAYS_INLINE {
          sums[chain] += place.only(load(place, row<T>(h.x, h.x_stride, i) + d));
        });
      s.about = Lanes::broadcast(static_cast<Real>(total(sums) / count));
      Sums first_moment{}, second_moment{};
      for (int64_t i = first; i < last; ++i)
        sweep<Lanes>(0, h.dim, [&](const auto& place, int64_t d, auto chain) ALWAYS_INLINE {
          const Vec v = place.only(load(place, row<T>(h.x, h.x_stride, i) + d) - s.about);
          first_moment[chain] += v;
          second_moment[chain] = Lanes::fmadd(v, v, second_moment[chain]);
        });
      rest = total(first_moment) / count;
      squares = total(second_moment) / count - rest * rest;  // NaN stays NaN
      squares = squares < 0 ? 0 : squares;
    } else {
      Sums sums{};
      for (int64_t i = first; i < last; ++i)
        sweep<Lanes>(0, h.dim, [&](const auto& place, int64_t d, auto chain) ALWAYS_INLINE {
          const Vec v = place.only(load(place, row<T>(h.x, h.x_stride, i) + d));
          sums[chain] = Lanes::fmadd(v, v, sums[chain]);
        });
      squares = total(sums) / count;
    }
    const double rstd = 1 / std::sqrt(squares + h.eps);
    s.rstd = Lanes::broadcast(static_cast<Real>(rstd));
    s.below = Lanes::broadcast(static_cast<Real>(-rest * static_cast<Real>(rstd)));
    return s;
  }

  template <class T>
  ALWAYS_INLINE static const T* row(const char* data, int64_t stride, int64_t head) {
    return reinterpret_cast<const T*>(data + head * stride);
  }

  template <class T>
  static void forward(const Heads<Real>& h) {
    Standard s;
    if (h.across) s = standard<T>(h, 0, h.count);
    for (int64_t i = 0; i < h.count; ++i) {
      if (!h.across) s = standard<T>(h, i, i + 1);
      const T* x = row<T>(h.x, h.x_stride, i);
      const Real *weight = h.weight + i * h.affine_stride, *bias = h.bias + i * h.affine_stride;
      T* out = reinterpret_cast<T*>(h.out + i * h.out_stride);
      const auto normed = [&](const auto& place, int64_t d) ALWAYS_INLINE {
        return Lanes::fmadd(s(load(place, x + d)), load(place, weight + d), load(place, bias + d));
      };
      turn(h, normed, [&](const auto& place, int64_t d, auto, Vec v) ALWAYS_INLINE { store(place, out + d, v); });
    }
  }

  // With n the normalised row, u the gradient turned back and g = u weight: dx = rstd (g - n mean(g n) - mean(g)), the last for
  // "layer"; sum_weight += u n, sum_bias += u.
  template <class T>
  static void backward(const Heads<Real>& h) {
    if (!h.across) {
      for (int64_t i = 0; i < h.count; ++i) {
        const Standard s = standard<T>(h, i, i + 1);
        Sums of_g{}, of_product{};
        spread<T>(h, i, s, h.held, of_g, of_product);
        finish<T>(h, i, s, h.held, of_g, of_product, h.dim);
      }
      return;
    }
    const Standard s = standard<T>(h, 0, h.count);
    Sums of_g{}, of_product{};
    for (int64_t i = 0; i < h.count; ++i) spread<T>(h, i, s, h.held + i * h.dim, of_g, of_product);
    for (int64_t i = 0; i < h.count; ++i) finish<T>(h, i, s, h.held + i * h.dim, of_g, of_product, h.count * h.dim);
  }

  template <class T>
  ALWAYS_INLINE static void spread(const Heads<Real>& h, int64_t i, const Standard& s, Real* held, Sums& of_g, Sums& of_product) {
    const T *x = row<T>(h.x, h.x_stride, i), *grad = row<T>(h.grad, h.grad_stride, i);
    const Real* weight = h.weight + i * h.affine_stride;
    Real *sum_weight = h.sum_weight + i * h.affine_stride, *sum_bias = h.sum_bias + i * h.affine_stride;
    const auto upstream = [&](const auto& place, int64_t d) ALWAYS_INLINE { return load(place, grad + d); };
    turn(h, upstream, [&](const auto& place, int64_t d, auto chain, Vec u) ALWAYS_INLINE {
      const Vec n = s(load(place, x + d)), g = u * load(place, weight + d);
      store(place, held + d, g);
      store(place, sum_weight + d, load(place, sum_weight + d) + place.only(u * n));
      store(place, sum_bias + d, load(place, sum_bias + d) + place.only(u));
      of_g[chain] += place.only(g);
      of_product[chain] += place.only(g * n);
    });
  }

  template <class T>
  ALWAYS_INLINE static void finish(const Heads<Real>& h, int64_t i, const Standard& s, const Real* held, const Sums& of_g,
                                   const Sums& of_product, int64_t dim) {
    const T* x = row<T>(h.x, h.x_stride, i);
    T* out = reinterpret_cast<T*>(h.out + i * h.out_stride);
    const Vec mean = Lanes::broadcast(static_cast<Real>(h.norm == Norm::layer ? total(of_g) / dim : 0));
    const Vec along = Lanes::broadcast(static_cast<Real>(-total(of_product) / dim));
    sweep<Lanes>(0, h.dim, [&](const auto& place, int64_t d, auto) ALWAYS_INLINE {
      store(place, out + d, Lanes::fmadd(s(load(place, x + d)), along, load(place, held + d) - mean) * s.rstd);
    });
  }

  static void collect(Real* row, int64_t dim, double* sum) {
    for (int64_t d = 0; d < dim; ++d) sum[d] += row[d], row[d] = 0;
  }
};

// One instantiation per dtype, in the order of csrc/floats.h. OF_X: x is fp64 only where the computation is.
#define BY_DTYPE(function) OF_X(function, double)
#define OF_X(function, Fp64) \
  {Of::template function<Fp64>, Of::template function<float>, Of::template function<Bf16>, Of::template function<Fp16>}

template <class Lanes>
constexpr Kernels<typename Lanes::Real> kernels() {
  using Of = Loops<Lanes>;
  using Real = typename Lanes::Real;
  return {.widen = BY_DTYPE(widen),
          .narrow = BY_DTYPE(narrow),
          .angles = BY_DTYPE(angles),
          .forward = OF_X(forward, Real),
          .backward = OF_X(backward, Real),
          .collect = Of::collect};
}

}  // namespace
}  // namespace mmgen_kernels::attn::rope
