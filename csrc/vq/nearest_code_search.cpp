// The lookup around the inner loops: what each row needs, the pass over all codes, and the second looks, in fp32 and fp64, at what
// the pass leaves undecided. Names and formulas follow docs/vq.md, "How the index is certified".
#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <iterator>
#include <limits>
#include <memory>
#include <mutex>
#include <vector>

#include "vq/aligned.h"
#include "vq/codebook.h"
#include "vq/exact.h"
#include "vq/parallel.h"

namespace mmgen_kernels::vq {
namespace {

constexpr double infinity = std::numeric_limits<double>::infinity();
constexpr int64_t rows_at_once = 1 << 16;       // bounds the state kept per row
constexpr int64_t panel_bytes = 8 << 20;        // packed codes shared by the threads at a time
constexpr int64_t panel_codes = 24 * 1024;      // bounds the tile minima: 11 KiB per row at 9 codes a tile
constexpr int64_t sub_panel_bytes = 256 << 10;  // stays in L2 while every panel of a block of rows passes
constexpr int64_t block_bytes = 512 << 10;      // rows of a block; twice as much for their tile minima
constexpr int64_t l1_bytes = 32 << 10;          // of a coarse pass's rows, beside two tiles of codes
constexpr int64_t block_rows = 144;
constexpr int class_width = 40;                 // log2 of the magnitudes that share one scale
constexpr float never = 3e38f;                  // above every score
constexpr float possible = 2.9e38f;             // no score of a code lies above it
constexpr double far_away = 0x1p44;             // larger norms, in scaled units, are not in the pass
constexpr int64_t many_ties = 32;               // compared candidates of one row that make duplicated codes likely

// What is known of a row between panels: its best code so far, and an interval around that code's score.
struct Candidate {
  int64_t index = -1;
  double lower = -infinity;
  double upper = infinity;
  double value = infinity;  // in fp64, once evaluated
  bool evaluated = false;
  bool deferred = false;  // nothing above counts: the row is for the fp32 pass
};

// What a row needs: nothing more, the answer for the zero row, brute force, or (any other value) the pass at that class's scale.
enum RowClass : int8_t { settled = 127, zero = 126, brute = 125 };

const Kernels& kernels_of(InstructionSet set) {
#if defined(__x86_64__)
  if (set == InstructionSet::amx) return amx_kernels;
  if (set == InstructionSet::avx512_vnni) return avx512_vnni_kernels;
  if (set == InstructionSet::avx512) return avx512_kernels;
  if (set == InstructionSet::avx2) return avx2_kernels;
#endif
  if (set == InstructionSet::scalar_bf16) return scalar_bf16_kernels;
  if (set == InstructionSet::scalar_int16) return scalar_int16_kernels;
  return scalar_kernels;
}

// What takes the rows for which a coarse pass decides too little.
InstructionSet fp32_of(InstructionSet set) {
  const bool avx512 = set == InstructionSet::amx || set == InstructionSet::avx512_vnni;
  return avx512 ? InstructionSet::avx512 : InstructionSet::scalar;
}

// Of a pass in integers, in scaled units: room for rows of norm 8 and codes of 8 where the codes' root mean square is in [1, 2),
// and for both of 2 where rows are scaled by themselves. Sums then stay below 1.5 * 2^30.
Units units_of(Metric metric) {
  if (metric == Metric::l2) return {0x1p-12f, 0x1p-11f};
  return {0x1p-14f, 0x1p-14f};
}

float round_up(double x) { return std::nextafter(static_cast<float>(x), std::numeric_limits<float>::max()); }

int exponent(double norm) { return norm > 0 ? std::ilogb(norm) : 0; }

int64_t round_to(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

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

class Lookup {
 public:
  Lookup(const Query& query, InstructionSet set)
      : q_(query), set_(set), k_(kernels_of(set)), dim_(query.x.dim), l2_(query.metric == Metric::l2),
        codebook_(query.codebook, query.metric, k_), error_(query.metric, query.x.dim), units_(units_of(query.metric)) {
    brute_force_all_ = codebook_.extreme || !codebook_.any_finite || (!codebook_.all_finite && !l2_);
    if (k_.coarse != nullptr) error_.use(*k_.coarse, units_);
    anchor_ = exponent(l2_ ? codebook_.root_mean_square : codebook_.largest_norm);
  }

  void run() {
    for (int64_t start = 0; start < q_.x.count; start += rows_at_once)
      search_rows(start, std::min(rows_at_once, q_.x.count - start));
  }

  Counters counters() const {
    Counters all = fp32_ == nullptr ? Counters{} : fp32_->counters();
    all.rescored_tiles += rescored_tiles_;
    all.exact_values += exact_values_;
    all.deferred_rows += deferred_rows_;
    all.brute_force_rows += brute_rows_;
    return all;
  }

 private:
  friend class Worker;

  bool is_zero(int64_t row) const {
    return with_row(q_.x, row, [&](const auto* p) {
      for (int64_t d = 0; d < dim_; ++d)
        if (!(widen(p[d]) == 0)) return false;
      return true;
    });
  }

  // Sets `squared` to the row's squared norm wherever the pass will want it.
  int8_t classify(int64_t row, double& squared) const {
    if (q_.mask != nullptr && !q_.mask[row]) {
      q_.indices[row] = -1;
      return settled;
    }
    q_.indices[row] = 0;
    // Zero rows are common (padding), and all codes of a normalised codebook tie for them: answered once.
    if (is_zero(row)) return l2_ ? zero : (brute_force_all_ ? brute : settled);
    squared = k_.squared_norm(q_.x, row, codebook_.mean_of_rows());
    if (q_.x.dtype == Float::fp64 && !(squared > 0x1p-800 && squared < 0x1p800)) return brute;
    if (!std::isfinite(squared)) return l2_ ? settled : brute;  // every distance is Inf or NaN: index 0
    if (brute_force_all_) return brute;
    if (!l2_) return 0;  // the score is linear in the row, which is scaled by itself
    const int magnitude = exponent(std::max(std::sqrt(squared), codebook_.smallest_norm)) - anchor_;
    return static_cast<int8_t>(std::lround(double(magnitude) / class_width));
  }

  void search_rows(int64_t start, int64_t count) {
    std::vector<int8_t> classes(count);
    squared_.resize(count);
    first_row_ = start;
    parallel(count, dim_, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) classes[i] = classify(start + i, squared_[i]);
    });
    std::vector<std::vector<int64_t>> lists(256);
    for (int64_t i = 0; i < count; ++i) lists[static_cast<uint8_t>(classes[i])].push_back(start + i);
    for (const int64_t row : lists[zero]) {
      if (zero_index_ < 0) zero_index_ = nearest_by_brute_force(row);
      q_.indices[row] = zero_index_;
    }
    parallel(static_cast<int64_t>(lists[brute].size()), codebook_.rows.count * dim_, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) q_.indices[lists[brute][i]] = nearest_by_brute_force(lists[brute][i]);
    });
    brute_rows_ += static_cast<int64_t>(lists[brute].size());
    for (int c = 0; c < 256; ++c) {
      const int8_t row_class = static_cast<int8_t>(c);
      if (row_class < brute && !lists[c].empty()) search_class(lists[c], row_class);
    }
  }

  int64_t nearest_by_brute_force(int64_t row) {
    std::vector<double> x(dim_);
    read_row(q_.x, row, x.data());
    double best = infinity;
    int64_t index = 0;
    for (int64_t k = 0; k < codebook_.rows.count; ++k) {
      const double value = exact_value(q_.metric, x.data(), codebook_.rows, k);
      if (value < best) best = value, index = k;
    }
    exact_values_ += codebook_.rows.count;
    return index;
  }

  // All rows whose magnitude suits one scale of the codebook. If some row meets many exact ties, equal codes are dropped from
  // the codebook and the class starts over: at most once per call.
  void search_class(const std::vector<int64_t>& rows, int row_class) {
    scale_ = std::ldexp(1.0, -(anchor_ + class_width * row_class));
    const std::vector<int64_t> suited = suited_to_pass(rows, row_class);
    if (!suited.empty() && !pass(suited)) {
      codebook_.drop_duplicates();
      duplicates_dropped_ = true;
      pass(suited);
    }
    if (suited.size() < rows.size())
      std::set_difference(rows.begin(), rows.end(), suited.begin(), suited.end(), std::back_inserter(deferred_));
    if (!deferred_.empty()) search_deferred(row_class);
  }

  // Rows, ascending, that the pass can hold: all of them, unless it is one in integers.
  std::vector<int64_t> suited_to_pass(const std::vector<int64_t>& rows, int row_class) const {
    if (k_.coarse == nullptr || !k_.coarse->integers) return rows;
    const double packed = l2_ ? 2 * codebook_.largest_norm : codebook_.largest_norm;
    if (row_class != 0 || !(packed * scale_ < longest * units_.code)) return {};
    if (!l2_) return rows;
    std::vector<int64_t> suited;
    const double reach = longest * units_.row / scale_;
    for (const int64_t row : rows)
      if (squared_[row - first_row_] < reach * reach) suited.push_back(row);
    return suited;
  }

  void search_deferred(int row_class) {
    if (fp32_ == nullptr) fp32_ = std::make_unique<Lookup>(q_, fp32_of(set_));
    fp32_->squared_ = squared_;
    fp32_->first_row_ = first_row_;
    std::sort(deferred_.begin(), deferred_.end());
    fp32_->search_class(deferred_, row_class);
    deferred_rows_ += static_cast<int64_t>(deferred_.size());
    deferred_.clear();
  }

  // False if it gave up because of ties.
  bool pass(const std::vector<int64_t>& rows);

  const Query& q_;
  const InstructionSet set_;
  const Kernels& k_;
  const int64_t dim_;
  const bool l2_;
  Codebook codebook_;
  ErrorBound error_;
  const Units units_;
  std::vector<double> squared_;  // of rows from first_row_ on
  int64_t first_row_ = 0;
  double scale_ = 1;
  int anchor_ = 0;
  bool brute_force_all_ = false, duplicates_dropped_ = false;
  std::atomic<bool> many_ties_{false};
  int64_t zero_index_ = -1, brute_rows_ = 0, deferred_rows_ = 0;
  std::vector<int64_t> deferred_;  // rows of this class
  std::mutex deferred_mutex_;
  std::unique_ptr<Lookup> fp32_;   // for them
  std::atomic<int64_t> rescored_tiles_{0}, exact_values_{0};
};

