#include "philox/fill.h"

namespace mmgen_kernels::philox {
namespace {

// Four lanes in plain C++, which compilers turn into SSE2 or NEON.
struct Lanes : Vectors<4> {
  static PHILOX_HOST_DEVICE Wide multiply(Wide a, uint32_t b) {
    for (int l = 0; l < width / 2; ++l) a[l] = OneLane::multiply(a[l], b);
    return a;
  }
  static PHILOX_HOST_DEVICE Float to_float(Int i) {
    Float f;
    for (int l = 0; l < width; ++l) f[l] = OneLane::to_float(i[l]);
    return f;
  }
  static PHILOX_HOST_DEVICE Float root(Float f) {
    for (int l = 0; l < width; ++l) f[l] = OneLane::root(f[l]);
    return f;
  }
  static PHILOX_HOST_DEVICE void interleave(const Word (&words)[4], uint32_t* out) {
    for (int l = 0; l < width; ++l)
      for (int k = 0; k < 4; ++k) out[4 * l + k] = words[k][l];
  }
  template <int COUNT>
  static PHILOX_HOST_DEVICE void to_half(const float* values, uint16_t* out) {
    for (int i = 0; i < COUNT; ++i) out[i] = to_fp16(values[i]);
  }
};

}  // namespace
const Kernels scalar_kernels = kernels<Lanes>();
}  // namespace mmgen_kernels::philox
