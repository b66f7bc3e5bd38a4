// The backward in bf16 on matrix tiles: see attn/kernels.h.
#pragma once

#include <cstring>

#include "attn/tiled_problem.h"

namespace mmgen_kernels::attn {

// A head's queries as the products take them. Those that fill up the last tile have weight 0.
struct TiledQueries {
  Tiles q, grad_out;  // right operands with the channels summed
  Buffer<float> lse, inner, grad_lse;
  int64_t padded = 0;

  void read(const Problem<float>& p, const Upstream& up, const TileKernels& kernels, const Piece& piece, int64_t head,
            int64_t begin, int64_t count) {
    const int64_t first = piece.q_begin + begin, at = (piece.b * p.q.heads + head) * p.q.length + first;
    padded = filled_up(count, tile_queries);
    const size_t bytes = padded / tile_side * TiledChannels(p.dim).steps * tile_bytes;
    for (Tiles* of : {&q, &grad_out}) of->resize(std::max(of->size(), bytes));
    for (Buffer<float>* of : {&lse, &inner, &grad_lse}) of->resize(std::max<size_t>(of->size(), padded));
    const Rows upstream = rows_of(up.grad_out, piece.b, first, count, head);
    const int64_t in_tiles = filled_up(count, tile_side);
    kernels.pack_rows_transposed(rows_of(p.q, piece.b, first, count, head), in_tiles, q.data());
    kernels.pack_rows_transposed(upstream, in_tiles, grad_out.data());
    kernels.dots(upstream, rows_of(up.out, piece.b, first, count, head), inner.data());
    for (int64_t i = 0; i < padded; ++i) {
      const bool there = i < count;
      lse[i] = there ? static_cast<float>(up.lse[at + i]) : std::numeric_limits<float>::infinity();
      grad_lse[i] = there && up.through_lse ? static_cast<float>(up.grad_lse[at + i]) : 0.0f;
      if (!there) inner[i] = 0;
    }
  }
  QueryTerms terms(int64_t i) const { return {lse.data() + i, inner.data() + i, grad_lse.data() + i}; }
};

// A block of keys and values, and of the logits and gradients of weights that 32 queries have with it.
struct TiledBlock {
  static constexpr int64_t keys = 128;

  TiledChannels channels;
  LogitBlock logits;
  Buffer<float> grad_weights;
  Tiles k, v;  // left operands with the channels summed

  explicit TiledBlock(const Problem<float>& p)
      : channels(p.dim), logits(p, keys), grad_weights(logits.logits.size()),
        k(logits.steps * 2 * channels.steps * tile_bytes), v(k.size()) {}

  void read(const Problem<float>& p, const TileKernels& kernels, const Piece& piece, int64_t group, int64_t j, int64_t count) {
    const int64_t padded = filled_up(count, tile_side);
    kernels.pack_rows(rows_of(p.k, piece.b, piece.k_begin + j, count, group), padded, k.data());
    kernels.pack_rows(rows_of(p.v, piece.b, piece.k_begin + j, count, group), padded, v.data());
  }

  // The queries lie in `of` from number i on.
  void multiply(const Problem<float>& p, const TileKernels& kernels, const Area& area, const TiledQueries& of, int64_t i) {
    const auto product = [&](const Tiles& keys, const Tiles& queries, Buffer<float>& to) {
      const Operand right{queries.data() + i / tile_side * channels.steps * tile_bytes, channels.steps, 1};
      kernels.multiply(tiles_of(area.keys, tile_side), tiles_of(area.rows, tile_side), p.dim,
                       {keys.data(), channels.steps, 1}, right, LogitBlock::sums(to), false);
    };
    product(k, of.q, logits.logits);
    product(v, of.grad_out, grad_weights);
    logits.finish(p, kernels, area, 2);
  }
};

class TiledBackward {
 public:
  TiledBackward(const Problem<float>& problem, const Upstream& up, const Tokens& grad_q, const Tokens& grad_k, const Tokens& grad_v)
      : p(problem), up(up), kernels(*tile_kernels_of(selected())), session(kernels), grad_q(grad_q), grad_k(grad_k),
        grad_v(grad_v), channels(p.dim), block(p), columns(block.logits.steps * channels.tiles * tile_bytes) {
    for (Tiles* of : {&weights, &gradients, &gradients_of_queries}) of->resize(block.logits.steps * 2 * query_steps * tile_bytes);
  }

  void operator()(const Piece& piece, int64_t group, const Piece*, int64_t) {
    const int64_t query_tiles = tiles_of(piece.queries, tile_queries) * 2, key_tiles = tiles_of(piece.keys, tile_side);
    for (Tiles* of : {&pairs_q, &pairs_grad}) of->resize(query_tiles / 2 * channels.tiles * tile_bytes);
    sum_q.resize(query_tiles * channels.tiles * tile_bytes);
    for (Tiles* sum : {&sum_k, &sum_v}) sum->assign(key_tiles * channels.tiles * tile_bytes, std::byte{0});
    for (int64_t head = group * p.group; head < (group + 1) * p.group; ++head) {
      queries.read(p, up, kernels, piece, head, 0, piece.queries);
      kernels.pack_pairs(rows_of(p.q, piece.b, piece.q_begin, piece.queries, head), queries.padded, pairs_q.data());
      kernels.pack_pairs(rows_of(up.grad_out, piece.b, piece.q_begin, piece.queries, head), queries.padded, pairs_grad.data());
      if (piece.keys == 0) std::fill(sum_q.begin(), sum_q.end(), std::byte{0});
      for (int64_t j = 0; j < piece.keys; j += TiledBlock::keys) one_block(piece, group, head, j);
      write(grad_q, piece.b, piece.q_begin, piece.queries, head, p.scale, sum_q, true);
    }
    write(grad_k, piece.b, piece.k_begin, piece.keys, group, p.scale, sum_k, false);
    write(grad_v, piece.b, piece.k_begin, piece.keys, group, 1, sum_v, false);
    for (const Tokens* of : {&grad_k, &grad_v})
      for (int64_t i = 0; of->length > 0 && i < piece.unseen; ++i)
        std::memset(of->row(piece.b, piece.k_begin + piece.keys + i, group), 0, p.dim * of->bytes);
  }

