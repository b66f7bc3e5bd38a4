// The inner loops of the family, written once over GCC's vectors; each modulation_<instruction set>.cpp instantiates them.
#pragma once

#include <type_traits>

#include "floats.h"
#include "modulation/tables.h"
#include "simd/storage.h"

namespace mmgen_kernels::modulation {
namespace {  // internal linkage: compiled once per instruction set, and the copies must not be merged

using simd::Bf16;
using simd::Fp16;
using simd::Storage;

#define ALWAYS_INLINE __attribute__((always_inline))

// f(place, d, chain) for each vector of a row. Sums are kept in four chains, so that none waits for its last addition; which
// chain a channel belongs to depends on its place in the row alone.
constexpr int chains = 4;
template <class Lanes, class F>
ALWAYS_INLINE inline void sweep(int64_t dim, const F& f) {
  constexpr int64_t W = Lanes::width;
  int64_t d = 0;
  for (; d + chains * W <= dim; d += chains * W) {
    f(simd::Whole<Lanes>{}, d, std::integral_constant<int, 0>{});
    f(simd::Whole<Lanes>{}, d + W, std::integral_constant<int, 1>{});
    f(simd::Whole<Lanes>{}, d + 2 * W, std::integral_constant<int, 2>{});
    f(simd::Whole<Lanes>{}, d + 3 * W, std::integral_constant<int, 3>{});
  }
  for (; d + W <= dim; d += W) f(simd::Whole<Lanes>{}, d, std::integral_constant<int, 0>{});
  if (d < dim) f(simd::Part<Lanes>{dim - d}, d, std::integral_constant<int, 1>{});
}

template <class Lanes>
struct Loops {
  using Real = typename Lanes::Real;
  using Vec = typename Lanes::Vec;

  template <class T, class Place>
  ALWAYS_INLINE static Vec load(const Place& place, const T* p) {
    return simd::load<Lanes, T>(place, p);
  }
  template <class T, class Place>
  ALWAYS_INLINE static void store(const Place& place, T* p, Vec v) {
    simd::store<Lanes, T>(place, p, v);
  }

  // Pairs of chains, then pairs of lanes in fp64: one after the other, 64 additions would take as long as the loop before them.
  static double total(const Vec (&sums)[chains]) {
    static_assert(chains == 4);
    return Lanes::sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
  }

  template <class T>
  static double widen(const void* row, int64_t dim, Real* out) {
    Vec sums[chains] = {};
    sweep<Lanes>(dim, [&](const auto& place, int64_t d, auto chain) ALWAYS_INLINE {
      const Vec v = load(place, static_cast<const T*>(row) + d);
      store(place, out + d, v);
      sums[chain] += v;
    });
    return total(sums);
  }

  template <class T>
  ALWAYS_INLINE static void ask_for(const void* row, int64_t d) {
    __builtin_prefetch(static_cast<const T*>(row) + d);
  }

  template <class T, bool ONE_PLUS>
  static void widen_ahead(const void* row, int64_t dim, Real* out, const void* next) {
    sweep<Lanes>(dim, [&](const auto& place, int64_t d, auto) ALWAYS_INLINE {
      ask_for<T>(next, d);
      const Vec v = load(place, static_cast<const T*>(row) + d);
      store(place, out + d, ONE_PLUS ? v + 1 : v);
    });
  }

  template <class T>
  static void narrow(const Real* row, int64_t dim, void* out) {
    sweep<Lanes>(dim, [&](const auto& place, int64_t d, auto) ALWAYS_INLINE {
      store(place, static_cast<T*>(out) + d, load(place, row + d));
    });
  }

  static void add(const Real* row, int64_t dim, Real* out) {
    sweep<Lanes>(dim, [&](const auto& place, int64_t d, auto) ALWAYS_INLINE {
      store(place, out + d, load(place, out + d) + load(place, row + d));
    });
  }

  static void combine(const Real* one_plus, const Real* shift, const Real* weight, const Real* bias, int64_t dim, Real* factor,
                      Real* offset) {
    sweep<Lanes>(dim, [&](const auto& place, int64_t d, auto) ALWAYS_INLINE {
      const Vec one = load(place, one_plus + d);
      store(place, factor + d, one * load(place, weight + d));
      store(place, offset + d, Lanes::fmadd(one, load(place, bias + d), load(place, shift + d)));
    });
  }

