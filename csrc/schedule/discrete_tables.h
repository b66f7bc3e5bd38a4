// What the inner loops of discrete diffusion are given and what they do, one table of them per instruction set.
#pragma once

#include <cstdint>

#include "simd/tables.h"

namespace mmgen_kernels::schedule::discrete {

constexpr int64_t row_step = 64;  // a row's length in memory is a multiple of it: four vectors of floats

template <class Real>
struct Softmax {
  Real largest;
  double total;  // NaN where there are no probabilities: a number is NaN or +Inf, or all are -Inf
};

template <class Real>
struct Winner {
  Real score;
  int64_t index;
};

// Rows are of `count` classes, a multiple of row_step.
template <class Real>
struct Kernels {
  int64_t width;  // the most rows that `gather` takes

  // out[i] = row[i], for any count; by csrc/floats.h
  void (*widen[4])(const void* row, int64_t count, Real* out);
  // out[r stride + k] = from[r across + k along] for r < rows and any count of k
  void (*gather[4])(const void* from, int64_t across, int64_t along, int64_t rows, int64_t count, Real* out, int64_t stride);
  // w = e^(scale (w - largest)), and the sum of them
  Softmax<Real> (*exponentials)(Real* w, int64_t count, Real scale);
  // the largest (share w + even) / e, and the first class that has it; what is not a number does not win
  Winner<Real> (*race)(const Real* w, const Real* e, int64_t count, Real share, Real even);
};

extern const Kernels<double> fp64_kernels;
extern const Kernels<float> scalar_kernels, avx2_kernels, avx512_kernels;

template <class Real>
const Kernels<Real>& kernels_of(InstructionSet set) {
  return table_of<Real, fp64_kernels, scalar_kernels, avx2_kernels, avx512_kernels>(set);
}

}  // namespace mmgen_kernels::schedule::discrete
