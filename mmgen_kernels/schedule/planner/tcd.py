"""
TCDScheduler, Zheng et al. 2024, strategic stochastic sampling along a trajectory:

    x_s = sqrt(a_s) x0 + sqrt(1 - a_s) epsilon             s = floor((1 - eta) t')
    x'  = sqrt(a' / a_s) x_s + sqrt(1 - a' / a_s) z        x_s alone where eta is 0, and after the last step

with a, a', a_s alphas_cumprod at this timestep t, the next of the run t' (0 after the last) and s. Timesteps are LCM's, but an
`original_inference_steps` of set_timesteps makes every training timestep a candidate. The config's clipping and set_alpha_to_one
are read by no step. In diffusers alphas_cumprod and all that comes of it are fp32, the product of s too; here alphas_cumprod and
that product. Derived is x_s; the outputs are prev_sample and pred_noised_sample.
"""

from __future__ import annotations

from mmgen_kernels.schedule.planner import conversion, lcm
from mmgen_kernels.schedule.planner.contract import Config, Plan, Run, Schedule
from mmgen_kernels.schedule.planner.floats import div, f32, sqrt
from mmgen_kernels.schedule.planner.forms import DERIVED, NOISE, matrix
from mmgen_kernels.schedule.planner.variance_preserving import check_signal, of_levels

TAKES = ("num_inference_steps", "timesteps", "begin", "original_inference_steps", "strength", "eta")
PREDICTIONS = ("epsilon", "sample", "v_prediction")


def schedule(config: Config, run: Run) -> Schedule:
    return lcm.schedule_from(config, run, _candidates(config, run))


def _candidates(config: Config, run: Run) -> list[int]:
    if run.original_inference_steps is None:
        return lcm.candidates(config, run)
    return list(range(int(config["num_train_timesteps"] * run.strength)))


def plan(config: Config, run: Run, levels: Schedule) -> Plan:
    if not 0 <= run.eta <= 1:
        raise ValueError(f"eta must be between 0 and 1, got {run.eta}")
    kind, alphas, times = config["prediction_type"], of_levels(levels), [int(t) for t in levels.timesteps]
    steps = len(run.timesteps) if run.timesteps is not None else run.num_inference_steps or 0
    rows, noisy = [], []
    for i in range(run.begin, len(times)):
        t, following = times[i], times[i + 1] if i + 1 < len(times) else 0
        a, previous, between = alphas[t], alphas[following], alphas[int(f32(f32(1 - run.eta) * following))]
        check_signal(a, kind, t)
        original = conversion.original(kind, sqrt(a), sqrt(1 - a), PREDICTIONS)
        epsilon = conversion.epsilon(kind, sqrt(a), sqrt(1 - a), PREDICTIONS)
        noisy.append(run.eta > 0 and i != steps - 1)
        prev = DERIVED
        if noisy[-1]:
            kept = div(previous, between)
            prev = sqrt(kept) * DERIVED + sqrt(1 - kept) * NOISE
        rows.append(matrix(("sample", "model_output"), sqrt(between) * original + sqrt(1 - between) * epsilon, prev, DERIVED))
    return Plan(
        inputs=("sample", "model_output"),
        outputs=("prev_sample", "pred_noised_sample"),
        rows=rows,
        schedule=levels,
        begin=run.begin,
        draws_noise=tuple(noisy),
        scale_model_input=(1.0,) * len(rows),
    )
