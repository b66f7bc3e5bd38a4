"""The learned-sigma loss as lean as eager PyTorch has it: tables that are already where the samples are, a coefficient per sample,
no x_t, and the means' difference taken from the target. What torch.compile is given, too.
"""

from __future__ import annotations

import math

import torch


def table(betas):
    """fp32 (T, 3): what sets the means of epsilon apart, log B~_t and log betas_t."""
    after = (1 - betas).cumprod(0)
    before = torch.cat((torch.ones(1, dtype=betas.dtype), after[:-1]))
    spread = betas * (1 - before) / (1 - after)
    apart = -betas / ((1 - after) * (1 - betas)).sqrt()
    return torch.stack((apart, torch.cat((spread[1:2], spread[1:])).log(), betas.log()), 1).float()


def cdf(u):
    return torch.sigmoid(2 * math.sqrt(2 / math.pi) * (u + 0.044715 * u * u * u))


def hybrid_loss(output, x0, noise, t, rows):
    """The loss of each sample: epsilon and a learned range."""
    of_means, true_log, log_beta = (c.reshape(-1, *[1] * (x0.dim() - 1)) for c in rows[t].unbind(1))
    prediction, v = output.chunk(2, dim=1)
    share = (v.float() + 1) / 2
    log_variance = share * log_beta + (1 - share) * true_log
    mse = (noise - prediction).float().square().flatten(1).mean(1)
    apart = of_means * (noise - prediction.detach()).float()
    gap = log_variance - true_log
    kl = 0.5 * (gap - 1 + torch.exp(-gap) + apart.square() * torch.exp(-log_variance))
    inverse = torch.exp(-0.5 * log_variance)
    upper, lower = cdf(inverse * (apart + 1 / 255)), cdf(inverse * (apart - 1 / 255))
    probability = torch.where(x0 > 0.999, 1.0, upper) - torch.where(x0 < -0.999, 0.0, lower)
    first = (t == 0).reshape(of_means.shape)
    term = torch.where(first, -torch.log(probability.clamp(min=1e-12)), kl)
    return mse + term.flatten(1).mean(1) / math.log(2)
