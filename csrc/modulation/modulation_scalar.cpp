#include "modulation/kernels.h"

namespace mmgen_kernels::modulation {
namespace {

// 16 bytes are a register of SSE2 and of NEON.
template <class T>
struct Lanes : simd::Vectors<T, 16>, simd::Words<16 / sizeof(T)> {
  using Vec = typename simd::Vectors<T, 16>::Vec;
  static Vec fmadd(Vec a, Vec b, Vec c) { return a * b + c; }
};

}  // namespace
const Kernels<float> scalar_kernels = kernels<Lanes<float>>();
const Kernels<double> fp64_kernels = kernels<Lanes<double>>();
}  // namespace mmgen_kernels::modulation
