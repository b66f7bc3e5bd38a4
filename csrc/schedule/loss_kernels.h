// The loops of loss_tables.h, written once over vectors; each losses_<instruction set>.cpp instantiates them.
#pragma once

#include <type_traits>

#include "schedule/loss_tables.h"
#include "simd/elementary.h"
#include "simd/storage.h"

namespace mmgen_kernels::schedule {
namespace {  // internal linkage: compiled once per instruction set

using simd::load;
using simd::store;

template <class Lanes, class F>
inline __attribute__((always_inline)) void each_of(int64_t count, const F& f) {
  int64_t i = 0;
  for (; i + Lanes::width <= count; i += Lanes::width) f(simd::Whole<Lanes>{}, i);
  if (i < count) f(simd::Part<Lanes>{count - i}, i);
}

// The sums in fp64 of what f(place, i, first, second) adds to two vectors, which take in four elements a lane before that.
template <class Lanes, class F>
inline __attribute__((always_inline)) LossSums sums_of(int64_t count, const F& f) {
  using Vec = typename Lanes::Vec;
  constexpr int64_t step = 4 * Lanes::width;
  typename Lanes::HalfWide total[2] = {};
  int64_t i = 0;
  const auto add = [&](Vec first, Vec second) { total[0] += Lanes::halved(first), total[1] += Lanes::halved(second); };
  for (; i + step <= count; i += step) {
    Vec first{}, second{};
#pragma GCC unroll 4
    for (int64_t v = 0; v < step; v += Lanes::width) f(simd::Whole<Lanes>{}, i + v, first, second);
    add(first, second);
  }
  for (; i < count; i += Lanes::width) {
    Vec first{}, second{};
    if (i + Lanes::width <= count) {
      f(simd::Whole<Lanes>{}, i, first, second);
    } else {
      const simd::Part<Lanes> place{count - i};
      f(place, i, first, second);
      first = place.only(first), second = place.only(second);
    }
    add(first, second);
  }
  LossSums found;
  for (int l = 0; l < Lanes::width / 2; ++l) found.squares += total[0][l], found.terms += total[1][l];
  return found;
}

template <class Lanes>
typename Lanes::Vec magnitude(typename Lanes::Vec v) {
  return v < 0 ? -v : v;
}

// -- diffusion_loss ---------------------------------------------------------------------------------------------------

// Zero where an element is masked, whatever stands there.
template <class Lanes, class Place>
typename Lanes::Vec valid_only(const Place& place, const uint8_t* valid, int64_t i, typename Lanes::Vec v) {
  typedef uint8_t Bytes __attribute__((vector_size(Lanes::width)));
  if (!valid) return v;
  Bytes bytes{};
  if constexpr (std::is_same_v<Place, simd::Whole<Lanes>>) std::memcpy(&bytes, valid + i, Lanes::width);
  else std::memcpy(&bytes, valid + i, static_cast<size_t>(place.count));
  return __builtin_convertvector(bytes, typename Lanes::Vec) != 0 ? v : typename Lanes::Vec{};
}

// sqrt(d^2 + delta^2), whose squares do not overflow
template <class Lanes>
typename Lanes::Vec hypotenuse(typename Lanes::Vec size, typename Lanes::Vec delta) {
  const auto greater = size > delta ? size : delta, ratio = (size > delta ? delta : size) / greater;
  const auto found = greater * simd::square_root<Lanes>(Lanes::fmadd(ratio, ratio, Lanes::broadcast(1)));
  return size == size ? found : size;
}

template <class Lanes, class T, Loss LOSS>
double losses(const Difference<typename Lanes::Real>& given, const void* output, const void* target, const uint8_t* valid,
              int64_t count) {
  using Vec = typename Lanes::Vec;
  const Vec delta = Lanes::broadcast(given.delta);
  const auto add = [&](const auto& place, int64_t i, Vec& sum, Vec&) __attribute__((always_inline)) {
    const Vec d = load<Lanes>(place, static_cast<const T*>(output) + i) - load<Lanes>(place, static_cast<const T*>(target) + i);
    Vec rho;
    if constexpr (LOSS == Loss::mse) {
      rho = d * d;
    } else {
      const Vec size = magnitude<Lanes>(d);
      if constexpr (LOSS == Loss::pseudo_huber) {
        rho = size * (size / (hypotenuse<Lanes>(size, delta) + delta));
      } else {
        const Vec near = size > delta ? delta : size;
        rho = (LOSS == Loss::huber ? near : near / delta) * (size - near / 2);
      }
    }
    sum += valid_only<Lanes>(place, valid, i, rho);
  };
  return sums_of<Lanes>(count, add).squares;
}

template <class Lanes, class T, Loss LOSS>
void gradients(const Difference<typename Lanes::Real>& given, const void* output, const void* target, const uint8_t* valid,
               int64_t count, void* grad_output, void* grad_target) {
  using Vec = typename Lanes::Vec;
  const Vec delta = Lanes::broadcast(given.delta), slope = Lanes::broadcast(given.slope);
  each_of<Lanes>(count, [&](const auto& place, int64_t i) {
    const Vec d = load<Lanes>(place, static_cast<const T*>(output) + i) - load<Lanes>(place, static_cast<const T*>(target) + i);
    Vec by_d;
    if constexpr (LOSS == Loss::mse) {
      by_d = d + d;
    } else if constexpr (LOSS == Loss::pseudo_huber) {
      by_d = d / hypotenuse<Lanes>(magnitude<Lanes>(d), delta);
    } else {
      by_d = d > delta ? delta : d < -delta ? -delta : d;
      if constexpr (LOSS == Loss::smooth_l1) by_d = by_d / delta;
    }
    const Vec found = valid_only<Lanes>(place, valid, i, by_d * slope);
    if (grad_output) store<Lanes>(place, static_cast<T*>(grad_output) + i, found);
    if (grad_target) store<Lanes>(place, static_cast<T*>(grad_target) + i, -found);
  });
}

// -- hybrid_loss ------------------------------------------------------------------------------------------------------

// What the forward and the backward make of the inputs alike.
template <class Lanes>
struct Element {
  using Vec = typename Lanes::Vec;
  Vec difference, x0{}, v{};
  Vec apart;   // the true mean less the model's
  Vec moving;  // by how much that moves with a difference: factor, or 0 where the predicted data are clamped
};

template <class Lanes, class T, class Place>
inline __attribute__((always_inline)) Element<Lanes> element_at(const Place& place, const Term<typename Lanes::Real>& term,
                                                                const HybridRows& rows, int64_t i) {
  using Vec = typename Lanes::Vec;
  const auto row = [&](const void* of) { return load<Lanes>(place, static_cast<const T*>(of) + i); };
  Element<Lanes> e;
  Vec target{};
  if (rows.x0) e.x0 = row(rows.x0);
  if (term.data) target = Lanes::broadcast(term.of_data) * e.x0;
  if (term.noise) target = Lanes::fmadd(Lanes::broadcast(term.of_noise), row(rows.noise), target);
  e.difference = target - row(rows.prediction);
  if (term.learned) e.v = row(rows.v);
  e.moving = Lanes::broadcast(term.factor);
  e.apart = e.moving * e.difference;
  if (term.clamps) {
    const Vec bound = Lanes::broadcast(term.bound), predicted = e.x0 - Lanes::broadcast(term.ratio) * e.difference;
    const Vec limited = predicted > bound ? bound : predicted < -bound ? -bound : predicted;
    e.apart = Lanes::broadcast(term.share) * (e.x0 - limited);
    e.moving = limited == predicted ? e.moving : Vec{};
  }
  return e;
}

// Of a divergence: its value is half of less_one + gap + squares, with e^-gap = true variance / the model's.
template <class Lanes>
struct Divergence {
  using Vec = typename Lanes::Vec;
  Vec gap, less_one, squares, ratio;

