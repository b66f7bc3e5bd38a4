"""
Record what diffusers' schedulers do in fp64, for tests that run without diffusers.

    python tests/schedule/record_trajectories.py            where diffusers and scipy are importable

Levels are recorded as diffusers has them, fp32; numbers as their shortest text that reads back to the same fp64.
"""

import json
from pathlib import Path

import diffusers
import stock
import torch
from recorded_cases import CASES, SHAPE, visited

RECORDS = Path(__file__).with_name("recorded_trajectories.json")


def record(class_name, config, run):
    scheduler = stock.prepared(class_name, config, run)
    alphas = None
    if not isinstance(getattr(scheduler, "sigmas", None), torch.Tensor):
        table = scheduler.alphas_cumprod.tolist()
        apart = scheduler.config.num_train_timesteps // len(scheduler.timesteps)
        alphas = {str(t): table[t] for t in visited(scheduler.timesteps, apart, len(table))}
    entry = {
        "class": class_name,
        "config": config,
        "run": run,
        "timesteps": scheduler.timesteps.tolist(),
        "timestep_dtype": str(scheduler.timesteps.dtype).removeprefix("torch."),
        "sigmas": scheduler.sigmas.tolist() if alphas is None else None,
        "alphas_cumprod": alphas,
        "init_noise_sigma": float(getattr(scheduler, "init_noise_sigma", 1.0)),
    }
    channels = SHAPE[1] * (2 if config.get("variance_type") == "learned_range" else 1)
    steps = stock.trajectory(scheduler, run, SHAPE, channels)
    entry["steps"] = [[[repr(x) for x in output.flatten().tolist()] for output in outputs] for outputs in steps]
    return entry


if __name__ == "__main__":
    entries = [record(name, config, run) for name, cases in CASES.items() for config, run in cases]
    head = json.dumps({"diffusers": diffusers.__version__, "torch": torch.__version__})
    lines = ",\n".join(json.dumps(entry) for entry in entries)
    RECORDS.write_text(f'{{"made_with": {head}, "trajectories": [\n{lines}\n]}}\n')
