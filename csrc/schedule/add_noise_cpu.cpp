// add_noise on the CPU.
#include <algorithm>
#include <cmath>
#include <numbers>
#include <string>

#include "schedule/pass.h"
#include "schedule/schedule.h"

namespace mmgen_kernels::schedule {
namespace {

[[noreturn]] void refuse(const char* what) { throw std::runtime_error(std::string("add_noise: ") + what); }

// x_t = data x0 + noise eps, and the derivatives of both by time.
struct Weights {
  double data, noise, data_slope = 0, noise_slope = 0;
};

Weights weights_of(const std::string& path, bool by_index, double p) {
  if (path == "linear") return {1 - p, p, -1, 1};
  if (path == "edm") return {1, p, 0, 1};
  if (path == "gvp") {
    const double right_angle = std::numbers::pi / 2, c = std::cos(right_angle * p), s = std::sin(right_angle * p);
    return {c, s, -right_angle * s, right_angle * c};
  }
  if (path != "vp") refuse("path must be vp, linear, gvp or edm");
  if (by_index) return {std::sqrt(p), std::sqrt(1 - p)};
  constexpr double slowest = 0.1, fastest = 20;  // beta of the continuous process
  const double exponent = -p * p * (fastest - slowest) / 4 - p * slowest / 2, data = std::exp(exponent);
  const double noise = std::sqrt(-std::expm1(2 * exponent)), slope = -data * (p * (fastest - slowest) + slowest) / 2;
  return {data, noise, slope, -data * slope / noise};
}

// The target's shares of x0 and of noise.
std::pair<double, double> target_of(const std::string& target, const Weights& w) {
  if (target == "epsilon") return {0, 1};
  if (target == "sample") return {1, 0};
  if (target == "v") return {-w.noise, w.data};
  if (target == "flow") return {w.data_slope, w.noise_slope};
  refuse("target must be epsilon, sample, v or flow");
}

double number_at(const Tensor& t, int64_t i) {
  switch (t.scalar_type()) {
    case ScalarType::Double: return static_cast<const double*>(t.const_data_ptr())[i];
    case ScalarType::Float: return static_cast<const float*>(t.const_data_ptr())[i];
    default: refuse("t and table must be float64 or float32");
  }
}

template <class Real>
std::vector<Result> run(const Samples& x0, const std::optional<Samples>& noise, const std::optional<Tensor>& key,
                        const std::vector<Weights>& weights, const std::optional<std::string>& target) {
  Pass<Real> pass{kernels_of<Real>(selected()), {x0}, {}, {}};
  if (noise) pass.sources.push_back(*noise);
  else
    pass.stream = {static_cast<const uint64_t*>(key->const_data_ptr()), key->dim() == 2,
                   philox::kernels_of(selected()).normal[pass.own], false};
  const ScalarType dtype = x0.tensor.scalar_type();
  pass.results.emplace_back(x0.tensor, dtype);
  if (target) pass.results.emplace_back(x0.tensor, dtype);
  std::vector<Formula<Real>> formulas(static_cast<size_t>(x0.count));
  for (size_t b = 0; b < formulas.size(); ++b) {
    Formula<Real>& f = formulas[b];
    auto& c = f.terms;
    const int eps = noise ? 1 : Combination<Real>::noise;
    c.inputs = noise ? 2 : 1, c.outputs = target ? 2 : 1;
    c.factor[1][0] = static_cast<Real>(weights[b].data), c.factor[1][eps] = static_cast<Real>(weights[b].noise);
    if (target) {
      const auto [data, of_noise] = target_of(*target, weights[b]);
      c.factor[2][0] = static_cast<Real>(data), c.factor[2][eps] = static_cast<Real>(of_noise);
    }
    c.find_present();
    f.source = {0, 1};
    f.draws = !noise;
  }
  pass.run(formulas, x0.size);
  return pass.results;
}

}  // namespace

std::tuple<Tensor, Tensor> add_noise_cpu(const Tensor& x0, const Optional& noise, const Optional& key, const Tensor& t,
                                         const Optional& table, std::string path, std::optional<std::string> target) {
  const Samples data(x0);
  std::optional<Samples> eps;
  std::optional<Tensor> dense_key;
  if (noise) eps.emplace(*noise);
  else if (!key) refuse("noise must be a tensor or a key");
  else dense_key = torch::stable::contiguous(*key);
  if (eps && (eps->count != data.count || eps->size != data.size)) refuse("noise must be of x0's shape");
  if (key && (key->scalar_type() != ScalarType::Long || key->numel() != (key->dim() == 2 ? 2 * data.count : 2)))
    refuse("key must be int64 (2,) or (B, 2)");
  if (t.numel() != data.count) refuse("t must be (B,)");

  const Tensor times = torch::stable::contiguous(t);
  const Tensor entries = table ? torch::stable::contiguous(*table) : times;
  std::vector<Weights> weights;
  for (int64_t b = 0; b < data.count; ++b) {
    int64_t at = b;
    if (table) {
      if (t.scalar_type() != ScalarType::Long || entries.numel() == 0) refuse("t must be int64 with a table that has entries");
      at = std::clamp<int64_t>(static_cast<const int64_t*>(times.const_data_ptr())[b], 0, entries.numel() - 1);
    }
    weights.push_back(weights_of(path, table.has_value(), number_at(entries, at)));
  }
  const std::vector<Result> results = is_double(x0) || (noise && is_double(*noise))
                                          ? run<double>(data, eps, dense_key, weights, target)
                                          : run<float>(data, eps, dense_key, weights, target);
  return {results[0].tensor, target ? results[1].tensor : nothing(x0, x0.scalar_type())};
}

}  // namespace mmgen_kernels::schedule
