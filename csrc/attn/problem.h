// What a call asks for: where its tokens are, and which of them see each other.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "aligned.h"
#include "attn/attention.h"
#include "attn/tables.h"
#include "torch_tensors.h"

namespace mmgen_kernels::attn {

template <class T>
using Buffer = std::vector<T, Aligned<T>>;

// (B, T, H, D), read by row.
struct Stream {
  Tensor tensor;  // keeps the data alive
  char* data = nullptr;
  int64_t length = 0, stride[3] = {};  // bytes, from sample to sample, token to token, head to head

  Stream() = default;
  explicit Stream(const Tensor& t) : tensor(with_dense_channels(t)), length(tensor.size(1)) {
    data = static_cast<char*>(const_cast<void*>(tensor.const_data_ptr()));
    for (int i = 0; i < 3; ++i) stride[i] = tensor.stride(i) * int64_t(tensor.element_size());
  }
  char* row(int64_t b, int64_t t, int64_t h) const { return data + b * stride[0] + t * stride[1] + h * stride[2]; }
};

// The tokens of one stream, or of two, one after the other. Of the first some samples may have fewer than it has room for: those of
// the second follow at once.
struct Tokens {
  Stream first, second;
  std::vector<int64_t> of_first;  // of each sample; empty where there is no second
  int dtype;
  int64_t samples, length, heads, dim, bytes;

  explicit Tokens(const Tensor& t)
      : first(t), dtype(static_cast<int>(float_of(t.scalar_type()))), samples(t.size(0)), length(t.size(1)), heads(t.size(2)),
        dim(t.size(3)), bytes(t.element_size()) {}
  Tokens(const Tensor& one, const Tensor& other, std::vector<int64_t> of_first) : Tokens(one) {
    second = Stream(other), this->of_first = std::move(of_first), length += second.length;
  }
  Tokens(const Tensor& one, const Tensor& other) : Tokens(one, other, std::vector<int64_t>(one.size(0), one.size(1))) {}

  int64_t split(int64_t b) const { return of_first.empty() ? length : of_first[b]; }
  char* row(int64_t b, int64_t t, int64_t h) const {
    const int64_t at = split(b);
    return t < at ? first.row(b, t, h) : second.row(b, t - at, h);
  }
};

// (1 or B, 1 or H, 1 or T, 1 or S), added to the logits.
struct Bias {
  Tensor tensor;
  const char* data = nullptr;
  int dtype = 0;
  int64_t stride[4] = {}, key_bytes = 0;  // bytes; 0 where the size is 1

