// The inner loops of code_entropy, written once over GCC's vectors; each code_entropy_<instruction set>.cpp instantiates them.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>

#include "simd/vectors.h"
#include "vq/code_entropy_tables.h"

namespace mmgen_kernels::vq::entropy {
namespace {  // internal linkage: compiled once per instruction set, and the copies must not be merged

using simd::exponential;
using simd::Vectors;

template <class Lanes>
struct Loops {
  using Real = typename Lanes::Real;
  using Vec = typename Lanes::Vec;
  static constexpr int W = Lanes::width, vectors = 2, rows = vectors * W;

  // Sums of eight products each, added up: at D = 64 they err half as much as a chain of 64 roundings.
  template <int CODES>
  static void score(const Real* panel, const Real* codes, const Real* offsets, int64_t dim, int64_t stride, int64_t count,
                    Real* scores) {
    constexpr int64_t chain = 8;
    for (int64_t k = 0; k < count; k += CODES, codes += CODES * stride, scores += CODES * rows) {
      for (int64_t begin = 0; begin < dim; begin += chain) {
        const int64_t end = begin + chain < dim ? begin + chain : dim;
        Vec sum[CODES][vectors] = {};
        for (int64_t d = begin; d < end; ++d) {
          Vec row[vectors];
#pragma GCC unroll 4
          for (int i = 0; i < vectors; ++i) row[i] = Lanes::load(panel + d * rows + i * W);
#pragma GCC unroll 16
          for (int j = 0; j < CODES; ++j) {
            const Vec c = Lanes::broadcast(codes[j * stride + d]);
#pragma GCC unroll 4
            for (int i = 0; i < vectors; ++i) sum[j][i] = Lanes::fmadd(row[i], c, sum[j][i]);
          }
        }
#pragma GCC unroll 16
        for (int j = 0; j < CODES; ++j)
#pragma GCC unroll 4
          for (int i = 0; i < vectors; ++i) {
            Real* at = scores + j * rows + i * W;
            Lanes::store(at, (begin == 0 ? Lanes::broadcast(offsets[k + j]) : Lanes::load(at)) + sum[j][i]);
          }
      }
    }
  }

  static void reduce(const Real* scores, int64_t count, Real* largest, double* sum, double* weighted) {
    for (int v = 0; v < rows; v += W) {
      Real maxima[W];
      Vec most = Lanes::load(largest + v);
      typename Lanes::Wide total{}, product{};  // what is missing here is missing in all gradients of a row
      for (int64_t k = 0; k < count; ++k) {
        const Vec score = Lanes::load(scores + k * rows + v);
        most = score > most ? score : most;
      }
      for (int64_t k = 0; k < count; ++k) {
        const Vec below = Lanes::load(scores + k * rows + v) - most;  // NaN where the score is
        const Vec e = exponential<Lanes>(below);
        Lanes::add(e, total);
        Lanes::add(e * below, product);
      }
      Lanes::store(maxima, most);
      for (int i = 0; i < W; ++i) {
        const int r = v + i;
        if (maxima[i] != largest[r] && sum[r] != 0) {
          const double rise = double(maxima[i]) - largest[r], shrink = std::exp(-rise);
          weighted[r] = shrink * (weighted[r] - rise * sum[r]);
          sum[r] *= shrink;
        }
        largest[r] = maxima[i];
        sum[r] += total[i];
        weighted[r] += product[i];
      }
    }
  }

  static void add_probabilities(const Real* scores, int64_t count, const RowTerms<Real>& terms, Real* sums) {
    for (int64_t k = 0; k < count; ++k, sums += W) {
      Vec total = Lanes::load(sums);
      for (int i = 0; i < rows; i += W) {
        const Vec e = exponential<Lanes>(Lanes::load(scores + k * rows + i) - Lanes::load(terms.largest + i));
        total = Lanes::fmadd(e, Lanes::load(terms.inverse_total + i), total);
      }
      Lanes::store(sums, total);
    }
  }

  static void add_weighted(const Real* scores, int64_t count, const RowTerms<Real>& terms, const Real* weights, double* totals) {
    for (int v = 0; v < rows; v += W) {
      const Vec largest = Lanes::load(terms.largest + v);
      Vec total[4] = {};  // four chains: shorter ones round less
      for (int64_t k = 0; k < count; k += 4)
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
          const Vec e = exponential<Lanes>(Lanes::load(scores + (k + j) * rows + v) - largest);
          total[j] = Lanes::fmadd(e, Lanes::broadcast(weights[k + j]), total[j]);
        }
      const Vec sum = (total[0] + total[1]) + (total[2] + total[3]);
      for (int i = 0; i < W; ++i) totals[v + i] += sum[i];
    }
  }