// One thread's scratch, and the search of blocks of rows in a panel of codes.
class Worker {
 public:
  Worker(Lookup& lookup, const Panel& panel, const std::vector<int64_t>& rows, int64_t block, Candidate* state)
      : l_(lookup), k_(lookup.k_), dim_(lookup.dim_), panel_(panel), all_rows_(rows), block_(block), state_(state),
        panels_(k_.coarse ? 0 : block * dim_),
        coarse_panels_(k_.coarse ? block / k_.rows * k_.coarse->panel_bytes(dim_) / sizeof(float) : 0), left_out_(block), flat_(block * dim_), norms_(block), floors_(block), minima_(block * panel.tiles),
        row_minima_(block * panel.parts.size()), thresholds_(k_.rows), limits_(k_.rows),
        seen_(k_.rows), found_(panel.tiles), masks_(panel.tiles), row_(dim_), contests_(k_.rows) {}

  ~Worker() {
    l_.rescored_tiles_ += rescored_tiles_;
    l_.exact_values_ += exact_values_;
    const std::lock_guard lock(l_.deferred_mutex_);
    l_.deferred_.insert(l_.deferred_.end(), deferred_.begin(), deferred_.end());
  }

  void operator()(int64_t b) {
    if (l_.many_ties_.load(std::memory_order_relaxed)) return;
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
      if (l_.many_ties_.load(std::memory_order_relaxed)) return;  // the pass starts over
      for (int64_t i = 0; i < n; ++i) {
        if (contests_[i].deferred) {
          if (state == nullptr || !state[first + i].deferred) deferred_.push_back(rows[first + i]);
          if (state != nullptr) state[first + i].deferred = true;
          continue;
        }
        settle(contests_[i], rows[first + i]);
        if (state != nullptr && contests_[i].count > 0) state[first + i] = contests_[i].list[0];
        if (state == nullptr) l_.q_.indices[rows[first + i]] = contests_[i].count > 0 ? contests_[i].list[0].index : 0;
      }
    }
  }

  // Of the pass, for any code of the part.
  double largest_error(int64_t i, const Panel::Part& part) const {
    if (k_.coarse == nullptr) return largest_fp32_error(i, part);
    return l_.error_.of_coarse(norms_[i], largest_norm(part), raw_norm(), left_out_[i], part.left_out);
  }
  double largest_fp32_error(int64_t i, const Panel::Part& part) const {
    return l_.error_(norms_[i], largest_norm(part), raw_norm());
  }
  double largest_norm(const Panel::Part& part) const { return std::min(part.segment->largest_norm * l_.scale_, far_away); }
  double raw_norm() const { return l_.codebook_.largest_raw_norm * l_.scale_; }

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
      contest.upper = std::min(contest.upper, lowest + (l_.q_.exact ? error : 2 * error));
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
        if (l_.many_ties_.load(std::memory_order_relaxed)) return;
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
      if (!l_.q_.exact) {
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
    if (open > too_many() * n) {
      // One code that stands in every tile and is nearest to most rows (zeros, say) looks like this too: without its copies
      // there is less to defer.
      if (!l_.duplicates_dropped_) l_.many_ties_ = true;
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
    if (!l_.q_.exact) return;
    for (int64_t i = 0; i < n; ++i)
      if (thresholds_[i] > -never) set_limits(first, i, part);
    for (int64_t f = 0; f < found; ++f)
      for (uint64_t mask = masks_[f]; mask != 0; mask &= mask - 1) {
        const int i = __builtin_ctzll(mask);
        if (found_[f] == seen_[i] || minima[found_[f] * k_.rows + i] > thresholds_[i]) continue;
        contests_[i].deferred |= ++contests_[i].tiles > too_many();
        if (contests_[i].deferred) continue;
        rescore(part.tile + found_[f], first + i, rows[first + i], contests_[i], k_.codes);
        if (l_.many_ties_.load(std::memory_order_relaxed)) return;
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
    if (!(part.segment->largest_norm <= floors_[first + i]) || !l_.codebook_.all_finite) return false;
    limits_[i] = possible;
    rescore(part.tile, first + i, rows[first + i], contests_[i], 1);
    return true;
  }

  float lowest_of(int64_t i) const {
    float lowest = never;
    for (size_t s = 0; s < panel_.parts.size(); ++s) lowest = std::min(lowest, row_minima_[s * block_ + i]);
    return lowest;
  }

  // Tiles of one row in one panel whose second look costs about half of the fp32 pass over the whole panel: looking at a tile
  // again takes some 60 + dim cycles, its share of the pass dim / 2.
  int64_t too_many() const { return std::max<int64_t>(16, panel_.tiles * dim_ / (4 * (dim_ + 60))); }

  void sweep_coarse(int64_t panels) {
    const CoarsePass& pass = *k_.coarse;
    const int64_t width = k_.rows, panel_size = pass.panel_bytes(dim_), tile_size = pass.tile_bytes(dim_);
    const auto* packed = reinterpret_cast<const std::byte*>(coarse_panels_.data());
    const int64_t sub_tiles = std::max<int64_t>(2, sub_panel_bytes / tile_size / 2 * 2);
    const int64_t in_l1 = std::max<int64_t>(1, l1_bytes / panel_size);
    for (size_t s = 0; s < panel_.parts.size(); ++s) {
      const Panel::Part& part = panel_.parts[s];
      for (int64_t t = part.tile; t < part.tile + part.tiles; t += sub_tiles)
        for (int64_t p = 0; p < panels; p += in_l1)
          pass.sweep(packed + p * panel_size, std::min(in_l1, panels - p), panel_.coarse_tiles + t * tile_size, dim_,
                     std::min(sub_tiles, part.tile + part.tiles - t), l_.units_, &minima_[(p * panel_.tiles + t) * width],
                     panel_.tiles * width, &row_minima_[s * block_ + p * width]);
    }
  }

  void pack_rows(const int64_t* rows, int64_t count, int64_t padded) {
    for (int64_t i = 0; i < padded; ++i) {
      float* flat = &flat_[i * dim_];
      if (i < count) {
        const double norm = std::sqrt(l_.squared_[rows[i] - l_.first_row_]);
        const double scale = l_.l2_ ? l_.scale_ : std::ldexp(1.0, -exponent(norm));
        norms_[i] = norm * scale;
        k_.load(l_.q_.x, rows[i], l_.codebook_.mean_of_rows(), scale, flat);
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
        k_.coarse->pack_panel(&flat_[i * dim_], dim_, l_.units_, panels + i / k_.rows * k_.coarse->panel_bytes(dim_), &left_out_[i]);
      }
    }
  }

  // A component of a code that is not above it vanishes beside every component of the row.
  double floor(int64_t row, double norm) {
    const auto vanishes = [&](const Segment& s) { return s.largest_norm < norm * 0x1p-54; };
    const std::vector<Segment>& segments = l_.codebook_.segments;
    if (!l_.l2_ || l_.codebook_.centred() || std::none_of(segments.begin(), segments.end(), vanishes)) return -1;
    read_row(l_.q_.x, row, row_.data());
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
      const int64_t k = l_.codebook_.code_at((panel_.first_tile + tile) * k_.codes + j);
      const double error = l_.q_.exact ? l_.error_(norms_[i], l_.codebook_.norm(k) * l_.scale_, raw_norm()) : 0.0;
      const double lower = scores[j] - error, upper = scores[j] + error;
      if (lower > contest.upper) continue;
      contest.upper = std::min(contest.upper, upper);
      if (contest.count == Contest::capacity) settle(contest, row);
      contest.list[contest.count++] = {k, lower, upper, scores[j], !l_.q_.exact};
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
        if (!row_is_read) read_row(l_.q_.x, row, row_.data());
        row_is_read = true;
        c.value = exact_value(l_.q_.metric, row_.data(), l_.codebook_.rows, c.index);
        c.evaluated = true;
        ++exact_values_;
      }
      ++contest.ties;
      const Candidate& b = contest.list[best];
      if (c.value < b.value || (c.value == b.value && c.index < b.index)) best = i;
    }
    contest.list[0] = contest.list[best];
    contest.count = 1;
    if (contest.ties > many_ties && !l_.duplicates_dropped_) l_.many_ties_ = true;
  }

  Lookup& l_;
  const Kernels& k_;
  const int64_t dim_;
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

