// The operators of the family.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>

namespace mmgen_kernels::schedule {

using Optional = std::optional<torch::stable::Tensor>;
using OptionalType = std::optional<torch::headeronly::ScalarType>;

// Up to three affine outputs; those that are not asked for are empty.
using StepOperator = std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor>(
    const torch::stable::Tensor& input_0, const torch::stable::Tensor& coefficients, int64_t step,
    torch::headeronly::ScalarType dtype_0, const Optional& input_1, OptionalType dtype_1, const Optional& input_2,
    const Optional& input_3, const Optional& input_4, OptionalType dtype_2, std::optional<double> clamp, const Optional& noise,
    const Optional& key, const Optional& index, const Optional& uncond, int64_t guided, double guidance_scale,
    double guidance_rescale, const Optional& variance, std::optional<double> threshold, double threshold_max);
StepOperator scheduler_step_cpu, scheduler_step_cuda;

torch::stable::Tensor guidance_cpu(const torch::stable::Tensor& cond, const torch::stable::Tensor& uncond, double scale,
                                   double rescale);

// x_t and the target; one that is not asked for is empty.
std::tuple<torch::stable::Tensor, torch::stable::Tensor> add_noise_cpu(const torch::stable::Tensor& x0, const Optional& noise,
                                                                       const Optional& key, const torch::stable::Tensor& t,
                                                                       const Optional& table, std::string path,
                                                                       std::optional<std::string> target);

// The loss of the batch or of each sample, and each sample's before it is weighted.
std::tuple<torch::stable::Tensor, torch::stable::Tensor> diffusion_loss_cpu(
    const torch::stable::Tensor& output, const torch::stable::Tensor& target, const Optional& weight, const Optional& mask,
    const Optional& deltas, std::string kind, double delta, bool mean);
// The gradients of output, target and weight; those that are not asked for are empty.
std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor> diffusion_loss_backward_cpu(
    const Optional& grad_loss, const Optional& grad_means, const torch::stable::Tensor& output, const torch::stable::Tensor& target,
    const Optional& weight, const Optional& mask, const Optional& deltas, const torch::stable::Tensor& means, std::string kind,
    double delta, bool mean, bool need_grad_output, bool need_grad_target, bool need_grad_weight);

// Each sample's loss, its mean squared error and its term of the variational bound.
std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor> hybrid_loss_cpu(
    const torch::stable::Tensor& output, const torch::stable::Tensor& x0, const torch::stable::Tensor& noise,
    const torch::stable::Tensor& t, const torch::stable::Tensor& table, double vb_weight, bool kl, std::optional<double> clamp);
torch::stable::Tensor hybrid_loss_backward_cpu(const Optional& grad_loss, const Optional& grad_mse, const Optional& grad_vb,
                                               const torch::stable::Tensor& output, const torch::stable::Tensor& x0,
                                               const torch::stable::Tensor& noise, const torch::stable::Tensor& t,
                                               const torch::stable::Tensor& table, double vb_weight, bool kl,
                                               std::optional<double> clamp);

// Codes of the step before, and their log-probabilities where asked for, else empty.
std::tuple<torch::stable::Tensor, torch::stable::Tensor> vq_diffusion_step_cpu(
    const torch::stable::Tensor& logits, const torch::stable::Tensor& x_t, const Optional& noise,
    const torch::stable::Tensor& transitions, const Optional& index, const Optional& key, int64_t step, double temperature,
    bool with_log_prob);

// The loss of the batch, of each sample or of each place; each sample's divergence and its -log p of x0; each place's numbers.
std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor> vq_diffusion_loss_cpu(
    const torch::stable::Tensor& logits, const torch::stable::Tensor& x0, const torch::stable::Tensor& x_t,
    const torch::stable::Tensor& transitions, const Optional& index, const Optional& weight, const Optional& aux_weights,
    const Optional& mask, int64_t step, std::optional<double> aux_weight, bool classes_first, std::string reduction);
torch::stable::Tensor vq_diffusion_loss_backward_cpu(
    const Optional& grad_loss, const Optional& grad_vb, const Optional& grad_aux, const torch::stable::Tensor& logits,
    const torch::stable::Tensor& x0, const torch::stable::Tensor& x_t, const torch::stable::Tensor& transitions, const Optional& index,
    const Optional& weight, const Optional& aux_weights, const Optional& mask, const torch::stable::Tensor& places, int64_t step,
    std::optional<double> aux_weight, bool classes_first, std::string reduction);

// Codes after some are masked again, and before.
std::tuple<torch::stable::Tensor, torch::stable::Tensor> unmask_step_cpu(
    const torch::stable::Tensor& logits, const torch::stable::Tensor& sample, const Optional& noise, const Optional& confidence_noise,
    const torch::stable::Tensor& schedule, const Optional& index, const Optional& key, int64_t step, int64_t mask_id,
    double temperature);

}  // namespace mmgen_kernels::schedule
