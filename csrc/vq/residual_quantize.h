// The operators residual_quantize and residual_quantize_backward on the CPU.
#pragma once

#include <tuple>

#include "vq/tensors.h"

namespace mmgen_kernels::vq {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> residual_quantize_cpu(
    const Tensor& x, const Tensor& codebooks, std::vector<int64_t> sizes, const std::optional<Tensor>& levels,
    const std::optional<Tensor>& mask, int64_t depth, double beta, std::string gradient, std::string metric,
    std::string precision, std::optional<ScalarType> statistics);

std::tuple<Tensor, Tensor> residual_quantize_backward_cpu(const std::optional<Tensor>& grad_quantized,
                                                          const std::optional<Tensor>& grad_loss, const Tensor& x,
                                                          const Tensor& codebooks, const Tensor& indices,
                                                          std::vector<int64_t> sizes, double beta, std::string gradient,
                                                          bool need_grad_x, bool need_grad_codebooks);

}  // namespace mmgen_kernels::vq
