// What the inner loops of the family are given and what they do, one table of them per instruction set.
#pragma once

#include <cstdint>

#include "simd/tables.h"

namespace mmgen_kernels::schedule {

constexpr int max_inputs = 7;  // five, noise that lies in memory, and the unconditional prediction
constexpr int max_outputs = 3;

// out_k = sum_j factor[1 + k][j] in_j + factor[1 + k][derived] d + factor[1 + k][noise] z, with
// d = limit(sum_j factor[0][j] in_j + factor[0][noise] z) where it is made. A term whose factor is 0 is not there: what it would
// multiply may be NaN. Where a prediction is guided, in_0 is the conditional one and stands for u + scale (in_0 - u), u the last input.
template <class Real>
struct Combination {
  static constexpr int derived = max_inputs, noise = max_inputs + 1, terms = max_inputs + 2;
  int inputs = 0, outputs = 0;
  uint32_t wide = 0;  // bit k: output k is of type Real, whatever the inputs are
  Real factor[1 + max_outputs][terms] = {};
  uint32_t present[1 + max_outputs] = {};  // bit j: factor[.][j] is not 0
  bool guides = false;
  Real scale = 1;
  bool derives = false;
  bool divides = false;
  Real bound = 0, divisor = 1;  // limit: clipped to [-bound, bound], then divided
  bool streams = false;         // results go past the caches, where nothing but inputs enters; they lie at multiples of 64 bytes

  void find_present() {
    for (int k = 0; k <= outputs; ++k) {
      present[k] = 0;
      for (int j = 0; j < terms; ++j) present[k] |= uint32_t(factor[k][j] != 0) << j;
    }
  }
};

struct Sums {  // of two rows and of their squares
  double first = 0, first_squares = 0, second = 0, second_squares = 0;
};

template <class Real>
struct Kernels {
  // [dtype of every input, and of the outputs that are not wide][inputs - 1]; z are `count` normals, or null
  void (*combine[4][max_inputs])(const Combination<Real>&, const void* const* inputs, const Real* z, void* const* outputs,
                                 int64_t count);
  void (*widen[4])(const void* row, int64_t count, Real* out);
  void (*narrow[4])(const Real* row, int64_t count, void* out);
  // z *= exp(middle + slope v)
  void (*spread)(const Real* v, Real middle, Real slope, int64_t count, Real* z);
  // of a = conditional and of b = u + scale (a - u) with u = unconditional, whose place b takes
  Sums (*guided_sums)(const Real* conditional, Real* unconditional, Real scale, int64_t count);
};

extern const Kernels<double> fp64_kernels;
extern const Kernels<float> scalar_kernels, avx2_kernels, avx512_kernels, avx512_bf16_kernels;

template <class Real>
const Kernels<Real>& kernels_of(InstructionSet set) {
  return table_of<Real, fp64_kernels, scalar_kernels, avx2_kernels, avx512_kernels, avx512_bf16_kernels>(set);
}

}  // namespace mmgen_kernels::schedule
