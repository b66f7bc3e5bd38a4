// Loops over the vectors of a row.
#pragma once

#include "simd/storage.h"

namespace mmgen_kernels::simd {
namespace {  // internal linkage: compiled once per instruction set, and the copies must not be merged

// f(place, i) for each vector of a row of `count` elements, the last of which may be a part of one.
template <class Lanes, class F>
inline __attribute__((always_inline)) void each_vector(int64_t count, const F& f) {
  int64_t i = 0;
  for (; i + Lanes::width <= count; i += Lanes::width) f(Whole<Lanes>{}, i);
  if (i < count) f(Part<Lanes>{count - i}, i);
}

}  // namespace
}  // namespace mmgen_kernels::simd
