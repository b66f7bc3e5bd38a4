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

}  // namespace mmgen_kernels::attn
