#include "simd/vec_scalar.h"
#include "vq/nearest_code_kernels.h"

namespace mmgen_kernels::vq {
const Kernels scalar_kernels = kernels<simd::VecScalar, 2, 4>("scalar");
}
