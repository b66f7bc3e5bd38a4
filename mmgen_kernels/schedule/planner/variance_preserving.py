"""What DDPM, DDIM, LCM and others share, which step by whole timesteps in a table of alphas_cumprod."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from mmgen_kernels.schedule.planner.contract import Run, Schedule


def one_list(run: Run) -> None:
    if (run.num_inference_steps is None) == (run.timesteps is None):
        raise ValueError(
            f"one of num_inference_steps and timesteps must be given, got {run.num_inference_steps} and {run.timesteps}"
        )


def steps_of(run: Run, class_name: str) -> int:
    if run.num_inference_steps is None:
        raise ValueError(f"num_inference_steps must be given for {class_name}, got None")
    return run.num_inference_steps


def descending(timesteps: Sequence[float]) -> list[int]:
    """A caller's own list."""
    times = [int(t) for t in timesteps]
    if not times or any(later >= t for t, later in pairwise(times)):
        raise ValueError(f"timesteps must descend, got {list(timesteps)}")
    return times


def check_timesteps(timesteps: Sequence[int], table: int) -> None:
    beyond = [t for t in timesteps if not -table <= t < table]
    if beyond:
        raise ValueError(f"timesteps must be below the {table} of training (steps_offset, timestep_spacing), got {beyond[0]}")


def of_levels(levels: Schedule) -> tuple[float, ...]:
    """alphas_cumprod. [-1], which "trailing" may ask for last by a rounding, is the last entry, as it is in diffusers."""
    if levels.alphas_cumprod is None:
        raise ValueError("levels must have alphas_cumprod, got None")
    return levels.alphas_cumprod


def check_signal(a: float, prediction_type: str, t: int) -> None:
    if a == 0 and prediction_type == "epsilon":
        raise ValueError(
            f"prediction_type epsilon says nothing of x0 where rescale_betas_zero_snr leaves no signal (alphas_cumprod[{t}] = 0); "
            "it takes sample or v_prediction there"
        )
