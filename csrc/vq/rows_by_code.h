// Rows sorted by their code, and sums over the rows of each code: the same bits in every run and for every number of threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "parallel.h"

namespace mmgen_kernels::vq {

// Slot h K + k is code k of head h. Its rows, numbered through all heads, are order[start[slot]] .. order[start[slot + 1] - 1],
// ascending. A row with an index below 0, or not in the mask, is in no slot; an index past the end means the last code. `stride` is
// the distance from one row's index to the next row's.
struct RowsByCode {
  int64_t slots;
  std::vector<int64_t> start, order;

  RowsByCode(const int64_t* index, const bool* mask, int64_t heads, int64_t count, int64_t num_codes, int64_t stride = 1)
      : slots(heads * num_codes), start(slots + 1, 0) {
    const auto slot_of = [&](int64_t h, int64_t i) -> int64_t {
      if (index[i * stride] < 0 || (mask != nullptr && !mask[i])) return -1;
      return h * num_codes + std::min(index[i * stride], num_codes - 1);
    };
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t i = h * count; i < (h + 1) * count; ++i)
        if (const int64_t slot = slot_of(h, i); slot >= 0) ++start[slot + 1];
    std::partial_sum(start.begin(), start.end(), start.begin());
    order.resize(start[slots]);
    std::vector<int64_t> next(start.begin(), start.end() - 1);
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t i = h * count; i < (h + 1) * count; ++i)
        if (const int64_t slot = slot_of(h, i); slot >= 0) order[next[slot]++] = i;
  }

  int64_t count(int64_t slot) const { return start[slot + 1] - start[slot]; }
};

// For each slot done(slot, sum), where sum (dim) has been through add(row, sum) for all its rows in their order. A slot with many rows is
// summed in pieces, added in their order, so that one popular code does not keep all threads but one waiting.
template <class Add, class Done>
void sum_by_code(const RowsByCode& rows, int64_t dim, const Add& add, const Done& done) {
  constexpr int64_t piece_rows = 512;
  struct Piece {
    int64_t slot, first, last, partial;  // partial: where a piece of several leaves its sum, or -1
  };
  std::vector<Piece> pieces;
  pieces.reserve(rows.slots);
  std::vector<int64_t> divided;  // slots
  int64_t partials = 0;
  for (int64_t slot = 0; slot < rows.slots; ++slot) {
    const bool several = rows.count(slot) > piece_rows;
    if (several) divided.push_back(slot);
    int64_t first = rows.start[slot];
    do {
      const int64_t last = std::min(first + piece_rows, rows.start[slot + 1]);
      pieces.push_back({slot, first, last, several ? partials++ : -1});
      first = last;
    } while (first < rows.start[slot + 1]);
  }
  std::vector<double> sums(partials * dim, 0.0);
  const auto total = static_cast<int64_t>(rows.order.size());
  parallel(static_cast<int64_t>(pieces.size()), dim * (1 + total / std::max<int64_t>(1, rows.slots)), [&](int64_t begin, int64_t end) {
    std::vector<double> own(dim);
    for (int64_t p = begin; p < end; ++p) {
      double* sum = own.data();
      if (pieces[p].partial < 0) std::fill(own.begin(), own.end(), 0.0);
      else sum = sums.data() + pieces[p].partial * dim;
      for (int64_t j = pieces[p].first; j < pieces[p].last; ++j) add(rows.order[j], sum);
      if (pieces[p].partial < 0) done(pieces[p].slot, sum);
    }
  });
  double* sum = sums.data();
  for (const int64_t slot : divided) {
    const int64_t parts = (rows.count(slot) + piece_rows - 1) / piece_rows;
    for (int64_t part = 1; part < parts; ++part)
      for (int64_t d = 0; d < dim; ++d) sum[d] += sum[part * dim + d];
    done(slot, sum);
    sum += parts * dim;
  }
}

}  // namespace mmgen_kernels::vq
