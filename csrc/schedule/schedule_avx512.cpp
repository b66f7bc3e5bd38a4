#include "schedule/kernels.h"
#include "simd/lanes_avx512.h"

namespace mmgen_kernels::schedule {
const Kernels<float> avx512_kernels = kernels<simd::LanesAvx512>();
}  // namespace mmgen_kernels::schedule
