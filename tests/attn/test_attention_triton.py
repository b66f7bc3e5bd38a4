"""The Triton kernels of the family by the interpreter, without a GPU: against the fp64 reference.

Each test runs in a process in which TRITON_INTERPRET is set.
"""

import importlib.util
import itertools

import pytest
import torch
from attention_runs import BF16, F16, F32, F64, by, inputs_of, judge, random

from mmgen_kernels.battery import tolerance

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

CASES = {
    # B, T, S, H, G, D
    "DiT": {"dims": (2, 65, 65, 2, 2, 72), "dtype": BF16},
    "one query, one key": {"dims": (2, 1, 1, 1, 1, 64), "dtype": BF16},
    "one query": {"dims": (1, 1, 70, 2, 1, 24), "dtype": F16},
    "one key": {"dims": (2, 17, 1, 2, 2, 72), "dtype": F16},
    "causal, fewer keys": {"dims": (1, 70, 17, 2, 1, 80), "dtype": BF16, "causal": True},
    "causal, more keys": {"dims": (2, 17, 130, 1, 1, 8), "dtype": F16, "causal": True},
    "group": {"dims": (1, 33, 65, 6, 2, 24), "dtype": BF16, "scale": 0.3},
    "wide group": {"dims": (1, 65, 33, 3, 1, 96), "dtype": F16},
    "key lengths": {"dims": (4, 17, 70, 1, 1, 72), "dtype": BF16, "lengths": (70, 0, 64, 90)},
    "key lengths, causal": {"dims": (3, 70, 70, 2, 1, 88), "dtype": F16, "lengths": (65, -3, 1), "causal": True},
    "128": {"dims": (1, 64, 65, 1, 1, 128), "dtype": BF16},
    "256": {"dims": (1, 16, 33, 2, 1, 256), "dtype": BF16},
    "fp32": {"dims": (2, 33, 65, 2, 1, 72), "dtype": F32},
    "fp32 causal": {"dims": (2, 65, 65, 1, 1, 8), "dtype": F32, "causal": True, "lengths": (33, 64)},
    "negative scale": {"dims": (1, 17, 65, 1, 1, 24), "dtype": F16, "scale": -0.5},
    "scale 0": {"dims": (1, 17, 33, 1, 1, 64), "dtype": F32, "scale": 0.0, "causal": True},
    "huge logits": {"dims": (1, 33, 65, 1, 1, 64), "dtype": F32, "factor": 3e3, "use_lse": False},
    "huge logits, bf16": {"dims": (1, 33, 65, 1, 1, 72), "dtype": BF16, "factor": 3e3},
    "huge logits, causal": {"dims": (1, 65, 65, 1, 1, 24), "dtype": F16, "factor": 1e3, "scale": 1.0, "causal": True},
}


@pytest.mark.parametrize("name", CASES)
def test_against_fp64(process, name):
    process.submit(judge_case, CASES[name]).result()


def judge_case(case):
    options = {n: v for n, v in case.items() if n in ("causal", "scale", "use_lse")}
    if "lengths" in case:
        options["key_lengths"] = torch.tensor(case["lengths"], dtype=torch.int32)
    inputs = inputs_of(**{n: v for n, v in case.items() if n in ("dims", "dtype", "factor")})
    judge(inputs, **options)


BROADCASTS = [
    tuple(size if keep else 1 for size, keep in zip((2, 2, 17, 33), which, strict=True))
    for which in itertools.product((True, False), repeat=4)
]
BIAS_DTYPES = (F32, F64, BF16, F16)


@pytest.mark.parametrize("causal", (False, True))
def test_bias_of_every_shape(process, causal):
    process.submit(judge_biases, causal).result()


def judge_biases(causal):
    """All shapes as one sample of errors: of the largest of a few hundred chance would decide."""
    shapes = zip(BROADCASTS[: 4 if causal else 16], itertools.cycle(BIAS_DTYPES), strict=False)
    cases = [inputs_of((2, 17, 33, 2, 1, 24), F32, *shape_and_dtype) for shape_and_dtype in shapes]
    for inputs in cases:
        if inputs["bias"].shape[2:] == (17, 33):
            inputs["bias"][..., 3, :] = -torch.inf  # a query without keys
            inputs["bias"][..., 5, ::2] = -torch.inf
    # of lower rank, and a view whose keys are not next to each other
    cases.append(inputs_of((2, 17, 33, 2, 1, 24), F32) | {"bias": random(33, 17, seed=4).mT})
    errors = {}
    for inputs in cases:
        wide = {n: t.double() for n, t in inputs.items()}
        ours, plainly = (by(implementation, inputs, causal=causal) for implementation in ("triton", "reference"))
        for name, exact in by("reference", wide, causal=causal).items():
            assert ours[name].dtype == plainly[name].dtype and ours[name].shape == exact.shape
            of = f"{name}, {ours[name].dtype}"
            trio = (ours[name], plainly[name], exact)
            if ours[name].dtype == F64:  # summed in fp32
                trio = (ours[name].float(), plainly[name].float(), exact)
            errors.setdefault(of, []).append([t.flatten() for t in trio])
    for name, tensors in errors.items():
        _, failure = tolerance.failure(name, *(torch.cat(t) for t in zip(*tensors, strict=True)))
        assert failure is None, failure


def test_bias_of_16_bits(process):
    process.submit(judge_bias_of_16_bits).result()


def judge_bias_of_16_bits():
    judge(inputs_of((1, 65, 70, 2, 1, 72), BF16, (1, 2, 65, 70), BF16))
    judge(inputs_of((2, 17, 70, 2, 2, 96), F16, (70,), F16), key_lengths=torch.tensor([65, 70]))
