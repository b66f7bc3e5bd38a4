// One pass over packed codes: what its threads share, and the search of blocks of rows. Names and formulas follow docs/vq.md, "How
// the index is certified".
#pragma once

#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <mutex>
#include <vector>

#include "vq/codebook.h"

namespace mmgen_kernels::vq {

// What is known of a row between panels: its best code so far, and an interval around that code's score.
struct Candidate {
  int64_t index = -1;
  double lower = -std::numeric_limits<double>::infinity();
  double upper = std::numeric_limits<double>::infinity();
  double value = std::numeric_limits<double>::infinity();  // in fp64, once evaluated
  bool evaluated = false;
  bool deferred = false;  // nothing above counts: the row is for the fp32 pass
};

// Packed codes of tiles [first_tile, first_tile + tiles), cut where segments meet.
struct Panel {
  struct Part {
    int64_t tile, tiles;  // relative to the panel
    const Segment* segment;
    double left_out;  // by the coarse pass, of any of its codes at most
  };
  int64_t first_tile, tiles;
  const float* packed;
  const float* norms;
  const std::byte* coarse_tiles;
  std::vector<Part> parts;
};

inline int exponent(double norm) { return norm > 0 ? std::ilogb(norm) : 0; }
// What a row of this norm is multiplied by: for l2 the codes' scale, else its own.
inline double scale_of_row(Metric metric, double scale, double norm) {
  return metric == Metric::l2 ? scale : std::ldexp(1.0, -exponent(norm));
}

// What the threads of a pass share.
struct Pass {
  const Query& query;
  const Kernels& kernels;
  const Codebook& codebook;
  const ErrorBound& error;
  Units units;
  double scale;           // of codes, and for l2 of rows too
  const double* squared;  // norms of rows, from first_row on
  int64_t first_row;
  bool duplicates_dropped;
  int64_t tiles_worth_deferring;  // more tiles of a row and panel to look at again cost more than another pass

  std::atomic<bool> many_ties{false};  // some row met so many that equal codes should be dropped: the pass gave up
  std::atomic<int64_t> rescored_tiles{0}, exact_values{0};
  std::mutex mutex;
  std::vector<int64_t> deferred;  // rows that a coarse pass leaves to the next one
};

// How many rows make a block, of `tiles` tiles a panel: their packed form and their tile minima stay in L2.
int64_t rows_of_block(const Kernels& kernels, int64_t dim, int64_t tiles);

// Searches the panel for all rows, `block` at a time, on torch's threads. `state` (one per row) is what earlier panels found,
// and is brought up to date; nullptr where one panel holds all codes: the answers are written.
void search_blocks(Pass& pass, const Panel& panel, const std::vector<int64_t>& rows, int64_t block, Candidate* state);

}  // namespace mmgen_kernels::vq
