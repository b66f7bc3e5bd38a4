// The activation between the projections of an MLP, on the CPU.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>

namespace mmgen_kernels::blocks {

torch::stable::Tensor mlp_activation_cpu(const torch::stable::Tensor& hidden, std::string activation);

// The gradient of hidden, and what the forward gave.
std::tuple<torch::stable::Tensor, torch::stable::Tensor> mlp_activation_backward_cpu(
    const std::optional<torch::stable::Tensor>& grad_activated, const torch::stable::Tensor& hidden, std::string activation,
    bool need_grad_hidden);

}  // namespace mmgen_kernels::blocks