  static typename Lanes::Wide less_one(typename Lanes::Wide x) {
    if constexpr (sizeof(Real) == sizeof(float)) return simd::exponential_less_one<Lanes>(x);
    for (int i = 0; i < Lanes::width; ++i) x[i] = std::expm1(x[i]);
    return x;
  }

  static void apply_gate(GateFn function, Real* gate, int64_t dim, Real* slope) {
    using Wide = typename Lanes::Wide;
    sweep<Lanes>(dim, [&](const auto& place, int64_t d, auto) ALWAYS_INLINE {
      const Wide g = __builtin_convertvector(load(place, gate + d), Wide);
      Wide value, derivative;
      if (function == GateFn::tanh) {
        const Wide magnitude = g < 0 ? -g : g, e = less_one(magnitude > 40 ? Wide{} - 80 : -2 * magnitude);  // e^-2|g| - 1
        value = (g < 0 ? e : -e) / (e + 2);
        derivative = 1 - value * value;
      } else {
        const Wide limited = g > 700 ? Wide{} + 700 : g, e = less_one((limited < -699 ? Wide{} - 699 : limited) - 1);
        value = 1 / (e + 2);
        derivative = value * value - value;
      }
      store(place, gate + d, __builtin_convertvector(value, Vec));
      store(place, slope + d, __builtin_convertvector(derivative, Vec));
    });
  }

  template <class T, class Y>
  static double add_gated(const void* x, const Y* y, const Real* gate, int64_t dim, void* residual, Real* out, const char* next_x,
                          const char* next_y) {
    Vec sums[chains] = {};
    const auto each = [&](auto gated) ALWAYS_INLINE {
      sweep<Lanes>(dim, [&](const auto& place, int64_t d, auto chain) ALWAYS_INLINE {
        __builtin_prefetch(next_x + d * int64_t{sizeof(T)});
        __builtin_prefetch(next_y + d * int64_t{sizeof(Y)});
        const Vec of_x = load(place, static_cast<const T*>(x) + d), of_y = load(place, y + d);
        const auto packed = Storage<Lanes, T>::pack(gated ? Lanes::fmadd(load(place, gate + d), of_y, of_x) : of_x + of_y);
        place.write(static_cast<T*>(residual) + d, packed);
        const Vec rounded = Storage<Lanes, T>::unpack(packed);
        store(place, out + d, rounded);
        sums[chain] += rounded;
      });
    };
    if (gate) each(std::true_type{});
    else each(std::false_type{});
    return total(sums);
  }
  template <class T>
  static double add_gated_same(const void* x, const void* y, const Real* gate, int64_t dim, void* residual, Real* out,
                               const char* next_x, const char* next_y) {
    return add_gated<T, T>(x, static_cast<const T*>(y), gate, dim, residual, out, next_x, next_y);
  }

  static Moments moments(const Real* row, Real about, int64_t dim, const char* next, int64_t next_bytes) {
    Vec first[chains] = {}, second[chains] = {};
    sweep<Lanes>(dim, [&](const auto& place, int64_t d, auto chain) ALWAYS_INLINE {
      __builtin_prefetch(next + d * next_bytes);
      const Vec v = place.only(load(place, row + d) - about);
      first[chain] += v;
      second[chain] = Lanes::fmadd(v, v, second[chain]);
    });
    return {total(first), total(second)};
  }

  template <class T>
  static void modulate(const Real* row, Real about, Real mean, Real rstd, const Real* factor, const Real* offset, int64_t dim,
                       void* out, const char* next, int64_t next_bytes) {
    const Vec slope = Lanes::broadcast(rstd), below = Lanes::broadcast(-mean * rstd);
    sweep<Lanes>(dim, [&](const auto& place, int64_t d, auto) ALWAYS_INLINE {
      __builtin_prefetch(next + d * next_bytes);
      const Vec normed = Lanes::fmadd(load(place, row + d) - about, slope, below);
      store(place, static_cast<T*>(out) + d, Lanes::fmadd(normed, load(place, factor + d), load(place, offset + d)));
    });
  }

