// The gradients of the family on the CPU: one pass over the tokens, then a sum over chunks of them.
//
// Tokens that share all their vectors form runs. Over a run three rows are summed in the type of the computation, from which all
// gradients of vectors and parameters follow: with n = normed, u the upstream gradient of an output and g that of the sum x + gate y,
//   sum_shift = sum u, sum_scale = sum u n, sum_gate = sum g y.
// Runs are added in fp64 to the rows of a chunk, and chunks, in their order, to the results. A chunk lies within one frame, sample or
// row of packed tokens, whatever is the shortest, so that a result is the sum of consecutive chunks, the same for any batch around it.
#include <cstring>
#include <numeric>

#include "modulation/tokens.h"
#include "parallel.h"

namespace mmgen_kernels::modulation {
namespace {

constexpr int64_t tokens_of_a_chunk = 128, columns_at_a_time = 512;
// Of a run, by D: 16 additions in fp32 err no more than PyTorch's sums do; where a token is little work, a run is one token.
constexpr int64_t tokens_of_a_run(int64_t dim) { return dim < 64 ? 1 : 16; }
enum Slot { weight = vectors, bias, post_weight, slots };  // what chunks add up, after the vectors themselves

// Which tokens a chunk holds, and which chunks a row of a vector.
struct Chunks {
  struct Range {
    int64_t begin, end;
  };
  std::vector<Range> tokens;    // places in `order`
  std::vector<int64_t> order;   // token numbers by row; empty: as they come
  std::vector<int64_t> of_row;  // first chunk of each row of packed tokens, and the end
  int64_t span = 0;             // tokens of a segment

  template <class Vectors>
  Chunks(const Vectors& given, const Rows& rows, int64_t count) {
    int64_t most_rows = 0;
    for (const Vector& v : given) {
      if (v.given && v.by_row) most_rows = std::max(most_rows, v.count);
      else if (v.given && v.span > 1) span = std::gcd(span, v.span);
    }
    if (most_rows == 0) {
      span = span ? span : std::max<int64_t>(count, 1);
      for (int64_t begin = 0; begin < count; begin += span) split({begin, begin + span});
      return;
    }
    const auto row = [&](int64_t n) { return std::clamp<int64_t>(rows[n], 0, most_rows - 1); };
    std::vector<int64_t> next(most_rows + 1);
    for (int64_t n = 0; n < count; ++n) ++next[row(n) + 1];
    for (int64_t r = 0; r < most_rows; ++r) {
      of_row.push_back(static_cast<int64_t>(tokens.size()));
      split({next[r], next[r] + next[r + 1]});
      next[r + 1] += next[r];
    }
    of_row.push_back(static_cast<int64_t>(tokens.size()));
    order.resize(count);
    for (int64_t n = 0; n < count; ++n) order[next[row(n)]++] = n;
  }

  void split(Range segment) {
    for (int64_t begin = segment.begin; begin < segment.end; begin += tokens_of_a_chunk)
      tokens.push_back({begin, std::min(segment.end, begin + tokens_of_a_chunk)});
  }
  int64_t token(int64_t place) const { return order.empty() ? place : order[place]; }

  Range of(const Vector& v, int64_t row) const {
    const auto all = static_cast<int64_t>(tokens.size());
    if (v.by_row) return {of_row[row], row == v.count - 1 ? all : of_row[row + 1]};
    if (v.span == 0) return {0, all};
    const int64_t each = v.span / span * ((span + tokens_of_a_chunk - 1) / tokens_of_a_chunk);
    return {row * each, (row + 1) * each};
  }
};

// What a backward is given and what it is to write. `x` is what was normalised, statistics and all.
struct Task {
  const Optional *grad_residual, *grad_modulated, *grad_modulated_2;
  const Tensor *x, *statistics, *y, *post_statistics;  // null: no norm, no update
  bool layer, post, post_layer;
  bool need_x, need_y;
};

struct Gradients {
  Tensor x, y, slot[slots], table;
};

template <class Real>
struct Backward {
  const Task& task;
  const Shared<Real>& shared;
  const Kernels<Real>& kernels = shared.kernels;
  const int64_t dim = shared.dim;
  const bool need_table;
  std::optional<Activations> upstream, of_output[2], x, y;
  Gradients out;
  int slot_of[slots];  // place among those that chunks add up, or -1
  int used = 0;
  Chunks chunks;
  Buffer<Real> partial;  // (chunks, used, dim)
  static constexpr int real_type = static_cast<int>(sizeof(Real) == 8 ? Float::fp64 : Float::fp32);

