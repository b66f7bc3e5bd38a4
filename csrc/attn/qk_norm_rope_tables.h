// What the inner loops of qk_norm_rope are given and what they do, one table of them per instruction set.
#pragma once

#include <cstdint>

#include "simd/tables.h"

namespace mmgen_kernels::attn::rope {

enum class Norm { none, rms, layer };

// Some heads of one token: all that a norm across heads sees, or any of those that are normalised each for itself.
template <class Real>
struct Heads {
  int64_t count, dim;
  Norm norm;
  bool across;
  double eps;
  const Real *weight, *bias;  // never null: 1 and -0 where there is none
  int64_t affine_stride;      // from head to head: dim across heads, 0 where all share them

  // As many as channels are turned: the cosine and the sine of the pair that a channel is in, the latter negated at the first of
  // each pair. Not interleaved, where a vector has the first channels of its pairs or the second: as many as there are pairs.
  const Real *cos, *sin;
  int64_t pairs;
  bool interleaved;

  // Rows lie in tensors; strides are in bytes, from head to head.
  const char *x, *grad;
  int64_t x_stride, grad_stride;
  char* out;  // results, or gradients of x
  int64_t out_stride;

  Real* held;                   // scratch of the backward: (count, dim)
  Real *sum_weight, *sum_bias;  // added to, like weight and bias
};

// dtypes in the order of csrc/floats.h. x, grad and out have one.
template <class Real>
struct Kernels {
  void (*widen[4])(const void* row, int64_t dim, Real* out);
  void (*narrow[4])(const Real* row, int64_t dim, void* out);
  // the rows cos and sin of `Heads` from a token's angles; `back`: the opposite ones
  void (*angles[4])(const void* cos, const void* sin, int64_t pairs, bool interleaved, bool back, Real* out_cos, Real* out_sin);
  void (*forward[4])(const Heads<Real>& heads);
  // angles are those back
  void (*backward[4])(const Heads<Real>& heads);
  // sum += row; row = 0
  void (*collect)(Real* row, int64_t dim, double* sum);
};

extern const Kernels<double> fp64_kernels;
extern const Kernels<float> scalar_kernels, avx2_kernels, avx512_kernels, avx512_bf16_kernels;

template <class Real>
const Kernels<Real>& kernels_of(InstructionSet set) {
  return table_of<Real, fp64_kernels, scalar_kernels, avx2_kernels, avx512_kernels, avx512_bf16_kernels>(set);
}

}  // namespace mmgen_kernels::attn::rope
