// Attention in bf16 on matrix tiles: how operands lie in memory, and the inner loops as functions, a table of them for each
// instruction set that has such tiles.
//
// Blocks of logits are transposed, (keys, queries): a lane of a vector is a query, so that the softmax needs no sum across lanes,
// and weights and their gradients leave it as operands of the products that follow:
//   forward   S^T = K Q^T      O^T += V^T P^T
//   backward  S^T = K Q^T     dP^T  = V dO^T     dV += P^T dO     dK += dS^T Q     dQ^T += K^T dS^T
#pragma once

#include <cstddef>
#include <cstdint>

#include "simd/instruction_set.h"

namespace mmgen_kernels::attn {

// A tile is 1 KiB: of a left operand (m, k) 16 rows of 32 bf16; of a right one (k, n) 16 pairs of rows by 16 columns,
// [k / 2][n][2]; of sums 16 rows of 16 fp32. What fills it up is 0. On one Xeon a product of two tiles takes 7 ns with 2, 8, 16
// or 32 numbers to sum, so that 72 channels are 96 where they are summed, without a narrower tile at the end.
constexpr int64_t tile_side = 16, tile_step = 32, tile_bytes = 1024;
constexpr int64_t tile_queries = 2 * tile_side;  // of a block of logits, as two tiles by two are multiplied at a time

// A matrix as tiles; distances are counted in tiles: along its rows (left) or columns (right), and along what is summed.
struct Operand {
  const std::byte* tiles;
  int64_t next, next_step;
};
struct Sums {
  std::byte* tiles;
  int64_t next_row, next_column;
};
// bf16 in a tensor; strides in bytes. From row `split` on they are in another one.
struct Rows {
  char* data;
  int64_t stride, count, dim, split;
  char* other;
  int64_t other_stride;

  char* row(int64_t i) const { return i < split ? data + i * stride : other + (i - split) * other_stride; }
};
// What makes products logits: scale product + bias, and -inf for query i from key seen[i] on. bias (queries, keys) has rows of
// `bias_row`; it and `seen` may be null.
struct LogitTerms {
  float scale;
  const float* bias;
  int64_t bias_row;
  const int32_t* seen;
};
// What the softmax' derivative takes for each query of a block.
struct QueryTerms {
  const float *lse, *inner, *grad_lse;
};
// Where weights and gradients of logits go in bf16: left operands with the queries summed, a right one with the keys summed.
struct NarrowBlock {
  std::byte *weights, *gradients, *gradients_of_queries;
  int64_t next_keys;  // from one tile of keys to the next in the first two; the third has as many for 32 keys
};

// Blocks of logits and of their gradients are tiles [key / 16][2 of queries], `steps` times 32 keys.
struct TileKernels {
  int64_t fewest_queries;  // of a head, for which packing its keys pays; fewer are widened to fp32

  // Between these two the thread's tiles are configured; `before` (64 bytes) is what other users find again.
  void (*enter)(std::byte* before);
  void (*leave)(const std::byte* before);

  // Rows, up to `padded` of them, as tiles [row / 16][channel / 32]: a left operand with the channels summed, or a right one
  void (*pack_rows)(const Rows& from, int64_t padded, std::byte* to);
  void (*pack_rows_transposed)(const Rows& from, int64_t padded, std::byte* to);
  // as tiles [row / 32][channel / 16]: a right operand with the rows summed, or a left one
  void (*pack_pairs)(const Rows& from, int64_t padded, std::byte* to);
  void (*pack_pairs_transposed)(const Rows& from, int64_t padded, std::byte* to);

  // c = or += a b, rows and columns counted in tiles, `depth` in the numbers that are summed
  void (*multiply)(int64_t rows, int64_t columns, int64_t depth, const Operand& a, const Operand& b, const Sums& c, bool add);

  // sums -> logits; highest = the largest of each query
  void (*logits)(float* block, int64_t steps, int64_t query_tiles, const LogitTerms& terms, float* highest);
  // logits -> weights exp(logit - maximum) in bf16, a right operand with the keys summed whose tiles lie four apart; brings the
  // running maximum and sum of each query up to date. factor is what multiplies what was summed with the old maximum; returns
  // whether any is not 1.
  bool (*soften)(float* block, int64_t steps, int64_t query_tiles, const float* highest, float* maximum, float* sum, float* factor);
  // transposed sums [query / 16][channel / 16] *= factor of the query
  void (*rescale)(float* sums, int64_t channels, int64_t query_tiles, const float* factor);
  // logits -> weights, grad_weights -> gradients of the logits, as Kernels::differentiate does; rounded to bf16, or in place
  void (*differentiate)(const float* logits, const float* grad_weights, int64_t steps, const QueryTerms& terms,
                        const NarrowBlock& to);
  void (*differentiate_in_place)(float* logits, float* grad_weights, int64_t steps, const QueryTerms& terms);
  // a block -> (queries, keys) in rows of `row`
  void (*transpose)(const float* block, int64_t steps, float* to, int64_t row);

  // out = the inner product of each row of a with the same row of b
  void (*dots)(const Rows& a, const Rows& b, float* out);
  // sums times factor of the row -> rows; or of the transposed sums
  void (*write)(const Sums& sums, const float* factor, const Rows& to);
  void (*write_transposed)(const Sums& sums, const float* factor, const Rows& to);
};

#if defined(__x86_64__)
extern const TileKernels amx_kernels, avx512_bf16_kernels;
#endif

// null where there are none
inline const TileKernels* tile_kernels_of(InstructionSet set) {
#if defined(__x86_64__)
  if (set == InstructionSet::amx) return &amx_kernels;
  if (set >= InstructionSet::avx512_bf16) return &avx512_bf16_kernels;
#endif
  return nullptr;
}

}  // namespace mmgen_kernels::attn
