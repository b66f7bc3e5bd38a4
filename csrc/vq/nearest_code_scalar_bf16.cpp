// The bf16 pass in plain C++: what AMX computes, for tests on any machine.
#include "simd/vec_scalar.h"
#include "vq/bf16_pass.h"

namespace mmgen_kernels::vq {
namespace {

struct PlainTiles {
  void multiply(const std::byte* codes0, const std::byte* codes1, const std::byte* rows0, const std::byte* rows1,
                int64_t steps, bool norm_rides_along, float (*scores)[groups][lanes * lanes]) const {
    const std::byte *codes[] = {codes0, codes1}, *rows[] = {rows0, rows1};
    for (int u = 0; u < 2; ++u)
      for (int g = 0; g < groups; ++g)
        for (int64_t j = 0; j < lanes; ++j)
          for (int64_t r = 0; r < lanes; ++r) {
            float sum = 0;
            if (!norm_rides_along) std::memcpy(&sum, codes[u] + steps * step_bytes + (j * lanes + r) * 4, 4);
            for (int64_t s = 0; s < steps; ++s) {
              const auto* code = reinterpret_cast<const uint16_t*>(codes[u] + s * step_bytes) + j * products;
              const auto* row = reinterpret_cast<const uint16_t*>(rows[g] + s * step_bytes);
              for (int64_t k = 0; k < products; ++k) sum += from_bf16(code[k]) * from_bf16(row[(k / 2 * lanes + r) * 2 + k % 2]);
            }
            scores[u][g][j * lanes + r] = sum;
          }
  }
};

}  // namespace

const Kernels scalar_bf16_kernels = bf16_kernels<simd::Scalar<16>, PlainTiles>("scalar_bf16");

}  // namespace mmgen_kernels::vq
