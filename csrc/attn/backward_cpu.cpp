// attention on the CPU, backward: a thread takes all heads that read one head of keys, so that every sum is one thread's, in the
// order of queries and keys. The gradient of the bias has a pass of its own, as others share it.
#include "attn/tiled_backward.h"
#include "parallel.h"

namespace mmgen_kernels::attn {
namespace {

// A head's queries as the backward reads them: scaled, with upstream gradients, lse, and inner product of weights and their
// gradients, which is out . grad_out.
template <class Real>
struct Queries {
  Buffer<Real> q, grad_out, grad_lse, inner;
  Buffer<double> lse;

  void read(const Problem<Real>& p, const Upstream& up, const Piece& piece, int64_t head, int64_t begin, int64_t count) {
    const int64_t first = piece.q_begin + begin;
    for (Buffer<Real>* panel : {&q, &grad_out, &out}) panel->resize(std::max<int64_t>(panel->size(), count * p.ld));
    for (Buffer<Real>* column : {&grad_lse, &inner}) column->resize(std::max<int64_t>(column->size(), count));
    lse.resize(std::max<int64_t>(lse.size(), count));
    p.panel(p.q, piece.b, first, count, head, static_cast<Real>(p.scale), q.data());
    p.panel(up.grad_out, piece.b, first, count, head, Real(1), grad_out.data());
    p.panel(up.out, piece.b, first, count, head, Real(1), out.data());
    p.kernels.dots(count, grad_out.data(), out.data(), p.ld, inner.data());
    const int64_t at = (piece.b * p.q.heads + head) * p.q.length + first;
    for (int64_t i = 0; i < count; ++i) {
      lse[i] = up.lse[at + i];
      grad_lse[i] = up.through_lse ? static_cast<Real>(up.grad_lse[at + i]) : Real(0);
    }
  }

 private:
  Buffer<Real> out;
};

// A block of keys and values, and of weights and gradients of the logits that some queries have with it.
template <class Real>
struct Block {
  Buffer<Real> keys, transposed_keys, transposed_values, weights, grad_logits;

  explicit Block(const Problem<Real>& p)
      : keys(block_keys * p.ld), transposed_keys(block_keys * p.dim), transposed_values(block_keys * p.dim),
        weights(std::min(block_queries, p.q.length) * block_keys), grad_logits(weights.size()) {}

  void read(const Problem<Real>& p, const Piece& piece, int64_t group, int64_t j, int64_t count) {
    p.panel(p.v, piece.b, piece.k_begin + j, count, group, Real(1), keys.data());
    p.kernels.transpose(keys.data(), count, p.dim, p.ld, transposed_values.data());
    p.panel(p.k, piece.b, piece.k_begin + j, count, group, Real(1), keys.data());
    p.kernels.transpose(keys.data(), count, p.dim, p.ld, transposed_keys.data());
  }

  // Of queries t to t + `count` of the piece, which lie in `of` from row `row` on.
  void differentiate(const Problem<Real>& p, const Piece& piece, int64_t head, int64_t t, int64_t count, int64_t j, int64_t keys,
                     const Queries<Real>& of, int64_t row, Ahead& ahead) {
    p.logits(piece, head, t, count, j, keys, of.q.data() + row * p.ld, transposed_keys.data(), weights.data(), ahead);
    p.inner_products(count, keys, of.grad_out.data() + row * p.ld, transposed_values.data(), grad_logits.data(), ahead);
    for (int64_t i = 0; i < count; ++i)
      p.kernels.differentiate(weights.data() + i * block_keys, grad_logits.data() + i * block_keys, of.lse[row + i],
                              of.inner[row + i], of.grad_lse[row + i], p.seen(t + i, j, keys), keys);
  }
};

template <class Real>
class Backward {
 public:
  Backward(const Problem<Real>& problem, const Upstream& up, const Tokens& grad_q, const Tokens& grad_k, const Tokens& grad_v)
      : p(problem), up(up), grad_q(grad_q), grad_k(grad_k), grad_v(grad_v), block(problem),
        ahead(p.dim * p.q.bytes) {}

