"""VQ-Diffusion's loss as training scripts compute it: from the paper, in log space, by tensors of (B, K + 1, N)."""

import torch
import torch.nn.functional as F
from torch import Tensor

NOTHING = -70.0  # the logarithm of what has no probability


def log_one_hot(x: Tensor, classes: int) -> Tensor:
    """(B, classes, N)."""
    return F.one_hot(x, classes).movedim(-1, 1).float().clamp(min=1e-30).log()


def log_posterior(log_start: Tensor, log_x_t: Tensor, x_t: Tensor, log_row: tuple[Tensor, ...]) -> Tensor:
    """log q(x_{t-1} | x_t), averaged over x0 by log_start (B, K, N): (B, K + 1, N). Equations 5 and 11 of the paper."""
    a, b, c, A, B, C, A_1, B_1, C_1 = log_row  # (B, 1, 1) each
    hidden = (x_t == log_start.shape[1])[:, None]
    of_code = torch.where(hidden, c, torch.logaddexp(log_x_t[:, :-1] + a, b))  # q(x_t | x_{t-1})
    of_mask = torch.where(hidden, torch.zeros_like(c), torch.full_like(c, NOTHING))
    of_start = torch.where(hidden, C, torch.logaddexp(log_x_t[:, :-1] + A, B))  # q(x_t | x0)
    ratio = log_start - of_start
    total = ratio.logsumexp(1, keepdim=True)
    share = ratio - total
    before = torch.cat((torch.logaddexp(share + A_1, B_1), C_1.expand_as(total)), 1)  # q(x_{t-1} | x0), averaged
    return (before + torch.cat((of_code, of_mask), 1) + total).clamp(min=NOTHING)


def loss(logits: Tensor, x0: Tensor, x_t: Tensor, rows: Tensor, aux_weight: float) -> Tensor:
    """The batch's mean of the bound's term and of the auxiliary one, of logits (B, K, N) and the rows (B, 9) of their steps."""
    K = logits.shape[1]
    log_row = tuple(rows.clamp(min=1e-30).log()[:, :, None, None].unbind(1))
    log_x_t = log_one_hot(x_t, K + 1).to(logits)
    log_start = log_one_hot(x0, K).to(logits)
    log_p = F.log_softmax(logits, 1).clamp(min=NOTHING)
    true, said = (log_posterior(start, log_x_t, x_t, log_row) for start in (log_start, log_p))
    divergence = (true.exp() * (true - said)).sum(1)  # (B, N)
    missed = -(log_start.exp() * log_p).sum(1)
    first = rows[:, 6:7] == 1  # whose posterior is certain
    return (torch.where(first, missed, divergence) + aux_weight * missed).mean()
