// What a token finds: its channels, and its modulation vectors in whatever shape they came, widened once for all tokens that share
// them.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <vector>

#include "aligned.h"
#include "modulation/modulation.h"
#include "modulation/tables.h"
#include "torch_tensors.h"

namespace mmgen_kernels::modulation {

template <class T>
using Buffer = std::vector<T, Aligned<T>>;

enum Name { gate, shift, scale, shift_2, scale_2, vectors };  // in the order of the arguments, which is that of the table's rows

// (B, T, D), read by token number b T + t.
struct Activations {
  Tensor tensor;  // keeps the data alive
  char* data;
  int dtype;
  int64_t samples, length, dim, sample_stride, token_stride;  // strides in bytes
  bool evenly;                                                // spaced: no division by `length`, which takes as long as ten vectors

  explicit Activations(const Tensor& t) : tensor(with_dense_channels(t)) {
    data = static_cast<char*>(const_cast<void*>(tensor.const_data_ptr()));
    dtype = static_cast<int>(float_of(tensor.scalar_type()));
    samples = tensor.size(0), length = tensor.size(1), dim = tensor.size(2);
    const int64_t size = tensor.element_size();
    sample_stride = tensor.stride(0) * size, token_stride = tensor.stride(1) * size;
    evenly = samples == 1 || sample_stride == length * token_stride;
  }
  int64_t tokens() const { return samples * length; }
  char* row(int64_t n) const {
    return data + (evenly ? n * token_stride : n / length * sample_stride + n % length * token_stride);
  }
};

// Token -> row of (R, D), for packed sequences; without it, the shapes of the vectors say which row is a token's.
struct Rows {
  Tensor tensor;
  bool wide = false, given = false;

  explicit Rows(const Optional& rows) {
    if (!rows) return;
    tensor = torch::stable::contiguous(*rows);
    given = true;
    wide = tensor.scalar_type() == ScalarType::Long;
  }
  int64_t operator[](int64_t n) const {
    return wide ? static_cast<const int64_t*>(tensor.const_data_ptr())[n] : static_cast<const int32_t*>(tensor.const_data_ptr())[n];
  }
};

// (D,), (B, D), (B, F, D) or, with rows, (R, D).
struct Vector {
  Tensor tensor;
  bool given = false, by_row = false, needed = false;  // needed: its gradient
  const char* data = nullptr;
  int dtype = 0;
  int64_t count = 1, frames = 1;                   // rows in all, and of a sample
  int64_t span = 0;                                // tokens of a frame; 0: all tokens share the vector
  int64_t sample_stride = 0, frame_stride = 0;     // bytes
  int table_row = -1;

  Vector() = default;
  Vector(const Optional& vector, const Rows& rows, int64_t length) {
    if (!vector) return;
    given = true;
    tensor = with_dense_channels(*vector);
    data = static_cast<const char*>(tensor.const_data_ptr());
    dtype = static_cast<int>(float_of(tensor.scalar_type()));
    const int64_t rank = tensor.dim(), size = tensor.element_size();
    if (rank == 1) return;
    count = tensor.size(0), sample_stride = tensor.stride(0) * size;
    by_row = rows.given;
    if (by_row) return;
    if (rank == 3) frames = tensor.size(1), frame_stride = tensor.stride(1) * size;
    count *= frames;
    span = frames > 0 ? length / frames : 1;
  }
  // The row of token n; rows of packed tokens out of range are clamped.
  int64_t row(int64_t n, const Rows& rows) const {
    if (by_row) return std::clamp<int64_t>(rows[n], 0, count - 1);
    return span ? n / span : 0;
  }
  const char* at(int64_t row) const { return data + row / frames * sample_stride + row % frames * frame_stride; }
};

inline GateFn gate_function(const std::string& name) {
  if (name == "identity") return GateFn::identity;
  if (name == "tanh") return GateFn::tanh;
  if (name == "sigmoid_one_minus") return GateFn::sigmoid_one_minus;
  throw std::runtime_error("gate_fn must be identity, tanh or sigmoid_one_minus, got '" + name + "'");
}
inline bool subtracts_mean(const std::string& norm) {
  if (norm == "layer") return true;
  if (norm == "rms") return false;
  throw std::runtime_error("norm must be layer or rms, got '" + norm + "'");
}

// What all tokens of a call share.
template <class Real>
struct Shared {
  const Kernels<Real>& kernels = kernels_of<Real>(selected());
  int64_t dim;
  Rows rows;
  bool affine;  // there is a weight or a bias
  std::array<Vector, vectors> vector;
  GateFn gate_fn = GateFn::identity;
  Buffer<Real> zeros, ones, weight, bias, post_weight, table;

