"""What the planner is given and what it hands over."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """
    What the caller of a scheduler hands to `set_timesteps`, `set_begin_index` and `step`, as far as coefficients depend on it.

    A class reads what its diffusers namesake takes; what that one does not take must keep its default, else `plan` raises.

    Args:
        num_inference_steps: how many steps, where neither `timesteps` nor `sigmas` lists them.
        timesteps, sigmas: the caller's own list. EulerDiscreteScheduler's `sigmas` include the last level, the others' do not.
        mu: the shift of `use_dynamic_shifting`.
        shift: of the flows' `set_shift`, in place of the config's once the training levels are made.
        begin: index of the first step that runs (image to image). A solver with history starts there without history.
        eta, use_clipped_model_output: DDIM's; eta: TCD's too, where diffusers' default is 0.3.
        s_churn, s_tmin, s_tmax, s_noise: EulerDiscreteScheduler's. FlowMatchEulerDiscreteScheduler takes them and reads none.
        tau_func: SASolver's, of a timestep how much noise, in place of the config's.
        original_inference_steps, strength: LCM's and TCD's.
        per_token_timesteps: FlowMatchEulerDiscreteScheduler's; one level per token is no row of a table, so any raises.
        num_train_timesteps: of Heun and the two KDPM2: in place of the config's for the spacing alone.
        order: LMSDiscreteScheduler's, from 1 to 4.
        counter, kept, method: PNDM's: how many evaluations came before the first row, of how many the outputs are kept, and which
            of "prk" and "plms" serves the rows; None: as its `step` chooses.
        has_original: EDMEulerScheduler's: its step is handed a predicted x0, which then stands where the model's output would.
    """

    num_inference_steps: int | None = None
    timesteps: Sequence[float] | None = None
    sigmas: Sequence[float] | None = None
    mu: float | None = None
    shift: float | None = None
    begin: int = 0
    eta: float = 0.0
    use_clipped_model_output: bool = False
    s_churn: float = 0.0
    s_tmin: float = 0.0
    s_tmax: float = math.inf
    s_noise: float = 1.0
    tau_func: Callable[[int], float] | None = None
    original_inference_steps: int | None = None
    strength: float = 1.0
    per_token_timesteps: Any = None
    num_train_timesteps: int | None = None
    order: int = 4
    has_original: bool = False
    counter: int = 0
    kept: int = 0
    method: str | None = None


@dataclass(frozen=True)
class Schedule:
    """
    When the model is asked and how much noise there is then.

    Args:
        timesteps: one per step, whole numbers where `timestep_dtype` is "int64", rounded to fp32 where it is "float32".
        timestep_dtype: "int64", "float32" or "float64", the dtype of the stock scheduler's `timesteps`.
        sigmas: one level per step and the last one (classes in sigma space), else None. Values of fp32.
        alphas_cumprod: one per training timestep (classes by whole timesteps), else None. Values of fp32, CogVideoX's of fp64.
        init_noise_sigma: what the initial noise is multiplied by.
    """

    timesteps: tuple[float, ...]
    timestep_dtype: str
    sigmas: tuple[float, ...] | None = None
    alphas_cumprod: tuple[float, ...] | None = None
    init_noise_sigma: float = 1.0


@dataclass(frozen=True)
class Plan:
    """
    A run of a scheduler as a table: one row per step, and a row is a matrix for the operator `scheduler_step`.

    With n inputs, a row has 1 + len(outputs) lines and n + 2 columns, namely inputs..., derived, noise:

        derived = sum_j row[0][j] in_j + row[0][n + 1] noise                        clamped or thresholded where the plan says so
        out_k   = sum_j row[1 + k][j] in_j + row[1 + k][n] derived + row[1 + k][n + 1] noise

    A term whose coefficient is 0 is left out, never multiplied: history that does not exist yet may be anything.

    Args:
        inputs: names of the inputs, of which a row uses at most 7. "sample", "model_output", "last_sample", "last_noise", and "m1",
            "m2", ...: converted model outputs of one, two, ... steps ago, "x1", "x2", ...: samples, "derivative": a slope of the
            step before.
        outputs: names of the outputs, at most 3. "prev_sample" is the first; "pred_original_sample", "denoised" are returned beside
            it; "m0" (this step's converted model output) and "corrected" (the sample after the corrector) are history to keep.
        rows: (steps, 1 + len(outputs), len(inputs) + 2). rows[k] is step `begin` + k.
        schedule: timesteps and levels of the whole run, steps before `begin` included.
        begin: index of the first step in `schedule.timesteps`.
        draws_noise: per row, whether the stock scheduler draws noise there. It may draw where the coefficient is 0.
        scale_model_input: per row, what the sample is multiplied by before the model sees it.
        feeds: where the next step's history comes from: input name -> name of this step's output or input, or
            "noise"; or of each row its own.
        clamp: (low, high) for derived, or None.
        threshold: (ratio, max) for derived, or None: per sample s = min(max(1, quantile(|derived|, ratio)), max),
            derived = clamp(derived, -s, s) / s.
        log_variance: None, or per row (log of the least, log of the greatest variance). Then the model's second half of channels v
            decides: prev_sample's coefficient of noise is multiplied by exp((f greatest + (1 - f) least) / 2), f = (v + 1) / 2.
        channels: None, or how many of model_output's first channels enter.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    rows: list[list[list[float]]]
    schedule: Schedule
    begin: int
    draws_noise: tuple[bool, ...]
    scale_model_input: tuple[float, ...]
    feeds: dict[str, str] | tuple[dict[str, str], ...] = field(default_factory=dict)
    clamp: tuple[float, float] | None = None
    threshold: tuple[float, float] | None = None
    log_variance: tuple[tuple[float, float], ...] | None = None
    channels: int | None = None

    def feeds_of(self, k: int) -> dict[str, str]:
        return self.feeds if isinstance(self.feeds, dict) else self.feeds[k]

    @property
    def init_noise_sigma(self) -> float:
        return self.schedule.init_noise_sigma

    @property
    def timesteps(self) -> tuple[float, ...]:
        """The timesteps of the rows: those from `begin` on."""
        return self.schedule.timesteps[self.begin :]
