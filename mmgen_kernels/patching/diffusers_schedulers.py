"""diffusers' schedulers: the user's own instance steps in one pass. Class, config and saving stay what they are.

On the instance, `step` and the methods that noise data are replaced; timesteps, levels, step index and history stay in the
attributes where diffusers keeps them, so that stock code serves any single call, and the next one is ours again.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mmgen_kernels.patching.rule import descends_from, overridden
from mmgen_kernels.schedule.planner import DEFAULTS
from mmgen_kernels.schedule.schedulers import noising
from mmgen_kernels.schedule.schedulers.base import signature_of_step, split_return_dict
from mmgen_kernels.schedule.schedulers.stepper import Stepper, Unplanned
from mmgen_kernels.schedule.schedulers.steps import ALSO_STEP, STEPS, TUPLES
from mmgen_kernels.schedule.schedulers.steps_codes import STEPS_OF_CODES, CodeStepper
from mmgen_kernels.schedule.schedulers.steps_shared import Bare

BY = "mk.scheduler_step"
FALLS_BACK_WHEN = ("a step has no row in the plan: an option it does not know, broadcast shapes, history from elsewhere",)
ALPHAS = {"add_noise": noising.by_alphas, "get_velocity": noising.velocity}
BY_TIMESTEP = tuple(ALPHAS.values())  # which stock looks up in a table, the last level for -1
NOISING: dict[str, dict[str, Callable[..., Tensor]]] = {
    "DDPMScheduler": ALPHAS,
    "DDIMScheduler": ALPHAS,
    "LCMScheduler": ALPHAS,
    "TCDScheduler": ALPHAS,
    "CogVideoXDDIMScheduler": ALPHAS,
    "EulerDiscreteScheduler": {"add_noise": noising.by_sigma},  # its get_velocity takes alphas_cumprod by the place in the run
    "EulerAncestralDiscreteScheduler": {"add_noise": noising.by_sigma},
    "DPMSolverMultistepScheduler": {"add_noise": noising.by_alpha_and_sigma},
    "DPMSolverSinglestepScheduler": {"add_noise": noising.by_alpha_and_sigma},
    "DEISMultistepScheduler": {"add_noise": noising.by_alpha_and_sigma},
    "UniPCMultistepScheduler": {"add_noise": noising.by_alpha_and_sigma},
    "CogVideoXDPMScheduler": ALPHAS,
    "SASolverScheduler": {"add_noise": noising.by_alphas},
    "FlowMatchHeunDiscreteScheduler": {},
    "FlowMatchLCMScheduler": {},
    "PNDMScheduler": {"add_noise": noising.by_alphas},
    "LMSDiscreteScheduler": {"add_noise": noising.by_sigma},
    "HeunDiscreteScheduler": {"add_noise": noising.by_sigma},
    "KDPM2DiscreteScheduler": {"add_noise": noising.by_sigma},
    "KDPM2AncestralDiscreteScheduler": {"add_noise": noising.by_sigma},
    "EDMDPMSolverMultistepScheduler": {"add_noise": noising.by_sigma},
    "EDMEulerScheduler": {"add_noise": noising.by_sigma},
    "CMStochasticIterativeScheduler": {"add_noise": noising.by_sigma},
    "DDIMInverseScheduler": {},  # which noises nothing
    "FlowMatchEulerDiscreteScheduler": {},  # scale_noise has its arguments in another order
}
STEPPING = STEPS | STEPS_OF_CODES
SPLIT = {name: split_return_dict(function, name not in TUPLES) for name, (function, _) in STEPPING.items()}
STEPS_OF_VERIFICATION = 5
TOLERANCE = 1e-4  # of the largest value: fp32, coefficients in fp32 there and in fp64 here, over that many steps

_verified: set[str] = set()  # configs


class Method:
    """What is put on an instance in place of a method of its class."""

    name: str

    def __init__(self, scheduler: Any):
        self.scheduler = scheduler

    def stock(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(type(self.scheduler), self.name)(self.scheduler, *args, **kwargs)

    @property
    def __wrapped__(self) -> Callable:
        """Pipelines ask `inspect.signature(scheduler.step)` what they may pass."""
        return getattr(type(self.scheduler), self.name).__get__(self.scheduler)


class Step(Method):
    """In place of `step`, or of another method that steps."""

    def __init__(self, scheduler: Any, class_name: str, stepper: Stepper | CodeStepper, name: str = "step"):
        super().__init__(scheduler)
        self.class_name, self.stepper, self.name = class_name, stepper, name
        self.calls = self.fused = 0
        self.unplanned = ""  # why the latest call that was stock's was

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        function, fields = STEPPING[self.class_name]
        if self.name != "step":
            function = ALSO_STEP[self.class_name][self.name]
        self.calls += 1
        ours, named, as_dict = SPLIT[self.class_name](args, dict(kwargs))
        try:
            results = function(self.stepper, self.scheduler, *ours, **named)
        except Unplanned as error:
            self.unplanned = str(error)
            return self.stock(*args, **kwargs)
        self.fused += 1
        if isinstance(results, Bare):
            return tuple(results)
        if not as_dict:
            return results
        return self.output(**dict(zip(fields, results, strict=True)))

    @property
    def output(self) -> Callable[..., Any]:
        """diffusers' own class of what a step returns."""
        module = sys.modules[type_of(self.scheduler, self.class_name).__module__]
        own = self.class_name.removesuffix("Scheduler") + "SchedulerOutput"
        return next(getattr(module, n) for n in (own, "SchedulerOutput", "DDIMSchedulerOutput") if hasattr(module, n))


