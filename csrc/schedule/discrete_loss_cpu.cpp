// vq_diffusion_loss and its backward on the CPU: a place's logits become exponentials in a row of scratch, and those the sums that
// its divergence wants, or its gradient. Formulas: mmgen_kernels/schedule/reference/discrete_loss.py.
#include <cmath>
#include <limits>
#include <vector>

#include "aligned.h"
#include "parallel.h"
#include "schedule/discrete_fields.h"
#include "schedule/discrete_loss_tables.h"
#include "schedule/rows_of_samples.h"

namespace mmgen_kernels::schedule {
namespace discrete {
namespace {

enum class Reduction { mean, none, places };

Reduction reduction_of(const std::string& name) {
  if (name == "mean") return Reduction::mean;
  if (name == "none") return Reduction::none;
  if (name == "places") return Reduction::places;
  refuse("reduction must be mean, none or places");
}

// The row of a step: a, b, c of the step itself, A, B, C of all steps before it.
struct Before {
  double a, b, c, A, B, C;

  explicit Before(const double* row) : a(row[0]), b(row[1]), c(row[2]), A(row[6]), B(row[7]), C(row[8]) {}
  bool settles(bool hidden) const { return (hidden ? c <= 0 && C > 0 : b <= 0) || A + B <= 0; }
};

// Two codes, x_t being x0 where it is the mask.
struct Codes {
  int64_t x0, x_t;
  bool hidden;

  bool apart() const { return x_t != x0; }
};

// Probabilities of x0, of x_t where that is another code, of all others; of all but x0; -log of the first.
struct Probabilities {
  double total, p0, p_t, ordinary, rest, missed;

  Probabilities(double ordinary_sum, double z0, double z_t, double largest, bool apart) {
    const double own0 = std::exp(z0 - largest), own_t = apart ? std::exp(z_t - largest) : 0;
    total = ordinary_sum + own_t + own0;
    p0 = own0 / total, p_t = own_t / total, ordinary = ordinary_sum / total, rest = (ordinary_sum + own_t) / total;
    missed = own0 > total / 2 ? std::log1p(rest / p0) : largest - z0 + std::log(total);
  }
};

// The divergence of a place and its slopes, as the reference has them.
struct Bound {
  const Probabilities& of;
  bool apart, has_even;
  double q_o, q0, q_t, codes, base, pull, share0, ratio0, share_t, ratio_t, rise, count;

  Bound(const Probabilities& of, const Before& t, const Codes& place, int64_t classes, double most) : of(of), apart(place.apart()) {
    const auto K = static_cast<double>(classes);
    const bool hidden = place.hidden;
    const double a = t.a, b = t.b, A = t.A, B = t.B;
    has_even = B > 0, count = K - 1 - apart;
    const double alike = (a + b) * (A + B) + (K - 1) * b * B, other = (a + b) * B + b * (A + B) + (K - 2) * b * B;
    const double of_codes = 1 / (A + K * B + (t.C > 0 ? t.C / t.c : 0)), step = hidden ? of_codes : b / (apart ? other : alike);
    q_o = step * B;
    q0 = (hidden ? of_codes : apart ? b / other : (a + b) / alike) * (A + B);
    q_t = apart ? (a + b) * B / other : 0;
    codes = hidden ? of_codes * (A + K * B) : 1;
    const double own = apart ? of.p_t : of.p0, fading = other / alike;
    const double likely = hidden ? 1 : of.ordinary + (apart ? of.p0 : 0) + fading * own;
    base = hidden || apart ? likely : likely / fading;
    pull = hidden ? 0 : a * A / alike * own / likely;
    const double told0 = A * of.p0, told_t = A * fading * of.p_t;
    share0 = has_even ? told0 / (told0 + B * base) : 1;
    ratio0 = (told0 + B * base) / (A + B);
    const bool own_even = apart && has_even;
    share_t = own_even ? told_t / (told_t + B * likely) : 0;
    ratio_t = own_even ? (told_t + B * likely) / B : 1;
    rise = (has_even ? A / B : 0) / likely;
    rise = rise > most ? most : rise;
  }
  double divergence(double logarithms) const {
    const double at_x0 = has_even ? -std::log(ratio0) : of.missed;
    return q0 * at_x0 - q_t * std::log(ratio_t) - (has_even ? q_o * (count * std::log(base) + logarithms) : 0);
  }
};

// The derivative of a divergence by the logits: p (even + bent u / (1 + u)), and those of x0 and of x_t.
struct Slopes {
  double even = 0, bent = 0, at_x0 = 0, at_x_t = 0;

