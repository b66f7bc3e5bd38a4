// Nearest-code lookup on the CPU: one pass that keeps the minimum of each tile of codes, a rigorous bound on its error, and an
// fp64 comparison of the few codes that the bound cannot tell apart. docs/vq.md proves the bound.
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
  const double* squared = nullptr;  // (N,) squared norms of the rows, if the caller has them: one walk over x less
};

// What one call did, for tests and benchmarks.
struct Counters {
  int64_t rescored_tiles = 0;   // tiles looked at again in fp32
  int64_t exact_values = 0;     // distances evaluated in fp64
  int64_t deferred_rows = 0;    // left to the fp32 pass by a coarse one
  int64_t brute_force_rows = 0;
};

// The selected instruction set, or a better one for this problem if nobody named one.
InstructionSet suited_to(const Rows& x, const Rows& codebook, bool exact);

void nearest_code(const Query& query, InstructionSet set, Counters* counters = nullptr);

// Smaller components are packed as zero: a product of two others is a normal number, and subnormal ones cost 100x.
constexpr double flushed = 0x1p-62;

// Fixed-point units of a first pass in integers: a row's or a code's component v becomes round(v / unit).
struct Units {
  float row, code;
};

// A first pass that is coarser than fp32 and faster. Panels and tiles are its own format; residuals bound the norms of what it
// leaves out of each vector.
struct CoarsePass {
  bool integers;                            // rows and codes must be shorter than `longest` times their unit
  int64_t (*summed_products)(int64_t dim);  // in fp32, for one score; 0: sums are exact
  int64_t (*panel_bytes)(int64_t dim);
  int64_t (*tile_bytes)(int64_t dim);
  void (*pack_panel)(const float* flat, int64_t dim, const Units& units, std::byte* panel, float* residuals);
  void (*pack_tile)(const float* flat, const float* norms, int64_t dim, const Units& units, std::byte* tile, float* residuals);
  // As Kernels::sweep, for several panels at once; minima of panel p start at p * minima_stride.
  void (*sweep)(const std::byte* panels, int64_t panel_count, const std::byte* tiles, int64_t dim, int64_t count,
                const Units& units, float* minima, int64_t minima_stride, float* row_minima);
};

// The norm of an integer vector stays below it, so that products fit 16 bits and their sums 32.
constexpr double longest = 32766;

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
  // nullptr where there is a coarse pass. minima[t][r] = the smallest score of row r in tile t; row_minima[r] = min(itself, those).
  void (*sweep)(const float* panel, const float* tiles, const float* norms, int64_t dim, int64_t count, float* minima,
                float* row_minima);
  // The tiles t in which some row r has minima[t][r] <= thresholds[r], and a mask of those rows for each; returns how many.
  int64_t (*compare)(const float* minima, int64_t count, const float* thresholds, int32_t* tiles, uint64_t* masks);
  // scores[j] of one row with the codes of one tile; returns a mask of those <= limit. Reads up to one vector past the tile.
  uint32_t (*rescore)(const float* row, const float* tile, const float* norms, int64_t dim, float limit, float* scores);

  const CoarsePass* coarse;  // or nullptr: the first pass is `sweep`
};

extern const Kernels scalar_kernels, scalar_bf16_kernels, scalar_int16_kernels;
#if defined(__x86_64__)
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;
extern const Kernels avx512_vnni_kernels;
extern const Kernels amx_kernels;
#endif

}  // namespace mmgen_kernels::vq
