"""The arithmetic of 0-dim tensors on Python floats: IEEE 754's answers where Python raises, and the rounding to fp32."""

from __future__ import annotations

import math
from ctypes import c_float


def f32(x: float) -> float:
    return c_float(x).value


def div(a: float, b: float) -> float:
    if b != 0:
        return a / b
    if a == 0 or math.isnan(a):
        return math.nan
    return math.copysign(math.inf, a) * math.copysign(1.0, b)


def sqrt(x: float) -> float:
    return math.sqrt(x) if x >= 0 else math.nan


def log(x: float) -> float:
    if x == 0:
        return -math.inf
    return math.log(x) if x > 0 else math.nan


def exp(x: float) -> float:
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf


def expm1(x: float) -> float:
    try:
        return math.expm1(x)
    except OverflowError:
        return math.inf
