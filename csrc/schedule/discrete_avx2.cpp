#include "schedule/discrete_kernels.h"
#include "simd/lanes_avx2.h"

namespace mmgen_kernels::schedule::discrete {
const Kernels<float> avx2_kernels = kernels<simd::LanesAvx2>();
}  // namespace mmgen_kernels::schedule::discrete