  Slopes(const Bound& bound, double turned) {
    const Probabilities& of = bound.of;
    bent = bound.q_o * bound.rise;
    const double of_x0 = bound.q0 * bound.share0, of_x_t = bound.q_t * bound.share_t;
    const double others = of_x_t + bent * (of.ordinary - turned), pulled = bound.pull * (bound.codes - of_x0 - others);
    const double level = of_x0 + others - pulled;
    even = level - bent;
    at_x0 = of.p0 * (others - (bound.apart ? pulled : 0)) + of.rest * ((bound.apart ? 0 : pulled) - of_x0);
    at_x_t = of.p_t * level - of_x_t + pulled;
  }
};

template <class Real>
struct Problem {
  const Kernels<Real>& kernels = kernels_of<Real>(selected());
  const LossKernels<Real>& loops = losses_of<Real>(selected());
  Tensor tensor, x0, x_t, mask;
  Field logits;
  Steps steps;
  const int64_t *of_x0, *of_x_t;
  const bool* valid = nullptr;
  std::optional<PerSample> weights, aux_weights;
  std::optional<double> aux_weight;
  Reduction reduction;
  int64_t size = padded(logits.classes);
  static constexpr double most = std::numeric_limits<Real>::max() / 4;

  Problem(const Tensor& logits, const Tensor& x0, const Tensor& x_t, const Tensor& transitions, const Optional& index,
          const Optional& weight, const Optional& aux_weights, const Optional& mask, int64_t step, std::optional<double> aux_weight,
          bool classes_first, const std::string& reduction)
      : tensor(logits), x0(torch::stable::contiguous(x0)), x_t(torch::stable::contiguous(x_t)),
        mask(mask ? torch::stable::contiguous(*mask) : logits), logits(logits, classes_first),
        steps(transitions, 9, index, step, this->logits.samples), of_x0(codes_of(this->x0, this->logits)),
        of_x_t(codes_of(this->x_t, this->logits)), aux_weight(aux_weight), reduction(reduction_of(reduction)) {
    const int64_t B = this->logits.samples;
    if (this->logits.classes < 1) refuse("logits must have a class at least");
    if (mask) {
      const bool fits = mask->scalar_type() == ScalarType::Bool && mask->numel() == B * this->logits.positions;
      if (!fits) refuse("mask must be bool (B, N)");
      valid = static_cast<const bool*>(this->mask.const_data_ptr());
    }
    if (weight) weights.emplace(*weight, B, "weight");
    if (aux_weights) this->aux_weights.emplace(*aux_weights, B, "aux_weights");
  }
  bool auxiliary() const { return aux_weights || aux_weight; }
  double share(int64_t b) const { return aux_weights ? (*aux_weights)[b] : aux_weight.value_or(0); }
  double weight(int64_t b) const { return weights ? (*weights)[b] : 1; }
  Before before(int64_t b) const { return Before(steps.row(b)); }
  Codes codes(int64_t b, int64_t n) const {
    const int64_t K = logits.classes, at = b * logits.positions + n;
    const int64_t own = std::clamp<int64_t>(of_x0[at], 0, K - 1), now = std::clamp<int64_t>(of_x_t[at], 0, K);
    return {own, now == K ? own : now, now == K};
  }
  bool settled(int64_t b, int64_t n) const { return before(b).settles(codes(b, n).hidden); }
  bool counts(int64_t b, int64_t n) const { return !valid || valid[b * logits.positions + n]; }
  double counted(int64_t b) const {
    int64_t found = 0;
    for (int64_t n = 0; n < logits.positions; ++n) found += counts(b, n);
    return static_cast<double>(std::max<int64_t>(found, 1));
  }