  // `next` and its group: what the thread probably takes after this, or null
  void operator()(const Piece& piece, int64_t group, const Piece* next, int64_t next_group) {
    sum_q.resize(piece.queries * p.ld);
    for (Buffer<Real>* sum : {&sum_k, &sum_v}) sum->resize(piece.keys * p.ld);
    for (int64_t head = group * p.group; head < (group + 1) * p.group; ++head) {
      queries.read(p, up, piece, head, 0, piece.queries);
      if (piece.keys == 0) std::fill(sum_q.begin(), sum_q.end(), Real(0));
      for (int64_t j = 0; j < piece.keys; j += block_keys) {
        ahead.begin(piece.queries);  // five products of them, five or six rows at a time
        if (j + block_keys < piece.keys) ask_for_keys(piece, group, j + block_keys);
        else if (head + 1 < (group + 1) * p.group) ask_for_queries(piece, head + 1), ask_for_keys(piece, group, 0);
        else if (next) ask_for_queries(*next, next_group * p.group), ask_for_keys(*next, next_group, 0);
        one_block(piece, group, head, j);
      }
      write(grad_q, piece.b, piece.q_begin, piece.queries, head, static_cast<Real>(p.scale), sum_q);
    }
    write(grad_k, piece.b, piece.k_begin, piece.keys, group, Real(1), sum_k);
    write(grad_v, piece.b, piece.k_begin, piece.keys, group, Real(1), sum_v);
    for (Buffer<Real>* sum : {&sum_k, &sum_v}) sum->assign(piece.unseen * p.ld, Real(0));
    write(grad_k, piece.b, piece.k_begin + piece.keys, piece.unseen, group, Real(1), sum_k);
    write(grad_v, piece.b, piece.k_begin + piece.keys, piece.unseen, group, Real(1), sum_v);
  }

 private:
  void ask_for_keys(const Piece& piece, int64_t group, int64_t j) {
    const int64_t count = std::min(block_keys, piece.keys - j);
    p.ask(ahead, p.k, piece.b, piece.k_begin + j, count, group);
    p.ask(ahead, p.v, piece.b, piece.k_begin + j, count, group);
  }
  // As many as L2 holds beside the present ones.
  void ask_for_queries(const Piece& piece, int64_t head) {
    const int64_t count = std::min<int64_t>(piece.queries, 512);
    for (const Tokens* of : {&p.q, &up.grad_out, &up.out}) p.ask(ahead, *of, piece.b, piece.q_begin, count, head);
  }

  void one_block(const Piece& piece, int64_t group, int64_t head, int64_t j) {
    const int64_t count = std::min(block_keys, piece.keys - j);
    const int64_t blind = p.causal ? std::min(j, piece.queries) / block_queries * block_queries : 0;  // their queries come before
    if (blind >= piece.queries)
      for (Buffer<Real>* sum : {&sum_k, &sum_v}) std::fill_n(sum->data() + j * p.ld, count * p.ld, Real(0));
    block.read(p, piece, group, j, count);
    const auto add = [&](int64_t m, int64_t k, const Buffer<Real>& a, int64_t a_row, int64_t a_column, const Real* b, Real* sum,
                         bool first) {
      p.kernels.multiply(m, p.ld, k, a.data(), a_row, a_column, b, p.ld, sum, p.ld, !first, ahead);
    };
    for (int64_t t = blind; t < piece.queries; t += block_queries) {
      const int64_t rows = std::min(block_queries, piece.queries - t);
      const bool first = head == group * p.group && t == blind;
      block.differentiate(p, piece, head, t, rows, j, count, queries, t, ahead);
      add(count, rows, block.weights, 1, block_keys, queries.grad_out.data() + t * p.ld, sum_v.data() + j * p.ld, first);
      add(count, rows, block.grad_logits, 1, block_keys, queries.q.data() + t * p.ld, sum_k.data() + j * p.ld, first);
      add(rows, count, block.grad_logits, block_keys, 1, block.keys.data(), sum_q.data() + t * p.ld, j == 0);
    }
  }

