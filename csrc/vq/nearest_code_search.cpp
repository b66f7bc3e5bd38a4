// The lookup around the inner loops: scaling and centring, the error bound, candidates, and their comparison in fp64.
// Names and formulas follow docs/vq.md, "How the index is certified".
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "vq/exact.h"
#include "vq/nearest_code.h"

namespace mmgen_kernels::vq {
namespace {

constexpr double infinity = std::numeric_limits<double>::infinity();
constexpr int64_t rows_at_once = 1 << 16;        // bounds the state kept per row
constexpr int64_t panel_bytes = 8 << 20;         // packed codes shared by the threads at a time
constexpr int64_t panel_codes = 24 * 1024;       // bounds the tile minima: 2 KiB per row at 12 codes a tile
constexpr int64_t sub_panel_bytes = 256 << 10;   // stays in L2 while every panel of a block of rows passes
constexpr int64_t block_bytes = 512 << 10;       // rows of a block, and their tile minima
constexpr int class_width = 40;                  // log2 of the magnitudes that share one scale
constexpr float never = 3e38f;                   // score of a code that cannot win
constexpr double far_away = 0x1p44;              // norm, in scaled units, beyond which a code cannot win
constexpr int64_t many_exact_values = 32;        // from one row: look for duplicated codes

// What is known of a row between panels of the codebook: its best code so far, and an interval around that code's score.
struct Candidate {
  int64_t index = -1;
  double lower = -infinity;
  double upper = infinity;
  double value = infinity;  // in fp64, once evaluated
  bool evaluated = false;
};

enum RowClass : int8_t { settled = 127, zero = 126, brute = 125 };  // others: magnitude class

const Kernels& kernels_of(InstructionSet set) {
#if defined(__x86_64__)
  if (set == InstructionSet::avx512) return avx512_kernels;
  if (set == InstructionSet::avx2) return avx2_kernels;
#endif
  return scalar_kernels;
}

template <class F>
void parallel(int64_t count, int64_t grain, const F& f) {
  if (count > 0) torch::stable::parallel_for(0, count, std::max<int64_t>(grain, 1), f);
}

float round_up(double x) { return std::nextafter(static_cast<float>(x), std::numeric_limits<float>::max()); }

int exponent(double norm) { return norm > 0 ? std::ilogb(norm) : 0; }

class Lookup {
 public:
  Lookup(const Query& query, const Kernels& kernels, Counters* counters)
      : q_(query), k_(kernels), counters_(counters), dim_(query.x.dim), codes_(query.codebook.count) {
    const double u32 = 0x1p-24, u64 = 0x1p-53;
    pass_error_ = 1.02 * (dim_ + 8) * u32;
    value_error_ = 1.02 * (dim_ + 4) * u64;
    underflow_error_ = (dim_ + 4) * 0x1p-124;
  }

  void run() {
    measure_codebook();
    for (int64_t start = 0; start < q_.x.count; start += rows_at_once)
      search_rows(start, std::min(rows_at_once, q_.x.count - start));
    if (counters_ != nullptr) {
      counters_->rescored_tiles += rescored_tiles_;
      counters_->exact_values += exact_values_;
      counters_->brute_force_rows += brute_rows_;
    }
  }

 private:
  bool l2() const { return q_.metric == Metric::l2; }

  // The vector that the pass sees of code k, in fp64: c - mean, or for cosine c / |c| - mean. Returns its squared norm.
  double read_code(int64_t k, const double* mean, double* out) const {
    if (q_.metric != Metric::cosine) return k_.read(q_.codebook, k, mean, out);
    const double norm = std::sqrt(k_.read(q_.codebook, k, nullptr, out));
    double sum = 0;
    for (int64_t d = 0; d < dim_; ++d) {
      out[d] = (norm == 0 ? 0 : out[d] / norm) - (mean == nullptr ? 0 : mean[d]);
      sum += out[d] * out[d];
    }
    return sum;
  }