  // `like`: of whose dtype the empty gradients are; `parameters`: weight, bias, post_weight
  Backward(const Task& task, const Shared<Real>& shared, const Tensor& like, const std::array<const Optional*, 3>& parameters,
           const std::array<bool, 3>& needs, const Optional& table, bool need_table)
      : task(task), shared(shared), need_table(need_table && table), upstream(activations(*task.grad_residual)),
        of_output{activations(*task.grad_modulated), activations(*task.grad_modulated_2)},
        x(task.x ? std::optional<Activations>(*task.x) : std::nullopt), y(task.y ? std::optional<Activations>(*task.y) : std::nullopt),
        chunks(shared.vector, shared.rows, (task.x ? *x : *y).tokens()) {
    if (upstream && upstream->tensor.scalar_type() != (task.x ? *task.x : *task.grad_residual->operator->()).scalar_type())
      throw std::runtime_error("grad_residual must have the residual's dtype");
    const auto none = [&] { return empty(like, {0}, like.scalar_type()); };
    out.x = task.need_x ? empty_as(*task.x) : none();
    out.y = task.need_y ? empty_as(*task.y) : none();
    for (int s = 0; s < slots; ++s) {
      const bool is_vector = s < vectors;
      const bool given = is_vector ? shared.vector[s].given : parameters[s - vectors]->has_value();
      const bool needed = given && (is_vector ? shared.vector[s].needed : needs[s - vectors]);
      out.slot[s] = !needed ? none() : empty_as(is_vector ? shared.vector[s].tensor : **parameters[s - vectors]);
      const bool by_chunks = (needed && !(is_vector && direct(s))) || (given && is_vector && this->need_table);
      slot_of[s] = by_chunks ? used++ : -1;
    }
    out.table = this->need_table ? empty_as(*table) : none();
    partial.resize(chunks.tokens.size() * used * dim);
  }

  static std::optional<Activations> activations(const Optional& t) {
    return t ? std::optional<Activations>(*t) : std::nullopt;
  }
  // Whether each token has its own row of the vector, so that its gradient is written at once.
  bool direct(int v) const { return shared.vector[v].span == 1 && !shared.vector[v].by_row; }

  struct Worker {
    Backward& of;
    Prepared<Real> prepared;
    Buffer<Real> normed, grad, of_y, scratch, sum_shift[2], sum_scale[2], sum_gate;
    Buffer<double> sums, row, unused;

    explicit Worker(Backward& of)
        : of(of), prepared(of.shared), normed(of.dim), grad(of.dim), of_y(of.dim), scratch(of.dim), sum_gate(of.dim, Real(0)),
          sums(of.used * of.dim, 0.0), row(of.dim), unused(of.dim) {
      for (int i = 0; i < 2; ++i)
        for (auto* sum : {&sum_shift[i], &sum_scale[i]}) sum->assign(of.dim, Real(0));
    }

    void operator()(int64_t chunk) {
      const auto [begin, end] = of.chunks.tokens[chunk];
      int64_t in_run = 0;
      for (int64_t place = begin; place < end; ++place) {
        const int64_t n = of.chunks.token(place);
        if (in_run == tokens_of_a_run(of.dim) || (in_run && prepared.changes_at(n))) flush(), in_run = 0;
        prepared.at(n);
        token(n, of.chunks.token(std::min(place + 1, end - 1)));
        ++in_run;
      }
      flush();
      for (int s = 0; s < of.used; ++s)
        of.kernels.widen[int(Float::fp64)](sums.data() + s * of.dim, of.dim, of.partial.data() + (chunk * of.used + s) * of.dim);
      std::fill(sums.begin(), sums.end(), 0.0);
    }

    void* or_unused(const Tensor& t, bool needed, int64_t n) {
      return needed ? row_of(t, n * of.dim) : unused.data();
    }