  void write(const Tokens& to, int64_t b, int64_t begin, int64_t count, int64_t head, Real factor, const Buffer<Real>& sum) const {
    if (to.length == 0) return;  // nobody asked for it
    p.write(sum.data(), factor, to, b, begin, count, head);
  }

  const Problem<Real>& p;
  const Upstream& up;
  Tokens grad_q, grad_k, grad_v;
  Queries<Real> queries;
  Block<Real> block;
  Buffer<Real> sum_q, sum_k, sum_v;
  Ahead ahead;
};

// Gradients of logits for that of a bias.
template <class Real>
class LogitGradients {
 public:
  static constexpr int64_t keys = block_keys;

  LogitGradients(const Problem<Real>& problem, const Upstream& up) : p(problem), up(up), block(problem), ahead(0) {}

  void read(const Piece& piece, int64_t head, int64_t t, int64_t count) { queries.read(p, up, piece, head, t, count); }

  // (count, keys)
  const Real* operator()(const Piece& piece, int64_t head, int64_t t, int64_t count, int64_t j, int64_t of_keys) {
    block.read(p, piece, head / p.group, j, of_keys);
    block.differentiate(p, piece, head, t, count, j, of_keys, queries, 0, ahead);
    return block.grad_logits.data();
  }

 private:
  const Problem<Real>& p;
  const Upstream& up;
  Queries<Real> queries;
  Block<Real> block;
  Ahead ahead;
};

// The gradient of the bias sums over what the bias was broadcast over, samples first, then heads, queries and keys, in that order.
// A thread takes some rows of the bias as it is.
template <class Gradients, class Real>
class BiasGradient {
 public:
  BiasGradient(const Problem<Real>& problem, const Upstream& up, const Tensor& grad)
      : p(problem), grad(grad), gradients(problem, up),
        sums(std::max<int64_t>(1, std::min(block_queries, p.q.length)) * std::max<int64_t>(1, p.k.length) +
             p.kernels.width) {}  // a row's last vector is read whole

  void operator()(int64_t b, int64_t h, int64_t begin, int64_t count) {
    const bool for_all_samples = grad.size(0) == 1, for_all_heads = grad.size(1) == 1, for_all_queries = grad.size(2) == 1;
    const int64_t S = p.k.length;
    std::fill(sums.begin(), sums.end(), Real(0));
    for (int64_t sample = for_all_samples ? 0 : b; sample < (for_all_samples ? p.q.samples : b + 1); ++sample)
      for (int64_t head = for_all_heads ? 0 : h; head < (for_all_heads ? p.q.heads : h + 1); ++head)
        for (int64_t t = for_all_queries ? 0 : begin; t < (for_all_queries ? p.q.length : begin + count); t += block_queries)
          add(p.pieces[sample], head, t, std::min(block_queries, p.q.length - t), for_all_queries);
    const int64_t rows = for_all_queries ? 1 : count, columns = grad.size(3), bytes = grad.element_size();
    const int dtype = static_cast<int>(float_of(grad.scalar_type()));
    auto* to = static_cast<char*>(grad.mutable_data_ptr()) + (((b * grad.size(1) + h) * grad.size(2)) + begin) * columns * bytes;
    for (int64_t i = 0; i < rows; ++i) {
      Real* row = sums.data() + i * S;
      if (columns == 1) row[0] = static_cast<Real>(p.kernels.total(row, S));
      p.kernels.narrow[dtype](row, 0, 1, columns, Real(1), to + i * columns * bytes, 0);
    }
  }

