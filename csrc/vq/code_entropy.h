// The operators code_entropy and code_entropy_backward on the CPU.
#pragma once

#include <tuple>

#include "vq/tensors.h"

namespace mmgen_kernels::vq {

// sample_entropy, mean_entropy, softmax_terms, mean_probability
std::tuple<Tensor, Tensor, Tensor, Tensor> code_entropy_cpu(const Tensor& x, const Tensor& codebook,
                                                            const std::optional<Tensor>& mask, double temperature,
                                                            std::string metric, double eps);

std::tuple<Tensor, Tensor> code_entropy_backward_cpu(const std::optional<Tensor>& grad_sample_entropy,
                                                     const std::optional<Tensor>& grad_mean_entropy, const Tensor& x,
                                                     const Tensor& codebook, const std::optional<Tensor>& mask,
                                                     const Tensor& softmax_terms, const Tensor& mean_probability,
                                                     double temperature, std::string metric, double eps, bool need_grad_x,
                                                     bool need_grad_codebook);

}  // namespace mmgen_kernels::vq