 private:
  // Of 32 queries with one block of keys: sums of dk and dv are read and written once for them.
  static constexpr int64_t query_steps = 4;

  void one_block(const Piece& piece, int64_t group, int64_t head, int64_t j) {
    constexpr int64_t most = query_steps * tile_queries;
    const int64_t count = std::min(TiledBlock::keys, piece.keys - j);
    const int64_t blind = p.causal ? std::min(j, piece.queries) / most * most : 0;  // these queries come before them
    block.read(p, kernels, piece, group, j, count);
    const Rows keys = rows_of(p.k, piece.b, piece.k_begin + j, count, group);
    kernels.pack_pairs_transposed(keys, filled_up(count, tile_step), columns.data());
    for (int64_t t = blind; t < piece.queries; t += most) {
      const int64_t rows = std::min(most, piece.queries - t), of_queries = tiles_of(rows, tile_queries);
      const int64_t seen = p.seen(t + rows - 1, j, count), steps = tiles_of(seen, tile_step);
      for (int64_t s = 0; s < of_queries; ++s) {
        const int64_t i = t + s * tile_queries;
        block.multiply(p, kernels, {piece, head, i, std::min(tile_queries, piece.queries - i), j, seen}, queries, i);
        const NarrowBlock to{weights.data() + s * tile_bytes, gradients.data() + s * tile_bytes,
                             gradients_of_queries.data() + 2 * s * tile_bytes, query_steps};
        kernels.differentiate(block.logits.logits.data(), block.grad_weights.data(), steps, queries.terms(i), to);
      }
      const auto add = [&](const Tiles& left, const Tiles& pairs, Tiles& sum) {
        const Operand right{pairs.data() + t / tile_queries * channels.tiles * tile_bytes, 1, channels.tiles};
        const Sums to{sum.data() + j / tile_side * channels.tiles * tile_bytes, channels.tiles, 1};
        kernels.multiply(tiles_of(seen, tile_side), channels.tiles, rows, {left.data(), query_steps, 1}, right, to, true);
      };
      add(weights, pairs_grad, sum_v);
      add(gradients, pairs_q, sum_k);
      const Operand of_keys{columns.data(), 1, channels.tiles}, right{gradients_of_queries.data(), 1, 2 * query_steps};
      const Sums to{sum_q.data() + t / tile_side * channels.tiles * tile_bytes, 1, channels.tiles};
      kernels.multiply(channels.tiles, tiles_of(rows, tile_side), seen, of_keys, right, to, j > 0);
    }
  }

  // Sums are tiles [token][channel], or each of them transposed.
  void write(const Tokens& to, int64_t b, int64_t begin, int64_t count, int64_t head, double factor, Tiles& sum, bool transposed) {
    if (to.length == 0) return;  // nobody asked for it
    factors.assign(count, static_cast<float>(factor));
    const Rows rows = rows_of(to, b, begin, count, head);
    if (transposed) kernels.write_transposed({sum.data(), 1, channels.tiles}, factors.data(), rows);
    else kernels.write({sum.data(), channels.tiles, 1}, factors.data(), rows);
  }

  const Problem<float>& p;
  const Upstream& up;
  const TileKernels& kernels;
  TileSession session;
  Tokens grad_q, grad_k, grad_v;
  TiledChannels channels;
  TiledQueries queries;
  TiledBlock block;
  Tiles columns;                                   // keys, a left operand with the keys summed
  Tiles pairs_q, pairs_grad;                       // right operands with the queries summed
  Tiles weights, gradients, gradients_of_queries;  // as in NarrowBlock
  Tiles sum_q, sum_k, sum_v;
  Buffer<float> factors;
};

// Gradients of logits for that of a bias.
class TiledLogitGradients {
 public:
  static constexpr int64_t keys = TiledBlock::keys;

  TiledLogitGradients(const Problem<float>& problem, const Upstream& up)
      : p(problem), up(up), kernels(*tile_kernels_of(selected())), session(kernels), block(p),
        rows(filled_up(std::min(block_queries, p.q.length), tile_queries) * keys) {}

  void read(const Piece& piece, int64_t head, int64_t t, int64_t count) { queries.read(p, up, kernels, piece, head, t, count); }

  // (count, keys)
  const float* operator()(const Piece& piece, int64_t head, int64_t t, int64_t count, int64_t j, int64_t of_keys) {
    const int64_t steps = tiles_of(of_keys, tile_step);
    block.read(p, kernels, piece, head / p.group, j, of_keys);
    for (int64_t i = 0; i < count; i += tile_queries) {
      block.multiply(p, kernels, {piece, head, t + i, std::min(tile_queries, count - i), j, of_keys}, queries, i);
      kernels.differentiate_in_place(block.logits.logits.data(), block.grad_weights.data(), steps, queries.terms(i));
      kernels.transpose(block.grad_weights.data(), steps, rows.data() + i * keys, keys);
    }
    return rows.data();
  }

 private:
  const Problem<float>& p;
  const Upstream& up;
  const TileKernels& kernels;
  TileSession session;
  TiledQueries queries;
  TiledBlock block;
  Buffer<float> rows;
};

}  // namespace mmgen_kernels::attn