 private:
  void add(const Piece& piece, int64_t head, int64_t t, int64_t count, bool in_one_row) {
    count = std::min(count, piece.queries - t);
    gradients.read(piece, head, t, count);
    for (int64_t j = 0; j < piece.keys; j += Gradients::keys) {
      const int64_t keys = std::min(Gradients::keys, piece.keys - j);
      const Real* of = gradients(piece, head, t, count, j, keys);
      for (int64_t i = 0; i < count; ++i) {
        Real* sum = sums.data() + (in_one_row ? 0 : i) * p.k.length + j;
        for (int64_t s = 0; s < keys; ++s) sum[s] += of[i * Gradients::keys + s];
      }
    }
  }

  const Problem<Real>& p;
  Tensor grad;
  Gradients gradients;
  Buffer<Real> sums;
};

// Fills in the gradients; those that nobody needs have no tokens.
template <class Worker, class Real>
void backward(const Problem<Real>& p, const Upstream& up, const Tokens& grad_q, const Tokens& grad_k, const Tokens& grad_v) {
  const int64_t count = static_cast<int64_t>(p.pieces.size()) * p.k.heads, threads = torch::stable::get_num_threads();
  const auto make = [&] {
    return [&, worker = Worker(p, up, grad_q, grad_k, grad_v)](int64_t i) mutable {
      const int64_t next = i + threads;
      worker(p.pieces[i / p.k.heads], i % p.k.heads, next < count ? &p.pieces[next / p.k.heads] : nullptr, next % p.k.heads);
    };
  };
  parallel_on_demand(count, make, p.q.length * p.k.length * p.dim / 4 * p.group);
}

template <class Gradients, class Real>
void backward_of_bias(const Problem<Real>& p, const Upstream& up, const Tensor& grad) {
  const int64_t heads = grad.size(1), rows = grad.size(2), row_blocks = (rows + block_queries - 1) / block_queries;
  if (grad.numel() == 0) return;
  parallel_on_demand(grad.size(0) * heads * row_blocks, [&] {
    return [&, worker = BiasGradient<Gradients, Real>(p, up, grad)](int64_t i) mutable {
      const int64_t begin = i % row_blocks * block_queries;
      worker(i / row_blocks / heads, i / row_blocks % heads, begin, std::min(block_queries, rows - begin));
    };
  });
}

struct Gradients {
  Tokens q, k, v;
  const Tensor* bias;

