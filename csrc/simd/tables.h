// The choice among the tables of inner loops that a family compiles, one per instruction set.
#pragma once

#include <type_traits>

#include "simd/instruction_set.h"

namespace mmgen_kernels {

// The table that serves `set`; what goes beyond a set that there is a table for takes that one. Tables are template arguments so that those of another
// architecture, which are declared and compiled nowhere, are not linked with.
template <const auto& scalar, const auto& avx2, const auto& avx512, const auto& avx512_bf16 = avx512>
const auto& table_of(InstructionSet set) {
#if defined(__x86_64__)
  if (set >= InstructionSet::avx512_bf16) return avx512_bf16;
  if (set >= InstructionSet::avx512) return avx512;
  if (set == InstructionSet::avx2) return avx2;
#endif
  return scalar;
}

// Of loops in fp64, which every instruction set shares, and in fp32.
template <class Real, const auto& fp64, const auto& scalar, const auto& avx2, const auto& avx512, const auto& avx512_bf16 = avx512>
const auto& table_of(InstructionSet set) {
  if constexpr (std::is_same_v<Real, double>) return fp64;
  else return table_of<scalar, avx2, avx512, avx512_bf16>(set);
}

}  // namespace mmgen_kernels
