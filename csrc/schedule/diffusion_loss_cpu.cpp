// diffusion_loss and its backward on the CPU.
#include <cmath>
#include <string>

#include "schedule/loss_tables.h"
#include "schedule/rows_of_samples.h"
#include "schedule/schedule.h"

namespace mmgen_kernels::schedule {
namespace {

[[noreturn]] void refuse(const char* what) { throw std::runtime_error(std::string("diffusion_loss: ") + what); }

Loss loss_of(const std::string& kind) {
  if (kind == "mse") return Loss::mse;
  if (kind == "huber") return Loss::huber;
  if (kind == "smooth_l1") return Loss::smooth_l1;
  if (kind == "pseudo_huber") return Loss::pseudo_huber;
  refuse("kind must be mse, huber, smooth_l1 or pseudo_huber");
}

// Which elements count, a byte each: any of the dimensions may be broadcast.
struct Mask {
  const uint8_t* data;
  int64_t batch;
  std::vector<int64_t> sizes, strides;  // of what comes after the batch

  Mask(const Tensor& mask, const Tensor& like) : data(static_cast<const uint8_t*>(mask.const_data_ptr())) {
    if (mask.scalar_type() != ScalarType::Bool || mask.dim() != like.dim()) refuse("mask must be bool, of output's dimensions");
    for (int64_t d = 0; d < like.dim(); ++d)
      if (mask.size(d) != 1 && mask.size(d) != like.size(d)) refuse("mask must broadcast to output");
    batch = mask.size(0) == 1 ? 0 : mask.stride(0);
    for (int64_t d = 1; d < like.dim(); ++d) {
      const int64_t size = like.size(d), stride = mask.size(d) == 1 ? 0 : mask.stride(d);
      if (size == 1) continue;
      if (!sizes.empty() && strides.back() == size * stride) sizes.back() *= size, strides.back() = stride;  // one with the last
      else sizes.push_back(size), strides.push_back(stride);
    }
  }
  // Elements [at, at + count) of a sample.
  void read(int64_t sample, int64_t at, int64_t count, uint8_t* out) const {
    const int64_t row = sizes.empty() ? 1 : sizes.back(), step = sizes.empty() ? 0 : strides.back();
    while (count > 0) {
      const uint8_t* from = data + sample * batch;
      int64_t rest = at / row;
      for (auto d = static_cast<int64_t>(sizes.size()) - 2; d >= 0; --d) {
        from += rest % sizes[static_cast<size_t>(d)] * strides[static_cast<size_t>(d)];
        rest /= sizes[static_cast<size_t>(d)];
      }
      const int64_t first = at % row, n = std::min(count, row - first);
      if (step == 0) std::fill_n(out, n, *from);
      else if (step == 1) std::copy_n(from + first, n, out);
      else
        for (int64_t i = 0; i < n; ++i) out[i] = from[(first + i) * step];
      at += n, out += n, count -= n;
    }
  }
  int64_t valid(int64_t sample, int64_t size) const {
    uint8_t bytes[chunk];
    int64_t found = 0;
    for (int64_t at = 0; at < size; at += chunk) {
      const int64_t count = std::min(chunk, size - at);
      read(sample, at, count, bytes);
      uint16_t valid = 0;  // of at most `chunk`: eight at a time
      for (int64_t i = 0; i < count; ++i) valid = static_cast<uint16_t>(valid + bytes[i]);
      found += valid;
    }
    return found;
  }
};

template <class Real>
struct Problem {
  Samples output, target;
  std::optional<Mask> mask;
  std::optional<PerSample> deltas;
  Loss loss;
  double delta;
  int dtype;
  const Kernels<Real>& kernels = kernels_of<Real>(selected());
  const LossKernels<Real>& loops = losses_of<Real>(selected());

