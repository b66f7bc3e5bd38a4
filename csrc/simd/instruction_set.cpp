#include "simd/instruction_set.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace mmgen_kernels {

bool supported(InstructionSet set) {
#if defined(__x86_64__)
  switch (set) {
    case InstructionSet::scalar:
      return true;
    case InstructionSet::avx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    case InstructionSet::avx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
#endif
  return set == InstructionSet::scalar;
}

InstructionSet selected() {
  constexpr InstructionSet best_first[] = {InstructionSet::avx512, InstructionSet::avx2, InstructionSet::scalar};
  if (const char* wanted = std::getenv("MMGEN_KERNELS_CPU"); wanted != nullptr && *wanted != '\0') {
    for (InstructionSet set : best_first) {
      if (std::string(wanted) != name(set)) continue;
      if (supported(set)) return set;
      throw std::runtime_error("MMGEN_KERNELS_CPU=" + std::string(wanted) + ": this CPU does not have it");
    }
    throw std::runtime_error("MMGEN_KERNELS_CPU must be scalar, avx2 or avx512, got '" + std::string(wanted) + "'");
  }
  static const InstructionSet best = [&] {
    for (InstructionSet set : best_first)
      if (supported(set)) return set;
    return InstructionSet::scalar;
  }();
  return best;
}

}  // namespace mmgen_kernels
