// How many floating-point operations per second this CPU does at most: the limit that benchmarks measure against.
#pragma once

#include <cstdint>

namespace mmgen_kernels {

// One thread: runs `rounds` rounds of independent FMAs in registers; returns the floating-point operations done.
using FmaRounds = double (*)(int64_t rounds, float* sink);

double fma_rounds_scalar(int64_t rounds, float* sink);
#if defined(__x86_64__)
double fma_rounds_avx2(int64_t rounds, float* sink);
double fma_rounds_avx512(int64_t rounds, float* sink);
#endif

}  // namespace mmgen_kernels
