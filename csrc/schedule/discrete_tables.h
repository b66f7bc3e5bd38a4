// What the inner loops of discrete diffusion are given and what they do, one table of them per instruction set.
#pragma once

#include <cstdint>

#include "simd/instruction_set.h"

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
extern const Kernels<float> scalar_kernels;
#if defined(__x86_64__)
extern const Kernels<float> avx2_kernels, avx512_kernels;
#endif

template <class Real>
const Kernels<Real>& kernels_of(InstructionSet set);

template <>
inline const Kernels<double>& kernels_of<double>(InstructionSet) {
  return fp64_kernels;
}
template <>
inline const Kernels<float>& kernels_of<float>(InstructionSet set) {
#if defined(__x86_64__)
  if (set >= InstructionSet::avx512) return avx512_kernels;  // and what goes beyond it
  if (set == InstructionSet::avx2) return avx2_kernels;
#endif
  return scalar_kernels;
}

}  // namespace mmgen_kernels::schedule::discrete
