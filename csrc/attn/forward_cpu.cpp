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

  Forward(const Problem<Real>& problem, int64_t most_queries, char* out, const LogSumExp& lse)
      : p(problem), out(out), lse(lse), panel_q(most_queries * p.ld), sums(most_queries * p.ld), keys(block_keys * p.ld),
        transposed(block_keys * p.dim), values(block_keys * p.ld), weights(std::min(block_queries, most_queries) * block_keys),
        maximum(most_queries), divisor(most_queries) {}

  void operator()(const Item& item) {
    const Piece& piece = *item.piece;
    const int64_t group = item.head / p.group, end = item.begin + item.count;
    p.panel(p.q, piece.b, piece.q_begin + item.begin, item.count, item.head, static_cast<Real>(p.scale), panel_q.data());
    std::fill_n(sums.data(), item.count * p.ld, Real(0));
    std::fill_n(maximum.data(), item.count, -std::numeric_limits<Real>::infinity());
    std::fill_n(divisor.data(), item.count, Real(0));
    const int64_t visible = p.causal ? std::min(piece.keys, end) : piece.keys;
    for (int64_t j = 0; j < visible; j += block_keys) {
      const int64_t count = std::min(block_keys, piece.keys - j);
      p.panel(p.k, piece.b, piece.k_begin + j, count, group, Real(1), keys.data());
      p.kernels.transpose(keys.data(), count, p.dim, p.ld, transposed.data());
      p.panel(p.v, piece.b, piece.k_begin + j, count, group, Real(1), values.data());
      for (int64_t t = item.begin; t < end; t += block_queries) {
        const int64_t queries = std::min(block_queries, end - t);
        if (p.seen(t + queries - 1, j, count) > 0) block(piece, item, t, queries, j, count);
      }
    }
    for (int64_t i = 0; i < item.count; ++i) {
      const int64_t t = piece.q_begin + item.begin + i, head = piece.b * p.q.heads + item.head;
      const Real d = divisor[i];  // 0 where no key was seen; NaN stays
      p.kernels.narrow[p.q.dtype](sums.data() + i * p.ld, d == 0 ? Real(0) : 1 / d, p.dim,
                                  out + ((piece.b * p.q.length + t) * p.q.heads + item.head) * p.dim * p.q.bytes);
      lse.write(head * p.q.length + t, double(maximum[i]) + std::log(double(d)));
    }
  }

 private:
  void block(const Piece& piece, const Item& item, int64_t t, int64_t queries, int64_t j, int64_t count) {
    const int64_t first = t - item.begin;
    p.logits(piece, item.head, t, queries, j, count, panel_q.data() + first * p.ld, transposed.data(), weights.data());
    for (int64_t i = 0; i < queries; ++i) {
      const Real factor = p.kernels.soften(weights.data() + i * block_keys, p.seen(t + i, j, count), count, &maximum[first + i],
                                           &divisor[first + i]);
      if (factor != 1) p.kernels.scale(sums.data() + (first + i) * p.ld, factor, p.ld);
    }
    p.kernels.multiply(queries, p.ld, count, weights.data(), block_keys, 1, values.data(), p.ld, sums.data() + first * p.ld, p.ld,
                       true);
  }

  const Problem<Real>& p;
  char* out;
  LogSumExp lse;
  Buffer<Real> panel_q, sums, keys, transposed, values, weights, maximum, divisor;
};

template <class Worker, class Real>
std::tuple<Tensor, Tensor> forward(const Problem<Real>& p) {
  const bool narrow = p.q.bytes == 2;
  const Tensor out = empty_as(p.q.tensor);
  const Tensor lse = empty(p.q.tensor, {p.q.samples, p.q.heads, p.q.length}, narrow ? ScalarType::Float : ScalarType::Double);
  std::vector<Item> items;
  int64_t most_queries = 0;
  for (const Piece& piece : p.pieces) {
    most_queries = std::max(most_queries, std::min(Worker::queries_at_a_time, piece.queries));
    for (int64_t head = 0; head < p.q.heads; ++head)
      for (int64_t t = 0; t < piece.queries; t += Worker::queries_at_a_time)
        items.push_back({&piece, head, t, std::min(Worker::queries_at_a_time, piece.queries - t)});
  }
  auto* out_data = static_cast<char*>(out.mutable_data_ptr());
  const LogSumExp lse_data(lse);
  const auto make = [&] {
    return [&, worker = Worker(p, most_queries, out_data, lse_data)](int64_t i) mutable { worker(items[i]); };
  };
  // 8 products of a cycle's 32
  parallel_on_demand(static_cast<int64_t>(items.size()), make, most_queries * p.k.length * p.dim / 8);
  return {out, lse};
}

}  // namespace

std::tuple<Tensor, Tensor> attention_cpu(const Tensor& q, const Tensor& k, const Tensor& v, const Optional& bias,
                                         const Optional& key_lengths, const Optional& cu_seqlens_q, const Optional& cu_seqlens_k,
                                         bool causal, double scale, bool) {
  const auto problem = [&]<class Real>(Real) {
    return Problem<Real>(q, k, v, bias, key_lengths, cu_seqlens_q, cu_seqlens_k, causal, scale);
  };
  if (is_double(q)) return forward<Forward<double>>(problem(double()));
  if (on_tiles(q)) return forward<TiledForward>(problem(float()));
  return forward<Forward<float>>(problem(float()));
}

}  // namespace mmgen_kernels::attn
