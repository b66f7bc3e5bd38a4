// One head's rows and codes as code_entropy walks them. A block of rows is packed once; chunks of codes are handed to threads,
// which take them tile by tile. Chunks depend on K and D alone, so that nothing depends on the number of threads.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <vector>

#include "aligned.h"
#include "parallel.h"
#include "vq/code_entropy_tables.h"
#include "vq/nearest_code.h"  // Metric
#include "vq/rows.h"

namespace mmgen_kernels::vq::entropy {

constexpr int64_t max_chunks = 32, max_block = 1024;
constexpr int64_t partial_bytes = 6 << 20;  // of the gradients of a block's rows, one per chunk

template <class T>
using Buffer = std::vector<T, Aligned<T>>;

inline int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

inline double sum_of_squares(const double* values, int64_t dim) {
  double sum = 0;
  for (int64_t d = 0; d < dim; ++d) sum += values[d] * values[d];
  return sum;
}

inline double inverse_length(const double* values, int64_t dim) {
  const double squared = sum_of_squares(values, dim);
  return squared == 0 ? 0 : 1 / std::sqrt(squared);  // a zero vector scores 0
}

// One head. Scores over the temperature are scale * x . c + offset of prepared rows and codes: less the mean code, which l2
// does not see (its -|x|^2 is left out, as all codes of a row share it), as they are (dot), or of length 1 (cosine).
template <class Real>
struct Problem {
  Kernels<Real> kernels = kernels_of<Real>(selected());
  Rows x, codes;
  Metric metric;
  double scale;                // of prepared codes: 1 / temperature, for l2 twice that
  std::vector<int64_t> valid;  // the valid rows; unused where `all` are
  bool all;
  int64_t count;               // of valid rows
  std::vector<double> mean;    // of the codes, or zero; empty but for l2
  int64_t stride, tiles, tiles_per_chunk, chunks, block;

  Problem(const Rows& x, const Rows& codes, const bool* mask, Metric metric, double temperature)
      : x(x), codes(codes), metric(metric), scale((metric == Metric::l2 ? 2 : 1) / temperature), all(mask == nullptr), count(x.count) {
    if (!all) {
      for (int64_t n = 0; n < x.count; ++n)
        if (mask[n]) valid.push_back(n);
      count = static_cast<int64_t>(valid.size());
    }
    stride = round_up(x.dim, kernels.width);
    tiles = (codes.count + tile_codes - 1) / tile_codes;
    const int64_t row_bytes = stride * static_cast<int64_t>(sizeof(Real));
    const int64_t wanted = std::clamp<int64_t>(partial_bytes / (64 * row_bytes), 1, std::min(tiles, max_chunks));
    tiles_per_chunk = (tiles + wanted - 1) / wanted;
    chunks = (tiles + tiles_per_chunk - 1) / tiles_per_chunk;
    block = std::clamp<int64_t>(partial_bytes / (chunks * row_bytes), 64, max_block) / 64 * 64;
    if (metric == Metric::l2) find_mean();
  }

  int64_t row(int64_t i) const { return all ? i : valid[i]; }
  int64_t first_code(int64_t tile) const { return tile * tile_codes; }
  int64_t codes_of(int64_t tile) const { return std::min(tile_codes, codes.count - first_code(tile)); }
  int64_t end_tile(int64_t chunk) const { return std::min(tiles, (chunk + 1) * tiles_per_chunk); }

  // Zero where subtracting the mean would cost more digits than it saves: where it is shorter than the codes by much.
  void find_mean() {
    const int64_t dim = codes.dim;
    std::vector<double> sums(chunks * dim, 0.0), squares(chunks, 0.0);
    parallel(chunks, tiles_per_chunk * tile_codes * dim, [&](int64_t begin, int64_t end) {
      std::vector<double> code(dim);
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        const int64_t last = std::min(codes.count, end_tile(chunk) * tile_codes);
        for (int64_t k = chunk * tiles_per_chunk * tile_codes; k < last; ++k) {
          read_row(codes, k, code.data());
          squares[chunk] += sum_of_squares(code.data(), dim);
          for (int64_t d = 0; d < dim; ++d) sums[chunk * dim + d] += code[d];
        }
      }
    });
    mean.assign(dim, 0.0);
    for (int64_t chunk = 0; chunk < chunks; ++chunk)
      for (int64_t d = 0; d < dim; ++d) mean[d] += sums[chunk * dim + d];
    for (double& m : mean) m /= static_cast<double>(codes.count);
    const double square = std::accumulate(squares.begin(), squares.end(), 0.0) / static_cast<double>(codes.count);
    if (!(sum_of_squares(mean.data(), dim) > 0.5 * square)) mean.assign(dim, 0.0);
  }

