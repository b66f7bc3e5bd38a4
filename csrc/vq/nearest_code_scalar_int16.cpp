// The pass in 16-bit integers in plain C++, for tests on any machine.
#include "simd/int_scalar.h"
#include "simd/vec_scalar.h"
#include "vq/int16_pass.h"

namespace mmgen_kernels::vq {

const Kernels scalar_int16_kernels = int16_kernels<simd::VecScalar, simd::IntScalar<4>, 2, 4>("scalar_int16");

}  // namespace mmgen_kernels::vq
