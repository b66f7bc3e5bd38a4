#include "attn/qk_norm_rope_kernels.h"
#include "simd/lanes_avx512.h"

namespace mmgen_kernels::attn::rope {
const Kernels<float> avx512_kernels = kernels<simd::LanesAvx512>();
}  // namespace mmgen_kernels::attn::rope
