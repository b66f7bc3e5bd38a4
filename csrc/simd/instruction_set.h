// Which instruction set the CPU kernels use: the best one this CPU has, or the one MMGEN_KERNELS_CPU names.
#pragma once

namespace mmgen_kernels {

enum class InstructionSet { scalar, avx2, avx512 };

inline const char* name(InstructionSet set) {
  constexpr const char* names[] = {"scalar", "avx2", "avx512"};
  return names[static_cast<int>(set)];
}

// Whether this CPU can run it (and it was compiled in).
bool supported(InstructionSet set);

// Read at every call (an environment look-up costs 50 ns), so that tests can run every path of one process.
// Throws std::runtime_error when MMGEN_KERNELS_CPU names something unknown or not supported here.
InstructionSet selected();

}  // namespace mmgen_kernels
