// scheduler_step and guidance on the CPU.
#include "schedule/schedule.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "schedule/guidance.h"

namespace mmgen_kernels::schedule {
namespace {

[[noreturn]] void refuse(const char* what) { throw std::runtime_error(std::string("scheduler_step: ") + what); }

// The rows of the steps: (steps, 1 + outputs, inputs + 2), with a row more where a deviation is learned.
struct Table {
  Tensor tensor;
  const double* data;
  int64_t steps, rows, columns;

  explicit Table(const Tensor& given) : tensor(made_contiguous(given)) {
    if (given.scalar_type() != ScalarType::Double || given.dim() != 3) refuse("coefficients must be float64 (steps, rows, columns)");
    data = static_cast<const double*>(tensor.const_data_ptr());
    steps = tensor.size(0), rows = tensor.size(1), columns = tensor.size(2);
  }
  double at(int64_t step, int64_t row, int64_t column) const { return data[(step * rows + row) * columns + column]; }
};

// Which row a sample takes: a number that the host knows, or one of a tensor, clamped.
struct Steps {
  const int64_t* data = nullptr;
  bool per_sample = false;
  int64_t step = 0, count = 0;

  int64_t of(int64_t sample) const {
    const int64_t wanted = data ? data[per_sample ? sample : 0] : step;
    return std::clamp<int64_t>(wanted, 0, count - 1);
  }
};

// torch.quantile: between the two nearest of n values, whose order is lost. NaN if one is NaN.
template <class Real>
Real quantile(Real* values, int64_t n, double ratio) {
  if (std::any_of(values, values + n, [](Real v) { return std::isnan(v); })) return std::numeric_limits<Real>::quiet_NaN();
  const double rank = ratio * double(n - 1);
  Real* const low = values + static_cast<int64_t>(rank);
  std::nth_element(values, low, values + n);
  const Real below = *low, above = low + 1 < values + n ? *std::min_element(low + 1, values + n) : below;
  return below + static_cast<Real>(rank - std::floor(rank)) * (above - below);
}

struct Limits {
  std::optional<double> clamp, threshold;
  double threshold_max;
  bool any() const { return clamp || threshold; }
};

// A call as it was given; `sources` are the inputs, noise that is added as it is, and the unconditional prediction.
struct Call {
  std::vector<Samples> sources;
  int64_t inputs = 0, outputs = 0, guided = 0;
  int noise = -1, uncond = -1;  // which of the sources
  std::optional<Samples> variance, spread_noise;
  std::optional<Tensor> key;
  Steps steps;
  double scale, rescale;
  Limits limits;
  std::vector<ScalarType> dtypes;

