// The inner loops as functions, one table per instruction set.
#pragma once

#include <cstdint>

#include "attn/ahead.h"
#include "simd/tables.h"

namespace mmgen_kernels::attn {

constexpr int64_t block_keys = 64;     // of a block of logits; a multiple of every vector's width
constexpr int64_t block_queries = 96;  // 96 x 64 logits in fp32 are 24 KiB, which leaves room for a panel of keys in L1

// Blocks of logits, weights and their gradients are (block_queries, block_keys), rows contiguous. Of `columns` keys that are
// there a row sees the first `keys`; the rest of it counts as masked, up to a whole vector. Panels of q, k, v, out and their
// gradients have rows of `ld` channels, a multiple of the vector's width, 0 past the head dimension.
template <class Real>
struct Kernels {
  int64_t width;  // lanes of a vector

  // dtypes in the order of csrc/floats.h: rows, `stride` bytes apart -> a panel of (factor row, zeros up to ld)
  void (*widen[4])(const void* rows, int64_t stride, int64_t count, int64_t dim, Real factor, int64_t ld, Real* panel);
  // panel factor -> rows
  void (*narrow[4])(const Real* panel, int64_t ld, int64_t count, int64_t dim, Real factor, void* rows, int64_t stride);

  // (keys, dim), stride ld -> (dim, keys), stride block_keys, 0 past `keys` up to a whole vector
  void (*transpose)(const Real* panel, int64_t keys, int64_t dim, int64_t ld, Real* out);

  // c (m, n) = or += a (m, k) b (k, n). a is read as a[i a_row + j a_column]; n is a multiple of the vector's width. Takes a step
  // ahead after each block of rows.
  void (*multiply)(int64_t m, int64_t n, int64_t k, const Real* a, int64_t a_row, int64_t a_column, const Real* b, int64_t b_row,
                   Real* c, int64_t c_row, bool add, Ahead& ahead);

  // logits += bias: a row of `keys`, or one number for all
  void (*add_bias[4])(Real* logits, const void* bias, bool one, int64_t keys);
  // logits -> weights exp(logit - maximum), 0 past the keys that a row sees (seen[row]; null: all columns), after the running
  // maximum and the sum of each row were brought up to date. factor is what multiplies what was summed with the old maximum;
  // returns whether any is not 1. The last three have room for a whole vector.
  bool (*soften)(Real* logits, int64_t rows, const int64_t* seen, int64_t columns, Real* maximum, Real* sum, Real* factor);
  // logits -> weights exp(logit - lse), 0 past `keys`; grad_weights -> gradients of the logits: weight (grad - inner + grad_lse),
  // where inner = sum weight grad = out . grad_out
  void (*differentiate)(Real* logits, Real* grad_weights, double lse, Real inner, Real grad_lse, int64_t keys, int64_t columns);
  // each row of a panel times its factor
  void (*rescale)(Real* panel, int64_t rows, int64_t ld, const Real* factor);
  // out = the inner product of each row of a with the same row of b
  void (*dots)(int64_t rows, const Real* a, const Real* b, int64_t ld, Real* out);
  double (*total)(const Real* row, int64_t keys);
};

extern const Kernels<double> fp64_kernels;
extern const Kernels<float> scalar_kernels, avx2_kernels, avx512_kernels;

template <class Real>
const Kernels<Real>& kernels_of(InstructionSet set) {
  return table_of<Real, fp64_kernels, scalar_kernels, avx2_kernels, avx512_kernels>(set);
}

}  // namespace mmgen_kernels::attn