  // use(b, n, w, z0, z_t) for each place that is wanted, w being its logits, -Inf at those two codes and beyond the classes;
  // after(b, first, rows, w) where a block of places is through, those that are not wanted being 0.
  template <class Wanted, class Use, class After>
  void each(const Wanted& wanted, const Use& use, const After& after) const {
    constexpr Real none = -std::numeric_limits<Real>::infinity();
    const int64_t block = logits.dense() ? 1 : kernels.width, blocks = (logits.positions + block - 1) / block;
    parallel(logits.samples * blocks, block * logits.classes * 8, [&](int64_t begin, int64_t end) {
      std::vector<Real, Aligned<Real>> row(static_cast<size_t>(block * size));
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / blocks, first = i % blocks * block, rows = std::min(block, logits.positions - first);
        bool any = false;
        for (int64_t n = first; n < first + rows; ++n) any |= wanted(b, n);
        if (any) load(kernels, logits, b, first, rows, logits.classes, row.data(), size, none);
        for (int64_t n = first; n < first + rows; ++n) {
          Real* const w = row.data() + (n - first) * size;
          if (!wanted(b, n)) {
            std::fill(w, w + size, Real(0));
            continue;
          }
          const Codes place = codes(b, n);
          const Real z0 = w[place.x0], z_t = w[place.x_t];
          w[place.x0] = w[place.x_t] = none;
          use(b, n, place, w, z0, z_t);
        }
        after(b, first, rows, row.data());
      }
    });
  }
};

template <class Real>
constexpr ScalarType type_of = sizeof(Real) == 8 ? ScalarType::Double : ScalarType::Float;

template <class Real>
std::tuple<Tensor, Tensor, Tensor, Tensor> run(const Problem<Real>& p) {
  const Field& logits = p.logits;
  const int64_t B = logits.samples, N = logits.positions, K = logits.classes;
  Tensor places = empty(p.tensor, {B, N, 3}, ScalarType::Double);
  auto* const numbers = static_cast<double*>(places.mutable_data_ptr());
  std::fill_n(numbers, B * N * 3, 0);
  std::vector<double> kl(static_cast<size_t>(B * N)), missed(static_cast<size_t>(B * N));
  const auto wanted = [&](int64_t b, int64_t n) { return p.counts(b, n) && (p.auxiliary() || !p.settled(b, n)); };
  const auto use = [&](int64_t b, int64_t n, const Codes& place, Real* w, Real z0, Real z_t) {
    const int64_t at = b * N + n;
    const Real largest = std::max({p.loops.largest(w, p.size), z0, z_t});
    const double ordinary = p.loops.exponentials(w, p.size, largest);
    const Probabilities of(ordinary, z0, z_t, largest, place.apart());
    missed[static_cast<size_t>(at)] = of.missed;
    numbers[at * 3] = largest, numbers[at * 3 + 1] = ordinary;
    const Before before = p.before(b);
    if (before.settles(place.hidden)) return;
    const Bound bound(of, before, place, K, p.most);
    BentSums sums{0, 0};
    if (bound.has_even) sums = p.loops.sums(w, p.size, static_cast<Real>(bound.rise / of.total));
    numbers[at * 3 + 2] = sums.turned / of.total;
    kl[static_cast<size_t>(at)] = bound.divergence(sums.logarithms);
  };
  p.each(wanted, use, [](int64_t, int64_t, int64_t, const Real*) {});

  const bool by_place = p.reduction == Reduction::places, mean = p.reduction == Reduction::mean;
  const int64_t sizes[] = {B, N}, of_aux = p.auxiliary() ? B : 0;
  const NumbersOf losses(p.tensor, {sizes, size_t(mean ? 0 : by_place ? 2 : 1)}, type_of<Real>);
  const NumbersOf vb(p.tensor, {sizes, 1}, type_of<Real>), aux(p.tensor, {&of_aux, 1}, type_of<Real>);
  double of_batch = 0;
  for (int64_t b = 0; b < B; ++b) {
    const double count = p.counted(b), share = p.share(b), weight = p.weight(b);
    double of_kl = 0, of_missed = 0;
    for (int64_t at = b * N; at < (b + 1) * N; ++at) {
      const double each = kl[static_cast<size_t>(at)], lost = missed[static_cast<size_t>(at)];
      of_kl += each, of_missed += lost;
      if (by_place) losses.put(at, weight * (p.auxiliary() ? each + share * lost : each));
    }
    of_kl /= count, of_missed /= count;
    const double loss = weight * (p.auxiliary() ? of_kl + share * of_missed : of_kl);
    of_batch += loss;
    if (p.reduction == Reduction::none) losses.put(b, loss);
    vb.put(b, of_kl);
    if (p.auxiliary()) aux.put(b, of_missed);
  }
  if (mean) losses.put(0, of_batch / static_cast<double>(B));  // of no samples NaN
  return {losses.tensor, vb.tensor, aux.tensor, places};
}

// The gradients by the divergence and by -log p of x0, of a place.
struct Upstream {
  double by_kl, by_missed;
};

template <class Real>
Tensor run_backward(const Problem<Real>& p, const Optional& grad_loss, const Optional& grad_vb, const Optional& grad_aux,
                    const Tensor& places, bool classes_first) {
  const Field& logits = p.logits;
  const int64_t B = logits.samples, N = logits.positions, K = logits.classes;
  const bool by_place = p.reduction == Reduction::places, mean = p.reduction == Reduction::mean;
  std::optional<PerSample> of_loss, of_vb, of_aux;
  if (grad_loss) of_loss.emplace(*grad_loss, mean ? 1 : by_place ? B * N : B, "grad_loss");
  if (grad_vb) of_vb.emplace(*grad_vb, B, "grad_vb");
  if (grad_aux && p.auxiliary()) of_aux.emplace(*grad_aux, B, "grad_aux");
  const Tensor found = torch::stable::contiguous(places);
  if (found.scalar_type() != ScalarType::Double || found.numel() != B * N * 3) refuse("places must be float64 (B, N, 3)");
  const auto* const numbers = static_cast<const double*>(found.const_data_ptr());
  std::vector<Upstream> upstream(static_cast<size_t>(B * N));
  for (int64_t b = 0; b < B; ++b) {
    const double count = p.counted(b), share = p.share(b), weight = p.weight(b);
    const double of_sample = of_loss && !by_place ? (*of_loss)[mean ? 0 : b] / (mean ? static_cast<double>(B) : 1) : 0;
    const double vb = of_vb ? (*of_vb)[b] / count : 0, aux = of_aux ? (*of_aux)[b] / count : 0;
    for (int64_t n = 0; n < N; ++n) {
      if (!p.counts(b, n)) continue;
      const double each = by_place && of_loss ? (*of_loss)[b * N + n] * weight : of_sample * weight / count;
      upstream[static_cast<size_t>(b * N + n)] = {each + vb, (p.auxiliary() ? share * each : 0) + aux};
    }
  }

  Tensor grad = empty_as(p.tensor);
  const Field result(grad, classes_first);
  auto* const data = static_cast<char*>(grad.mutable_data_ptr());
  const auto narrow = schedule::kernels_of<Real>(selected()).narrow;
  const auto gradient = [&](int64_t b, int64_t n) { return upstream[static_cast<size_t>(b * N + n)]; };
  const auto wanted = [&](int64_t b, int64_t n) {
    const Upstream by = gradient(b, n);
    return by.by_missed != 0 || (by.by_kl != 0 && !p.settled(b, n));
  };
  const auto use = [&](int64_t b, int64_t n, const Codes& place, Real* w, Real z0, Real z_t) {
    const double* known = numbers + (b * N + n) * 3;
    const auto largest = static_cast<Real>(known[0]);
    const Probabilities of(known[1], z0, z_t, largest, place.apart());
    const Upstream by = gradient(b, n);
    const Before before = p.before(b);
    double even = by.by_missed, bent = 0, rise = 0, at_x0 = -by.by_missed * of.rest, at_x_t = by.by_missed * of.p_t;
    if (by.by_kl != 0 && !before.settles(place.hidden)) {
      const Bound bound(of, before, place, K, p.most);
      const Slopes slopes(bound, known[2]);
      rise = bound.rise, even += by.by_kl * slopes.even, bent = by.by_kl * slopes.bent;
      at_x0 += by.by_kl * slopes.at_x0, at_x_t += by.by_kl * slopes.at_x_t;
    }
    const auto over_total = [&](double number) { return static_cast<Real>(number / of.total); };
    p.loops.slopes(w, p.size, largest, over_total(rise), over_total(even), over_total(bent));
    if (place.apart()) w[place.x_t] = static_cast<Real>(at_x_t);
    w[place.x0] = static_cast<Real>(at_x0);
  };
  const auto write = [&](int64_t b, int64_t first, int64_t rows, const Real* w) {
    for (int64_t r = 0; r < rows && result.dense(); ++r)
      narrow[result.dtype](w + r * p.size, K, data + (result.at(b, first + r) - result.data));
    if (!result.dense())
      p.loops.scatter[result.dtype](w, p.size, rows, K, data + (result.at(b, first) - result.data), result.by_class);
  };
  p.each(wanted, use, write);
  return grad;
}

}  // namespace
}  // namespace discrete