  Divergence(const Term<typename Lanes::Real>& term, const Element<Lanes>& e)
      : gap(Lanes::fmadd(Lanes::broadcast(term.slope), e.v, Lanes::broadcast(term.gap))) {
    const simd::Exponential<Lanes> exponential(-gap);
    less_one = exponential.less_one, ratio = exponential.value;
    squares = ratio * (term.clamps ? e.apart * e.apart * Lanes::broadcast(term.precision)
                                   : e.difference * e.difference * Lanes::broadcast(term.squares));
  }
};

// Of the first step: the probability of x0's level, sigmoid(b) - sigmoid(a) = sigmoid(b) sigmoid(-a) (1 - e^(a - b)), of which
// every factor is exact in the tails. a and b are steep odd polynomials of the deviations of the level's ends.
template <class Lanes>
struct Decoder {
  using Vec = typename Lanes::Vec;
  using Real = typename Lanes::Real;
  static constexpr Real steepness = Real(1.5957691216057308), cubic = Real(0.044715);  // 2 sqrt(2 / pi)
  static constexpr Real half_level = Real(1) / 255, edge = Real(0.999), least = Real(1e-12);
  static constexpr Real far = 64;        // deviations: whatever is further off has the probability 0 or 1
  static constexpr Real sharpest = 27;   // below a deviation of e^-27 all of the probability is at one level
  Vec inverse, upper, lower, of_upper, of_lower, below, above, between, width;
  decltype(Vec{} < Vec{}) is_least, is_greatest;

