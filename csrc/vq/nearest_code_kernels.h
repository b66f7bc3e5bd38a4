// The inner loops of the lookup, written once over a vector type; each nearest_code_<instruction set>.cpp instantiates them.
#pragma once

#include <cstring>
#include <limits>

#include "aligned.h"
#include "vq/nearest_code.h"

namespace mmgen_kernels::vq {
namespace {  // internal linkage: see rows.h

// Calls f(d, component d of row - mean) in fp64.
template <class F>
void each_component(const Rows& matrix, int64_t row, const double* mean, const F& f) {
  with_row(matrix, row, [&](const auto* p) {
    if (mean == nullptr) {
      for (int64_t d = 0; d < matrix.dim; ++d) f(d, widen(p[d]));
    } else {
      for (int64_t d = 0; d < matrix.dim; ++d) f(d, widen(p[d]) - mean[d]);
    }
  });
}

// Partial sums in a fixed order that compilers can keep in vectors.
template <class F>
double sum_of_squares(int64_t dim, const F& component) {
  constexpr int64_t lanes = 8;
  double partial[lanes] = {};
  int64_t d = 0;
  for (; d + lanes <= dim; d += lanes)
    for (int64_t i = 0; i < lanes; ++i) {
      const double value = component(d + i);
      partial[i] += value * value;
    }
  for (int64_t i = 0; d < dim; ++d, ++i) {
    const double value = component(d);
    partial[i] += value * value;
  }
  double sum = 0;
  for (double p : partial) sum += p;
  return sum;
}

double squared_norm(const Rows& matrix, int64_t row, const double* mean) {
  return with_row(matrix, row, [&](const auto* p) {
    if (mean == nullptr) return sum_of_squares(matrix.dim, [&](int64_t d) { return widen(p[d]); });
    return sum_of_squares(matrix.dim, [&](int64_t d) { return widen(p[d]) - mean[d]; });
  });
}

double read(const Rows& matrix, int64_t row, const double* mean, double* out) {
  each_component(matrix, row, mean, [&](int64_t d, double value) { out[d] = value; });
  return sum_of_squares(matrix.dim, [&](int64_t d) { return out[d]; });
}

inline float to_float(double value) { return static_cast<float>(value < flushed && value > -flushed ? 0.0 : value); }

void load(const Rows& matrix, int64_t row, const double* mean, double scale, float* out) {
  each_component(matrix, row, mean, [&](int64_t d, double value) { out[d] = to_float(value * scale); });
}

void narrow(const double* values, double scale, int64_t dim, float* out) {
  for (int64_t d = 0; d < dim; ++d) out[d] = to_float(values[d] * scale);
}

void summarise(const Rows& matrix, int64_t first, int64_t count, double* squared, double* sums) {
  for (int64_t i = 0; i < count; ++i)
    with_row(matrix, first + i, [&](const auto* p) {
      squared[i] = sum_of_squares(matrix.dim, [&](int64_t d) { return widen(p[d]); });
      if (!(squared[i] < std::numeric_limits<double>::infinity())) return;
      for (int64_t d = 0; d < matrix.dim; ++d) sums[d] += widen(p[d]);
    });
}

// (COUNT, dim) to (dim, COUNT), in blocks of 4 x 4.
template <int COUNT>
void interleave(const float* flat, int64_t dim, float* out) {
  using Four = float __attribute__((vector_size(16)));
  constexpr int whole = COUNT / 4 * 4;
  int64_t d = 0;
  for (; d + 4 <= dim; d += 4) {
    for (int r = 0; r < whole; r += 4) {
      Four in[4];
      for (int i = 0; i < 4; ++i) std::memcpy(&in[i], flat + (r + i) * dim + d, sizeof(Four));
      const Four ab = __builtin_shufflevector(in[0], in[1], 0, 4, 1, 5), cd = __builtin_shufflevector(in[2], in[3], 0, 4, 1, 5);
      const Four ef = __builtin_shufflevector(in[0], in[1], 2, 6, 3, 7), gh = __builtin_shufflevector(in[2], in[3], 2, 6, 3, 7);
      const Four columns[4] = {__builtin_shufflevector(ab, cd, 0, 1, 4, 5), __builtin_shufflevector(ab, cd, 2, 3, 6, 7),
                               __builtin_shufflevector(ef, gh, 0, 1, 4, 5), __builtin_shufflevector(ef, gh, 2, 3, 6, 7)};
      for (int i = 0; i < 4; ++i) std::memcpy(out + (d + i) * COUNT + r, &columns[i], sizeof(Four));
    }
    for (int r = whole; r < COUNT; ++r)
      for (int i = 0; i < 4; ++i) out[(d + i) * COUNT + r] = flat[r * dim + d + i];
  }
  for (; d < dim; ++d)
    for (int r = 0; r < COUNT; ++r) out[d * COUNT + r] = flat[r * dim + d];
}

// VECTORS x CODES accumulators.
template <class Vec, int VECTORS, int CODES>
void sweep(const float* panel, const float* tiles, const float* norms, int64_t dim, int64_t count, float* minima,
           float* row_minima) {
  static_assert(CODES >= 4, "four chains of minima");
  constexpr int W = Vec::width;
  Vec low[VECTORS];
  for (int i = 0; i < VECTORS; ++i) low[i] = Vec::load(row_minima + i * W);
  for (int64_t t = 0; t < count; ++t) {
    Vec score[VECTORS][CODES];
#pragma GCC unroll 16
    for (int j = 0; j < CODES; ++j)
#pragma GCC unroll 4
      for (int i = 0; i < VECTORS; ++i) score[i][j] = Vec::broadcast(norms[j]);
    const float* x = panel;
    for (int64_t d = 0; d < dim; ++d) {
      Vec row[VECTORS];
#pragma GCC unroll 4
      for (int i = 0; i < VECTORS; ++i) row[i] = Vec::load(x + i * W);
#pragma GCC unroll 16
      for (int j = 0; j < CODES; ++j) {
        const Vec c = Vec::broadcast(tiles[j]);
#pragma GCC unroll 4
        for (int i = 0; i < VECTORS; ++i) score[i][j] = fmadd(row[i], c, score[i][j]);
      }
      x += VECTORS * W;
      tiles += CODES;
    }
    norms += CODES;
#pragma GCC unroll 4
    for (int i = 0; i < VECTORS; ++i) {
      // Four chains with constant indices: a tree of variable step would send the accumulators through the stack.
#pragma GCC unroll 16
      for (int j = 4; j < CODES; ++j) score[i][j % 4] = min(score[i][j % 4], score[i][j]);
      const Vec best = min(min(score[i][0], score[i][1]), min(score[i][2], score[i][3]));
      best.store(minima + i * W);
      low[i] = min(low[i], best);
    }
    minima += VECTORS * W;
  }
  for (int i = 0; i < VECTORS; ++i) low[i].store(row_minima + i * W);
}

template <class Vec, int VECTORS>
int64_t compare(const float* minima, int64_t count, const float* thresholds, int32_t* tiles, uint64_t* masks) {
  constexpr int W = Vec::width;
  Vec limit[VECTORS];
  for (int i = 0; i < VECTORS; ++i) limit[i] = Vec::load(thresholds + i * W);
  int64_t found = 0;
  for (int64_t t = 0; t < count; ++t) {
    uint64_t mask = 0;
#pragma GCC unroll 4
    for (int i = 0; i < VECTORS; ++i)
      mask |= uint64_t{less_equal(Vec::load(minima + (t * VECTORS + i) * W), limit[i])} << (i * W);
    // Written always, kept sometimes: which tiles hold a nearest code is not for a branch to predict.
    tiles[found] = static_cast<int32_t>(t);
    masks[found] = mask;
    found += mask != 0;
  }
  return found;
}

template <class Vec, int CODES>
uint32_t rescore(const float* row, const float* tile, const float* norms, int64_t dim, float limit, float* scores) {
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
  const Vec total = add(add(add(sum[0], sum[1]), add(sum[2], sum[3])), Vec::load(norms));
  total.store(scores);
  return less_equal(total, Vec::broadcast(limit)) & ((1u << CODES) - 1);
}

// All but the sweep.
template <class Vec, int VECTORS, int CODES>
constexpr Kernels scoring_kernels(const char* name) {
  static_assert(VECTORS * Vec::width <= 64, "masks of 64 bits");
  return {name, VECTORS * Vec::width, CODES, squared_norm, read, load, narrow, summarise,
          interleave<VECTORS * Vec::width>, interleave<CODES>, nullptr, compare<Vec, VECTORS>, rescore<Vec, CODES>, nullptr};
}

// VECTORS vectors of rows by CODES codes: as many accumulators as leave registers for the rows and one broadcast.
template <class Vec, int VECTORS, int CODES>
constexpr Kernels kernels(const char* name) {
  Kernels kernels = scoring_kernels<Vec, VECTORS, CODES>(name);
  kernels.sweep = sweep<Vec, VECTORS, CODES>;
  return kernels;
}

}  // namespace
}  // namespace mmgen_kernels::vq
