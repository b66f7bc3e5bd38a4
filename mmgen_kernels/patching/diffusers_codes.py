"""diffusers' schedulers of codes, VQDiffusionScheduler and AmusedScheduler: a step of the user's own instance is one operator.

As `diffusers_schedulers` has it: timesteps, temperatures and tables stay in the attributes where diffusers keeps them, and stock
code serves a call that is not ours, before anything is drawn for it.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from mmgen_kernels.patching.diffusers_schedulers import Method, Step, structural_reasons
from mmgen_kernels.schedule.schedulers.stepper import Unplanned
from mmgen_kernels.schedule.schedulers.steps_codes import CodeStepper, masked

BATCH, CODES, NUMBERS = 2, 32, 2**17  # of the verification: that many logits at most
TRIES = 4  # two classes may race within the rounding of stock's logarithms, which other numbers do not

_verified: set[str] = set()  # configs


class Masking(Method):
    """In place of Amused's add_noise."""

    name = "add_noise"

    def __init__(self, scheduler: Any, stepper: CodeStepper):
        super().__init__(scheduler)
        self.stepper = stepper

    def __call__(self, sample: Any, timesteps: Any, generator: Any = None) -> Any:
        try:
            return masked(self.stepper, self.scheduler, sample, timesteps, generator)
        except Unplanned:
            return self.stock(sample, timesteps, generator)


class OfCodes:
    """A class of diffusers: what the handle asks."""

    name: str
    BY: str
    FALLS_BACK_WHEN: tuple[str, ...]
    calls: tuple[str, ...]  # what stock code calls in a step, which ours does not

    def considered(self, scheduler: Any, verify: bool, noise: str) -> tuple[list[str], dict[str, Method], dict[str, list[str]]]:
        """Reasons to leave it alone, what replaces which method, and the methods that are left, with reasons."""
        reasons = structural_reasons(scheduler, self.name, ("step", "set_timesteps", *self.calls))
        if not reasons and verify:
            reasons = self.differences(scheduler)
        return reasons, {} if reasons else self.replacements(scheduler, CodeStepper(noise)), {}

    def replacements(self, scheduler: Any, stepper: CodeStepper) -> dict[str, Method]:
        return {"step": Step(scheduler, self.name, stepper)}

    def differences(self, scheduler: Any) -> list[str]:
        """Some steps by stock code and by ours, on copies: what they do otherwise; empty if nothing."""
        key = f"{type(scheduler)} {sorted(dict(scheduler.config).items(), key=lambda item: item[0])}"
        if key in _verified:
            return []
        reasons: list[str] = []
        for seed in range(TRIES):
            stock, twin = copy.deepcopy(scheduler), copy.deepcopy(scheduler)
            twin.step = step = Step(twin, self.name, CodeStepper())
            try:
                expected = self.run_of(stock, seed)
            except Exception as error:
                return [f"stock code fails in verification: {type(error).__name__}: {error}"]
            try:
                found = self.run_of(twin, seed)
            except Exception as error:
                return [f"our step fails in verification: {type(error).__name__}: {error}"]
            if step.fused < step.calls:
                return [step.unplanned]
            if not (reasons := compared(found, expected)):
                _verified.add(key)
                return []
        return reasons

    def run_of(self, scheduler: Any, seed: int) -> dict[str, Tensor]:
        """What steps from codes of which some are masked give, and the state in which they leave the generator."""
        raise NotImplementedError


class VQDiffusion(OfCodes):
    name = "VQDiffusionScheduler"
    BY = "mk.vq_diffusion_step"
    FALLS_BACK_WHEN = (
        "logits are not (B, K, N) with the config's classes, codes not (B, N) of int64, or generator is a list",
        "the timestep is none of the process, or a table of transitions was replaced on the instance",
    )
    calls = ("q_posterior", "log_Q_t_transitioning_to_known_class", "apply_cumulative_transitions")

    def run_of(self, scheduler: Any, seed: int) -> dict[str, Tensor]:
        T, K = scheduler.config["num_train_timesteps"], scheduler.config["num_vec_classes"] - 1
        scheduler.set_timesteps(T, device="cpu")
        generator = torch.Generator().manual_seed(seed)
        codes = some_masked(K, K, generator)
        found: dict[str, Tensor] = {}
        for t in sorted({T - 1, T // 2, 1, 0}):
            output = torch.log_softmax(2 * torch.randn(BATCH, K, codes.shape[1], generator=generator), 1)
            (found[f"step {t}"],) = scheduler.step(output, t, codes, generator=generator, return_dict=False)
        return found | {"the generator": generator.get_state()}


class Amused(OfCodes):
    name = "AmusedScheduler"
    BY = "mk.unmask_step"
    FALLS_BACK_WHEN = (
        "logits are not (B, N, K) or (B, K, H, W), codes not (B, N) or (B, H, W) of int64, or generator is a list",
        "timesteps do not count down to 0, or the timestep is none of them",
    )
    calls = ("add_noise",)

    def replacements(self, scheduler: Any, stepper: CodeStepper) -> dict[str, Method]:
        return super().replacements(scheduler, stepper) | {"add_noise": Masking(scheduler, stepper)}

    def run_of(self, scheduler: Any, seed: int) -> dict[str, Tensor]:
        mask = scheduler.config["mask_token_id"]
        K = min(CODES, mask) if mask > 0 else CODES
        scheduler.set_timesteps(5, device="cpu")
        generator = torch.Generator().manual_seed(seed)
        codes = some_masked(mask, K, generator)
        B, N = codes.shape
        found: dict[str, Tensor] = {}
        for t in scheduler.timesteps:
            logits = 2 * torch.randn(B, N, K, generator=generator)
            prev, pred = scheduler.step(logits, t, codes, generator=generator, return_dict=False)
            found |= {f"step {t}": prev, f"the prediction of step {t}": pred}
            image = logits.mT.reshape(B, K, N, 1), t, codes.reshape(B, N, 1), 0.7
            found[f"step {t} of an image"] = scheduler.step(*image, generator=generator).prev_sample
            found[f"add_noise at {t}"] = scheduler.add_noise(codes, t, generator)
        return found | {"the generator": generator.get_state()}


RULES = (VQDiffusion(), Amused())


def some_masked(mask: int, num_codes: int, generator: torch.Generator) -> Tensor:
    N = max(1, min(64, NUMBERS // (BATCH * num_codes)))
    codes = torch.randint(0, num_codes, (BATCH, N), generator=generator)
    return torch.where(torch.rand(BATCH, N, generator=generator) < 0.5, mask, codes)


def compared(found: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    for name, value in expected.items():
        if found[name].dtype != value.dtype or found[name].shape != value.shape:
            return [f"{name} gives {found[name].dtype} {tuple(found[name].shape)}, stock {value.dtype} {tuple(value.shape)}"]
        if not torch.equal(found[name], value):
            return [f"{name} differs from stock in {int((found[name] != value).sum())} of {value.numel()} numbers"]
    return []
