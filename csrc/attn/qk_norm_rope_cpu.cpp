// qk_norm_rope on the CPU: q, then k, in one parallel loop over pieces of their tokens, each of which is read once from memory.
//
// The gradients of weights and biases are sums over all tokens: some rows in the type of the computation, in fp64 over a chunk of
// tokens, and in fp64 over the chunks in their order. Chunks are the same whoever computes them.
#include "attn/qk_norm_rope.h"

#include <array>
#include <stdexcept>

#include "attn/problem.h"
#include "attn/qk_norm_rope_tables.h"
#include "parallel.h"

namespace mmgen_kernels::attn {
namespace {

constexpr int64_t tokens_at_a_time = 64;  // a piece, and in the backward a chunk
// Of a run, by D: 16 additions in fp32 err no more than PyTorch's sums do; where a row is little work, a run is one row.
constexpr int64_t rows_of_a_run(int64_t dim) { return dim < 64 ? 1 : 16; }

// (T, P) or (B, T, P), of which a token takes a row.
struct Angles {
  Tensor cos, sin;
  int dtype = 0;
  int64_t pairs = 0;
  bool interleaved = false;

  Angles(const Optional& cos, const Optional& sin, bool interleaved) : interleaved(interleaved) {
    if (!cos || !sin) return;
    this->cos = with_dense_channels(*cos), this->sin = with_dense_channels(*sin);
    dtype = static_cast<int>(float_of(cos->scalar_type()));
    pairs = cos->size(cos->dim() - 1);
  }
  static const char* at(const Tensor& table, int64_t b, int64_t t) {
    const int64_t tokens = table.dim() - 2, place = t * table.stride(tokens) + (tokens ? b * table.stride(0) : 0);
    return static_cast<const char*>(table.const_data_ptr()) + place * table.element_size();
  }
};

struct Options {
  rope::Norm norm;
  bool across;
  double eps;
};

Options options_of(const std::optional<std::string>& norm, bool across, double eps) {
  if (norm && *norm != "rms" && *norm != "layer") throw std::runtime_error("norm must be rms, layer or None, got '" + *norm + "'");
  return {!norm ? rope::Norm::none : *norm == "rms" ? rope::Norm::rms : rope::Norm::layer, across && norm, eps};
}

// q or k: where its tokens are and what its rows are multiplied by.
template <class Real>
struct Side {
  const rope::Kernels<Real>& kernels;
  const Options& options;
  const Angles& angles;
  Tokens x;
  std::optional<Tokens> grad;
  int64_t width;  // channels of a weight
  Buffer<Real> weight, bias;
  Tensor out, grad_weight, grad_bias;
  int64_t slots = 0;  // sums that are wanted: none, that of the weight, or that of the bias too

  Side(const rope::Kernels<Real>& kernels, const Options& options, const Angles& angles, const Tensor& x, const Optional& weight,
       const Optional& bias)
      : kernels(kernels), options(options), angles(angles), x(x), width(options.across ? this->x.heads * this->x.dim : this->x.dim),
        weight(parameter(weight, Real(1))), bias(parameter(bias, Real(-0.0))) {}

  Buffer<Real> parameter(const Optional& given, Real without) const {
    Buffer<Real> row(width, without);
    if (!given) return row;
    const Tensor dense = torch::stable::contiguous(*given);
    kernels.widen[static_cast<int>(float_of(dense.scalar_type()))](dense.const_data_ptr(), width, row.data());
    return row;
  }

  int64_t tokens() const { return x.samples * x.length; }
  int64_t pieces() const { return (tokens() + tokens_at_a_time - 1) / tokens_at_a_time; }
  int64_t work() const { return tokens_at_a_time * x.heads * x.dim; }

