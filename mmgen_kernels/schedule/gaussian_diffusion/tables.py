"""A process in numbers: its levels, and each of its updates as a table of rows for `mk.scheduler_step`.

With a = alphas_cumprod[t], p that of t - 1 (1 before the first) and b = 1 - a / p; the columns of a row being x_t, the model's
output m, the gradient g of a classifier where there is one, the predicted x_0 d, and noise z:

    prediction   d = (x - sqrt(1 - a) m) / sqrt(a)                      EPSILON;  m for START_X;  (m - c2 x) / c1 for PREVIOUS_X
    posterior    c1 d + c2 x,  c1 = b sqrt(p) / (1 - a),  c2 = (1 - p) sqrt(1 - b) / (1 - a)
    ancestral    posterior + v g + sqrt(v) z                            with m for posterior where it is PREVIOUS_X
    ddim         sqrt(p) d' + sqrt(1 - p - s^2) e' + s z,   d' = d + (1 - a) / sqrt(a) g,   e' = (x - sqrt(a) d') / sqrt(1 - a)
    reverse      the same to alphas_cumprod[t + 1] (0 after the last), s = 0

s = eta sqrt((1 - p) / (1 - a) (1 - a / p)), v the variance; at t = 0 no z. Ho et al. 2020; Song et al. 2021 (ddim); Dhariwal and
Nichol 2021 (g). Everything is fp64, made on the host once and sent to a device once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmgen_kernels.schedule.gaussian_diffusion.kinds import ModelMeanType, ModelVarType
from mmgen_kernels.schedule.planner.hybrid import hybrid_table

MOST_TABLES = 64  # kept; each eta has its own, and 1000 steps are 200 kB


class Tables:
    """
    Args:
        betas: fp64 (T,), in (0, 1].

    Whoever makes one in inference mode, or asks for a table there first, may train with it afterwards.
    """

    @torch.inference_mode(False)
    def __init__(self, betas: Tensor, mean: ModelMeanType, variance: ModelVarType):
        self.betas, self.mean, self.variance = betas, mean, variance
        alphas = 1 - betas
        self.alphas_cumprod = a = alphas.cumprod(0)
        self.alphas_cumprod_prev = p = torch.cat((a.new_ones(1), a[:-1]))
        self.alphas_cumprod_next = torch.cat((a[1:], a.new_zeros(1)))
        self.posterior_variance = betas * (1 - p) / (1 - a)
        self.posterior_variance_clipped = torch.cat((self.posterior_variance[1:2], self.posterior_variance[1:]))  # its first is 0
        self.posterior_mean_coef1 = betas * p.sqrt() / (1 - a)
        self.posterior_mean_coef2 = (1 - p) * alphas.sqrt() / (1 - a)
        self._sent: dict[tuple[Any, ...], Tensor] = {}

    def __len__(self) -> int:
        return len(self.betas)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_sent": {}}

    def on(self, device: torch.device, name: str, *arguments: Any) -> Tensor:
        """The table of that name on a device: sent there once."""
        asked = (device, name, *arguments)
        if asked not in self._sent:
            if len(self._sent) >= MOST_TABLES:
                del self._sent[next(iter(self._sent))]
            made = getattr(self, name)
            with torch.inference_mode(False):
                self._sent[asked] = (made if isinstance(made, Tensor) else made(*arguments)).to(device)
        return self._sent[asked]

    # -- variances ----------------------------------------------------------------------------------------------------

    def fixed_variances(self) -> Tensor:
        """(T, 2): variance and its logarithm. The small one is 0 at t = 0, and its logarithm that of t = 1."""
        small, large = self.posterior_variance, torch.cat((self.posterior_variance[1:2], self.betas[1:]))
        if self.variance is ModelVarType.FIXED_LARGE:
            return torch.stack((large, large.log()), 1)
        return torch.stack((small, self.posterior_variance_clipped.log()), 1)

    def log_range(self) -> Tensor:
        """(T, 2): the logarithms of variance that the model's -1 and 1 mean."""
        if self.variance is ModelVarType.LEARNED:
            return torch.tensor([[-1.0, 1.0]], dtype=torch.float64).expand(len(self), 2)
        return torch.stack((self.posterior_variance_clipped.log(), self.betas.log()), 1)

    def posterior_variances(self) -> Tensor:
        """(T, 2): the variance of q(x_{t-1} | x_t, x_0), and its clipped logarithm."""
        return torch.stack((self.posterior_variance, self.posterior_variance_clipped.log()), 1)

    def levels(self) -> Tensor:
        """(T, 3): the share of x_0 in x_t, and the variance of x_t and its logarithm."""
        a = self.alphas_cumprod
        return torch.stack((a.sqrt(), 1 - a, (1 - a).log()), 1)

    def noise_by_data(self) -> Tensor:
        """(T, 2, 4): gives the noise in x_t, given x_0."""
        of, a = self.forms(), column(self.alphas_cumprod)
        return rows(of["nothing"], (of["x"] - a.sqrt() * of["m"]) / (1 - a).sqrt())

    def hybrid(self) -> Tensor:
        """The table of `mk.hybrid_loss`."""
        prediction = {"EPSILON": "epsilon", "START_X": "sample", "PREVIOUS_X": "previous"}[self.mean.name]
        return hybrid_table(self.betas, prediction=prediction, variance=self.variance.name.lower())

    # -- rows ---------------------------------------------------------------------------------------------------------

    def forms(self, guided: bool = False) -> dict[str, Tensor]:
        """x, m, (g,) d and z as lines of columns, and nothing: (T, n + 2) each."""
        names = ("x", "m", "g", "d", "z") if guided else ("x", "m", "d", "z")
        unit = torch.eye(len(names), dtype=torch.float64)
        lines = {name: unit[i].expand(len(self), -1) for i, name in enumerate(names)}
        return lines | {"nothing": torch.zeros(len(self), len(names), dtype=torch.float64)}

    def predicted(self, of: dict[str, Tensor]) -> Tensor:
        """d by the other columns."""
        if self.mean is ModelMeanType.START_X:
            return of["m"]
        if self.mean is ModelMeanType.PREVIOUS_X:
            return (of["m"] - column(self.posterior_mean_coef2) * of["x"]) / column(self.posterior_mean_coef1)
        a = column(self.alphas_cumprod)
        return (of["x"] - (1 - a).sqrt() * of["m"]) / a.sqrt()

    def posterior(self, of: dict[str, Tensor]) -> Tensor:
        if self.mean is ModelMeanType.PREVIOUS_X:
            return of["m"]
        return column(self.posterior_mean_coef1) * of["d"] + column(self.posterior_mean_coef2) * of["x"]

    def prediction(self) -> Tensor:
        """Gives d: (T, 2, 4)."""
        of = self.forms()
        return rows(self.predicted(of), of["d"])

    def means(self) -> Tensor:
        """Gives the mean of x_{t-1}, and d: (T, 3, 4)."""
        of = self.forms()
        return rows(self.predicted(of), self.posterior(of), of["d"])

    def posterior_means(self) -> Tensor:
        """Gives the mean of q(x_{t-1} | x_t, x_0) of x_t and x_0: (T, 2, 4)."""
        of = self.forms()
        mean = column(self.posterior_mean_coef1) * of["m"] + column(self.posterior_mean_coef2) * of["x"]
        return rows(of["nothing"], mean)

    def ancestral(self, guided: bool = False, temperature: float = 1.0) -> Tensor:
        """Gives x_{t-1} and d: (T, 3, n + 2). A learned variance weighs z, and has a line more; g then has its v in it already."""
        of, later = self.forms(guided), column((torch.arange(len(self)) > 0).double())
        variance, log = self.fixed_variances().unbind(1)
        learned = self.variance.learned
        sample = self.posterior(of) + temperature * later * of["z"] * (1 if learned else column((log / 2).exp()))
        if guided:
            sample = sample + of["g"] * (1 if learned else column(variance))
        return rows(self.predicted(of), sample, of["d"], *([self.ends(of, 1)] if learned else []))

    def weighed(self) -> Tensor:
        """Gives z times the learned variance, whatever the only input: (T, 3, 3)."""
        of = {name: line[:, 1:] for name, line in self.forms().items()}
        return rows(of["nothing"], of["z"], self.ends(of, 2))

    def ends(self, of: dict[str, Tensor], power: int) -> Tensor:
        """The line of a learned variance: z is multiplied by v^(power / 2)."""
        line = of["nothing"].clone()
        line[:, :2] = power * self.log_range()
        return line

    def ddim(self, eta: float, guided: bool = False, reverse: bool = False) -> Tensor:
        """Gives the sample of the level before, or after, and d': (T, 3, n + 2)."""
        of, a = self.forms(guided), column(self.alphas_cumprod)
        to = column(self.alphas_cumprod_next if reverse else self.alphas_cumprod_prev)
        clean = of["d"] + (1 - a) / a.sqrt() * of["g"] if guided else of["d"]
        epsilon = (of["x"] - a.sqrt() * clean) / (1 - a).sqrt()
        share = 0 if eta == 0 else eta**2 * (1 - a / to) / (1 - a)  # of the variance there, drawn anew
        sample = to.sqrt() * clean + ((1 - to) * (1 - share)).sqrt() * epsilon
        if eta != 0:
            sample = sample + ((1 - to) * share).sqrt() * of["z"]
        return rows(self.predicted(of), sample, clean)


def column(levels: Tensor) -> Tensor:
    return levels[:, None]


def rows(derived: Tensor, *outputs: Tensor) -> Tensor:
    """(T, 1 + outputs, n + 2)"""
    return torch.stack((derived, *outputs), 1)
