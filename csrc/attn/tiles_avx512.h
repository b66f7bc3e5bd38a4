// What attn/tiles.h asks for around the products, on AVX-512 with bf16: operands, softmax, its derivative, results.
#pragma once

#include <immintrin.h>

#include "attn/tiles.h"

namespace mmgen_kernels::attn {
namespace {  // internal linkage: compiled with flags of its own, and the copies must not be merged

constexpr float infinity = __builtin_inff();
constexpr int64_t side = tile_side, sums_of_tile = side * side;

__mmask32 first32(int64_t count) { return count >= 32 ? ~__mmask32{0} : (__mmask32{1} << count) - 1; }
__mmask16 first16(int64_t count) { return first32(count < 16 ? count : 16); }

// 16 x 16 numbers of 32 bits
void transpose(__m512i (&v)[16]) {
  __m512i t[16];
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    const __m512i a = _mm512_unpacklo_epi32(v[i], v[i + 1]), b = _mm512_unpackhi_epi32(v[i], v[i + 1]);
    const __m512i c = _mm512_unpacklo_epi32(v[i + 2], v[i + 3]), d = _mm512_unpackhi_epi32(v[i + 2], v[i + 3]);
    t[i] = _mm512_unpacklo_epi64(a, c), t[i + 1] = _mm512_unpackhi_epi64(a, c);
    t[i + 2] = _mm512_unpacklo_epi64(b, d), t[i + 3] = _mm512_unpackhi_epi64(b, d);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {  // t[i + 4 j] has columns i, i + 4, i + 8 and i + 12 of rows 4 j to 4 j + 3
    const __m512i a = _mm512_shuffle_i32x4(t[i], t[i + 4], 0x88), b = _mm512_shuffle_i32x4(t[i], t[i + 4], 0xdd);
    const __m512i c = _mm512_shuffle_i32x4(t[i + 8], t[i + 12], 0x88), d = _mm512_shuffle_i32x4(t[i + 8], t[i + 12], 0xdd);
    v[i] = _mm512_shuffle_i32x4(a, c, 0x88), v[i + 8] = _mm512_shuffle_i32x4(a, c, 0xdd);
    v[i + 4] = _mm512_shuffle_i32x4(b, d, 0x88), v[i + 12] = _mm512_shuffle_i32x4(b, d, 0xdd);
  }
}

// -- operands

void store_tile(__m512i (&v)[16], bool transposed, std::byte*& to) {
  if (transposed) transpose(v);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) _mm512_store_si512(to + 64 * i, v[i]);
  to += tile_bytes;
}

// Rows lie apart in memory, too few bytes of each for the processor to see them coming.
void announce(const Rows& rows, int64_t begin, int64_t count) {
  for (int64_t i = begin; i < begin + count && i < rows.count; ++i)
    for (int64_t byte = 0; byte < 2 * rows.dim; byte += 64) _mm_prefetch(rows.row(i) + byte, _MM_HINT_T0);
}

template <bool TRANSPOSED>
void pack_rows(const Rows& from, int64_t padded, std::byte* to) {
  announce(from, 0, 16);
  for (int64_t row = 0; row < padded; row += 16) {
    announce(from, row + 16, 16);
    for (int64_t d = 0; d < from.dim; d += 32) {
      const __mmask32 there = first32(from.dim - d);
      const int64_t count = from.count - row;
      __m512i v[16];
      for (int i = 0; i < 16; ++i) v[i] = i < count ? _mm512_maskz_loadu_epi16(there, from.row(row + i) + 2 * d) : __m512i{};
      store_tile(v, TRANSPOSED, to);
    }
  }
}

template <bool TRANSPOSED>
void pack_pairs(const Rows& from, int64_t padded, std::byte* to) {
  announce(from, 0, 32);
  for (int64_t row = 0; row < padded; row += 32) {
    announce(from, row + 32, 32);
    for (int64_t d = 0; d < from.dim; d += 16) {
      const __mmask16 there = first16(from.dim - d);
      const int64_t count = from.count - row;
      const auto wide = [&](int i) {
        return i < count ? _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, from.row(row + i) + 2 * d)) : __m512i{};
      };
      __m512i v[16];
      for (int i = 0; i < 16; ++i) v[i] = _mm512_or_si512(wide(2 * i), _mm512_slli_epi32(wide(2 * i + 1), 16));
      store_tile(v, TRANSPOSED, to);
    }
  }
}

