// The lookup: what each row needs, the passes over all codes, and what one pass leaves to the next. Names and formulas follow
// docs/vq.md, "How the index is certified".
#include <algorithm>
#include <atomic>
#include <cmath>
#include <iterator>
#include <limits>
#include <memory>
#include <utility>
#include <vector>

#include "aligned.h"
#include "parallel.h"
#include "vq/block_search.h"
#include "vq/exact.h"

namespace mmgen_kernels::vq {
namespace {

constexpr double infinity = std::numeric_limits<double>::infinity();
constexpr int64_t rows_at_once = 1 << 16;   // bounds the state kept per row
constexpr int64_t panel_bytes = 8 << 20;    // packed codes shared by the threads at a time
constexpr int64_t panel_codes = 24 * 1024;  // bounds the tile minima: 11 KiB per row at 9 codes a tile
constexpr int class_width = 40;             // log2 of the magnitudes that share one scale

// What a row needs: nothing more, the answer for the zero row, brute force, or (any other value) the pass at that class's scale.
enum RowClass : int8_t { settled = 127, zero = 126, brute = 125 };

const Kernels& kernels_of(InstructionSet set) {
  switch (set) {
#if defined(__x86_64__)
    case InstructionSet::amx:
      return amx_kernels;
    case InstructionSet::avx512_bf16:  // sums in 32-bit integers are exact, and as fast
    case InstructionSet::avx512_vnni:
      return avx512_vnni_kernels;
    case InstructionSet::avx512:
      return avx512_kernels;
    case InstructionSet::avx2:
      return avx2_kernels;
#endif
    case InstructionSet::scalar_bf16:
      return scalar_bf16_kernels;
    case InstructionSet::scalar_int16:
      return scalar_int16_kernels;
    default:
      return scalar_kernels;
  }
}

// What takes the rows for which a coarse pass decides too little.
InstructionSet next_after(InstructionSet set) {
  return set >= InstructionSet::avx512_vnni ? InstructionSet::avx512 : InstructionSet::scalar;
}

// Of a pass in 16-bit integers, in scaled units: room for rows of norm 8 and codes of 8 where the codes' root mean square is in
// [1, 2), and for both of 2 where rows are scaled by themselves. Sums then stay below 1.5 * 2^30.
Units units_of(Metric metric) {
  if (metric == Metric::l2) return {0x1p-12f, 0x1p-11f};
  return {0x1p-14f, 0x1p-14f};
}

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
    Counters all = next_ == nullptr ? Counters{} : next_->counters();
    all.rescored_tiles += rescored_tiles_;
    all.exact_values += exact_values_;
    all.deferred_rows += deferred_rows_;
    all.brute_force_rows += brute_rows_;
    return all;
  }

 private:
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
    const bool known = q_.squared != nullptr && codebook_.mean_of_rows() == nullptr;
    // Zero rows are common (padding), and all codes of a normalised codebook tie for them: answered once.
    if ((!known || q_.squared[row] == 0) && is_zero(row)) return l2_ ? zero : (brute_force_all_ ? brute : settled);
    squared = known ? q_.squared[row] : k_.squared_norm(q_.x, row, codebook_.mean_of_rows());
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
    if (next_ == nullptr) next_ = std::make_unique<Lookup>(q_, next_after(set_));
    next_->squared_ = squared_;
    next_->first_row_ = first_row_;
    std::sort(deferred_.begin(), deferred_.end());
    deferred_rows_ += static_cast<int64_t>(deferred_.size());
    next_->search_class(deferred_, row_class);
    deferred_.clear();
  }

  // Tiles of one row in one panel whose second look costs about half of the fp32 pass over the whole panel: looking at a tile
  // again takes some 60 + dim cycles, its share of the pass dim / 2.
  int64_t tiles_worth_deferring(int64_t tiles) const { return std::max<int64_t>(16, tiles * dim_ / (4 * (dim_ + 60))); }

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
  int64_t zero_index_ = -1, brute_rows_ = 0, deferred_rows_ = 0;
  std::vector<int64_t> deferred_;  // rows of this class
  std::unique_ptr<Lookup> next_;   // for them
  int64_t rescored_tiles_ = 0;
  std::atomic<int64_t> exact_values_{0};
};

