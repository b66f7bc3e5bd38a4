// vq_diffusion_step and unmask_step on the CPU: a position's logits become weights in a row of scratch, beside which lie as many
// exponentials, and one more for the mask or for the confidence. Formulas: docs/discrete.md.
#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <vector>

#include "aligned.h"
#include "parallel.h"
#include "philox.h"
#include "philox/kernels.h"
#include "schedule/discrete_fields.h"

namespace mmgen_kernels::schedule {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace discrete {
namespace {

// The logits and the exponentials of position after position.
template <class Real>
struct Positions {
  const Kernels<Real>& kernels = kernels_of<Real>(selected());
  philox::Fill fill = philox::kernels_of(selected()).exponential[sizeof(Real) == 8 ? 0 : 1];
  Field logits;
  std::optional<Field> noise;  // of so many classes as the call asks for
  std::vector<uint64_t> keys;  // folded, of each sample or of all
  bool key_per_sample = false;

  Positions(const Tensor& given, const Optional& numbers, const Optional& key, const Steps& steps) : logits(given) {
    if (numbers) noise.emplace(*numbers);
    if (noise && (noise->samples != logits.samples || noise->positions != logits.positions)) refuse("noise must be of logits' shape");
    if (!key) return;
    key_per_sample = key->dim() == 2;
    const int64_t count = key_per_sample ? logits.samples : 1;
    if (key->scalar_type() != ScalarType::Long || key->numel() != 2 * count) refuse("key must be int64 (2,) or (B, 2)");
    const Tensor dense = torch::stable::contiguous(*key);
    const auto* pairs = static_cast<const uint64_t*>(dense.const_data_ptr());
    keys.assign(pairs, pairs + 2 * count);
    for (int64_t b = 0; b < (logits.samples ? count : 0); ++b)
      philox::fold_in(keys[2 * b], keys[2 * b + 1], static_cast<uint64_t>(steps.of(b)));
  }

  // use(b, n, w, e) for each position that wants it, with K logits and K + 1 exponentials; what is beyond them in a row is -Inf, and
  // NaN: of no weight, and never the first, also where no class is.
  template <class Wanted, class Use>
  void each(const Wanted& wanted, const Use& use) const {
    const int64_t K = logits.classes, size = padded(K + 1), block = logits.dense() && (!noise || noise->dense()) ? 1 : kernels.width;
    const int64_t blocks = (logits.positions + block - 1) / block;
    parallel(logits.samples * blocks, block * K * 8, [&](int64_t begin, int64_t end) {
      std::vector<Real, Aligned<Real>> w(block * size), e(noise ? block * size : size);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / blocks, first = i % blocks * block, rows = std::min(block, logits.positions - first);
        bool any = false;
        for (int64_t n = first; n < first + rows; ++n) any |= wanted(b, n);
        if (!any) continue;
        load(kernels, logits, b, first, rows, K, w.data(), size, -std::numeric_limits<Real>::infinity());
        if (noise) load(kernels, *noise, b, first, rows, noise->classes, e.data(), size, std::numeric_limits<Real>::quiet_NaN());
        for (int64_t n = first; n < first + rows; ++n) {
          if (!wanted(b, n)) continue;
          Real* const numbers = e.data() + (noise ? (n - first) * size : 0);
          if (!keys.empty()) draw(b, n, size, numbers);
          use(b, n, w.data() + (n - first) * size, numbers);
        }
      }
    });
  }

 private:
  void draw(int64_t b, int64_t n, int64_t size, Real* out) const {
    const int64_t K = logits.classes, row = (K + 4) / 4 * 4, at = ((key_per_sample ? 0 : b * logits.positions) + n) * row;
    const uint64_t* key = keys.data() + (key_per_sample ? 2 * b : 0);
    fill(key[0], key[1], at, at + K + 1, out);
    std::fill(out + K + 1, out + size, std::numeric_limits<Real>::quiet_NaN());
  }
};

// A row of transitions: of the step, of all steps up to it, and of all steps before it.
struct Transition {
  double a, b, c, A, B, C, A_1, B_1, C_1;

  // Whether x_t cannot have been anything else.
  bool settles(bool masked) const { return masked ? c <= 0 && C_1 > 0 : b <= 0; }
};

// The weights of x_{t-1}, over their sum: share p_m + even, but `own` of x_t where that is a code, and `mask` of the mask.
struct Weights {
  double share, even, own, mask;
  bool defined;