// -- softmax

// e^x for x near 0 or below, 2^-22 off, where bf16 keeps 2^-9; below the smallest normal number it is 0. NaN stays NaN.
// Ten instructions where simd::exponential has eighteen: the softmax is a quarter to a third of the forward.
__m512 weight_of(__m512 x) {
  const __m512 log2_e = _mm512_set1_ps(0x1.715476p0f), to_integer = _mm512_set1_ps(0x1.8p23f);
  const __m512 n = _mm512_sub_ps(_mm512_fmadd_ps(x, log2_e, to_integer), to_integer), f = _mm512_fmsub_ps(x, log2_e, n);
  const auto step = [&](__m512 sum, float next) { return _mm512_fmadd_ps(sum, f, _mm512_set1_ps(next)); };
  __m512 power = step(_mm512_set1_ps(0x1.5bba14p-10f), 0x1.3cea88p-7f);  // 2^f for |f| <= 1/2, a minimax polynomial
  power = step(power, 0x1.c6b752p-5f);
  power = step(power, 0x1.ebf9bcp-3f);
  power = step(power, 0x1.62e42ap-1f);
  power = step(power, 1.0f);
  return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, _mm512_set1_ps(-87.33654f), _CMP_NLT_UQ), power, n);
}

template <bool BIAS, bool MASK>
void logits_of(float* block, int64_t steps, int64_t query_tiles, const LogitTerms& terms, float* highest) {
  const __m512 factor = _mm512_set1_ps(terms.scale), lowest = _mm512_set1_ps(-infinity);
  for (int64_t n = 0; n < query_tiles; ++n) {
    const __m512i end = MASK ? _mm512_loadu_si512(terms.seen + n * side) : __m512i{};
    __m512 peak[2] = {lowest, lowest};
    for (int64_t i = 0; i < 2 * steps; ++i) {
      float* tile = block + (2 * i + n) * sums_of_tile;
      __m512i added[16];
      if constexpr (BIAS) {
        const float* from = terms.bias + n * side * terms.bias_row + i * side;
        for (int64_t r = 0; r < side; ++r) added[r] = _mm512_loadu_si512(from + r * terms.bias_row);
        transpose(added);
      }
#pragma GCC unroll 16
      for (int r = 0; r < 16; ++r) {
        const __m512 sum = _mm512_load_ps(tile + r * side);
        __m512 x = BIAS ? _mm512_fmadd_ps(sum, factor, _mm512_castsi512_ps(added[r])) : _mm512_mul_ps(sum, factor);
        if constexpr (MASK) {
          const __mmask16 there = _mm512_cmpgt_epi32_mask(end, _mm512_set1_epi32(static_cast<int32_t>(i * side) + r));
          x = _mm512_mask_mov_ps(lowest, there, x);
        }
        peak[r % 2] = _mm512_max_ps(x, peak[r % 2]);  // NaN is passed over: the sum finds it
        _mm512_store_ps(tile + r * side, x);
      }
    }
    _mm512_storeu_ps(highest + n * side, _mm512_max_ps(peak[0], peak[1]));
  }
}

void logits(float* block, int64_t steps, int64_t query_tiles, const LogitTerms& terms, float* highest) {
  const auto plain = terms.seen ? logits_of<false, true> : logits_of<false, false>;
  const auto biased = terms.seen ? logits_of<true, true> : logits_of<true, false>;
  (terms.bias ? biased : plain)(block, steps, query_tiles, terms, highest);
}

// One row of a right operand: the numbers of two rows in turn.
__m512i in_turn(__m512 even, __m512 odd) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,  //
                                         23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(odd, even));
}

