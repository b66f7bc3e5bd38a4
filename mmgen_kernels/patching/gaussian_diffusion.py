"""GaussianDiffusion objects that scripts bring along: those in the line of OpenAI's improved-diffusion, guided-diffusion, DiT, MAR.

Recognised by what they have, as the scripts are copied and not installed. On the instance, the methods of training and sampling are
replaced, each if nothing that stands in for it is overridden and it does the same as stock in a trial; everything else stays, and
stock code serves any call that the trial has not seen. What the model is told at each t is learned by asking: so respacing, which
wraps the model, needs not be known.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mmgen_kernels.checks import DTYPES
from mmgen_kernels.patching.diffusers_schedulers import Method
from mmgen_kernels.patching.gaussian_diffusion_trial import OPTIONAL, difference_of, told_by
from mmgen_kernels.schedule.gaussian_diffusion import GaussianDiffusion, LossType, ModelMeanType, ModelVarType, losses
from mmgen_kernels.schedule.gaussian_diffusion.kinds import member
from mmgen_kernels.schedule.gaussian_diffusion.steps import Limits, Process, loop
from mmgen_kernels.schedule.gaussian_diffusion.tables import Tables

BY = "mk.GaussianDiffusion"
FALLS_BACK_WHEN = (
    "an argument is given that only this script's method has",
    "cond_fn or MAR's temperature is given, of which the trial found another result, or there was none (verify=False)",
    "cond_fn is given with x of 64 bits",
    "tensors are no floats, t is not (B,) of int64, or the model's output has another shape than the variances ask for",
    "the losses are to be differentiated by x_start or noise",
    "a method or a table was replaced on the instance after mk.patch",
)
KINDS = {"model_mean_type": ModelMeanType, "model_var_type": ModelVarType, "loss_type": LossType}
TABLES = (
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "alphas_cumprod_next",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
)
ATTRIBUTES = ("betas", "alphas_cumprod", "posterior_variance", "num_timesteps", *KINDS)
OF_THE_MEAN = (
    "p_mean_variance",
    "q_posterior_mean_variance",
    "_predict_xstart_from_eps",
    "_predict_xstart_from_xprev",
    "_predict_eps_from_xstart",
    "_scale_timesteps",
    "_wrap_model",
)
# A method, and what stock code calls in it, which ours then does not: whoever replaced one of these is to be heard.
CALLS: dict[str, tuple[str, ...]] = {
    "q_sample": (),
    "p_sample": OF_THE_MEAN,
    "ddim_sample": OF_THE_MEAN,
    "ddim_reverse_sample": OF_THE_MEAN,
    "training_losses": ("q_sample", "_vb_terms_bpd", *OF_THE_MEAN),
    "p_sample_loop_progressive": (),
    "ddim_sample_loop_progressive": (),
}
OF_GUIDANCE = ("condition_mean", "condition_score")  # what stock code calls besides where there is a cond_fn
OF_SPACING = ("p_mean_variance", "training_losses", "condition_mean", "condition_score", "_scale_timesteps", "_wrap_model")


class DiffusionMethod(Method):
    """In place of a method: ours, where the call is one that the trial has seen."""

    takes: tuple[str, ...]  # arguments that are served; of others the default

    def __init__(self, diffusion: Any, name: str, process: Process, optional: Iterable[str]):
        super().__init__(diffusion)
        self.name, self.process = name, process
        self.takes = tuple(taken for taken in type(self).takes if taken not in OPTIONAL or taken in optional)
        self.loss_type = member("loss_type", LossType, diffusion.loss_type)
        self.defaults = arguments_of(base_of(type(diffusion)), name)
        self.tables = [(table, vars(diffusion)[table]) for table in TABLES if table in vars(diffusion)]
        self.wrapper = wrapper_of(diffusion)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = self.given(args, kwargs)
        if given is None or not self.as_it_was(given) or not self.serves(**given):
            return self.stock(*args, **kwargs)
        return self.fused(**given)

    def given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any] | None:
        """The arguments by name; None where one is not ours, or stock is to say what is wrong."""
        named = dict(zip(self.defaults, args, strict=False)) | kwargs
        if len(named) != len(args) + len(kwargs) or not named.keys() <= self.defaults.keys():
            return None
        given = self.defaults | named
        if any(value is inspect.Parameter.empty for value in given.values()):
            return None
        if any(not are_the_same(value, self.defaults[name]) for name, value in given.items() if name not in self.takes):
            return None
        return {name: value for name, value in given.items() if name in self.takes}

    def as_it_was(self, given: dict[str, Any]) -> bool:
        there = vars(self.scheduler)
        others = (self.name, *CALLS[self.name], *(OF_GUIDANCE if given.get("cond_fn") is not None else ()))
        replaced = any(name in there and not isinstance(there[name], DiffusionMethod) for name in others)
        return not replaced and all(there.get(name) is table for name, table in self.tables)

    def serves(self, **given: Any) -> bool:
        raise NotImplementedError

    def fused(self, **given: Any) -> Any:
        raise NotImplementedError

    def asked(self, model: Any, x: Tensor, t: Tensor, model_kwargs: Mapping[str, Any] | None) -> Any:
        return model(x, self.process.told(t), **(model_kwargs or {}))

    def refuses(self, x: Tensor, output: Any) -> bool:
        """Whether stock is to deal with what the model returned."""
        channels = x.shape[1] * (2 if self.process.tables.variance.learned else 1)
        expected = (x.shape[0], channels, *x.shape[2:])
        return not (is_float(output) and tuple(output.shape) == expected and output.device == x.device)


class QSample(DiffusionMethod):
    takes = ("x_start", "t", "noise")

    def serves(self, x_start: Any, t: Any, noise: Any = None) -> bool:  # type: ignore[override]
        return are_samples(x_start, t) and (noise is None or are_alike(noise, x_start))

    def fused(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:  # type: ignore[override]
        return self.process.noised(x_start, t, noise)[0]


class Sample(DiffusionMethod):
    """p_sample, ddim_sample and ddim_reverse_sample."""

    takes = ("model", "x", "t", "clip_denoised", "denoised_fn", "cond_fn", "model_kwargs", "eta", "temperature")

    def serves(  # type: ignore[override]
        self, model: Any, x: Any, t: Any, eta: float = 0.0, temperature: float = 1.0, cond_fn: Any = None, **limits: Any
    ) -> bool:
        numbers = isinstance(eta, (int, float)) and isinstance(temperature, (int, float))
        known = are_samples(x, t) and isinstance(limits["clip_denoised"], bool) and numbers
        # stock makes fp32 of a gradient, whatever x is
        guides = cond_fn is None or (callable(cond_fn) and not is_wrapped(cond_fn, self.wrapper) and x.dtype != torch.float64)
        reversed_with_noise = self.name == "ddim_reverse_sample" and eta != 0
        return known and guides and not is_wrapped(model, self.wrapper) and not reversed_with_noise

    def fused(  # type: ignore[override]
        self,
        model: Any,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> dict[str, Tensor]:
        output = self.asked(model, x, t, model_kwargs)
        if self.refuses(x, output):
            given = {"clip_denoised": clip_denoised, "denoised_fn": denoised_fn, "model_kwargs": model_kwargs, **options}
            return self.stock(lambda *args, **kwargs: output, x, t, **given)
        limits, cond_fn = Limits(clip_denoised, denoised_fn), options.get("cond_fn")
        m, v = self.process.split(x, output)
        if self.name == "p_sample":
            z, gradient = self.process.draw(x), self.process.gradient(cond_fn, x, t, model_kwargs)
            sample, clean = self.process.ancestral(x, m, t, z, v, limits, gradient, options.get("temperature", 1.0))
        else:
            reverse, gradient = self.name == "ddim_reverse_sample", self.process.gradient(cond_fn, x, t, model_kwargs)
            drawn = None if reverse else self.process.draw(x)
            sample, clean = self.process.ddim(x, m, t, drawn, options.get("eta", 0.0), limits, gradient, reverse)
        return {"sample": sample, "pred_xstart": clean}


class Loop(DiffusionMethod):
    """Timesteps are filled in on the device, where stock sends each of them."""

    takes = ("model", "shape", "noise", "device", "progress", "clip_denoised", "denoised_fn", "cond_fn", "model_kwargs", "eta",
             "temperature")  # fmt: skip

    def serves(self, shape: Any, noise: Any = None, **options: Any) -> bool:  # type: ignore[override]
        return isinstance(shape, (tuple, list)) and (noise is None or isinstance(noise, Tensor))

    def fused(  # type: ignore[override]
        self, model: Any, shape: Any, noise: Any = None, device: Any = None, progress: bool = False, **options: Any
    ) -> Any:
        step = getattr(self.scheduler, self.name.removesuffix("_loop_progressive"))
        return loop(step, self.scheduler.num_timesteps, model, shape, noise, device, progress, **options)


class TrainingLosses(DiffusionMethod):
    takes = ("model", "x_start", "t", "model_kwargs", "noise")

    def serves(self, model: Any, x_start: Any, t: Any, noise: Any = None, model_kwargs: Any = None) -> bool:  # type: ignore[override]
        known = are_samples(x_start, t) and (noise is None or are_alike(noise, x_start))
        if not known or is_wrapped(model, self.wrapper):
            return False
        # our loss has no gradients of these
        return not any(given is not None and given.requires_grad for given in (x_start, noise))

    def fused(  # type: ignore[override]
        self,
        model: Any,
        x_start: Tensor,
        t: Tensor,
        model_kwargs: Mapping[str, Any] | None = None,
        noise: Tensor | None = None,
    ) -> dict[str, Tensor]:
        x_t, noise = self.process.noised(x_start, t, noise)
        output = self.asked(model, x_t, t, model_kwargs)
        if self.refuses(x_t, output):
            return self.stock(lambda *args, **kwargs: output, x_start, t, model_kwargs=model_kwargs, noise=noise)
        return losses.training(self.process, self.loss_type, output, x_start, x_t, t, noise)


METHODS: dict[str, type[DiffusionMethod]] = {
    "q_sample": QSample,
    "p_sample": Sample,
    "ddim_sample": Sample,
    "ddim_reverse_sample": Sample,
    "training_losses": TrainingLosses,
    "p_sample_loop_progressive": Loop,
    "ddim_sample_loop_progressive": Loop,
}


def are_the_same(value: Any, default: Any) -> bool:
    return value is default or (isinstance(value, (bool, int, float, str)) and value == default)


def is_float(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dtype in DTYPES


def are_samples(x: Any, t: Any) -> bool:
    is_batch = is_float(x) and x.dim() >= 2 and isinstance(t, Tensor) and t.dtype == torch.int64
    return is_batch and tuple(t.shape) == tuple(x.shape[:1]) and t.device == x.device


def are_alike(noise: Any, x: Tensor) -> bool:
    return is_float(noise) and noise.shape == x.shape and noise.device == x.device


def is_wrapped(model: Any, wrapper: type | None) -> bool:
    """Whether it is told the timesteps of the whole process already."""
    return wrapper is not None and isinstance(model, wrapper)


# -- recognising --------------------------------------------------------------------------------------------------------


def recognises(object: Any) -> bool:
    if isinstance(object, (nn.Module, type)) or not hasattr(object, "__dict__"):
        return False
    has_methods = all(callable(getattr(type(object), name, None)) for name in ("q_sample", "p_mean_variance", "training_losses"))
    return has_methods and all(name in vars(object) for name in ATTRIBUTES)


def diffusions_in(object: Any) -> Iterator[tuple[str, Any]]:
    """The object itself, an item of a container, an attribute, or one of a module below (MAR's loss has two)."""
    if recognises(object):
        yield type(object).__name__, object
        return
    if isinstance(object, nn.Module):
        items = [(f"{path}.{name}" if path else name, v) for path, m in object.named_modules() for name, v in vars(m).items()]
    elif isinstance(object, Mapping):
        items = [(str(key), value) for key, value in object.items()]
    elif isinstance(object, (list, tuple)):
        items = [(str(i), value) for i, value in enumerate(object)]
    else:
        items = list(getattr(object, "__dict__", {}).items())
    found: dict[int, tuple[str, Any]] = {}
    for name, value in items:
        if recognises(value):
            found.setdefault(id(value), (name, value))
    yield from found.values()


def base_of(kind: type) -> type:
    """The class that has the formulas: the first that says what the model makes of x_{t-1}."""
    return [c for c in kind.__mro__ if "p_mean_variance" in vars(c)][-1]


def arguments_of(base: type, name: str) -> dict[str, Any]:
    """Names and defaults, in their order, as the formulas' own class has them: respacing hands on what it is given."""
    return {p.name: p.default for p in list(inspect.signature(getattr(base, name)).parameters.values())[1:]}


def wrapper_of(diffusion: Any) -> type | None:
    """The class of models that respacing has wrapped."""

    def model(x: Tensor, t: Tensor) -> Tensor:
        return x

    wrap = getattr(diffusion, "_wrap_model", None)
    wrapped = wrap(model) if callable(wrap) else model
    return None if wrapped is model else type(wrapped)


def overriders(diffusion: Any) -> dict[str, str]:
    """Of each method that is not the formulas' own class's, or respacing's, who has it."""
    kind, found = type(diffusion), dict[str, str]()
    base = base_of(kind)
    names = {*CALLS, *(name for called in CALLS.values() for name in called)}
    for other in kind.__mro__[: kind.__mro__.index(base)]:
        respaces = "_wrap_model" in vars(other)
        for name in names & vars(other).keys():
            if not (respaces and name in OF_SPACING):
                found.setdefault(name, f"{other.__name__} overrides {base.__name__}.{name}")
    return found | {name: f"{name} was already replaced on the instance" for name in names & vars(diffusion).keys()}


def reasons_against(diffusion: Any) -> list[str]:
    """Why none of the methods is served."""
    if isinstance(diffusion, GaussianDiffusion):
        return ["it is mk.GaussianDiffusion itself"]
    for name, kinds in KINDS.items():
        try:
            member(name, kinds, getattr(diffusion, name))
        except ValueError as error:
            return [str(error)]
    try:
        betas = torch.as_tensor(diffusion.betas, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        return [f"betas are no array of numbers: {error}"]
    if betas.dim() != 1 or len(betas) < 2 or len(betas) != diffusion.num_timesteps:
        return [f"betas have shape {tuple(betas.shape)} with num_timesteps = {diffusion.num_timesteps}"]
    plain: dict[str, Any] = {"model_mean_type": "epsilon", "model_var_type": "fixed_small", "loss_type": "mse"}
    ours = vars(GaussianDiffusion(betas=betas, **plain))
    for name in TABLES:
        table = vars(diffusion).get(name)
        if table is not None and not torch.allclose(torch.as_tensor(table, device="cpu").double(), ours[name], rtol=1e-6, atol=0):
            return [f"{name} does not follow from its betas"]
    return []


# -- what the handle asks -----------------------------------------------------------------------------------------------


def considered(diffusion: Any, verify: bool, noise: str) -> tuple[list[str], dict[str, Method], dict[str, list[str]]]:
    """Reasons to leave it alone, what replaces which method, and the methods that are left, with reasons."""
    if reasons := reasons_against(diffusion):
        return reasons, {}, {}
    try:
        stock = copy.deepcopy(diffusion)
        times = told_by(stock)
    except Exception as error:
        return [f"stock code fails in verification: {type(error).__name__}: {error}"], {}, {}
    if isinstance(times, str):
        return [times], {}, {}
    optional = dict[str, list[str]]()  # of the arguments that not all scripts' methods have, those that mean what we know
    there = [name for name in METHODS if callable(getattr(type(diffusion), name, None))]
    changed, kept = overriders(diffusion), dict[str, list[str]]()
    for name in there:
        kept[name] = [changed[called] for called in (name, *CALLS[name]) if called in changed]
        kept[name] += unknown_arguments(diffusion, name)
    if verify:
        known = {name: [taken for taken in OPTIONAL if taken in METHODS[name].takes] for name in there if not kept[name]}
        for name, method in methods_of(stock, times, "torch", known).items():
            kept[name] += difference_of(stock, method, times)
            tried = [] if kept[name] else [taken for taken in known[name] if taken in method.defaults]
            optional[name] = [taken for taken in tried if not difference_of(stock, method, times, taken)]
    found = methods_of(diffusion, times, noise, {name: optional.get(name, []) for name in there if not kept[name]})
    return [], dict(found), {name: reasons for name, reasons in kept.items() if reasons}


def methods_of(diffusion: Any, times: Tensor, noise: str, names: dict[str, list[str]]) -> dict[str, DiffusionMethod]:
    """By name, with the optional arguments that each serves. They share a process, and so its tables on the devices."""
    betas = torch.as_tensor(diffusion.betas, dtype=torch.float64, device="cpu")
    mean = member("model_mean_type", ModelMeanType, diffusion.model_mean_type)
    variance = member("model_var_type", ModelVarType, diffusion.model_var_type)
    as_they_are = torch.equal(times, torch.arange(len(betas))) and times.dtype == torch.int64
    process = Process(Tables(betas, mean, variance), None if as_they_are else times, noise)
    return {name: METHODS[name](diffusion, name, process, optional) for name, optional in names.items()}


def unknown_arguments(diffusion: Any, name: str) -> list[str]:
    """Of a method that has not the arguments we know, or takes some in an unknown way."""
    parameters = list(inspect.signature(getattr(base_of(type(diffusion)), name)).parameters.values())[1:]
    asked = [p.name for p in parameters if p.default is p.empty]
    wanted = {"q_sample": ["x_start", "t"], "training_losses": ["model", "x_start", "t"]}.get(name, ["model", "x", "t"])
    wanted = ["model", "shape"] if name.endswith("_loop_progressive") else wanted
    if asked != wanted or any(p.kind is not p.POSITIONAL_OR_KEYWORD for p in parameters):
        return [f"{name} takes {', '.join(p.name for p in parameters)}, which is not what we know"]
    return []
