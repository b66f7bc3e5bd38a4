// attention on the CPU, forward: a thread takes some queries of a head and sees all their keys, block by block.
#include "attn/tiled_forward.h"
#include "parallel.h"

namespace mmgen_kernels::attn {
namespace {

template <class Real>
class Forward {
 public:
  // Queries that share one packing of the keys: packing takes 2 % of the time. Theirs is 120 KiB of sums at 72 channels.
  static constexpr int64_t queries_at_a_time = 4 * block_queries;

  Forward(const Problem<Real>& problem, int64_t most_queries, const Tokens& out, const LogSumExp& lse)
      : p(problem), out(out), lse(lse), panel_q(most_queries * p.ld), sums(most_queries * p.ld), keys(block_keys * p.ld),
        transposed(block_keys * p.dim), values(block_keys * p.ld), weights(std::min(block_queries, most_queries) * block_keys),
        seen(p.causal ? block_queries : 0), maximum((most_queries + p.kernels.width - 1) / p.kernels.width * p.kernels.width),
        divisor(maximum.size()), factor(maximum.size()), ahead(p.dim * p.q.bytes) {}

  // `next`: what the thread probably takes after it, or null
  void operator()(const Item& item, const Item* next) {
    const Piece& piece = *item.piece;
    const int64_t group = item.head / p.group, end = item.begin + item.count;
    p.panel(p.q, piece.b, piece.q_begin + item.begin, item.count, item.head, static_cast<Real>(p.scale), panel_q.data());
    std::fill(maximum.begin(), maximum.end(), -std::numeric_limits<Real>::infinity());
    std::fill(divisor.begin(), divisor.end(), Real(0));
    const int64_t visible = p.causal ? std::min(piece.keys, end) : piece.keys;
    if (visible == 0) std::fill_n(sums.data(), item.count * p.ld, Real(0));
    for (int64_t j = 0; j < visible; j += block_keys) {
      const int64_t count = std::min(block_keys, piece.keys - j);
      p.panel(p.k, piece.b, piece.k_begin + j, count, group, Real(1), keys.data());
      p.kernels.transpose(keys.data(), count, p.dim, p.ld, transposed.data());
      p.panel(p.v, piece.b, piece.k_begin + j, count, group, Real(1), values.data());
      ahead.begin(item.count / 2);  // three products of it, five or six rows at a time
      if (j + block_keys < visible) ask_for_keys(piece, group, j + block_keys);
      else if (next) {
        p.ask(ahead, p.q, next->piece->b, next->piece->q_begin + next->begin, next->count, next->head);
        ask_for_keys(*next->piece, next->head / p.group, 0);
      }
      for (int64_t t = item.begin; t < end; t += block_queries) {
        const int64_t queries = std::min(block_queries, end - t);
        if (p.seen(t + queries - 1, j, count) > 0) block(piece, item, t, queries, j, count);
      }
    }
    const int64_t from = piece.q_begin + item.begin, head = piece.b * p.q.heads + item.head;
    for (int64_t i = 0; i < item.count; ++i) {
      const Real d = divisor[i];  // 0 where no key was seen; NaN stays
      factor[i] = d == 0 ? Real(0) : 1 / d;
      lse.write(head * p.q.length + from + i, double(maximum[i]) + std::log(double(d)));
    }
    p.kernels.rescale(sums.data(), item.count, p.ld, factor.data());
    p.write(sums.data(), Real(1), out, piece.b, from, item.count, item.head);
  }

 private:
  void ask_for_keys(const Piece& piece, int64_t group, int64_t j) {
    const int64_t count = std::min(block_keys, piece.keys - j);
    p.ask(ahead, p.k, piece.b, piece.k_begin + j, count, group);
    p.ask(ahead, p.v, piece.b, piece.k_begin + j, count, group);
  }

