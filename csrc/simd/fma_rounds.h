#pragma once

#include "simd/fma_peak.h"

namespace mmgen_kernels {
namespace {  // internal linkage: compiled once per instruction set

template <class Vec>
double fma_rounds(int64_t rounds, float* sink) {
  constexpr int chains = 12;  // latency 4 times 2 ports, with room
  Vec sum[chains];
  for (int i = 0; i < chains; ++i) sum[i] = Vec::broadcast(float(i));
  const Vec a = Vec::broadcast(0.999f), b = Vec::broadcast(1e-3f);
  for (int64_t r = 0; r < rounds; ++r)
#pragma GCC unroll 12
    for (int i = 0; i < chains; ++i) sum[i] = fmadd(sum[i], a, b);
  for (int i = 1; i < chains; ++i) sum[0] = add(sum[0], sum[i]);
  sum[0].store(sink);
  return 2.0 * chains * Vec::width * double(rounds);
}

}  // namespace
}  // namespace mmgen_kernels
