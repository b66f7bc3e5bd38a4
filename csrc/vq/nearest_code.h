// Nearest-code lookup on the CPU: one fp32 pass that keeps the minimum of each tile of codes, a rigorous bound on its error,
// and an fp64 comparison of the few codes that the bound cannot tell apart. docs/vq.md proves the bound.
#pragma once

#include <cstddef>
#include <cstdint>

#include "simd/instruction_set.h"
#include "vq/rows.h"

namespace mmgen_kernels::vq {

enum class Metric { l2, cosine, dot };

struct Query {
  Rows x;               // (N, D)
  Rows codebook;        // (K, D)
  const bool* mask;     // (N,) true = valid, or nullptr
  Metric metric;
  bool exact;           // false: the pass without the fp64 comparison
  int64_t* indices;     // (N,) out
};

// What one call did, for tests and benchmarks.
struct Counters {
  int64_t rescored_tiles = 0;   // tiles looked at again in fp32
  int64_t exact_values = 0;     // distances evaluated in fp64
  int64_t deferred_rows = 0;    // left to the fp32 pass by the one in bf16
  int64_t brute_force_rows = 0;
};

// The selected instruction set, or a better one for this codebook if nobody named one.
InstructionSet suited_to(const Rows& codebook);

void nearest_code(const Query& query, InstructionSet set, Counters* counters = nullptr);

// Smaller components are packed as zero: a product of two others is a normal number, and subnormal ones cost 100x.
constexpr double flushed = 0x1p-62;

// How the components of a row and of a code share a matrix tile's 32 products a step: each is split into `parts` numbers of
// bf16, `terms` products of parts are kept, and if `norm`, three more products add the code's norm term.
struct Slots {
  int parts, terms;  // 1 and 1, or 2 and 3
  int64_t steps;
  bool norm;
};

// A first pass in bf16. Panels and tiles are its own format; residuals bound the norms of what bf16 left out of each vector.
struct Bf16Pass {
  Slots (*slots)(int64_t dim);
  int64_t (*panel_bytes)(int64_t dim);
  int64_t (*tile_bytes)(int64_t dim);
  void (*pack_panel)(const float* flat, int64_t dim, std::byte* panel, float* residuals);
  void (*pack_tile)(const float* flat, const float* norms, int64_t dim, std::byte* tile, float* residuals);
  // As Kernels::sweep, for several panels at once; minima of panel p start at p * minima_stride.
  void (*sweep)(const std::byte* panels, int64_t panel_count, const std::byte* tiles, int64_t dim, int64_t count, float* minima,
                int64_t minima_stride, float* row_minima);
};

// The inner loops, one table per instruction set. A panel holds `rows` rows, at most 64, as [dim][rows]; a tile holds `codes`
// codes as [dim][codes]. With codes packed as -2c and a norm term |c|^2, norm + x . packed is |x - c|^2 - |x|^2.
struct Kernels {
  const char* name;
  int64_t rows;
  int64_t codes;

  // The squared norm of row - mean (nullptr: none) in fp64.
  double (*squared_norm)(const Rows& matrix, int64_t row, const double* mean);
  // out = row - mean; returns squared_norm.
  double (*read)(const Rows& matrix, int64_t row, const double* mean, double* out);
  // out = float((row - mean) * scale), components smaller than `flushed` as 0
  void (*load)(const Rows& matrix, int64_t row, const double* mean, double scale, float* out);
  // The same of values already read.
  void (*narrow)(const double* values, double scale, int64_t dim, float* out);
  // squared[i] = squared_norm of row first + i, and sums += the rows whose squared norm is finite, one after the other.
  void (*summarise)(const Rows& matrix, int64_t first, int64_t count, double* squared, double* sums);
  // A panel of `rows` rows, and a tile of `codes` codes: (count, dim) to (dim, count).
  void (*interleave_rows)(const float* flat, int64_t dim, float* panel);
  void (*interleave_codes)(const float* flat, int64_t dim, float* tile);
  // nullptr where there is a pass in bf16. minima[t][r] = the smallest score of row r in tile t; row_minima[r] = min(itself, those).
  void (*sweep)(const float* panel, const float* tiles, const float* norms, int64_t dim, int64_t count, float* minima,
                float* row_minima);
  // The tiles t in which some row r has minima[t][r] <= thresholds[r], and a mask of those rows for each; returns how many.
  int64_t (*compare)(const float* minima, int64_t count, const float* thresholds, int32_t* tiles, uint64_t* masks);
  // scores[j] of one row with the codes of one tile; returns a mask of those <= limit. Reads up to one vector past the tile.
  uint32_t (*rescore)(const float* row, const float* tile, const float* norms, int64_t dim, float limit, float* scores);

  const Bf16Pass* bf16;  // or nullptr: the first pass is `sweep`
};

extern const Kernels scalar_kernels, scalar_bf16_kernels;
#if defined(__x86_64__)
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;
extern const Kernels amx_kernels;
#endif

}  // namespace mmgen_kernels::vq