    void token(int64_t n, int64_t next) {
      const Kernels<Real>& k = of.kernels;
      const int64_t dim = of.dim;
      const Task& task = of.task;
      const void* upstream = of.upstream ? of.upstream->row(n) : nullptr;
      void* grad_y = task.y ? or_unused(of.out.y, task.need_y, n) : nullptr;
      const bool alike = task.y && !task.post && of.y->dtype == (task.x ? of.x->dtype : of.upstream->dtype);
      if (task.x) {
        void* grad_x = or_unused(of.out.x, task.need_x, n);
        const auto* statistics = static_cast<const Real*>(task.statistics->const_data_ptr()) + 2 * n;
        const Real rstd = statistics[1];
        k.normalize[of.x->dtype](of.x->row(n), statistics[0], rstd, dim, normed.data(), of.x->row(next));
        const Moments mean = outputs(n, next);
        if (alike)
          return k.norm_and_gate_gradient[of.x->dtype](upstream, normed.data(), rstd, mean, of.y->row(n), prepared.gate(), dim,
                                                       grad.data(), grad_x, grad_y, sum_gate.data(),
                                                       upstream ? of.upstream->row(next) : nullptr, of.y->row(next));
        k.norm_gradient[of.x->dtype](upstream, normed.data(), rstd, mean, dim, grad.data(), grad_x);
      } else if (alike) {
        return k.gate_gradient[of.y->dtype](upstream, of.y->row(n), prepared.gate(), dim, grad_y, sum_gate.data(),
                                              of.upstream->row(next), of.y->row(next));
      } else {
        k.widen[of.upstream->dtype](upstream, dim, grad.data());
      }
      if (task.y) update(n, grad_y);
    }

    // The gradient of what comes out of the norm, times weight: in `grad`. Returns its means, alone and times normed.
    Moments outputs(int64_t n, int64_t next) {
      Moments sum{0, 0};
      bool first = true;
      for (int i = 0; i < 2; ++i) {
        if (!of.of_output[i]) continue;
        const Activations& u = *of.of_output[i];
        const auto loop = (first ? of.kernels.output_gradient : of.kernels.second_output_gradient)[u.dtype];
        const Moments m = loop(u.row(n), normed.data(), prepared.factor(i), of.dim, grad.data(), sum_shift[i].data(),
                               sum_scale[i].data(), u.row(next));
        sum = {sum.first + m.first, sum.second + m.second};
        first = false;
      }
      if (first) std::fill(grad.begin(), grad.end(), Real(0));
      return {of.task.layer ? sum.first / of.dim : 0, sum.second / of.dim};
    }

    // Of y, from the gradient of the sum in `grad`, where y is of another dtype or was normalised.
    void update(int64_t n, void* grad_y) {
      const Kernels<Real>& k = of.kernels;
      const int dtype = of.y->dtype;
      if (!of.task.post) {
        k.widen[dtype](of.y->row(n), of.dim, of_y.data());
        k.gate_gradient[real_type](grad.data(), of_y.data(), prepared.gate(), of.dim, scratch.data(), sum_gate.data(),
                                   grad.data(), of_y.data());
        return k.narrow[dtype](scratch.data(), of.dim, grad_y);
      }
      const auto* statistics = static_cast<const Real*>(of.task.post_statistics->const_data_ptr()) + 2 * n;
      k.normalize[dtype](of.y->row(n), statistics[0], statistics[1], of.dim, of_y.data(), of.y->row(n));
      const Moments m = k.post_gradient(grad.data(), of_y.data(), prepared.gate(), of.shared.post_weight.data(), of.dim,
                                        scratch.data(), sum_gate.data());
      const Moments mean{of.task.post_layer ? m.first / of.dim : 0, m.second / of.dim};
      k.norm_gradient[dtype](nullptr, of_y.data(), statistics[1], mean, of.dim, scratch.data(), grad_y);
    }

    // The run's sums go to whatever shares them.
    void flush() {
      const Shared<Real>& shared = of.shared;
      for (int i = 0; i < 2; ++i) {
        const Real *u = sum_shift[i].data(), *un = sum_scale[i].data(), *one_plus = prepared.one_plus(i);
        collect(i ? shift_2 : shift, u, nullptr, nullptr, nullptr);
        if (shared.affine) collect(i ? scale_2 : scale, un, shared.weight.data(), u, shared.bias.data());
        else collect(i ? scale_2 : scale, un, nullptr, nullptr, nullptr);
        if (!of.of_output[i]) continue;  // nobody asks for this output: the sums are 0, which its vectors' gradients are to be
        collect(weight, un, one_plus, nullptr, nullptr);
        collect(bias, u, one_plus, nullptr, nullptr);
        std::fill(sum_shift[i].begin(), sum_shift[i].end(), Real(0));
        std::fill(sum_scale[i].begin(), sum_scale[i].end(), Real(0));
      }
      if (!of.task.y) return;
      const Real* slope = prepared.slope();
      if (of.task.post) {  // what the gate multiplies is normed y times its weight
        for (int64_t d = 0; d < of.dim; ++d) scratch[d] = shared.post_weight[d] * (slope ? slope[d] : Real(1));
        slope = scratch.data();
      }
      collect(gate, sum_gate.data(), slope, nullptr, nullptr);
      collect(post_weight, sum_gate.data(), prepared.gate(), nullptr, nullptr);
      std::fill(sum_gate.begin(), sum_gate.end(), Real(0));
    }

