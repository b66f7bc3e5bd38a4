"""Cases of guidance and of its backward."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import mmgen_kernels as mk
from mmgen_kernels.battery import Dtypes
from mmgen_kernels.battery.draws import randn
from mmgen_kernels.battery.schedule.law import BF16, FEW, FP32, SAME, Subject, Tensors, pair


def guided_formula(cond: Tensor, uncond: Tensor, scale: float, rescale: float) -> Tensor:
    guided = uncond + scale * (cond - uncond)
    if rescale == 0:
        return guided
    of_sample = tuple(range(1, cond.dim()))
    rescaled = guided * (cond.std(of_sample, keepdim=True) / guided.std(of_sample, keepdim=True))
    return rescale * rescaled + (1 - rescale) * guided


def subject(shape: tuple[int, ...], scale: float, rescale: float, layout: Callable[[Tensor], Tensor] = lambda t: t) -> Subject:
    def arguments(device: torch.device, dtypes: Dtypes) -> Tensors:
        dtypes = (dtypes[0], dtypes[-1])
        return {n: layout(randn(*shape, seed=i).to(dtypes[i])).to(device) for i, n in enumerate(("cond", "uncond"))}

    return Subject(
        arguments,
        lambda t: (mk.guidance(t["cond"], t["uncond"], scale, rescale=rescale),),
        lambda t: (guided_formula(t["cond"], t["uncond"], scale, rescale),),
    )


def halves(t: Tensor) -> Tensor:
    """Of a doubled batch."""
    return torch.cat((t, t)).chunk(2)[1]


def channels_last(t: Tensor) -> Tensor:
    return t.movedim(1, -1).contiguous().movedim(-1, 1)


SHAPE = (3, 4, 37)
CASES = [
    *pair("guidance", "scale", subject((2, 4, 16, 16), 7.5, 0.0), SAME, quick=True),
    *pair("guidance", "rescale", subject((2, 4, 16, 16), 7.5, 0.7), SAME, quick=True),
    *[c for s in (0.0, 1.0, -2.0) for c in pair("guidance", f"scale_{s}", subject(SHAPE, s, 0.0), FEW)],
    *pair("guidance", "rescale_whole", subject((2, 3000), 3.0, 1.0), FEW),
    *pair("guidance", "halves", subject(SHAPE, 5.0, 0.3, halves), FEW),
    *pair("guidance", "channels_last", subject((2, 3, 4, 5), 5.0, 0.3, channels_last), FEW),
    *pair("guidance", "no_samples", subject((0, 4), 5.0, 0.3), FEW),
    *pair("guidance", "no_elements", subject((3, 0), 5.0, 0.0), FEW),
    *pair("guidance", "mixed", subject(SHAPE, 5.0, 0.0), ((FP32, BF16),))[:1],
]
