#include "schedule/kernels.h"
#include "simd/lanes_avx512.h"

namespace mmgen_kernels::schedule {
namespace {

struct Lanes : simd::LanesAvx512 {
  // One instruction for six. It makes subnormal results 0: docs/schedule.md says so.
  static Half to_bf16(Vec v) { return (Half)_mm512_cvtneps_pbh(v); }
};

}  // namespace
const Kernels<float> avx512_bf16_kernels = kernels<Lanes>();
}  // namespace mmgen_kernels::schedule