  static void gradient(Real* scores, int64_t count, const RowTerms<Real>& terms, const Real* weights, Real* sums,
                       double* totals) {
    Vec of_rows[vectors] = {};
    for (int64_t k = 0; k < count; ++k, sums += W) {
      const Vec weight = Lanes::broadcast(weights[k]);
      Vec total = Lanes::load(sums);
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) {
        const int i = v * W;
        const Vec below = Lanes::load(scores + k * rows + i) - Lanes::load(terms.largest + i);
        const Vec mean_below = Lanes::load(terms.mean_below + i);
        const Vec p = exponential<Lanes>(below) * Lanes::load(terms.inverse_total + i);
        const Vec slope =
            Lanes::fmadd(Lanes::load(terms.slope + i), below - mean_below, weight + Lanes::load(terms.constant + i));
        // Smaller probabilities would make products that are no normal numbers, which cost 100 times as much. They count as 0,
        // and as NaN in a row that is not finite.
        const Vec g = below < Real(negligible) ? mean_below - mean_below : p * slope;
        Lanes::store(scores + k * rows + i, g);
        total += g;
        of_rows[v] += g;
      }
      Lanes::store(sums, total);
    }
    for (int r = 0; r < rows; ++r) totals[r] += of_rows[r / W][r % W];
  }

  // out[i][d] += sum over n of factors[n * next + i * step] matrix[n][d], for COUNT i and VECTORS vectors of d.
  template <int COUNT, int VECTORS>
  static void add_products(const Real* factors, int64_t step, int64_t next, const Real* matrix, int64_t dim, int64_t depth,
                           Real* out) {
    Vec sum[COUNT][VECTORS] = {};
    for (int64_t n = 0; n < depth; ++n, factors += next, matrix += dim) {
      Vec m[VECTORS];
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) m[v] = Lanes::load(matrix + v * W);
#pragma GCC unroll 16
      for (int i = 0; i < COUNT; ++i) {
        const Vec f = Lanes::broadcast(factors[i * step]);
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) sum[i][v] = Lanes::fmadd(m[v], f, sum[i][v]);
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < COUNT; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) {
        Real* at = out + i * dim + v * W;
        Lanes::store(at, Lanes::load(at) + sum[i][v]);
      }
  }

  template <int COUNT>
  static void add_matrix(const Real* factors, int64_t step, int64_t next, const Real* matrix, int64_t dim, int64_t depth,
                         int64_t count, Real* out) {
    for (int64_t d = 0; d < dim;) {
      const bool pair = d + 2 * W <= dim;
      for (int64_t i = 0; i < count; i += COUNT)
        (pair ? add_products<COUNT, 2> : add_products<COUNT, 1>)(factors + i * step, step, next, matrix + d, dim, depth,
                                                                 out + i * dim + d);
      d += pair ? 2 * W : W;
    }
  }

  template <int CODES>
  static void add_to_codes(const Real* factors, const Real* matrix, int64_t dim, int64_t count, Real* out) {
    add_matrix<CODES>(factors, rows, 1, matrix, dim, rows, count, out);
  }

  template <int CODES>
  static void add_to_rows(const Real* factors, const Real* matrix, int64_t dim, int64_t count, Real* out) {
    add_matrix<CODES>(factors, 1, rows, matrix, dim, count, rows, out);
  }

  static void exponentials(const Real* x, int64_t count, Real* out) {
    for (int64_t i = 0; i < count; i += W) {
      Real values[W] = {};
      const size_t bytes = sizeof(Real) * (count - i < W ? count - i : W);
      std::memcpy(values, x + i, bytes);
      Lanes::store(values, exponential<Lanes>(Lanes::load(values)));
      std::memcpy(out + i, values, bytes);
    }
  }
};

// CODES by two vectors are as many sums as leave registers for two vectors and one broadcast.
template <class Lanes, int CODES>
constexpr Kernels<typename Lanes::Real> kernels() {
  using L = Loops<Lanes>;
  static_assert(tile_codes % CODES == 0 && L::rows % CODES == 0);
  return {L::rows, L::W, CODES, L::template score<CODES>, L::reduce, L::add_probabilities, L::add_weighted, L::gradient,
          L::template add_to_codes<CODES>, L::template add_to_rows<CODES>, L::exponentials};
}

}  // namespace
}  // namespace mmgen_kernels::vq::entropy
