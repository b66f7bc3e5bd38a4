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

// A number per sample, read in fp64. Where it lies and what it is are asked once: each question to torch takes 20 to 50 ns.
struct PerSample {
  Tensor tensor;
  const void* data;
  Float dtype;

  PerSample(const Tensor& given, int64_t count, const char* name)
      : tensor(made_contiguous(given)), data(tensor.const_data_ptr()), dtype(float_of(tensor.scalar_type())) {
    if (given.numel() != count) throw std::runtime_error(std::string(name) + " must be (B,)");
  }
  double operator[](int64_t i) const {
    switch (dtype) {
      case Float::fp64: return static_cast<const double*>(data)[i];
      case Float::fp32: return static_cast<const float*>(data)[i];
      case Float::bf16: return double(static_cast<const torch::headeronly::BFloat16*>(data)[i]);
      default: return double(static_cast<const torch::headeronly::Half*>(data)[i]);
    }
  }
};

// The same as a result: rounded once.
struct NumbersOf {
  Tensor tensor;
  void* data;
  Float dtype;

  NumbersOf(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType as)
      : tensor(quick_empty(like, sizes, as)), data(tensor.mutable_data_ptr()), dtype(float_of(as)) {}
  void put(int64_t i, double value) const {
    switch (dtype) {
      case Float::fp64: static_cast<double*>(data)[i] = value; return;
      case Float::fp32: static_cast<float*>(data)[i] = static_cast<float>(value); return;
      case Float::bf16: static_cast<torch::headeronly::BFloat16*>(data)[i] = static_cast<float>(value); return;
      default: static_cast<torch::headeronly::Half*>(data)[i] = static_cast<float>(value);
    }
  }
};

}  // namespace mmgen_kernels::schedule
