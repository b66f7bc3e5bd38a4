#include "schedule/discrete_loss_kernels.h"
#include "simd/lanes_avx2.h"

namespace mmgen_kernels::schedule::discrete {
const LossKernels<float> avx2_losses = loss_kernels<simd::LanesAvx2>();
}  // namespace mmgen_kernels::schedule::discrete
