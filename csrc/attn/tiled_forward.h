// The forward in bf16 on matrix tiles: see attn/tiles.h.
#pragma once

#include "attn/problem.h"
#include "attn/tiled_problem.h"

namespace mmgen_kernels::attn {

class TiledForward {
 public:
  // Queries that share one packing of the keys
  static constexpr int64_t queries_at_a_time = 512;

  TiledForward(const Problem<float>& problem, int64_t most_queries, char* out, const LogSumExp& lse)
      : p(problem), tiles(*tile_kernels_of(selected())), session(tiles), shape(problem.dim), out(out), lse(lse),
        queries(tiles_of(most_queries, tile_queries) * 2 * shape.steps * tile_bytes),
        sums(tiles_of(most_queries, tile_queries) * 2 * shape.channels * tile_bytes),
        block(p, tiled_keys), keys(block.steps * 2 * shape.steps * tile_bytes), values(block.steps * shape.channels * tile_bytes),
        factor(tiles_of(most_queries, tile_queries) * tile_queries), maximum(factor.size()), divisor(factor.size()) {}

  void operator()(const Item& item) {
    const Piece& piece = *item.piece;
    const int64_t group = item.head / p.group, end = item.begin + item.count;
    const int64_t padded = tiles_of(item.count, tile_side) * tile_side;
    tiles.pack_rows_transposed(rows_of(p.q, piece.b, piece.q_begin + item.begin, item.count, item.head), padded, queries.data());
    std::fill_n(maximum.data(), padded, -std::numeric_limits<float>::infinity());
    std::fill_n(divisor.data(), padded, 0.0f);
    const int64_t visible = p.causal ? std::min(piece.keys, end) : piece.keys;
    if (visible == 0) std::fill(sums.begin(), sums.end(), std::byte{0});
    for (int64_t j = 0; j < visible; j += tiled_keys) {
      const int64_t count = std::min(tiled_keys, piece.keys - j), steps = tiles_of(count, tile_step);
      tiles.pack_rows(rows_of(p.k, piece.b, piece.k_begin + j, count, group), tiles_of(count, tile_side) * tile_side, keys.data());
      tiles.pack_pairs_transposed(rows_of(p.v, piece.b, piece.k_begin + j, count, group), steps * tile_step, values.data());
      for (int64_t t = item.begin; t < end; t += tile_queries) {
        const int64_t rows = std::min(tile_queries, end - t);
        if (p.seen(t + rows - 1, j, count) > 0) add_block(item, t, rows, j, count);
      }
    }
    write(item);
  }

 private:
  void add_block(const Item& item, int64_t t, int64_t rows, int64_t j, int64_t count) {
    const int64_t first = t - item.begin, query_tiles = tiles_of(rows, tile_side);
    const int64_t seen = p.seen(t + rows - 1, j, count), steps = tiles_of(seen, tile_step);
    const Operand of_q{queries.data() + first / tile_side * shape.steps * tile_bytes, shape.steps, 1};
    tiles.multiply(tiles_of(seen, tile_side), query_tiles, shape.steps, {keys.data(), shape.steps, 1}, of_q, block.sums(block.logits), false);
    block.finish(p, tiles, *item.piece, item.head, t, rows, j, count, steps, query_tiles);
    float* by = factor.data() + first;
    const bool changed = tiles.soften(block.logits.data(), steps, query_tiles, block.highest, maximum.data() + first,
                                      divisor.data() + first, by);
    std::byte* to = sums.data() + first / tile_side * shape.channels * tile_bytes;
    if (j > 0 && changed) tiles.rescale(reinterpret_cast<float*>(to), shape.channels, query_tiles, by);
    const Operand weights{reinterpret_cast<std::byte*>(block.logits.data()), 1, 4};
    tiles.multiply(shape.channels, query_tiles, steps, {values.data(), 1, shape.channels}, weights, {to, 1, shape.channels}, j > 0);
  }

  void write(const Item& item) {
    const Piece& piece = *item.piece;
    const int64_t from = piece.q_begin + item.begin, head = piece.b * p.q.heads + item.head;
    for (int64_t i = 0; i < item.count; ++i) {
      factor[i] = divisor[i] == 0 ? 0.0f : 1 / divisor[i];  // 0 where no key was seen; NaN stays
      lse.write(head * p.q.length + from + i, double(maximum[i] + std::log(divisor[i])));
    }
    const int64_t stride = p.q.heads * p.dim * p.q.bytes;
    char* to = out + (piece.b * p.q.length + from) * stride + item.head * p.dim * p.q.bytes;
    tiles.write_transposed({sums.data(), 1, shape.channels}, factor.data(), {to, stride, item.count, p.dim});
  }

  const Problem<float>& p;
  const TileKernels& tiles;
  TileSession session;
  TiledShape shape;
  char* out;
  LogSumExp lse;
  Tiles queries, sums;
  LogitBlock block;
  Tiles keys, values;
  Buffer<float> factor, maximum, divisor;
};

}  // namespace mmgen_kernels::attn
