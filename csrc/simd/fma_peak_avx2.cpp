#include "simd/fma_rounds.h"
#include "simd/vec_avx2.h"

namespace mmgen_kernels {
double fma_rounds_avx2(int64_t rounds, float* sink) { return fma_rounds<simd::VecAvx2>(rounds, sink); }
}  // namespace mmgen_kernels