  // Norms, and whether subtracting the codebook's mean is worth it: distances do not change, their rounding errors do. With
  // an offset of 1e4 the fp32 pass could not tell any two codes apart without it.
  void measure_codebook() {
    constexpr int64_t chunk = 1024;  // fixed, so that the mean does not depend on the number of threads
    const int64_t chunks = (codes_ + chunk - 1) / chunk;
    squared_norms_.resize(codes_);
    std::vector<double> sums(chunks * dim_, 0.0), squares(chunks, 0.0);
    parallel(chunks, std::max<int64_t>(1, 16 * 1024 / (chunk * dim_)), [&](int64_t begin, int64_t end) {
      std::vector<double> code(dim_);
      for (int64_t i = begin; i < end; ++i)
        for (int64_t k = i * chunk; k < std::min(codes_, (i + 1) * chunk); ++k) {
          const double squared = squared_norms_[k] = read_code(k, nullptr, code.data());
          if (!std::isfinite(squared)) continue;
          squares[i] += squared;
          for (int64_t d = 0; d < dim_; ++d) sums[i * dim_ + d] += code[d];
        }
    });
    double total = 0, largest = 0, smallest = infinity;
    int64_t finite = 0;
    mean_.assign(dim_, 0.0);
    for (int64_t i = 0; i < chunks; ++i) {
      total += squares[i];
      for (int64_t d = 0; d < dim_; ++d) mean_[d] += sums[i * dim_ + d];
    }
    for (const double squared : squared_norms_) {
      if (!std::isfinite(squared)) continue;
      ++finite;
      largest = std::max(largest, squared);
      smallest = std::min(smallest, squared);
    }
    largest_raw_norm_ = std::sqrt(largest);
    if (finite == 0) {
      no_finite_code_ = true;
      brute_force_all_ = true;
      return;
    }
    // Outside these bounds squares of fp64 input overflow or vanish; nothing narrower than fp64 reaches them.
    const bool extreme = largest > 0x1p800 || (largest > 0 && smallest < 0x1p-800);
    brute_force_all_ = (q_.codebook.dtype == Float::fp64 && extreme) || (finite < codes_ && !l2());
    double mean_squared = 0;
    for (double& m : mean_) {
      m /= finite;
      mean_squared += m * m;
    }
    centred_ = mean_squared > 0.5 * (total / finite);
    if (centred_) {
      parallel(chunks, std::max<int64_t>(1, 16 * 1024 / (chunk * dim_)), [&](int64_t begin, int64_t end) {
        std::vector<double> code(dim_);
        for (int64_t k = begin * chunk; k < std::min(codes_, end * chunk); ++k)
          if (std::isfinite(squared_norms_[k])) squared_norms_[k] = read_code(k, mean_.data(), code.data());
      });
      total = 0, largest = 0, smallest = infinity;
      for (const double squared : squared_norms_) {
        if (!std::isfinite(squared)) continue;
        total += squared;
        largest = std::max(largest, squared);
        smallest = std::min(smallest, squared);
      }
    }
    smallest_norm_ = std::sqrt(smallest);
    largest_norm_ = std::sqrt(largest);
    anchor_ = l2() ? exponent(std::sqrt(total / finite)) : exponent(largest_norm_);
  }

  const double* mean_of_rows() const { return l2() && centred_ ? mean_.data() : nullptr; }
  const double* mean_of_codes() const { return centred_ ? mean_.data() : nullptr; }

  bool is_zero(int64_t row) const {
    return with_row(q_.x, row, [&](const auto* p) {
      for (int64_t d = 0; d < dim_; ++d)
        if (!(widen(p[d]) == 0)) return false;
      return true;
    });
  }

