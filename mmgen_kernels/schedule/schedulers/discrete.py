"""diffusers' schedulers of codes: their configs, timesteps and noise; a step is one operator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmgen_kernels.checks import check_choice
from mmgen_kernels.schedule.planner.discrete import MASKING_SCHEDULES, masking_table
from mmgen_kernels.schedule.schedulers.base import StepOutput
from mmgen_kernels.schedule.schedulers.configuration import Config, Configured
from mmgen_kernels.schedule.schedulers.noise import NOISES
from mmgen_kernels.schedule.schedulers.steps_codes import CodeStepper, Generator, amused, masked, vq_diffusion

Device = torch.device | str | None


class OfCodes(Configured):
    """What the two share: timesteps that count down to 0, and noise."""

    order = 1
    timesteps: Tensor | None = None

    def use_noise(self, noise: str) -> None:
        """ "torch": the noise that diffusers would draw, of the logits' size. "philox": in registers, by a key drawn once a run."""
        check_choice("noise", noise, NOISES)
        self.stepper = CodeStepper(noise)

    def count_down(self, steps: int, device: Device) -> None:
        self.timesteps = torch.arange(steps - 1, -1, -1, device=device)
        self.stepper.know("timesteps", self.timesteps, tuple(range(steps - 1, -1, -1)))


class VQDiffusionScheduler(OfCodes):
    """Gu et al. 2022, Vector Quantized Diffusion Model for Text-to-Image Synthesis: mask and replace.

    Differences to diffusers: the transitions are fp64 numbers, where diffusers' logarithms are fp32, and a code never becomes the
    mask, which has 1e-30 there; with equal noise a draw differs where two classes race that close.

    Args:
        num_vec_classes: of the codes and the mask, which is the last class.
        num_train_timesteps: of the process.
        alpha_cum_start, alpha_cum_end: the share of codes that are what they were, after the first step and after the last.
        gamma_cum_start, gamma_cum_end: the share of masks.

    Raises:
        TypeError, ValueError: as `mk.transition_table` and `mk.vq_diffusion_step`; or `step` comes before set_timesteps.

    NaN: as in `mk.vq_diffusion_step`.
    """

    def __init__(
        self,
        num_vec_classes: int,
        num_train_timesteps: int = 100,
        alpha_cum_start: float = 0.99999,
        alpha_cum_end: float = 0.000009,
        gamma_cum_start: float = 0.000009,
        gamma_cum_end: float = 0.99999,
    ):
        self.config = Config({n: v for n, v in locals().items() if n != "self"})
        self.num_embed, self.mask_class = num_vec_classes, num_vec_classes - 1
        self.num_inference_steps: int | None = None
        self.use_noise("torch")
        self.transitions = self.stepper.transitions(self)
        self.count_down(num_train_timesteps, None)

    def set_timesteps(self, num_inference_steps: int, device: Device = None) -> None:
        """The run: the last so many steps of the process."""
        self.num_inference_steps = num_inference_steps
        self.count_down(num_inference_steps, device)

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Generator = None,
        return_dict: bool = True,
    ) -> Any:
        """prev_sample: codes (B, N) of the step before, from log-probabilities or logits of x0 (B, K, N) and codes (B, N)."""
        (prev,) = vq_diffusion(self.stepper, self, model_output, timestep, sample, generator)
        return StepOutput(prev_sample=prev) if return_dict else (prev,)


class AmusedScheduler(OfCodes):
    """Masked generation: Chang et al. 2022, MaskGIT; Patil et al. 2024, Amused.

    Differences to diffusers: exactly as many positions as asked for are masked again, the first ones of equal confidence; a code
    that is known is never masked, where diffusers masks one of a sample that has nothing else to mask.

    Args:
        mask_token_id: the code of a masked position.
        masking_schedule: cosine or linear.

    Raises:
        TypeError, ValueError: as `mk.masking_table` and `mk.unmask_step`; or `step` comes before set_timesteps.

    NaN: as in `mk.unmask_step`.
    """

    def __init__(self, mask_token_id: int, masking_schedule: str = "cosine"):
        check_choice("masking_schedule", masking_schedule, MASKING_SCHEDULES)
        self.config = Config({n: v for n, v in locals().items() if n != "self"})
        self.temperatures: Tensor | None = None
        self.use_noise("torch")

    def set_timesteps(
        self, num_inference_steps: int, temperature: float | tuple[float, float] | list[float] = (2, 0), device: Device = None
    ) -> None:
        """The run: so many steps, and the temperature of the confidences, from the first to the last."""
        heats = masking_table(num_inference_steps, kind=self.config["masking_schedule"], temperature=temperature)[:, 1]
        self.count_down(num_inference_steps, device)
        self.temperatures = heats.float().to(device)
        self.stepper.know("temperatures", self.temperatures, tuple(heats.tolist()))

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        starting_mask_ratio: float = 1.0,
        generator: Generator = None,
        return_dict: bool = True,
    ) -> Any:
        """prev_sample and pred_original_sample, from logits (B, N, K) and codes (B, N), or (B, K, H, W) and (B, H, W)."""
        prev, pred = amused(self.stepper, self, model_output, timestep, sample, starting_mask_ratio, generator)
        return StepOutput(prev_sample=prev, pred_original_sample=pred) if return_dict else (prev, pred)

    def add_noise(self, sample: Tensor, timesteps: int | Tensor, generator: Generator = None) -> Tensor:
        """Each code masked with the probability that `timesteps`, one of them, has in the schedule."""
        return masked(self.stepper, self, sample, timesteps, generator)
