"""Does a method of ours do what the stock one does? Both run on a copy, from the same seeds, in fp32."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mmgen_kernels.patching.verification import difference, undisturbed

CPU = torch.device("cpu")
CHANNELS, SIDE = 2, 8
STEPS_OF_A_LOOP = 3


def guide(x: Tensor, t: Tensor, shift: float = 0.0) -> Tensor:
    """What a classifier might say, and what it is told with it."""
    return torch.sin(x + shift) + torch.cos(t.to(x.dtype)).view(-1, *[1] * (x.dim() - 1))


OPTIONAL: dict[str, Any] = {"cond_fn": guide, "temperature": 0.7}  # not of every script: tried each for itself

Call = Callable[[Callable[..., Any]], dict[str, Any]]

_verified: set[Any] = set()  # kinds of objects, by method


def told_by(diffusion: Any) -> Tensor | str:
    """What the model gets at each t (T,), in sampling and in training; or why that is no function of t."""
    T, seen = diffusion.num_timesteps, list[Tensor]()

    def model(x: Tensor, t: Tensor) -> Tensor:
        seen.append(t)
        return torch.zeros(T, factor(diffusion), 1, dtype=x.dtype)

    t, x = torch.arange(T), torch.zeros(T, 1, 1)
    with undisturbed(CPU), torch.no_grad():
        diffusion.p_mean_variance(model, x, t)
        diffusion.training_losses(model, x, t)
        reversed_t = len(seen)
        diffusion.p_mean_variance(model, x, t.flip(0))
    first = seen[0]
    others = [*seen[1:reversed_t], seen[reversed_t].flip(0)]
    if first.shape != (T,) or any(first.dtype != other.dtype or not torch.equal(first, other) for other in others):
        return "the model is not told the same of a t in sampling and in training"
    return first.clone()


def factor(diffusion: Any) -> int:
    return 2 if diffusion.model_var_type.name.startswith("LEARNED") else 1


class Model(nn.Module):
    """A bounded function of what it is given, with a parameter for the gradients; around `near`, within about `reach`."""

    def __init__(self, learned: bool, near: Tensor | None = None, reach: float = 1.0):
        super().__init__()
        self.weight, self.learned = nn.Parameter(torch.tensor([0.8, 0.3])), learned
        self.near, self.reach = near, reach

    def forward(self, x: Tensor, t: Tensor, shift: float = 0.0) -> Tensor:
        time = torch.sin(t.to(x.dtype)).view(-1, *[1] * (x.dim() - 1))
        m = self.reach * (self.weight[0] * torch.tanh(x) + self.weight[1] * time + shift)
        m = m if self.near is None else self.near + m
        return torch.cat((m, torch.sin(2 * x + self.weight[1])), 1) if self.learned else m


def difference_of(diffusion: Any, method: Any, times: Tensor, optional: str | None = None) -> list[str]:
    """What `method` does otherwise than the stock method of `diffusion`; that there is nothing is remembered.

    optional: of the OPTIONAL arguments the one that is given.
    """
    tables = diffusion.betas.tobytes() if hasattr(diffusion.betas, "tobytes") else tuple(map(float, diffusion.betas))
    kinds = (diffusion.model_mean_type.name, diffusion.model_var_type.name, diffusion.loss_type.name)
    key = (type(diffusion), method.name, kinds, tables, tuple(times.tolist()), tuple(method.defaults), optional)
    if key in _verified:
        return []
    stock = getattr(diffusion, method.name)
    with undisturbed(CPU):
        for told, t, call in calls(diffusion, method, optional):
            magnifications = magnifications_at(diffusion, t)
            try:
                expected = left_by(call, stock)
            except Exception as error:
                return [f"stock code fails in verification, {told}: {type(error).__name__}: {error}"]
            try:
                found = left_by(call, method)
            except Exception as error:
                return [f"ours fails in verification, {told}: {type(error).__name__}: {error}"]
            if reasons := compared(expected, found, magnifications):
                return [f"{told}: {reasons[0]}"]
    _verified.add(key)
    return []


def calls(diffusion: Any, method: Any, optional: str | None) -> Iterator[tuple[str, Tensor, Call]]:
    """Calls of a method: a name, the timesteps of the samples, and a function of the method to what it returns."""
    T, takes = diffusion.num_timesteps, method.defaults
    t = torch.tensor([0, 1, T // 4, T // 2, 3 * T // 4, T - 1])
    shape = (len(t), CHANNELS, SIDE, SIDE)
    generator = torch.Generator().manual_seed(7)
    x, z = torch.randn(2, *shape, generator=generator)
    data = (x.clamp(-1.2, 1.2).clamp(-1, 1) * 127.5).round() / 127.5
    model = Model(factor(diffusion) == 2)
    kwargs: dict[str, Any] = {"model_kwargs": {"shift": 0.1}} | ({} if optional is None else {optional: OPTIONAL[optional]})
    if method.name == "q_sample":
        yield "with noise of its own", t, lambda f: {"x_t": f(data, t)}
        yield "with noise", t, lambda f: {"x_t": f(data, t, noise=z)}
    elif method.name == "training_losses":
        # stock's probabilities of levels many deviations away are differences of numbers near 1, which no precision tells apart
        reach = float(diffusion.posterior_variance[1]) ** 0.5
        student = model if diffusion.model_mean_type.name == "EPSILON" else Model(model.learned, data, reach)

        def learning(f: Callable[..., Any], **noise: Tensor) -> dict[str, Any]:
            terms = f(student, data, t, **kwargs, **noise)
            (gradient,) = torch.autograd.grad(terms["loss"].sum(), student.weight)
            return terms | {"gradient": gradient}

        yield "with noise of its own", t, learning
        yield "with noise", t, lambda f: learning(f, noise=z)
    elif method.name.endswith("_loop_progressive"):
        for given in (None, z):

            def first(f: Callable[..., Any], noise: Tensor | None = given) -> dict[str, Any]:
                outs = itertools.islice(f(model, shape, noise=noise, clip_denoised=True, device="cpu", **kwargs), STEPS_OF_A_LOOP)
                return {f"{name} of step {i}": value for i, out in enumerate(outs) for name, value in out.items()}

            yield "from noise" if given is not None else "from noise of its own", torch.full_like(t, T - 1), first
    else:
        etas = ({"eta": 0.0}, {"eta": 0.6}) if "eta" in takes and method.name == "ddim_sample" else ({},)
        functions = (None, torch.sin) if "denoised_fn" in takes else (None,)
        for clip, function, eta in itertools.product((True, False), functions, etas):
            limits = {"clip_denoised": clip} | ({} if function is None else {"denoised_fn": function})

            def once(f: Callable[..., Any], options: dict[str, Any] = limits | eta) -> dict[str, Any]:
                return f(model, x, t, **options, **kwargs)

            yield ", ".join(f"{name}={value}" for name, value in (limits | eta).items()), t, once


def left_by(call: Call, method: Callable[..., Any]) -> dict[str, Any]:
    """What a call returns, and the state in which it leaves the generator."""
    torch.default_generator.manual_seed(3)
    found = {name: value.detach() if isinstance(value, Tensor) else value for name, value in call(method).items()}
    return found | {"state of the random generator": torch.default_generator.get_state()}


def compared(expected: dict[str, Any], found: dict[str, Any], magnifications: list[float]) -> list[str]:
    """Sample by sample, as x_0 of one that is all but noise is the difference of far larger numbers."""
    if list(expected) != list(found):
        return [f"returns {', '.join(found)}, stock {', '.join(expected)}"]
    reasons = []
    for name, value in expected.items():
        pairs = [(value, found[name], min(magnifications))]
        if isinstance(value, Tensor) and isinstance(found[name], Tensor) and value.dim() > 1 and value.shape == found[name].shape:
            pairs = list(zip(value, found[name], magnifications, strict=True))
        reasons += [f"{name} {reason}" for a, b, of in pairs if (reason := difference(a, b, of))][:1]
    return reasons


def magnifications_at(diffusion: Any, t: Tensor) -> list[float]:
    """Stock rounds sqrt(1 / a) x and sqrt(1 / a - 1) m, of which x_0 is the difference. Tolerances are for 100 roundings."""
    levels = torch.as_tensor(diffusion.alphas_cumprod).double()[t]
    return [1 + 0.1 / max(level, 1e-12) ** 0.5 for level in levels.tolist()]
