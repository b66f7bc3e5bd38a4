// The lookup's first pass in 16-bit integers: two products an instruction and lane, summed exactly in 32 bits.
#pragma once

#include <algorithm>

#include "vq/coarse_pass.h"

namespace mmgen_kernels::vq {
namespace {  // internal linkage: see rows.h

inline int64_t pairs_of(int64_t dim) { return (dim + 1) / 2; }
constexpr int64_t no_summed_products(int64_t) { return 0; }

// out = values / unit to the nearest integer, and a zero if dim is odd; returns an upper bound of the norm of what that leaves out.
inline float round_to_int16(const float* values, int64_t dim, float unit, int16_t* out) {
  const float per_unit = 1 / unit;  // a power of two
  for (int64_t d = 0; d < dim; ++d) {
    const float value = values[d] * per_unit;
    out[d] = static_cast<int16_t>(value + (value < 0 ? -0.5f : 0.5f));
  }
  if (dim % 2) out[dim] = 0;
  return left_out(dim, [&](int64_t d) { return values[d] - out[d] * unit; });
}

// [pair][row][2]
template <int ROWS>
void pack_panel(const float* flat, int64_t dim, const Units& units, std::byte* panel, float* residuals) {
  const int64_t pairs = pairs_of(dim);
  float* scratch = scratch_of(ROWS * pairs);
  auto* rows = reinterpret_cast<int16_t*>(scratch);
  for (int64_t r = 0; r < ROWS; ++r) residuals[r] = round_to_int16(flat + r * dim, dim, units.row, rows + r * 2 * pairs);
  interleave<ROWS>(scratch, pairs, reinterpret_cast<float*>(panel));  // a pair moves like one float
}

// norms[code], then [pair][code][2]
template <int CODES>
void pack_tile(const float* flat, const float* norms, int64_t dim, const Units& units, std::byte* tile, float* residuals) {
  const int64_t pairs = pairs_of(dim);
  float* scratch = scratch_of(CODES * pairs);
  auto* codes = reinterpret_cast<int16_t*>(scratch);
  const double per_unit = 1 / (double(units.row) * units.code);
  auto* terms = reinterpret_cast<int32_t*>(tile);
  for (int64_t j = 0; j < CODES; ++j) {
    residuals[j] = round_to_int16(flat + j * dim, dim, units.code, codes + j * 2 * pairs);
    // Codes that cannot win have no products beside this: it is above every other score.
    terms[j] = static_cast<int32_t>(std::min(norms[j] * per_unit + 0.5, double(0x7fffffff)));
  }
  interleave<CODES>(scratch, pairs, reinterpret_cast<float*>(terms + CODES));
}

template <class Vec, int VECTORS, int CODES>
void sweep_int16(const std::byte* panels, int64_t panel_count, const std::byte* tiles, int64_t dim, int64_t count,
                 const Units& units, float* minima, int64_t minima_stride, float* row_minima) {
  constexpr int W = Vec::width;
  const int64_t pairs = pairs_of(dim);
  const float unit = units.row * units.code;
  for (int64_t p = 0; p < panel_count; ++p) {
    const auto* panel = reinterpret_cast<const int32_t*>(panels) + p * pairs * VECTORS * W;
    const auto* tile = reinterpret_cast<const int32_t*>(tiles);
    float *out = minima + p * minima_stride, *row_out = row_minima + p * VECTORS * W;
    for (int64_t t = 0; t < count; ++t) {
      Vec score[VECTORS][CODES];
#pragma GCC unroll 16
      for (int j = 0; j < CODES; ++j)
#pragma GCC unroll 4
        for (int i = 0; i < VECTORS; ++i) score[i][j] = Vec::broadcast(tile[j]);
      tile += CODES;
      const int32_t* x = panel;
      for (int64_t d = 0; d < pairs; ++d) {
        Vec row[VECTORS];
#pragma GCC unroll 4
        for (int i = 0; i < VECTORS; ++i) row[i] = Vec::load(x + i * W);
#pragma GCC unroll 16
        for (int j = 0; j < CODES; ++j) {
          const Vec c = Vec::broadcast(tile[j]);
#pragma GCC unroll 4
          for (int i = 0; i < VECTORS; ++i) score[i][j] = add_products(row[i], c, score[i][j]);
        }
        x += VECTORS * W;
        tile += CODES;
      }
#pragma GCC unroll 4
      for (int i = 0; i < VECTORS; ++i) {
#pragma GCC unroll 16
        for (int j = 4; j < CODES; ++j) score[i][j % 4] = min(score[i][j % 4], score[i][j]);
        min(min(score[i][0], score[i][1]), min(score[i][2], score[i][3])).store_scaled(unit, out + i * W, row_out + i * W);
      }
      out += VECTORS * W;
    }
  }
}

template <int ROWS>
int64_t panel_bytes(int64_t dim) {
  return ROWS * pairs_of(dim) * int64_t{sizeof(int32_t)};
}
template <int CODES>
int64_t tile_bytes(int64_t dim) {
  return CODES * (pairs_of(dim) + 1) * int64_t{sizeof(int32_t)};
}

template <class Int, int VECTORS, int CODES>
constexpr CoarsePass int16_pass{true,
                                no_summed_products,
                                panel_bytes<VECTORS * Int::width>,
                                tile_bytes<CODES>,
                                pack_panel<VECTORS * Int::width>,
                                pack_tile<CODES>,
                                sweep_int16<Int, VECTORS, CODES>};

template <class Vec, class Int, int VECTORS, int CODES>
constexpr Kernels int16_kernels(const char* name) {
  static_assert(Vec::width == Int::width && CODES >= 4);
  Kernels kernels = scoring_kernels<Vec, VECTORS, CODES>(name);
  kernels.coarse = &int16_pass<Int, VECTORS, CODES>;
  return kernels;
}

}  // namespace
}  // namespace mmgen_kernels::vq