    // a factor + b other, to the slot's sum of this chunk and, where the token alone has this row, to its gradient.
    void collect(int slot, const Real* a, const Real* factor, const Real* b, const Real* other) {
      const Kernels<Real>& k = of.kernels;
      if (of.slot_of[slot] >= 0) k.collect(a, factor, b, other, of.dim, sums.data() + of.slot_of[slot] * of.dim);
      if (slot >= vectors || !of.shared.vector[slot].needed || !of.direct(slot)) return;
      const Tensor& to = of.out.slot[slot];
      if (factor || b) {
        std::fill(row.begin(), row.end(), 0.0);
        k.collect(a, factor, b, other, of.dim, row.data());
        k.widen[int(Float::fp64)](row.data(), of.dim, scratch.data());
        a = scratch.data();
      }
      k.narrow[static_cast<int>(float_of(to.scalar_type()))](a, of.dim, row_of(to, prepared.row[slot] * of.dim));
    }
  };

  // Where element `place` of a result lies.
  static void* row_of(const Tensor& t, int64_t place) {
    return static_cast<char*>(const_cast<void*>(t.const_data_ptr())) + place * t.element_size();
  }

  // One row of a result: the sum of a slot over consecutive chunks.
  struct Sum {
    int slot;
    Chunks::Range range;
    const Tensor* to;
    int64_t row;
  };

  Gradients run() {
    parallel_on_demand(static_cast<int64_t>(chunks.tokens.size()), [&] { return Worker(*this); });
    std::vector<Sum> results;
    const Chunks::Range all{0, static_cast<int64_t>(chunks.tokens.size())};
    int64_t table_row = 0;
    for (int s = 0; s < slots; ++s) {
      if (s < vectors) {
        const Vector& v = shared.vector[s];
        if (v.given && v.needed && !direct(s))
          for (int64_t r = 0; r < v.count; ++r) results.push_back({slot_of[s], chunks.of(v, r), &out.slot[s], r});
        if (v.given && need_table) results.push_back({slot_of[s], all, &out.table, table_row++});
      } else if (out.slot[s].dim() == 1 && out.slot[s].size(0) == dim && slot_of[s] >= 0) {
        results.push_back({slot_of[s], all, &out.slot[s], 0});
      }
    }
    const int64_t blocks = (dim + columns_at_a_time - 1) / columns_at_a_time;
    parallel(static_cast<int64_t>(results.size()) * blocks, columns_at_a_time, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) add_up(results[i / blocks], i % blocks * columns_at_a_time);
    });
    return out;
  }

