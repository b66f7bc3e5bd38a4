// The arguments of scheduler_step as its GPU kernels take them: which inputs count, where samples lie, where the row comes from.
#pragma once

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "schedule/samples.h"
#include "schedule/schedule.h"
#include "schedule/schedule_simt.h"

namespace mmgen_kernels::schedule::gpu {

struct Arguments {
  const Tensor& input_0;
  const Optional *more_inputs[max_inputs - 1], &unconditional, &noise, &variance;
  const Tensor& coefficients;
  const Optional &index, &key;
  int64_t step, guided;
  double scale;
  std::optional<double> clamp;
  OptionalType dtypes[max_outputs];
};

[[noreturn]] inline void refuse_step(const char* what) { throw std::runtime_error(std::string("scheduler_step: ") + what); }

// The results; Launch as in schedule_simt.h. Without elements there is nothing to launch.
template <class Launch>
std::tuple<Tensor, Tensor, Tensor> run_step(const Arguments& a, const Launch& launch) {
  Step p;
  int n = 0;
  std::vector<Samples> all;  // the inputs, then what else there is
  const auto add = [&](const Optional& t) {
    if (t) all.emplace_back(*t);
    return t.has_value();
  };
  n += add(a.input_0);
  for (const Optional* t : a.more_inputs) n += add(*t);
  const bool guides = add(a.unconditional), has_noise = add(a.noise), learned = add(a.variance);
  const Samples first = all[0];
  for (const Samples& s : all)
    if (s.count != first.count || s.size != first.size) refuse_step("tensors must be of input_0's shape");

  std::vector<Tensor> results;
  for (const OptionalType& dtype : a.dtypes)
    if (dtype) p.results[p.outputs++].dtype = float_of(*dtype);
  for (int k = 0; k < max_outputs; ++k) {
    const Tensor& like = first.tensor;
    results.push_back(k < p.outputs ? quick_empty(like, like.sizes(), *a.dtypes[k]) : nothing(like, *a.dtypes[0]));
    if (k < p.outputs) p.results[k].data = results.back().mutable_data_ptr();
  }

  const Tensor table = torch::stable::contiguous(a.coefficients);
  if (table.scalar_type() != ScalarType::Double || table.dim() != 3 || table.size(0) < 1 || table.size(1) != 1 + p.outputs + learned ||
      table.size(2) != n + 2)
    refuse_step("coefficients must be float64 (steps, 1 + outputs, inputs + 2)");
  if (a.guided < 0 || a.guided >= n) refuse_step("guided must name an input");
  p.steps = table.size(0), p.rows = static_cast<int>(table.size(1)), p.columns = n + 2;
  p.step = std::clamp<int64_t>(a.step, 0, p.steps - 1);
  const auto* numbers = static_cast<const double*>(table.const_data_ptr());
  const bool on_host = !a.index && table.is_cpu();
  if (on_host) std::copy_n(numbers + p.step * p.rows * p.columns, p.rows * p.columns, p.row);
  else p.table = numbers;
  // whether some term multiplies it; a row on the device says so only there
  const auto used = [&](int column) {
    for (int k = 0; k <= p.outputs; ++k)
      if (!on_host || p.row[k * p.columns + column] != 0) return true;
    return false;
  };

  Tensor indices, keys;
  if (a.index) {
    if (a.index->scalar_type() != ScalarType::Long || (a.index->dim() > 0 && a.index->numel() != first.count))
      refuse_step("index must be int64, one or one for each sample");
    indices = torch::stable::contiguous(*a.index);
    p.index = static_cast<const int64_t*>(indices.const_data_ptr());
    p.step_per_sample = a.index->dim() > 0;
  }
  const bool draws = a.key && used(n + 1);
  if (draws) {
    const bool each = a.key->dim() == 2;
    if (a.key->scalar_type() != ScalarType::Long || a.key->numel() != (each ? 2 * first.count : 2)) refuse_step("key must be int64 (2,) or (B, 2)");
    keys = torch::stable::contiguous(*a.key);
    p.keys = static_cast<const uint64_t*>(keys.const_data_ptr());
    p.key_per_sample = each;
  }
  p.clamps = a.clamp.has_value(), p.bound = a.clamp.value_or(0);

  // Nothing a sample's own: all of them are one long sample.
  if (!p.step_per_sample && !(p.keys && p.key_per_sample) && std::all_of(all.begin(), all.end(), [](const Samples& s) { return s.joined(); }))
    for (Samples& s : all) s.flatten();
  p.samples = all[0].count, p.size = all[0].size;

  bool wide = false, short_inputs = true;
  const auto source = [&](const Samples& s) {
    Source found{s.data, s.stride / s.bytes, static_cast<Float>(s.dtype)};
    found.aligned = reinterpret_cast<uintptr_t>(s.data) % 16 == 0 && (p.samples == 1 || s.stride % 16 == 0);
    short_inputs &= s.bytes == 2;
    return found;
  };
  for (const Samples& s : all) wide |= s.bytes == 8;
  p.guides = guides && used(static_cast<int>(a.guided)), p.scale = a.scale;
  const auto keep = [&](int j) {
    if (!used(j)) return;
    p.column[p.count] = j;
    p.inputs[p.count++] = source(all[static_cast<size_t>(j)]);
  };
  if (p.guides) keep(static_cast<int>(a.guided));
  for (int j = 0; j < n; ++j)
    if (!p.guides || j != a.guided) keep(j);
  size_t next = static_cast<size_t>(n);
  if (guides) {
    if (p.guides) p.unconditional = source(all[next]);
    ++next;
  }
  if (has_noise) {
    if (used(n + 1)) p.noise = source(all[next]);
    ++next;
  }
  if (learned && (p.keys || p.noise.data)) p.variance = source(all[next]);
  if (p.samples * p.size > 0) launch_step(p, wide, short_inputs, launch);
  return {results[0], results[1], results[2]};
}

}  // namespace mmgen_kernels::schedule::gpu