  explicit Bias(const Optional& bias) {
    if (!bias) return;
    tensor = with_dense_channels(*bias);
    data = static_cast<const char*>(tensor.const_data_ptr());
    dtype = static_cast<int>(float_of(tensor.scalar_type()));
    for (int i = 0; i < 4; ++i) stride[i] = tensor.size(i) == 1 ? 0 : tensor.stride(i) * int64_t(tensor.element_size());
  }
  bool given() const { return data; }
  bool one_for_all_keys() const { return stride[3] == 0; }
  const char* at(int64_t b, int64_t h, int64_t t, int64_t j) const {
    return data + b * stride[0] + h * stride[1] + t * stride[2] + j * stride[3];
  }
};

// Queries [q_begin, q_begin + queries) of sample b see keys [k_begin, k_begin + keys), and nobody else does; `unseen` keys follow,
// which no query sees.
struct Piece {
  int64_t b, q_begin, queries, k_begin, keys, unseen;
};

// Queries of a head of a piece that a thread takes at a time.
struct Item {
  const Piece* piece;
  int64_t head, begin, count;
};

inline int64_t integer_at(const Tensor& t, int64_t i) {
  const void* data = t.const_data_ptr();
  return t.scalar_type() == ScalarType::Long ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
}

// They cover every query and every key once; bounds out of range or decreasing are clamped.
inline std::vector<Piece> pieces_of(const Tokens& q, const Tokens& k, const Optional& key_lengths, const Optional& cu_seqlens_q,
                                    const Optional& cu_seqlens_k) {
  std::vector<Piece> pieces;
  const int64_t T = q.length, S = k.length;
  if (!cu_seqlens_q || !cu_seqlens_k) {
    const Tensor lengths = key_lengths ? torch::stable::contiguous(*key_lengths) : Tensor();
    for (int64_t b = 0; b < q.samples; ++b) {
      const int64_t keys = key_lengths ? std::clamp<int64_t>(integer_at(lengths, b), 0, S) : S;
      pieces.push_back({b, 0, T, 0, keys, S - keys});
    }
    return pieces;
  }
  const Tensor of_q = torch::stable::contiguous(*cu_seqlens_q), of_k = torch::stable::contiguous(*cu_seqlens_k);
  int64_t q_end = std::clamp<int64_t>(integer_at(of_q, 0), 0, T), k_end = std::clamp<int64_t>(integer_at(of_k, 0), 0, S);
  pieces.push_back({0, 0, q_end, 0, 0, k_end});
  for (int64_t c = 1; c < of_q.size(0); ++c) {
    const int64_t q_begin = q_end, k_begin = k_end;
    q_end = std::clamp(integer_at(of_q, c), q_begin, T), k_end = std::clamp(integer_at(of_k, c), k_begin, S);
    pieces.push_back({0, q_begin, q_end - q_begin, k_begin, k_end - k_begin, 0});
  }
  pieces.push_back({0, q_end, T - q_end, k_end, 0, S - k_end});
  return pieces;
}

// Two streams whose queries see the keys of both.
struct JointTokens {
  Tokens q, k, v;
  std::vector<Piece> pieces;

  JointTokens(const Tensor& q_1, const Tensor& k_1, const Tensor& v_1, const Tensor& q_2, const Tensor& k_2, const Tensor& v_2,
              const Optional& key_lengths_1, const Optional& key_lengths_2)
      : q(q_1, q_2), k(k_1, k_2, lengths(k_1, key_lengths_1)), v(v_1, v_2, k.of_first) {
    const std::vector<int64_t> of_second = lengths(k_2, key_lengths_2);
    for (int64_t b = 0; b < q.samples; ++b) pieces.push_back({b, 0, q.length, 0, k.of_first[b] + of_second[b], 0});
  }

 private:
  static std::vector<int64_t> lengths(const Tensor& keys, const Optional& given) {
    std::vector<int64_t> of(keys.size(0), keys.size(1));
    if (!given) return of;
    const Tensor contiguous = torch::stable::contiguous(*given);
    for (size_t b = 0; b < of.size(); ++b) of[b] = std::clamp<int64_t>(integer_at(contiguous, b), 0, of[b]);
    return of;
  }
};

// (B, H, T): fp32 beside 16-bit queries, else fp64.
struct LogSumExp {
  void* data;
  bool narrow;

  explicit LogSumExp(const Tensor& lse)
      : data(const_cast<void*>(lse.const_data_ptr())), narrow(lse.scalar_type() == ScalarType::Float) {}
  double operator[](int64_t i) const { return narrow ? static_cast<float*>(data)[i] : static_cast<double*>(data)[i]; }
  void write(int64_t i, double value) const {
    if (narrow) static_cast<float*>(data)[i] = static_cast<float>(value);
    else static_cast<double*>(data)[i] = value;
  }
};

template <class Real>
struct Problem {
  const Kernels<Real>& kernels = kernels_of<Real>(selected());
  Tokens q, k, v;
  Bias bias;
  std::vector<Piece> pieces;
  bool causal;
  double scale;
  int64_t dim, group, ld;  // heads of q for one of k; channels of a row in panels

  Problem(Tokens of_q, Tokens of_k, Tokens of_v, const Optional& bias, std::vector<Piece> pieces, bool causal, double scale)
      : q(std::move(of_q)), k(std::move(of_k)), v(std::move(of_v)), bias(bias), pieces(std::move(pieces)), causal(causal),
        scale(scale), dim(q.dim), group(q.heads / k.heads), ld((dim + kernels.width - 1) / kernels.width * kernels.width) {}

