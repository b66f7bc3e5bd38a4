"""Cases of the operators that draw. The law: integers and uniforms are the reference's bit for bit, normals within ULPS of fp64.

And element i of a sample is the same bits in every run, on any number of threads, in any shape, alone or in its batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

import mmgen_kernels as mk
from mmgen_kernels.battery import Case, Dtypes, Outcome, on_other_threads, tolerance
from mmgen_kernels.checks import DTYPES
from mmgen_kernels.philox import reference

ULPS = {torch.float32: 6, torch.float64: 16}  # of a normal; fp16 and bf16: an fp32 normal rounded once
KEYS = {
    "zero": (0, 0),
    "ones": (-1, -1),
    "plain": (2026, 0),
    "half_words": (1 << 32, 1 << 32),
    "across_2^32": (-(7 << 40) + 5, (1 << 32) - 3),
    "across_2^63": (12345, (1 << 63) - 3),
    "across_2^64": (1 << 62, -3),
}
# Around a block of 4, a vector of blocks, a piece of work for a thread, a program of the Triton kernel.
SIZES = (0, 1, 3, 5, 64, 65, 1023, 2049, 4097)
BATCHES = {
    "one_key_per_sample": ((5,), (5, 3, 7)),
    "one_key_per_sample_and_head": ((2, 3), (2, 3, 130)),
    "one_number_per_key": ((9,), (9,)),
    "no_samples": ((0,), (0, 4)),
    "no_numbers": ((3,), (3, 0)),
    "one_sample": ((1,), (1, 4100)),
    "rank_4": ((), (2, 3, 5, 7)),
    "rank_0": ((), ()),
}
Draw = Callable[..., Tensor]  # (shape, key) -> noise


def keys_of(batch: tuple[int, ...]) -> Tensor:
    return torch.randint(-(2**62), 2**62, (*batch, 2), generator=torch.Generator().manual_seed(3))


def truth_of(operator: str, key: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """On the CPU; of normals, in fp64."""
    if operator == "philox_integers":
        return reference.philox_integers(key, list(shape))
    if operator == "philox_uniform":
        return reference.philox_uniform(key, list(shape), dtype)
    return reference.philox_normal(key, list(shape), torch.float64)


def error_of_normals(noise: Tensor, truth: Tensor) -> tuple[float, str | None]:
    """The largest relative error, and what is wrong with it."""
    if noise.numel() == 0:
        return 0.0, None
    dtype = noise.dtype
    wide = torch.promote_types(dtype, torch.float32)
    error = (noise.cpu().double() - truth).abs()
    allowed = ULPS[wide] * tolerance.ulp(truth, wide)
    if dtype != wide:
        allowed = allowed + 0.5 * tolerance.ulp(truth.abs() + allowed, dtype)
    beyond = ~(error <= allowed)
    worst = float((error / truth.abs()).max())
    return worst, f"{int(beyond.sum())} of {truth.numel()} normals are too far from fp64" if beyond.any() else None


def drawn(operator: str, batch: tuple[int, ...], shape: tuple[int, ...], key_values: tuple[int, int] | None = None) -> Callable:
    def prepare(device: torch.device, dtypes: Dtypes) -> Callable[[], Outcome]:
        (dtype,) = dtypes
        options = {} if operator == "philox_integers" else {"dtype": dtype}
        key = keys_of(batch) if key_values is None else torch.tensor(key_values)
        truth = truth_of(operator, key, shape, dtype)
        key = key.to(device)

        def draw(shape: tuple[int, ...], key: Tensor) -> Tensor:
            return getattr(mk, operator)(shape, key, **options)

        def judge() -> Outcome:
            noise = draw(shape, key)
            if noise.dtype != dtype or noise.shape != shape or noise.device != key.device:
                return Outcome(float("inf"), True, (f"got {noise.dtype} {tuple(noise.shape)} on {noise.device}",))
            if operator == "philox_normal":
                error, failure = error_of_normals(noise, truth)
                failures = [failure] if failure else []
            else:
                wrong = int((noise.cpu() != truth).sum())
                error = wrong / max(1, truth.numel())
                failures = [f"{wrong} of {truth.numel()} numbers differ from the reference"] if wrong else []
            failures += variant_failures(draw, noise, key)
            return Outcome(error, torch.equal(draw(shape, key), noise), tuple(failures))

        return judge

    return prepare


def variant_failures(draw: Draw, noise: Tensor, key: Tensor) -> list[str]:
    """Element i of a sample depends on its key and on i, and on nothing else."""
    failures = []
    samples = key.dim() - 1
    if samples and len(key):
        for i in {0, len(key) - 1}:
            if not torch.equal(draw(noise.shape[1:], key[i]), noise[i]):
                failures.append(f"sample {i} alone differs from the same sample in the batch")
    flat = noise.reshape(*noise.shape[:samples], math.prod(noise.shape[samples:]))
    for size in {flat.shape[-1], flat.shape[-1] // 2, flat.shape[-1] * 2 + 1}:
        some = draw((*key.shape[:-1], size), key)
        common = min(size, flat.shape[-1])
        if not torch.equal(some[..., :common], flat[..., :common]):
            failures.append(f"the first {common} numbers differ when {size} are drawn")
    if key.device.type == "cpu" and not torch.equal(on_other_threads(lambda: draw(noise.shape, key)), noise):
        failures.append("the number of threads changes the numbers")
    return failures


def cases_of(operator: str, dtypes: tuple[Dtypes, ...]) -> list[Case]:
    def case(name: str, prepare: Callable, quick: bool = False) -> Case:
        return Case("philox", operator, name, dtypes, prepare, quick)

    return [
        *[case(f"key_{name}", drawn(operator, (), (1029,), values), quick=True) for name, values in KEYS.items()],
        *[case(f"size_{size}", drawn(operator, (), (size,))) for size in SIZES],
        *[case(name, drawn(operator, *sizes), name == "one_key_per_sample") for name, sizes in BATCHES.items()],
        case("size_70001", drawn(operator, (), (70_001,))),
    ]


EACH = tuple((dtype,) for dtype in DTYPES)
CASES = [
    *cases_of("philox_integers", ((torch.int64,),)),
    *cases_of("philox_uniform", EACH),
    *cases_of("philox_normal", EACH),
]
