// What the inner loops of the family are given and what they do, one table of them per instruction set.
#pragma once

#include <cstdint>

#include "simd/tables.h"

namespace mmgen_kernels::modulation {

struct Moments {
  double first, second;
};

enum class GateFn { identity, tanh, sigmoid_one_minus };

// Every loop goes over one token's `dim` channels. `Real` rows are scratch in the type that is computed in; `void` rows lie in
// tensors, and the loop is chosen from an array by their dtype (csrc/floats.h). Sums come back in fp64. `next` is a row that is
// wanted soon, the next token's: it is asked for along the way, as the processor's own prefetching stops at the end of every page.
template <class Real>
struct Kernels {
  double (*widen[4])(const void* row, int64_t dim, Real* out);  // returns the sum
  // A token's vector, or 1 + vector, while the next token's is asked for.
  void (*widen_vector[4])(const void* row, int64_t dim, Real* out, const void* next);
  void (*widen_one_plus[4])(const void* row, int64_t dim, Real* out, const void* next);
  void (*narrow[4])(const Real* row, int64_t dim, void* out);
  void (*add)(const Real* row, int64_t dim, Real* out);  // out += row

  // factor = one_plus weight, offset = one_plus bias + shift
  void (*combine)(const Real* one_plus, const Real* shift, const Real* weight, const Real* bias, int64_t dim, Real* factor,
                  Real* offset);
  // gate = g(gate), slope = g'(gate); not for the identity
  void (*apply_gate)(GateFn function, Real* gate, int64_t dim, Real* slope);

  // total = residual = x + gate y, rounded to x's dtype; gate may be null. y is of x's dtype, or wide. Returns the sum of total.
  double (*add_gated[4])(const void* x, const void* y, const Real* gate, int64_t dim, void* residual, Real* total,
                         const char* next_x, const char* next_y);
  double (*add_gated_wide[4])(const void* x, const Real* y, const Real* gate, int64_t dim, void* residual, Real* total,
                              const char* next_x, const char* next_y);
  // sums of row - about and of its square
  Moments (*moments)(const Real* row, Real about, int64_t dim, const char* next, int64_t next_bytes);
  // out = ((row - about) - mean) rstd factor + offset
  void (*modulate[4])(const Real* row, Real about, Real mean, Real rstd, const Real* factor, const Real* offset, int64_t dim,
                      void* out, const char* next, int64_t next_bytes);

  // normed = (row - mean) rstd
  void (*normalize[4])(const void* row, Real mean, Real rstd, int64_t dim, Real* normed, const void* next);
  // grad = (or +=) upstream factor; sum_shift += upstream; sum_scale += upstream normed. Sums of upstream factor, and of that
  // times normed.
  Moments (*output_gradient[4])(const void* upstream, const Real* normed, const Real* factor, int64_t dim, Real* grad,
                                Real* sum_shift, Real* sum_scale, const void* next);
  Moments (*second_output_gradient[4])(const void* upstream, const Real* normed, const Real* factor, int64_t dim, Real* grad,
                                       Real* sum_shift, Real* sum_scale, const void* next);
  // grad_x = upstream + rstd (grad - mean.first - normed mean.second), also written to `grad`; upstream may be null
  void (*norm_gradient[4])(const void* upstream, const Real* normed, Real rstd, Moments mean, int64_t dim, Real* grad,
                           void* grad_x);
  // the same, and of the gate: grad_y = grad_x gate; sum_gate += grad_x y. y is of x's dtype. gate may be null.
  void (*norm_and_gate_gradient[4])(const void* upstream, const Real* normed, Real rstd, Moments mean, const void* y,
                                    const Real* gate, int64_t dim, const Real* grad, void* grad_x, void* grad_y, Real* sum_gate,
                                    const void* next_upstream, const void* next_y);
  // grad_y = upstream gate; sum_gate += upstream y; all of one dtype. gate may be null.
  void (*gate_gradient[4])(const void* upstream, const void* y, const Real* gate, int64_t dim, void* grad_y, Real* sum_gate,
                           const void* next_upstream, const void* next_y);
  // grad = upstream gate weight; sum_gate += upstream normed. Sums of grad, and of grad normed. gate may be null.
  Moments (*post_gradient)(const Real* upstream, const Real* normed, const Real* gate, const Real* weight, int64_t dim, Real* grad,
                           Real* sum_gate);

  // sum += a factor + b other; factor may be null for 1, b for 0
  void (*collect)(const Real* a, const Real* factor, const Real* b, const Real* other, int64_t dim, double* sum);
};

extern const Kernels<double> fp64_kernels;
extern const Kernels<float> scalar_kernels, avx2_kernels, avx512_kernels, avx512_bf16_kernels;

template <class Real>
const Kernels<Real>& kernels_of(InstructionSet set) {
  return table_of<Real, fp64_kernels, scalar_kernels, avx2_kernels, avx512_kernels, avx512_bf16_kernels>(set);
}

}  // namespace mmgen_kernels::modulation
