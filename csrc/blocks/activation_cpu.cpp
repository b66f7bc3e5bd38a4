#include "blocks/activation.h"

#include "blocks/activation_tables.h"
#include "parallel.h"
#include "torch_tensors.h"

namespace mmgen_kernels::blocks {

using torch::stable::Tensor;

namespace {

constexpr int64_t chunk = 4096;  // elements: 16 KiB of fp32, three of which lie in L1

// hidden (..., M) or, of swiglu, (..., 2 M): rows of `width` results.
struct Rows {
  Tensor hidden;
  bool gated;
  int64_t width, count;
  int dtype;
  std::vector<int64_t> sizes;  // of the results

  Rows(const Tensor& t, const std::string& activation) : hidden(torch::stable::contiguous(t)), gated(activation == "swiglu") {
    const auto shape = hidden.sizes();
    sizes.assign(shape.begin(), shape.end());
    sizes.back() /= gated ? 2 : 1;
    width = sizes.back();
    count = 1;
    for (size_t i = 0; i + 1 < sizes.size(); ++i) count *= sizes[i];
    dtype = static_cast<int>(float_of(hidden.scalar_type()));
  }
  // f(where a row or a part of one lies in hidden, where in the results, how long it is)
  template <class F>
  void each(const F& f) const {
    const int64_t rows = gated ? count : 1, length = gated ? width : width * count, parts = (length + chunk - 1) / chunk;
    parallel(rows * parts, std::min(chunk, length), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t row = i / parts, at = i % parts * chunk;
        f(row * length * (gated ? 2 : 1) + at, row * length + at, std::min(chunk, length - at));
      }
    });
  }
};

const char* data(const Tensor& t) { return static_cast<const char*>(t.const_data_ptr()); }
char* data_of_result(const Tensor& t) { return static_cast<char*>(t.mutable_data_ptr()); }

}  // namespace

Tensor mlp_activation_cpu(const Tensor& hidden, std::string activation) {
  const Rows rows(hidden, activation);
  const ActivationKernels& kernels = activations_of(selected());
  const Tensor activated = empty(hidden, rows.sizes, hidden.scalar_type());
  const int64_t bytes = hidden.element_size();
  const char* from = data(rows.hidden);
  char* to = data_of_result(activated);
  rows.each([&](int64_t in, int64_t out, int64_t length) {
    if (rows.gated) kernels.swiglu[rows.dtype](from + in * bytes, from + (in + rows.width) * bytes, length, to + out * bytes);
    else kernels.gelu_tanh[rows.dtype](from + in * bytes, length, to + out * bytes);
  });
  return activated;
}

std::tuple<Tensor, Tensor> mlp_activation_backward_cpu(const std::optional<Tensor>& grad_activated, const Tensor& hidden,
                                                       std::string activation, bool) {
  const Rows rows(hidden, activation);
  const ActivationKernels& kernels = activations_of(selected());
  const Tensor activated = empty(hidden, rows.sizes, hidden.scalar_type()), grad_hidden = empty_as(hidden);
  const Tensor upstream = grad_activated ? torch::stable::contiguous(*grad_activated) : zeros_as(activated);
  const int64_t bytes = hidden.element_size();
  const char *from = data(rows.hidden), *grad = data(upstream);
  char *to = data_of_result(activated), *of_hidden = data_of_result(grad_hidden);
  rows.each([&](int64_t in, int64_t out, int64_t length) {
    if (rows.gated)
      kernels.swiglu_gradient[rows.dtype](grad + out * bytes, from + in * bytes, from + (in + rows.width) * bytes, length,
                                          to + out * bytes, of_hidden + in * bytes, of_hidden + (in + rows.width) * bytes);
    else
      kernels.gelu_tanh_gradient[rows.dtype](grad + out * bytes, from + in * bytes, length, to + out * bytes, of_hidden + in * bytes);
  });
  return {grad_hidden, activated};
}

}  // namespace mmgen_kernels::blocks