  bool draws() const { return key || spread_noise; }
};

// Leaves out the inputs that no result needs, and makes the derived value part of the results where nothing limits it.
template <class Real>
Formula<Real> formula_of(const Table& table, int64_t step, const Call& call, double rescaled) {
  constexpr int derived = Combination<Real>::derived, noise = Combination<Real>::noise, terms = Combination<Real>::terms;
  std::array<std::array<double, terms>, 1 + max_outputs> row{};
  for (int64_t k = 0; k <= call.outputs; ++k) {
    for (int64_t j = 0; j < call.inputs; ++j) row[k][j] = table.at(step, k, j);
    if (call.uncond >= 0) row[k][call.guided] *= rescaled;
    row[k][derived] = k == 0 ? 0 : table.at(step, k, call.inputs);
    row[k][noise] = table.at(step, k, call.inputs + 1);
  }
  Formula<Real> f;
  auto& c = f.terms;
  for (int64_t k = 1; k <= call.outputs; ++k) c.derives |= row[k][derived] != 0;
  if (c.derives && !call.limits.any()) {
    for (int64_t k = 1; k <= call.outputs; ++k) {
      const double share = std::exchange(row[k][derived], 0.0);
      for (int j = 0; j < terms; ++j)
        if (share != 0 && row[0][j] != 0) row[k][j] += share * row[0][j];
    }
    c.derives = false;
  }
  if (!c.derives) row[0] = {};

  c.outputs = static_cast<int>(call.outputs);
  const auto used = [&](int column) {
    return std::any_of(row.begin(), row.end(), [&](const auto& of) { return of[column] != 0; });
  };
  const auto keep = [&](int column, int source) {
    if (!used(column)) return;
    f.source[c.inputs] = source;
    for (int64_t k = 0; k <= call.outputs; ++k) c.factor[k][c.inputs] = static_cast<Real>(row[k][column]);
    ++c.inputs;
  };
  c.guides = call.uncond >= 0 && used(static_cast<int>(call.guided)), c.scale = static_cast<Real>(call.scale);
  if (c.guides) keep(static_cast<int>(call.guided), static_cast<int>(call.guided));
  for (int j = 0; j < call.inputs; ++j)
    if (!c.guides || j != call.guided) keep(j, j);
  if (call.noise >= 0) keep(noise, call.noise);
  if (c.guides) f.source[c.inputs++] = call.uncond;
  if (c.inputs == 0) c.inputs = 1;  // of factor 0: it is not read into a result
  for (int64_t k = 0; k <= call.outputs; ++k) {
    c.factor[k][derived] = static_cast<Real>(row[k][derived]);
    if (call.draws()) c.factor[k][noise] = static_cast<Real>(row[k][noise]);
  }
  f.draws = call.draws() && used(noise);
  c.find_present();
  if (call.limits.clamp) c.bound = static_cast<Real>(*call.limits.clamp);
  f.step = step;
  if (call.variance) {  // deviation = exp((low + (high - low) (v + 1) / 2) / 2)
    const double low = table.at(step, call.outputs + 1, 0), high = table.at(step, call.outputs + 1, 1);
    f.middle = static_cast<Real>((low + high) / 4), f.slope = static_cast<Real>((high - low) / 4);
  }
  return f;
}

// Limits the derived value of each sample by a quantile of its magnitudes, for which it is made once more.
template <class Real>
void find_thresholds(const Pass<Real>& pass, std::vector<Formula<Real>>& formulas, const Samples& like, const Limits& limits) {
  Pass<Real> once = pass;
  once.results.clear();
  once.results.emplace_back(like.tensor, sizeof(Real) == 8 ? ScalarType::Double : ScalarType::Float);
  std::vector<Formula<Real>> derived = formulas;
  for (auto& f : derived) {
    auto& c = f.terms;
    std::copy(std::begin(c.factor[0]), std::end(c.factor[0]), std::begin(c.factor[1]));
    c.outputs = 1, c.derives = false;
    c.find_present();
  }
  once.run(derived, like.size);
  auto* values = reinterpret_cast<Real*>(once.results[0].data);
  parallel(like.count, like.size * 8, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      Real* d = values + b * like.size;
      for (int64_t i = 0; i < like.size; ++i) d[i] = std::abs(d[i]);
      const Real wanted = quantile(d, like.size, *limits.threshold), most = static_cast<Real>(limits.threshold_max);
      auto& c = formulas[static_cast<size_t>(b)].terms;  // as torch.clamp(min=1, max): the maximum wins, NaN stays
      c.bound = c.divisor = std::isnan(wanted) ? wanted : std::min(std::max(wanted, Real(1)), most);
      c.divides = true;
    }
  });
}

template <class Real>
std::vector<Tensor> run(const Table& table, Call& call) {
  const Kernels<Real>& kernels = kernels_of<Real>(selected());
  std::vector<double> rescaled;
  if (call.uncond >= 0 && call.rescale != 0)
    rescaled = rescaling(kernels, call.sources[call.guided], call.sources[call.uncond], call.scale, call.rescale);

  std::vector<Samples*> all;
  for (Samples& s : call.sources) all.push_back(&s);
  for (auto* s : {&call.variance, &call.spread_noise})
    if (*s) all.push_back(&**s);
  const bool by_sample = call.steps.per_sample || (call.key && call.key->dim() == 2) || !rescaled.empty() || call.limits.threshold;
  if (!by_sample && std::all_of(all.begin(), all.end(), [](const Samples* s) { return s->joined(); }))
    for (Samples* s : all) s->flatten();

  const Samples& first = call.sources[0];
  Pass<Real> pass{kernels, call.sources, {}, {}, call.variance ? &*call.variance : nullptr,
                  call.spread_noise ? &*call.spread_noise : nullptr};
  pass.results.reserve(max_outputs);
  for (ScalarType dtype : call.dtypes) pass.results.emplace_back(first.tensor, dtype);
  if (call.key)
    pass.stream = {static_cast<const uint64_t*>(call.key->const_data_ptr()), call.key->dim() == 2,
                   philox::kernels_of(selected()).normal[pass.own]};
  std::vector<Formula<Real>> formulas;
  formulas.reserve(static_cast<size_t>(first.count));
  for (int64_t b = 0; b < first.count; ++b)
    formulas.push_back(formula_of<Real>(table, call.steps.of(b), call, rescaled.empty() ? 1 : rescaled[static_cast<size_t>(b)]));
  if (call.limits.threshold && first.size > 0) find_thresholds(pass, formulas, first, call.limits);
  pass.run(formulas, first.size);

  std::vector<Tensor> results;
  results.reserve(max_outputs);
  for (const Result& r : pass.results) results.push_back(r.tensor);
  return results;
}

