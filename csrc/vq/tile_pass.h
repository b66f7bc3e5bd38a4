// The lookup's first pass on matrix tiles of 16 rows of 64 bytes, as AMX has them: what the formats of its elements share.
//
// A panel is two groups of 16 rows, [group][step][lane of the step][row]; a tile is 16 codes, [step][code][64 bytes]; a step is one
// product of a tile of codes and one of rows, 16 scores by 16. `Engine` has eight tile registers, to be loaded, multiplied and stored
// by number. `Format` says how many steps a score takes and whether its norm is among their products.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "vq/coarse_pass.h"

namespace mmgen_kernels::vq {
namespace {  // internal linkage: see rows.h

constexpr int64_t lanes = 16;         // codes, and rows, of a matrix tile
constexpr int64_t step_bytes = 1024;  // of a tile; 64 for each code, and of products for each row
constexpr int64_t groups = 2;         // of 16 rows in a panel

template <class Format>
int64_t panel_bytes(int64_t dim) {
  return groups * Format::steps_of(dim) * step_bytes;
}
// A tile whose norms are not among the products is followed by them, once for each row of a matrix tile.
template <class Format>
int64_t tile_bytes(int64_t dim) {
  return (Format::steps_of(dim) + !Format::norm_rides_along(dim)) * step_bytes;
}

// Format::row writes the products of one row; a lane of four bytes moves like one float.
template <class Format>
void pack_panel(const float* flat, int64_t dim, const Units&, std::byte* panel, float* residuals) {
  const int64_t row_bytes = Format::steps_of(dim) * step_bytes / lanes;
  float* scratch = scratch_of(lanes * row_bytes / int64_t{sizeof(float)});
  for (int64_t g = 0; g < groups; ++g) {
    for (int64_t r = g * lanes; r < (g + 1) * lanes; ++r)
      residuals[r] = Format::row(flat + r * dim, dim, reinterpret_cast<std::byte*>(scratch) + r % lanes * row_bytes);
    interleave<lanes>(scratch, row_bytes / 4, reinterpret_cast<float*>(panel + g * Format::steps_of(dim) * step_bytes));
  }
}

template <class Format>
void pack_tile(const float* flat, const float* norms, int64_t dim, const Units&, std::byte* tile, float* residuals) {
  constexpr int64_t piece = step_bytes / lanes;
  const int64_t steps = Format::steps_of(dim);
  auto* code = reinterpret_cast<std::byte*>(scratch_of(steps * piece / int64_t{sizeof(float)}));
  for (int64_t j = 0; j < lanes; ++j) {
    residuals[j] = Format::code(flat + j * dim, norms[j], dim, code);
    for (int64_t s = 0; s < steps; ++s) std::memcpy(tile + s * step_bytes + j * piece, code + s * piece, piece);
    if (Format::norm_rides_along(dim)) continue;
    std::fill_n(reinterpret_cast<float*>(tile + steps * step_bytes) + j * lanes, lanes, norms[j]);
  }
}

// minima = the smallest of each row's scores in one product [code][row]; row_minima = min(itself, that).
template <class Vec>
inline void take_minimum(const float* sums, float* minima, float* row_minima) {
  constexpr int W = Vec::width;
  for (int64_t r = 0; r < lanes; r += W) {
    Vec chain[4];
    for (int j = 0; j < 4; ++j) chain[j] = Vec::load(sums + j * lanes + r);
#pragma GCC unroll 16
    for (int j = 4; j < lanes; ++j) chain[j % 4] = min(chain[j % 4], Vec::load(sums + j * lanes + r));
    const Vec best = min(min(chain[0], chain[1]), min(chain[2], chain[3]));
    best.store(minima + r);
    min(best, Vec::load(row_minima + r)).store(row_minima + r);
  }
}

// Loading a tile takes nearly as long as a product, and neither loads and products of one block of tiles nor its minima overlap
// by themselves: what comes next in the loops below is what does not depend on what came just before.

// One step with the norm in it. Three tiles of codes stay in registers while all rows pass, and a sum begins its next
// product as soon as it is stored. On one Xeon 40 cycles a product; 63 with 2 x 2 tiles loaded for each block.
template <class Vec, class Engine>
void sweep_one_step(Engine& engine, const std::byte* panels, int64_t panel_count, const std::byte* tiles, int64_t count, float* minima,
                    int64_t minima_stride, float* row_minima) {
  alignas(64) float sums[3][lanes * lanes];
  for (int64_t t = 0; t < count; t += 3) {
    const int64_t last = std::min<int64_t>(2, count - t - 1);  // of these tiles; those past it repeat it
    const auto begin = [&]<int SUM, int CODES, int ROWS>() {
      engine.template zero<SUM>();
      engine.template multiply<SUM, CODES, ROWS>();
    };
    const auto finish = [&]<int SUM, int CODES, int NEXT>(bool more, float* out, float* row_out) {
      engine.template store<SUM>(sums[SUM]);
      if (more) begin.template operator()<SUM, CODES, NEXT>();
      if (SUM <= last) take_minimum<Vec>(sums[SUM], out + SUM * groups * lanes, row_out);
    };
    const auto group = [&]<int NEXT>(int64_t g) {
      const bool more = g + 1 < panel_count * groups;
      if (more) engine.template load<NEXT>(panels + (g + 1) * step_bytes);
      float* out = minima + g / groups * minima_stride + (t * groups + g % groups) * lanes;
      finish.template operator()<0, 3, NEXT>(more, out, row_minima + g * lanes);
      finish.template operator()<1, 4, NEXT>(more, out, row_minima + g * lanes);
      finish.template operator()<2, 5, NEXT>(more, out, row_minima + g * lanes);
    };
    engine.template load<3>(tiles + t * step_bytes);
    engine.template load<4>(tiles + (t + std::min<int64_t>(1, last)) * step_bytes);
    engine.template load<5>(tiles + (t + last) * step_bytes);
    engine.template load<6>(panels);
    begin.template operator()<0, 3, 6>();
    begin.template operator()<1, 4, 6>();
    begin.template operator()<2, 5, 6>();
    for (int64_t g = 0; g < panel_count * groups; g += groups) {
      group.template operator()<7>(g);
      group.template operator()<6>(g + 1);
    }
  }
}

// Any number of steps: 2 x 2 products of tiles at a time, whose minima are taken while the next ones are under way.
template <class Format, class Engine>
void sweep_steps(Engine& engine, const std::byte* panels, int64_t panel_count, const std::byte* tiles, int64_t dim, int64_t count,
                 float* minima, int64_t minima_stride, float* row_minima) {
  using Vec = typename Format::Vec;
  const int64_t steps = Format::steps_of(dim), group_bytes = steps * step_bytes, stride = tile_bytes<Format>(dim);
  alignas(64) float sums[2][2][groups][lanes * lanes];
  float *pending_minima = nullptr, *pending_row_minima = nullptr;
  int64_t pending_tiles = 0;
  int parity = 0;  // of the sums to be written next; the others are pending
  const auto finish_pending = [&] {
    for (int64_t u = 0; u < pending_tiles; ++u)
      for (int64_t g = 0; g < groups; ++g)
        take_minimum<Vec>(sums[1 - parity][u][g], pending_minima + (u * groups + g) * lanes, pending_row_minima + g * lanes);
  };
  for (int64_t t = 0; t < count; t += 2) {
    const std::byte* first = tiles + t * stride;
    const std::byte* second = t + 1 < count ? first + stride : first;  // a last single tile is multiplied twice
    for (int64_t p = 0; p < panel_count; ++p) {
      const std::byte* panel = panels + p * groups * group_bytes;
      if (Format::norm_rides_along(dim)) {
        engine.template zero<0>();
        engine.template zero<1>();
        engine.template zero<2>();
        engine.template zero<3>();
      } else {
        engine.template load<0>(first + group_bytes);
        engine.template load<1>(first + group_bytes);
        engine.template load<2>(second + group_bytes);
        engine.template load<3>(second + group_bytes);
      }
      for (int64_t s = 0; s < steps; ++s) {
        engine.template load<4>(first + s * step_bytes);
        engine.template load<6>(panel + s * step_bytes);
        engine.template load<7>(panel + group_bytes + s * step_bytes);
        engine.template load<5>(second + s * step_bytes);
        engine.template multiply<0, 4, 6>();
        engine.template multiply<1, 4, 7>();
        engine.template multiply<2, 5, 6>();
        engine.template multiply<3, 5, 7>();
        if (s == 0) finish_pending();
      }
      engine.template store<0>(sums[parity][0][0]);
      engine.template store<1>(sums[parity][0][1]);
      engine.template store<2>(sums[parity][1][0]);
      engine.template store<3>(sums[parity][1][1]);
      pending_minima = minima + p * minima_stride + t * groups * lanes;
      pending_row_minima = row_minima + p * groups * lanes;
      pending_tiles = std::min<int64_t>(2, count - t);
      parity = 1 - parity;
    }
  }
  finish_pending();
}

template <class Format, class Engine>
void sweep_tiles(const std::byte* panels, int64_t panel_count, const std::byte* tiles, int64_t dim, int64_t count,
                 const Units&, float* minima, int64_t minima_stride, float* row_minima) {
  Engine engine;
  if (Format::steps_of(dim) == 1 && Format::norm_rides_along(dim))
    sweep_one_step<typename Format::Vec>(engine, panels, panel_count, tiles, count, minima, minima_stride, row_minima);
  else
    sweep_steps<Format>(engine, panels, panel_count, tiles, dim, count, minima, minima_stride, row_minima);
}

template <class Format, class Engine>
constexpr CoarsePass tile_pass{false,               Format::summed_products, panel_bytes<Format>, tile_bytes<Format>,
                               pack_panel<Format>, pack_tile<Format>,       sweep_tiles<Format, Engine>};

template <class Vec, class Format, class Engine>
constexpr Kernels tile_kernels(const char* name) {
  static_assert(Vec::width == lanes);
  Kernels kernels = scoring_kernels<Vec, groups, lanes>(name);
  kernels.coarse = &tile_pass<Format, Engine>;
  return kernels;
}

}  // namespace
}  // namespace mmgen_kernels::vq
