// hybrid_loss and its backward on the CPU.
#include <cmath>
#include <numbers>
#include <string>

#include "schedule/loss_tables.h"
#include "schedule/rows_of_samples.h"
#include "schedule/schedule.h"

namespace mmgen_kernels::schedule {
namespace {

[[noreturn]] void refuse(const char* what) { throw std::runtime_error(std::string("hybrid_loss: ") + what); }

template <class Real>
struct Problem {
  Samples output, x0, noise;
  Tensor t, table;
  double clamp;  // 0: none
  bool learned;
  int dtype;
  std::vector<Term<Real>> terms;  // of each sample
  std::vector<char> decodes;      // whether its step is the first
  const Kernels<Real>& kernels = kernels_of<Real>(selected());
  const LossKernels<Real>& loops = losses_of<Real>(selected());

  static constexpr int64_t columns = 7;

  Problem(const Tensor& output, const Tensor& x0, const Tensor& noise, const Tensor& t, const Tensor& table,
          std::optional<double> clamp)
      : output(output), x0(x0), noise(noise), t(made_contiguous(t)), table(made_contiguous(table)),
        clamp(clamp.value_or(0)), dtype(dtype_of<Real>({&this->output, &this->x0, &this->noise})) {
    const int64_t B = this->x0.count, size = this->x0.size;
    if (x0.dim() < 2 || output.dim() != x0.dim() || this->output.count != B || this->noise.count != B || this->noise.size != size)
      refuse("x0 and noise must be (B, C, ...), output (B, 2 C, ...) or (B, C, ...)");
    learned = output.size(1) == 2 * x0.size(1);
    if (this->output.size != (learned ? 2 * size : size)) refuse("output must be (B, 2 C, ...) or (B, C, ...)");
    if (t.scalar_type() != ScalarType::Long || t.numel() != B) refuse("t must be int64 (B,)");
    if (table.scalar_type() != ScalarType::Double || table.dim() != 2 || table.size(0) < 1 || table.size(1) != columns)
      refuse("table must be fp64 (T, 7)");
    const auto* steps = static_cast<const int64_t*>(this->t.const_data_ptr());
    const auto* rows = static_cast<const double*>(this->table.const_data_ptr());
    const int64_t last = table.size(0) - 1;
    for (int64_t b = 0; b < B; ++b) {
      const int64_t step = std::clamp<int64_t>(steps[b], 0, last);
      decodes.push_back(step == 0);
      terms.push_back(term(rows + step * columns));
    }
  }
  Term<Real> term(const double* row) const {
    const double factor = row[2], share = row[3], true_log_variance = row[4], middle = row[5];
    const double precision = std::exp(-true_log_variance);
    Term<Real> found;
    found.of_data = static_cast<Real>(row[0]), found.of_noise = static_cast<Real>(row[1]);
    found.data = row[0] != 0, found.noise = row[1] != 0;
    found.factor = static_cast<Real>(factor);
    found.clamps = clamp > 0 && share != 0;
    found.ratio = static_cast<Real>(factor / share), found.share = static_cast<Real>(share);
    found.bound = static_cast<Real>(clamp);
    found.learned = learned;
    found.middle = static_cast<Real>(middle), found.slope = static_cast<Real>(row[6]);
    found.gap = static_cast<Real>(middle - true_log_variance);
    found.precision = static_cast<Real>(precision), found.squares = static_cast<Real>(factor * factor * precision);
    return found;
  }
  // f(sample, piece, at, count, rows, term, whether it decodes) for every piece
  template <class F>
  void run(const F& f) const {
    each_piece(x0.count, x0.size, 8, [&](int64_t sample, int64_t piece, int64_t at, int64_t count) {
      alignas(64) Real room[4][chunk];
      const auto row = [&](const Samples& s, int64_t from, Real* scratch) {
        return row_of<Real>(kernels, s, dtype, sample, from, count, scratch);
      };
      const Term<Real>& needs = terms[static_cast<size_t>(sample)];
      const bool first = decodes[static_cast<size_t>(sample)];
      HybridRows rows;
      rows.prediction = row(output, at, room[0]);
      if (learned) rows.v = row(output, x0.size + at, room[1]);
      if (needs.data || needs.clamps || first) rows.x0 = row(x0, at, room[2]);
      if (needs.noise) rows.noise = row(noise, at, room[3]);
      f(sample, piece, at, count, rows, needs, first);
    });
  }
};

template <class Real>
std::tuple<Tensor, Tensor, Tensor> run(const Problem<Real>& p, double vb_weight, bool kl) {
  const int64_t B = p.x0.count, size = p.x0.size, pieces = (size + chunk - 1) / chunk;
  std::vector<LossSums> sums(static_cast<size_t>(B * pieces));
  p.run([&](int64_t sample, int64_t piece, int64_t, int64_t count, const HybridRows& rows, const Term<Real>& term, bool first) {
    sums[static_cast<size_t>(sample * pieces + piece)] = p.loops.terms[first][p.dtype](term, rows, count);
  });
  const ScalarType dtype = sizeof(Real) == 8 ? ScalarType::Double : ScalarType::Float;
  const auto numbers = [&] { return NumbersOf(p.output.tensor, {&B, 1}, dtype); };
  const NumbersOf losses = numbers(), mses = numbers(), vbs = numbers();
  const double elements = static_cast<double>(std::max<int64_t>(size, 1));
  for (int64_t b = 0; b < B; ++b) {
    LossSums total;
    for (int64_t i = b * pieces; i < (b + 1) * pieces; ++i) {
      total.squares += sums[static_cast<size_t>(i)].squares;
      total.terms += sums[static_cast<size_t>(i)].terms;
    }
    const double mse = total.squares / elements, vb = total.terms * (vb_weight / (std::numbers::ln2 * elements));
    mses.put(b, mse), vbs.put(b, vb), losses.put(b, kl ? vb : mse + vb);
  }
  return {losses.tensor, mses.tensor, vbs.tensor};
}

template <class Real>
Tensor run_backward(const Problem<Real>& p, const Optional& grad_loss, const Optional& grad_mse, const Optional& grad_vb,
                    double vb_weight, bool kl) {
  const int64_t B = p.x0.count, size = p.x0.size;
  std::optional<PerSample> of_loss, of_mse, of_vb;
  if (grad_loss) of_loss.emplace(*grad_loss, B, "grad_loss");
  if (grad_mse) of_mse.emplace(*grad_mse, B, "grad_mse");
  if (grad_vb) of_vb.emplace(*grad_vb, B, "grad_vb");
  const auto both = [](const std::optional<PerSample>& a, const std::optional<PerSample>& b, int64_t i) {
    return (a ? (*a)[i] : 0) + (b ? (*b)[i] : 0);
  };
  const std::optional<PerSample> none;
  const double elements = static_cast<double>(std::max<int64_t>(size, 1));
  const Result grad(p.output.tensor, p.output.tensor.scalar_type());
  p.run([&](int64_t sample, int64_t, int64_t at, int64_t count, HybridRows rows, Term<Real> term, bool first) {
    term.by_square = static_cast<Real>(both(of_mse, kl ? none : of_loss, sample) / elements);
    term.by_term = static_cast<Real>(both(of_vb, of_loss, sample) * (vb_weight / (std::numbers::ln2 * elements)));
    term.bounds = of_vb || of_loss, term.moves_mean = kl;
    alignas(64) Real room[2][chunk];
    const int64_t element = sample * p.output.size + at;
    const bool direct = grad.dtype == p.dtype;
    char* const to[2] = {grad.data + element * grad.bytes, grad.data + (element + size) * grad.bytes};
    rows.grad_prediction = direct ? static_cast<void*>(to[0]) : room[0];
    if (p.learned) rows.grad_v = direct ? static_cast<void*>(to[1]) : room[1];
    p.loops.term_gradients[first][p.dtype](term, rows, count);
    if (!direct)
      for (int half = 0; half < (p.learned ? 2 : 1); ++half) p.kernels.narrow[grad.dtype](room[half], count, to[half]);
  });
  return grad.tensor;
}

bool any_double(const Tensor& output, const Tensor& x0, const Tensor& noise) {
  return is_double(output) || is_double(x0) || is_double(noise);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> hybrid_loss_cpu(const Tensor& output, const Tensor& x0, const Tensor& noise, const Tensor& t,
                                                   const Tensor& table, double vb_weight, bool kl, std::optional<double> clamp) {
  if (any_double(output, x0, noise)) return run(Problem<double>(output, x0, noise, t, table, clamp), vb_weight, kl);
  return run(Problem<float>(output, x0, noise, t, table, clamp), vb_weight, kl);
}

Tensor hybrid_loss_backward_cpu(const Optional& grad_loss, const Optional& grad_mse, const Optional& grad_vb, const Tensor& output,
                                const Tensor& x0, const Tensor& noise, const Tensor& t, const Tensor& table, double vb_weight,
                                bool kl, std::optional<double> clamp) {
  const auto of = [&]<class Real>(Real) {
    return run_backward(Problem<Real>(output, x0, noise, t, table, clamp), grad_loss, grad_mse, grad_vb, vb_weight, kl);
  };
  return any_double(output, x0, noise) ? of(double()) : of(float());
}

}  // namespace mmgen_kernels::schedule
