// The loops of loss_tables.h, written once over vectors; each losses_<instruction set>.cpp instantiates them.
#pragma once

#include <type_traits>

#include "schedule/loss_tables.h"
#include "simd/elementary.h"
#include "simd/rows.h"

namespace mmgen_kernels::schedule {
namespace {  // internal linkage: compiled once per instruction set

using simd::each_vector;
using simd::load;
using simd::store;

// How many vectors are worked on at a time, so that none waits for its own last step: as many as the registers hold.
template <class Lanes>
constexpr int together = Lanes::registers / 8;
template <int N>
using Together = std::integral_constant<int, N>;

// The sums in fp64 of what f(how many vectors, place, i, first, second) adds to two; they take in four elements a lane before that.
template <class Lanes, class F>
inline __attribute__((always_inline)) LossSums sums_of(int64_t count, const F& f) {
  using Vec = typename Lanes::Vec;
  constexpr int64_t step = 4 * Lanes::width;
  constexpr int at_once = together<Lanes>;
  typename Lanes::HalfWide total[2] = {};
  int64_t i = 0;
  const auto add = [&](Vec first, Vec second) { total[0] += Lanes::halved(first), total[1] += Lanes::halved(second); };
  for (; i + step <= count; i += step) {
    Vec first{}, second{};
#pragma GCC unroll 4
    for (int64_t v = 0; v < step; v += at_once * Lanes::width) f(Together<at_once>{}, simd::Whole<Lanes>{}, i + v, first, second);
    add(first, second);
  }
  for (; i < count; i += Lanes::width) {
    Vec first{}, second{};
    if (i + Lanes::width <= count) {
      f(Together<1>{}, simd::Whole<Lanes>{}, i, first, second);
    } else {
      const simd::Part<Lanes> place{count - i};
      f(Together<1>{}, place, i, first, second);
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
  const auto opposite = -v;
  return v > opposite ? v : opposite;
}

// -- diffusion_loss ---------------------------------------------------------------------------------------------------

// Zero where an element is masked, whatever stands there.
template <class Lanes, class Place>
typename Lanes::Vec valid_only(const Place& place, const uint8_t* valid, int64_t i, typename Lanes::Vec v) {
  using Real = typename Lanes::Real;
  typedef uint8_t Bytes __attribute__((vector_size(Lanes::width)));
  typedef std::conditional_t<sizeof(Real) == 8, int64_t, int32_t> Word;
  typedef Word Words __attribute__((vector_size(Lanes::width * sizeof(Word))));
  if (!valid) return v;
  Bytes bytes{};
  if constexpr (std::is_same_v<Place, simd::Whole<Lanes>>) std::memcpy(&bytes, valid + i, Lanes::width);
  else std::memcpy(&bytes, valid + i, static_cast<size_t>(place.count));
  return __builtin_convertvector(bytes, Words) != 0 ? v : typename Lanes::Vec{};  // to floats GCC converts lane by lane
}

// sqrt(d^2 + delta^2) of |d|
template <class Lanes>
struct Hypotenuse {
  using Vec = typename Lanes::Vec;
  Vec scale, unscale, square, far;

  explicit Hypotenuse(const Difference<typename Lanes::Real>& given)
      : scale(Lanes::broadcast(given.scale)), unscale(Lanes::broadcast(given.unscale)), square(Lanes::broadcast(given.square)),
        far(Lanes::broadcast(given.far)) {}
  Vec of(Vec size) const {
    const Vec scaled = size * scale, found = unscale * simd::square_root<Lanes>(Lanes::fmadd(scaled, scaled, square));
    return size > far ? size : found;
  }
};

template <class Lanes, class T, Loss LOSS>
double losses(const Difference<typename Lanes::Real>& given, const void* output, const void* target, const uint8_t* valid,
              int64_t count) {
  using Vec = typename Lanes::Vec;
  const Vec delta = Lanes::broadcast(given.delta);
  const Hypotenuse<Lanes> hypotenuse(given);
  const auto add_one = [&](const auto& place, int64_t i, Vec& sum) __attribute__((always_inline)) {
    const Vec d = load<Lanes>(place, static_cast<const T*>(output) + i) - load<Lanes>(place, static_cast<const T*>(target) + i);
    Vec rho;
    if constexpr (LOSS == Loss::mse) {
      rho = d * d;
    } else {
      const Vec size = magnitude<Lanes>(d);
      if constexpr (LOSS == Loss::pseudo_huber) {
        rho = size * (size / (hypotenuse.of(size) + delta));
      } else {
        const Vec near = size > delta ? delta : size;
        rho = (LOSS == Loss::huber ? near : near / delta) * (size - near / 2);
      }
    }
    sum += valid_only<Lanes>(place, valid, i, rho);
  };
  const auto add = [&]<int N>(Together<N>, const auto& place, int64_t i, Vec& sum, Vec&) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v) add_one(place, i + v * Lanes::width, sum);
  };
  return sums_of<Lanes>(count, add).squares;
}

template <class Lanes, class T, Loss LOSS>
void gradients(const Difference<typename Lanes::Real>& given, const void* output, const void* target, const uint8_t* valid,
               int64_t count, void* grad_output, void* grad_target) {
  using Vec = typename Lanes::Vec;
  const Vec delta = Lanes::broadcast(given.delta), slope = Lanes::broadcast(given.slope);
  const Hypotenuse<Lanes> hypotenuse(given);
  each_vector<Lanes>(count, [&](const auto& place, int64_t i) {
    const Vec d = load<Lanes>(place, static_cast<const T*>(output) + i) - load<Lanes>(place, static_cast<const T*>(target) + i);
    Vec by_d;
    if constexpr (LOSS == Loss::mse) {
      by_d = d + d;
    } else if constexpr (LOSS == Loss::pseudo_huber) {
      by_d = d / hypotenuse.of(magnitude<Lanes>(d));
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
  Vec difference, square, x0{}, v{};
  Vec apart{};  // the true mean less the model's; made where `means` are asked for or the predicted data are clamped
  Vec moving;  // by how much that moves with a difference: factor, or 0 where the predicted data are clamped
};

template <class Lanes, class T, class Place>
inline __attribute__((always_inline)) Element<Lanes> element_at(const Place& place, const Term<typename Lanes::Real>& term,
                                                                const HybridRows& rows, int64_t i, bool means) {
  using Vec = typename Lanes::Vec;
  const auto row = [&](const void* of) { return load<Lanes>(place, static_cast<const T*>(of) + i); };
  Element<Lanes> e;
  Vec target{};
  if (rows.x0) e.x0 = row(rows.x0);
  if (term.data) target = Lanes::broadcast(term.of_data) * e.x0;
  if (term.noise) target = Lanes::fmadd(Lanes::broadcast(term.of_noise), row(rows.noise), target);
  e.difference = target - row(rows.prediction), e.square = e.difference * e.difference;
  if (term.learned) e.v = row(rows.v);
  e.moving = Lanes::broadcast(term.factor);
  if (means) e.apart = e.moving * e.difference;
  if (term.clamps) {
    const Vec bound = Lanes::broadcast(term.bound), predicted = e.x0 - Lanes::broadcast(term.ratio) * e.difference;
    const Vec limited = predicted > bound ? bound : predicted < -bound ? -bound : predicted;
    e.apart = Lanes::broadcast(term.share) * (e.x0 - limited);
    e.moving = limited == predicted ? e.moving : Vec{};
  }
  return e;
}

// Of N divergences: with `exponent` the logarithm of the true variance by the model's and `ratio` what it is one of, the value is
// half of ratio - 1 - exponent + ratio (distance of the means)^2 / the true variance; `curved` is that without the exponent.
template <class Lanes, int N>
struct Divergence {
  using Vec = typename Lanes::Vec;
  Vec exponent[N], ratio[N], curved[N];

  __attribute__((always_inline)) Divergence(const Term<typename Lanes::Real>& term, const Element<Lanes> (&e)[N]) {
    const Vec slope = Lanes::broadcast(-term.slope), gap = Lanes::broadcast(-term.gap);
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v) exponent[v] = Lanes::fmadd(slope, e[v].v, gap);
    const simd::Exponential<Lanes, N> exponential(exponent);
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v) {
      const Vec square = term.clamps ? e[v].apart * e[v].apart * Lanes::broadcast(term.precision)
                                     : e[v].square * Lanes::broadcast(term.squares);
      ratio[v] = exponential.value[v];
      curved[v] = Lanes::fmadd(ratio[v], square, exponential.less_one[v]);
    }
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
    inverse = simd::Exponential<Lanes>({exponent > sharpest ? all(sharpest) : exponent}).value[0];
    upper = limit((e.apart + half_level) * inverse, far), lower = limit((e.apart - half_level) * inverse, far);
    const Vec half = limit(inverse * half_level, far), ends = upper + lower;
    const auto logit = [&](Vec u) { return steepness * u * Lanes::fmadd(all(cubic) * u, u, all(1)); };
    width = steepness * 2 * half * (1 + cubic * (Real(0.75) * ends * ends + half * half));  // b - a
    const simd::Exponential<Lanes, 3> exponential({-logit(upper), logit(lower), -width});
    of_upper = exponential.value[0], of_lower = exponential.value[1];
    is_least = e.x0 < -edge, is_greatest = e.x0 > edge;
    below = is_greatest ? all(1) : 1 / (1 + of_upper);
    above = is_least ? all(1) : 1 / (1 + of_lower);
    between = (is_least | is_greatest) ? all(1) : -exponential.less_one[2];
  }
  Vec probability() const { return below * above * between; }
  Vec negative_log() const {
    const Vec p = probability();
    return -simd::logarithm<Lanes>(p < least ? Lanes::broadcast(least) : p);
  }
  // The derivatives of negative_log by the means' distance and by the logarithm of the variance.
  void slopes(Vec& by_mean, Vec& by_log_variance) const {
    const Vec none{}, inner = (is_least | is_greatest) ? none : 1 / simd::Exponential<Lanes>({width}).less_one[0];
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
  const auto at = rows;
  const auto add = [&]<int N>(Together<N>, const auto& place, int64_t i, Vec& squares, Vec& sum) __attribute__((always_inline)) {
    Element<Lanes> e[N];
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v) e[v] = element_at<Lanes, T>(place, term, at, i + v * Lanes::width, DECODES);
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v) squares += e[v].square;
    if constexpr (DECODES) {
#pragma GCC unroll 4
      for (int v = 0; v < N; ++v) sum += Decoder<Lanes>(term, e[v]).negative_log();
    } else {
      const Divergence<Lanes, N> d(term, e);
#pragma GCC unroll 4
      for (int v = 0; v < N; ++v) sum += d.curved[v] - d.exponent[v];
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
  const auto at = rows;  // its own: what is stored cannot change it
  const Vec by_square = Lanes::broadcast(-2 * term.by_square), by_term = Lanes::broadcast(term.by_term);
  const Vec by_v = Lanes::broadcast((DECODES ? 1 : Real(-0.5)) * term.by_term * term.slope);
  const auto write = [&]<int N>(Together<N>, const auto& place, int64_t i) __attribute__((always_inline)) {
    Element<Lanes> e[N];
    Vec of_prediction[N], of_v[N];
#define EACH _Pragma("GCC unroll 4") for (int v = 0; v < N; ++v)
    EACH e[v] = element_at<Lanes, T>(place, term, at, i + v * Lanes::width, DECODES || term.moves_mean);
    EACH of_prediction[v] = by_square * e[v].difference, of_v[v] = Vec{};
    if (term.bounds) {
      Vec by_mean[N], by_log_variance[N];
      if constexpr (DECODES) {
        EACH Decoder<Lanes>(term, e[v]).slopes(by_mean[v], by_log_variance[v]);
      } else {
        const Divergence<Lanes, N> d(term, e);
        EACH by_log_variance[v] = d.curved[v];  // of which by_v takes half
        if (term.moves_mean) EACH by_mean[v] = e[v].apart * d.ratio[v] * Lanes::broadcast(term.precision);
      }
      EACH of_v[v] = by_v * by_log_variance[v];
      if (term.moves_mean) EACH of_prediction[v] -= by_term * e[v].moving * by_mean[v];
    }
    EACH store<Lanes>(place, static_cast<T*>(at.grad_prediction) + i + v * Lanes::width, of_prediction[v]);
    if (at.grad_v) EACH store<Lanes>(place, static_cast<T*>(at.grad_v) + i + v * Lanes::width, of_v[v]);
#undef EACH
  };
  constexpr int at_once = DECODES ? 1 : together<Lanes>;
  int64_t i = 0;
  for (; i + at_once * Lanes::width <= count; i += at_once * Lanes::width) write(Together<at_once>{}, simd::Whole<Lanes>{}, i);
  each_vector<Lanes>(count - i, [&](const auto& place, int64_t rest) { write(Together<1>{}, place, i + rest); });
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
