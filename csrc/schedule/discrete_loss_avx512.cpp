#include "schedule/discrete_loss_kernels.h"
#include "simd/lanes_avx512.h"

namespace mmgen_kernels::schedule::discrete {
const LossKernels<float> avx512_losses = loss_kernels<simd::LanesAvx512>();
}  // namespace mmgen_kernels::schedule::discrete
