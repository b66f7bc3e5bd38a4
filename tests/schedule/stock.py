"""diffusers' schedulers in fp64: their levels as they are, all that follows in fp64."""

import dataclasses
import importlib

import numpy as np
import torch
from plan_executor import image, model


class _Torch64:
    """torch, but float32 is float64: steps that upcast their sample to fp32 then leave fp64 alone."""

    float32 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


LEVELS = ("sigmas", "alphas_cumprod", "initial_alpha_cumprod", "final_alpha_cumprod", "one")


def prepared(class_name, config, run):
    """A scheduler after set_timesteps. Its levels are the numbers of fp32 that its users have, held in fp64."""
    scheduler = getattr(importlib.import_module("diffusers"), class_name).from_config(dict(config))
    names = ("num_inference_steps", "timesteps", "sigmas", "mu", "num_train_timesteps", "original_inference_steps")
    arguments = {name: run[name] for name in names if run.get(name) is not None}
    if "sigmas" in arguments:  # a list is what UniPC cannot shift
        given = np.array(arguments["sigmas"])
        arguments["sigmas"] = torch.from_numpy(given) if class_name == "EDMEulerScheduler" else given
    if run.get("strength", 1.0) != 1.0:
        arguments["strength"] = run["strength"]
    if "shift" in run:
        scheduler.set_shift(run["shift"])
    scheduler.set_timesteps(**arguments)
    for name in LEVELS:
        if isinstance(getattr(scheduler, name, None), torch.Tensor):
            setattr(scheduler, name, getattr(scheduler, name).double())
    if hasattr(scheduler, "sigmas_interpol"):
        levels_between(scheduler)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(run.get("begin", 0))
    return scheduler


def levels_between(scheduler):
    """What KDPM2 makes of its levels in set_timesteps, in fp32 there, in fp64."""
    s = scheduler.sigmas[::2]  # (N + 1,): every level once, the last is 0
    found, power, scale = {"sigmas_interpol": (s.log() / 2 + s.roll(1).log() / 2).exp()}, 1, s
    if hasattr(scheduler, "sigmas_up"):
        following = torch.cat((s[1:], s.new_zeros(1)))
        up = following * (s**2 - following**2).sqrt() / s
        found = {"sigmas_interpol": following, "sigmas_up": up, "sigmas_down": following**2 / s}
        power, scale = 4, (s * following) ** 2  # in fp32 the square of sigmas_down is a difference of squares
    for name, values in found.items():
        exact, off = (torch.cat((v[:1], v[1:].repeat_interleave(2), v[-1:])) for v in (values, 1e-5 * scale))
        deviation = (exact**power - getattr(scheduler, name).double() ** power).abs()
        assert not (deviation > off).any(), name  # what is NaN is not used, or is as NaN as stock's sample
        setattr(scheduler, name, exact)


def trajectory(scheduler, run, shape, channels):
    """Per step the outputs in their order, of the run that `plan_executor.trajectory` makes."""
    module = importlib.import_module(type(scheduler).__module__)
    taken = ("eta", "use_clipped_model_output", "s_churn", "s_tmin", "s_tmax", "s_noise", "order")
    extra = {name: run[name] for name in taken if name in run}
    if type(scheduler).__name__ == "CogVideoXDPMScheduler":
        extra |= {"timestep_back": None, "old_pred_original_sample": None}
    kept = {name: getattr(module, name) for name in ("torch", "randn_tensor") if hasattr(module, name)}
    begin, steps = run.get("begin", 0), []
    sample = image(99, shape) * getattr(scheduler, "init_noise_sigma", 1.0)
    try:
        module.torch = _Torch64()
        for k, time in enumerate(scheduler.timesteps[begin:]):
            module.randn_tensor = lambda *args, k=k, **kwargs: image(k, shape, speed=2.1)
            if scheduler.timesteps.dtype == torch.int64:
                time = int(time)  # a whole number, so that LCM's scalings of it are fp64
            scaled = scheduler.scale_model_input(sample, time) if hasattr(scheduler, "scale_model_input") else sample
            outputs = scheduler.step(model(k, scaled, channels), timestep=time, sample=sample, return_dict=False, **extra)
            sample = outputs[0]
            if "timestep_back" in extra:
                extra |= {"timestep_back": time, "old_pred_original_sample": outputs[1]}
            steps.append(outputs)
    except torch.linalg.LinAlgError:  # UniPC's third order where a level comes twice
        steps += [(torch.full_like(sample, torch.nan),)] * (len(scheduler.timesteps) - begin - len(steps))
    finally:
        for name, value in kept.items():
            setattr(module, name, value)
    return steps


def levels(scheduler, schedule):
    """The scheduler's own levels and timesteps in the planner's form."""
    own = {"timesteps": tuple(scheduler.timesteps.tolist()), "init_noise_sigma": float(getattr(scheduler, "init_noise_sigma", 1.0))}
    if schedule.sigmas is not None:
        own |= {"sigmas": tuple(scheduler.sigmas.tolist())}
    return dataclasses.replace(schedule, **own)
