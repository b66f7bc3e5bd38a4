// The inner loops of attn/tiles.h on AMX, and between the products on AVX-512.
#include "attn/tiles_avx512.h"
#include "simd/tiles_amx.h"

namespace mmgen_kernels::attn {
namespace {

using Amx = simd::TilesAmx;

// Sums are in tiles 0 to 3, a in 4 and 5, b in 6 and 7.
template <int ROWS, int COLUMNS>
void product(int64_t steps, const Operand& a, const Operand& b, const Sums& c, bool add) {
  const auto sum = [&](int64_t row, int64_t column) { return c.tiles + (row * c.next_row + column * c.next_column) * tile_bytes; };
  if (add) {
    Amx::load<0>(sum(0, 0));
    if constexpr (COLUMNS > 1) Amx::load<1>(sum(0, 1));
    if constexpr (ROWS > 1) Amx::load<2>(sum(1, 0));
    if constexpr (ROWS > 1 && COLUMNS > 1) Amx::load<3>(sum(1, 1));
  } else {
    Amx::zero<0>();
    if constexpr (COLUMNS > 1) Amx::zero<1>();
    if constexpr (ROWS > 1) Amx::zero<2>();
    if constexpr (ROWS > 1 && COLUMNS > 1) Amx::zero<3>();
  }
  const std::byte *of_a = a.tiles, *of_b = b.tiles;
  for (int64_t step = 0; step < steps; ++step, of_a += a.next_step * tile_bytes, of_b += b.next_step * tile_bytes) {
    Amx::load<6>(of_b);
    Amx::load<4>(of_a);
    Amx::multiply<0, 4, 6>();
    if constexpr (COLUMNS > 1) {
      Amx::load<7>(of_b + b.next * tile_bytes);
      Amx::multiply<1, 4, 7>();
    }
    if constexpr (ROWS > 1) {
      Amx::load<5>(of_a + a.next * tile_bytes);
      Amx::multiply<2, 5, 6>();
      if constexpr (COLUMNS > 1) Amx::multiply<3, 5, 7>();
    }
  }
  Amx::store<0>(sum(0, 0));
  if constexpr (COLUMNS > 1) Amx::store<1>(sum(0, 1));
  if constexpr (ROWS > 1) Amx::store<2>(sum(1, 0));
  if constexpr (ROWS > 1 && COLUMNS > 1) Amx::store<3>(sum(1, 1));
}

void multiply(int64_t rows, int64_t columns, int64_t depth, const Operand& a, const Operand& b, const Sums& c, bool add) {
  const int64_t steps = (depth + tile_step - 1) / tile_step;
  for (int64_t i = 0; i < rows; i += 2)
    for (int64_t j = 0; j < columns; j += 2) {
      const Operand left{a.tiles + i * a.next * tile_bytes, a.next, a.next_step};
      const Operand right{b.tiles + j * b.next * tile_bytes, b.next, b.next_step};
      const Sums to{c.tiles + (i * c.next_row + j * c.next_column) * tile_bytes, c.next_row, c.next_column};
      const bool one_row = i + 1 == rows, one_column = j + 1 == columns;
      const auto some = one_row ? one_column ? product<1, 1> : product<1, 2> : one_column ? product<2, 1> : product<2, 2>;
      some(steps, left, right, to, add);
    }
}

void enter(std::byte* before) { Amx::configure(before); }
void leave(const std::byte* before) { Amx::restore(before); }

}  // namespace

const TileKernels amx_kernels = around(0, enter, leave, multiply);

}  // namespace mmgen_kernels::attn
