// The inner loops of the family, written once over GCC's vectors; each attention_<instruction set>.cpp instantiates them.
#pragma once

#include <algorithm>
#include <limits>
#include <utility>

#include "attn/tables.h"
#include "simd/exchange.h"
#include "simd/storage.h"

namespace mmgen_kernels::attn {
namespace {  // internal linkage: compiled once per instruction set, and the copies must not be merged

using simd::Bf16;
using simd::Fp16;

#define ALWAYS_INLINE __attribute__((always_inline))

// c (R, NV vectors) = or += a (R, k) b (k, NV vectors): the sums stay in registers, of which b's vectors and one element of a take
// the rest.
template <class Lanes, int R, int NV>
void multiply_block(int64_t k, const typename Lanes::Real* a, int64_t a_row, int64_t a_column, const typename Lanes::Real* b,
                    int64_t b_row, typename Lanes::Real* c, int64_t c_row, bool add) {
  using Real = typename Lanes::Real;
  using Vec = typename Lanes::Vec;
  constexpr int W = Lanes::width;
  Vec sum[R][NV];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) sum[r][v] = Vec{};
  for (int64_t j = 0; j < k; ++j) {
    Vec of_b[NV];
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) of_b[v] = Lanes::load(b + j * b_row + v * W);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vec of_a = Lanes::broadcast(a[r * a_row + j * a_column]);
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) sum[r][v] = Lanes::fmadd(of_a, of_b[v], sum[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) {
      Real* to = c + r * c_row + v * W;
      Lanes::store(to, add ? Lanes::load(to) + sum[r][v] : sum[r][v]);
    }
}

template <class Lanes>
struct Loops {
  using Real = typename Lanes::Real;
  using Vec = typename Lanes::Vec;
  static constexpr int W = Lanes::width;

  // With 32 registers 5 vectors by 5 rows (80 channels of a head of 72), 4 by 6 (64 keys or channels); with 16, 3 by 4.
  static constexpr int most_vectors = Lanes::registers == 32 ? 5 : 3;
  static constexpr int most_exponentials = Lanes::registers == 32 ? 4 : 2;  // at a time
  static constexpr int most_rows(int vectors) { return std::min(8, (Lanes::registers - 1 - vectors) / vectors); }

  // -- products

  template <int NV, int R>
  static void rows(int64_t m, int64_t k, const Real* a, int64_t a_row, int64_t a_column, const Real* b, int64_t b_row, Real* c,
                   int64_t c_row, bool add, Ahead& ahead) {
    for (; m >= R; m -= R, a += R * a_row, c += R * c_row) {
      multiply_block<Lanes, R, NV>(k, a, a_row, a_column, b, b_row, c, c_row, add);
      ahead.step();
    }
    if constexpr (R > 1) {
      if (m > 0) rows<NV, R / 2>(m, k, a, a_row, a_column, b, b_row, c, c_row, add, ahead);
    }
  }

  template <int NV>
  static void columns(int vectors, int64_t m, int64_t k, const Real* a, int64_t a_row, int64_t a_column, const Real* b,
                      int64_t b_row, Real* c, int64_t c_row, bool add, Ahead& ahead) {
    if (vectors == NV) return rows<NV, most_rows(NV)>(m, k, a, a_row, a_column, b, b_row, c, c_row, add, ahead);
    if constexpr (NV > 1) columns<NV - 1>(vectors, m, k, a, a_row, a_column, b, b_row, c, c_row, add, ahead);
  }

  static void multiply(int64_t m, int64_t n, int64_t k, const Real* a, int64_t a_row, int64_t a_column, const Real* b,
                       int64_t b_row, Real* c, int64_t c_row, bool add, Ahead& ahead) {
    for (int64_t left = n / W; left > 0;) {  // in pieces of about the same width
      const int64_t pieces = (left + most_vectors - 1) / most_vectors, vectors = (left + pieces - 1) / pieces;
      columns<most_vectors>(static_cast<int>(vectors), m, k, a, a_row, a_column, b, b_row, c, c_row, add, ahead);
      left -= vectors, b += vectors * W, c += vectors * W;
    }
  }

