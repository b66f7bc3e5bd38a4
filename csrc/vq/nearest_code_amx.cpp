// The bf16 pass on AMX's matrix tiles.
#include "simd/tiles_amx.h"
#include "simd/vec_avx512.h"
#include "vq/bf16_pass.h"

namespace mmgen_kernels::vq {
const Kernels amx_kernels = tile_kernels<simd::VecAvx512, Bf16Format<simd::VecAvx512>, simd::TilesAmx>("amx");
}  // namespace mmgen_kernels::vq
