// The bf16 pass on AMX's matrix tiles.
#include "simd/vec_avx512.h"
#include "vq/bf16_pass.h"

namespace mmgen_kernels::vq {
namespace {

// The intrinsics take no template argument for a register's number, hence the assembly.
class AmxTiles {
 public:
  // Other users of the tiles in this thread (oneDNN) find their configuration as they left it.
  AmxTiles() {
    _tile_storeconfig(before_);
    struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    static_assert(sizeof config == 64);
    for (int i = 0; i < 8; ++i) config.row_bytes[i] = row_bytes, config.rows[i] = lanes;
    _tile_loadconfig(&config);
  }
  ~AmxTiles() { _tile_loadconfig(before_); }
  AmxTiles(const AmxTiles&) = delete;

  template <int TILE>
  void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(TILE));
  }
  template <int TILE>
  void load(const std::byte* from) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(row_bytes), "i"(TILE),
                 "m"(*reinterpret_cast<const std::byte(*)[step_bytes]>(from)));
  }
  template <int TILE, class Sum>
  void store(Sum* to) {
    asm volatile("tilestored %%tmm%c3, (%1,%2,1)"
                 : "=m"(*reinterpret_cast<Sum(*)[lanes * lanes]>(to))
                 : "r"(to), "r"(row_bytes), "i"(TILE));
  }

 private:
  static constexpr int64_t row_bytes = 64;
  alignas(64) std::byte before_[64];
};

// SUM += CODES times ROWS
struct Bf16Tiles : AmxTiles {
  template <int SUM, int CODES, int ROWS>
  void multiply() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUM), "i"(CODES), "i"(ROWS));
  }
};

}  // namespace

const Kernels amx_kernels = tile_kernels<simd::VecAvx512, Bf16Format<simd::VecAvx512>, Bf16Tiles>("amx");

}  // namespace mmgen_kernels::vq
