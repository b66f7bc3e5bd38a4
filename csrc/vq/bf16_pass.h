// The lookup's first pass on bf16 matrix tiles: 16 codes by 32 products times 32 products by 16 rows, summed in fp32.
// What bf16 leaves out of each vector is measured while packing, so that the bound of docs/vq.md holds for any data.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "vq/coarse_pass.h"

namespace mmgen_kernels::vq {
namespace {  // internal linkage: see rows.h

constexpr int64_t lanes = 16;      // codes, and rows, of a matrix tile
constexpr int64_t products = 32;   // of a tile's step
constexpr int64_t step_bytes = 1024;
constexpr int64_t groups = 2;      // of 16 rows in a panel

constexpr int64_t steps_of(int64_t dim) { return (dim + products - 1) / products; }
// Whether three products of the last step are free for the norm's parts.
constexpr bool norm_rides_along(int64_t dim) { return dim + 3 <= steps_of(dim) * products; }
constexpr int64_t products_of(int64_t dim) { return steps_of(dim) * products; }

inline uint16_t to_bf16(float value) {  // to nearest even; callers have no NaN
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline float from_bf16(uint16_t bits) { return std::bit_cast<float>(uint32_t{bits} << 16); }

// out = values in bf16, zeros up to `width`; returns an upper bound of the norm of what that leaves out.
inline float round_to_bf16(const float* values, int64_t dim, int64_t width, uint16_t* out) {
  for (int64_t d = 0; d < dim; ++d) out[d] = to_bf16(values[d]);
  std::fill(out + dim, out + width, uint16_t{0});
  return left_out(dim, [&](int64_t d) { return values[d] - from_bf16(out[d]); });
}

inline int64_t panel_bytes(int64_t dim) { return groups * steps_of(dim) * step_bytes; }
// A tile whose norms do not ride along is followed by them, once for each row of a matrix tile.
inline int64_t tile_bytes(int64_t dim) { return (steps_of(dim) + !norm_rides_along(dim)) * step_bytes; }

// [group][step][pair of products][row][2]
void pack_panel(const float* flat, int64_t dim, const Units&, std::byte* panel, float* residuals) {
  const int64_t width = products_of(dim);
  float* scratch = scratch_of(lanes * width / 2);
  auto* rows = reinterpret_cast<uint16_t*>(scratch);
  for (int64_t g = 0; g < groups; ++g) {
    for (int64_t r = 0; r < lanes; ++r) {
      uint16_t* row = rows + r * width;
      residuals[g * lanes + r] = round_to_bf16(flat + (g * lanes + r) * dim, dim, width, row);
      if (norm_rides_along(dim)) std::fill_n(row + dim, 3, to_bf16(1.0f));
    }
    // A pair of bf16 moves like one float.
    interleave<lanes>(scratch, width / 2, reinterpret_cast<float*>(panel + g * steps_of(dim) * step_bytes));
  }
}

// [step][code][32]
void pack_tile(const float* flat, const float* norms, int64_t dim, const Units&, std::byte* tile, float* residuals) {
  const int64_t width = products_of(dim);
  auto* code = reinterpret_cast<uint16_t*>(scratch_of(width / 2));
  for (int64_t j = 0; j < lanes; ++j) {
    residuals[j] = round_to_bf16(flat + j * dim, dim, width, code);
    if (norm_rides_along(dim)) {
      float rest = norms[j];
      for (int part = 0; part < 3; ++part) {
        code[dim + part] = to_bf16(rest);
        rest -= from_bf16(code[dim + part]);  // exact, and 0 after three parts
      }
    }
    for (int64_t s = 0; s < steps_of(dim); ++s)
      std::memcpy(tile + s * step_bytes + j * products * sizeof(uint16_t), code + s * products, products * sizeof(uint16_t));
  }
  if (norm_rides_along(dim)) return;
  auto* spread = reinterpret_cast<float*>(tile + steps_of(dim) * step_bytes);
  for (int64_t j = 0; j < lanes; ++j) std::fill_n(spread + j * lanes, lanes, norms[j]);
}

// The minimum over the codes of one product tile [code][row].
template <class Vec>
inline void minimum(const float* scores, float* minima, float* row_minima) {
  constexpr int W = Vec::width;
  for (int64_t r = 0; r < lanes; r += W) {
    Vec chain[4];
    for (int j = 0; j < 4; ++j) chain[j] = Vec::load(scores + j * lanes + r);
#pragma GCC unroll 16
    for (int j = 4; j < lanes; ++j) chain[j % 4] = min(chain[j % 4], Vec::load(scores + j * lanes + r));
    const Vec best = min(min(chain[0], chain[1]), min(chain[2], chain[3]));
    best.store(minima + r);
    min(best, Vec::load(row_minima + r)).store(row_minima + r);
  }
}

// Engine::multiply makes 2 x 2 products of tiles at a time. Every pair of tiles meets all panels while it is in L1.
template <class Vec, class Engine>
void sweep_bf16(const std::byte* panels, int64_t panel_count, const std::byte* tiles, int64_t dim, int64_t count,
                const Units&, float* minima, int64_t minima_stride, float* row_minima) {
  const int64_t group_bytes = steps_of(dim) * step_bytes, stride = tile_bytes(dim);
  const Engine engine;
  alignas(64) float scores[2][groups][lanes * lanes];
  for (int64_t t = 0; t < count; t += 2) {
    const std::byte* first = tiles + t * stride;
    const std::byte* second = t + 1 < count ? first + stride : first;  // a last single tile is multiplied twice
    for (int64_t p = 0; p < panel_count; ++p) {
      const std::byte* panel = panels + p * groups * group_bytes;
      engine.multiply(first, second, panel, panel + group_bytes, steps_of(dim), norm_rides_along(dim), scores);
      float* out = minima + p * minima_stride + t * groups * lanes;
      for (int64_t u = 0; u < std::min<int64_t>(2, count - t); ++u)
        for (int64_t g = 0; g < groups; ++g)
          minimum<Vec>(scores[u][g], out + (u * groups + g) * lanes, row_minima + (p * groups + g) * lanes);
    }
  }
}

template <class Vec, class Engine>
constexpr CoarsePass bf16_pass{false, products_of, panel_bytes, tile_bytes, pack_panel, pack_tile, sweep_bf16<Vec, Engine>};

template <class Vec, class Engine>
constexpr Kernels bf16_kernels(const char* name) {
  static_assert(Vec::width == lanes);
  Kernels kernels = scoring_kernels<Vec, groups, lanes>(name);
  kernels.coarse = &bf16_pass<Vec, Engine>;
  return kernels;
}

}  // namespace
}  // namespace mmgen_kernels::vq