  template <class Worker, class OfLogits, class Real>
  void fill(const Problem<Real>& p, const Upstream& up) const {
    if (q.length > 0 || k.length > 0 || v.length > 0) backward<Worker>(p, up, q, k, v);
    if (bias) backward_of_bias<OfLogits>(p, up, *bias);
  }
  void operator()(const Tokens& of_q, const Tokens& of_k, const Tokens& of_v, const Optional& bias, const std::vector<Piece>& pieces,
                  bool causal, double scale, const Upstream& up) const {
    const auto problem = [&]<class Real>(Real, const auto& pieces) {
      return Problem<Real>(of_q, of_k, of_v, bias, pieces, causal, scale);
    };
    if (of_q.bytes == 8) return fill<Backward<double>, LogitGradients<double>>(problem(double(), pieces), up);
    const auto [many, few] = suited_to_tiles(on_tiles(of_q) && on_tiles(up.grad_out) && on_tiles(up.out), pieces);
    if (!many.empty()) fill<TiledBackward, TiledLogitGradients>(problem(float(), many), up);
    if (!few.empty() || pieces.empty()) fill<Backward<float>, LogitGradients<float>>(problem(float(), few), up);
  }
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward_cpu(
    const Optional& grad_out, const Optional& grad_lse, const Tensor& q, const Tensor& k, const Tensor& v, const Optional& bias,
    const Optional& key_lengths, const Optional& cu_seqlens_q, const Optional& cu_seqlens_k, const Tensor& out, const Tensor& lse,
    bool causal, double scale, bool, bool need_grad_q, bool need_grad_k, bool need_grad_v, bool need_grad_bias) {
  const auto grad_of = [](bool needed, const Tensor& t) { return needed ? empty_as(t) : empty(t, {0}, t.scalar_type()); };
  const auto tokens = [&](const Tensor& grad) { return Tokens(grad.dim() == 4 ? grad : empty(q, {0, 0, 0, 0}, q.scalar_type())); };
  const Tensor grad_q = grad_of(need_grad_q, q), grad_k = grad_of(need_grad_k, k), grad_v = grad_of(need_grad_v, v);
  const bool through_bias = need_grad_bias && bias;
  const Tensor grad_bias = grad_of(through_bias, bias ? *bias : q);
  const Tokens queries(q), keys(k);
  const Upstream up(Tokens(grad_out ? *grad_out : zeros_as(q)), Tokens(out), lse, grad_lse);
  const Gradients gradients{tokens(grad_q), tokens(grad_k), tokens(grad_v), through_bias ? &grad_bias : nullptr};
  gradients(queries, keys, Tokens(v), bias, pieces_of(queries, keys, key_lengths, cu_seqlens_q, cu_seqlens_k), causal, scale, up);
  return {grad_q, grad_k, grad_v, grad_bias};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> joint_attention_backward_cpu(
    const Optional& grad_out_1, const Optional& grad_out_2, const Tensor& q_1, const Tensor& k_1, const Tensor& v_1, const Tensor& q_2,
    const Tensor& k_2, const Tensor& v_2, const Optional& key_lengths_1, const Optional& key_lengths_2, const Tensor& out_1,
    const Tensor& out_2, const Tensor& lse, double scale, bool need_grad_q_1, bool need_grad_k_1, bool need_grad_v_1,
    bool need_grad_q_2, bool need_grad_k_2, bool need_grad_v_2) {
  const JointTokens joint(q_1, k_1, v_1, q_2, k_2, v_2, key_lengths_1, key_lengths_2);
  const Upstream up(Tokens(grad_out_1 ? *grad_out_1 : zeros_as(q_1), grad_out_2 ? *grad_out_2 : zeros_as(q_2)), Tokens(out_1, out_2),
                    lse, {});
  // What one stream needs is made for both. Keys beyond key_lengths are in no sum.
  const auto grad_of = [&](bool needed, const Tensor& t) {
    if (!needed) return empty(t, {0}, t.scalar_type());
    return key_lengths_1 || key_lengths_2 ? zeros_as(t) : empty_as(t);
  };
  const bool q = need_grad_q_1 || need_grad_q_2, k = need_grad_k_1 || need_grad_k_2, v = need_grad_v_1 || need_grad_v_2;
  const Tensor grads[] = {grad_of(q, q_1), grad_of(k, k_1), grad_of(v, v_1), grad_of(q, q_2), grad_of(k, k_2), grad_of(v, v_2)};
  const auto tokens = [&](bool needed, int i, const Tokens& like) {
    if (!needed) return Tokens(empty(q_1, {0, 0, 0, 0}, q_1.scalar_type()));
    return Tokens(grads[i], grads[i + 3], like.of_first);
  };
  const Gradients gradients{tokens(q, 0, joint.q), tokens(k, 1, joint.k), tokens(v, 2, joint.v), nullptr};
  gradients(joint.q, joint.k, joint.v, {}, joint.pieces, false, scale, up);
  const auto asked = [&](bool needed, int i) { return needed ? grads[i] : grad_of(false, q_1); };
  return {asked(need_grad_q_1, 0), asked(need_grad_k_1, 1), asked(need_grad_v_1, 2),
          asked(need_grad_q_2, 3), asked(need_grad_k_2, 4), asked(need_grad_v_2, 5)};
}

}  // namespace mmgen_kernels::attn