  Weights(const Transition& t, bool masked, double own_p, int64_t K) {
    const double new_here = t.A + t.B > 0 ? t.B / (t.A + t.B) : 0, rest = (1 - own_p) + new_here * own_p;
    share = masked ? t.A_1 : t.b * t.A_1;
    even = masked ? t.B_1 : t.b * t.B_1 * rest;
    own = masked ? 0 : (t.a + t.b) * (t.A_1 * new_here * own_p + t.B_1 * rest);
    mask = masked && t.C_1 > 0 ? t.C_1 / t.c : 0;
    const double total = share * (1 - own_p) + even * static_cast<double>(K - !masked) + own + mask;
    defined = total > 0 && std::isfinite(total);
    share /= total, even /= total, own /= total, mask /= total;
  }
};

template <class Real>
void diffuse(const Positions<Real>& positions, const Steps& steps, const int64_t* x_t, double temperature, int64_t* prev, Real* log_prob) {
  const Field& logits = positions.logits;
  const int64_t K = logits.classes, N = logits.positions, size = padded(K + 1);
  const auto code = [&](int64_t b, int64_t n) { return std::clamp<int64_t>(x_t[b * N + n], 0, K); };
  const auto transition = [&](int64_t b) {
    const double* r = steps.row(b);
    return Transition{r[0], r[1], r[2], r[3], r[4], r[5], r[6], r[7], r[8]};
  };
  for (int64_t b = 0; b < logits.samples; ++b)
    for (int64_t n = 0; n < N; ++n) {
      prev[b * N + n] = code(b, n);
      if (log_prob) log_prob[b * N + n] = 0;
    }
  const auto open = [&](int64_t b, int64_t n) { return !transition(b).settles(code(b, n) == K); };
  positions.each(open, [&](int64_t b, int64_t n, Real* w, Real* e) {
    const int64_t x = code(b, n);
    const bool masked = x == K;
    const Softmax<Real> p = positions.kernels.exponentials(w, size, static_cast<Real>(1 / temperature));
    const Weights v(transition(b), masked, masked ? 0 : w[x] / p.total, K);
    Real* const probability = log_prob ? log_prob + b * N + n : nullptr;
    if (!v.defined || !std::isfinite(p.total)) {
      if (probability) *probability = std::numeric_limits<Real>::quiet_NaN();
      return;
    }
    const Real of_x = e[x], share = static_cast<Real>(v.share / p.total), even = static_cast<Real>(v.even);
    e[x] = e[K] = std::numeric_limits<Real>::quiet_NaN();  // x_t, code or mask, has a weight of its own
    Winner<Real> best = positions.kernels.race(w, e, size, share, even);
    const Real own = static_cast<Real>(masked ? v.mask : v.own), score = own / of_x;
    if (score > best.score || (score == best.score && x < best.index)) best.index = x;
    prev[b * N + n] = best.index;
    if (probability) *probability = std::log(best.index == x ? own : share * w[best.index] + even);
  });
}

// One of the masked positions of a sample.
struct Candidate {
  double confidence;
  int64_t position;
  bool operator<(const Candidate& other) const {
    return confidence < other.confidence || (confidence == other.confidence && position < other.position);
  }
};

template <class Real>
void unmask(const Positions<Real>& positions, const Steps& steps, const int64_t* sample, const std::vector<Real>& waits, int64_t mask_id,
            double temperature, int64_t* prev, int64_t* pred) {
  const Field& logits = positions.logits;
  const int64_t K = logits.classes, N = logits.positions, size = padded(K + 1), count = logits.samples * N;
  std::copy_n(sample, count, pred);
  std::vector<double> confidence(static_cast<size_t>(count), -std::numeric_limits<double>::infinity());
  const std::vector<Real> ones(static_cast<size_t>(temperature == 0 ? size : 0), Real(1));
  positions.each([&](int64_t b, int64_t n) { return sample[b * N + n] == mask_id; }, [&](int64_t b, int64_t n, Real* w, Real* e) {
    Winner<Real> best{};
    if (temperature == 0) best = positions.kernels.race(w, ones.data(), size, 1, 0);
    const Softmax<Real> p = positions.kernels.exponentials(w, size, static_cast<Real>(temperature == 0 ? 1 : 1 / temperature));
    if (!std::isfinite(p.total)) return;
    const double wait = waits.empty() ? e[K] : waits[b * N + n], heat = steps.row(b)[1];
    e[K] = std::numeric_limits<Real>::quiet_NaN();
    if (temperature != 0) best = positions.kernels.race(w, e, size, 1, 0);
    pred[b * N + n] = best.index;
    const double found = std::log(w[best.index] / p.total) - (heat == 0 ? 0 : heat * std::log(wait));
    if (!std::isnan(found)) confidence[b * N + n] = found;
  });

  std::copy_n(pred, count, prev);
  parallel(logits.samples, N * 16, [&](int64_t begin, int64_t end) {
    std::vector<Candidate> masked;
    for (int64_t b = begin; b < end; ++b) {
      masked.clear();
      for (int64_t n = 0; n < N; ++n)
        if (sample[b * N + n] == mask_id) masked.push_back({confidence[b * N + n], n});
      const double ratio = steps.row(b)[0];
      if (!(ratio > 0) || masked.empty()) continue;
      const auto M = static_cast<int64_t>(masked.size());
      const float asked = std::floor(static_cast<float>(N) * static_cast<float>(ratio));
      const int64_t wanted = std::max<int64_t>(1, asked < static_cast<float>(M) ? std::min(M - 1, static_cast<int64_t>(asked)) : M - 1);
      std::nth_element(masked.begin(), masked.begin() + (wanted - 1), masked.end());
      for (int64_t i = 0; i < wanted; ++i) prev[b * N + masked[static_cast<size_t>(i)].position] = mask_id;
    }
  });
}

template <class Real>
constexpr ScalarType type_of = sizeof(Real) == 8 ? ScalarType::Double : ScalarType::Float;

bool any_double(const Tensor& logits, const Optional& noise) { return is_double(logits) || (noise && is_double(*noise)); }

}  // namespace
}  // namespace discrete

