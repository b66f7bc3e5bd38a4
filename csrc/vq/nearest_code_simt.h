// The lookup's kernels for GPUs in the words of simt/simt.h: rows and codes in fp16 on matrix units, a measured bound, and fp64 for
// what the bound leaves open. For narrow vectors, where a row fits a few registers: it is packed by the blocks that sweep it, and
// four launches do it all. Names and bounds: docs/vq.md, "On NVIDIA GPUs".
#pragma once

#include "vq/nearest_code_simt_problem.h"

namespace mmgen_kernels::vq::gpu {

// -- within a block ---------------------------------------------------------------------------------------------------

// Of all threads, in an order that depends on their number only.
template <class F>
DEVICE double reduce(double value, double* lanes, const F& f) {
  lanes[simt::thread()] = value;
  simt::sync();
  for (int half = simt::threads() / 2; half > 0; half /= 2) {
    if (simt::thread() < half) lanes[simt::thread()] = f(lanes[simt::thread()], lanes[simt::thread() + half]);
    simt::sync();
  }
  const double result = lanes[0];
  simt::sync();
  return result;
}
DEVICE double sum(double value, double* lanes) {
  return reduce(value, lanes, [](double a, double b) { return a + b; });
}
DEVICE double largest(double value, double* lanes) {
  return reduce(value, lanes, [](double a, double b) { return a > b ? a : b; });
}
template <class T>
DEVICE T smallest_of_warp(T value) {
  for (int mask = 16; mask > 0; mask /= 2) {
    const T other = simt::exchange(value, mask);
    value = other < value ? other : value;
  }
  return value;
}

// -- kernels, in the order of their launches --------------------------------------------------------------------------

struct SumShared {
  double lanes[sum_threads];
};

// Blocks (parts, heads): squared norms of codes as they are, and per part of the codebook their sum and statistics.
DEVICE void sum_codes(const Problem& p, SumShared& s) {
  const int64_t part = simt::block_x(), h = simt::block_y(), K = p.codebook.count, D = p.codebook.dim;
  const int t = simt::thread();
  const Rows codes = of_head(p.codebook, p.codebook_head, h);
  const int64_t first = part * p.codes_per_part, last = first + p.codes_per_part < K ? first + p.codes_per_part : K;
  double* squares = p.squares + h * K;
  double square_sum = 0, count = 0, most = 0, outside = 0;
  for (int64_t k = first + t; k < last; k += simt::threads()) {
    double total = 0;
    with_row(codes, k, [&](const auto* c) {
      for (int64_t d = 0; d < D; ++d) total += widen(c[d]) * widen(c[d]);
    });
    squares[k] = total;
    if (!usable(p, total)) {
      // For l2 a code that is not finite never wins: nothing to prove.
      outside = p.metric != Metric::l2 || p.codebook.dtype == Float::fp64;
      continue;
    }
    const double seen = p.metric == Metric::cosine ? double(total > 0) : total;
    square_sum += seen;
    count += 1;
    most = seen > most ? seen : most;
  }
  double* statistics = p.statistics + (h * p.parts + part) * statistics_count;
  square_sum = sum(square_sum, s.lanes);
  count = sum(count, s.lanes);
  most = largest(most, s.lanes);
  outside = largest(outside, s.lanes);
  if (t == 0) statistics[0] = square_sum, statistics[1] = count, statistics[2] = most, statistics[3] = outside;

  int width = 1;  // threads beside each other take components, those above each other codes
  while (width < D) width *= 2;
  const int64_t d = t % width;
  double total = 0;
  for (int64_t k = first + t / width; k < last; k += simt::threads() / width) {
    const double squared = squares[k];
    if (d >= D || !usable(p, squared)) continue;
    total += inverse_length(p.metric, squared) * with_row(codes, k, [&](const auto* c) { return widen(c[d]); });
  }
  s.lanes[t] = total;
  simt::sync();
  for (int half = simt::threads() / 2; half >= width; half /= 2) {
    if (t < half) s.lanes[t] += s.lanes[t + half];
    simt::sync();
  }
  if (t < D) p.sums[(h * p.parts + part) * D + t] = s.lanes[t];
}

struct PackShared {
  double lanes[pack_threads];
  double mean[max_dim];
};

// Blocks (chunks, heads): codes centred, scaled and in fp16, in the order in which lanes of the sweep load them; norm terms; the
// largest norm and the most that fp16 left out of each chunk. Every block adds up the parts anew, in the same order.
DEVICE void pack_codes(const Problem& p, PackShared& s) {
  const int64_t c = simt::block_x(), h = simt::block_y(), K = p.codebook.count, D = p.codebook.dim, steps = steps_of(D);
  const int t = simt::thread();
  const Rows codes = of_head(p.codebook, p.codebook_head, h);

  double square_sum = 0, count = 0, most = 0, outside = 0;
  for (int64_t part = t; part < p.parts; part += simt::threads()) {
    const double* statistics = p.statistics + (h * p.parts + part) * statistics_count;
    square_sum += statistics[0];
    count += statistics[1];
    most = statistics[2] > most ? statistics[2] : most;
    outside = statistics[3] > outside ? statistics[3] : outside;
  }
  square_sum = sum(square_sum, s.lanes);
  count = sum(count, s.lanes);
  count = count > 1 ? count : 1;
  most = largest(most, s.lanes);
  outside = largest(outside, s.lanes);
  double total = 0;
  if (t < D) {
    for (int64_t part = 0; part < p.parts; ++part) total += p.sums[(h * p.parts + part) * D + t];
    s.mean[t] = total / count;
  }
  const double mean_square = sum(t < D ? s.mean[t] * s.mean[t] : 0, s.lanes);
  const bool centred = mean_square > 0.5 * square_sum / count;
  if (t < D && !centred) s.mean[t] = 0;
  simt::sync();
  const double longest_raw = std::sqrt(most) + vanished;
  const double reach = longest_raw + (centred ? std::sqrt(mean_square) : 0);  // no code is longer once centred
  const double scale = scale_of(reach * reach);
  if (c == 0) {
    if (t < D) p.mean[h * D + t] = s.mean[t];
    double* head = p.head + h * head_count;
    if (t == 0) head[0] = outside, head[1] = scale, head[2] = longest_raw * scale;
  }

  double longest = 0, most_left_out = 0;
  for (int64_t k = c * p.codes_per_chunk + t; k < (c + 1) * p.codes_per_chunk; k += simt::threads()) {
    const double squared = k < K ? p.squares[h * K + k] : 0;
    const bool possible = k < K && usable(p, squared);
    const double inverse = inverse_length(p.metric, squared);
    double norm = 0, rest = 0;
    // A lane of the sweep loads four components of a code at once.
    auto* out = p.codes + ((h * p.padded_codes() + k) / 8 * steps * 32 + k % 8 * 4) * 4;
    for (int64_t step = 0; step < steps; ++step)
      for (int64_t quarter = 0; quarter < 4; ++quarter) {
        alignas(8) uint16_t halves[4] = {};
        for (int64_t i = 0; possible && i < 4; ++i) {
          const int64_t d = step * products + quarter * 2 + i % 2 + i / 2 * 8;
          if (d >= D) continue;
          const double value = with_row(codes, k, [&](const auto* row) { return widen(row[d]); }) * inverse - s.mean[d];
          halves[i] = to_half(value * scale);
          const double left = value * scale - widen(Fp16{halves[i]});
          norm += value * value;
          rest += left * left;
        }
        simt::copy<8>(out + (step * 32 + quarter) * 4, halves);
      }
    norm = possible ? (std::sqrt(norm) + vanished) * scale : 0;
    const float term = p.metric == Metric::l2 ? static_cast<float>(0.5 * norm * norm) : 0.0f;
    p.half_squares[h * p.padded_codes() + k] = possible ? term : INFINITY;
    longest = norm > longest ? norm : longest;
    most_left_out = std::sqrt(rest) > most_left_out ? std::sqrt(rest) : most_left_out;
  }
  longest = largest(longest, s.lanes);
  most_left_out = largest(most_left_out, s.lanes);
  double* bounds = p.chunk_bounds + (h * p.chunks + c) * 2;
  if (t == 0) bounds[0] = longest, bounds[1] = most_left_out;
}

template <int STEPS>
struct SweepShared {
  // Rows of 16 bytes more than they need: the eight rows that a warp reads at once lie in different banks.
  alignas(16) uint16_t rows[sweep_threads][STEPS * products + 8];
  float ratios[sweep_threads];
};

// One row: scaled by a power of two, negated, in fp16; and what the bound needs of it.
template <int STEPS>
DEVICE void pack_row(const Problem& p, const Rows& rows, int64_t h, int64_t n, uint16_t* out, float& ratio_out, double* bounds) {
  const int64_t D = p.x.dim;
  const double* mean = p.mean + h * D;
  const bool l2 = p.metric == Metric::l2;
  with_row(rows, n, [&](const auto* row) {
    double squared = 0;
    for (int64_t d = 0; d < D; ++d) {
      const double value = widen(row[d]) - (l2 ? mean[d] : 0);
      squared += value * value;
    }
    double scale = scale_of(squared), ratio = 1;
    bool possible = squared <= largest_square;
    if (l2) {
      // A row much shorter than the codes gives up bits that the sum with the norm term would lose anyway; one so much longer
      // that fp32 cannot hold the norm term beside it is left to fp64.
      const double code_scale = p.head[h * head_count + 1];
      if (scale > code_scale * 0x1p20) scale = code_scale * 0x1p20;
      ratio = scale / code_scale;
      possible = possible && ratio >= 0x1p-100;
    }
    double rest = 0;
    for (int64_t d = 0; d < STEPS * products; ++d) {
      const double value = possible && d < D ? (widen(row[d < D ? d : 0]) - (l2 ? mean[d] : 0)) * scale : 0;
      const uint16_t half = to_half(value);
      const double left = value - widen(Fp16{half});
      out[d] = half ^ 0x8000;
      rest += left * left;
    }
    ratio_out = possible ? static_cast<float>(ratio) : 1.0f;
    if (bounds == nullptr) return;
    double norm = possible ? (std::sqrt(squared) + vanished) * scale : INFINITY;  // infinite: outside the proof
    if (squared != squared) norm = NAN;                                          // NaN: no code can win
    // No square of anything narrower than fp64 overflows: the row is infinite.
    if (l2 && p.x.dtype != Float::fp64 && !(squared < INFINITY)) norm = NAN;
    bounds[0] = norm, bounds[1] = std::sqrt(rest), bounds[2] = possible ? ratio : 1;
  });
}

// Blocks (of rows, splits, heads): the smallest score of each row in each chunk of the split. A score is
// ratio |c|^2 / 2 - x.c. A warp takes 32 rows; the codes pass eight at a time.
template <int STEPS>
DEVICE void sweep(const Problem& p, SweepShared<STEPS>& s) {
  const int64_t split = simt::block_y(), h = simt::block_z(), N = p.x.count;
  const int64_t first_row = simt::block_x() * sweep_threads;
  const int thread = simt::thread(), warp = thread / 32, lane = thread % 32, g = lane / 4, t = lane % 4;

  if (first_row + thread < N) {
    const int64_t n = first_row + thread;
    double* bounds = split == 0 ? p.row_bounds + (h * N + n) * row_count : nullptr;
    pack_row<STEPS>(p, of_head(p.x, p.x_head, h), h, n, s.rows[thread], s.ratios[thread], bounds);
  } else {
    for (int d = 0; d < STEPS * products; ++d) s.rows[thread][d] = 0;
    s.ratios[thread] = 1;
  }
  simt::sync();

  uint32_t rows[2][STEPS][4];
  float ratios[2][2];
  UNROLL for (int m = 0; m < 2; ++m) {
    UNROLL for (int half = 0; half < 2; ++half) {
      const int row = warp * 32 + m * 16 + half * 8 + g;
      ratios[m][half] = s.ratios[row];
      UNROLL for (int step = 0; step < STEPS; ++step) {
        memcpy(&rows[m][step][half], &s.rows[row][step * products + 2 * t], 4);
        memcpy(&rows[m][step][2 + half], &s.rows[row][step * products + 2 * t + 8], 4);
      }
    }
  }

  const int64_t first = split * p.chunks_per_split;
  const int64_t last = first + p.chunks_per_split < p.chunks ? first + p.chunks_per_split : p.chunks;
  for (int64_t c = first; c < last; ++c) {
    float best[2][2] = {{INFINITY, INFINITY}, {INFINITY, INFINITY}};
    const int64_t begin = h * p.padded_codes() + c * p.codes_per_chunk;
    for (int64_t k = begin; k < begin + p.codes_per_chunk; k += chunk) {
      UNROLL for (int tile = 0; tile < chunk / 8; ++tile) {
        alignas(8) uint32_t codes[STEPS][2];
        UNROLL for (int step = 0; step < STEPS; ++step)
          simt::copy<8>(codes[step], p.codes + ((k / 8 + tile) * STEPS * 32 + step * 32 + lane) * 4);
        alignas(8) float terms[2];
        simt::copy<8>(terms, p.half_squares + k + tile * 8 + 2 * t);
        UNROLL for (int m = 0; m < 2; ++m) {
          float score[4] = {ratios[m][0] * terms[0], ratios[m][0] * terms[1], ratios[m][1] * terms[0], ratios[m][1] * terms[1]};
          UNROLL for (int step = 0; step < STEPS; ++step) simt::multiply_add(score, rows[m][step], codes[step]);
          best[m][0] = std::fmin(best[m][0], std::fmin(score[0], score[1]));
          best[m][1] = std::fmin(best[m][1], std::fmin(score[2], score[3]));
        }
      }
    }
    UNROLL for (int m = 0; m < 2; ++m) {
      UNROLL for (int half = 0; half < 2; ++half) {
        float low = best[m][half];
        low = std::fmin(low, simt::exchange(low, 1));
        low = std::fmin(low, simt::exchange(low, 2));
        const int64_t n = first_row + warp * 32 + m * 16 + half * 8 + g;
        if (t == 0 && n < N) p.minima[(h * p.chunks + c) * N + n] = low;
      }
    }
  }
}

struct SettleShared {
  double rows[settle_threads / 32][max_dim];
};

// Blocks (of rows, heads): the index of each row, a warp each. Chunks that may hold the nearest code are evaluated in fp64.
DEVICE void settle(const Problem& p, SettleShared& s) {
  const int warp = simt::thread() / 32, lane = simt::thread() % 32;
  const int64_t h = simt::block_y(), N = p.x.count, K = p.codebook.count, D = p.x.dim;
  const int64_t n = simt::block_x() * (settle_threads / 32) + warp;
  if (n >= N) return;
  int64_t* index = p.indices + h * N + n;
  if (p.mask != nullptr && !p.mask[h * N + n]) {
    if (lane == 0) *index = -1;
    return;
  }
  const double *row_bounds = p.row_bounds + (h * N + n) * row_count, *head = p.head + h * head_count;
  const double r = row_bounds[0], row_rest = row_bounds[1], ratio = row_bounds[2], raw = head[2];
  if (r != r) {
    if (lane == 0) *index = 0;
    return;
  }
  const bool everything = head[0] > 0 || r == INFINITY;
  double* row = s.rows[warp];
  with_row(of_head(p.x, p.x_head, h), n, [&](const auto* x) {
    for (int64_t d = lane; d < D; d += 32) row[d] = widen(x[d]);
  });
  simt::sync_warp();

  const auto smallest = [&](int64_t c) { return static_cast<double>(p.minima[(h * p.chunks + c) * N + n]); };
  const auto bound = [&](int64_t c) {
    const double* bounds = p.chunk_bounds + (h * p.chunks + c) * 2;
    return error_bound(p.metric, D, r, row_rest, ratio, bounds[0], bounds[1], raw);
  };
  double reach = INFINITY;  // the winner's value is at most this, in units of the score
  for (int64_t c = lane; c < p.chunks && !everything; c += 32) reach = std::fmin(reach, smallest(c) + bound(c));
  reach = smallest_of_warp(reach);

  const Rows codes = of_head(p.codebook, p.codebook_head, h);
  double value = INFINITY;
  int64_t nearest = K;
  for (int64_t start = 0; start < p.chunks; start += 32) {
    const int64_t mine = start + lane;
    const bool open = mine < p.chunks && (everything || smallest(mine) - bound(mine) <= reach);
    for (uint32_t mask = simt::ballot(open); mask != 0; mask &= mask - 1) {
      const int64_t begin = (start + simt::lowest_bit(mask)) * p.codes_per_chunk;
      const int64_t end = begin + p.codes_per_chunk < K ? begin + p.codes_per_chunk : K;
      for (int64_t k = begin + lane; k < end; k += 32) {
        const double candidate = exact_value(p.metric, row, codes, k);
        if (candidate < value) value = candidate, nearest = k;
      }
    }
  }
  const double lowest = smallest_of_warp(value);
  nearest = smallest_of_warp(value == lowest ? nearest : K);
  if (lane == 0) *index = nearest < K ? nearest : 0;
}

// Launch(kernel, blocks x, y, z, threads) starts a kernel on the problem; a template, as each kernel is a type of its own.
template <class Launch>
void launch_all(const Problem& p, const Launch& launch) {
  launch.template operator()<SumShared, sum_codes>(p.parts, p.heads, 1, sum_threads);
  launch.template operator()<PackShared, pack_codes>(p.chunks, p.heads, 1, pack_threads);
  const int64_t blocks = ceil_div(p.x.count, sweep_threads);
  const auto sweep_by = [&]<int STEPS>() {
    launch.template operator()<SweepShared<STEPS>, sweep<STEPS>>(blocks, p.splits(), p.heads, sweep_threads);
  };
  switch (steps_of(p.x.dim)) {
    case 1: sweep_by.template operator()<1>(); break;
    case 2: sweep_by.template operator()<2>(); break;
    case 3: sweep_by.template operator()<3>(); break;
    default: sweep_by.template operator()<4>();
  }
  launch.template operator()<SettleShared, settle>(ceil_div(p.x.count, settle_threads / 32), p.heads, 1, settle_threads);
}

}  // namespace mmgen_kernels::vq::gpu