bool Lookup::pass(const std::vector<int64_t>& rows) {
  const int64_t count = static_cast<int64_t>(rows.size()), tiles = codebook_.tiles();
  const int64_t tile_bytes = k_.codes * dim_ * int64_t{sizeof(float)};
  const int64_t tiles_at_once = std::clamp<int64_t>(std::min(panel_bytes / tile_bytes, panel_codes / k_.codes), 1, tiles);
  Scratch packed(tiles_at_once * k_.codes * dim_ + 64), norms(tiles_at_once * k_.codes + 64);
  const int64_t coarse_tile = k_.coarse == nullptr ? 0 : k_.coarse->tile_bytes(dim_);
  Scratch coarse_packed(tiles_at_once * coarse_tile / int64_t{sizeof(float)}), left_out(tiles_at_once);
  auto* coarse_tiles = reinterpret_cast<std::byte*>(coarse_packed.data());

  Pass pass{q_, k_, codebook_, error_, units_, scale_, squared_.data(), first_row_, duplicates_dropped_, tiles_worth_deferring(tiles_at_once)};
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t share = ((count + threads - 1) / threads + k_.rows - 1) / k_.rows * k_.rows;
  const int64_t block = std::min(rows_of_block(k_, dim_, tiles_at_once), share);

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
    search_blocks(pass, panel, rows, block, state.empty() ? nullptr : state.data());
    if (pass.many_ties) break;
  }
  rescored_tiles_ += pass.rescored_tiles;
  exact_values_ += pass.exact_values;
  if (pass.many_ties) return false;
  deferred_ = std::move(pass.deferred);
  for (size_t i = 0; i < state.size(); ++i)
    if (!state[i].deferred) q_.indices[rows[i]] = std::max<int64_t>(state[i].index, 0);
  return true;
}

}  // namespace

// A coarse pass packs the codebook twice, and on AMX takes the same time for 1 to 9 and for 10 to 29 dimensions. One Xeon, ms:
//   16384x16384x4   fp32 21.6  VNNI 21.6  AMX 27.1      512x16384x8    fp32 1.7  VNNI 2.1  AMX 2.4
//   8192x8192x6     fp32 7.4   VNNI 6.9   AMX 7.4       1024x16384x8   fp32 2.6  VNNI 2.5  AMX 2.5
//   16384x16384x8   fp32 27.4  VNNI 22.7  AMX 21.2      512x4096x64    fp32 2.2  VNNI 1.8  AMX 1.7
//   8192x8192x10    fp32 10.5  VNNI 8.3   AMX 7.4       4096x8192x256  fp32 114  VNNI 65   AMX 52
InstructionSet suited_to(const Rows& x, const Rows& codebook, bool exact) {
  const InstructionSet set = selected();
  if (selected_by_name() || set < InstructionSet::avx512_vnni) return set;
  const int64_t dim = codebook.dim;
  // An index that is not exact must not depend on how many rows there are.
  const bool packing_pays = codebook.count * dim >= 32 * 1024 && (!exact || x.count >= 1024 || dim >= 12);
  if (!packing_pays || dim < 6) return InstructionSet::avx512;
  return set == InstructionSet::amx && dim >= 8 ? set : InstructionSet::avx512_vnni;
}

void nearest_code(const Query& query, InstructionSet set, Counters* counters) {
  if (query.x.count == 0) return;
  Lookup lookup(query, set);
  lookup.run();
  if (counters != nullptr) *counters = lookup.counters();
}

}  // namespace mmgen_kernels::vq
