// Pieces of samples as the losses take them: of several tensors the same elements, in one dtype.
#pragma once

#include <algorithm>
#include <initializer_list>

#include "parallel.h"
#include "schedule/pass.h"
#include "schedule/samples.h"

namespace mmgen_kernels::schedule {

template <class Real>
constexpr int own_dtype = static_cast<int>(sizeof(Real) == 8 ? Float::fp64 : Float::fp32);

// The dtype that all have, or the one that is computed in.
template <class Real>
int dtype_of(std::initializer_list<const Samples*> all) {
  const int first = (*all.begin())->dtype;
  const bool alike = std::all_of(all.begin(), all.end(), [&](const Samples* s) { return s->dtype == first; });
  return alike && (first == static_cast<int>(Float::fp64)) == (sizeof(Real) == 8) ? first : own_dtype<Real>;
}

// Elements [at, at + count) of a sample, in `dtype`: where they lie, or widened into `room`.
template <class Real>
const void* row_of(const Kernels<Real>& kernels, const Samples& s, int dtype, int64_t sample, int64_t at, int64_t count,
                   Real* room) {
  const void* row = s.at(sample, at);
  if (s.dtype == dtype) return row;
  kernels.widen[s.dtype](row, count, room);
  return room;
}

// f(sample, piece, at, count) for every piece of every sample; `work` is that of an element.
template <class F>
void each_piece(int64_t samples, int64_t size, int64_t work, const F& f) {
  const int64_t pieces = (size + chunk - 1) / chunk;
  parallel(samples * pieces, std::min(size, chunk) * work, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t at = i % pieces * chunk;
      f(i / pieces, i % pieces, at, std::min(chunk, size - at));
    }
  });
}

inline double number_at(const Tensor& t, int64_t i) {
  const void* data = t.const_data_ptr();
  switch (t.scalar_type()) {
    case ScalarType::Double: return static_cast<const double*>(data)[i];
    case ScalarType::Float: return static_cast<const float*>(data)[i];
    case ScalarType::BFloat16: return double(static_cast<const torch::headeronly::BFloat16*>(data)[i]);
    case ScalarType::Half: return double(static_cast<const torch::headeronly::Half*>(data)[i]);
    default: throw std::runtime_error("mmgen_kernels: expected a float per sample");
  }
}

inline void put_number(Tensor& t, int64_t i, double value) {
  void* data = t.mutable_data_ptr();
  switch (t.scalar_type()) {
    case ScalarType::Double: static_cast<double*>(data)[i] = value; return;
    case ScalarType::Float: static_cast<float*>(data)[i] = static_cast<float>(value); return;
    case ScalarType::BFloat16: static_cast<torch::headeronly::BFloat16*>(data)[i] = static_cast<float>(value); return;
    case ScalarType::Half: static_cast<torch::headeronly::Half*>(data)[i] = static_cast<float>(value); return;
    default: throw std::runtime_error("mmgen_kernels: expected a float per sample");
  }
}

// A number per sample: contiguous, on its own.
struct PerSample {
  Tensor tensor;

  PerSample(const Tensor& given, int64_t count, const char* name) : tensor(torch::stable::contiguous(given)) {
    if (given.numel() != count) throw std::runtime_error(std::string(name) + " must be (B,)");
  }
  double operator[](int64_t i) const { return number_at(tensor, i); }
};

}  // namespace mmgen_kernels::schedule
