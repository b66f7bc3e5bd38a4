"""What a model predicts, as forms in sample and model_output, where sample = alpha x0 + sigma epsilon."""

from __future__ import annotations

from mmgen_kernels.schedule.planner.forms import MODEL_OUTPUT, SAMPLE, Form

VARIANCE_PRESERVING = ("epsilon", "sample", "v_prediction")


def original(prediction_type: str, alpha: float, sigma: float, known: tuple[str, ...]) -> Form:
    """x0."""
    check(prediction_type, known)
    if prediction_type == "epsilon":
        return (SAMPLE - sigma * MODEL_OUTPUT) / alpha
    if prediction_type == "v_prediction":
        return alpha * SAMPLE - sigma * MODEL_OUTPUT
    if prediction_type == "flow_prediction":
        return SAMPLE - sigma * MODEL_OUTPUT
    return MODEL_OUTPUT


def epsilon(prediction_type: str, alpha: float, sigma: float, known: tuple[str, ...]) -> Form:
    """The noise in the sample."""
    check(prediction_type, known)
    if prediction_type == "epsilon":
        return MODEL_OUTPUT
    if prediction_type == "v_prediction":
        return alpha * MODEL_OUTPUT + sigma * SAMPLE
    return (SAMPLE - alpha * MODEL_OUTPUT) / sigma


def check(prediction_type: str, known: tuple[str, ...]) -> None:
    if prediction_type not in known:
        raise ValueError(f"prediction_type must be one of {', '.join(known)}, got {prediction_type!r}")
