#include "attn/kernels.h"
#include "simd/lanes_avx512.h"

namespace mmgen_kernels::attn {
const Kernels<float> avx512_kernels = kernels<simd::LanesAvx512>();
}  // namespace mmgen_kernels::attn
