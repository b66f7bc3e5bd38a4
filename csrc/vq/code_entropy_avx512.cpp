#include <immintrin.h>

#include "vq/code_entropy_kernels.h"

namespace mmgen_kernels::vq::entropy {
namespace {

struct Lanes : Vectors<float, 64> {
  static Vec fmadd(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
};

}  // namespace
const Kernels<float> avx512_kernels = kernels<Lanes, 8>();
}  // namespace mmgen_kernels::vq::entropy