  // Token n of `rows`, whose results go to `out`; cos and sin are scratch.
  rope::Heads<Real> heads(const Tokens& rows, int64_t n, bool back, Real* cos, Real* sin) const {
    const int64_t b = n / x.length, t = n - b * x.length;
    if (angles.pairs)
      kernels.angles[angles.dtype](Angles::at(angles.cos, b, t), Angles::at(angles.sin, b, t), angles.pairs, angles.interleaved,
                                   back, cos, sin);
    const int64_t row = x.dim * x.bytes;
    return {.count = x.heads, .dim = x.dim, .norm = options.norm, .across = options.across, .eps = options.eps,
            .weight = weight.data(), .bias = bias.data(), .affine_stride = options.across ? x.dim : 0,
            .cos = cos, .sin = sin, .pairs = angles.pairs, .interleaved = angles.interleaved,
            .x = rows.row(b, t, 0), .grad = grad ? grad->row(b, t, 0) : nullptr, .x_stride = stride(rows),
            .grad_stride = grad ? stride(*grad) : 0,
            .out = static_cast<char*>(const_cast<void*>(out.const_data_ptr())) + n * x.heads * row, .out_stride = row,
            .held = nullptr, .sum_weight = nullptr, .sum_bias = nullptr};
  }
  static int64_t stride(const Tokens& rows) { return rows.first.stride[2]; }
};

// work(side, piece, cos, sin) for the pieces of both sides; cos and sin are a thread's own.
template <class Real, class Work>
void over_pieces(const std::array<Side<Real>*, 2>& sides, const Work& work) {
  const int64_t of_q = sides[0]->pieces(), count = of_q + sides[1]->pieces(), width = 2 * sides[0]->angles.pairs;
  const auto make = [&] {
    return [&, cos = Buffer<Real>(width), sin = Buffer<Real>(width)](int64_t i) mutable {
      if (i < of_q) work(*sides[0], i, cos.data(), sin.data());
      else work(*sides[1], i - of_q, cos.data(), sin.data());
    };
  };
  parallel_on_demand(count, make, std::max(sides[0]->work(), sides[1]->work()));
}

template <class Real>
std::tuple<Tensor, Tensor> forward(const std::array<Side<Real>*, 2>& sides) {
  for (Side<Real>* side : sides) side->out = empty_as(side->x.first.tensor);
  over_pieces(sides, [](const Side<Real>& side, int64_t piece, Real* cos, Real* sin) {
    const int64_t end = std::min(side.tokens(), (piece + 1) * tokens_at_a_time);
    for (int64_t n = piece * tokens_at_a_time; n < end; ++n)
      side.kernels.forward[side.x.dtype](side.heads(side.x, n, false, cos, sin));
  });
  return {sides[0]->out, sides[1]->out};
}

// A chunk of tokens backward; leaves the sums over it at `partial`, (slots, width): of the weight, of the bias.
template <class Real>
void backward_chunk(const Side<Real>& side, int64_t chunk, Real* cos, Real* sin, double* partial) {
  const Tokens& x = side.x;
  const bool across = side.options.across;
  const int64_t run = rows_of_a_run(side.width);
  const int64_t end = std::min(side.tokens(), (chunk + 1) * tokens_at_a_time);
  Buffer<Real> held(across ? side.width : x.dim), sums(2 * side.width, Real(0));
  std::fill_n(partial, side.slots * side.width, 0.0);
  int64_t rows = 0;
  for (int64_t n = chunk * tokens_at_a_time; n < end; ++n) {
    if (side.options.norm == rope::Norm::none) {  // the gradient turned back is all
      side.kernels.forward[x.dtype](side.heads(*side.grad, n, true, cos, sin));
      continue;
    }
    rope::Heads<Real> heads = side.heads(x, n, true, cos, sin);
    heads.held = held.data(), heads.sum_weight = sums.data(), heads.sum_bias = sums.data() + side.width;
    for (int64_t left = x.heads; left > 0; left -= heads.count) {
      heads.count = across ? left : std::min(left, run);
      side.kernels.backward[x.dtype](heads);
      heads.x += heads.count * heads.x_stride, heads.grad += heads.count * heads.grad_stride;
      heads.out += heads.count * heads.out_stride;
      rows += across ? 1 : heads.count;
      if (rows < run && !(n == end - 1 && left == heads.count)) continue;
      side.kernels.collect(sums.data(), side.slots * side.width, partial);
      rows = 0;
    }
  }
}

// A slot of (chunks, slots, width), summed over the chunks, to a parameter's gradient.
template <class Real>
void add_up(const Side<Real>& side, const Buffer<double>& partials, int64_t slot, const Tensor& to) {
  if (to.dim() != 1 || to.size(0) != side.width) return;
  constexpr int64_t columns = 256;
  const auto dtype = static_cast<int>(float_of(to.scalar_type()));
  parallel((side.width + columns - 1) / columns, columns * side.pieces(), [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) {
      const int64_t begin = block * columns, count = std::min(columns, side.width - begin);
      double sum[columns] = {};
      for (int64_t chunk = 0; chunk < side.pieces(); ++chunk)
        for (int64_t d = 0; d < count; ++d) sum[d] += partials[(side.slots * chunk + slot) * side.width + begin + d];
      Real rounded[columns];
      std::copy_n(sum, count, rounded);
      side.kernels.narrow[dtype](rounded, count,
                                 static_cast<char*>(const_cast<void*>(to.const_data_ptr())) + begin * to.element_size());
    }
  });
}

template <class Real>
void backward(const std::array<Side<Real>*, 2>& sides) {
  Buffer<double> partials[2];
  for (int i = 0; i < 2; ++i) partials[i].resize(sides[i]->slots * sides[i]->pieces() * sides[i]->width);
  over_pieces(sides, [&](const Side<Real>& side, int64_t chunk, Real* cos, Real* sin) {
    Buffer<double>& own = partials[&side == sides[1]];
    backward_chunk(side, chunk, cos, sin, own.data() + side.slots * chunk * side.width);
  });
  for (int i = 0; i < 2; ++i) {
    add_up(*sides[i], partials[i], 0, sides[i]->grad_weight);
    add_up(*sides[i], partials[i], 1, sides[i]->grad_bias);
  }
}

}  // namespace

