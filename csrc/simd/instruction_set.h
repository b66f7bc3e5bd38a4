// Which instruction set the CPU kernels use: the best one this CPU has, or the one MMGEN_KERNELS_CPU names.
#pragma once

#include <string>

namespace mmgen_kernels {

// Each has what those before it have, from avx2 on: no processor brings AVX512-BF16 without VNNI, or AMX without either.
// scalar_bf16 and scalar_int16 are in plain C++ what lookups do on amx and avx512_vnni, for tests: never chosen unless named.
enum class InstructionSet { scalar, scalar_bf16, scalar_int16, avx2, avx512, avx512_vnni, avx512_bf16, amx };
constexpr InstructionSet all_instruction_sets[] = {
    InstructionSet::scalar, InstructionSet::scalar_bf16, InstructionSet::scalar_int16, InstructionSet::avx2,
    InstructionSet::avx512, InstructionSet::avx512_vnni, InstructionSet::avx512_bf16, InstructionSet::amx};

inline const char* name(InstructionSet set) {
  constexpr const char* names[] = {"scalar", "scalar_bf16", "scalar_int16", "avx2",
                                   "avx512", "avx512_vnni", "avx512_bf16", "amx"};
  return names[static_cast<int>(set)];
}

// "scalar, ... or amx"
std::string list_of_names();

// Whether this CPU can run it, it was compiled in and, for AMX, the operating system lets this process use it.
bool supported(InstructionSet set);

// Read at every call (an environment look-up costs 50 ns), so that tests can run every path of one process.
// Throws std::runtime_error when MMGEN_KERNELS_CPU names something unknown or not supported here.
InstructionSet selected();

// Whether MMGEN_KERNELS_CPU chose it.
bool selected_by_name();

}  // namespace mmgen_kernels