  static int64_t padded(int64_t count) { return (count + W - 1) / W * W; }

  static void transpose(const Real* panel, int64_t keys, int64_t dim, int64_t ld, Real* out) {
    for (int64_t j = 0; j < keys; j += W)
      for (int64_t d = 0; d < dim; d += W) {
        Vec rows[W];
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) rows[i] = j + i < keys ? Lanes::load(panel + (j + i) * ld + d) : Vec{};
        simd::transpose(rows);
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i)
          if (d + i < dim) Lanes::store(out + (d + i) * block_keys + j, rows[i]);
      }
  }

  // -- rows

  template <class T>
  static void widen(const void* rows, int64_t stride, int64_t count, int64_t dim, Real factor, int64_t ld, Real* panel) {
    const Vec by = Lanes::broadcast(factor);
    for (int64_t i = 0; i < count; ++i, panel += ld) {
      const T* from = reinterpret_cast<const T*>(static_cast<const char*>(rows) + i * stride);
      int64_t d = 0;
      for (; d + W <= dim; d += W) Lanes::store(panel + d, by * simd::load<Lanes, T>(simd::Whole<Lanes>{}, from + d));
      if (d < dim) Lanes::store(panel + d, by * simd::load<Lanes, T>(simd::Part<Lanes>{dim - d}, from + d)), d += W;
      for (; d < ld; d += W) Lanes::store(panel + d, Vec{});
    }
  }

  template <class T>
  static void narrow(const Real* panel, int64_t ld, int64_t count, int64_t dim, Real factor, void* rows, int64_t stride) {
    const Vec by = Lanes::broadcast(factor);
    for (int64_t i = 0; i < count; ++i, panel += ld) {
      T* to = reinterpret_cast<T*>(static_cast<char*>(rows) + i * stride);
      int64_t d = 0;
      for (; d + W <= dim; d += W) simd::store<Lanes, T>(simd::Whole<Lanes>{}, to + d, by * Lanes::load(panel + d));
      if (d < dim) simd::store<Lanes, T>(simd::Part<Lanes>{dim - d}, to + d, by * Lanes::load(panel + d));
    }
  }

  static void rescale(Real* panel, int64_t rows, int64_t ld, const Real* factor) {
    for (int64_t i = 0; i < rows; ++i, panel += ld) {
      if (factor[i] == 1) continue;
      const Vec by = Lanes::broadcast(factor[i]);
      for (int64_t d = 0; d < ld; d += W) Lanes::store(panel + d, by * Lanes::load(panel + d));
    }
  }

  // In fp64: its error is shared by the gradients of all logits of a query, and does not average out.
  static void dots(int64_t rows, const Real* a, const Real* b, int64_t ld, Real* out) {
    constexpr int at_a_time = W / 2;
    for (int64_t i = 0; i < rows; i += at_a_time, a += at_a_time * ld, b += at_a_time * ld) {
      const int64_t count = std::min<int64_t>(at_a_time, rows - i);
      typename Lanes::HalfWide of_row[at_a_time]{};
      for (int64_t r = 0; r < count; ++r)
        for (int64_t d = 0; d < ld; d += W)
          of_row[r] = Lanes::add_products(Lanes::load(a + r * ld + d), Lanes::load(b + r * ld + d), of_row[r]);
      const auto sums = simd::fold(of_row, [](auto a, auto b) { return a + b; });
      for (int64_t r = 0; r < count; ++r) out[i + r] = static_cast<Real>(sums[r]);
    }
  }

  static double total(const Real* row, int64_t keys) {
    double sum = 0;
    for (int64_t j = 0; j < keys; ++j) sum += row[j];
    return sum;
  }

  // -- softmax

  template <class T>
  static void add_bias(Real* logits, const void* bias, bool one, int64_t keys) {
    const T* from = static_cast<const T*>(bias);
    if (one) {
      Real value;
      simd::Part<Lanes>{1}.template write<Real>(&value, simd::load<Lanes, T>(simd::Part<Lanes>{1}, from));
      const Vec all = Lanes::broadcast(value);
      for (int64_t j = 0; j < keys; j += W) Lanes::store(logits + j, Lanes::load(logits + j) + all);
      return;
    }
    int64_t j = 0;
    for (; j + W <= keys; j += W)
      Lanes::store(logits + j, Lanes::load(logits + j) + simd::load<Lanes, T>(simd::Whole<Lanes>{}, from + j));
    if (j < keys) Lanes::store(logits + j, Lanes::load(logits + j) + simd::load<Lanes, T>(simd::Part<Lanes>{keys - j}, from + j));
  }

  static Vec highest(Vec a, Vec b) { return b > a ? b : a; }  // NaN is passed over: the sum finds it

  // The total of each of W vectors, in fp64.
  static Vec totals(Vec* rows) {
    const auto add = [](auto a, auto b) { return a + b; };
    if constexpr (sizeof(Real) == sizeof(double)) return simd::fold(rows, add);
    else {
      typename Lanes::HalfWide wide[W], total[2];
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) wide[i] = Lanes::halved(rows[i]);
      for (int i = 0; i < 2; ++i) total[i] = simd::fold(wide + i * W / 2, add);
      return Lanes::narrow(total[0], total[1]);
    }
  }

  // `of`, and `instead` from lane `there` on.
  static Vec first_lanes(Vec of, int64_t there, Real instead) {
    Vec lane;
    for (int i = 0; i < W; ++i) lane[i] = static_cast<Real>(i);
    return lane < static_cast<Real>(there) ? of : Lanes::broadcast(instead);
  }

  // N vectors of logits -> weights; returns `sum` and what they add to it.
  template <int N>
  __attribute__((noinline)) static Vec weigh(Real* logits, Vec subtracted, Vec sum) {
    Vec weight[N];
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v) weight[v] = Lanes::load(logits + v * W) - subtracted;
    simd::exponentials<Lanes, N>(weight);
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v) Lanes::store(logits + v * W, weight[v]), sum += weight[v];
    return sum;
  }

  // W rows at a time, so that nobody waits for one row's maximum or sum.
  static bool soften(Real* logits, int64_t rows, const int64_t* seen, int64_t columns, Real* maximum, Real* sum, Real* factor) {
    constexpr Real lowest = -std::numeric_limits<Real>::infinity();
    const int64_t end = padded(columns);
    bool changed = false;
    for (int64_t i = 0; i < rows; i += W, logits += W * block_keys, maximum += W, sum += W, factor += W) {
      const int64_t count = std::min<int64_t>(W, rows - i);
      Vec of_row[W];
      std::fill_n(of_row, W, Lanes::broadcast(lowest));
      for (int64_t r = 0; r < count; ++r) {
        Real* row = logits + r * block_keys;
        const int64_t keys = seen ? seen[i + r] : columns;
        for (int64_t j = keys / W * W; j < end; j += W) Lanes::store(row + j, first_lanes(Lanes::load(row + j), keys - j, lowest));
        Vec peak = Lanes::broadcast(lowest);
        for (int64_t j = 0; j < end; j += W) peak = highest(peak, Lanes::load(row + j));
        of_row[r] = peak;
      }
      const Vec before = Lanes::load(maximum), now = highest(before, simd::fold(of_row, highest));
      // Where nothing was seen yet, not even -inf is subtracted: -inf - -inf is NaN.
      const Vec subtracted = now == lowest ? Vec{} : now;
      const Vec change = before == now ? Lanes::broadcast(1) : simd::exponential<Lanes>(before - subtracted);
      Real of_lane[W];
      Lanes::store(of_lane, subtracted);
      for (int64_t r = 0; r < count; ++r) {
        Real* row = logits + r * block_keys;
        const Vec by = Lanes::broadcast(of_lane[r]);
        Vec added{};
        int64_t j = 0;
        for (; j + most_exponentials * W <= end; j += most_exponentials * W)
          added = weigh<most_exponentials>(row + j, by, added);
        for (; j < end; j += W) added = weigh<1>(row + j, by, added);
        of_row[r] = added;
      }
      Lanes::store(maximum, now);
      Lanes::store(sum, Lanes::load(sum) * change + totals(of_row));
      Lanes::store(factor, change);
      for (int64_t r = 0; r < count; ++r) changed |= factor[r] != 1;
    }
    return changed;
  }

  struct OfQuery {
    Vec lse, rest, mean, grad_lse;
  };

  template <int N>
  static void differentiate(Real* logits, Real* grad_weights, const OfQuery& of) {
    Vec logit[N], difference[N], weight[N];
#define EACH _Pragma("GCC unroll 4") for (int v = 0; v < N; ++v)
    EACH logit[v] = Lanes::load(logits + v * W), difference[v] = weight[v] = logit[v] - of.lse;
    simd::exponentials<Lanes, N>(weight);
    EACH {
      // What rounding the difference left out, which in fp32 would be twice the error of all else. Inf - Inf is no correction.
      const Vec left_out = ((logit[v] - difference[v]) - of.lse) - of.rest, exact = weight[v];
      weight[v] = exact == 0 ? Vec{} : Lanes::fmadd(exact, left_out, exact);
      Lanes::store(logits + v * W, weight[v]);
    }
    EACH {
      const Vec gradient = weight[v] * (Lanes::load(grad_weights + v * W) - of.mean);
      // A query that sees one key alone has no gradient but that of lse; the difference would be one of roundings.
      const Vec alone = weight[v] == 1 ? of.grad_lse : gradient;
      Lanes::store(grad_weights + v * W, weight[v] == 0 ? Vec{} : alone);
    }
#undef EACH
  }

  static void differentiate(Real* logits, Real* grad_weights, double lse, Real inner, Real grad_lse, int64_t keys,
                            int64_t columns) {
    constexpr Real infinity = std::numeric_limits<Real>::infinity();
    const int64_t end = padded(columns);
    for (int64_t j = keys / W * W; j < end; j += W)
      Lanes::store(logits + j, first_lanes(Lanes::load(logits + j), keys - j, -infinity));
    const Real high = lse == -infinity ? infinity : static_cast<Real>(lse);
    const Real low = high == infinity ? 0 : static_cast<Real>(lse - high);
    const OfQuery of{Lanes::broadcast(high), Lanes::broadcast(low), Lanes::broadcast(inner - grad_lse), Lanes::broadcast(grad_lse)};
    int64_t j = 0;
    for (; j + most_exponentials * W <= end; j += most_exponentials * W)
      differentiate<most_exponentials>(logits + j, grad_weights + j, of);
    for (; j < end; j += W) differentiate<1>(logits + j, grad_weights + j, of);
  }
};

#define BY_DTYPE(function) \
  {Of::template function<double>, Of::template function<float>, Of::template function<Bf16>, Of::template function<Fp16>}

template <class Lanes>
constexpr Kernels<typename Lanes::Real> kernels() {
  using Of = Loops<Lanes>;
  return {.width = Lanes::width,
          .widen = BY_DTYPE(widen),
          .narrow = BY_DTYPE(narrow),
          .transpose = Of::transpose,
          .multiply = Of::multiply,
          .add_bias = BY_DTYPE(add_bias),
          .soften = Of::soften,
          .differentiate = Of::differentiate,
          .rescale = Of::rescale,
          .dots = Of::dots,
          .total = Of::total};
}

}  // namespace
}  // namespace mmgen_kernels::attn
