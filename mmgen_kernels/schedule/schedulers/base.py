"""What the scheduler classes share: configuration, timesteps, counting of steps, noising, and the fused `step`."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mmgen_kernels.checks import check_choice
from mmgen_kernels.schedule import planner
from mmgen_kernels.schedule.planner import DEFAULTS, Run, Schedule, betas
from mmgen_kernels.schedule.schedulers import noising
from mmgen_kernels.schedule.schedulers.configuration import Config, Configured
from mmgen_kernels.schedule.schedulers.noise import NOISES
from mmgen_kernels.schedule.schedulers.stepper import Stepper, place_in
from mmgen_kernels.schedule.schedulers.steps import ALSO_STEP, STEPS, TUPLES
from mmgen_kernels.schedule.schedulers.steps_shared import Bare

Device = torch.device | str | None


class StepOutput(OrderedDict):
    """What a step returns: by name, as attribute or by number."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def __getitem__(self, key: Any) -> Any:
        return self.to_tuple()[key] if isinstance(key, (int, slice)) else super().__getitem__(key)

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(self.values())


def signature_of_step(function: Callable, as_dict: bool = True) -> inspect.Signature:
    """diffusers': that of the function in steps.py with `return_dict`, by default `as_dict`, behind what it takes by place."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    own = list(inspect.signature(function).parameters.values())[2:]
    before = [p for p in own if p.kind == kind]
    after = [p.replace(kind=kind) for p in own if p.kind != kind]
    flag = inspect.Parameter("return_dict", kind, default=as_dict, annotation=bool)
    return inspect.Signature([inspect.Parameter("self", kind), *before, flag, *after])


def split_return_dict(function: Callable, as_dict: bool = True) -> Callable[[tuple, dict], tuple[tuple, dict, bool]]:
    """Takes `return_dict` out of a call's arguments, wherever it stands."""
    names = list(signature_of_step(function).parameters)[1:]
    count = names.index("return_dict")

    def split(args: tuple, kwargs: dict) -> tuple[tuple, dict, bool]:
        if len(args) > count:
            return args[:count], kwargs | dict(zip(names[count + 1 :], args[count + 1 :], strict=False)), bool(args[count])
        return args, kwargs, bool(kwargs.pop("return_dict", as_dict))

    return split


def stepping(function: Callable, fields: tuple[str, ...], unless_told: bool) -> Callable:
    """The method of a class that steps by the function; what `return_dict` is unless told."""
    split = split_return_dict(function, unless_told)

    def step(self: Scheduler, *args: Any, **kwargs: Any) -> Any:
        args, kwargs, as_dict = split(args, kwargs)
        results = function(self.stepper, self, *args, **kwargs)
        if isinstance(results, Bare):
            return tuple(results)
        return StepOutput(zip(fields, results, strict=True)) if as_dict else results

    step.__signature__ = signature_of_step(function, unless_told)  # type: ignore[attr-defined]
    step.__doc__ = f"One step, in one pass: {', '.join(fields)}, in a StepOutput, or as a tuple where return_dict is False."
    return step


