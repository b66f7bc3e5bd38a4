// The operator implementations that C++ brings. Their schemas are in Python (mmgen_kernels/library.py).
#include <torch/csrc/stable/library.h>

#include "attn/attention.h"
#include "attn/qk_norm_rope.h"
#include "blocks/activation.h"
#include "boxed.h"
#include "modulation/modulation.h"
#include "philox/tensors.h"
#include "schedule/schedule.h"
#include "vq/code_entropy.h"
#include "vq/codebook_training.h"
#include "vq/residual_quantize.h"
#include "vq/tensors.h"
#include "vq/vector_quantize.h"

STABLE_TORCH_LIBRARY_IMPL(mmgen_kernels, CPU, m) {
  m.impl("nearest_code", BOXED(&mmgen_kernels::vq::nearest_code_cpu));
  m.impl("vector_quantize", BOXED(&mmgen_kernels::vq::vector_quantize_cpu));
  m.impl("vector_quantize_backward", BOXED(&mmgen_kernels::vq::vector_quantize_backward_cpu));
  m.impl("gather_codes", BOXED(&mmgen_kernels::vq::gather_codes_cpu));
  m.impl("gather_codes_backward", BOXED(&mmgen_kernels::vq::gather_codes_backward_cpu));
  m.impl("code_statistics", BOXED(&mmgen_kernels::vq::code_statistics_cpu));
  m.impl("code_statistics_backward", BOXED(&mmgen_kernels::vq::code_statistics_backward_cpu));
  m.impl("update_codebook_ema_", BOXED(&mmgen_kernels::vq::update_codebook_ema_cpu));
  m.impl("replace_dead_codes_", BOXED(&mmgen_kernels::vq::replace_dead_codes_cpu));
  m.impl("residual_quantize", BOXED(&mmgen_kernels::vq::residual_quantize_cpu));
  m.impl("residual_quantize_backward", BOXED(&mmgen_kernels::vq::residual_quantize_backward_cpu));
  m.impl("code_entropy", BOXED(&mmgen_kernels::vq::code_entropy_cpu));
  m.impl("code_entropy_backward", BOXED(&mmgen_kernels::vq::code_entropy_backward_cpu));
  m.impl("adaln", BOXED(&mmgen_kernels::modulation::adaln_cpu));
  m.impl("adaln_backward", BOXED(&mmgen_kernels::modulation::adaln_backward_cpu));
  m.impl("gate_residual", BOXED(&mmgen_kernels::modulation::gate_residual_cpu));
  m.impl("gate_residual_backward", BOXED(&mmgen_kernels::modulation::gate_residual_backward_cpu));
  m.impl("gate_residual_adaln", BOXED(&mmgen_kernels::modulation::gate_residual_adaln_cpu));
  m.impl("gate_residual_adaln_backward", BOXED(&mmgen_kernels::modulation::gate_residual_adaln_backward_cpu));
  m.impl("attention", BOXED(&mmgen_kernels::attn::attention_cpu));
  m.impl("attention_backward", BOXED(&mmgen_kernels::attn::attention_backward_cpu));
  m.impl("joint_attention", BOXED(&mmgen_kernels::attn::joint_attention_cpu));
  m.impl("joint_attention_backward", BOXED(&mmgen_kernels::attn::joint_attention_backward_cpu));
  m.impl("qk_norm_rope", BOXED(&mmgen_kernels::attn::qk_norm_rope_cpu));
  m.impl("qk_norm_rope_backward", BOXED(&mmgen_kernels::attn::qk_norm_rope_backward_cpu));
  m.impl("mlp_activation", BOXED(&mmgen_kernels::blocks::mlp_activation_cpu));
  m.impl("mlp_activation_backward", BOXED(&mmgen_kernels::blocks::mlp_activation_backward_cpu));
  m.impl("scheduler_step", BOXED(&mmgen_kernels::schedule::scheduler_step_cpu));
  m.impl("guidance", BOXED(&mmgen_kernels::schedule::guidance_cpu));
  m.impl("add_noise", BOXED(&mmgen_kernels::schedule::add_noise_cpu));
  m.impl("diffusion_loss", BOXED(&mmgen_kernels::schedule::diffusion_loss_cpu));
  m.impl("diffusion_loss_backward", BOXED(&mmgen_kernels::schedule::diffusion_loss_backward_cpu));
  m.impl("hybrid_loss", BOXED(&mmgen_kernels::schedule::hybrid_loss_cpu));
  m.impl("hybrid_loss_backward", BOXED(&mmgen_kernels::schedule::hybrid_loss_backward_cpu));
  m.impl("vq_diffusion_step", BOXED(&mmgen_kernels::schedule::vq_diffusion_step_cpu));
  m.impl("unmask_step", BOXED(&mmgen_kernels::schedule::unmask_step_cpu));
  m.impl("philox_integers", BOXED(&mmgen_kernels::philox::integers_cpu));
  m.impl("philox_uniform", BOXED(&mmgen_kernels::philox::uniform_cpu));
  m.impl("philox_normal", BOXED(&mmgen_kernels::philox::normal_cpu));
  m.impl("fold_in", BOXED(&mmgen_kernels::philox::fold_in_cpu));
}