bool soften(float* block, int64_t steps, int64_t query_tiles, const float* highest, float* maximum, float* sum, float* factor) {
  const __m512 lowest = _mm512_set1_ps(-infinity), one = _mm512_set1_ps(1);
  bool changed = false;
  for (int64_t n = 0; n < query_tiles; ++n) {
    const __m512 before = _mm512_loadu_ps(maximum + n * side), now = _mm512_max_ps(_mm512_loadu_ps(highest + n * side), before);
    // Where nothing was seen yet, not even -inf is subtracted: -inf - -inf is NaN.
    const __m512 subtracted = _mm512_maskz_mov_ps(_mm512_cmpneq_ps_mask(now, lowest), now);
    __m512 added[2] = {};
    for (int64_t step = 0; step < steps; ++step) {
      float *tiles = block + (4 * step + n) * sums_of_tile, *to = tiles;  // rows are read before others are written in their place
      for (int64_t half = 0; half < 2; ++half, tiles += 2 * sums_of_tile)
#pragma GCC unroll 8
        for (int r = 0; r < 16; r += 2, to += side) {
          const __m512 even = weight_of(_mm512_sub_ps(_mm512_load_ps(tiles + r * side), subtracted));
          const __m512 odd = weight_of(_mm512_sub_ps(_mm512_load_ps(tiles + (r + 1) * side), subtracted));
          added[0] = _mm512_add_ps(added[0], even), added[1] = _mm512_add_ps(added[1], odd);
          _mm512_store_si512(to, in_turn(even, odd));
        }
    }
    const __mmask16 higher = _mm512_cmpneq_ps_mask(before, now);
    const __m512 by = _mm512_mask_mov_ps(one, higher, weight_of(_mm512_sub_ps(before, now)));
    _mm512_storeu_ps(maximum + n * side, now);
    _mm512_storeu_ps(sum + n * side, _mm512_fmadd_ps(_mm512_loadu_ps(sum + n * side), by, _mm512_add_ps(added[0], added[1])));
    _mm512_storeu_ps(factor + n * side, by);
    changed |= higher != 0;
  }
  return changed;
}

void rescale(float* tiles, int64_t channels, int64_t query_tiles, const float* factor) {
  for (int64_t n = 0; n < query_tiles; ++n) {
    const __m512 by = _mm512_loadu_ps(factor + n * side);
    for (int64_t i = 0; i < channels * side; ++i, tiles += side) _mm512_store_ps(tiles, _mm512_mul_ps(_mm512_load_ps(tiles), by));
  }
}

// -- backward

struct Pair {
  __m512 weight, gradient;
};

class Derivative {
 public:
  Derivative(const QueryTerms& terms, int64_t n) {
    const __m512 lse = _mm512_loadu_ps(terms.lse + n * side);
    subtracted = _mm512_mask_mov_ps(lse, _mm512_cmpeq_ps_mask(lse, _mm512_set1_ps(-infinity)), _mm512_set1_ps(infinity));
    grad_lse = _mm512_loadu_ps(terms.grad_lse + n * side);
    mean = _mm512_sub_ps(_mm512_loadu_ps(terms.inner + n * side), grad_lse);
  }
  Pair operator()(const float* logit, const float* grad_weight) const {
    const __m512 weight = weight_of(_mm512_sub_ps(_mm512_load_ps(logit), subtracted));
    const __m512 gradient = _mm512_mul_ps(weight, _mm512_sub_ps(_mm512_load_ps(grad_weight), mean));
    // A query that sees one key alone has no gradient but that of lse; the difference would be one of roundings.
    const __m512 known = _mm512_mask_mov_ps(gradient, _mm512_cmpeq_ps_mask(weight, _mm512_set1_ps(1)), grad_lse);
    return {weight, _mm512_maskz_mov_ps(_mm512_cmpneq_ps_mask(weight, __m512{}), known)};
  }

 private:
  __m512 subtracted, mean, grad_lse;
};

void differentiate(const float* logits, const float* grad_weights, int64_t steps, const QueryTerms& terms, const NarrowBlock& to) {
  const Derivative of[] = {{terms, 0}, {terms, 1}};
  for (int64_t i = 0; i < 2 * steps; ++i) {
    std::byte* weights = to.weights + i * to.next_keys * tile_bytes;
    std::byte* gradients = to.gradients + i * to.next_keys * tile_bytes;
    std::byte* of_queries = to.gradients_of_queries + i / 2 * 2 * to.next_keys * tile_bytes + i % 2 * (tile_bytes / 2);
    const int64_t first = 2 * i * sums_of_tile;
#pragma GCC unroll 2
    for (int r = 0; r < 16; r += 2, of_queries += 64) {
      const auto at = [&](int n, int row) {
        const int64_t i = first + n * sums_of_tile + row * side;
        return of[n](logits + i, grad_weights + i);
      };
      const Pair a = at(0, r), b = at(1, r), c = at(0, r + 1), d = at(1, r + 1);
      const auto side_by_side = [](__m512 low, __m512 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); };
      _mm512_store_si512(weights + r * 64, side_by_side(a.weight, b.weight));
      _mm512_store_si512(weights + (r + 1) * 64, side_by_side(c.weight, d.weight));
      _mm512_store_si512(gradients + r * 64, side_by_side(a.gradient, b.gradient));
      _mm512_store_si512(gradients + (r + 1) * 64, side_by_side(c.gradient, d.gradient));
      _mm512_store_si512(of_queries, in_turn(a.gradient, c.gradient));
      _mm512_store_si512(of_queries + tile_bytes, in_turn(b.gradient, d.gradient));
    }
  }
}

