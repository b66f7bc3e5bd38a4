// code_entropy on the CPU, block of rows by block of rows and tile of codes by tile of codes, as code_entropy_problem.h has them.
// What a row adds up over codes is kept per chunk and combined in the order of chunks; what a code adds up over rows belongs to
// the one chunk that holds it. What belongs to a row does not depend on the rows around it. Formulas: docs/code-entropy.md.
#include "vq/code_entropy.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <vector>

#include "vq/code_entropy_problem.h"

namespace mmgen_kernels::vq {
namespace entropy {
namespace {

// What the forward keeps of a row, as the tensor softmax_terms has it.
struct Row {
  double largest, total, mean_below;  // of its scores: the largest, the sum of e^(score - largest), the mean of score - largest

  double entropy() const { return std::log(total) - mean_below; }
};

// The rows of a block, padded to whole panels.
template <class Real>
struct Terms {
  Buffer<Real> largest, inverse_total, mean_below, slope, constant;

  explicit Terms(int64_t room) : largest(room), inverse_total(room), mean_below(room), slope(room), constant(room) {}

  void set(int64_t i, const Row& row, double slope_of_row) {
    largest[i] = static_cast<Real>(row.largest);
    inverse_total[i] = static_cast<Real>(1 / row.total);
    mean_below[i] = static_cast<Real>(row.mean_below);
    slope[i] = static_cast<Real>(slope_of_row);
    constant[i] = 0;
  }
  RowTerms<Real> panel(int64_t first) const {
    return {largest.data() + first, inverse_total.data() + first, mean_below.data() + first, slope.data() + first, constant.data() + first};
  }
};

constexpr Row filling{nowhere, 1, 0};

template <class Real>
void forward(const Problem<Real>& problem, Row* rows, double* mean_probability) {
  const int64_t height = problem.kernels.rows, width = problem.kernels.width;
  Block<Real> block(problem);
  const int64_t room = block.room;
  Buffer<Real> largest(problem.chunks * room);
  std::vector<double> sums(problem.chunks * room), weighted(problem.chunks * room);
  Terms<Real> terms(room);
  std::fill_n(mean_probability, problem.codes.count, 0.0);
  for (int64_t first = 0; first < problem.count; first += problem.block) {
    block.load(first);
    std::fill(largest.begin(), largest.end(), -std::numeric_limits<Real>::infinity());
    std::fill(sums.begin(), sums.end(), 0.0);
    std::fill(weighted.begin(), weighted.end(), 0.0);
    each_tile(problem, [&](Tile<Real>& tile, int64_t chunk) {
      for (int64_t p = 0; p < block.panels; ++p) {
        const int64_t at = chunk * room + p * height;
        tile.score(block, p);
        problem.kernels.reduce(tile.scores.data(), tile.padded, &largest[at], &sums[at], &weighted[at]);
      }
    });
    for (int64_t i = 0; i < block.panels * height; ++i) {
      if (i >= block.count) {
        terms.set(i, filling, 0);
        continue;
      }
      double most = -std::numeric_limits<double>::infinity(), sum = 0, product = 0;
      for (int64_t chunk = 0; chunk < problem.chunks; ++chunk) most = std::max<double>(most, largest[chunk * room + i]);
      for (int64_t chunk = 0; chunk < problem.chunks; ++chunk) {
        const int64_t at = chunk * room + i;
        const double rise = most - largest[at], shrink = std::exp(-rise);
        sum += shrink * sums[at];
        product += shrink * (weighted[at] - rise * sums[at]);
      }
      Row& row = rows[problem.row(first + i)];
      row = {most, sum, product / sum};
      terms.set(i, row, 0);
    }
    each_tile(problem, [&, width](Tile<Real>& tile, int64_t) {
      std::vector<Real> lanes(tile.padded * width, Real(0));
      for (int64_t p = 0; p < block.panels; ++p) {
        tile.score(block, p);
        problem.kernels.add_probabilities(tile.scores.data(), tile.padded, terms.panel(p * height), lanes.data());
      }
      for (int64_t k = 0; k < tile.count; ++k)
        mean_probability[tile.first + k] += std::accumulate(&lanes[k * width], &lanes[(k + 1) * width], 0.0);
    });
  }
  // Their sum is the number of rows but for roundings, which equal rows would make alike, and is what makes a mean of it.
  const double sum = std::accumulate(mean_probability, mean_probability + problem.codes.count, 0.0);
  if (problem.count > 0)
    for (int64_t k = 0; k < problem.codes.count; ++k) mean_probability[k] /= sum;
}

// The gradient of v from that of v / |v|: what is across v, divided by |v|; 0 for a zero vector, whose score is a constant.
void project(const double* unit, double inverse_length, double* gradient, int64_t dim) {
  double along = 0;
  for (int64_t d = 0; d < dim; ++d) along += unit[d] * gradient[d];
  for (int64_t d = 0; d < dim; ++d) gradient[d] = inverse_length * (gradient[d] - along * unit[d]);
}

struct Backward {
  const Row* rows;        // (N,)
  const double* slopes;   // (N,), minus the gradient of a row's entropy
  const double* weights;  // (K,), or nullptr: the gradient of the mean entropy by each row's probability, centred
};

template <class Real>
struct Gradients {
  Real *x, *codebook;  // (N, D), (K, D), both zero at first; or nullptr
};

template <class Real>
void backward(const Problem<Real>& problem, const Backward& in, const Gradients<Real>& out) {
  const int64_t height = problem.kernels.rows, width = problem.kernels.width, dim = problem.x.dim, stride = problem.stride;
  Block<Real> block(problem);
  const int64_t room = block.room;
  Terms<Real> terms(room);
  std::vector<double> totals(problem.chunks * room);
  const auto total_of = [&](int64_t i) {
    double total = 0;
    for (int64_t chunk = 0; chunk < problem.chunks; ++chunk) total += totals[chunk * room + i];
    return total;
  };
  Buffer<Real> to_rows(out.x ? problem.chunks * room * stride : 0);
  const auto weights_of = [&](const Tile<Real>& tile, Real* weights) {
    for (int64_t k = 0; k < tile.padded; ++k) weights[k] = in.weights && k < tile.count ? static_cast<Real>(in.weights[tile.first + k]) : 0;
  };
  for (int64_t first = 0; first < problem.count; first += problem.block) {
    block.load(first);
    for (int64_t i = 0; i < block.panels * height; ++i) {
      const int64_t n = i < block.count ? problem.row(first + i) : -1;
      if (n < 0) terms.set(i, filling, 0);
      else terms.set(i, in.rows[n], in.slopes[n]);
    }
    if (in.weights) {  // what the mean entropy takes from all codes of a row alike, so that a row's gradients add up to 0
      std::fill(totals.begin(), totals.end(), 0.0);
      each_tile(problem, [&](Tile<Real>& tile, int64_t chunk) {
        Real weights[tile_codes];
        weights_of(tile, weights);
        for (int64_t p = 0; p < block.panels; ++p) {
          tile.score(block, p);
          problem.kernels.add_weighted(tile.scores.data(), tile.padded, terms.panel(p * height), weights,
                                       &totals[chunk * room + p * height]);
        }
      });
      for (int64_t i = 0; i < block.count; ++i)
        terms.constant[i] = static_cast<Real>(-total_of(i) / in.rows[problem.row(first + i)].total);
    }
    std::fill(totals.begin(), totals.end(), 0.0);
    std::fill(to_rows.begin(), to_rows.end(), Real(0));
    each_tile(problem, [&](Tile<Real>& tile, int64_t chunk) {
      Real weights[tile_codes];
      weights_of(tile, weights);
      std::vector<Real> lanes(tile.padded * width, Real(0));
      Buffer<Real> to_codes;
      if (out.codebook) to_codes.assign(tile.padded * stride, Real(0));
      for (int64_t p = 0; p < block.panels; ++p) {
        tile.score(block, p);
        problem.kernels.gradient(tile.scores.data(), tile.padded, terms.panel(p * height), weights, lanes.data(),
                                 &totals[chunk * room + p * height]);
        if (out.codebook)
          problem.kernels.add_to_codes(tile.scores.data(), block.rows.data() + p * height * stride, stride, tile.padded, to_codes.data());
        if (out.x)
          problem.kernels.add_to_rows(tile.scores.data(), tile.codes.data(), stride, tile.padded,
                                      &to_rows[(chunk * room + p * height) * stride]);
      }
      if (!out.codebook) return;
      std::vector<double> code(dim), gradient(dim);
      for (int64_t k = 0; k < tile.count; ++k) {
        const double sum = std::accumulate(&lanes[k * width], &lanes[(k + 1) * width], 0.0);
        problem.prepare(problem.codes, tile.first + k, code.data());
        for (int64_t d = 0; d < dim; ++d) {
          gradient[d] = to_codes[k * stride + d] * problem.scale;
          if (problem.metric == Metric::l2) gradient[d] -= code[d] * sum * problem.scale;
        }
        if (problem.metric == Metric::cosine) project(code.data(), tile.scales[k], gradient.data(), dim);
        Real* to = out.codebook + (tile.first + k) * dim;
        for (int64_t d = 0; d < dim; ++d) to[d] = static_cast<Real>(to[d] + gradient[d]);
      }
    });
    if (out.x) parallel(block.count, problem.chunks * dim, [&](int64_t begin, int64_t end) {
      std::vector<double> total(dim), row(dim);
      for (int64_t i = begin; i < end; ++i) {
        std::fill(total.begin(), total.end(), 0.0);
        for (int64_t chunk = 0; chunk < problem.chunks; ++chunk)
          for (int64_t d = 0; d < dim; ++d) total[d] += to_rows[(chunk * room + i) * stride + d];
        const double inverse_length = problem.prepare(problem.x, problem.row(first + i), row.data());
        if (problem.metric == Metric::cosine) project(row.data(), inverse_length, total.data(), dim);
        if (problem.metric == Metric::l2) {  // the gradients of its scores add up to 0 but for roundings, of which x - c is not made
          const double left = total_of(i) * problem.scale;
          for (int64_t d = 0; d < dim; ++d) total[d] -= left * row[d];
        }
        Real* to = out.x + problem.row(first + i) * dim;
        for (int64_t d = 0; d < dim; ++d) to[d] = static_cast<Real>(total[d]);
      }
    });
  }
}

// -sum_k q log(q + eps), 0 log 0 = 0; NaN stays NaN.
double entropy_of(const double* probabilities, int64_t count, double eps) {
  double sum = 0;
  for (int64_t k = 0; k < count; ++k)
    if (probabilities[k] != 0) sum -= probabilities[k] * std::log(probabilities[k] + eps);
  return sum;
}

// The derivative of entropy_of by each probability, times `factor`, less their mean weighted by the probabilities: a constant
// has no gradient, and what is left is small where it cancels.
std::vector<double> weights_of(const double* probabilities, int64_t count, double eps, double factor) {
  std::vector<double> weights(count);
  double mean = 0;
  for (int64_t k = 0; k < count; ++k) {
    const double q = probabilities[k];
    weights[k] = q == 0 && eps == 0 ? 0 : -factor * (std::log(q + eps) + q / (q + eps));
    mean += q * weights[k];
  }
  for (double& weight : weights) weight -= mean;
  return weights;
}

// A tensor of any float dtype and any strides as dense fp64.
std::vector<double> values_of(const Tensor& tensor) {
  const Tensor dense = torch::stable::contiguous(tensor);
  std::vector<double> values(dense.numel());
  read_row({dense.const_data_ptr(), float_of(dense.scalar_type()), 1, dense.numel(), dense.numel()}, 0, values.data());
  return values;
}

template <class Real>
void write(const std::vector<double>& values, const Tensor& out) {
  std::transform(values.begin(), values.end(), static_cast<Real*>(out.mutable_data_ptr()), [](double v) { return static_cast<Real>(v); });
}

ScalarType wide_of(const Tensor& x, const Tensor& codebook) {
  const bool wide = x.scalar_type() == ScalarType::Double || codebook.scalar_type() == ScalarType::Double;
  return wide ? ScalarType::Double : ScalarType::Float;
}

std::vector<int64_t> sizes_of(const Tensor& t) { return {t.sizes().begin(), t.sizes().end()}; }

// What both directions read.
struct Inputs {
  bool has_heads;
  HeadRows x, codes;
  Tensor dense_mask;
  const bool* mask = nullptr;

