// The inner loops of attn/tiles.h on AVX-512 with bf16: two products of bf16 a lane, twice as many as of fp32.
#include "attn/tiles_avx512.h"

namespace mmgen_kernels::attn {
namespace {

constexpr int rows_at_once = 8;  // by two tiles of columns: 16 sums, more than an addition takes to come round
constexpr int64_t row_bytes = 64;

// Rows of one tile of a, times one or two tiles of columns.
template <int COLUMNS>
void product(int64_t depth, const Operand& a, const Operand& b, const Sums& c, bool add) {
  for (int64_t row = 0; row < tile_side; row += rows_at_once) {
    const auto sum = [&](int r, int j) { return c.tiles + j * c.next_column * tile_bytes + (row + r) * row_bytes; };
    __m512 sums[rows_at_once][COLUMNS];
#pragma GCC unroll 8
    for (int r = 0; r < rows_at_once; ++r)
#pragma GCC unroll 2
      for (int j = 0; j < COLUMNS; ++j) sums[r][j] = add ? _mm512_load_ps(sum(r, j)) : __m512{};
    const std::byte *of_a = a.tiles + row * row_bytes, *of_b = b.tiles;
    for (int64_t left = depth; left > 0; left -= tile_step) {
      const int64_t pairs = left < tile_step ? (left + 1) / 2 : tile_step / 2;
      for (int64_t p = 0; p < pairs; ++p) {
        __m512bh columns[COLUMNS];
#pragma GCC unroll 2
        for (int j = 0; j < COLUMNS; ++j)
          columns[j] = (__m512bh)_mm512_load_si512(of_b + j * b.next * tile_bytes + p * row_bytes);
#pragma GCC unroll 8
        for (int r = 0; r < rows_at_once; ++r) {
          int32_t pair;
          __builtin_memcpy(&pair, of_a + r * row_bytes + p * sizeof pair, sizeof pair);
          const __m512bh of_row = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 2
          for (int j = 0; j < COLUMNS; ++j) sums[r][j] = _mm512_dpbf16_ps(sums[r][j], of_row, columns[j]);
        }
      }
      of_a += a.next_step * tile_bytes, of_b += b.next_step * tile_bytes;
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows_at_once; ++r)
#pragma GCC unroll 2
      for (int j = 0; j < COLUMNS; ++j) _mm512_store_ps(sum(r, j), sums[r][j]);
  }
}

void multiply(int64_t rows, int64_t columns, int64_t depth, const Operand& a, const Operand& b, const Sums& c, bool add) {
  for (int64_t j = 0; j < columns; j += 2)
    for (int64_t i = 0; i < rows; ++i) {
      const Operand left{a.tiles + i * a.next * tile_bytes, a.next, a.next_step};
      const Operand right{b.tiles + j * b.next * tile_bytes, b.next, b.next_step};
      const Sums to{c.tiles + (i * c.next_row + j * c.next_column) * tile_bytes, c.next_row, c.next_column};
      (j + 1 == columns ? product<1> : product<2>)(depth, left, right, to, add);
    }
}

// One AMD EPYC, 64 heads of 64 channels with 256 keys, us, tiles and fp32, forward and with the backward:
//   1 query   586 and 370, 3240 and 2080       4 queries  585 and 519, 3620 and 2790
//   8 queries 609 and 674, 3960 and 3370      12 queries with as many keys  78 and 84, 384 and 375
constexpr int64_t fewest_queries = 12;

void nothing_to_configure(std::byte*) {}
void nothing_to_restore(const std::byte*) {}

}  // namespace

const TileKernels avx512_bf16_kernels = around(fewest_queries, nothing_to_configure, nothing_to_restore, multiply);

}  // namespace mmgen_kernels::attn
