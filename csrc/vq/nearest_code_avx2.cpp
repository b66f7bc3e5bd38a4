#include "simd/vec_avx2.h"
#include "vq/nearest_code_kernels.h"

namespace mmgen_kernels::vq {
const Kernels avx2_kernels = kernels<simd::VecAvx2, 2, 6>("avx2");
}