std::tuple<Tensor, Tensor> qk_norm_rope_cpu(const Tensor& q, const Tensor& k, const Optional& q_weight, const Optional& k_weight,
                                            const Optional& q_bias, const Optional& k_bias, const Optional& cos,
                                            const Optional& sin, std::optional<std::string> norm, bool across_heads, double eps,
                                            bool interleaved) {
  const Angles angles(cos, sin, interleaved);
  const Options options = options_of(norm, across_heads, eps);
  const auto run = [&]<class Real>(Real) {
    const rope::Kernels<Real>& kernels = rope::kernels_of<Real>(selected());
    Side<Real> of_q(kernels, options, angles, q, q_weight, q_bias), of_k(kernels, options, angles, k, k_weight, k_bias);
    return forward<Real>({&of_q, &of_k});
  };
  return is_double(q) ? run(double()) : run(float());
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> qk_norm_rope_backward_cpu(
    const Optional& grad_rotated_q, const Optional& grad_rotated_k, const Tensor& q, const Tensor& k, const Optional& q_weight,
    const Optional& k_weight, const Optional& q_bias, const Optional& k_bias, const Optional& cos, const Optional& sin,
    std::optional<std::string> norm, bool across_heads, double eps, bool interleaved, bool need_grad_q, bool need_grad_k,
    bool need_grad_q_weight, bool need_grad_k_weight, bool need_grad_q_bias, bool need_grad_k_bias) {
  const Angles angles(cos, sin, interleaved);
  const Options options = options_of(norm, across_heads, eps);
  const auto none = [&] { return empty(q, {0}, q.scalar_type()); };
  const auto gradient = [&](const Optional& of, bool needed) { return needed && of ? empty_as(*of) : none(); };
  const auto run = [&]<class Real>(Real) {
    const rope::Kernels<Real>& kernels = rope::kernels_of<Real>(selected());
    const auto side = [&](const Tensor& x, const Optional& grad, const Optional& weight, const Optional& bias, bool of_weight,
                          bool of_bias) {
      Side<Real> s(kernels, options, angles, x, weight, bias);
      if (grad && grad->scalar_type() != x.scalar_type()) throw std::runtime_error("a gradient must have its input's dtype");
      s.grad.emplace(grad ? *grad : zeros_as(x));
      s.out = empty_as(x);
      s.grad_weight = gradient(weight, of_weight), s.grad_bias = gradient(bias, of_bias);
      s.slots = of_bias && bias ? 2 : of_weight && weight ? 1 : 0;
      return s;
    };
    Side<Real> of_q = side(q, grad_rotated_q, q_weight, q_bias, need_grad_q_weight, need_grad_q_bias);
    Side<Real> of_k = side(k, grad_rotated_k, k_weight, k_bias, need_grad_k_weight, need_grad_k_bias);
    backward<Real>({&of_q, &of_k});
    return std::tuple(need_grad_q ? of_q.out : none(), need_grad_k ? of_k.out : none(), of_q.grad_weight, of_k.grad_weight,
                      of_q.grad_bias, of_k.grad_bias);
  };
  return is_double(q) ? run(double()) : run(float());
}

}  // namespace mmgen_kernels::attn
