#include "simd/instruction_set.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace mmgen_kernels {
namespace {

// AMX with bf16, and Linux' permission for this process to use the tiles, which has to be asked for.
bool amx_permitted() {
#if defined(__x86_64__) && defined(__linux__)
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned needed = 1u << 22 | 1u << 24;  // AMX-BF16, AMX-TILE
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & needed) != needed) return false;
  constexpr long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}

}  // namespace

bool supported(InstructionSet set) {
#if defined(__x86_64__)
  switch (set) {
    case InstructionSet::scalar:
    case InstructionSet::scalar_bf16:
    case InstructionSet::scalar_int16:
      return true;
    case InstructionSet::avx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    case InstructionSet::avx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    case InstructionSet::avx512_vnni:
      return __builtin_cpu_supports("avx512vnni") && supported(InstructionSet::avx512);
    case InstructionSet::avx512_bf16:
      return __builtin_cpu_supports("avx512bf16") && supported(InstructionSet::avx512_vnni);
    case InstructionSet::amx: {
      static const bool permitted = amx_permitted();
      return permitted && supported(InstructionSet::avx512_bf16);
    }
  }
#endif
  return set <= InstructionSet::scalar_int16;
}

std::string list_of_names() {
  std::string list;
  for (InstructionSet set : all_instruction_sets) {
    if (set != all_instruction_sets[0]) list += set == InstructionSet::amx ? " or " : ", ";
    list += name(set);
  }
  return list;
}

bool selected_by_name() {
  const char* wanted = std::getenv("MMGEN_KERNELS_CPU");
  return wanted != nullptr && *wanted != '\0';
}

InstructionSet selected() {
  constexpr InstructionSet best_first[] = {InstructionSet::amx,    InstructionSet::avx512_bf16, InstructionSet::avx512_vnni,
                                           InstructionSet::avx512, InstructionSet::avx2,        InstructionSet::scalar};
  if (selected_by_name()) {
    const std::string wanted = std::getenv("MMGEN_KERNELS_CPU");
    for (InstructionSet set : all_instruction_sets) {
      if (wanted != name(set)) continue;
      if (supported(set)) return set;
      throw std::runtime_error("MMGEN_KERNELS_CPU=" + wanted + ": this CPU does not have it");
    }
    throw std::runtime_error("MMGEN_KERNELS_CPU must be " + list_of_names() + ", got '" + wanted + "'");
  }
  static const InstructionSet best = [&] {
    for (InstructionSet set : best_first)
      if (supported(set)) return set;
    return InstructionSet::scalar;
  }();
  return best;
}

}  // namespace mmgen_kernels
