// What the coarse first passes share: how they measure what they leave out.
#pragma once

#include <cmath>

#include "vq/nearest_code_kernels.h"

namespace mmgen_kernels::vq {
namespace {  // internal linkage: see rows.h

// This thread's scratch for one vector or a few: allocating it anew cost more than packing eight dimensions.
inline float* scratch_of(int64_t size) {
  static thread_local Scratch scratch;
  if (static_cast<int64_t>(scratch.size()) < size) scratch.resize(size);
  return scratch.data();
}

// An upper bound of the norm of the vector whose component d is rest(d), exact in fp32.
template <class F>
float left_out(int64_t dim, const F& rest) {
  constexpr int64_t chains = 8;
  float partial[chains] = {};
  int64_t d = 0;
  for (; d + chains <= dim; d += chains)
    for (int64_t i = 0; i < chains; ++i) partial[i] += rest(d + i) * rest(d + i);
  for (int64_t i = 0; d < dim; ++d, ++i) partial[i] += rest(d) * rest(d);
  float sum = 0;
  for (const float p : partial) sum += p;
  // Roundings, at most dim / 8 + 8 for a square, and squares too small for fp32.
  return std::sqrt(sum) * (1.0005f + dim * 0x1p-26f) + std::sqrt(static_cast<float>(dim)) * 0x1p-62f;
}

}  // namespace
}  // namespace mmgen_kernels::vq