  // f(row, stride, done, count) for rows [begin, begin + count) of a head: once for each stream that has some of them.
  template <class F>
  static void each_stream(const Tokens& of, int64_t b, int64_t begin, int64_t count, int64_t head, const F& f) {
    const int64_t in_first = std::clamp<int64_t>(of.split(b) - begin, 0, count);
    if (in_first > 0) f(of.row(b, begin, head), of.first.stride[1], int64_t(0), in_first);
    if (in_first < count) f(of.row(b, begin + in_first, head), of.second.stride[1], in_first, count - in_first);
  }
  // They as a panel, times `factor`; a panel as they; and they are read soon.
  void panel(const Tokens& of, int64_t b, int64_t begin, int64_t count, int64_t head, Real factor, Real* out) const {
    each_stream(of, b, begin, count, head, [&](const char* row, int64_t stride, int64_t done, int64_t rows) {
      kernels.widen[of.dtype](row, stride, rows, dim, factor, ld, out + done * ld);
    });
  }
  void write(const Real* panel, Real factor, const Tokens& to, int64_t b, int64_t begin, int64_t count, int64_t head) const {
    each_stream(to, b, begin, count, head, [&](char* row, int64_t stride, int64_t done, int64_t rows) {
      kernels.narrow[to.dtype](panel + done * ld, ld, rows, dim, factor, row, stride);
    });
  }
  static void ask(Ahead& ahead, const Tokens& of, int64_t b, int64_t begin, int64_t count, int64_t head) {
    each_stream(of, b, begin, count, head,
                [&](const char* row, int64_t stride, int64_t, int64_t rows) { ahead.ask(row, stride, rows); });
  }

  // Logits of `queries` rows of a panel of scaled queries, the first of them number t of its piece, with a block of `keys` keys
  // from number j on.
  void logits(const Piece& piece, int64_t head, int64_t t, int64_t queries, int64_t j, int64_t keys, const Real* panel_q,
              const Real* transposed_k, Real* out, Ahead& ahead) const {
    inner_products(queries, keys, panel_q, transposed_k, out, ahead);
    if (!bias.given()) return;
    for (int64_t i = 0; i < queries; ++i)
      kernels.add_bias[bias.dtype](out + i * block_keys, bias.at(piece.b, head, t + i, j), bias.one_for_all_keys(), keys);
  }
  // Of rows of a panel with the columns of a transposed one. Two sums of half as many products err by 0.7 of what one of all does.
  void inner_products(int64_t rows, int64_t columns, const Real* panel, const Real* transposed, Real* out,
                      Ahead& ahead) const {
    const int64_t half = dim / 2, padded = (columns + kernels.width - 1) / kernels.width * kernels.width;
    kernels.multiply(rows, padded, half, panel, ld, 1, transposed, block_keys, out, block_keys, false,
                     ahead);
    kernels.multiply(rows, padded, dim - half, panel + half, ld, 1, transposed + half * block_keys, block_keys, out, block_keys,
                     true, ahead);
  }

  // How many keys of a block from j on the query number t of its piece sees.
  int64_t seen(int64_t t, int64_t j, int64_t keys) const { return causal ? std::clamp<int64_t>(t + 1 - j, 0, keys) : keys; }
};

// Upstream gradients and what the forward left.
struct Upstream {
  Tokens grad_out, out;
  Tensor lse_tensor, grad_lse_tensor;  // keep the data alive
  LogSumExp lse, grad_lse;
  bool through_lse;  // there is a grad_lse

  Upstream(Tokens grad_out, Tokens out, const Tensor& lse, const Optional& grad_lse)
      : grad_out(std::move(grad_out)), out(std::move(out)), lse_tensor(torch::stable::contiguous(lse)),
        grad_lse_tensor(grad_lse ? torch::stable::contiguous(*grad_lse) : lse_tensor), lse(lse_tensor), grad_lse(grad_lse_tensor),
        through_lse(grad_lse) {}
};

}  // namespace mmgen_kernels::attn