bool Lookup::pass(const std::vector<int64_t>& rows) {
  const int64_t count = static_cast<int64_t>(rows.size()), tiles = codebook_.tiles();
  const int64_t tile_bytes = k_.codes * dim_ * int64_t{sizeof(float)};
  const int64_t tiles_at_once = std::clamp<int64_t>(std::min(panel_bytes / tile_bytes, panel_codes / k_.codes), 1, tiles);
  Scratch packed(tiles_at_once * k_.codes * dim_ + 64), norms(tiles_at_once * k_.codes + 64);
  const int64_t coarse_tile = k_.coarse == nullptr ? 0 : k_.coarse->tile_bytes(dim_);
  Scratch coarse_packed(tiles_at_once * coarse_tile / int64_t{sizeof(float)}), left_out(tiles_at_once);
  auto* coarse_tiles = reinterpret_cast<std::byte*>(coarse_packed.data());

  const int64_t threads = torch::stable::get_num_threads(), row_bytes = dim_ * int64_t{sizeof(float)};
  int64_t block = std::min({block_rows, block_bytes / row_bytes, 2 * block_bytes / (tiles_at_once * int64_t{sizeof(float)})});
  block = std::clamp<int64_t>(block / k_.rows * k_.rows, k_.rows, round_to((count + threads - 1) / threads, k_.rows));

  std::vector<Candidate> state(tiles_at_once == tiles ? 0 : count);
  for (int64_t first = 0; first < tiles; first += tiles_at_once) {
    Panel panel{first, std::min(tiles_at_once, tiles - first), packed.data(), norms.data(), coarse_tiles, {}};
    for (const Segment& s : codebook_.segments) {
      const int64_t begin = std::max(s.first_tile, first), end = std::min(s.first_tile + s.tiles, first + panel.tiles);
      if (begin < end) panel.parts.push_back({begin - first, end - begin, &s, 0.0});
    }
    parallel(panel.tiles, k_.codes * dim_, [&](int64_t begin, int64_t end) {
      codebook_.pack(first + begin, first + end, scale_, &packed[begin * k_.codes * dim_], &norms[begin * k_.codes], units_,
                     coarse_tiles + begin * coarse_tile, &left_out[begin]);
    });
    if (k_.coarse != nullptr)
      for (Panel::Part& part : panel.parts)
        part.left_out = *std::max_element(&left_out[part.tile], &left_out[part.tile] + part.tiles);
    parallel_on_demand((count + block - 1) / block,
                       [&] { return Worker(*this, panel, rows, block, state.empty() ? nullptr : state.data()); });
    if (many_ties_.exchange(false)) {
      deferred_.clear();
      return false;
    }
  }
  for (size_t i = 0; i < state.size(); ++i)
    if (!state[i].deferred) q_.indices[rows[i]] = std::max<int64_t>(state[i].index, 0);
  return true;
}

}  // namespace

