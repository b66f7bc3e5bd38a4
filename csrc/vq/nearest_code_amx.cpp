// The bf16 pass on AMX's matrix tiles.
#include "simd/vec_avx512.h"
#include "vq/bf16_pass.h"

namespace mmgen_kernels::vq {
namespace {

class Amx {
 public:
  // Other users of the tiles in this thread (oneDNN) find their configuration as they left it.
  Amx() {
    _tile_storeconfig(before_);
    struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    static_assert(sizeof config == 64);
    for (int i = 0; i < 8; ++i) config.row_bytes[i] = 64, config.rows[i] = 16;
    _tile_loadconfig(&config);
  }
  ~Amx() { _tile_loadconfig(before_); }
  Amx(const Amx&) = delete;

  void multiply(const std::byte* codes0, const std::byte* codes1, const std::byte* rows0, const std::byte* rows1,
                int64_t steps, bool norm_rides_along, float (*scores)[groups][lanes * lanes]) const {
    if (norm_rides_along) {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    } else {
      const std::byte *norms0 = codes0 + steps * step_bytes, *norms1 = codes1 + steps * step_bytes;
      _tile_loadd(0, norms0, 64);
      _tile_loadd(1, norms0, 64);
      _tile_loadd(2, norms1, 64);
      _tile_loadd(3, norms1, 64);
    }
    for (int64_t s = 0; s < steps; ++s) {
      // Each load beside the product before it: tile registers are not renamed.
      _tile_loadd(4, codes0 + s * step_bytes, 64);
      _tile_loadd(6, rows0 + s * step_bytes, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, rows1 + s * step_bytes, 64);
      _tile_dpbf16ps(1, 4, 7);
      _tile_loadd(5, codes1 + s * step_bytes, 64);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, scores[0][0], 64);
    _tile_stored(1, scores[0][1], 64);
    _tile_stored(2, scores[1][0], 64);
    _tile_stored(3, scores[1][1], 64);
  }

 private:
  alignas(64) std::byte before_[64];
};

}  // namespace

const Kernels amx_kernels = bf16_kernels<simd::VecAvx512, Amx>("amx");

}  // namespace mmgen_kernels::vq
