"""What happens to the predicted x0 before it is used."""

from __future__ import annotations

from typing import Any

from mmgen_kernels.schedule.planner.contract import Config


def clip(config: Config) -> dict[str, Any]:
    """`clamp` and `threshold` of the Plan, as far as the config asks for one; thresholding comes first. Empty: x0 is left alone."""
    if config.get("thresholding"):
        return {"threshold": (config["dynamic_thresholding_ratio"], config["sample_max_value"])}
    if config.get("clip_sample"):
        return {"clamp": (-config["clip_sample_range"], config["clip_sample_range"])}
    return {}
