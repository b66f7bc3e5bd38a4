#include "blocks/activation_kernels.h"
#include "simd/lanes_scalar.h"

namespace mmgen_kernels::blocks {
const ActivationKernels scalar_activations = activation_kernels<simd::LanesScalar<float>>();
}  // namespace mmgen_kernels::blocks
