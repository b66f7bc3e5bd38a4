// The codebook as one lookup sees it: norms, centring, the order in which codes are packed, and the packing.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "vq/nearest_code.h"

namespace mmgen_kernels::vq {

// How far a score of the fp32 pass may lie from the score that the fp64 value implies: docs/vq.md, "How the index is certified".
class ErrorBound {
 public:
  ErrorBound(Metric metric, int64_t dim);
  // r, n: norms of the row and of the code, in scaled units; raw: norm of the largest code before centring.
  double operator()(double r, double n, double raw) const;

  // The same for a coarse pass. row, code: the norms that it leaves out of them as packed.
  void use(const CoarsePass& pass, const Units& units);
  double of_coarse(double r, double n, double raw, double row, double code) const;

 private:
  double bound(double pass, double r, double n, double raw) const;

  bool l2_;
  double pass_, value_, coarse_pass_ = 0, norm_rounding_ = 0;
  int64_t dim_;
};

// Codes of similar norm, packed side by side: the bound of a tile is that of its largest code.
struct Segment {
  int64_t first_tile, tiles;
  double largest_norm;
};

class Codebook {
 public:
  Codebook(const Rows& codes, Metric metric, const Kernels& kernels);

  // Leaves equal codes out, all but the lowest of each: they tie exactly and the lowest wins.
  void drop_duplicates();

  // Packs tiles [first, last) at `scale`; all outputs start at tile first. For a coarse pass its own tiles too, and what each
  // leaves out of its codes at most.
  void pack(int64_t first, int64_t last, double scale, float* out, float* norms, const Units& units, std::byte* coarse_tiles,
            float* left_out) const;

  // The code at a position of the packed order, or -1 for padding.
  int64_t code_at(int64_t position) const {
    if (!order_.empty()) return order_[position];
    return position < rows.count ? position : -1;
  }
  double norm(int64_t k) const;  // of what the pass sees; NaN for a code that is not finite
  const double* mean_of_rows() const { return metric_ == Metric::l2 ? mean_of_codes() : nullptr; }
  const double* mean_of_codes() const { return centred_ ? mean_.data() : nullptr; }
  bool centred() const { return centred_; }
  int64_t tiles() const { return segments.back().first_tile + segments.back().tiles; }

  const Rows rows;
  std::vector<Segment> segments;
  double smallest_norm = 0, largest_norm = 0, largest_raw_norm = 0, root_mean_square = 0;
  bool any_finite = false, all_finite = false;
  bool extreme = false;  // fp64 input whose squares overflow or vanish

 private:
  double read(int64_t k, const double* mean, double* out) const;
  void measure();
  void arrange();

  const Metric metric_;
  const Kernels& kernels_;
  std::vector<double> squared_norms_, mean_;
  std::vector<int64_t> order_;      // empty: ascending
  std::vector<int64_t> canonical_;  // empty, or the lowest code equal to each
  bool centred_ = false;
};

}  // namespace mmgen_kernels::vq
