// The operators vector_quantize and vector_quantize_backward on the CPU.
#pragma once

#include <tuple>

#include "vq/tensors.h"

namespace mmgen_kernels::vq {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> vector_quantize_cpu(const Tensor& x, const Tensor& codebook,
                                                                       const std::optional<Tensor>& mask, double beta,
                                                                       bool legacy_beta, std::string gradient,
                                                                       std::string metric, std::string precision);

std::tuple<Tensor, Tensor> vector_quantize_backward_cpu(
    const std::optional<Tensor>& grad_quantized, const std::optional<Tensor>& grad_loss,
    const std::optional<Tensor>& grad_commitment_loss, const std::optional<Tensor>& grad_codebook_loss, const Tensor& x,
    const Tensor& quantized, const Tensor& indices, std::vector<int64_t> codebook_shape, double beta, bool legacy_beta,
    std::string gradient, bool need_grad_x, bool need_grad_codebook);

}  // namespace mmgen_kernels::vq