void check_key(const Tensor& key, int64_t samples) {
  const bool one = key.dim() == 1 && key.size(0) == 2, each = key.dim() == 2 && key.size(0) == samples && key.size(1) == 2;
  if (key.scalar_type() != ScalarType::Long || !(one || each)) refuse("key must be int64 (2,) or (B, 2)");
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> scheduler_step_cpu(
    const Tensor& input_0, const Tensor& coefficients, int64_t step, ScalarType dtype_0, const Optional& input_1, OptionalType dtype_1,
    const Optional& input_2, const Optional& input_3, const Optional& input_4, OptionalType dtype_2, std::optional<double> clamp,
    const Optional& noise, const Optional& key, const Optional& index, const Optional& uncond, int64_t guided, double guidance_scale,
    double guidance_rescale, const Optional& variance, std::optional<double> threshold, double threshold_max) {
  const Table table(coefficients);
  Call call{};
  call.sources.reserve(max_inputs);
  bool wide = false;
  const auto samples_of = [&](const Tensor& t) {
    Samples s(t);
    if (!call.sources.empty() && (s.count != call.sources[0].count || s.size != call.sources[0].size))
      refuse("tensors must be of input_0's shape");
    wide |= is_double(t);
    return s;
  };
  const auto add = [&](const Tensor& t) {
    call.sources.push_back(samples_of(t));
    return static_cast<int>(call.sources.size()) - 1;
  };
  add(input_0);
  for (const Optional* t : {&input_1, &input_2, &input_3, &input_4})
    if (*t) add(**t);
  call.inputs = static_cast<int64_t>(call.sources.size());
  if (variance) call.variance = samples_of(*variance);
  if (noise && variance) call.spread_noise = samples_of(*noise);
  else if (noise) call.noise = add(*noise);
  if (uncond) call.uncond = add(*uncond);
  const int64_t samples = call.sources[0].count;
  if (key) {
    check_key(*key, samples);
    call.key = torch::stable::contiguous(*key);
  }
  for (const OptionalType& d : {OptionalType(dtype_0), dtype_1, dtype_2})
    if (d) call.dtypes.push_back(*d);
  call.outputs = static_cast<int64_t>(call.dtypes.size());
  if (table.rows != 1 + call.outputs + variance.has_value() || table.columns != call.inputs + 2 || table.steps < 1)
    refuse("coefficients must be (steps, 1 + outputs, inputs + 2)");
  if (guided < 0 || guided >= call.inputs) refuse("guided must name an input");
  call.guided = guided, call.scale = guidance_scale, call.rescale = guidance_rescale;
  call.limits = {clamp, threshold, threshold_max};
  call.steps.step = step, call.steps.count = table.steps;
  Tensor indices;
  if (index) {
    if (index->scalar_type() != ScalarType::Long || (index->numel() != 1 && index->numel() != samples))
      refuse("index must be int64, one or one for each sample");
    indices = torch::stable::contiguous(*index);
    call.steps.data = static_cast<const int64_t*>(indices.const_data_ptr());
    call.steps.per_sample = index->dim() > 0;
  }

  std::vector<Tensor> results = wide ? run<double>(table, call) : run<float>(table, call);
  while (results.size() < max_outputs) results.push_back(nothing(input_0, dtype_0));
  return {results[0], results[1], results[2]};
}

}  // namespace mmgen_kernels::schedule