class Noising(Method):
    def __init__(self, scheduler: Any, name: str, function: Callable[..., Tensor]):
        super().__init__(scheduler)
        self.name, self.function = name, function
        self.arguments = list(inspect.signature(getattr(type(scheduler), name)).parameters)[1:]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(self.arguments, args, strict=False)) | kwargs
        if len(given) < len(args) + len(kwargs) or [*given] != self.arguments or not self.serves(*given.values()):
            return self.stock(*args, **kwargs)
        return self.function(self.scheduler, *given.values())

    def serves(self, samples: Any, noise: Any, timesteps: Any) -> bool:
        """Tensors alike, one timestep a sample; and of those that can be looked at without a wait, none out of range."""
        if not all(isinstance(t, Tensor) for t in (samples, noise, timesteps)):
            return False
        if noise.shape != samples.shape or noise.dtype != samples.dtype or noise.device != samples.device or timesteps.dim() != 1:
            return False
        unseen = timesteps.device.type != "cpu" or timesteps.numel() == 0 or torch.compiler.is_compiling()
        if unseen or self.function not in BY_TIMESTEP:
            return True
        least, most = timesteps.aminmax()
        return int(least) >= 0 and int(most) < len(self.scheduler.alphas_cumprod)


def class_of(object: Any, names: Iterable[str] = DEFAULTS) -> str | None:
    """The class of diffusers whose step we have, by name; None if the object is no such scheduler."""
    return next((name for name in names if type_of(object, name) is not None), None)


def type_of(object: Any, name: str) -> Any:
    return None if isinstance(object, nn.Module) else descends_from(object, "diffusers", name)


def schedulers_in(object: Any, names: Iterable[str] = DEFAULTS) -> Iterator[tuple[str, Any]]:
    """The object itself, an item of a container, or an attribute such as a pipeline's."""
    if class_of(object, names) is not None:
        yield type(object).__name__, object
    elif not isinstance(object, nn.Module):
        items = object.items() if isinstance(object, Mapping) else enumerate(object) if isinstance(object, (list, tuple)) else None
        for name, value in list(vars(object).items() if items is None and hasattr(object, "__dict__") else items or ()):
            if class_of(value, names) is not None:
                yield str(name), value


def reasons_against(scheduler: Any, verify: bool) -> list[str]:
    name = class_of(scheduler)
    assert name is not None
    reasons = structural_reasons(scheduler, name, ("step", "set_timesteps", "convert_model_output", *ALSO_STEP.get(name, ())))
    if not reasons and verify:
        reasons = differences(scheduler, name)
    return reasons