  template <class T>
  static void normalize(const void* row, Real mean, Real rstd, int64_t dim, Real* normed, const void* next) {
    sweep<Lanes>(dim, [&](const auto& place, int64_t d, auto) ALWAYS_INLINE {
      ask_for<T>(next, d);
      store(place, normed + d, (load(place, static_cast<const T*>(row) + d) - mean) * rstd);
    });
  }

  template <class T, bool FIRST>
  static Moments output_gradient(const void* upstream, const Real* normed, const Real* factor, int64_t dim, Real* grad,
                                 Real* sum_shift, Real* sum_scale, const void* next) {
    Vec first[chains] = {}, second[chains] = {};
    sweep<Lanes>(dim, [&](const auto& place, int64_t d, auto chain) ALWAYS_INLINE {
      ask_for<T>(next, d);
      const Vec u = load(place, static_cast<const T*>(upstream) + d), n = load(place, normed + d);
      const Vec g = u * load(place, factor + d);
      store(place, grad + d, FIRST ? g : load(place, grad + d) + g);
      store(place, sum_shift + d, load(place, sum_shift + d) + u);
      store(place, sum_scale + d, Lanes::fmadd(u, n, load(place, sum_scale + d)));
      first[chain] += g;
      second[chain] = Lanes::fmadd(g, n, second[chain]);
    });
    return {total(first), total(second)};
  }

  template <class T, bool UPSTREAM, class Place>
  ALWAYS_INLINE static Vec of_norm(const Place& place, int64_t d, const void* upstream, const Real* normed, Real rstd, Moments mean,
                                   const Real* grad) {
    const Vec centred = load(place, grad + d) - Real(mean.first);
    const Vec g = Lanes::fmadd(load(place, normed + d), Lanes::broadcast(Real(-mean.second)), centred);
    if constexpr (UPSTREAM) return Lanes::fmadd(g, Lanes::broadcast(rstd), load(place, static_cast<const T*>(upstream) + d));
    else return g * rstd;
  }

  template <class T>
  static void norm_gradient(const void* upstream, const Real* normed, Real rstd, Moments mean, int64_t dim, Real* grad,
                            void* grad_x) {
    const auto each = [&](auto has_upstream) ALWAYS_INLINE {
      sweep<Lanes>(dim, [&](const auto& place, int64_t d, auto) ALWAYS_INLINE {
        const Vec g = of_norm<T, has_upstream>(place, d, upstream, normed, rstd, mean, grad);
        store(place, grad + d, g);
        store(place, static_cast<T*>(grad_x) + d, g);
      });
    };
    if (upstream) each(std::true_type{});
    else each(std::false_type{});
  }

  template <class T>
  static void norm_and_gate_gradient(const void* upstream, const Real* normed, Real rstd, Moments mean, const void* y,
                                     const Real* gate, int64_t dim, const Real* grad, void* grad_x, void* grad_y, Real* sum_gate,
                                     const void* next_upstream, const void* next_y) {
    const auto each = [&](auto has_upstream, auto gated) ALWAYS_INLINE {
      sweep<Lanes>(dim, [&](const auto& place, int64_t d, auto) ALWAYS_INLINE {
        if constexpr (has_upstream) ask_for<T>(next_upstream, d);
        ask_for<T>(next_y, d);
        const Vec g = of_norm<T, has_upstream>(place, d, upstream, normed, rstd, mean, grad);
        store(place, static_cast<T*>(grad_x) + d, g);
        store(place, static_cast<T*>(grad_y) + d, gated ? g * load(place, gate + d) : g);
        store(place, sum_gate + d, Lanes::fmadd(g, load(place, static_cast<const T*>(y) + d), load(place, sum_gate + d)));
      });
    };
    if (upstream && gate) each(std::true_type{}, std::true_type{});
    else if (upstream) each(std::true_type{}, std::false_type{});
    else if (gate) each(std::false_type{}, std::true_type{});
    else each(std::false_type{}, std::false_type{});
  }