  Decoder(const Term<Real>& term, const Element<Lanes>& e) {
    const auto all = [](Real v) { return Lanes::broadcast(v); };
    const auto limit = [&](Vec v, Real bound) { return v > bound ? all(bound) : v < -bound ? all(-bound) : v; };
    const Vec exponent = all(-Real(0.5)) * Lanes::fmadd(all(term.slope), e.v, all(term.middle));
    inverse = simd::Exponential<Lanes>(exponent > sharpest ? all(sharpest) : exponent).value;
    upper = limit((e.apart + half_level) * inverse, far), lower = limit((e.apart - half_level) * inverse, far);
    const Vec half = limit(inverse * half_level, far), ends = upper + lower;
    const auto logit = [&](Vec u) { return steepness * u * Lanes::fmadd(all(cubic) * u, u, all(1)); };
    width = steepness * 2 * half * (1 + cubic * (Real(0.75) * ends * ends + half * half));  // b - a
    of_upper = simd::Exponential<Lanes>(-logit(upper)).value, of_lower = simd::Exponential<Lanes>(logit(lower)).value;
    is_least = e.x0 < -edge, is_greatest = e.x0 > edge;
    below = is_greatest ? all(1) : 1 / (1 + of_upper);
    above = is_least ? all(1) : 1 / (1 + of_lower);
    between = (is_least | is_greatest) ? all(1) : -simd::Exponential<Lanes>(-width).less_one;
  }
  Vec probability() const { return below * above * between; }
  Vec negative_log() const {
    const Vec p = probability();
    return -simd::logarithm<Lanes>(p < least ? Lanes::broadcast(least) : p);
  }
  // The derivatives of negative_log by the means' distance and by the logarithm of the variance.
  void slopes(Vec& by_mean, Vec& by_log_variance) const {
    const Vec none{}, inner = (is_least | is_greatest) ? none : 1 / simd::Exponential<Lanes>(width).less_one;
    const auto of_logit = [&](Vec u) { return steepness * Lanes::fmadd(Lanes::broadcast(3 * cubic) * u, u, Lanes::broadcast(1)); };
    // 1 - sigmoid is taken from the exponential, not from 1
    const Vec by_upper = (is_greatest ? none : 1 / (1 + 1 / of_upper) + inner) * of_logit(upper);
    const Vec by_lower = (is_least ? none : 1 / (1 + 1 / of_lower) + inner) * of_logit(lower);
    const auto lost = probability() < least;
    by_mean = lost ? none : inverse * (by_lower - by_upper);
    by_log_variance = lost ? none : (by_upper * upper - by_lower * lower) * Real(0.5);
  }
};

template <class Lanes, class T, bool DECODES>
LossSums terms(const Term<typename Lanes::Real>& given, const HybridRows& rows, int64_t count) {
  using Vec = typename Lanes::Vec;
  const auto term = given;
  const auto add = [&](const auto& place, int64_t i, Vec& squares, Vec& sum) __attribute__((always_inline)) {
    const Element<Lanes> e = element_at<Lanes, T>(place, term, rows, i);
    squares = Lanes::fmadd(e.difference, e.difference, squares);
    if constexpr (DECODES) {
      sum += Decoder<Lanes>(term, e).negative_log();
    } else {
      const Divergence<Lanes> d(term, e);
      sum += d.less_one + d.gap + d.squares;
    }
  };
  LossSums found = sums_of<Lanes>(count, add);
  if (!DECODES) found.terms /= 2;
  return found;
}

template <class Lanes, class T, bool DECODES>
void term_gradients(const Term<typename Lanes::Real>& given, const HybridRows& rows, int64_t count) {
  using Vec = typename Lanes::Vec;
  using Real = typename Lanes::Real;
  const auto term = given;
  const Vec by_square = Lanes::broadcast(-2 * term.by_square), by_term = Lanes::broadcast(term.by_term);
  const Vec by_v = Lanes::broadcast((DECODES ? 1 : Real(-0.5)) * term.by_term * term.slope);
  each_of<Lanes>(count, [&](const auto& place, int64_t i) __attribute__((always_inline)) {
    const Element<Lanes> e = element_at<Lanes, T>(place, term, rows, i);
    Vec of_prediction = by_square * e.difference, of_v{};
    if (term.bounds) {
      Vec by_mean, by_log_variance;
      if constexpr (DECODES) {
        Decoder<Lanes>(term, e).slopes(by_mean, by_log_variance);
      } else {
        const Divergence<Lanes> d(term, e);
        by_log_variance = d.less_one + d.squares;  // of which by_v takes half
        by_mean = e.apart * d.ratio * Lanes::broadcast(term.precision);
      }
      of_v = by_v * by_log_variance;
      if (term.moves_mean) of_prediction -= by_term * e.moving * by_mean;
    }
    store<Lanes>(place, static_cast<T*>(rows.grad_prediction) + i, of_prediction);
    if (rows.grad_v) store<Lanes>(place, static_cast<T*>(rows.grad_v) + i, of_v);
  });
}

template <class Lanes, class T, Loss... LOSS>
constexpr void fill(LossKernels<typename Lanes::Real>& k, int dtype) {
  // what is computed in double is fp64 or mixed, and what is mixed is widened first
  constexpr bool computed_in = (sizeof(T) == sizeof(double)) == (sizeof(typename Lanes::Real) == sizeof(double));
  if constexpr (computed_in) {
    ((k.losses[static_cast<int>(LOSS)][dtype] = losses<Lanes, T, LOSS>), ...);
    ((k.gradients[static_cast<int>(LOSS)][dtype] = gradients<Lanes, T, LOSS>), ...);
    k.terms[0][dtype] = terms<Lanes, T, false>, k.terms[1][dtype] = terms<Lanes, T, true>;
    k.term_gradients[0][dtype] = term_gradients<Lanes, T, false>, k.term_gradients[1][dtype] = term_gradients<Lanes, T, true>;
  }
}

template <class Lanes>
constexpr LossKernels<typename Lanes::Real> loss_kernels() {
  LossKernels<typename Lanes::Real> k{};
  using enum Loss;
  fill<Lanes, double, mse, huber, smooth_l1, pseudo_huber>(k, 0);  // csrc/floats.h
  fill<Lanes, float, mse, huber, smooth_l1, pseudo_huber>(k, 1);
  fill<Lanes, simd::Bf16, mse, huber, smooth_l1, pseudo_huber>(k, 2);
  fill<Lanes, simd::Fp16, mse, huber, smooth_l1, pseudo_huber>(k, 3);
  return k;
}

}  // namespace
}  // namespace mmgen_kernels::schedule
