// The operator implementations that C++ brings. Their schemas are in Python (mmgen_kernels/library.py).
#include <torch/csrc/stable/library.h>

#include "vq/tensors.h"
#include "vq/vector_quantize.h"

STABLE_TORCH_LIBRARY_IMPL(mmgen_kernels, CPU, m) {
  m.impl("nearest_code", TORCH_BOX(&mmgen_kernels::vq::nearest_code_cpu));
  m.impl("vector_quantize", TORCH_BOX(&mmgen_kernels::vq::vector_quantize_cpu));
  m.impl("vector_quantize_backward", TORCH_BOX(&mmgen_kernels::vq::vector_quantize_backward_cpu));
}
