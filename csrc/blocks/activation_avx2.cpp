#include "blocks/activation_kernels.h"
#include "simd/lanes_avx2.h"

namespace mmgen_kernels::blocks {
const ActivationKernels avx2_activations = activation_kernels<simd::LanesAvx2>();
}  // namespace mmgen_kernels::blocks
