// What the forward and the backward on matrix tiles share.
#pragma once

#include "attn/problem.h"
#include "attn/tiles.h"

namespace mmgen_kernels::attn {

using Tiles = Buffer<std::byte>;

constexpr int64_t tiled_keys = 256;  // of a block of logits: 32 KiB with 32 queries

inline int64_t tiles_of(int64_t count, int64_t size) { return (count + size - 1) / size; }

// Tiles that the channels of a head take: where they are summed, and where they are not.
struct TiledShape {
  int64_t steps, channels;

  explicit TiledShape(int64_t dim) : steps(tiles_of(dim, tile_step)), channels(tiles_of(dim, tile_side)) {}
};

inline bool on_tiles(const Tensor& q) { return q.scalar_type() == ScalarType::BFloat16 && tile_kernels_of(selected()); }

class TileSession {
 public:
  explicit TileSession(const TileKernels& tiles) : tiles(tiles) { tiles.enter(before); }
  ~TileSession() { tiles.leave(before); }
  TileSession(const TileSession&) = delete;

 private:
  const TileKernels& tiles;
  alignas(64) std::byte before[64];
};

inline Rows rows_of(const Tokens& of, int64_t b, int64_t begin, int64_t count, int64_t head) {
  return {of.row(b, begin, head), of.tensor.stride(1) * of.bytes, count, of.dim};
}

// Sums of queries' and keys' products, made logits where they lie.
struct LogitBlock {
  int64_t steps;  // of 32 keys, at most
  Buffer<float> logits, bias;
  float highest[tile_queries];

  LogitBlock(const Problem<float>& p, int64_t most_keys)
      : steps(tiles_of(std::min(most_keys, p.k.length), tile_step)), logits(steps * tile_step * tile_queries),
        bias(p.bias.given() ? logits.size() : 0) {}

  static Sums sums(Buffer<float>& of) { return {reinterpret_cast<std::byte*>(of.data()), 2, 1}; }

  // Of `rows` queries from number t of the piece on with `count` keys from j on, of which `steps` times 32 are looked at.
  void finish(const Problem<float>& p, const TileKernels& tiles, const Piece& piece, int64_t head, int64_t t, int64_t rows, int64_t j,
              int64_t count, int64_t of_steps, int64_t query_tiles) {
    const int64_t width = steps * tile_step;
    if (p.bias.given())
      for (int64_t i = 0; i < rows; ++i) {
        float* to = bias.data() + i * width;
        const char* from = p.bias.at(piece.b, head, t + i, j);
        const bool one = p.bias.one_for_all_keys();
        p.kernels.widen[p.bias.dtype](from, one ? 1 : count, 1.0f, one ? 1 : count, to);
        if (one) std::fill_n(to, width, to[0]);
      }
    int32_t seen[tile_queries] = {};
    for (int64_t i = 0; i < rows; ++i) seen[i] = static_cast<int32_t>(p.seen(t + i, j, count));
    const bool all = rows == query_tiles * tile_side && p.seen(t, j, count) >= of_steps * tile_step;  // the first query sees the fewest
    tiles.logits(logits.data(), of_steps, query_tiles, static_cast<float>(p.scale), p.bias.given() ? bias.data() : nullptr, width,
                 all ? nullptr : seen, highest);
  }
};

}  // namespace mmgen_kernels::attn
