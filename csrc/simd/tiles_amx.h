// AMX's tile registers: eight tiles of 16 rows of 64 bytes.
#pragma once

#include <cstddef>
#include <cstdint>

namespace mmgen_kernels::simd {
namespace {  // internal linkage: compiled with flags of its own, and the copies must not be merged

// The intrinsics take no template argument for a register's number, and g++ 12 believes that those of the configuration read and
// write 8 bytes of it; hence the assembly.
class TilesAmx {
 public:
  // Other users of the tiles in this thread (oneDNN) find their configuration as they left it: `before`, 64 bytes.
  static void configure(std::byte* before) {
    asm volatile("sttilecfg %0" : "=m"(*reinterpret_cast<Config*>(before)));
    Config config;
    for (int i = 0; i < 8; ++i) config.row_bytes[i] = row_bytes, config.rows[i] = rows;
    asm volatile("ldtilecfg %0" ::"m"(config));
  }
  static void restore(const std::byte* before) { asm volatile("ldtilecfg %0" ::"m"(*reinterpret_cast<const Config*>(before))); }

  TilesAmx() { configure(before_); }
  ~TilesAmx() { restore(before_); }
  TilesAmx(const TilesAmx&) = delete;

  template <int TILE>
  static void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(TILE));
  }
  template <int TILE>
  static void load(const void* from) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(row_bytes), "i"(TILE), "m"(*static_cast<const Tile*>(from)));
  }
  template <int TILE>
  static void store(void* to) {
    asm volatile("tilestored %%tmm%c3, (%1,%2,1)" : "=m"(*static_cast<Tile*>(to)) : "r"(to), "r"(row_bytes), "i"(TILE));
  }
  // SUM += A B in bf16, 16 rows of A with 16 columns of B; a row of B holds two of its matrix, column by column.
  template <int SUM, int A, int B>
  static void multiply() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUM), "i"(A), "i"(B));
  }

 private:
  static constexpr int64_t rows = 16, row_bytes = 64;
  struct Config {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  };
  static_assert(sizeof(Config) == 64);
  struct Tile {
    std::byte bytes[rows * row_bytes];
  };
  alignas(64) std::byte before_[64];
};

}  // namespace
}  // namespace mmgen_kernels::simd
