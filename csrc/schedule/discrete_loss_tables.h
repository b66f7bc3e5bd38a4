// What the inner loops of vq_diffusion_loss do, one table of them per instruction set.
#pragma once

#include <cstdint>

#include "simd/tables.h"

namespace mmgen_kernels::schedule::discrete {

// Of the classes of a place, with u = rise e: the sums of log (1 + u) and of e u / (1 + u).
struct BentSums {
  double logarithms, turned;
};

// Rows are of `count` classes, a multiple of row_step.
template <class Real>
struct LossKernels {
  // what is not a number does not count
  Real (*largest)(const Real* w, int64_t count);
  // w = e^(w - largest), and the sum of them
  double (*exponentials)(Real* w, int64_t count, Real largest);
  BentSums (*sums)(const Real* e, int64_t count, Real rise);
  // w = e (even + bent u / (1 + u)) with e = e^(w - largest)
  void (*slopes)(Real* w, int64_t count, Real largest, Real rise, Real even, Real bent);
  // out[r + k along] = from[r stride + k] for r < rows and any count of k; by csrc/floats.h
  void (*scatter[4])(const Real* from, int64_t stride, int64_t rows, int64_t count, void* out, int64_t along);
};

extern const LossKernels<double> fp64_losses;
extern const LossKernels<float> scalar_losses, avx2_losses, avx512_losses;

template <class Real>
const LossKernels<Real>& losses_of(InstructionSet set) {
  return table_of<Real, fp64_losses, scalar_losses, avx2_losses, avx512_losses>(set);
}

}  // namespace mmgen_kernels::schedule::discrete
