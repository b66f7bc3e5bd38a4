// What the inner loops of code_entropy are given and what they do, one table of them per instruction set.
#pragma once

#include <cstdint>

#include "simd/tables.h"

namespace mmgen_kernels::vq::entropy {

constexpr int64_t tile_codes = 64;  // codes whose scores with a panel of rows are held at a time: they stay in L1
constexpr double negligible = -64;  // score below the largest at which a code has no share in gradients: 2^31 of them have 3e-19
constexpr double nowhere = 1e30;    // the largest score of a row that only fills a panel: all its probabilities are 0

// Of the rows of a panel, lane by lane. A row's probabilities are e^(score - largest) / total: what dominates keeps its digits,
// and they add up to 1, both of which e^(score - log_sum) would miss by the rounding of log_sum.
template <class Real>
struct RowTerms {
  const Real *largest, *inverse_total;
  const Real *mean_below;        // the mean of score - largest
  const Real *slope, *constant;  // gradients only
};

// The inner loops, one table per instruction set. A panel holds `rows` rows as [dim][rows]; codes are [codes][stride], where
// stride is a multiple of `width`; scores and what is made of them are [codes][rows]. Counts of codes are multiples of `group`.
template <class Real>
struct Kernels {
  int64_t rows, width, group;

  // scores[k][r] = offsets[k] + sum_d codes[k][d] panel[d][r]
  void (*score)(const Real* panel, const Real* codes, const Real* offsets, int64_t dim, int64_t stride, int64_t count, Real* scores);
  // largest[r] = max(itself, scores); brings up to date sum[r] of e^(score - largest) and weighted[r] of the same times the exponent
  void (*reduce)(const Real* scores, int64_t count, Real* largest, double* sum, double* weighted);
  // sums[k][lane] += probabilities p
  void (*add_probabilities)(const Real* scores, int64_t count, const RowTerms<Real>& terms, Real* sums);
  // totals[r] += sum_k p weights[k] total
  void (*add_weighted)(const Real* scores, int64_t count, const RowTerms<Real>& terms, const Real* weights, double* totals);
  // scores = p (weights[k] + constant[r] + slope[r] (score - mean score)); sums[k][lane] and totals[r] += that
  void (*gradient)(Real* scores, int64_t count, const RowTerms<Real>& terms, const Real* weights, Real* sums, double* totals);
  // out[k][d] += sum_r factors[k][r] matrix[r][d], for all rows of a panel and `dim` a multiple of `width`
  void (*add_to_codes)(const Real* factors, const Real* matrix, int64_t dim, int64_t count, Real* out);
  // out[r][d] += sum_k factors[k][r] matrix[k][d]
  void (*add_to_rows)(const Real* factors, const Real* matrix, int64_t dim, int64_t count, Real* out);
  // out[i] = e^x[i], as the others compute it; for tests
  void (*exponentials)(const Real* x, int64_t count, Real* out);
};

extern const Kernels<double> fp64_kernels;
extern const Kernels<float> scalar_kernels, avx2_kernels, avx512_kernels;

template <class Real>
const Kernels<Real>& kernels_of(InstructionSet set) {
  return table_of<Real, fp64_kernels, scalar_kernels, avx2_kernels, avx512_kernels>(set);
}

}  // namespace mmgen_kernels::vq::entropy