  Inputs(const Tensor& x_, const Tensor& codebook, const std::optional<Tensor>& mask_)
      : has_heads(codebook.dim() == 3), x(x_, has_heads), codes(codebook, has_heads) {
    if (!mask_.has_value()) return;
    dense_mask = torch::stable::contiguous(*mask_);
    mask = static_cast<const bool*>(dense_mask.const_data_ptr());
  }
  int64_t heads() const { return x.heads; }
  int64_t rows() const { return x.first.count; }
  const bool* mask_of(int64_t h) const { return mask ? mask + h * rows() : nullptr; }
};

template <class Real>
void all_heads_forward(const Inputs& in, double temperature, Metric metric, double eps, Row* rows, const Tensor& sample_entropy,
                       const Tensor& mean_entropy, const Tensor& mean_probability) {
  const int64_t count = in.rows(), codes = in.codes.first.count;
  std::vector<double> entropies(in.heads() * count), means(in.heads()), probabilities(codes);
  std::fill_n(rows, entropies.size(), Row{0, 1, 0});  // of rows that are not valid
  for (int64_t h = 0; h < in.heads(); ++h) {
    const Problem<Real> problem(in.x.head(h), in.codes.head(h), in.mask_of(h), metric, temperature);
    forward(problem, rows + h * count, probabilities.data());
    means[h] = entropy_of(probabilities.data(), codes, eps);
    Real* out = static_cast<Real*>(mean_probability.mutable_data_ptr()) + h * codes;
    std::transform(probabilities.begin(), probabilities.end(), out, [](double q) { return static_cast<Real>(q); });
  }
  std::transform(rows, rows + entropies.size(), entropies.begin(), [](const Row& row) { return row.entropy(); });
  write<Real>(entropies, sample_entropy);
  write<Real>(means, mean_entropy);
}

template <class Real>
void all_heads_backward(const Inputs& in, const std::optional<Tensor>& grad_sample_entropy,
                        const std::optional<Tensor>& grad_mean_entropy, const Row* rows, const Tensor& mean_probability,
                        double temperature, Metric metric, double eps, const Gradients<Real>& out) {
  const int64_t count = in.rows(), dim = in.x.first.dim, codes = in.codes.first.count;
  std::vector<double> slopes(in.heads() * count, 0.0), grad_mean(in.heads(), 0.0);
  if (grad_sample_entropy.has_value()) slopes = values_of(*grad_sample_entropy);
  for (double& slope : slopes) slope = -slope;
  if (grad_mean_entropy.has_value()) grad_mean = values_of(*grad_mean_entropy);
  const std::vector<double> probabilities = values_of(mean_probability);
  for (int64_t h = 0; h < in.heads(); ++h) {
    const Problem<Real> problem(in.x.head(h), in.codes.head(h), in.mask_of(h), metric, temperature);
    std::vector<double> weights;
    if (grad_mean_entropy.has_value())
      weights = weights_of(&probabilities[h * codes], codes, eps, grad_mean[h] / static_cast<double>(std::max<int64_t>(1, problem.count)));
    backward<Real>(problem, {rows + h * count, slopes.data() + h * count, weights.empty() ? nullptr : weights.data()},
                   {out.x ? out.x + h * count * dim : nullptr, out.codebook ? out.codebook + h * codes * dim : nullptr});
  }
}

// Zeros in which a gradient adds up: in the result's own dtype where that is fp32 or fp64.
Tensor zeros(const Tensor& like, ScalarType dtype) {
  Tensor out = empty_like_with(like, sizes_of(like), dtype);
  std::fill_n(static_cast<char*>(out.mutable_data_ptr()), out.numel() * out.element_size(), char(0));  // of no elements, null
  return out;
}

Tensor as(const Tensor& t, ScalarType dtype) { return t.scalar_type() == dtype ? t : torch::stable::to(t, dtype); }

}  // namespace
}  // namespace entropy

std::tuple<Tensor, Tensor, Tensor, Tensor> code_entropy_cpu(const Tensor& x, const Tensor& codebook,
                                                            const std::optional<Tensor>& mask, double temperature,
                                                            std::string metric, double eps) {
  const entropy::Inputs in(x, codebook, mask);
  const ScalarType wide = entropy::wide_of(x, codebook);
  const std::vector<int64_t> of_heads = in.has_heads ? std::vector<int64_t>{in.heads()} : std::vector<int64_t>{};
  std::vector<int64_t> of_rows = leading_sizes(x);
  Tensor sample_entropy = empty_like_with(x, of_rows, wide), mean_entropy = empty_like_with(x, of_heads, wide);
  of_rows.push_back(3);
  Tensor softmax_terms = empty_like_with(x, of_rows, ScalarType::Double);
  Tensor mean_probability = empty_like_with(x, leading_sizes(codebook), wide);
  (wide == ScalarType::Double ? entropy::all_heads_forward<double> : entropy::all_heads_forward<float>)(
      in, temperature, metric_of(metric), eps, static_cast<entropy::Row*>(softmax_terms.mutable_data_ptr()), sample_entropy,
      mean_entropy, mean_probability);
  return {sample_entropy, mean_entropy, softmax_terms, mean_probability};
}

std::tuple<Tensor, Tensor> code_entropy_backward_cpu(const std::optional<Tensor>& grad_sample_entropy,
                                                     const std::optional<Tensor>& grad_mean_entropy, const Tensor& x,
                                                     const Tensor& codebook, const std::optional<Tensor>& mask,
                                                     const Tensor& softmax_terms, const Tensor& mean_probability,
                                                     double temperature, std::string metric, double eps, bool need_grad_x,
                                                     bool need_grad_codebook) {
  const entropy::Inputs in(x, codebook, mask);
  const ScalarType wide = entropy::wide_of(x, codebook);
  const Tensor rows = torch::stable::contiguous(softmax_terms);
  Tensor grad_x = empty_like_with(x, {0}, x.scalar_type()), grad_codebook = empty_like_with(codebook, {0}, codebook.scalar_type());
  if (need_grad_x) grad_x = entropy::zeros(x, wide);
  if (need_grad_codebook) grad_codebook = entropy::zeros(codebook, wide);
  const auto run = [&]<class Real>(Real) {
    entropy::all_heads_backward<Real>(in, grad_sample_entropy, grad_mean_entropy,
                                      static_cast<const entropy::Row*>(rows.const_data_ptr()), mean_probability, temperature,
                                      metric_of(metric), eps,
                                      {need_grad_x ? static_cast<Real*>(grad_x.mutable_data_ptr()) : nullptr,
                                       need_grad_codebook ? static_cast<Real*>(grad_codebook.mutable_data_ptr()) : nullptr});
  };
  if (wide == ScalarType::Double) run(double{});
  else run(float{});
  return {entropy::as(grad_x, x.scalar_type()), entropy::as(grad_codebook, codebook.scalar_type())};
}

}  // namespace mmgen_kernels::vq