std::tuple<Tensor, Tensor, Tensor, Tensor> vq_diffusion_loss_cpu(
    const Tensor& logits, const Tensor& x0, const Tensor& x_t, const Tensor& transitions, const Optional& index,
    const Optional& weight, const Optional& aux_weights, const Optional& mask, int64_t step, std::optional<double> aux_weight,
    bool classes_first, std::string reduction) {
  const auto of = [&]<class Real>(Real) {
    return run(discrete::Problem<Real>(logits, x0, x_t, transitions, index, weight, aux_weights, mask, step, aux_weight,
                                       classes_first, reduction));
  };
  return is_double(logits) ? of(double()) : of(float());
}

Tensor vq_diffusion_loss_backward_cpu(
    const Optional& grad_loss, const Optional& grad_vb, const Optional& grad_aux, const Tensor& logits, const Tensor& x0,
    const Tensor& x_t, const Tensor& transitions, const Optional& index, const Optional& weight, const Optional& aux_weights,
    const Optional& mask, const Tensor& places, int64_t step, std::optional<double> aux_weight, bool classes_first,
    std::string reduction) {
  const auto of = [&]<class Real>(Real) {
    const discrete::Problem<Real> problem(logits, x0, x_t, transitions, index, weight, aux_weights, mask, step, aux_weight,
                                          classes_first, reduction);
    return run_backward(problem, grad_loss, grad_vb, grad_aux, places, classes_first);
  };
  return is_double(logits) ? of(double()) : of(float());
}

}  // namespace mmgen_kernels::schedule