void differentiate_in_place(float* logits, float* grad_weights, int64_t steps, const QueryTerms& terms) {
  const Derivative of[] = {{terms, 0}, {terms, 1}};
  for (int64_t i = 0; i < 4 * steps; ++i)
    for (int64_t r = 0; r < side; ++r) {
      float *logit = logits + (i * side + r) * side, *grad = grad_weights + (i * side + r) * side;
      const Pair pair = of[i % 2](logit, grad);
      _mm512_store_ps(logit, pair.weight);
      _mm512_store_ps(grad, pair.gradient);
    }
}

void transpose_block(const float* block, int64_t steps, float* to, int64_t row) {
  for (int64_t i = 0; i < 4 * steps; ++i) {
    __m512i v[16];
    for (int r = 0; r < 16; ++r) v[r] = _mm512_load_si512(block + (i * side + r) * side);
    transpose(v);
    for (int64_t r = 0; r < side; ++r) _mm512_storeu_si512(to + (i % 2 * side + r) * row + i / 2 * side, v[r]);
  }
}

// Products of bf16 are exact in fp32.
void dots(const Rows& a, const Rows& b, float* out) {
  for (int64_t i = 0; i < a.count; ++i) {
    __m512 sum{};
    for (int64_t d = 0; d < a.dim; d += 32) {
      const auto part = [&](const Rows& of) {
        return (__m512bh)_mm512_maskz_loadu_epi16(first32(of.dim - d), of.row(i) + 2 * d);
      };
      sum = _mm512_dpbf16_ps(sum, part(a), part(b));
    }
    out[i] = _mm512_reduce_add_ps(sum);
  }
}

// -- results

template <bool TRANSPOSED>
void write(const Sums& sums, const float* factor, const Rows& to) {
  announce(to, 0, side);
  for (int64_t row = 0; row < to.count; row += side) {
    announce(to, row + side, side);
    for (int64_t d = 0; d < to.dim; d += side) {
      const int64_t i = TRANSPOSED ? d : row, j = TRANSPOSED ? row : d;
      const std::byte* tile = sums.tiles + (i / side * sums.next_row + j / side * sums.next_column) * tile_bytes;
      __m512i v[16];
      for (int r = 0; r < 16; ++r) v[r] = _mm512_load_si512(tile + r * 64);
      if constexpr (TRANSPOSED) transpose(v);
      for (int64_t r = 0; r < side && row + r < to.count; ++r) {
        const __m512 value = _mm512_mul_ps(_mm512_castsi512_ps(v[r]), _mm512_set1_ps(factor[row + r]));
        _mm256_mask_storeu_epi16(to.row(row + r) + 2 * d, first16(to.dim - d), (__m256i)_mm512_cvtneps_pbh(value));
      }
    }
  }
}

// -- the table

using Enter = void(std::byte* before);
using Leave = void(const std::byte* before);
using Multiply = void(int64_t rows, int64_t columns, int64_t depth, const Operand& a, const Operand& b, const Sums& c, bool add);

constexpr TileKernels around(int64_t fewest_queries, Enter* enter, Leave* leave, Multiply* multiply) {
  return {.fewest_queries = fewest_queries,
          .enter = enter,
          .leave = leave,
          .pack_rows = pack_rows<false>,
          .pack_rows_transposed = pack_rows<true>,
          .pack_pairs = pack_pairs<false>,
          .pack_pairs_transposed = pack_pairs<true>,
          .multiply = multiply,
          .logits = logits,
          .soften = soften,
          .rescale = rescale,
          .differentiate = differentiate,
          .differentiate_in_place = differentiate_in_place,
          .transpose = transpose_block,
          .dots = dots,
          .write = write<false>,
          .write_transposed = write<true>};
}

}  // namespace
}  // namespace mmgen_kernels::attn
