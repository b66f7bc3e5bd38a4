// qk_norm_rope on the CPU.
#pragma once

#include <string>

#include "attn/attention.h"

namespace mmgen_kernels::attn {

// q and k, normalised and turned
std::tuple<Tensor, Tensor> qk_norm_rope_cpu(const Tensor& q, const Tensor& k, const Optional& q_weight, const Optional& k_weight,
                                            const Optional& q_bias, const Optional& k_bias, const Optional& cos,
                                            const Optional& sin, std::optional<std::string> norm, bool across_heads, double eps,
                                            bool interleaved);

// Gradients of q, k, q_weight, k_weight, q_bias, k_bias; what is not needed is empty.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> qk_norm_rope_backward_cpu(
    const Optional& grad_rotated_q, const Optional& grad_rotated_k, const Tensor& q, const Tensor& k, const Optional& q_weight,
    const Optional& k_weight, const Optional& q_bias, const Optional& k_bias, const Optional& cos, const Optional& sin,
    std::optional<std::string> norm, bool across_heads, double eps, bool interleaved, bool need_grad_q, bool need_grad_k,
    bool need_grad_q_weight, bool need_grad_k_weight, bool need_grad_q_bias, bool need_grad_k_bias);

}  // namespace mmgen_kernels::attn
