// adaln, gate_residual and gate_residual_adaln on the CPU: one pass over the tokens, each of which is read once, stays in L1 until
// all its results are written, and depends on no other.
#include "modulation/tokens.h"
#include "parallel.h"

namespace mmgen_kernels::modulation {
namespace {

constexpr int64_t tokens_at_a_time = 32;  // that a thread takes

// Of a token: where its channels are, and the bytes of one.
struct Row {
  const char* data;
  int64_t bytes;
};

// mean and 1 / deviation; with `about` + rest for the mean, as the mean itself has too few digits where it is large
template <class Real>
struct Statistics {
  Real about, rest, rstd;

  Statistics(const Kernels<Real>& kernels, const Real* row, double sum, int64_t dim, bool layer, double eps, const Row& next) {
    about = layer ? static_cast<Real>(sum / dim) : Real(0);
    const Moments m = kernels.moments(row, about, dim, next.data, next.bytes);
    const double mean = layer ? m.first / dim : 0;
    const double variance = m.second / dim - mean * mean;  // NaN stays NaN
    rest = static_cast<Real>(mean);
    rstd = static_cast<Real>(1 / std::sqrt((variance < 0 ? 0 : variance) + eps));
  }
  void write(Real* out) const { out[0] = about + rest, out[1] = rstd; }
};

// What is asked for: an update (y), a norm, or both.
struct Update {
  Activations y;
  bool post_norm, layer;
  double eps;
};
struct Norm {
  bool layer, second;
  double eps;
  ScalarType dtype;
};
struct Outputs {
  Tensor residual, modulated, modulated_2, statistics, post_statistics;
};

template <class Real>
Outputs forward(const Activations& x, const Shared<Real>& shared, const Update* update, const Norm* norm) {
  const int64_t dim = shared.dim;
  const std::vector<int64_t> sizes{x.samples, x.length, dim}, two{x.samples, x.length, 2};
  const ScalarType wide = sizeof(Real) == 8 ? ScalarType::Double : ScalarType::Float, as_x = x.tensor.scalar_type();
  const std::vector<int64_t> none{0};
  const bool post = update && update->post_norm, second = norm && norm->second;
  const ScalarType out_dtype = norm ? norm->dtype : as_x;
  Outputs out{empty(x.tensor, update ? sizes : none, as_x), empty(x.tensor, norm ? sizes : none, out_dtype),
              empty(x.tensor, second ? sizes : none, out_dtype), empty(x.tensor, norm ? two : none, wide),
              empty(x.tensor, post ? two : none, wide)};
  auto* residual = static_cast<char*>(out.residual.mutable_data_ptr());
  char* modulated[2] = {static_cast<char*>(out.modulated.mutable_data_ptr()), static_cast<char*>(out.modulated_2.mutable_data_ptr())};
  auto* statistics = static_cast<Real*>(out.statistics.mutable_data_ptr());
  auto* post_statistics = static_cast<Real*>(out.post_statistics.mutable_data_ptr());
  const int64_t x_bytes = dim * x.tensor.element_size(), out_bytes = dim * out.modulated.element_size();
  const int out_type = static_cast<int>(float_of(out_dtype)), real_type = static_cast<int>(sizeof(Real) == 8 ? Float::fp64 : Float::fp32);
  const Kernels<Real>& kernels = shared.kernels;

  const int64_t tokens = x.tokens();
  parallel_on_demand((tokens + tokens_at_a_time - 1) / tokens_at_a_time, [&] {
    return [&, prepared = Prepared<Real>(shared), total = Buffer<Real>(dim), of_y = Buffer<Real>(dim)](int64_t piece) mutable {
      const int64_t end = std::min(tokens, (piece + 1) * tokens_at_a_time);
      for (int64_t n = piece * tokens_at_a_time; n < end; ++n) {
        prepared.at(n);
        const int64_t following = std::min(n + 1, tokens - 1);
        const Row next_x{x.row(following), int64_t(x.tensor.element_size())};
        const Row next_y = update ? Row{update->y.row(following), int64_t(update->y.tensor.element_size())} : next_x;
        double sum;
        if (!update) {
          sum = kernels.widen[x.dtype](x.row(n), dim, total.data());
        } else if (!post && update->y.dtype == x.dtype) {
          sum = kernels.add_gated[x.dtype](x.row(n), update->y.row(n), prepared.gate(), dim, residual + n * x_bytes, total.data(),
                                         next_x.data, next_y.data);
        } else {
          const double sum_of_y = kernels.widen[update->y.dtype](update->y.row(n), dim, of_y.data());
          if (post) {
            const Statistics<Real> s(kernels, of_y.data(), sum_of_y, dim, update->layer, update->eps, next_y);
            s.write(post_statistics + 2 * n);
            kernels.modulate[real_type](of_y.data(), s.about, s.rest, s.rstd, shared.post_weight.data(), shared.zeros.data(), dim,
                                        of_y.data(), next_y.data, next_y.bytes);
          }
          sum = kernels.add_gated_wide[x.dtype](x.row(n), of_y.data(), prepared.gate(), dim, residual + n * x_bytes,
                                              total.data(), next_x.data, reinterpret_cast<const char*>(of_y.data()));
        }
        if (!norm) continue;
        const Statistics<Real> s(kernels, total.data(), sum, dim, norm->layer, norm->eps, next_x);
        s.write(statistics + 2 * n);
        for (int i = 0; i < (second ? 2 : 1); ++i)
          kernels.modulate[out_type](total.data(), s.about, s.rest, s.rstd, prepared.factor(i), prepared.offset(i), dim,
                                     modulated[i] + n * out_bytes, next_y.data, next_y.bytes);
      }
    };
  });
  return out;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> adaln_cpu(
    const Tensor& x, const Optional& shift, const Optional& scale, const Optional& shift_2, const Optional& scale_2,
    const Optional& weight, const Optional& bias, const Optional& table, const Optional& rows, std::string norm, double eps,
    ScalarType dtype) {
  const Activations tokens(x);
  const Optional none;
  const Norm asked{subtracts_mean(norm), shift_2 || scale_2, eps, dtype};
  const auto run = [&]<class Real>(Real) {
    const Shared<Real> shared(tokens.dim, tokens.length, {&none, &shift, &scale, &shift_2, &scale_2}, weight, bias, none, table, rows);
    const Outputs out = forward<Real>(tokens, shared, nullptr, &asked);
    return std::tuple(out.modulated, out.modulated_2, out.statistics);
  };
  return is_double(x) ? run(double()) : run(float());
}

std::tuple<Tensor, Tensor> gate_residual_cpu(const Tensor& x, const Tensor& y, const Optional& gate, const Optional& post_weight,
                                             const Optional& table, const Optional& rows, std::string gate_fn,
                                             std::optional<std::string> post_norm, double post_eps) {
  const Activations tokens(x);
  const Optional none;
  const Update update{Activations(y), post_norm.has_value(), post_norm && subtracts_mean(*post_norm), post_eps};
  const auto run = [&]<class Real>(Real) {
    Shared<Real> shared(tokens.dim, tokens.length, {&gate, &none, &none, &none, &none}, none, none, post_weight, table, rows);
    shared.gate_fn = gate_function(gate_fn);
    const Outputs out = forward<Real>(tokens, shared, &update, nullptr);
    return std::tuple(out.residual, out.post_statistics);
  };
  return is_double(x) ? run(double()) : run(float());
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gate_residual_adaln_cpu(
    const Tensor& x, const Tensor& y, const Optional& gate, const Optional& shift, const Optional& scale, const Optional& shift_2,
    const Optional& scale_2, const Optional& weight, const Optional& bias, const Optional& post_weight, const Optional& table,
    const Optional& rows, std::string gate_fn, std::optional<std::string> post_norm, double post_eps, std::string norm, double eps,
    ScalarType dtype) {
  const Activations tokens(x);
  const Update update{Activations(y), post_norm.has_value(), post_norm && subtracts_mean(*post_norm), post_eps};
  const Norm asked{subtracts_mean(norm), shift_2 || scale_2, eps, dtype};
  const auto run = [&]<class Real>(Real) {
    Shared<Real> shared(tokens.dim, tokens.length, {&gate, &shift, &scale, &shift_2, &scale_2}, weight, bias, post_weight, table, rows);
    shared.gate_fn = gate_function(gate_fn);
    const Outputs out = forward<Real>(tokens, shared, &update, &asked);
    return std::tuple(out.residual, out.modulated, out.modulated_2, out.statistics, out.post_statistics);
  };
  return is_double(x) ? run(double()) : run(float());
}

}  // namespace mmgen_kernels::modulation