  // What a row needs: nothing more, the answer for the zero row, brute force, or the pass at the scale of its class.
  int8_t classify(int64_t row, double* scratch) {
    if (q_.mask != nullptr && !q_.mask[row]) {
      q_.indices[row] = -1;
      return settled;
    }
    q_.indices[row] = 0;
    // Zero rows are common (padding), and all codes of a normalised codebook tie for them: answered once.
    if (is_zero(row)) return l2() ? zero : (brute_force_all_ ? brute : settled);
    const double squared = k_.read(q_.x, row, mean_of_rows(), scratch);
    if (q_.x.dtype == Float::fp64 && !(squared > 0x1p-800 && squared < 0x1p800)) return brute;
    if (!std::isfinite(squared)) return l2() ? settled : brute;  // every distance is Inf or NaN: index 0
    if (brute_force_all_) return no_finite_code_ && l2() ? settled : brute;
    if (!l2()) return 0;  // the score is linear in the row, which is scaled by itself
    const int magnitude = exponent(std::max(std::sqrt(squared), smallest_norm_)) - anchor_;
    return static_cast<int8_t>(std::lround(double(magnitude) / class_width));
  }

  void search_rows(int64_t start, int64_t count) {
    std::vector<int8_t> classes(count);
    parallel(count, 16 * 1024 / dim_, [&](int64_t begin, int64_t end) {
      std::vector<double> scratch(dim_);
      for (int64_t i = begin; i < end; ++i) classes[i] = classify(start + i, scratch.data());
    });
    std::vector<std::vector<int64_t>> lists(256);
    for (int64_t i = 0; i < count; ++i) lists[static_cast<uint8_t>(classes[i])].push_back(start + i);
    for (const int64_t row : lists[zero]) {
      std::call_once(zero_once_, [&] { zero_index_ = nearest_by_brute_force(row); });
      q_.indices[row] = zero_index_;
    }
    parallel(static_cast<int64_t>(lists[brute].size()), 1, [&](int64_t begin, int64_t end) {
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
    for (int64_t k = 0; k < codes_; ++k) {
      const double value = exact_value(q_.metric, x.data(), q_.codebook, k);
      if (value < best) best = value, index = k;
    }
    exact_values_ += codes_;
    return index;
  }

  // All rows whose magnitude suits one scale of the codebook.
  void search_class(const std::vector<int64_t>& rows, int row_class) {
    scale_ = std::ldexp(1.0, -(anchor_ + class_width * row_class));
    const int64_t tile_bytes = k_.codes * dim_ * int64_t{sizeof(float)};
    const int64_t tiles = (codes_ + k_.codes - 1) / k_.codes;
    const int64_t tiles_at_once =
        std::clamp<int64_t>(std::min(panel_bytes / tile_bytes, panel_codes / k_.codes), 1, tiles);
    std::vector<float> packed(tiles_at_once * k_.codes * dim_ + 64), norms(tiles_at_once * k_.codes + 64);

    int64_t block = std::min(block_bytes / (dim_ * int64_t{sizeof(float)}), 2 * block_bytes / (tiles_at_once * int64_t{sizeof(float)}));
    const int64_t share = (static_cast<int64_t>(rows.size()) + torch::stable::get_num_threads() - 1) / torch::stable::get_num_threads();
    block = std::clamp<int64_t>(std::min<int64_t>(block, 256), k_.rows, (share + k_.rows - 1) / k_.rows * k_.rows);
    block = block / k_.rows * k_.rows;
    const int64_t blocks = (static_cast<int64_t>(rows.size()) + block - 1) / block;

    const bool one_panel = tiles_at_once == tiles;
    std::vector<Candidate> state(one_panel ? 0 : rows.size());
    for (int64_t first_tile = 0; first_tile < tiles; first_tile += tiles_at_once) {
      const int64_t panel_tiles = std::min(tiles_at_once, tiles - first_tile);
      parallel(panel_tiles, 4096 / (k_.codes * dim_), [&](int64_t begin, int64_t end) {
        pack_codes(first_tile, begin, end, packed.data(), norms.data());
      });
      const CodePanel panel{first_tile, panel_tiles, packed.data(), norms.data()};
      // Blocks are handed out one by one: a thread that shares its core with somebody else takes fewer.
      std::atomic<int64_t> next{0};
      parallel(std::min<int64_t>(blocks, torch::stable::get_num_threads()), 1, [&](int64_t, int64_t) {
        Worker worker(*this, block, panel_tiles);
        for (int64_t b = next++; b < blocks; b = next++) {
          const int64_t first = b * block, n = std::min<int64_t>(block, static_cast<int64_t>(rows.size()) - first);
          worker.search(panel, rows.data() + first, n, one_panel ? nullptr : state.data() + first);
        }
      });
    }
    for (size_t i = 0; i < state.size(); ++i) q_.indices[rows[i]] = std::max<int64_t>(state[i].index, 0);
  }

  struct CodePanel {
    int64_t first_tile, tiles;
    const float* packed;
    const float* norms;
  };

  void pack_codes(int64_t first_tile, int64_t begin, int64_t end, float* packed, float* norms) const {
    std::vector<double> code(dim_);
    for (int64_t t = begin; t < end; ++t)
      for (int64_t j = 0; j < k_.codes; ++j) {
        const int64_t k = (first_tile + t) * k_.codes + j;
        float* out = packed + t * k_.codes * dim_ + j;
        const bool possible = k < codes_ && scaled_norm(k) <= far_away;
        if (possible) {
          read_code(k, mean_of_codes(), code.data());
          k_.pack(code.data(), l2() ? -2 * scale_ : -scale_, dim_, k_.codes, out);
        } else {
          for (int64_t d = 0; d < dim_; ++d) out[d * k_.codes] = 0;
        }
        const double norm_term = l2() && possible ? squared_norms_[k] * scale_ * scale_ : 0.0;
        norms[t * k_.codes + j] = possible ? static_cast<float>(norm_term) : never;
      }
  }

  double scaled_norm(int64_t k) const { return std::sqrt(squared_norms_[k]) * scale_; }  // NaN for a code that is not finite

  // The bound: how far a score of the pass may lie from the score that the fp64 value implies. r, n: scaled norms.
  double error(double r, double n) const {
    const double tiny = underflow_error_ * (1 + r + n);
    if (l2()) return (pass_error_ + 2 * value_error_) * n * n + 2 * pass_error_ * r * n + 2 * value_error_ * r * r + tiny;
    return pass_error_ * r * n + value_error_ * r * (largest_raw_norm() * scale_) + tiny;
  }
  double largest_raw_norm() const { return q_.metric == Metric::cosine ? 1.0 : largest_raw_norm_; }

  // canonical_[k]: the lowest code equal to code k. Equal codes tie exactly and the lowest wins, so that the others never
  // need to be looked at. Built at most once per call, when some row has met many exact ties.
  void find_duplicates() {
    std::call_once(duplicates_once_, [&] {
      canonical_.resize(codes_);
      std::unordered_multimap<uint64_t, int64_t> seen;
      std::vector<double> a(dim_), b(dim_);
      for (int64_t k = 0; k < codes_; ++k) {
        read_row(q_.codebook, k, a.data());
        uint64_t hash = 1469598103934665603ull;
        for (double& v : a) {
          v += 0.0;  // -0 equals 0
          uint64_t bits;
          std::memcpy(&bits, &v, 8);
          hash = (hash ^ bits ^ (bits >> 29)) * 1099511628211ull;
        }
        canonical_[k] = k;
        const auto [begin, end] = seen.equal_range(hash);
        for (auto it = begin; it != end; ++it) {
          read_row(q_.codebook, it->second, b.data());
          if (std::equal(a.begin(), a.end(), b.begin())) {
            canonical_[k] = it->second;
            break;
          }
        }
        if (canonical_[k] == k) seen.emplace(hash, k);
      }
      const int64_t tiles = (codes_ + k_.codes - 1) / k_.codes;
      tile_of_duplicates_.assign(tiles, true);
      for (int64_t k = 0; k < codes_; ++k)
        if (canonical_[k] == k) tile_of_duplicates_[k / k_.codes] = false;
      duplicates_known_.store(true, std::memory_order_release);
    });
  }

  // One thread's scratch, and the search of one block of rows in one panel of codes.
  class Worker {
   public:
    Worker(Lookup& lookup, int64_t block, int64_t tiles)
        : l_(lookup), k_(lookup.k_), dim_(lookup.dim_), panels_(block * dim_), flat_(block * dim_), norms_(block),
          largest_errors_(block), minima_(block * tiles), row_minima_(block), thresholds_(block), masks_(tiles), row_(dim_) {}

    ~Worker() {
      l_.rescored_tiles_ += rescored_tiles_;
      l_.exact_values_ += exact_values_;
    }

    void search(const CodePanel& panel, const int64_t* rows, int64_t count, Candidate* state) {
      const int64_t width = k_.rows, panels = (count + width - 1) / width;
      pack_rows(rows, count, panels * width);
      std::fill_n(row_minima_.begin(), panels * width, never);
      const int64_t sub_tiles = std::max<int64_t>(1, sub_panel_bytes / (k_.codes * dim_ * int64_t{sizeof(float)}));
      for (int64_t t = 0; t < panel.tiles; t += sub_tiles)
        for (int64_t p = 0; p < panels; ++p)
          k_.sweep(&panels_[p * width * dim_], panel.packed + t * k_.codes * dim_, panel.norms + t * k_.codes, dim_,
                   std::min(sub_tiles, panel.tiles - t), &minima_[(p * panel.tiles + t) * width], &row_minima_[p * width]);
      for (int64_t i = 0; i < panels * width; ++i) {
        largest_errors_[i] = l_.error(norms_[i], l_.largest_scaled_norm());
        const bool possible = i < count && row_minima_[i] < never;
        thresholds_[i] = possible ? round_up(row_minima_[i] + 2 * largest_errors_[i]) : -never;
      }
      contests_.assign(width, Contest{});
      for (int64_t p = 0; p < panels; ++p) {
        const int64_t first = p * width, n = std::min(width, count - first);
        for (int64_t i = 0; i < n; ++i) {
          // the code that gave the row's minimum bounds the winner's score
          const double upper = row_minima_[first + i] + (l_.q_.exact ? 1 : 2) * largest_errors_[first + i];
          contests_[i].start(state == nullptr ? Candidate{} : state[first + i], upper);
        }
        k_.compare(&minima_[p * panel.tiles * width], panel.tiles, &thresholds_[first], masks_.data());
        for (int64_t t = 0; t < panel.tiles; ++t)
          for (uint32_t mask = masks_[t]; mask != 0; mask &= mask - 1) {
            const int i = __builtin_ctz(mask);
            rescore(panel, t, first + i, rows[first + i], contests_[i]);
          }
        for (int64_t i = 0; i < n; ++i) {
          settle(contests_[i], rows[first + i]);
          if (state == nullptr)
            l_.q_.indices[rows[first + i]] = contests_[i].count > 0 ? contests_[i].list[0].index : 0;
          else if (contests_[i].count > 0)
            state[first + i] = contests_[i].list[0];
        }
      }
    }

   private:
    // The codes of one row that the bound cannot tell apart.
    struct Contest {
      static constexpr int capacity = 8;
      Candidate list[capacity];
      int count = 0;
      double upper = infinity;  // the winner's score is not above it
      int64_t evaluations = 0;

      void start(const Candidate& champion, double panel_upper) {
        count = 0;
        upper = std::min(champion.upper, panel_upper);
        evaluations = 0;
        if (champion.index >= 0) list[count++] = champion;
      }
    };

    void pack_rows(const int64_t* rows, int64_t count, int64_t padded) {
      const int64_t width = k_.rows;
      for (int64_t i = 0; i < padded; ++i) {
        float* column = &panels_[(i / width) * width * dim_ + i % width];
        float* flat = &flat_[i * dim_];
        if (i < count) {
          const double norm = std::sqrt(k_.read(l_.q_.x, rows[i], l_.mean_of_rows(), row_.data()));
          const double scale = l_.l2() ? l_.scale_ : std::ldexp(1.0, -exponent(norm));
          norms_[i] = norm * scale;
          k_.pack(row_.data(), scale, dim_, 1, flat);
        } else {
          norms_[i] = 0;
          std::fill_n(flat, dim_, 0.0f);
        }
        for (int64_t d = 0; d < dim_; ++d) column[d * width] = flat[d];
      }
    }

    void rescore(const CodePanel& panel, int64_t tile, int64_t i, int64_t row, Contest& contest) {
      const bool skip_duplicates = l_.duplicates_known_.load(std::memory_order_acquire);
      if (skip_duplicates && l_.tile_of_duplicates_[panel.first_tile + tile]) return;
      ++rescored_tiles_;
      float scores[64];
      const float limit = round_up(contest.upper + largest_errors_[i]);
      k_.rescore(&flat_[i * dim_], panel.packed + tile * k_.codes * dim_, panel.norms + tile * k_.codes, dim_, scores);
      for (int64_t j = 0; j < k_.codes; ++j) {
        if (!(scores[j] <= limit && scores[j] < never)) continue;
        const int64_t k = (panel.first_tile + tile) * k_.codes + j;
        if (skip_duplicates && l_.canonical_[k] != k) continue;
        const double error = l_.q_.exact ? l_.error(norms_[i], l_.scaled_norm(k)) : 0.0;
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
          c.value = exact_value(l_.q_.metric, row_.data(), l_.q_.codebook, c.index);
          c.evaluated = true;
          ++exact_values_;
          ++contest.evaluations;
        }
        const Candidate& b = contest.list[best];
        if (c.value < b.value || (c.value == b.value && c.index < b.index)) best = i;
      }
      contest.list[0] = contest.list[best];
      contest.count = 1;
      if (contest.evaluations > many_exact_values) l_.find_duplicates();
    }

    Lookup& l_;
    const Kernels& k_;
    const int64_t dim_;
    std::vector<float> panels_;  // [panel][dim][row]
    std::vector<float> flat_;    // [row][dim]
    std::vector<double> norms_, largest_errors_;
    std::vector<float> minima_;  // [panel][tile][row]
    std::vector<float> row_minima_, thresholds_;
    std::vector<uint32_t> masks_;
    std::vector<double> row_;
    std::vector<Contest> contests_;
    int64_t rescored_tiles_ = 0, exact_values_ = 0;
  };

  double largest_scaled_norm() const { return std::min(largest_norm_ * scale_, far_away); }

  const Query& q_;
  const Kernels& k_;
  Counters* counters_;
  const int64_t dim_, codes_;
  double pass_error_, value_error_, underflow_error_;

  std::vector<double> squared_norms_;  // of what the pass sees; not finite for a code that is not
  std::vector<double> mean_;
  double smallest_norm_ = 0, largest_norm_ = 0, largest_raw_norm_ = 0, scale_ = 1;
  int anchor_ = 0;
  bool centred_ = false, brute_force_all_ = false, no_finite_code_ = false;

  std::once_flag zero_once_, duplicates_once_;
  int64_t zero_index_ = 0;
  std::vector<int64_t> canonical_;
  std::vector<bool> tile_of_duplicates_;
  std::atomic<bool> duplicates_known_{false};
  std::atomic<int64_t> rescored_tiles_{0}, exact_values_{0};
  int64_t brute_rows_ = 0;
};

}  // namespace

void nearest_code(const Query& query, InstructionSet set, Counters* counters) {
  if (query.x.count > 0) Lookup(query, kernels_of(set), counters).run();
}

}  // namespace mmgen_kernels::vq
