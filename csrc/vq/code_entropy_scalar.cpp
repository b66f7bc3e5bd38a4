#include "vq/code_entropy_kernels.h"

namespace mmgen_kernels::vq::entropy {
namespace {

// 16 bytes are a register of SSE2 and of NEON.
template <class T>
struct Lanes : Vectors<T, 16> {
  using Vec = typename Vectors<T, 16>::Vec;
  static Vec fmadd(Vec a, Vec b, Vec c) { return a * b + c; }
};

}  // namespace
const Kernels<float> scalar_kernels = kernels<Lanes<float>, 4>();
const Kernels<double> fp64_kernels = kernels<Lanes<double>, 4>();
}  // namespace mmgen_kernels::vq::entropy
