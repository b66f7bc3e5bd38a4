"""The updates of a process, one `mk.scheduler_step` each; none waits for a device or sends it a table twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor

from mmgen_kernels.schedule.gaussian_diffusion.kinds import ModelMeanType
from mmgen_kernels.schedule.gaussian_diffusion.tables import Tables
from mmgen_kernels.schedule.ops import add_noise, scheduler_step

Model = Callable[..., Any]
Kwargs = Mapping[str, Any] | None


@dataclass
class Limits:
    """What happens to the predicted x_0: first the function, then the clamp to [-1, 1]."""

    clip: bool = True
    function: Callable[[Tensor], Tensor] | None = None

    @property
    def clamp(self) -> float | None:
        return 1.0 if self.clip else None


class Process:
    """
    Args:
        times: what the model is told at each t, (T,) on the CPU; None: t itself.
        noise: "torch" draws what `torch.randn_like` draws, also where it has no weight, as the scripts do; "philox" draws a key for
            each sample, and its normals in registers.
    """

    def __init__(self, tables: Tables, times: Tensor | None = None, noise: str = "torch"):
        self.tables, self.times, self.noise = tables, times, noise
        self.of_data = Tables(tables.betas, ModelMeanType.START_X, tables.variance)  # where x_0 is in the place of the output
        self._times: dict[torch.device, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_times": {}}

    # -- the model ----------------------------------------------------------------------------------------------------

    def told(self, t: Tensor) -> Tensor:
        """What the model gets for t (B,)."""
        if self.times is None:
            return t
        if t.device not in self._times:
            self._times[t.device] = self.times.to(t.device)
        return self._times[t.device][t]

    @overload
    def gradient(self, cond_fn: None, x: Tensor, t: Tensor, model_kwargs: Kwargs) -> None: ...

    @overload
    def gradient(self, cond_fn: Callable[..., Tensor], x: Tensor, t: Tensor, model_kwargs: Kwargs) -> Tensor: ...

    def gradient(self, cond_fn: Callable[..., Tensor] | None, x: Tensor, t: Tensor, model_kwargs: Kwargs) -> Tensor | None:
        """What a classifier says at x, of x's shape and fp32 at least, as a variance of 16 bits would round it again."""
        if cond_fn is None:
            return None
        return cond_fn(x, self.told(t), **(model_kwargs or {})).to(torch.promote_types(x.dtype, torch.float32)).expand(x.shape)

    def split(self, x: Tensor, output: Any) -> tuple[Tensor, Tensor | None]:
        """Of the model's output the prediction, and what it says of the variance; both of x's shape, views."""
        factor = 2 if self.tables.variance.learned else 1
        expected = (x.shape[0], factor * x.shape[1], *x.shape[2:])
        if not isinstance(output, Tensor) or tuple(output.shape) != expected:
            got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(f"model must return {expected} with {self.tables.variance}, got {got}")
        if factor == 1:
            return output, None
        m, v = output.split(x.shape[1], dim=1)
        return m, v

    # -- noise --------------------------------------------------------------------------------------------------------

    def draw(self, x: Tensor) -> Tensor:
        """Normals like x, or a key for each sample (B, 2)."""
        if self.noise == "torch":
            return torch.randn_like(x)
        return torch.randint(-(2**63), 2**63 - 1, (len(x), 2), device=x.device)

    def noised(self, x_start: Tensor, t: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        """x_t and its noise, which is drawn where there is none."""
        noise = self.draw(x_start) if noise is None else noise
        wide = torch.promote_types(x_start.dtype, torch.float32)
        noise = noise.to(wide) if noise.is_floating_point() else noise
        return add_noise(x_start.to(wide), noise, t, table=self.tables.on(x_start.device, "alphas_cumprod"))

    # -- updates ------------------------------------------------------------------------------------------------------

    def step(
        self,
        tables: Tables,
        asked: tuple[Any, ...],
        inputs: list[Tensor],
        t: Tensor,
        *,
        outputs: int = 2,
        z: Tensor | None = None,
        v: Tensor | None = None,
        clamp: float | None = None,
    ) -> tuple[Tensor, ...]:
        """Rows t of a table. Results are fp32 at least, as the scripts' products with their fp32 tables are; an output that is x_0
        keeps its dtype."""
        wide = torch.promote_types(torch.promote_types(inputs[0].dtype, inputs[-1].dtype), torch.float32)
        as_it_is = tables.mean is ModelMeanType.START_X and len(inputs) == 2
        dtypes = [wide, inputs[1].dtype if as_it_is else wide][:outputs]
        coefficients = tables.on(inputs[0].device, *asked)
        return scheduler_step(inputs, coefficients, t.long(), noise=z, variance=v, clamp=clamp, dtypes=dtypes)

    def predicted(self, x: Tensor, m: Tensor, t: Tensor) -> Tensor:
        """x_0, without limits."""
        return self.step(self.tables, ("prediction",), [x, m], t, outputs=1)[0]

    def limited(self, x: Tensor, m: Tensor, t: Tensor, limits: Limits) -> tuple[Tables, Tensor]:
        """Tables and the output that goes with them: where a function changes x_0, that x_0 itself."""
        if limits.function is None:
            return self.tables, m
        return self.of_data, limits.function(self.predicted(x, m, t))

    def means(self, x: Tensor, m: Tensor, t: Tensor, limits: Limits) -> tuple[Tensor, Tensor]:
        """Of x_{t-1} the mean, and the predicted x_0."""
        tables, given = self.limited(x, m, t, limits)
        mean, clean = self.step(tables, ("means",), [x, given], t, clamp=limits.clamp)
        return (m if self.tables.mean is ModelMeanType.PREVIOUS_X else mean), clean

    def ancestral(
        self,
        x: Tensor,
        m: Tensor,
        t: Tensor,
        z: Tensor,
        v: Tensor | None,
        limits: Limits,
        gradient: Tensor | None = None,
        temperature: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """x_{t-1} and the predicted x_0. temperature: what the noise is multiplied by."""
        asked, inputs = ("ancestral", gradient is not None, float(temperature)), []
        if gradient is not None:
            if v is not None:
                weighed = self.tables.on(x.device, "weighed")
                (gradient,) = scheduler_step([gradient], weighed, t.long(), noise=gradient, variance=v)
            inputs = [gradient]
        tables, given = self.limited(x, m, t, limits)
        sample, clean = self.step(tables, asked, [x, given, *inputs], t, z=z, v=v, clamp=limits.clamp)
        if tables is not self.tables and self.tables.mean is ModelMeanType.PREVIOUS_X:  # the mean is what the model said
            sample, _ = self.step(self.tables, asked, [x, m, *inputs], t, z=z, v=v)
        return sample, clean

    def ddim(
        self,
        x: Tensor,
        m: Tensor,
        t: Tensor,
        z: Tensor | None,
        eta: float,
        limits: Limits,
        gradient: Tensor | None = None,
        reverse: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """The sample of the level before, or after, and x_0."""
        tables, given = self.limited(x, m, t, limits)
        inputs = [x, given] if gradient is None else [x, given, gradient]
        asked = ("ddim", float(eta), gradient is not None, reverse)
        sample, clean = self.step(tables, asked, inputs, t, z=z if eta != 0 else None, clamp=limits.clamp)
        return sample, clean

    def variances(self, x: Tensor, t: Tensor, v: Tensor | None) -> tuple[Tensor, Tensor]:
        """Variance of x_{t-1} and its logarithm, of x's shape, expanded where they are the same for a sample."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        if v is None:
            variance, log = (of.expand(x.shape) for of in self.lookup("fixed_variances", t, x.dim(), dtype))
            return variance, log
        low, high = self.lookup("log_range", t, x.dim(), dtype)
        log = torch.addcmul((low + high) / 2, (high - low) / 2, v.to(dtype))
        return log.exp(), log

    def lookup(self, name: str, t: Tensor, dims: int, dtype: torch.dtype) -> list[Tensor]:
        """Numbers of t by a table (T, n): n tensors (B, 1, ...)."""
        found = self.tables.on(t.device, name)[t].to(dtype)  # (B, n)
        return [of.reshape(-1, *[1] * (dims - 1)) for of in found.unbind(1)]


def loop(
    step: Callable[..., dict[str, Tensor]],
    num_timesteps: int,
    model: Model,
    shape: tuple[int, ...] | list[int],
    noise: Tensor | None,
    device: torch.device | str | None,
    progress: bool,
    **options: Any,
) -> Iterator[dict[str, Tensor]]:
    """What each step from the last timestep to the first returns. A timestep is filled in on the device, not sent there."""
    if not isinstance(shape, (tuple, list)):
        raise TypeError(f"shape must be a tuple or a list, got {type(shape).__name__}")
    if device is None:
        device = next(model.parameters()).device  # type: ignore[attr-defined]
    x = torch.randn(*shape, device=device) if noise is None else noise
    timesteps: Any = range(num_timesteps - 1, -1, -1)
    if progress:
        from tqdm.auto import tqdm  # the scripts' own dependency

        timesteps = tqdm(timesteps)
    for i in timesteps:
        t = torch.full((shape[0],), i, device=device)
        with torch.no_grad():
            out = step(model, x, t, **options)
        yield out
        x = out["sample"]
