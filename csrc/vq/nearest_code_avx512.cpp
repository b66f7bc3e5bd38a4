#include "simd/vec_avx512.h"
#include "vq/nearest_code_kernels.h"

namespace mmgen_kernels::vq {
const Kernels avx512_kernels = kernels<simd::VecAvx512, 3, 9>("avx512");
}
