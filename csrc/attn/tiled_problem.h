// What the forward and the backward on matrix tiles share.
#pragma once

#include "attn/problem.h"
#include "attn/tiles.h"

namespace mmgen_kernels::attn {

using Tiles = Buffer<std::byte>;

inline int64_t tiles_of(int64_t count, int64_t size) { return (count + size - 1) / size; }
inline int64_t filled_up(int64_t count, int64_t size) { return tiles_of(count, size) * size; }

// Tiles that the channels of a head take: where they are summed, and where they are not.
struct TiledChannels {
  int64_t steps, tiles;

  explicit TiledChannels(int64_t dim) : steps(tiles_of(dim, tile_step)), tiles(tiles_of(dim, tile_side)) {}
};

// Neither AMX nor AVX-512 has a product of fp16. Widened to fp32 it takes 0.94 to 1.1 of the time of torch's kernel forward and
// 0.35 to 0.75 with the backward (one Xeon, 128 to 1024 tokens).
inline bool on_tiles(const Tokens& q) { return q.dtype == static_cast<int>(Float::bf16) && tile_kernels_of(selected()); }

// Pieces that go on tiles, and those that do not. Each goes by its own queries, so that its bits do not depend on the others.
inline std::pair<std::vector<Piece>, std::vector<Piece>> suited_to_tiles(bool on_tiles, const std::vector<Piece>& pieces) {
  std::pair<std::vector<Piece>, std::vector<Piece>> parts;
  for (const Piece& piece : pieces)
    (on_tiles && piece.queries >= tile_kernels_of(selected())->fewest_queries ? parts.first : parts.second).push_back(piece);
  return parts;
}

// Of a thread, while it has work on tiles.
class TileSession {
 public:
  explicit TileSession(const TileKernels& kernels) : kernels(kernels) { kernels.enter(before); }
  ~TileSession() { kernels.leave(before); }
  TileSession(const TileSession&) = delete;

 private:
  const TileKernels& kernels;
  alignas(64) std::byte before[64];
};

inline Rows rows_of(const Tokens& of, int64_t b, int64_t begin, int64_t count, int64_t head) {
  const int64_t split = std::clamp<int64_t>(of.split(b) - begin, 0, count), from = std::max<int64_t>(begin - of.split(b), 0);
  char* other = split < count ? of.second.row(b, from, head) : nullptr;
  return {of.first.row(b, begin, head), of.first.stride[1], count, of.dim, split, other, of.second.stride[1]};
}

// Queries [t, t + rows) of a head of a piece, 32 at most, with its keys [j, j + keys).
struct Area {
  const Piece& piece;
  int64_t head, t, rows, j, keys;
};

// Products of queries and keys, made logits where they lie.
struct LogitBlock {
  int64_t steps;  // of 32 keys, at most
  Buffer<float> logits, bias;
  float highest[tile_queries];

  LogitBlock(const Problem<float>& p, int64_t most_keys)
      : steps(tiles_of(std::min(most_keys, p.k.length), tile_step)), logits(steps * tile_step * tile_queries),
        bias(p.bias.given() ? logits.size() : 0) {}

  static Sums sums(Buffer<float>& of) { return {reinterpret_cast<std::byte*>(of.data()), 2, 1}; }

  void finish(const Problem<float>& p, const TileKernels& kernels, const Area& area, int64_t query_tiles) {
    const int64_t width = steps * tile_step, of_steps = tiles_of(area.keys, tile_step);
    if (p.bias.given())
      for (int64_t i = 0; i < area.rows; ++i) {
        const int64_t given = p.bias.one_for_all_keys() ? 1 : area.keys;
        float* to = bias.data() + i * width;
        p.kernels.widen[p.bias.dtype](p.bias.at(area.piece.b, area.head, area.t + i, area.j), 0, 1, given, 1.0f, given, to);
        if (p.bias.one_for_all_keys()) std::fill_n(to, width, to[0]);
      }
    int32_t seen[tile_queries] = {};
    for (int64_t i = 0; i < area.rows; ++i) seen[i] = static_cast<int32_t>(p.seen(area.t + i, area.j, area.keys));
    // The first query sees the fewest, and those that only fill up a tile see none.
    const bool all = area.rows == query_tiles * tile_side && seen[0] == of_steps * tile_step;
    const LogitTerms terms{static_cast<float>(p.scale), p.bias.given() ? bias.data() : nullptr, width, all ? nullptr : seen};
    kernels.logits(logits.data(), of_steps, query_tiles, terms, highest);
  }
};

}  // namespace mmgen_kernels::attn
