"""diffusers' schedulers of codes: their configs, timesteps and noise; a step is one operator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmgen_kernels.checks import check_choice
from mmgen_kernels.schedule.ops.discrete import unmask_step, vq_diffusion_step
from mmgen_kernels.schedule.planner.discrete import MASKING_SCHEDULES, masking_table, transition_table
from mmgen_kernels.schedule.schedulers.base import StepOutput
from mmgen_kernels.schedule.schedulers.configuration import Config, Configured
from mmgen_kernels.schedule.schedulers.noise import NOISES, key_from, place_of

Device = torch.device | str | None
Generator = torch.Generator | None


class OfCodes(Configured):
    """What the two share: timesteps that count down to 0, and noise."""

    order = 1
    timesteps: Tensor | None = None

    def use_noise(self, noise: str) -> None:
        """ "torch": the noise that diffusers would draw, of the logits' size. "philox": in registers, by a key drawn once a run."""
        check_choice("noise", noise, NOISES)
        self.noise = noise
        self.key: Tensor | None = None

    def count_down(self, steps: int, device: Device) -> None:
        self.timesteps = torch.arange(steps - 1, -1, -1, device=device)
        self.key = None

    def number(self, timestep: int | Tensor) -> int:
        """The timestep on the host. A view of `timesteps` tells it by its place in memory, without waiting for a device."""
        held = self.timesteps
        if held is None:
            raise ValueError("call set_timesteps before step")
        if isinstance(timestep, Tensor) and timestep.untyped_storage().data_ptr() == held.untyped_storage().data_ptr():
            return len(held) - 1 - int(timestep.storage_offset() - held.storage_offset())
        return int(timestep)

    def key_of_run(self, generator: Generator, device: torch.device) -> Tensor:
        if self.key is None or self.key.device != device:
            self.key = key_from(generator, device)
        return self.key


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
        kept, masked = (
            torch.linspace(start, end, num_train_timesteps, dtype=torch.float64)
            for start, end in ((alpha_cum_start, alpha_cum_end), (gamma_cum_start, gamma_cum_end))
        )
        self.transitions = transition_table(kept, num_vec_classes - 1, gammas_cumprod=masked)
        self.num_inference_steps: int | None = None
        self.use_noise("torch")
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
        t = self.number(timestep)
        if self.noise == "philox":
            noise = self.key_of_run(generator, model_output.device)
        else:
            B, K, N = model_output.shape
            classes = K if t == 0 else K + 1
            uniform = torch.rand((B, classes, N), device=model_output.device, generator=generator)
            noise = uniform.add_(1e-30).log_().neg_().add_(1e-30)
            if t == 0:
                noise = torch.cat((noise, torch.ones_like(noise[:, :1])), 1)
        prev = vq_diffusion_step(model_output.detach(), sample, self.transitions, t, noise=noise, dim=1)
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
        self.tables: dict[float, Tensor] = {}
        self.temperature = temperature
        self.count_down(num_inference_steps, device)
        self.temperatures = self.table(1.0)[:, 1].float().to(device)

    def table(self, starting_mask_ratio: float) -> Tensor:
        if starting_mask_ratio not in self.tables:
            assert self.timesteps is not None
            self.tables[starting_mask_ratio] = masking_table(
                len(self.timesteps),
                kind=self.config["masking_schedule"],
                temperature=self.temperature,
                starting_mask_ratio=starting_mask_ratio,
            )
        return self.tables[starting_mask_ratio]

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
        t = self.number(timestep)
        assert self.timesteps is not None
        shape, dim = sample.shape, -1
        if sample.dim() == 3 and model_output.dim() == 4:
            sample, model_output, dim = sample.flatten(1), model_output.flatten(2), 1
        logits = model_output.detach()
        device = logits.device
        noise: Any
        if self.noise == "philox":
            noise = self.key_of_run(generator, device)
        else:
            where, (B, N), K = place_of(generator, device), sample.shape, logits.shape[dim]
            wide = logits.dtype if logits.dtype == torch.float64 else torch.float32
            of_codes = torch.empty(B, N, K, device=where, dtype=wide).exponential_(generator=generator).to(device)
            of_confidence = torch.ones(B, N, device=device, dtype=wide)
            if t != 0:
                uniform = torch.empty(B, N, device=where, dtype=logits.dtype).uniform_(generator=generator)
                of_confidence = uniform.to(device, wide).clamp_(1e-20).log_().neg_()
            noise = (of_codes if dim == -1 else of_codes.mT, of_confidence)
        place, mask_id = len(self.timesteps) - 1 - t, self.config["mask_token_id"]
        found = unmask_step(logits, sample, self.table(starting_mask_ratio), place, mask_id=mask_id, noise=noise, dim=dim)
        prev, pred = (codes.reshape(shape) for codes in found)
        return StepOutput(prev_sample=prev, pred_original_sample=pred) if return_dict else (prev, pred)

    def add_noise(self, sample: Tensor, timesteps: int | Tensor, generator: Generator = None) -> Tensor:
        """Each code masked with the probability that `timesteps`, one of them, has in the schedule."""
        t = self.number(timesteps)
        assert self.timesteps is not None
        ratio = float(self.table(1.0)[len(self.timesteps) - 1 - t, 0])
        drawn = torch.rand(sample.shape, device=place_of(generator, sample.device), generator=generator).to(sample.device)
        return torch.where(drawn < ratio, self.config["mask_token_id"], sample)
