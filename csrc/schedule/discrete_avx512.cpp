#include "schedule/discrete_kernels.h"
#include "simd/lanes_avx512.h"

namespace mmgen_kernels::schedule::discrete {
const Kernels<float> avx512_kernels = kernels<simd::LanesAvx512>();
}  // namespace mmgen_kernels::schedule::discrete
