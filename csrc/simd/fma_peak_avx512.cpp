#include "simd/fma_rounds.h"
#include "simd/vec_avx512.h"

namespace mmgen_kernels {
double fma_rounds_avx512(int64_t rounds, float* sink) { return fma_rounds<simd::VecAvx512>(rounds, sink); }
}  // namespace mmgen_kernels
