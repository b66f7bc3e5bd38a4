"""Diffusion over codes that hides them one after the other (absorbing state), its bound on -log p, and pictures drawn by it.

After step t of S each code is hidden with probability t / S. Backwards, step t shows a hidden place with probability 1 / t, with
a code that the model draws for it. So a step costs 1 / t of the nats by which the model misses the hidden codes, and

    -log p(x) <= sum_t 1/t E[ sum over hidden places of -log p_model(code | what is seen, t) ]

which is the price at which `sample` with S steps gives x. As a place is hidden t / S of the time, the sum is the mean over t of
the nats missed at each place when it is hidden, added over places. So it is drawn: one place is hidden for sure, the others as
they come, and the mean over hidden places counts T times, for T places. Weighed by S / t instead, their number would be noise.

Source: Austin et al., Structured Denoising Diffusion Models in Discrete State-Spaces, 2021; Sahoo et al., Simple and Effective
Masked Diffusion Language Models, 2024, for the sum as a weighted cross-entropy and for times spread evenly over a batch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

import mmgen_kernels as mk
from mmgen.models.code_transformer import likeliest

TIME, HIDDEN, SURE = 0, 1, 2  # streams of a batch's key
ORDERS = ("chance", "confidence")
TIMES_TOLD = 1000  # to the model, from all seen to all hidden
Model = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class AbsorbingConfig:
    num_timesteps: int = 256  # S

    def __post_init__(self):
        if self.num_timesteps < 1:
            raise ValueError(f"num_timesteps must be at least 1, got {self.num_timesteps}")


class Absorbing:
    """The process: what it hides, and the bound that a model of it gives."""

    def __init__(self, config: AbsorbingConfig, num_codes: int):
        self.num_timesteps, self.num_codes = config.num_timesteps, num_codes

    def times(self, batch_size: int, key: Tensor) -> Tensor:
        """(B,), each uniform on 1 ... S, all together spread evenly, which makes the sum of a batch vary less."""
        even = torch.arange(batch_size, device=key.device) / batch_size
        u = (mk.philox_uniform((1,), key, dtype=torch.float64) + even) % 1  # (B,)
        return 1 + (u * self.num_timesteps).long()

    def hidden(self, shape: torch.Size, t: Tensor, key: Tensor) -> Tensor:
        """Which codes step t hides, bool (B, T), given that it hides one that is any with equal chance."""
        sure = (mk.philox_uniform(shape[:1], mk.fold_in(key, SURE), dtype=torch.float64) * shape[1]).long()  # (B,)
        others = mk.philox_uniform(shape, mk.fold_in(key, HIDDEN), dtype=torch.float64)  # (B, T)
        return (others < (t.double() / self.num_timesteps)[:, None]).scatter(1, sure[:, None], True)

    def logits(self, model: Model, x_t: Tensor, told: Tensor) -> Tensor:
        """Of the codes that belong at each place of x_t (B, T), at times `told` (B,) from 0 to TIMES_TOLD; (B, T, K)."""
        return model(x_t, told)

    def nats(self, model: Model, codes: Tensor, t: Tensor, hidden: Tensor) -> Tensor:
        """What these times (B,) and these hidden places (B, T) say of the bound on -log p of pictures (B, T); (B,).

        Its mean over `times` and `hidden` is the bound.
        """
        logits = self.logits(model, codes.masked_fill(hidden, self.num_codes), t * TIMES_TOLD / self.num_timesteps)  # (B, T, K)
        missed = F.cross_entropy(logits.transpose(1, 2), codes, reduction="none")  # (B, T)
        return codes.shape[1] * (missed * hidden).sum(dim=1) / hidden.sum(dim=1)

    def table(self, num_steps: int) -> Tensor:
        """Of `mk.vq_diffusion_step`, for as many steps, (num_steps, 9)."""
        return mk.transition_table(1 - steps_done(num_steps), self.num_codes)

    def draw_nats(self, model: Model, codes: Tensor, key: Tensor) -> Tensor:
        """What times and places that the key (2,) draws say of the bound on -log p of pictures (B, T); (B,)."""
        t = self.times(len(codes), mk.fold_in(key, TIME))
        return self.nats(model, codes, t, self.hidden(codes.shape, t, key))

    @torch.no_grad()
    def sample(
        self,
        model: Model,
        start: Tensor,
        num_inference_steps: int,
        *,
        key: Tensor,
        order: str = "chance",
        temperature: float = 1.0,
        top_k: int | None = None,
    ) -> Tensor:
        """Pictures (B, T) from `start` (B, T), in which `num_codes` stands for what is to be drawn.

        With S steps, temperature 1, all codes and the order left to chance this is the distribution that the bound is of. Fewer
        steps draw more codes at once, each without knowing of the others; there it helps to show the surest first.

        Args:
            key: int64 (B, 2), one for each picture.
            order: of the places: "chance", as the process has it (`mk.vq_diffusion_step`), or "confidence" (`mk.unmask_step`).
            temperature: divides the logits; 0 takes the likeliest code.
            top_k: only so many likeliest codes may come; None: all.

        Raises:
            ValueError: the order is unknown, temperature negative, top_k not between 1 and K, or there is no step.

        Source: Gu et al., Vector Quantized Diffusion Model, 2022; Chang et al., MaskGIT, 2022, for the surest first.
        """
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps must be at least 1, got {num_inference_steps}")
        if order not in ORDERS:
            raise ValueError(f"order must be one of {', '.join(ORDERS)}, got {order!r}")
        if temperature == 0:
            temperature, top_k = 1.0, 1
        chances, x = self.table(num_inference_steps), start
        counts = mk.masking_table(num_inference_steps, starting_mask_ratio=(x == self.num_codes).double().mean().item())
        for i in range(num_inference_steps):
            left = num_inference_steps - i
            if order == "chance":
                told = torch.full((len(x),), TIMES_TOLD * left / num_inference_steps, device=x.device)  # (B,)
            else:
                told = TIMES_TOLD * (x == self.num_codes).double().mean(dim=1)
            logits = likeliest(self.logits(model, x, told), top_k)  # (B, T, K)
            if order == "chance":
                x = cast(Tensor, mk.vq_diffusion_step(logits, x, chances, left - 1, noise=key, temperature=temperature))
            else:
                x = mk.unmask_step(logits, x, counts, i, mask_id=self.num_codes, noise=key, temperature=temperature).prev_sample
        return x


def steps_done(num_steps: int) -> Tensor:
    """1 / n, 2 / n ... 1, fp64, on the CPU."""
    return torch.arange(1, num_steps + 1, dtype=torch.float64) / num_steps
