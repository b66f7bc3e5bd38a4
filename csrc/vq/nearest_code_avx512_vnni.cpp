// The pass in 16-bit integers with AVX-512 VNNI.
#include "simd/int_avx512.h"
#include "simd/vec_avx512.h"
#include "vq/int16_pass.h"

namespace mmgen_kernels::vq {

const Kernels avx512_vnni_kernels = int16_kernels<simd::VecAvx512, simd::IntAvx512, 3, 9>("avx512_vnni");

}  // namespace mmgen_kernels::vq
