// The inner loops as functions, one table per instruction set.
#pragma once

#include <cstdint>

#include "simd/tables.h"

namespace mmgen_kernels::blocks {

// Rows of `count` elements in the dtype that the index names (csrc/floats.h), computed in fp32 or, of fp64 rows, in fp64.
struct ActivationKernels {
  void (*gelu_tanh[4])(const void* hidden, int64_t count, void* activated);
  void (*gelu_tanh_gradient[4])(const void* grad, const void* hidden, int64_t count, void* activated, void* grad_hidden);
  // activated = silu(gate) value
  void (*swiglu[4])(const void* gate, const void* value, int64_t count, void* activated);
  void (*swiglu_gradient[4])(const void* grad, const void* gate, const void* value, int64_t count, void* activated,
                             void* grad_gate, void* grad_value);
};

extern const ActivationKernels scalar_activations, avx2_activations, avx512_activations;

inline const ActivationKernels& activations_of(InstructionSet set) { return table_of<scalar_activations, avx2_activations, avx512_activations>(set); }

}  // namespace mmgen_kernels::blocks
