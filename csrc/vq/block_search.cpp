#include "vq/block_search.h"

#include <algorithm>
#include <bit>
#include <cmath>

#include "aligned.h"
#include "parallel.h"
#include "vq/exact.h"

namespace mmgen_kernels::vq {
namespace {

constexpr double infinity = std::numeric_limits<double>::infinity();
constexpr int64_t sub_panel_bytes = 256 << 10;  // stays in L2 while every panel of a block of rows passes
constexpr int64_t block_bytes = 512 << 10;      // rows of a block; twice as much for their tile minima
constexpr int64_t l1_bytes = 32 << 10;          // of a coarse pass's rows, beside two tiles of codes
constexpr int64_t block_rows = 144;
constexpr float never = 3e38f;                  // above every score
constexpr float possible = 2.9e38f;             // no score of a code lies above it
constexpr double far_away = 0x1p44;             // larger norms, in scaled units, are not in the pass
constexpr int64_t many_ties = 32;               // compared candidates of one row that make duplicated codes likely

float round_up(double x) { return std::nextafter(static_cast<float>(x), std::numeric_limits<float>::max()); }

int64_t round_to(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

// One thread's scratch, and the search of blocks of rows in a panel of codes.
class BlockSearch {
 public:
  BlockSearch(Pass& pass, const Panel& panel, const std::vector<int64_t>& rows, int64_t block, Candidate* state)
      : pass_(pass), k_(pass.kernels), dim_(pass.query.x.dim), l2_(pass.query.metric == Metric::l2), panel_(panel), all_rows_(rows),
        block_(block), state_(state), panels_(k_.coarse ? 0 : block * dim_),
        coarse_panels_(k_.coarse ? block / k_.rows * k_.coarse->panel_bytes(dim_) / sizeof(float) : 0), left_out_(block),
        flat_(block * dim_), norms_(block), floors_(block), minima_(block * panel.tiles), row_minima_(block * panel.parts.size()),
        thresholds_(k_.rows), limits_(k_.rows), seen_(k_.rows), found_(panel.tiles), masks_(panel.tiles), row_(dim_),
        contests_(k_.rows) {}

  ~BlockSearch() {
    pass_.rescored_tiles += rescored_tiles_;
    pass_.exact_values += exact_values_;
    const std::lock_guard lock(pass_.mutex);
    pass_.deferred.insert(pass_.deferred.end(), deferred_.begin(), deferred_.end());
  }

  void operator()(int64_t b) {
    if (pass_.many_ties.load(std::memory_order_relaxed)) return;
    const int64_t first = b * block_;
    search(all_rows_.data() + first, std::min<int64_t>(block_, static_cast<int64_t>(all_rows_.size()) - first),
           state_ == nullptr ? nullptr : state_ + first);
  }

 private:
  // The codes of one row that the bound cannot tell apart.
  struct Contest {
    static constexpr int capacity = 8;
    Candidate list[capacity];
    int count;
    double upper;  // the winner's score is not above it
    int64_t ties;  // candidates that had to be compared
    int64_t tiles;  // looked at again
    bool deferred;
  };

  void search(const int64_t* rows, int64_t count, Candidate* state) {
    const int64_t width = k_.rows, panels = round_to(count, width) / width;
    pack_rows(rows, count, panels * width);
    std::fill(row_minima_.begin(), row_minima_.end(), never);
    if (k_.coarse != nullptr) sweep_coarse(panels);
    const int64_t sub_tiles = std::max<int64_t>(1, sub_panel_bytes / (k_.codes * dim_ * int64_t{sizeof(float)}));
    for (size_t s = 0; k_.coarse == nullptr && s < panel_.parts.size(); ++s) {
      const Panel::Part& part = panel_.parts[s];
      for (int64_t t = part.tile; t < part.tile + part.tiles; t += sub_tiles)
        for (int64_t p = 0; p < panels; ++p)
          k_.sweep(&panels_[p * width * dim_], panel_.packed + t * k_.codes * dim_, panel_.norms + t * k_.codes, dim_,
                   std::min(sub_tiles, part.tile + part.tiles - t), &minima_[(p * panel_.tiles + t) * width],
                   &row_minima_[s * block_ + p * width]);
    }
    for (int64_t first = 0; first < count; first += width) {
      const int64_t n = std::min(width, count - first);
      for (int64_t i = 0; i < n; ++i) start(contests_[i], first + i, state == nullptr ? Candidate{} : state[first + i]);
      for (size_t s = 0; s < panel_.parts.size(); ++s) {
        if (k_.coarse == nullptr) select(s, rows, first, n);
        else select_coarse(s, rows, first, n);
      }
      if (pass_.many_ties.load(std::memory_order_relaxed)) return;  // the pass starts over
      for (int64_t i = 0; i < n; ++i) {
        if (contests_[i].deferred) {
          if (state == nullptr || !state[first + i].deferred) deferred_.push_back(rows[first + i]);
          if (state != nullptr) state[first + i].deferred = true;
          continue;
        }
        settle(contests_[i], rows[first + i]);
        if (state != nullptr && contests_[i].count > 0) state[first + i] = contests_[i].list[0];
        if (state == nullptr) pass_.query.indices[rows[first + i]] = contests_[i].count > 0 ? contests_[i].list[0].index : 0;
      }
    }
  }

  // Of the pass, for any code of the part.
  double largest_error(int64_t i, const Panel::Part& part) const {
    if (k_.coarse == nullptr) return largest_fp32_error(i, part);
    return pass_.error.of_coarse(norms_[i], largest_norm(part), raw_norm(), left_out_[i], part.left_out);
  }
  double largest_fp32_error(int64_t i, const Panel::Part& part) const {
    return pass_.error(norms_[i], largest_norm(part), raw_norm());
  }
  double largest_norm(const Panel::Part& part) const { return std::min(part.segment->largest_norm * pass_.scale, far_away); }
  double raw_norm() const { return pass_.codebook.largest_raw_norm * pass_.scale; }

  // The code that gave a row's minimum bounds the winner's score from above.
  void start(Contest& contest, int64_t i, const Candidate& champion) const {
    contest.count = 0;
    contest.ties = contest.tiles = 0;
    contest.deferred = champion.deferred;
    contest.upper = champion.upper;
    if (champion.index >= 0) contest.list[contest.count++] = champion;
    for (size_t s = 0; s < panel_.parts.size(); ++s) {
      const double lowest = row_minima_[s * block_ + i];
      if (lowest > possible) continue;
      const double error = largest_error(i, panel_.parts[s]);
      // without the fp64 comparison the lowest score wins, as the second evaluation rounds it
      contest.upper = std::min(contest.upper, lowest + (pass_.query.exact ? error : 2 * error));
    }
  }

  // Rescores the tiles of part s that may hold the nearest code of rows [first, first + n).
  void select(size_t s, const int64_t* rows, int64_t first, int64_t n) {
    const Panel::Part& part = panel_.parts[s];
    std::fill(thresholds_.begin(), thresholds_.end(), -never);
    for (int64_t i = 0; i < n; ++i) {
      if (row_minima_[s * block_ + first + i] > possible || vanishes(part, rows, first, i)) continue;
      thresholds_[i] = round_up(contests_[i].upper + largest_error(first + i, part));
      limits_[i] = std::min(possible, thresholds_[i]);
    }
    const int64_t found = compare(part, first);
    for (int64_t f = 0; f < found; ++f)
      for (uint64_t mask = masks_[f]; mask != 0; mask &= mask - 1) {
        const int i = __builtin_ctzll(mask);
        rescore(part.tile + found_[f], first + i, rows[first + i], contests_[i], k_.codes);
        if (pass_.many_ties.load(std::memory_order_relaxed)) return;
      }
  }

  // The same after a coarse pass. The tile that gave a row's minimum goes first: its codes in fp32 bring the upper bound of the
  // winner's score down by about the error of the coarse pass, and half of the other tiles need no second look. Without the
  // fp64 comparison that first tile is all.
  void select_coarse(size_t s, const int64_t* rows, int64_t first, int64_t n) {
    const Panel::Part& part = panel_.parts[s];
    const float* lowest = &row_minima_[s * block_ + first];
    std::fill(thresholds_.begin(), thresholds_.end(), -never);
    for (int64_t i = 0; i < n; ++i) {
      if (lowest[i] > possible || contests_[i].deferred || vanishes(part, rows, first, i)) continue;
      if (!pass_.query.exact) {
        if (lowest[i] > lowest_of(first + i)) continue;
        thresholds_[i] = lowest[i];
        limits_[i] = possible;
        continue;
      }
      set_limits(first, i, part);
    }
    const int64_t found = compare(part, first);
    int64_t open = 0;
    for (int64_t f = 0; f < found; ++f) open += std::popcount(masks_[f]);
    if (open > pass_.tiles_worth_deferring * n) {
      // One code that stands in every tile and is nearest to most rows (zeros, say) looks like this too: without its copies
      // there is less to defer.
      if (!pass_.duplicates_dropped) pass_.many_ties = true;
      for (int64_t i = 0; i < n; ++i) contests_[i].deferred = true;
      return;
    }
    const float* minima = &minima_[(first / k_.rows * panel_.tiles + part.tile) * k_.rows];
    std::fill(seen_.begin(), seen_.end(), -1);
    for (int64_t f = 0; f < found; ++f)
      for (uint64_t mask = masks_[f]; mask != 0; mask &= mask - 1) {
        const int i = __builtin_ctzll(mask);
        if (seen_[i] >= 0 || minima[found_[f] * k_.rows + i] > lowest[i]) continue;
        seen_[i] = found_[f];
        rescore(part.tile + found_[f], first + i, rows[first + i], contests_[i], k_.codes);
      }
    if (!pass_.query.exact) return;
    for (int64_t i = 0; i < n; ++i)
      if (thresholds_[i] > -never) set_limits(first, i, part);
    for (int64_t f = 0; f < found; ++f)
      for (uint64_t mask = masks_[f]; mask != 0; mask &= mask - 1) {
        const int i = __builtin_ctzll(mask);
        if (found_[f] == seen_[i] || minima[found_[f] * k_.rows + i] > thresholds_[i]) continue;
        contests_[i].deferred |= ++contests_[i].tiles > pass_.tiles_worth_deferring;
        if (contests_[i].deferred) continue;
        rescore(part.tile + found_[f], first + i, rows[first + i], contests_[i], k_.codes);
        if (pass_.many_ties.load(std::memory_order_relaxed)) return;
      }
  }

  void set_limits(int64_t first, int64_t i, const Panel::Part& part) {
    thresholds_[i] = round_up(contests_[i].upper + largest_error(first + i, part));
    limits_[i] = std::min(possible, round_up(contests_[i].upper + largest_fp32_error(first + i, part)));
  }

  int64_t compare(const Panel::Part& part, int64_t first) {
    return k_.compare(&minima_[(first / k_.rows * panel_.tiles + part.tile) * k_.rows], part.tiles, thresholds_.data(), found_.data(),
                      masks_.data());
  }

  // Whether x - c rounds to x for every code of the part: they tie exactly, and the first of them, the lowest, enters the contest.
  bool vanishes(const Panel::Part& part, const int64_t* rows, int64_t first, int64_t i) {
    if (!(part.segment->largest_norm <= floors_[first + i]) || !pass_.codebook.all_finite) return false;
    limits_[i] = possible;
    rescore(part.tile, first + i, rows[first + i], contests_[i], 1);
    return true;
  }

  float lowest_of(int64_t i) const {
    float lowest = never;
    for (size_t s = 0; s < panel_.parts.size(); ++s) lowest = std::min(lowest, row_minima_[s * block_ + i]);
    return lowest;
  }

  void sweep_coarse(int64_t panels) {
    const CoarsePass& pass = *k_.coarse;
    const int64_t width = k_.rows, panel_size = pass.panel_bytes(dim_), tile_size = pass.tile_bytes(dim_);
    const auto* packed = reinterpret_cast<const std::byte*>(coarse_panels_.data());
    const int64_t sub_tiles = std::max<int64_t>(6, sub_panel_bytes / tile_size / 6 * 6);  // whole pairs, and whole triples
    const int64_t in_l1 = std::max<int64_t>(1, l1_bytes / panel_size);
    for (size_t s = 0; s < panel_.parts.size(); ++s) {
      const Panel::Part& part = panel_.parts[s];
      for (int64_t t = part.tile; t < part.tile + part.tiles; t += sub_tiles)
        for (int64_t p = 0; p < panels; p += in_l1)
          pass.sweep(packed + p * panel_size, std::min(in_l1, panels - p), panel_.coarse_tiles + t * tile_size, dim_,
                     std::min(sub_tiles, part.tile + part.tiles - t), pass_.units, &minima_[(p * panel_.tiles + t) * width],
                     panel_.tiles * width, &row_minima_[s * block_ + p * width]);
    }
  }

  void pack_rows(const int64_t* rows, int64_t count, int64_t padded) {
    for (int64_t i = 0; i < padded; ++i) {
      float* flat = &flat_[i * dim_];
      if (i < count) {
        const double norm = std::sqrt(pass_.squared[rows[i] - pass_.first_row]);
        const double scale = scale_of_row(pass_.query.metric, pass_.scale, norm);
        norms_[i] = norm * scale;
        k_.load(pass_.query.x, rows[i], pass_.codebook.mean_of_rows(), scale, flat);
        floors_[i] = floor(rows[i], norm);
      } else {
        norms_[i] = 0;
        std::fill_n(flat, dim_, 0.0f);
      }
    }
    for (int64_t i = 0; i < padded; i += k_.rows) {
      if (k_.coarse == nullptr) {
        k_.interleave_rows(&flat_[i * dim_], dim_, &panels_[i * dim_]);
      } else {
        auto* panels = reinterpret_cast<std::byte*>(coarse_panels_.data());
        k_.coarse->pack_panel(&flat_[i * dim_], dim_, pass_.units, panels + i / k_.rows * k_.coarse->panel_bytes(dim_), &left_out_[i]);
      }
    }
  }

  // A component of a code that is not above it vanishes beside every component of the row.
  double floor(int64_t row, double norm) {
    const auto vanishes = [&](const Segment& s) { return s.largest_norm < norm * 0x1p-54; };
    const std::vector<Segment>& segments = pass_.codebook.segments;
    if (!l2_ || pass_.codebook.centred() || std::none_of(segments.begin(), segments.end(), vanishes)) return -1;
    read_row(pass_.query.x, row, row_.data());
    double smallest = infinity;
    for (const double x : row_) smallest = std::min(smallest, std::abs(x));
    return smallest * 0x1p-54;
  }

  void rescore(int64_t tile, int64_t i, int64_t row, Contest& contest, int64_t codes) {
    ++rescored_tiles_;
    float scores[64];
    uint32_t mask = k_.rescore(&flat_[i * dim_], panel_.packed + tile * k_.codes * dim_, panel_.norms + tile * k_.codes, dim_,
                               limits_[i % k_.rows], scores);
    for (mask &= (1u << codes) - 1; mask != 0; mask &= mask - 1) {
      const int j = __builtin_ctz(mask);
      const int64_t k = pass_.codebook.code_at((panel_.first_tile + tile) * k_.codes + j);
      const double error = pass_.query.exact ? pass_.error(norms_[i], pass_.codebook.norm(k) * pass_.scale, raw_norm()) : 0.0;
      const double lower = scores[j] - error, upper = scores[j] + error;
      if (lower > contest.upper) continue;
      contest.upper = std::min(contest.upper, upper);
      if (contest.count == Contest::capacity) settle(contest, row);
      contest.list[contest.count++] = {k, lower, upper, scores[j], !pass_.query.exact};
    }
  }

  // Leaves at most one candidate: the only one within the bound, or the best in fp64.
  void settle(Contest& contest, int64_t row) {
    int kept = 0;
    for (int i = 0; i < contest.count; ++i)
      if (contest.list[i].lower <= contest.upper) contest.list[kept++] = contest.list[i];
    contest.count = kept;
    if (kept < 2) return;
    bool row_is_read = false;
    int best = 0;
    for (int i = 0; i < kept; ++i) {
      Candidate& c = contest.list[i];
      if (!c.evaluated) {
        if (!row_is_read) read_row(pass_.query.x, row, row_.data());
        row_is_read = true;
        c.value = exact_value(pass_.query.metric, row_.data(), pass_.codebook.rows, c.index);
        c.evaluated = true;
        ++exact_values_;
      }
      ++contest.ties;
      const Candidate& b = contest.list[best];
      if (c.value < b.value || (c.value == b.value && c.index < b.index)) best = i;
    }
    contest.list[0] = contest.list[best];
    contest.count = 1;
    if (contest.ties > many_ties && !pass_.duplicates_dropped) pass_.many_ties = true;
  }

  Pass& pass_;
  const Kernels& k_;
  const int64_t dim_;
  const bool l2_;
  const Panel& panel_;
  const std::vector<int64_t>& all_rows_;
  const int64_t block_;
  Candidate* const state_;
  Scratch panels_;                      // [panel][dim][row]
  Scratch coarse_panels_, left_out_;      // the same for a coarse pass, and what it leaves out of each row
  Scratch flat_;                        // [row][dim]
  std::vector<double> norms_, floors_;  // per row
  Scratch minima_;                      // [panel][tile][row]
  std::vector<float> row_minima_;       // [part][row]
  std::vector<float> thresholds_;       // per row of one panel: of its tiles' minima
  std::vector<float> limits_;           // and of the scores of a second look
  std::vector<int32_t> seen_;           // the tile that was looked at first
  std::vector<int32_t> found_;
  std::vector<uint64_t> masks_;
  std::vector<double> row_;
  std::vector<Contest> contests_;
  std::vector<int64_t> deferred_;
  int64_t rescored_tiles_ = 0, exact_values_ = 0;
};

}  // namespace

int64_t rows_of_block(const Kernels& kernels, int64_t dim, int64_t tiles) {
  const int64_t row_bytes = dim * int64_t{sizeof(float)};
  const int64_t rows = std::min({block_rows, block_bytes / row_bytes, 2 * block_bytes / (tiles * int64_t{sizeof(float)})});
  return std::max(kernels.rows, rows / kernels.rows * kernels.rows);
}

void search_blocks(Pass& pass, const Panel& panel, const std::vector<int64_t>& rows, int64_t block, Candidate* state) {
  const int64_t count = static_cast<int64_t>(rows.size());
  parallel_on_demand((count + block - 1) / block, [&] { return BlockSearch(pass, panel, rows, block, state); });
}

}  // namespace mmgen_kernels::vq
