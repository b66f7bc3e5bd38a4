// The lookup's first pass on bf16 matrix tiles: 16 codes by 32 products times 32 products by 16 rows, summed in fp32.
// What bf16 leaves out of each vector is measured while packing, so that the bound of docs/vq.md holds for any data.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "vq/nearest_code_kernels.h"

namespace mmgen_kernels::vq {
namespace {  // internal linkage: see rows.h

constexpr int64_t lanes = 16;      // codes, and rows, of a matrix tile
constexpr int64_t products = 32;   // of a tile's step
constexpr int64_t step_bytes = 1024;
constexpr int64_t groups = 2;      // of 16 rows in a panel

// Which part of a row's component meets which part of a code's, where both are split in two: large and small.
struct Term {
  int row, code;
};
constexpr Term terms[] = {{0, 0}, {0, 1}, {1, 0}};
constexpr Slots slots_of(int64_t dim) {
  if (3 * dim + 3 <= products) return {2, 3, 1, true};
  const int64_t steps = (dim + products - 1) / products;
  return {1, 1, steps, dim + 3 <= steps * products};
}

inline uint16_t to_bf16(float value) {  // to nearest even; callers have no NaN
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline float from_bf16(uint16_t bits) { return std::bit_cast<float>(uint32_t{bits} << 16); }

// out[part][d], and an upper bound of the norm of what the parts leave out.
inline float split(const float* values, int64_t dim, int parts, uint16_t* out) {
  float left_out = 0;
  constexpr int64_t piece = 64;
  float rest[piece];
  for (int64_t start = 0; start < dim; start += piece) {
    const int64_t n = std::min(piece, dim - start);
    for (int64_t d = 0; d < n; ++d) rest[d] = values[start + d];
    for (int part = 0; part < parts; ++part) {
      uint16_t* target = out + part * dim + start;
      for (int64_t d = 0; d < n; ++d) {
        target[d] = to_bf16(rest[d]);
        rest[d] -= from_bf16(target[d]);  // exact
      }
    }
    float partial[lanes] = {};
    for (int64_t d = 0; d + lanes <= n; d += lanes)
      for (int64_t i = 0; i < lanes; ++i) partial[i] += rest[d + i] * rest[d + i];
    for (int64_t d = n / lanes * lanes; d < n; ++d) partial[d % lanes] += rest[d] * rest[d];
    for (const float p : partial) left_out += p;
  }
  // Roundings of the sum, at most dim / 4 + 32 for a term, and squares too small for fp32.
  return std::sqrt(left_out) * (1.0005f + dim * 0x1p-26f) + std::sqrt(static_cast<float>(dim)) * 0x1p-62f;
}

// One row's or code's slots: the parts of its terms, the norm's three parts (1 for rows) if it rides along, zeros.
inline float fill_slots(const float* values, int64_t dim, const Slots& slots, bool is_row, float norm, uint16_t* scratch,
                        uint16_t* out) {
  const float left_out = split(values, dim, slots.parts, scratch);
  uint16_t* next = out;
  for (int t = 0; t < slots.terms; ++t, next += dim)
    std::memcpy(next, scratch + (is_row ? terms[t].row : terms[t].code) * dim, dim * sizeof(uint16_t));
  if (slots.norm) {
    if (is_row) {
      std::fill_n(next, 3, to_bf16(1.0f));
    } else {
      split(&norm, 1, 3, next);
    }
    next += 3;
  }
  std::fill(next, out + slots.steps * products, uint16_t{0});
  return left_out;
}

inline int64_t panel_bytes(int64_t dim) { return groups * slots_of(dim).steps * step_bytes; }
// A tile whose norms do not ride along is followed by them, once for each row of a matrix tile.
inline int64_t tile_bytes(int64_t dim) { return (slots_of(dim).steps + !slots_of(dim).norm) * step_bytes; }

// [group][step][pair of products][row][2]
void pack_panel(const float* flat, int64_t dim, std::byte* panel, float* residuals) {
  const Slots slots = slots_of(dim);
  const int64_t width = slots.steps * products;
  Scratch scratch((slots.parts * dim + lanes * width) / 2 + 1);
  auto* parts = reinterpret_cast<uint16_t*>(scratch.data() + lanes * width / 2);
  auto* rows = reinterpret_cast<uint16_t*>(scratch.data());
  for (int64_t g = 0; g < groups; ++g) {
    for (int64_t r = 0; r < lanes; ++r)
      residuals[g * lanes + r] = fill_slots(flat + (g * lanes + r) * dim, dim, slots, true, 0, parts, rows + r * width);
    // A pair of bf16 moves like one float.
    interleave<lanes>(scratch.data(), width / 2, reinterpret_cast<float*>(panel + g * slots.steps * step_bytes));
  }
}

// [step][code][32]
void pack_tile(const float* flat, const float* norms, int64_t dim, std::byte* tile, float* residuals) {
  const Slots slots = slots_of(dim);
  const int64_t width = slots.steps * products;
  Scratch scratch((slots.parts * dim + width) / 2 + 1);
  auto* code = reinterpret_cast<uint16_t*>(scratch.data());
  for (int64_t j = 0; j < lanes; ++j) {
    residuals[j] = fill_slots(flat + j * dim, dim, slots, false, norms[j], code + width, code);
    for (int64_t s = 0; s < slots.steps; ++s)
      std::memcpy(tile + s * step_bytes + j * products * sizeof(uint16_t), code + s * products, products * sizeof(uint16_t));
  }
  if (slots.norm) return;
  auto* spread = reinterpret_cast<float*>(tile + slots.steps * step_bytes);
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
void sweep_bf16(const std::byte* panels, int64_t panel_count, const std::byte* tiles, int64_t dim, int64_t count, float* minima,
                int64_t minima_stride, float* row_minima) {
  const Slots slots = slots_of(dim);
  const int64_t group_bytes = slots.steps * step_bytes, stride = tile_bytes(dim);
  const Engine engine;
  alignas(64) float scores[2][groups][lanes * lanes];
  for (int64_t t = 0; t < count; t += 2) {
    const std::byte* first = tiles + t * stride;
    const std::byte* second = t + 1 < count ? first + stride : first;  // a last single tile is multiplied twice
    for (int64_t p = 0; p < panel_count; ++p) {
      const std::byte* panel = panels + p * groups * group_bytes;
      engine.multiply(first, second, panel, panel + group_bytes, slots, scores);
      float* out = minima + p * minima_stride + t * groups * lanes;
      for (int64_t u = 0; u < std::min<int64_t>(2, count - t); ++u)
        for (int64_t g = 0; g < groups; ++g)
          minimum<Vec>(scores[u][g], out + (u * groups + g) * lanes, row_minima + (p * groups + g) * lanes);
    }
  }
}

template <class Vec, class Engine>
constexpr Bf16Pass bf16_pass{slots_of, panel_bytes, tile_bytes, pack_panel, pack_tile, sweep_bf16<Vec, Engine>};

template <class Vec, class Engine>
constexpr Kernels bf16_kernels(const char* name) {
  static_assert(Vec::width == lanes);
  Kernels kernels = scoring_kernels<Vec, groups, lanes>(name);
  kernels.bf16 = &bf16_pass<Vec, Engine>;
  return kernels;
}

}  // namespace
}  // namespace mmgen_kernels::vq