  template <class T>
  static void gate_gradient(const void* upstream, const void* y, const Real* gate, int64_t dim, void* grad_y, Real* sum_gate,
                            const void* next_upstream, const void* next_y) {
    sweep<Lanes>(dim, [&](const auto& place, int64_t d, auto) ALWAYS_INLINE {
      ask_for<T>(next_upstream, d);
      ask_for<T>(next_y, d);
      const Vec g = load(place, static_cast<const T*>(upstream) + d);
      store(place, static_cast<T*>(grad_y) + d, gate ? g * load(place, gate + d) : g);
      store(place, sum_gate + d, Lanes::fmadd(g, load(place, static_cast<const T*>(y) + d), load(place, sum_gate + d)));
    });
  }

  static Moments post_gradient(const Real* upstream, const Real* normed, const Real* gate, const Real* weight, int64_t dim,
                               Real* grad, Real* sum_gate) {
    Vec first[chains] = {}, second[chains] = {};
    sweep<Lanes>(dim, [&](const auto& place, int64_t d, auto chain) ALWAYS_INLINE {
      const Vec u = load(place, upstream + d), n = load(place, normed + d);
      const Vec g = u * (gate ? load(place, gate + d) * load(place, weight + d) : load(place, weight + d));
      store(place, grad + d, g);
      store(place, sum_gate + d, Lanes::fmadd(u, n, load(place, sum_gate + d)));
      first[chain] += g;
      second[chain] = Lanes::fmadd(g, n, second[chain]);
    });
    return {total(first), total(second)};
  }

  static void collect(const Real* a, const Real* factor, const Real* b, const Real* other, int64_t dim, double* sum) {
    using Wide = typename Lanes::Wide;
    sweep<Lanes>(dim, [&](const auto& place, int64_t d, auto) ALWAYS_INLINE {
      Wide added = __builtin_convertvector(load(place, a + d), Wide);
      if (factor) added *= __builtin_convertvector(load(place, factor + d), Wide);
      if (b) added += __builtin_convertvector(load(place, b + d), Wide) * __builtin_convertvector(load(place, other + d), Wide);
      Wide before;
      const size_t bytes = std::is_same_v<std::decay_t<decltype(place)>, simd::Whole<Lanes>> ? sizeof before : (dim - d) * sizeof(double);
      std::memcpy(&before, sum + d, bytes);
      before += added;
      std::memcpy(sum + d, &before, bytes);
    });
  }
};

// One instantiation per dtype, in the order of csrc/floats.h. OF_X: x is fp64 only where the computation is, and needs no loop else.
#define BY_DTYPE(function, ...) OF_X(function, double __VA_OPT__(, ) __VA_ARGS__)
#define OF_X(function, Fp64, ...)                                                                                          \
  {Of::template function<Fp64 __VA_OPT__(, ) __VA_ARGS__>, Of::template function<float __VA_OPT__(, ) __VA_ARGS__>,        \
   Of::template function<Bf16 __VA_OPT__(, ) __VA_ARGS__>, Of::template function<Fp16 __VA_OPT__(, ) __VA_ARGS__>}

template <class Lanes>
constexpr Kernels<typename Lanes::Real> kernels() {
  using Of = Loops<Lanes>;
  using Real = typename Lanes::Real;
  return {.widen = BY_DTYPE(widen),
          .widen_vector = BY_DTYPE(widen_ahead, false),
          .widen_one_plus = BY_DTYPE(widen_ahead, true),
          .narrow = BY_DTYPE(narrow),
          .add = Of::add,
          .combine = Of::combine,
          .apply_gate = Of::apply_gate,
          .add_gated = OF_X(add_gated_same, Real),
          .add_gated_wide = OF_X(add_gated, Real, Real),
          .moments = Of::moments,
          .modulate = BY_DTYPE(modulate),
          .normalize = BY_DTYPE(normalize),
          .output_gradient = BY_DTYPE(output_gradient, true),
          .second_output_gradient = BY_DTYPE(output_gradient, false),
          .norm_gradient = BY_DTYPE(norm_gradient),
          .norm_and_gate_gradient = OF_X(norm_and_gate_gradient, Real),
          .gate_gradient = OF_X(gate_gradient, Real),
          .post_gradient = Of::post_gradient,
          .collect = Of::collect};
}

}  // namespace
}  // namespace mmgen_kernels::modulation
