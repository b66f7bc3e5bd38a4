"""Steps through codes: what the classes of ours and `mk.patch` share. The state of a run stays where diffusers keeps it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mmgen_kernels.checks import DTYPES
from mmgen_kernels.schedule.ops.discrete import unmask_step, vq_diffusion_step
from mmgen_kernels.schedule.planner.discrete import MASKING_SCHEDULES, masking_table, transition_table
from mmgen_kernels.schedule.schedulers.noise import key_from, place_of
from mmgen_kernels.schedule.schedulers.stepper import Unplanned, place_in, version_of

Generator = torch.Generator | None

LOGARITHMS = ("log_at", "log_bt", "log_ct", "log_cumprod_at", "log_cumprod_bt", "log_cumprod_ct")  # of a transition's columns


class CodeStepper:
    """Belongs to one scheduler, ours or diffusers', and keeps nothing of a run but its key and what was read on the host.

    Args:
        noise: "torch" draws what diffusers would draw, of the logits' size; "philox" in registers, by a key drawn once a run.
    """

    def __init__(self, noise: str = "torch"):
        self.noise = noise
        self.key: Tensor | None = None
        self.known: dict[str, tuple[Tensor, int | None, tuple[Any, ...]]] = {}
        self.table: Tensor | None = None  # of transitions
        self.masks: tuple[Any, Tensor | None] = None, None  # what a table of masking was asked for, and that table

    # -- what is read of the scheduler ----------------------------------------------------------------------------------

    def know(self, name: str, held: Tensor, numbers: tuple[Any, ...]) -> None:
        """What the attribute holds, so that no device is asked for it."""
        self.known[name] = held, version_of(held), numbers
        if name == "timesteps":
            self.key = None  # another run

    def knows(self, name: str, held: Tensor) -> bool:
        kept = self.known.get(name)
        return kept is not None and kept[0] is held and kept[1] == version_of(held)

    def numbers(self, name: str, held: Tensor) -> tuple[Any, ...]:
        """On the host, fetched once for as long as the attribute is the same."""
        if not self.knows(name, held):
            self.know(name, held, tuple(held.tolist()))
        return self.known[name][2]

    def timesteps(self, scheduler: Any) -> tuple[int, ...]:
        held = scheduler.timesteps
        if held is None:
            raise Unplanned("call set_timesteps before step")
        return self.numbers("timesteps", held)

    def number(self, scheduler: Any, timestep: int | Tensor) -> int:
        """The timestep on the host. A view of `timesteps` tells it by its place in memory, without waiting for a device."""
        numbers, held = self.timesteps(scheduler), scheduler.timesteps
        place = place_in(held, timestep)
        if place is not None:
            return numbers[place]
        if int(timestep) != timestep:
            raise Unplanned(f"timestep must be a whole number, got {timestep}")
        return int(timestep)

    def transitions(self, scheduler: Any) -> Tensor:
        """(T, 9) of the config, fp64; the logarithms that a scheduler of diffusers has of them must be theirs."""
        if self.table is None:
            self.table = transitions_of(scheduler.config)
        for name, of_config in zip(LOGARITHMS, self.table.unbind(1), strict=False):
            held = vars(scheduler).get(name)
            if held is None or self.knows(name, held):
                continue
            own = held.detach().cpu().double()[: len(of_config)].exp()
            if own.shape != of_config.shape or not torch.allclose(own, of_config, rtol=1e-4, atol=0):
                raise Unplanned(f"{name} does not follow from the config")
            self.know(name, held, ())
        return self.table

    def masking(self, scheduler: Any, starting_mask_ratio: float) -> Tensor:
        """(steps, 2) of the run, fp64: ratios of the config, and the temperatures that the scheduler holds."""
        kind, steps, heats = scheduler.config["masking_schedule"], len(self.timesteps(scheduler)), scheduler.temperatures
        if kind not in MASKING_SCHEDULES:
            raise Unplanned(f"masking_schedule must be one of {', '.join(MASKING_SCHEDULES)}, got {kind!r}")
        if not isinstance(starting_mask_ratio, (int, float)):
            raise Unplanned(f"starting_mask_ratio must be a number, got {type(starting_mask_ratio).__name__}")
        if not isinstance(heats, Tensor) or tuple(heats.shape) != (steps,):
            raise Unplanned(f"temperatures must be a tensor of {steps} numbers")
        asked = (kind, steps, starting_mask_ratio, self.numbers("temperatures", heats))
        known, table = self.masks
        if table is None or known != asked:
            table = masking_table(steps, kind=kind, starting_mask_ratio=starting_mask_ratio)
            table[:, 1] = torch.tensor(asked[-1], dtype=torch.float64)
            self.masks = asked, table
        return table

    # -- noise ----------------------------------------------------------------------------------------------------------

    def key_of_run(self, generator: Generator, device: torch.device) -> Tensor:
        if self.key is None or self.key.device != device:
            self.key = key_from(generator, device)
        return self.key


def transitions_of(config: dict[str, Any]) -> Tensor:
    """The shares of codes that are what they were, and of masks, go in equal parts from the first step to the last."""
    kept, masked = (
        torch.linspace(config[f"{of}_cum_start"], config[f"{of}_cum_end"], config["num_train_timesteps"], dtype=torch.float64)
        for of in ("alpha", "gamma")
    )
    return transition_table(kept, config["num_vec_classes"] - 1, gammas_cumprod=masked)


def check_tensors(model_output: Any, sample: Any, classes: int, generator: Any, dims: tuple[int, ...] = (3,)) -> None:
    """Before anything is drawn: of what is wrong here, stock code may make what it can from the same generator."""
    if not isinstance(model_output, Tensor) or model_output.dtype not in DTYPES:
        got = model_output.dtype if isinstance(model_output, Tensor) else type(model_output).__name__
        raise Unplanned(f"model_output must be a float64, float32, bfloat16 or float16 tensor, got {got}")
    if not isinstance(sample, Tensor) or sample.dtype != torch.int64 or sample.device != model_output.device:
        got = f"{sample.dtype} on {sample.device}" if isinstance(sample, Tensor) else type(sample).__name__
        raise Unplanned(f"sample must be an int64 tensor on model_output's device {model_output.device}, got {got}")
    if model_output.dim() not in dims or model_output.shape[classes] < 1:
        wanted = " or ".join(map(str, dims))
        raise Unplanned(f"model_output must have {wanted} dimensions and a class, got shape {tuple(model_output.shape)}")
    of_codes = [n for i, n in enumerate(model_output.shape) if i != classes % model_output.dim()]
    if list(sample.shape) != of_codes:
        raise Unplanned(f"sample must have model_output's shape without the classes, {tuple(of_codes)}, got {tuple(sample.shape)}")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise Unplanned(f"generator must be a torch.Generator or None, got {type(generator).__name__}")


# -- steps: of a stepper, a scheduler and the arguments of diffusers' method -----------------------------------------------


def vq_diffusion(
    stepper: CodeStepper,
    scheduler: Any,
    model_output: Tensor,
    timestep: int | Tensor,
    sample: Tensor,
    generator: Generator = None,
) -> tuple[Tensor]:
    """Codes (B, N) of the step before, from log-probabilities or logits of x0 (B, K, N) and codes (B, N)."""
    check_tensors(model_output, sample, 1, generator)
    B, K, N = model_output.shape
    table, t = stepper.transitions(scheduler), stepper.number(scheduler, timestep)
    if not 0 <= t < len(table):
        raise Unplanned(f"timestep must be in [0, {len(table)}), got {t}")
    num_codes = scheduler.config["num_vec_classes"] - 1
    if num_codes != K:
        raise Unplanned(f"model_output must have the config's {num_codes} codes, got {K}")
    if stepper.noise == "philox":
        noise = stepper.key_of_run(generator, model_output.device)
    else:
        # diffusers draws none for the mask at step 0, where it has no weight: the numbers in its place are those of the next sample
        classes, noise = K if t == 0 else K + 1, torch.empty(B * (K + 1) * N, device=model_output.device)
        drawn, rest = noise.tensor_split((B * classes * N,))
        drawn.uniform_(generator=generator).add_(1e-30).log_().neg_().add_(1e-30)
        rest.fill_(1)
        noise = noise.as_strided((B, K + 1, N), (classes * N, N, 1))
    prev = vq_diffusion_step(model_output.detach(), sample, table, t, noise=noise, dim=1)
    return (prev,)  # type: ignore[return-value]


def amused(
    stepper: CodeStepper,
    scheduler: Any,
    model_output: Tensor,
    timestep: int | Tensor,
    sample: Tensor,
    starting_mask_ratio: float = 1.0,
    generator: Generator = None,
) -> tuple[Tensor, Tensor]:
    """Codes after the masking and before it, from logits (B, N, K) and codes (B, N), or (B, K, H, W) and (B, H, W)."""
    of_images = isinstance(sample, Tensor) and sample.dim() == 3
    check_tensors(model_output, sample, 1 if of_images else -1, generator, (3, 4))
    table, steps = stepper.masking(scheduler, starting_mask_ratio), stepper.timesteps(scheduler)
    t, shape, dim = stepper.number(scheduler, timestep), sample.shape, -1
    if steps != tuple(range(len(steps) - 1, -1, -1)) or not 0 <= t < len(steps):
        raise Unplanned(f"timestep must be one of those that count down to 0, got {t}")
    if of_images:
        sample, model_output, dim = sample.flatten(1), model_output.flatten(2), 1
    logits, device = model_output.detach(), model_output.device
    noise: Any
    if stepper.noise == "philox":
        noise = stepper.key_of_run(generator, device)
    else:
        where, (B, N), K = place_of(generator, device), sample.shape, logits.shape[dim]
        wide = logits.dtype if logits.dtype == torch.float64 else torch.float32
        of_codes = torch.empty(B, N, K, device=where, dtype=wide).exponential_(generator=generator).to(device)
        of_confidence = torch.ones(B, N, device=device, dtype=wide)
        if t != 0:
            uniform = torch.empty(B, N, device=where, dtype=logits.dtype).uniform_(generator=generator)
            of_confidence = uniform.to(device, wide).clamp_(1e-20).log_().neg_()
        noise = (of_codes if dim == -1 else of_codes.mT, of_confidence)
    place, mask_id = len(steps) - 1 - t, scheduler.config["mask_token_id"]
    prev, pred = unmask_step(logits, sample, table, place, mask_id=mask_id, noise=noise, dim=dim)
    return prev.reshape(shape), pred.reshape(shape)


def masked(stepper: CodeStepper, scheduler: Any, sample: Tensor, timesteps: int | Tensor, generator: Generator = None) -> Tensor:
    """Amused's `add_noise`: each code masked with the probability that `timesteps`, one of them, has in the schedule."""
    table, steps, t = stepper.masking(scheduler, 1.0), stepper.timesteps(scheduler), stepper.number(scheduler, timesteps)
    if steps.count(t) != 1 or not isinstance(sample, Tensor) or sample.dim() < 2:
        raise Unplanned(f"timesteps must be one of the run's, and sample of at least two dimensions, got {t}")
    ratio = float(table[steps.index(t), 0])
    drawn = torch.rand(sample.shape, device=place_of(generator, sample.device), generator=generator).to(sample.device)
    return torch.where(drawn < ratio, scheduler.config["mask_token_id"], sample)


# by class of diffusers: the function, and the fields of its output
STEPS_OF_CODES: dict[str, tuple[Callable[..., tuple[Tensor, ...]], tuple[str, ...]]] = {
    "VQDiffusionScheduler": (vq_diffusion, ("prev_sample",)),
    "AmusedScheduler": (amused, ("prev_sample", "pred_original_sample")),
}