  // A row or a code in fp64 as the metric sees it; returns 1 / length for cosine, else 1.
  double prepare(const Rows& matrix, int64_t index, double* out) const {
    read_row(matrix, index, out);
    double scale = 1;
    if (metric == Metric::l2)
      for (int64_t d = 0; d < matrix.dim; ++d) out[d] -= mean[d];
    if (metric == Metric::cosine) {
      scale = inverse_length(out, matrix.dim);
      for (int64_t d = 0; d < matrix.dim; ++d) out[d] *= scale;
    }
    return scale;
  }
};

// Rows [first, first + count) of the valid ones, prepared.
template <class Real>
struct Block {
  const Problem<Real>& problem;
  int64_t first = 0, count = 0, panels = 0;
  Buffer<Real> rows;           // (panels * rows, stride)
  Buffer<Real> columns;        // (panels, dim, rows)
  int64_t room;                // rows, in whole panels

  explicit Block(const Problem<Real>& p) : problem(p) {
    room = round_up(std::min(p.block, std::max<int64_t>(1, p.count)), p.kernels.rows);
    rows.resize(room * p.stride);
    columns.resize(room * p.x.dim);
  }

  void load(int64_t begin) {
    const int64_t height = problem.kernels.rows, dim = problem.x.dim;
    first = begin;
    count = std::min(problem.block, problem.count - begin);
    panels = (count + height - 1) / height;
    parallel(panels, height * dim, [&](int64_t from, int64_t to) {
      std::vector<double> row(dim);
      for (int64_t i = from * height; i < to * height; ++i) {
        Real* out = rows.data() + i * problem.stride;
        Real* column = columns.data() + i / height * dim * height + i % height;
        std::fill(out, out + problem.stride, Real(0));
        if (i < count) problem.prepare(problem.x, problem.row(first + i), row.data());
        else std::fill(row.begin(), row.end(), 0.0);
        for (int64_t d = 0; d < dim; ++d) out[d] = column[d * height] = static_cast<Real>(row[d]);
      }
    });
  }

  const Real* panel(int64_t p) const { return columns.data() + p * problem.kernels.rows * problem.x.dim; }
};

// A thread's tile of prepared codes, and its scores with one panel of rows.
template <class Real>
struct Tile {
  const Problem<Real>& problem;
  int64_t first = 0, count = 0, padded = 0;
  Buffer<Real> codes, offsets, scores;
  std::vector<double> scales, code;

  explicit Tile(const Problem<Real>& p)
      : problem(p), codes(tile_codes * p.stride), offsets(tile_codes), scores(tile_codes * p.kernels.rows), scales(tile_codes), code(p.x.dim) {}

  void load(int64_t tile) {
    first = problem.first_code(tile);
    count = problem.codes_of(tile);
    padded = round_up(count, problem.kernels.group);
    for (int64_t k = 0; k < padded; ++k) {
      Real* out = codes.data() + k * problem.stride;
      std::fill(out, out + problem.stride, Real(0));
      offsets[k] = static_cast<Real>(k < count ? 0 : -nowhere);
      if (k >= count) continue;
      scales[k] = problem.prepare(problem.codes, first + k, code.data());
      for (int64_t d = 0; d < problem.x.dim; ++d) out[d] = static_cast<Real>(code[d] * problem.scale);
      if (problem.metric == Metric::l2) offsets[k] = static_cast<Real>(-0.5 * problem.scale * sum_of_squares(code.data(), problem.x.dim));
    }
  }

  void score(const Block<Real>& block, int64_t panel) {
    problem.kernels.score(block.panel(panel), codes.data(), offsets.data(), problem.x.dim, problem.stride, padded, scores.data());
  }
};

// f(tile, chunk) for all tiles, the tiles of a chunk in their order and by one thread.
template <class Real, class F>
void each_tile(const Problem<Real>& problem, const F& f) {
  parallel_on_demand(problem.chunks, [&] {
    return [&, tile = Tile<Real>(problem)](int64_t chunk) mutable {
      for (int64_t t = chunk * problem.tiles_per_chunk; t < problem.end_tile(chunk); ++t) {
        tile.load(t);
        f(tile, chunk);
      }
    };
  });
}

}  // namespace mmgen_kernels::vq::entropy
