// The operators of the family on the CPU.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace mmgen_kernels::attn {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

// out, lse
std::tuple<Tensor, Tensor> attention_cpu(const Tensor& q, const Tensor& k, const Tensor& v, const Optional& bias,
                                         const Optional& key_lengths, const Optional& cu_seqlens_q, const Optional& cu_seqlens_k,
                                         bool causal, double scale, bool deterministic);

// Gradients of q, k, v and bias; what is not needed is empty.
std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward_cpu(
    const Optional& grad_out, const Optional& grad_lse, const Tensor& q, const Tensor& k, const Tensor& v, const Optional& bias,
    const Optional& key_lengths, const Optional& cu_seqlens_q, const Optional& cu_seqlens_k, const Tensor& out, const Tensor& lse,
    bool causal, double scale, bool deterministic, bool need_grad_q, bool need_grad_k, bool need_grad_v, bool need_grad_bias);

// out_1, out_2, lse of all queries, those of the first stream before those of the second
std::tuple<Tensor, Tensor, Tensor> joint_attention_cpu(const Tensor& q_1, const Tensor& k_1, const Tensor& v_1, const Tensor& q_2,
                                                       const Tensor& k_2, const Tensor& v_2, const Optional& key_lengths_1,
                                                       const Optional& key_lengths_2, double scale);

// Gradients of the first stream's q, k and v, then of the second's; what is not needed is empty.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> joint_attention_backward_cpu(
    const Optional& grad_out_1, const Optional& grad_out_2, const Tensor& q_1, const Tensor& k_1, const Tensor& v_1, const Tensor& q_2,
    const Tensor& k_2, const Tensor& v_2, const Optional& key_lengths_1, const Optional& key_lengths_2, const Tensor& out_1,
    const Tensor& out_2, const Tensor& lse, double scale, bool need_grad_q_1, bool need_grad_k_1, bool need_grad_v_1,
    bool need_grad_q_2, bool need_grad_k_2, bool need_grad_v_2);

}  // namespace mmgen_kernels::attn
