#include <immintrin.h>

#include "vq/code_entropy_kernels.h"

namespace mmgen_kernels::vq::entropy {
namespace {

struct Lanes : Vectors<float, 32> {
  static Vec fmadd(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
};

}  // namespace
const Kernels<float> avx2_kernels = kernels<Lanes, 4>();
}  // namespace mmgen_kernels::vq::entropy