// A coarse pass packs the codebook twice and takes the same time for 1 to 32 (AMX) dimensions. One Xeon, ms:
//   32768x8192x3   fp32 15.7, AMX 28.8     4096x8192x4  fp32 5.0, VNNI 5.7     480x16384x8  fp32 2.3, VNNI 3.1
//   8192x16384x8   fp32 25.0, VNNI 21.2, AMX 21.7           4096x8192x16  fp32 10.6, VNNI 7.8, AMX 4.6
//   65536x256x32   fp32 10.3, AMX 10.6     4096x4096x12 fp32 2.2, AMX 1.8      4096x8192x256  fp32 84, AMX 25
InstructionSet suited_to(const Rows& x, const Rows& codebook, bool exact) {
  const InstructionSet set = selected();
  if (selected_by_name()) return set;
  const int64_t dim = codebook.dim;
  const bool many_codes = codebook.count * dim >= 32 * 1024;
  if (set == InstructionSet::amx && dim >= 12 && many_codes) return set;
  if (set == InstructionSet::amx || set == InstructionSet::avx512_vnni) {
    // An index that is not exact must not depend on how many rows there are.
    const bool packing_pays = !exact || x.count >= 1024;
    return dim >= 6 && many_codes && packing_pays ? InstructionSet::avx512_vnni : InstructionSet::avx512;
  }
  return set;
}

void nearest_code(const Query& query, InstructionSet set, Counters* counters) {
  if (query.x.count == 0) return;
  Lookup lookup(query, set);
  lookup.run();
  if (counters != nullptr) *counters = lookup.counters();
}

}  // namespace mmgen_kernels::vq
