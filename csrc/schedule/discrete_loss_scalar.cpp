#include "schedule/discrete_loss_kernels.h"
#include "simd/lanes_scalar.h"

namespace mmgen_kernels::schedule::discrete {
const LossKernels<float> scalar_losses = loss_kernels<simd::LanesScalar<float>>();
const LossKernels<double> fp64_losses = loss_kernels<simd::LanesScalar<double>>();
}  // namespace mmgen_kernels::schedule::discrete
