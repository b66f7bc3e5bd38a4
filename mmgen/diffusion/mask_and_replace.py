"""Diffusion over codes that hides some and replaces others, and its bound on -log p.

After a share tau of the steps a code is hidden with probability ``C = tau``; it has been replaced by any code, each alike, with
probability ``K B = replaced tau (1 - tau)``, and is what it was otherwise. So the model learns to doubt what it sees as well, and a
code that was drawn wrongly can be drawn again.

    -log p(x) <= sum_t E[ KL( q(x_{t-1} | x_t, x) || sum_k q(x_{t-1} | x_t, k) p_model(k | x_t, t) ) ]

summed over places; in the end everything is hidden, which costs nothing.

The network says what belongs at a place by what is seen around it, and Bayes' rule adds what is seen there:

    p_model(k | x_t, t) ~ softmax(logits)_k q(x_t | k)

which is a logit of ``log(1 + A / B)`` more for the code that is seen. A network that had to say the whole of p_model would first
have to learn that what is seen is nearly always right: one that gives all codes alike costs twice as many bits as there are.

Source: Gu et al., Vector Quantized Diffusion Model, 2022, equations 5 to 11; Austin et al. 2021, appendix A.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import mmgen_kernels as mk
from mmgen.diffusion.codes import HIDDEN, TIME, TIMES_TOLD, Absorbing, AbsorbingConfig, Model, steps_done

SMALL = 1e-300  # below any probability that matters


@dataclass(frozen=True)
class MaskAndReplaceConfig(AbsorbingConfig):
    replaced: float = 0.2

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.replaced <= 1:
            raise ValueError(f"replaced must be above 0 and at most 1, got {self.replaced}")


class MaskAndReplace(Absorbing):
    def __init__(self, config: MaskAndReplaceConfig, num_codes: int):
        super().__init__(config, num_codes)
        self.replaced = config.replaced
        self.rows = self.table(self.num_timesteps)  # (S, 9): a, b, c of the step; A, B, C after it; and before it

    def table(self, num_steps: int) -> Tensor:
        hidden = steps_done(num_steps)  # (n,)
        return mk.transition_table((1 - hidden) * (1 - self.replaced * hidden), self.num_codes, gammas_cumprod=hidden)

    def noised(self, codes: Tensor, t: Tensor, key: Tensor) -> Tensor:
        """x_t of codes (B, T) at steps t (B,)."""
        _, _, _, _, B, C, *_ = self.of_step(t)  # (B, 1)
        u = mk.philox_uniform(codes.shape, key, dtype=torch.float64)  # (B, T): hidden below C, then each code for a span of B
        code = ((u - C) / B.clamp(min=SMALL)).clamp(0, self.num_codes).long()
        return torch.where(u < C, self.num_codes, torch.where(code < self.num_codes, code, codes))

    def of_step(self, t: Tensor) -> tuple[Tensor, ...]:
        """The nine numbers of steps t (B,), (B, 1) each, fp64."""
        return self.rows_on(t.device)[t - 1].unsqueeze(2).unbind(1)

    def rows_on(self, device: torch.device) -> Tensor:
        """They move there and stay: a copy from the host waits for what the device is doing."""
        self.rows = self.rows.to(device)
        return self.rows

    def logits(self, model: Model, x_t: Tensor, told: Tensor) -> Tensor:
        tau = told.double() / TIMES_TOLD  # (B,)
        odds = self.num_codes * (1 - self.replaced * tau) / (self.replaced * tau).clamp(min=SMALL)  # A / B
        said = model(x_t, told)  # (B, T, K)
        seen = F.one_hot(x_t, self.num_codes + 1)[..., :-1]  # (B, T, K)
        return said + seen * odds.log1p().to(said.dtype)[:, None, None]

    def nats(self, model: Model, codes: Tensor, t: Tensor, x_t: Tensor) -> Tensor:
        """What these times (B,) and x_t (B, T) say of the bound on -log p of pictures (B, T), which is their mean; (B,)."""
        logits = self.logits(model, x_t, t * TIMES_TOLD / self.num_timesteps)  # (B, T, K)
        mean = mk.vq_diffusion_loss(logits, codes, x_t, self.rows_on(t.device), t - 1, reduction="none").loss  # (B,)
        return self.num_timesteps * codes.shape[1] * mean

    def draw_nats(self, model: Model, codes: Tensor, key: Tensor) -> Tensor:
        t = self.times(len(codes), mk.fold_in(key, TIME))
        return self.nats(model, codes, t, self.noised(codes, t, mk.fold_in(key, HIDDEN)))


def process_of(config: AbsorbingConfig, num_codes: int) -> Absorbing:
    return MaskAndReplace(config, num_codes) if isinstance(config, MaskAndReplaceConfig) else Absorbing(config, num_codes)
