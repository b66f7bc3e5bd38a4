// The inner loops of the lookup, written once over a vector type; each nearest_code_<instruction set>.cpp instantiates them.
#pragma once

#include "vq/nearest_code.h"

namespace mmgen_kernels::vq {
namespace {  // internal linkage: see rows.h

double read(const Rows& matrix, int64_t row, const double* mean, double* out) {
  const int64_t dim = matrix.dim;
  with_row(matrix, row, [&](const auto* p) {
    if (mean == nullptr) {
      for (int64_t d = 0; d < dim; ++d) out[d] = widen(p[d]);
    } else {
      for (int64_t d = 0; d < dim; ++d) out[d] = widen(p[d]) - mean[d];
    }
  });
  constexpr int64_t lanes = 8;  // partial sums in a fixed order that compilers can keep in vectors
  double partial[lanes] = {};
  int64_t d = 0;
  for (; d + lanes <= dim; d += lanes)
    for (int64_t i = 0; i < lanes; ++i) partial[i] += out[d + i] * out[d + i];
  for (; d < dim; ++d) partial[d % lanes] += out[d] * out[d];
  double sum = 0;
  for (double p : partial) sum += p;
  return sum;
}

void pack(const double* values, double scale, int64_t dim, int64_t stride, float* out) {
  constexpr int64_t piece = 256;  // converted in vectors, then spread
  for (int64_t start = 0; start < dim; start += piece) {
    const int64_t n = dim - start < piece ? dim - start : piece;
    float dense[piece];
    float* target = stride == 1 ? out + start : dense;
    for (int64_t d = 0; d < n; ++d) {
      const double value = values[start + d] * scale;
      target[d] = static_cast<float>(value < flushed && value > -flushed ? 0.0 : value);
    }
    if (stride != 1)
      for (int64_t d = 0; d < n; ++d) out[(start + d) * stride] = dense[d];
  }
}

// CODES accumulators of two vectors each: 24 of AVX-512's 32 registers, 12 of AVX2's 16.
template <class Vec, int CODES>
void sweep(const float* panel, const float* tiles, const float* norms, int64_t dim, int64_t count, float* minima,
           float* row_minima) {
  static_assert(CODES >= 4, "four chains of minima");
  constexpr int W = Vec::width;
  Vec low0 = Vec::load(row_minima), low1 = Vec::load(row_minima + W);
  for (int64_t t = 0; t < count; ++t) {
    Vec score0[CODES], score1[CODES];
#pragma GCC unroll 16
    for (int j = 0; j < CODES; ++j) score0[j] = score1[j] = Vec::broadcast(norms[j]);
    const float* x = panel;
    for (int64_t d = 0; d < dim; ++d) {
      const Vec x0 = Vec::load(x), x1 = Vec::load(x + W);
#pragma GCC unroll 16
      for (int j = 0; j < CODES; ++j) {
        const Vec c = Vec::broadcast(tiles[j]);
        score0[j] = fmadd(x0, c, score0[j]);
        score1[j] = fmadd(x1, c, score1[j]);
      }
      x += 2 * W;
      tiles += CODES;
    }
    norms += CODES;
    // Four chains of minima with constant indices: a tree of variable step would send the accumulators through the stack.
#pragma GCC unroll 16
    for (int j = 4; j < CODES; ++j) {
      score0[j % 4] = min(score0[j % 4], score0[j]);
      score1[j % 4] = min(score1[j % 4], score1[j]);
    }
    const Vec best0 = min(min(score0[0], score0[1]), min(score0[2], score0[3]));
    const Vec best1 = min(min(score1[0], score1[1]), min(score1[2], score1[3]));
    best0.store(minima);
    best1.store(minima + W);
    minima += 2 * W;
    low0 = min(low0, best0);
    low1 = min(low1, best1);
  }
  low0.store(row_minima);
  low1.store(row_minima + W);
}

template <class Vec>
void compare(const float* minima, int64_t count, const float* thresholds, uint32_t* masks) {
  constexpr int W = Vec::width;
  const Vec limit0 = Vec::load(thresholds), limit1 = Vec::load(thresholds + W);
  for (int64_t t = 0; t < count; ++t) {
    const float* m = minima + t * 2 * W;
    masks[t] = less_equal(Vec::load(m), limit0) | less_equal(Vec::load(m + W), limit1) << W;
  }
}

template <class Vec, int CODES>
void rescore(const float* row, const float* tile, const float* norms, int64_t dim, float* scores) {
  static_assert(CODES <= Vec::width, "a tile's codes fit one vector");
  constexpr int chains = 4;  // hide the latency of the FMA
  Vec sum[chains];
  for (Vec& s : sum) s = Vec::broadcast(0.0f);
  int64_t d = 0;
  for (; d + chains <= dim; d += chains)
#pragma GCC unroll 4
    for (int i = 0; i < chains; ++i)
      sum[i] = fmadd(Vec::broadcast(row[d + i]), Vec::load(tile + (d + i) * CODES), sum[i]);
  for (; d < dim; ++d) sum[0] = fmadd(Vec::broadcast(row[d]), Vec::load(tile + d * CODES), sum[0]);
  add(add(add(sum[0], sum[1]), add(sum[2], sum[3])), Vec::load(norms)).store(scores);
}

template <class Vec, int CODES>
constexpr Kernels kernels(const char* name) {
  return {name, 2 * Vec::width, CODES, read, pack, sweep<Vec, CODES>, compare<Vec>, rescore<Vec, CODES>};
}

}  // namespace
}  // namespace mmgen_kernels::vq