  void add_up(const Sum& sum, int64_t begin) const {
    const int64_t count = std::min(columns_at_a_time, dim - begin);
    double total[columns_at_a_time] = {};
    Real rounded[columns_at_a_time];
    for (int64_t c = sum.range.begin; c < sum.range.end; ++c) {
      const Real* row = partial.data() + (c * used + sum.slot) * dim + begin;
      for (int64_t d = 0; d < count; ++d) total[d] += row[d];
    }
    std::copy_n(total, count, rounded);
    kernels.narrow[static_cast<int>(float_of(sum.to->scalar_type()))](rounded, count, row_of(*sum.to, sum.row * dim + begin));
  }
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> adaln_backward_cpu(
    const Optional& grad_modulated, const Optional& grad_modulated_2, const Tensor& x, const Tensor& statistics,
    const Optional& shift, const Optional& scale, const Optional& shift_2, const Optional& scale_2, const Optional& weight,
    const Optional& bias, const Optional& table, const Optional& rows, std::string norm, bool need_grad_x, bool need_grad_shift,
    bool need_grad_scale, bool need_grad_shift_2, bool need_grad_scale_2, bool need_grad_weight, bool need_grad_bias,
    bool need_grad_table) {
  const Optional none;
  const Tensor kept = torch::stable::contiguous(statistics);
  const Task task{&none, &grad_modulated, &grad_modulated_2, &x, &kept, nullptr, nullptr, subtracts_mean(norm), false, false,
                  need_grad_x, false};
  const auto run = [&]<class Real>(Real) {
    Shared<Real> shared(x.size(2), x.size(1), {&none, &shift, &scale, &shift_2, &scale_2}, weight, bias, none, table, rows);
    shared.need({false, need_grad_shift, need_grad_scale, need_grad_shift_2, need_grad_scale_2});
    Backward<Real> backward(task, shared, x, {&weight, &bias, &none}, {need_grad_weight, need_grad_bias, false}, table, need_grad_table);
    const Gradients g = backward.run();
    return std::tuple(g.x, g.slot[Name::shift], g.slot[Name::scale], g.slot[Name::shift_2], g.slot[Name::scale_2], g.slot[Slot::weight],
                      g.slot[Slot::bias], g.table);
  };
  return is_double(x) ? run(double()) : run(float());
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gate_residual_backward_cpu(
    const Optional& grad_residual, const Tensor& y, const Tensor& post_statistics, const Optional& gate,
    const Optional& post_weight, const Optional& table, const Optional& rows, std::string gate_fn,
    std::optional<std::string> post_norm, bool need_grad_y, bool need_grad_gate, bool need_grad_post_weight, bool need_grad_table) {
  const Optional none;
  const auto sizes = y.sizes();
  const Optional upstream = grad_residual ? *grad_residual : torch::stable::new_zeros(y, {sizes.begin(), sizes.end()});
  const Tensor kept = torch::stable::contiguous(post_statistics);
  const Task task{&upstream, &none, &none, nullptr, nullptr, &y, &kept, false, post_norm.has_value(),
                  post_norm && subtracts_mean(*post_norm), false, need_grad_y};
  const auto run = [&]<class Real>(Real) {
    Shared<Real> shared(y.size(2), y.size(1), {&gate, &none, &none, &none, &none}, none, none, post_weight, table, rows);
    shared.gate_fn = gate_function(gate_fn);
    shared.need({need_grad_gate, false, false, false, false});
    Backward<Real> backward(task, shared, y, {&none, &none, &post_weight}, {false, false, need_grad_post_weight}, table, need_grad_table);
    const Gradients g = backward.run();
    return std::tuple(g.y, g.slot[Name::gate], g.slot[Slot::post_weight], g.table);
  };
  return is_double(*upstream) ? run(double()) : run(float());
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gate_residual_adaln_backward_cpu(
    const Optional& grad_residual, const Optional& grad_modulated, const Optional& grad_modulated_2, const Tensor& y,
    const Tensor& residual, const Tensor& statistics, const Tensor& post_statistics, const Optional& gate, const Optional& shift,
    const Optional& scale, const Optional& shift_2, const Optional& scale_2, const Optional& weight, const Optional& bias,
    const Optional& post_weight, const Optional& table, const Optional& rows, std::string gate_fn,
    std::optional<std::string> post_norm, std::string norm, bool need_grad_x, bool need_grad_y, bool need_grad_gate,
    bool need_grad_shift, bool need_grad_scale, bool need_grad_shift_2, bool need_grad_scale_2, bool need_grad_weight,
    bool need_grad_bias, bool need_grad_post_weight, bool need_grad_table) {
  const Tensor kept = torch::stable::contiguous(statistics), kept_post = torch::stable::contiguous(post_statistics);
  const Task task{&grad_residual, &grad_modulated, &grad_modulated_2, &residual, &kept, &y, &kept_post, subtracts_mean(norm),
                  post_norm.has_value(), post_norm && subtracts_mean(*post_norm), need_grad_x, need_grad_y};
  const auto run = [&]<class Real>(Real) {
    Shared<Real> shared(y.size(2), y.size(1), {&gate, &shift, &scale, &shift_2, &scale_2}, weight, bias, post_weight, table, rows);
    shared.gate_fn = gate_function(gate_fn);
    shared.need({need_grad_gate, need_grad_shift, need_grad_scale, need_grad_shift_2, need_grad_scale_2});
    Backward<Real> backward(task, shared, residual, {&weight, &bias, &post_weight},
                            {need_grad_weight, need_grad_bias, need_grad_post_weight}, table, need_grad_table);
    const Gradients g = backward.run();
    return std::tuple(g.x, g.y, g.slot[Name::gate], g.slot[Name::shift], g.slot[Name::scale], g.slot[Name::shift_2],
                      g.slot[Name::scale_2], g.slot[Slot::weight], g.slot[Slot::bias], g.slot[Slot::post_weight], g.table);
  };
  return is_double(residual) ? run(double()) : run(float());
}

}  // namespace mmgen_kernels::modulation
