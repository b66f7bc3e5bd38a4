#include "simd/fma_rounds.h"
#include "simd/vec_scalar.h"

namespace mmgen_kernels {
double fma_rounds_scalar(int64_t rounds, float* sink) { return fma_rounds<simd::VecScalar>(rounds, sink); }
}  // namespace mmgen_kernels
