"""What a model predicts, where variances come from, what is minimised: by the names that scripts know."""

from __future__ import annotations

import enum
from typing import Any, TypeVar


class ModelMeanType(enum.Enum):
    """What the model's output is, or its first half of channels where it learns variances."""

    PREVIOUS_X = enum.auto()  # the mean of x_{t-1}
    START_X = enum.auto()  # x_0
    EPSILON = enum.auto()  # the noise


class ModelVarType(enum.Enum):
    """The variance of x_{t-1}."""

    LEARNED = enum.auto()  # the second half of channels is its logarithm
    FIXED_SMALL = enum.auto()  # that of q(x_{t-1} | x_t, x_0)
    FIXED_LARGE = enum.auto()  # beta
    LEARNED_RANGE = enum.auto()  # between the two, as the second half of channels says, from -1 to 1

    @property
    def learned(self) -> bool:
        return self in (ModelVarType.LEARNED, ModelVarType.LEARNED_RANGE)


class LossType(enum.Enum):
    """The mean square of the prediction's error, with the bound of a learned variance beside it, or the bound alone."""

    MSE = enum.auto()
    RESCALED_MSE = enum.auto()  # the bound times num_timesteps / 1000
    KL = enum.auto()
    RESCALED_KL = enum.auto()  # the bound times num_timesteps

    def is_vb(self) -> bool:
        return self in (LossType.KL, LossType.RESCALED_KL)


Kind = TypeVar("Kind", bound=enum.Enum)


def member(name: str, kinds: type[Kind], value: Any) -> Kind:
    """The member that `value` names: one of `kinds`, one of a script's own enum, or a string in upper or lower case."""
    called = value.name if isinstance(value, enum.Enum) else value
    if not isinstance(called, str) or called.upper() not in kinds.__members__:
        known = ", ".join(kinds.__members__)
        raise ValueError(f"{name} must be a member of {kinds.__name__} or one of the names {known}, got {value!r}")
    return kinds[called.upper()]
