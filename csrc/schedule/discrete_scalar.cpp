#include "schedule/discrete_kernels.h"
#include "simd/lanes_scalar.h"

namespace mmgen_kernels::schedule::discrete {
const Kernels<float> scalar_kernels = kernels<simd::LanesScalar<float>>();
const Kernels<double> fp64_kernels = kernels<simd::LanesScalar<double>>();
}  // namespace mmgen_kernels::schedule::discrete