using discrete::Positions, discrete::Steps;

std::tuple<Tensor, Tensor> vq_diffusion_step_cpu(const Tensor& logits, const Tensor& x_t, const Optional& noise, const Tensor& transitions,
                                                 const Optional& index, const Optional& key, int64_t step, double temperature,
                                                 bool with_log_prob) {
  const auto run = [&]<class Real>(Real) -> std::tuple<Tensor, Tensor> {
    const Tensor codes = torch::stable::contiguous(x_t);
    const discrete::Field field(logits);
    const Steps steps(transitions, 9, index, step, field.samples);
    const Positions<Real> positions(logits, noise, key, steps);
    if (field.classes < 1 || noise.has_value() == key.has_value() || (noise && positions.noise->classes != field.classes + 1))
      discrete::refuse("logits must have a class at least, and noise be a key or of one class more");
    const auto* given = discrete::codes_of(codes, field);
    Tensor prev = empty_as(codes);
    const std::vector<int64_t> shape = {field.samples, field.positions};
    Tensor log_prob = empty(logits, with_log_prob ? shape : std::vector<int64_t>{0}, discrete::type_of<Real>);
    diffuse(positions, steps, given, temperature, static_cast<int64_t*>(prev.mutable_data_ptr()),
            with_log_prob ? static_cast<Real*>(log_prob.mutable_data_ptr()) : nullptr);
    return {prev, log_prob};
  };
  return discrete::any_double(logits, noise) ? run(double{}) : run(float{});
}

std::tuple<Tensor, Tensor> unmask_step_cpu(const Tensor& logits, const Tensor& sample, const Optional& noise,
                                           const Optional& confidence_noise, const Tensor& schedule, const Optional& index,
                                           const Optional& key, int64_t step, int64_t mask_id, double temperature) {
  const auto run = [&]<class Real>(Real) -> std::tuple<Tensor, Tensor> {
    const Tensor codes = torch::stable::contiguous(sample);
    const discrete::Field field(logits);
    const Steps steps(schedule, 2, index, step, field.samples);
    const Positions<Real> positions(logits, noise, key, steps);
    if (field.classes < 1 || confidence_noise.has_value() == key.has_value() || (!key && !noise && temperature != 0) ||
        (noise && positions.noise->classes != field.classes))
      discrete::refuse("logits must have a class at least, and noise be a key or of their shape");
    const auto* given = discrete::codes_of(codes, field);
    std::vector<Real> waits;
    if (confidence_noise) {
      const Tensor dense = torch::stable::contiguous(*confidence_noise);
      if (dense.numel() != codes.numel()) discrete::refuse("the noise of confidences must be (B, N)");
      waits.resize(static_cast<size_t>(dense.numel()));
      positions.kernels.widen[static_cast<int>(float_of(dense.scalar_type()))](dense.const_data_ptr(), dense.numel(), waits.data());
    }
    Tensor prev = empty_as(codes), pred = empty_as(codes);
    unmask(positions, steps, given, waits, mask_id, temperature, static_cast<int64_t*>(prev.mutable_data_ptr()),
           static_cast<int64_t*>(pred.mutable_data_ptr()));
    return {prev, pred};
  };
  const bool wide = discrete::any_double(logits, noise) || (confidence_noise && is_double(*confidence_noise));
  return wide ? run(double{}) : run(float{});
}

}  // namespace mmgen_kernels::schedule