class Scheduler(Configured):
    """A scheduler of diffusers by its name: the same config, `set_timesteps`, `step` and noise, and a step is one operator.

    The constructor takes diffusers' arguments with diffusers' defaults. Timesteps, levels and coefficients are made by
    `mmgen_kernels.schedule.planner`, the levels being the very numbers that diffusers has; `step` computes in fp32 at least and
    rounds once. Differences to diffusers: that rounding; a timestep that is a tensor of another device and no view of `timesteps`
    costs a wait for that device; options that the planner refuses raise ValueError.

    Raises:
        TypeError: an argument that diffusers' class does not take.
        ValueError: a config or a run that is not planned, or a timestep that is none of the run's.

    NaN: as in `mk.scheduler_step`.

    Source: the papers named in mmgen_kernels/schedule/planner.
    """

    class_name: str  # diffusers'
    order = 1

    @torch.inference_mode(False)  # or autograd could not keep the levels
    def __init__(self, *args: Any, **kwargs: Any):
        bound = self.__signature_of_init__().bind(*args, **kwargs)
        bound.apply_defaults()
        self.config = Config(bound.arguments)
        self.use_noise("torch")
        self.num_inference_steps: int | None = None
        self._step_index: int | None = None
        self._begin_index: int | None = None
        self.sigmas: Tensor | None = None
        self.alphas_cumprod: Tensor | None = None
        self.set_training_levels()
        self.forget()

    def __init_subclass__(cls) -> None:
        if cls.__name__ not in STEPS:  # what several share, and subclasses of users
            return
        cls.class_name = cls.__name__
        if cls.__doc__ and Scheduler.__doc__:  # neither under -OO
            cls.__doc__ = f"{inspect.cleandoc(cls.__doc__)}\n\n{inspect.cleandoc(Scheduler.__doc__)}"
        function, fields = STEPS[cls.class_name]
        unless_told = cls.class_name not in TUPLES
        cls.step = stepping(function, fields, unless_told)  # type: ignore[attr-defined]
        for name, another in ALSO_STEP.get(cls.class_name, {}).items():
            setattr(cls, name, stepping(another, fields, unless_told))
        cls.__signature__ = cls.__signature_of_init__()  # type: ignore[attr-defined]

    @classmethod
    def __signature_of_init__(cls) -> inspect.Signature:
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        return inspect.Signature([inspect.Parameter(n, kind, default=v) for n, v in DEFAULTS[cls.class_name].items()])

    def use_noise(self, noise: str) -> None:
        """ "torch": the noise that diffusers would draw. "philox": normals in registers, from a key that a run draws once."""
        check_choice("noise", noise, NOISES)
        self.stepper = Stepper(self.class_name, noise)

    def __len__(self) -> int:
        return self.config["num_train_timesteps"]

    # -- timesteps ----------------------------------------------------------------------------------------------------

    def set_training_levels(self) -> None:
        """`timesteps` and levels before set_timesteps: those of training."""
        raise NotImplementedError

    def set_run(self, device: torch.device | str | None, **run: Any) -> None:
        planned = planner.schedule(self.class_name, dict(self.config), Run(**{n: v for n, v in run.items() if v is not None}))
        self.set_levels(planned, device)
        lists = (run.get("timesteps"), run.get("sigmas"))
        self.num_inference_steps = run.get("num_inference_steps") or next(len(v) for v in lists if v is not None)
        self._step_index = self._begin_index = None
        self.forget()

    @torch.inference_mode(False)
    def set_levels(self, levels: Schedule, device: torch.device | str | None = None) -> None:
        timesteps = torch.tensor(levels.timesteps, dtype=getattr(torch, levels.timestep_dtype))
        self.timesteps = timesteps if device is None else timesteps.to(device)
        self.stepper.know(self.timesteps, timesteps.tolist())
        self.sigmas = None if levels.sigmas is None else torch.tensor(levels.sigmas, dtype=torch.float32)
        self.set_initial_noise(levels.init_noise_sigma)

    def forget(self) -> None:
        """What a solver keeps of former steps."""

    @property
    def step_index(self) -> int | None:
        """The next step's number, None before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """The first step that runs, as image to image has it; then no timestep is looked up."""
        self._begin_index = begin_index

    def index_for_timestep(self, timestep: float | Tensor, schedule_timesteps: Tensor | None = None) -> int:
        """Where the timestep stands; of two equal ones the second, so that a run entered there skips no level."""
        schedule = self.timesteps if schedule_timesteps is None else schedule_timesteps
        place = place_in(schedule, timestep)
        if schedule is self.timesteps and place is not None:  # a view of them: what it holds is known on the host
            numbers = self.stepper.numbers(0, schedule)
            found = [k for k, t in enumerate(numbers) if t == numbers[place]]
        else:
            value = timestep.to(schedule.device) if isinstance(timestep, Tensor) else timestep
            found = (schedule == value).nonzero().flatten().tolist()
        if not found:
            raise ValueError(f"timestep must be one of scheduler.timesteps, got {timestep}")
        return found[1 if len(found) > 1 else 0]

    def _init_step_index(self, timestep: float | Tensor) -> None:
        self._step_index = self.index_for_timestep(timestep) if self._begin_index is None else self._begin_index

    def set_initial_noise(self, sigma: float) -> None:
        """Flows have none to set: a pipeline that asks for `init_noise_sigma` finds that there is no such attribute."""


class Diffusion(Scheduler):
    """Of classes whose runs begin with noise of some deviation, and whose models may want the sample scaled."""

    init_noise_sigma: float = 1.0

    def set_initial_noise(self, sigma: float) -> None:
        self.init_noise_sigma = sigma

    def scale_model_input(self, sample: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The sample as the model wants it: as it is, but for Euler's."""
        return sample


class VariancePreserving(Diffusion):
    """Of classes that go by alphas_cumprod and whole timesteps."""

    schedules: Sequence[str] = betas.SCHEDULES

    def scale_model_input(self, sample: Tensor, timestep: int | None = None) -> Tensor:
        """The sample as it is."""
        return sample

    def set_training_levels(self) -> None:
        self.alphas_cumprod = self.levels_of_training()
        self.timesteps = torch.arange(len(self) - 1, -1, -1)

    def levels_of_training(self) -> Tensor:
        return betas.alphas_cumprod(self.config, tuple(self.schedules))

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """sqrt(a) original_samples + sqrt(1 - a) noise with a = alphas_cumprod[timesteps], (B,)."""
        return noising.by_alphas(self, original_samples, noise, timesteps)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """sqrt(a) noise - sqrt(1 - a) sample."""
        return noising.velocity(self, sample, noise, timesteps)


class SigmaSpace(Diffusion):
    """Of classes that go by levels sigma, and by a number of the step."""

    def set_training_levels(self) -> None:
        terminal = betas.LEAST_ALPHA
        self.alphas_cumprod = betas.alphas_cumprod(self.config, terminal=terminal)
        self.timesteps = torch.linspace(0, len(self) - 1, len(self), dtype=torch.float32).flip(0)
        levels = ((1 - self.alphas_cumprod) / self.alphas_cumprod).sqrt()
        self.sigmas = torch.cat((levels.flip(0), torch.zeros(1)))


class Multistep(SigmaSpace):
    """Of solvers with history, whose samples are alpha x0 + sigma noise."""

    def forget(self) -> None:
        self.model_outputs: list[Tensor | None] = [None] * self.config["solver_order"]
        self.lower_order_nums = 0

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """alpha original_samples + sigma noise at the levels of `timesteps`, (B,)."""
        return noising.by_alpha_and_sigma(self, original_samples, noise, timesteps)