  void block(const Piece& piece, const Item& item, int64_t t, int64_t queries, int64_t j, int64_t count) {
    const int64_t first = t - item.begin;
    p.logits(piece, item.head, t, queries, j, count, panel_q.data() + first * p.ld, transposed.data(), weights.data(),
             ahead);
    if (p.causal)
      for (int64_t i = 0; i < queries; ++i) seen[i] = p.seen(t + i, j, count);
    const bool changed = p.kernels.soften(weights.data(), queries, p.causal ? seen.data() : nullptr, count, &maximum[first],
                                          &divisor[first], &factor[first]);
    if (j > 0 && changed) p.kernels.rescale(sums.data() + first * p.ld, queries, p.ld, &factor[first]);
    p.kernels.multiply(queries, p.ld, count, weights.data(), block_keys, 1, values.data(), p.ld, sums.data() + first * p.ld, p.ld,
                       j > 0, ahead);
  }

  const Problem<Real>& p;
  const Tokens& out;
  LogSumExp lse;
  Buffer<Real> panel_q, sums, keys, transposed, values, weights;
  Buffer<int64_t> seen;
  Buffer<Real> maximum, divisor, factor;
  Ahead ahead;
};

template <class Worker, class Real>
void forward(const Problem<Real>& p, const Tokens& out, const Tensor& lse) {
  std::vector<Item> items;
  int64_t most_queries = 0;
  for (const Piece& piece : p.pieces) {
    most_queries = std::max(most_queries, std::min(Worker::queries_at_a_time, piece.queries));
    for (int64_t head = 0; head < p.q.heads; ++head)
      for (int64_t t = 0; t < piece.queries; t += Worker::queries_at_a_time)
        items.push_back({&piece, head, t, std::min(Worker::queries_at_a_time, piece.queries - t)});
  }
  const LogSumExp lse_data(lse);
  const size_t threads = torch::stable::get_num_threads();
  const auto make = [&] {
    return [&, worker = Worker(p, most_queries, out, lse_data)](size_t i) mutable {
      worker(items[i], i + threads < items.size() ? &items[i + threads] : nullptr);
    };
  };
  // 8 products of a cycle's 32
  parallel_on_demand(static_cast<int64_t>(items.size()), make, most_queries * p.k.length * p.dim / 8);
}

// Fills in `out`, and returns lse.
Tensor forward(const Tokens& q, const Tokens& k, const Tokens& v, const Optional& bias, const std::vector<Piece>& pieces, bool causal,
               double scale, const Tokens& out) {
  const Tensor lse = empty(q.first.tensor, {q.samples, q.heads, q.length}, q.bytes == 2 ? ScalarType::Float : ScalarType::Double);
  if (q.bytes == 8) {
    forward<Forward<double>>(Problem<double>(q, k, v, bias, pieces, causal, scale), out, lse);
    return lse;
  }
  const auto [many, few] = suited_to_tiles(on_tiles(q), pieces);
  if (!many.empty()) forward<TiledForward>(Problem<float>(q, k, v, bias, many, causal, scale), out, lse);
  if (!few.empty()) forward<Forward<float>>(Problem<float>(q, k, v, bias, few, causal, scale), out, lse);
  return lse;
}

}  // namespace

std::tuple<Tensor, Tensor> attention_cpu(const Tensor& q, const Tensor& k, const Tensor& v, const Optional& bias,
                                         const Optional& key_lengths, const Optional& cu_seqlens_q, const Optional& cu_seqlens_k,
                                         bool causal, double scale, bool) {
  const Tokens queries(q), keys(k);
  const Tensor out = empty_as(q);
  const auto pieces = pieces_of(queries, keys, key_lengths, cu_seqlens_q, cu_seqlens_k);
  return {out, forward(queries, keys, Tokens(v), bias, pieces, causal, scale, Tokens(out))};
}

std::tuple<Tensor, Tensor, Tensor> joint_attention_cpu(const Tensor& q_1, const Tensor& k_1, const Tensor& v_1, const Tensor& q_2,
                                                       const Tensor& k_2, const Tensor& v_2, const Optional& key_lengths_1,
                                                       const Optional& key_lengths_2, double scale) {
  const Tensor out_1 = empty_as(q_1), out_2 = empty_as(q_2);
  const JointTokens joint(q_1, k_1, v_1, q_2, k_2, v_2, key_lengths_1, key_lengths_2);
  const Tensor lse = forward(joint.q, joint.k, joint.v, {}, joint.pieces, false, scale, Tokens(out_1, out_2));
  return {out_1, out_2, lse};
}

}  // namespace mmgen_kernels::attn