  Shared(int64_t dim, int64_t length, const std::array<const Optional*, vectors>& given, const Optional& weight,
         const Optional& bias, const Optional& post_weight, const Optional& table, const Optional& rows)
      : dim(dim), rows(rows), affine(weight || bias), zeros(dim, Real(0)), ones(dim, Real(1)), weight(row_of(weight, ones)),
        bias(row_of(bias, zeros)), post_weight(row_of(post_weight, ones)) {
    int next = 0;
    for (int v = 0; v < vectors; ++v) {
      vector[v] = Vector(*given[v], this->rows, length);
      if (table && vector[v].given) vector[v].table_row = next++;
    }
    if (!table) return;
    const Tensor dense = with_dense_channels(*table);
    this->table.resize(next * dim);
    for (int r = 0; r < next; ++r)
      kernels.widen[static_cast<int>(float_of(dense.scalar_type()))](
          static_cast<const char*>(dense.const_data_ptr()) + r * dense.stride(0) * dense.element_size(), dim,
          this->table.data() + r * dim);
  }

  void need(const std::array<bool, vectors>& gradients) {
    for (int v = 0; v < vectors; ++v) vector[v].needed = vector[v].given && gradients[v];
  }

  Buffer<Real> row_of(const Optional& parameter, const Buffer<Real>& without) const {
    if (!parameter) return without;
    const Tensor dense = torch::stable::contiguous(*parameter);
    Buffer<Real> row(dim);
    kernels.widen[static_cast<int>(float_of(dense.scalar_type()))](dense.const_data_ptr(), dim, row.data());
    return row;
  }
};

// A token's vectors, ready for use; prepared anew only when the next token has others.
template <class Real>
class Prepared {
 public:
  int64_t row[vectors] = {-1, -1, -1, -1, -1};

  explicit Prepared(const Shared<Real>& shared) : shared(shared) {
    for (int v = 0; v < vectors; ++v) {
      if (shared.vector[v].given) wide[v].resize(shared.dim);
      else row[v] = 0;
    }
    if (shared.gate_fn != GateFn::identity) slopes.resize(shared.dim);
    for (int i = 0; i < 2 && shared.affine; ++i) {
      factors[i].resize(shared.dim), offsets[i].resize(shared.dim);
      if (row[scale_of(i)] == 0 && row[shift_of(i)] == 0) combine(i);  // neither is given: no token will change them
    }
  }

  bool changes_at(int64_t n) const {
    if (n >= begin && n < end) return false;
    for (int v = 0; v < vectors; ++v)
      if (shared.vector[v].given && shared.vector[v].row(n, shared.rows) != row[v]) return true;
    return false;
  }

  void at(int64_t n) {
    if (n >= begin && n < end) return;
    bool changed[vectors] = {};
    begin = 0, end = std::numeric_limits<int64_t>::max();
    for (int v = 0; v < vectors; ++v) {
      const Vector& vector = shared.vector[v];
      if (!vector.given) continue;
      const int64_t wanted = vector.row(n, shared.rows);
      if (vector.by_row) begin = n, end = n + 1;
      else if (vector.span) begin = std::max(begin, wanted * vector.span), end = std::min(end, (wanted + 1) * vector.span);
      changed[v] = wanted != row[v];
      if (!changed[v]) continue;
      row[v] = wanted;
      const bool one_plus = v == scale || v == scale_2, in_table = vector.table_row >= 0;
      const auto* widen = one_plus && !in_table ? shared.kernels.widen_one_plus : shared.kernels.widen_vector;
      const int64_t following = vector.span == 1 && !vector.by_row ? std::min(wanted + 1, vector.count - 1) : wanted;
      widen[vector.dtype](vector.at(wanted), shared.dim, wide[v].data(), vector.at(following));
      if (!in_table) continue;
      shared.kernels.add(shared.table.data() + vector.table_row * shared.dim, shared.dim, wide[v].data());
      if (one_plus) shared.kernels.add(shared.ones.data(), shared.dim, wide[v].data());
    }
    if (changed[Name::gate] && shared.gate_fn != GateFn::identity)
      shared.kernels.apply_gate(shared.gate_fn, wide[Name::gate].data(), shared.dim, slopes.data());
    for (int i = 0; i < 2 && shared.affine; ++i)
      if (changed[scale_of(i)] || changed[shift_of(i)]) combine(i);
  }

  // Null: 1.
  const Real* gate() const { return wide[Name::gate].empty() ? nullptr : wide[Name::gate].data(); }
  const Real* slope() const { return slopes.empty() ? nullptr : slopes.data(); }
  // Of output i: 1 + scale, and modulated = normed factor + offset.
  const Real* one_plus(int i) const { return (wide[scale_of(i)].empty() ? shared.ones : wide[scale_of(i)]).data(); }
  const Real* factor(int i) const { return shared.affine ? factors[i].data() : one_plus(i); }
  const Real* offset(int i) const { return shared.affine ? offsets[i].data() : shift_row(i); }

 private:
  static int scale_of(int i) { return i ? scale_2 : scale; }
  static int shift_of(int i) { return i ? shift_2 : shift; }
  const Real* shift_row(int i) const { return (wide[shift_of(i)].empty() ? shared.zeros : wide[shift_of(i)]).data(); }
  void combine(int i) {
    shared.kernels.combine(one_plus(i), shift_row(i), shared.weight.data(), shared.bias.data(), shared.dim, factors[i].data(),
                           offsets[i].data());
  }

  const Shared<Real>& shared;
  Buffer<Real> wide[vectors], slopes, factors[2], offsets[2];
  int64_t begin = 0, end = 0;  // of tokens that have these vectors
};

}  // namespace mmgen_kernels::modulation
