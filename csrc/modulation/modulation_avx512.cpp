#include "modulation/kernels.h"
#include "modulation/lanes_avx512.h"

namespace mmgen_kernels::modulation {
namespace {

struct Lanes : LanesAvx512 {
  static Half to_bf16(Vec v) { return (Half)_mm512_cvtepi32_epi16((__m512i)bf16_bits(v)); }
};

}  // namespace
const Kernels<float> avx512_kernels = kernels<Lanes>();
}  // namespace mmgen_kernels::modulation
