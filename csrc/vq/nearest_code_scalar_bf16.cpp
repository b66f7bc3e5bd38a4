// The bf16 pass in plain C++: what AMX computes, for tests on any machine.
#include "simd/vec_scalar.h"
#include "vq/bf16_pass.h"

namespace mmgen_kernels::vq {
namespace {

class PlainTiles {
 public:
  template <int TILE>
  void zero() {
    std::memset(tiles_[TILE], 0, step_bytes);
  }
  template <int TILE>
  void load(const std::byte* from) {
    std::memcpy(tiles_[TILE], from, step_bytes);
  }
  template <int TILE>
  void store(float* to) {
    std::memcpy(to, tiles_[TILE], step_bytes);
  }
  template <int SUM, int CODES, int ROWS>
  void multiply() {
    constexpr int64_t products = 2 * lanes;
    uint16_t codes[lanes * products], rows[lanes * products];
    float sums[lanes * lanes];
    std::memcpy(codes, tiles_[CODES], step_bytes);
    std::memcpy(rows, tiles_[ROWS], step_bytes);
    std::memcpy(sums, tiles_[SUM], step_bytes);
    for (int64_t j = 0; j < lanes; ++j)
      for (int64_t k = 0; k < products; ++k) {
        const float code = from_bf16(codes[j * products + k]);
        for (int64_t r = 0; r < lanes; ++r) sums[j * lanes + r] += code * from_bf16(rows[(k / 2 * lanes + r) * 2 + k % 2]);
      }
    std::memcpy(tiles_[SUM], sums, step_bytes);
  }

 private:
  std::byte tiles_[8][step_bytes];
};

}  // namespace

const Kernels scalar_bf16_kernels =
    tile_kernels<simd::Scalar<16>, Bf16Format<simd::Scalar<16>>, PlainTiles>("scalar_bf16");

}  // namespace mmgen_kernels::vq
