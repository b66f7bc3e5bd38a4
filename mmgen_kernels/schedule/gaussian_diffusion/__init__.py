"""Diffusion as OpenAI's code and DiT's scripts call it, in few passes: `mk.GaussianDiffusion`, `mk.create_diffusion`."""

from mmgen_kernels.schedule.gaussian_diffusion.kinds import LossType, ModelMeanType, ModelVarType
from mmgen_kernels.schedule.gaussian_diffusion.process import GaussianDiffusion, create_diffusion
from mmgen_kernels.schedule.gaussian_diffusion.spacing import get_named_beta_schedule, space_timesteps

__all__ = [
    "GaussianDiffusion",
    "LossType",
    "ModelMeanType",
    "ModelVarType",
    "create_diffusion",
    "get_named_beta_schedule",
    "space_timesteps",
]
