// How the operators of discrete diffusion see their tensors: logits position by position, a row of a table for each sample.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>

#include "schedule/discrete_tables.h"
#include "schedule/schedule.h"
#include "torch_tensors.h"

namespace mmgen_kernels::schedule::discrete {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

[[noreturn]] inline void refuse(const char* what) { throw std::runtime_error(std::string("discrete diffusion: ") + what); }

// (B, N, K), or (B, K, N), of any strides, in elements.
struct Field {
  const char* data;
  int64_t bytes, samples, positions, classes, by_sample, by_position, by_class;
  int dtype;

  explicit Field(const Tensor& t, bool classes_first = false)
      : data(static_cast<const char*>(t.const_data_ptr())), bytes(static_cast<int64_t>(t.element_size())),
        dtype(static_cast<int>(float_of(t.scalar_type()))) {
    if (t.dim() != 3) refuse("logits and noise must be (B, N, K)");
    const int last = classes_first ? 1 : 2;
    samples = t.size(0), positions = t.size(3 - last), classes = t.size(last);
    by_sample = t.stride(0), by_position = t.stride(3 - last), by_class = t.stride(last);
  }
  const char* at(int64_t b, int64_t n) const { return data + (b * by_sample + n * by_position) * bytes; }
  bool dense() const { return by_class == 1; }
};

// A row of a table, () for all samples or (B,).
struct Steps {
  Tensor table, index;
  const double* rows;
  const int64_t* indices = nullptr;
  int64_t count, columns, step;
  bool per_sample = false;

  Steps(const Tensor& given, int64_t width, const Optional& at, int64_t number, int64_t samples)
      : table(torch::stable::contiguous(given)), step(number) {
    if (given.scalar_type() != ScalarType::Double || given.dim() != 2 || given.size(0) < 1 || given.size(1) != width)
      refuse("the table must be float64 (steps, columns)");
    rows = static_cast<const double*>(table.const_data_ptr());
    count = table.size(0), columns = width;
    if (!at) return;
    if (at->scalar_type() != ScalarType::Long || at->dim() > 1 || (at->dim() == 1 && at->numel() != samples))
      refuse("index must be int64, one or one for each sample");
    index = torch::stable::contiguous(*at);
    indices = static_cast<const int64_t*>(index.const_data_ptr());
    per_sample = at->dim() == 1;
  }
  int64_t of(int64_t sample) const {
    return std::clamp<int64_t>(indices ? indices[per_sample ? sample : 0] : step, 0, count - 1);
  }
  const double* row(int64_t sample) const { return rows + of(sample) * columns; }
};

inline int64_t padded(int64_t classes) { return (classes + row_step - 1) / row_step * row_step; }

// Rows of `size` numbers from position `first` on, `beyond` past their `count`.
template <class Real>
void load(const Kernels<Real>& kernels, const Field& field, int64_t b, int64_t first, int64_t rows, int64_t count, Real* out,
          int64_t size, Real beyond) {
  if (field.dense())
    for (int64_t r = 0; r < rows; ++r) kernels.widen[field.dtype](field.at(b, first + r), count, out + r * size);
  else kernels.gather[field.dtype](field.at(b, first), field.by_position, field.by_class, rows, count, out, size);
  for (int64_t r = 0; r < rows; ++r) std::fill(out + r * size + count, out + (r + 1) * size, beyond);
}

inline const int64_t* codes_of(const Tensor& dense, const Field& logits) {
  if (dense.scalar_type() != ScalarType::Long || dense.numel() != logits.samples * logits.positions) refuse("codes must be int64 (B, N)");
  return static_cast<const int64_t*>(dense.const_data_ptr());
}

}  // namespace mmgen_kernels::schedule::discrete