def structural_reasons(scheduler: Any, name: str, methods: Iterable[str]) -> list[str]:
    """What speaks against it before anything runs: a subclass that overrides a method, another diffusers, another patch."""
    stock = type_of(scheduler, name)
    reasons = overridden(scheduler, stock, *methods)
    if list(inspect.signature(stock.step).parameters) != list(signature_of_step(STEPPING[name][0]).parameters):
        reasons.append(f"{name}.step takes other arguments than that of the diffusers we know")
    if "step" in vars(scheduler):
        reasons.append("its step was already replaced on the instance")
    return reasons


def replacements(scheduler: Any, noise: str) -> dict[str, Method]:
    name = class_of(scheduler)
    assert name is not None
    stepper = Stepper(name, noise)
    found: dict[str, Method] = {m: Step(scheduler, name, stepper, m) for m in ("step", *ALSO_STEP.get(name, ()))}
    for method, function in NOISING[name].items():
        if hasattr(type(scheduler), method):
            found[method] = Noising(scheduler, method, function)
    return found


def considered(scheduler: Any, verify: bool, noise: str) -> tuple[list[str], dict[str, Method], dict[str, list[str]]]:
    """Reasons to leave it alone, what replaces which method, and the methods that are left, with reasons."""
    reasons = reasons_against(scheduler, verify)
    return reasons, {} if reasons else replacements(scheduler, noise), {}


# -- verification -----------------------------------------------------------------------------------------------------


def differences(scheduler: Any, name: str) -> list[str]:
    """A short run by stock code and by ours, on copies: what they do otherwise; empty if nothing."""
    key = f"{type(scheduler)} {sorted(dict(scheduler.config).items(), key=lambda item: item[0])}"
    if key in _verified:
        return []
    try:
        expected = run_of(copy.deepcopy(scheduler))
    except Exception as error:
        return [f"stock code fails in verification: {type(error).__name__}: {error}"]
    twin = copy.deepcopy(scheduler)
    step = Step(twin, name, Stepper(name))
    twin.step = step
    try:
        found = run_of(twin)
    except Exception as error:
        return [f"our step fails in verification: {type(error).__name__}: {error}"]
    if step.fused < step.calls:
        return [step.unplanned]
    for k, (a, b) in enumerate(zip(found, expected, strict=True)):
        if a.dtype != b.dtype or a.shape != b.shape:
            return [f"step {k} gives {a.dtype} {tuple(a.shape)}, stock {b.dtype} {tuple(b.shape)}"]
        off = (a - b).abs().max() / b.abs().max().clamp(min=1e-6)
        if bool(b.isfinite().all()) and not bool(off <= TOLERANCE):
            return [f"step {k} differs from stock by {float(off):.1e} of the largest value"]
    _verified.add(key)
    return []


def run_of(scheduler: Any) -> list[Tensor]:
    """Five steps of a model that is a bounded function of the sample."""
    takes = inspect.signature(scheduler.set_timesteps).parameters
    mu = {"mu": 0.5} if "mu" in takes and scheduler.config.get("use_dynamic_shifting") else {}
    scheduler.set_timesteps(STEPS_OF_VERIFICATION, **mu)
    generator = torch.Generator().manual_seed(0)
    taken = inspect.signature(scheduler.step).parameters
    more: dict[str, Any] = {"generator": generator} if "generator" in taken else {}
    if "timestep_back" in taken:
        more |= {"timestep_back": None, "old_pred_original_sample": None}
    x = torch.randn(2, 3, 4, 4, generator=generator) * float(getattr(scheduler, "init_noise_sigma", 1.0))
    learned = scheduler.config.get("variance_type") in ("learned", "learned_range")
    results = []
    for t in scheduler.timesteps:
        seen = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        output = torch.tanh(torch.cat((seen, -seen), 1) if learned else seen)
        x, *others = scheduler.step(output, timestep=t, sample=x, **more, return_dict=False)
        if "timestep_back" in taken:
            more |= {"timestep_back": t, "old_pred_original_sample": others[0]}
        results += [x, *others]
    return results
