"""Fused operations for multimodal generative models."""

from mmgen_kernels import backends, nn, schedulers
from mmgen_kernels.attn.joint_attention import joint_attention
from mmgen_kernels.attn.ops import AttentionOutput, attention
from mmgen_kernels.attn.qk_norm_rope import qk_norm_rope, rope_table
from mmgen_kernels.backends import backend_report, use_backend
from mmgen_kernels.blocks.ema import update_ema
from mmgen_kernels.blocks.ops import adaln_attention, adaln_mlp, dit_block
from mmgen_kernels.modulation.ops import adaln, gate_residual, gate_residual_adaln
from mmgen_kernels.patching import patch
from mmgen_kernels.philox.ops import fold_in, philox_integers, philox_normal, philox_uniform
from mmgen_kernels.schedule.gaussian_diffusion import GaussianDiffusion, create_diffusion
from mmgen_kernels.schedule.ops import (
    HybridLoss,
    UnmaskOutput,
    VQDiffusionLoss,
    add_noise,
    diffusion_loss,
    guidance,
    hybrid_loss,
    loss_weight,
    scheduler_step,
    unmask_step,
    vq_diffusion_loss,
    vq_diffusion_step,
)
from mmgen_kernels.schedule.planner.discrete import masking_table, transition_table
from mmgen_kernels.schedule.planner.hybrid import hybrid_table
from mmgen_kernels.vq.ops import (
    CodeEntropy,
    CodeStatistics,
    KMeansOutput,
    RVQOutput,
    VQOutput,
    code_entropy,
    code_statistics,
    gather_codes,
    kmeans,
    nearest_code,
    replace_dead_codes_,
    residual_quantize,
    update_codebook_ema_,
    vector_quantize,
)

__version__ = "0.1.0"
__all__ = [
    "AttentionOutput",
    "CodeEntropy",
    "CodeStatistics",
    "GaussianDiffusion",
    "HybridLoss",
    "KMeansOutput",
    "RVQOutput",
    "UnmaskOutput",
    "VQDiffusionLoss",
    "VQOutput",
    "adaln",
    "adaln_attention",
    "adaln_mlp",
    "add_noise",
    "attention",
    "backend_report",
    "code_entropy",
    "code_statistics",
    "create_diffusion",
    "diffusion_loss",
    "dit_block",
    "fold_in",
    "gate_residual",
    "gate_residual_adaln",
    "gather_codes",
    "guidance",
    "hybrid_loss",
    "hybrid_table",
    "joint_attention",
    "kmeans",
    "loss_weight",
    "masking_table",
    "nearest_code",
    "nn",
    "patch",
    "philox_integers",
    "philox_normal",
    "philox_uniform",
    "qk_norm_rope",
    "replace_dead_codes_",
    "residual_quantize",
    "rope_table",
    "scheduler_step",
    "schedulers",
    "transition_table",
    "unmask_step",
    "update_codebook_ema_",
    "update_ema",
    "use_backend",
    "vector_quantize",
    "vq_diffusion_loss",
    "vq_diffusion_step",
]

backends.load_library()