  Problem(const Tensor& output, const Tensor& target, const Optional& mask, const Optional& deltas, const std::string& kind,
          double delta)
      : output(output), target(target), loss(loss_of(kind)), delta(delta), dtype(dtype_of<Real>({&this->output, &this->target})) {
    if (output.dim() == 0 || this->output.count != this->target.count || this->output.size != this->target.size)
      refuse("output and target must be of one shape (B, ...)");
    if (mask) this->mask.emplace(*mask, output);
    if (deltas) this->deltas.emplace(*deltas, this->output.count, "delta");
  }
  Difference<Real> difference(int64_t sample, double slope = 0) const {
    constexpr double least = 0x1p-126;
    const double given = deltas ? (*deltas)[sample] : delta;
    Difference<Real> d{static_cast<Real>(given < least ? least : given), static_cast<Real>(slope)};
    if (loss == Loss::pseudo_huber) {
      constexpr bool wide = sizeof(Real) == sizeof(double);
      const int exponent = std::isfinite(d.delta) ? std::min(std::ilogb(d.delta), wide ? 1000 : 126) : 0;  // 2^-exponent is normal
      d.scale = std::ldexp(Real(1), -exponent), d.unscale = std::ldexp(Real(1), exponent);
      d.square = d.delta * d.scale * (d.delta * d.scale), d.far = d.delta * Real(wide ? 1 << 27 : 1 << 13);
    }
    return d;
  }
  // f(rows of output and of target, mask, piece, ...) for every piece
  template <class F>
  void run(const F& f) const {
    each_piece(output.count, output.size, loss == Loss::mse ? 2 : 4, [&](int64_t sample, int64_t piece, int64_t at, int64_t count) {
      alignas(64) Real room[2][chunk];
      alignas(64) uint8_t bytes[chunk];
      const void* of_output = row_of<Real>(kernels, output, dtype, sample, at, count, room[0]);
      const void* of_target = row_of<Real>(kernels, target, dtype, sample, at, count, room[1]);
      if (mask) mask->read(sample, at, count, bytes);
      f(sample, piece, at, count, of_output, of_target, mask ? bytes : nullptr);
    });
  }
  int64_t counted(int64_t sample) const {
    return std::max<int64_t>(1, mask ? mask->valid(sample, output.size) : output.size);
  }
};

template <class Real>
std::tuple<Tensor, Tensor> run(const Problem<Real>& p, const Optional& weight, bool mean) {
  const int64_t B = p.output.count, pieces = (p.output.size + chunk - 1) / chunk;
  std::optional<PerSample> weights;
  if (weight) weights.emplace(*weight, B, "weight");
  std::vector<double> sums(static_cast<size_t>(B * pieces));
  p.run([&](int64_t sample, int64_t piece, int64_t, int64_t count, const void* output, const void* target, const uint8_t* valid) {
    const auto loop = p.loops.losses[static_cast<int>(p.loss)][p.dtype];
    sums[static_cast<size_t>(sample * pieces + piece)] = loop(p.difference(sample), output, target, valid, count);
  });
  const ScalarType dtype = sizeof(Real) == 8 ? ScalarType::Double : ScalarType::Float;
  const NumbersOf means(p.output.tensor, {&B, 1}, ScalarType::Double);  // whole: the gradient of the weight is rounded once
  const NumbersOf losses(p.output.tensor, {&B, size_t(!mean)}, dtype);
  double of_batch = 0;
  for (int64_t b = 0; b < B; ++b) {
    double of_sample = 0;
    for (int64_t i = b * pieces; i < (b + 1) * pieces; ++i) of_sample += sums[static_cast<size_t>(i)];
    of_sample /= static_cast<double>(p.counted(b));
    means.put(b, of_sample);
    const double loss = weights ? (*weights)[b] * of_sample : of_sample;
    of_batch += loss;
    if (!mean) losses.put(b, loss);
  }
  if (mean) losses.put(0, of_batch / static_cast<double>(B));  // of no samples NaN
  return {losses.tensor, means.tensor};
}

template <class Real>
std::tuple<Tensor, Tensor, Tensor> run_backward(const Problem<Real>& p, const Optional& grad_loss, const Optional& grad_means,
                                                const Optional& weight, const Tensor& means, bool mean, bool need_output,
                                                bool need_target, bool need_weight) {
  const int64_t B = p.output.count;
  const Tensor& like = p.output.tensor;
  std::optional<PerSample> of_loss, of_means, weights;
  if (grad_loss) of_loss.emplace(*grad_loss, mean ? 1 : B, "grad_loss");
  if (grad_means) of_means.emplace(*grad_means, B, "grad_means");
  if (weight) weights.emplace(*weight, B, "weight");
  const PerSample found(means, B, "means");

  std::optional<NumbersOf> by_weight;
  if (need_weight && weight) by_weight.emplace(*weight, torch::headeronly::IntHeaderOnlyArrayRef{&B, 1}, weight->scalar_type());
  std::vector<double> slopes(static_cast<size_t>(B));
  for (int64_t b = 0; b < B; ++b) {
    double upstream = of_loss ? (mean ? (*of_loss)[0] / static_cast<double>(B) : (*of_loss)[b]) : 0;
    if (by_weight) by_weight->put(b, upstream * found[b]);
    if (weights) upstream *= (*weights)[b];
    if (of_means) upstream += (*of_means)[b];
    slopes[static_cast<size_t>(b)] = upstream / static_cast<double>(p.counted(b));
  }

  std::optional<Result> by_output, by_target;
  if (need_output) by_output.emplace(like, like.scalar_type());
  if (need_target) by_target.emplace(p.target.tensor, p.target.tensor.scalar_type());
  if (by_output || by_target)
    p.run([&](int64_t sample, int64_t, int64_t at, int64_t count, const void* output, const void* target, const uint8_t* valid) {
      alignas(64) Real room[2][chunk];
      const int64_t element = sample * p.output.size + at;
      const auto to = [&](const std::optional<Result>& r, Real* scratch) -> void* {
        if (!r) return nullptr;
        return r->dtype == p.dtype ? static_cast<void*>(r->data + element * r->bytes) : scratch;
      };
      void* const of_output = to(by_output, room[0]);
      void* const of_target = to(by_target, room[1]);
      const auto loop = p.loops.gradients[static_cast<int>(p.loss)][p.dtype];
      loop(p.difference(sample, slopes[static_cast<size_t>(sample)]), output, target, valid, count, of_output, of_target);
      for (const auto& [r, made] : {std::pair(&by_output, of_output), std::pair(&by_target, of_target)})
        if (*r && (*r)->dtype != p.dtype)
          p.kernels.narrow[(*r)->dtype](static_cast<const Real*>(made), count, (*r)->data + element * (*r)->bytes);
    });
  const auto or_nothing = [](const auto& r, const Tensor& of) { return r ? r->tensor : nothing(of, of.scalar_type()); };
  return {or_nothing(by_output, like), or_nothing(by_target, p.target.tensor), or_nothing(by_weight, like)};
}

}  // namespace

std::tuple<Tensor, Tensor> diffusion_loss_cpu(const Tensor& output, const Tensor& target, const Optional& weight,
                                              const Optional& mask, const Optional& deltas, std::string kind, double delta,
                                              bool mean) {
  if (is_double(output) || is_double(target)) return run(Problem<double>(output, target, mask, deltas, kind, delta), weight, mean);
  return run(Problem<float>(output, target, mask, deltas, kind, delta), weight, mean);
}

std::tuple<Tensor, Tensor, Tensor> diffusion_loss_backward_cpu(
    const Optional& grad_loss, const Optional& grad_means, const Tensor& output, const Tensor& target, const Optional& weight,
    const Optional& mask, const Optional& deltas, const Tensor& means, std::string kind, double delta, bool mean,
    bool need_grad_output, bool need_grad_target, bool need_grad_weight) {
  const auto of = [&]<class Real>(Real) {
    return run_backward(Problem<Real>(output, target, mask, deltas, kind, delta), grad_loss, grad_means, weight, means, mean,
                        need_grad_output, need_grad_target, need_grad_weight);
  };
  return is_double(output) || is_double(target) ? of(double()) : of(float());
}

}  // namespace mmgen_kernels::schedule
