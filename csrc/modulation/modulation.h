// The operators of the family on the CPU.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>

namespace mmgen_kernels::modulation {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

// modulated, modulated_2, statistics
std::tuple<Tensor, Tensor, Tensor> adaln_cpu(
    const Tensor& x, const Optional& shift, const Optional& scale, const Optional& shift_2, const Optional& scale_2,
    const Optional& weight, const Optional& bias, const Optional& table, const Optional& rows, std::string norm, double eps,
    ScalarType dtype);

// residual, post_statistics
std::tuple<Tensor, Tensor> gate_residual_cpu(const Tensor& x, const Tensor& y, const Optional& gate, const Optional& post_weight,
                                             const Optional& table, const Optional& rows, std::string gate_fn,
                                             std::optional<std::string> post_norm, double post_eps);

// residual, modulated, modulated_2, statistics, post_statistics
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gate_residual_adaln_cpu(
    const Tensor& x, const Tensor& y, const Optional& gate, const Optional& shift, const Optional& scale, const Optional& shift_2,
    const Optional& scale_2, const Optional& weight, const Optional& bias, const Optional& post_weight, const Optional& table,
    const Optional& rows, std::string gate_fn, std::optional<std::string> post_norm, double post_eps, std::string norm, double eps,
    ScalarType dtype);

// Gradients of x, shift, scale, shift_2, scale_2, weight, bias, table; what is not needed is empty.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> adaln_backward_cpu(
    const Optional& grad_modulated, const Optional& grad_modulated_2, const Tensor& x, const Tensor& statistics,
    const Optional& shift, const Optional& scale, const Optional& shift_2, const Optional& scale_2, const Optional& weight,
    const Optional& bias, const Optional& table, const Optional& rows, std::string norm, bool need_grad_x, bool need_grad_shift,
    bool need_grad_scale, bool need_grad_shift_2, bool need_grad_scale_2, bool need_grad_weight, bool need_grad_bias,
    bool need_grad_table);

// Of y, gate, post_weight, table.
std::tuple<Tensor, Tensor, Tensor, Tensor> gate_residual_backward_cpu(
    const Optional& grad_residual, const Tensor& y, const Tensor& post_statistics, const Optional& gate,
    const Optional& post_weight, const Optional& table, const Optional& rows, std::string gate_fn,
    std::optional<std::string> post_norm, bool need_grad_y, bool need_grad_gate, bool need_grad_post_weight, bool need_grad_table);

// Of x, y, gate, shift, scale, shift_2, scale_2, weight, bias, post_weight, table.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gate_residual_adaln_backward_cpu(
    const Optional& grad_residual, const Optional& grad_modulated, const Optional& grad_modulated_2, const Tensor& y,
    const Tensor& residual, const Tensor& statistics, const Tensor& post_statistics, const Optional& gate, const Optional& shift,
    const Optional& scale, const Optional& shift_2, const Optional& scale_2, const Optional& weight, const Optional& bias,
    const Optional& post_weight, const Optional& table, const Optional& rows, std::string gate_fn,
    std::optional<std::string> post_norm, std::string norm, bool need_grad_x, bool need_grad_y, bool need_grad_gate,
    bool need_grad_shift, bool need_grad_scale, bool need_grad_shift_2, bool need_grad_scale_2, bool need_grad_weight,
    bool need_grad_bias, bool need_grad_post_weight, bool need_grad_table);

}  // namespace mmgen_kernels::modulation
