// The forward in bf16 on matrix tiles: see attn/tiles.h.
#pragma once

#include "attn/tiled_problem.h"

namespace mmgen_kernels::attn {

class TiledForward {
 public:
  // They share one packing of the keys.
  static constexpr int64_t queries_at_a_time = 512;

  TiledForward(const Problem<float>& problem, int64_t most_queries, const Tokens& out, const LogSumExp& lse)
      : p(problem), kernels(*tile_kernels_of(selected())), session(kernels), channels(p.dim), out(out), lse(lse),
        block(p, block_keys), queries(filled_up(most_queries, tile_side) / tile_side * channels.steps * tile_bytes),
        sums(filled_up(most_queries, tile_side) / tile_side * channels.tiles * tile_bytes),
        keys(block.steps * 2 * channels.steps * tile_bytes), values(block.steps * channels.tiles * tile_bytes),
        factor(filled_up(most_queries, tile_side)), maximum(factor.size()), divisor(factor.size()) {}

  void operator()(const Item& item, const Item*) {
    const Piece& piece = *item.piece;
    const int64_t group = item.head / p.group, end = item.begin + item.count, padded = filled_up(item.count, tile_side);
    kernels.pack_rows_transposed(rows_of(p.q, piece.b, piece.q_begin + item.begin, item.count, item.head), padded, queries.data());
    std::fill_n(maximum.data(), padded, -std::numeric_limits<float>::infinity());
    std::fill_n(divisor.data(), padded, 0.0f);
    const int64_t visible = p.causal ? std::min(piece.keys, end) : piece.keys;
    if (visible == 0) std::fill(sums.begin(), sums.end(), std::byte{0});
    for (int64_t j = 0; j < visible; j += block_keys) {
      const int64_t count = std::min(block_keys, piece.keys - j), begin = piece.k_begin + j;
      kernels.pack_rows(rows_of(p.k, piece.b, begin, count, group), filled_up(count, tile_side), keys.data());
      kernels.pack_pairs_transposed(rows_of(p.v, piece.b, begin, count, group), filled_up(count, tile_step), values.data());
      for (int64_t t = item.begin; t < end; t += tile_queries) {
        const int64_t rows = std::min(tile_queries, end - t), seen = p.seen(t + rows - 1, j, count);
        if (seen > 0) add(t - item.begin, {piece, item.head, t, rows, j, seen});
      }
    }
    write(item);
  }

 private:
  // Of logits: 32 KiB with 32 queries. Keys and values beside them are 64 KiB at 64 channels.
  static constexpr int64_t block_keys = 256;

  void add(int64_t first, const Area& area) {
    const int64_t query_tiles = tiles_of(area.rows, tile_side), steps = tiles_of(area.keys, tile_step);
    const Operand of_q{queries.data() + first / tile_side * channels.steps * tile_bytes, channels.steps, 1};
    kernels.multiply(tiles_of(area.keys, tile_side), query_tiles, p.dim, {keys.data(), channels.steps, 1}, of_q,
                     LogitBlock::sums(block.logits), false);
    block.finish(p, kernels, area, query_tiles);
    const bool changed = kernels.soften(block.logits.data(), steps, query_tiles, block.highest, maximum.data() + first,
                                        divisor.data() + first, factor.data() + first);
    std::byte* to = sums.data() + first / tile_side * channels.tiles * tile_bytes;
    if (area.j > 0 && changed)
      kernels.rescale(reinterpret_cast<float*>(to), channels.tiles, query_tiles, factor.data() + first);
    const Operand of_v{values.data(), 1, channels.tiles}, weights{reinterpret_cast<std::byte*>(block.logits.data()), 1, 4};
    kernels.multiply(channels.tiles, query_tiles, area.keys, of_v, weights, {to, 1, channels.tiles}, area.j > 0);
  }

  void write(const Item& item) {
    const Piece& piece = *item.piece;
    const int64_t from = piece.q_begin + item.begin, head = piece.b * p.q.heads + item.head;
    for (int64_t i = 0; i < item.count; ++i) {
      factor[i] = divisor[i] == 0 ? 0.0f : 1 / divisor[i];  // 0 where no key was seen; NaN stays
      lse.write(head * p.q.length + from + i, double(maximum[i] + std::log(divisor[i])));
    }
    kernels.write_transposed({sums.data(), 1, channels.tiles}, factor.data(), rows_of(out, piece.b, from, item.count, item.head));
  }

  const Problem<float>& p;
  const TileKernels& kernels;
  TileSession session;
  TiledChannels channels;
  const Tokens& out;
  LogSumExp lse;
  LogitBlock block;
  Tiles queries, sums, keys, values;
  Buffer<float> factor, maximum, divisor;
};

}  // namespace mmgen_kernels::attn
