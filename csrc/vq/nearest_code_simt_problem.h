// What the lookup's kernels for GPUs are given: the tensors, how the codebook is divided, scratch; and the arithmetic of the bound.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "simt/simt.h"
#include "vq/exact.h"

namespace mmgen_kernels::vq::gpu {

constexpr int max_dim = 64;
constexpr int products = 16;            // of one matrix instruction
constexpr int64_t chunk = 64;           // codes whose smallest score is kept, or a multiple of it
constexpr int64_t max_chunks = 1024;    // smallest scores per row
constexpr int64_t max_parts = 128;      // partial sums over the codebook
constexpr int sum_threads = 128;
constexpr int pack_threads = 64;
constexpr int sweep_threads = 128;      // and rows of a block
constexpr int settle_threads = 256;     // a warp per row
constexpr double vanished = 0x1p-520;   // more than the norm of components whose squares vanish in fp64
constexpr double largest_square = 0x1p800, smallest_square = 0x1p-800;  // beyond them fp64 itself may overflow or vanish

constexpr int64_t steps_of(int64_t dim) { return (dim + products - 1) / products; }
HOST_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Problem {
  Rows x, codebook;  // of the first head
  int64_t heads, x_head, codebook_head;  // strides in elements
  const bool* mask;  // (H, N) or nullptr
  Metric metric;
  int64_t* indices;  // (H, N)

  int64_t codes_per_part, parts, codes_per_chunk, chunks, chunks_per_split;

  // Scratch of the kernels; sizes in `Scratch`.
  double *squares, *sums, *statistics, *mean, *head, *chunk_bounds, *row_bounds;
  float *half_squares, *minima;
  uint16_t* codes;

  HOST_DEVICE int64_t splits() const { return ceil_div(chunks, chunks_per_split); }
  HOST_DEVICE int64_t padded_codes() const { return chunks * codes_per_chunk; }
};

constexpr int64_t statistics_count = 4;  // of a part: sum of squared norms, codes in it, largest squared norm, outside the proof
constexpr int64_t head_count = 3;        // of a head: outside the proof, the codes' scale, their largest norm as scaled
constexpr int64_t row_count = 3;         // of a row: its norm as scaled, what fp16 left out, its scale over the codes'

// Where each piece of scratch begins, in bytes, and how much there is.
struct Scratch {
  int64_t squares, sums, statistics, mean, head, chunk_bounds, row_bounds, half_squares, minima, codes, bytes;
};

inline Scratch scratch_of(const Problem& p) {
  int64_t at = 0;
  const auto piece = [&](int64_t count, int64_t size) {
    const int64_t begin = at;
    at += ceil_div(count * size, 256) * 256;
    return begin;
  };
  const int64_t H = p.heads, K = p.codebook.count, N = p.x.count, D = p.x.dim;
  Scratch s;
  s.squares = piece(H * K, 8);
  s.sums = piece(H * p.parts * D, 8);
  s.statistics = piece(H * p.parts * statistics_count, 8);
  s.mean = piece(H * D, 8);
  s.head = piece(H * head_count, 8);
  s.chunk_bounds = piece(H * p.chunks * 2, 8);
  s.row_bounds = piece(H * N * row_count, 8);
  s.half_squares = piece(H * p.padded_codes(), 4);
  s.minima = piece(H * p.chunks * N, 4);
  s.codes = piece(H * p.padded_codes() * steps_of(D) * products, 2);
  s.bytes = at;
  return s;
}

inline void place(Problem& p, const Scratch& s, void* memory) {
  auto* bytes = static_cast<char*>(memory);
  const auto at = [&](int64_t offset) { return static_cast<void*>(bytes + offset); };
  p.squares = static_cast<double*>(at(s.squares));
  p.sums = static_cast<double*>(at(s.sums));
  p.statistics = static_cast<double*>(at(s.statistics));
  p.mean = static_cast<double*>(at(s.mean));
  p.head = static_cast<double*>(at(s.head));
  p.chunk_bounds = static_cast<double*>(at(s.chunk_bounds));
  p.row_bounds = static_cast<double*>(at(s.row_bounds));
  p.half_squares = static_cast<float*>(at(s.half_squares));
  p.minima = static_cast<float*>(at(s.minima));
  p.codes = static_cast<uint16_t*>(at(s.codes));
}

// Chunks, parts and splits; `blocks_wanted` fill the chip.
inline void divide(Problem& p, int64_t blocks_wanted) {
  const int64_t K = p.codebook.count;
  p.codes_per_part = std::max<int64_t>(sum_threads, ceil_div(K, max_parts));
  p.parts = ceil_div(K, p.codes_per_part);
  p.codes_per_chunk = chunk * ceil_div(ceil_div(K, chunk), max_chunks);
  p.chunks = ceil_div(K, p.codes_per_chunk);
  const int64_t blocks = p.heads * ceil_div(p.x.count, sweep_threads);
  const int64_t splits = std::clamp<int64_t>(blocks_wanted / std::max<int64_t>(1, blocks), 1, p.chunks);
  p.chunks_per_split = ceil_div(p.chunks, splits);
}

// -- arithmetic -------------------------------------------------------------------------------------------------------

HOST_DEVICE inline Rows of_head(const Rows& first, int64_t stride, int64_t h) {
  Rows rows = first;
  const int64_t size = first.dtype == Float::fp64 ? 8 : first.dtype == Float::fp32 ? 4 : 2;
  rows.data = static_cast<const char*>(first.data) + h * stride * size;
  return rows;
}

HOST_DEVICE inline double power_of_two(int64_t exponent) {
  const uint64_t bits = static_cast<uint64_t>(exponent + 1023) << 52;
  double value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// The power of two that takes a vector of this squared norm to a norm in [2^7, 2^8), as far as 2^+-400 reach: then no product of
// components overflows fp16, and what is dropped below its normal numbers is 2^-22 of the norm.
HOST_DEVICE inline double scale_of(double squared) {
  if (!(squared > 0)) return 1;
  uint64_t bits;
  memcpy(&bits, &squared, sizeof bits);
  int64_t exponent = static_cast<int64_t>(bits >> 52) - 1023;
  exponent = exponent < -800 ? -800 : exponent > 800 ? 800 : exponent;
  return power_of_two(-(exponent >> 1) + 7);
}

// To nearest even, and 0 where fp16 would be subnormal, so that nothing depends on how a matrix unit treats those. |value| < 2^15.
HOST_DEVICE inline uint16_t to_half(double value) {
  const float narrow = static_cast<float>(value);
  uint32_t bits;
  memcpy(&bits, &narrow, sizeof bits);
  const uint32_t magnitude = bits & 0x7fffffffu, rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
  if (rounded < 113u << 23) return 0;
  return static_cast<uint16_t>((bits >> 16 & 0x8000u) | ((rounded - (112u << 23)) >> 13));
}

// How far a score may lie from what the fp64 value of its code implies. r, n: norms of the row and the code as scaled; row_rest,
// code_rest: what fp16 left out of them; ratio: the row's scale over the codes'; raw: norm of the largest code before centring.
HOST_DEVICE inline double error_bound(Metric metric, int64_t dim, double r, double row_rest, double ratio, double n,
                                      double code_rest, double raw) {
  const double product = (r + row_rest) * (n + code_rest), norm_term = metric == Metric::l2 ? ratio * n * n : 0;
  const double padded = static_cast<double>(steps_of(dim) * products), d = static_cast<double>(dim);
  double bound = r * code_rest + row_rest * (n + code_rest) + padded * 0x1p-22 * (product + norm_term);
  bound += 0x1p-22 * (product + norm_term);
  if (metric == Metric::l2) bound += (d + 4) * 0x1p-53 * (r * r / ratio + norm_term);
  if (metric == Metric::dot) bound += (d + 4) * 0x1p-53 * r * raw;
  if (metric == Metric::cosine) bound += (2 * d + 16) * 0x1p-53 * r * raw;
  return 1.02 * bound + 0x1p-80;
}

// Whether the proof covers a code of this squared norm. One that it does not cover is not finite, or the codebook is fp64.
HOST_DEVICE inline bool usable(const Problem& p, double squared) {
  if (!(squared <= largest_square)) return false;
  return p.metric != Metric::cosine || p.codebook.dtype != Float::fp64 || squared == 0 || squared >= smallest_square;
}

// What takes a code to the vector that the metric sees of it.
HOST_DEVICE inline double inverse_length(Metric metric, double squared) {
  if (metric != Metric::cosine) return 1;
  return squared > 0 ? 1 / std::sqrt(squared) : 0;
}

}  // namespace mmgen_kernels::vq::gpu
