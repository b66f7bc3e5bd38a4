#include "blocks/activation_kernels.h"
#include "simd/lanes_avx512.h"

namespace mmgen_kernels::blocks {
const ActivationKernels avx512_activations = activation_kernels<simd::LanesAvx512>();
}  // namespace mmgen_kernels::blocks
