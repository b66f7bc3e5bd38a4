"""Inputs of the tests of the Triton kernels, and runs of the three operators by one implementation and another."""

import torch

import mmgen_kernels as mk
from mmgen_kernels.battery import tolerance
from mmgen_kernels.modulation import ops

VECTORS = ("gate", "shift", "scale", "shift_2", "scale_2")
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
OPTIONS = {
    "DiT": {},
    "frames, tanh, sandwich, rms": {"address": "frame", "dims": (3, 6, 300), "gate_fn": "tanh", "post_norm": "rms", "norm": "rms"},
    "tokens, table, two outputs, affine": {"address": "token", "table": True, "two": True, "affine": True, "post_norm": "layer"},
    "mixed, table, two outputs, affine": {
        "address": "mixed", "dims": (3, 6, 300), "table": True, "two": True, "affine": True, "gate_fn": "sigmoid_one_minus"
    },
    "rows of int32, table, two outputs": {"address": "row32", "table": True, "two": True, "dims": (3, 20, 300)},
    "rows of int64, affine, sandwich": {"address": "row64", "affine": True, "post_norm": "layer", "gate_fn": "tanh"},
    "all shared, affine, rms": {"address": "shared", "affine": True, "norm": "rms", "table": True, "dims": (3, 15, 300)},
    "no vectors but the gate": {"without": ("shift", "scale"), "table": True, "post_norm": "rms"},
    "no gate, no shift": {"without": ("gate", "shift"), "table": True},
    "only a second scale": {"without": ("shift", "scale", "shift_2"), "two": True, "table": True},
    "bf16 but for the vectors": {"dtypes": (BF16, BF16, F32), "table": True, "affine": True},
    "all of bf16": {"dtypes": (BF16, BF16, BF16), "post_norm": "rms", "gate_fn": "tanh"},
    "fp16 and bf16": {"dtypes": (F16, BF16, F16), "gate_fn": "sigmoid_one_minus"},
    "autocast": {"dtypes": (F32, BF16, F32), "out": BF16},
    "fp64": {"dtypes": (F64, F64, F64), "gate_fn": "tanh", "post_norm": "layer", "table": True, "affine": True},
    "fp64 into fp32": {"dtypes": (F32, F64, F32), "affine": True},
    "fp32 into fp64": {"dtypes": (F64, F32, BF16), "post_norm": "rms", "gate_fn": "sigmoid_one_minus"},
}  # fmt: skip


def random(*shape, seed, dtype=F32, mean=0.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=F64) + mean).to(dtype)


def near_one(D, seed, dtype=F32):
    """As weights are. A product of several normals has a few extremes, and whose rounding is luckier is then a matter of chance."""
    return (1 + random(D, seed=seed, dtype=F64) / 8).to(dtype)


def vectors_of(address, B, T, D, dtype, seed=10):
    """gate, shift, scale, shift_2, scale_2, views of one tensor where they are of one kind, and rows."""
    if address == "shared":
        return (random(5, D, seed=seed, dtype=dtype) / 8).unbind(), None
    if address == "sample":
        return (random(B, 6 * D, seed=seed, dtype=dtype) / 8).chunk(6, 1)[:5], None
    if address == "frame":
        return (random(B, T // 3, 9 * D, seed=seed, dtype=dtype) / 8).chunk(9, 2)[:5], None
    if address == "token":
        return (random(B, T, 6 * D, seed=seed, dtype=dtype) / 8).chunk(6, 2)[:5], None
    one = [random(*shape, seed=seed + i, dtype=dtype) / 8 for i, shape in enumerate(((B, T, D), (B, D), (D,)))]
    if address == "mixed":
        return [one[1], one[0], one[2], random(B, T // 3, D, seed=seed + 3, dtype=dtype), random(1, D, seed=seed + 4)], None
    rows = torch.randint(-2, 9, (B, T), generator=torch.Generator().manual_seed(seed))  # some out of range
    rows[rows == 4] = 2  # and a row that no token takes
    counts = (7, 7, 3, 1)
    tables = [random(R, D, seed=seed + i, dtype=dtype) / 8 for i, R in enumerate(counts)]
    return [tables[0], tables[1], tables[2], one[2], tables[3]], rows.int() if address == "row32" else rows


def run(
    dims=(3, 7, 300),
    address="sample",
    dtypes=(F32, F32, F32),
    operator="gate_residual_adaln",
    gate_fn="identity",
    post_norm=None,
    norm="layer",
    without=(),
    affine=False,
    table=False,
    two=False,
    out=None,
    mean=0.0,
):
    """(inputs by name, a function of them that gives results and gradients by name); dtypes of x, y, vectors."""
    B, T, D = dims
    x_dtype, y_dtype, dtype = dtypes
    found, rows = vectors_of(address, B, T, D, dtype)
    inputs = {"x": random(B, T, D, seed=1, dtype=x_dtype, mean=mean)}
    inputs |= {n: v for n, v in zip(VECTORS, found, strict=True) if n not in without and (two or "_2" not in n)}
    if operator == "gate_residual":
        inputs = {n: v for n, v in inputs.items() if n in ("x", "gate")}
    if operator == "adaln":
        inputs.pop("gate", None)
    else:
        inputs["y"] = random(B, T, D, seed=2, dtype=y_dtype)
    if table:
        inputs["table"] = random(sum(n in VECTORS for n in inputs), D, seed=3) / 8
    if affine and operator != "gate_residual":
        inputs |= {"weight": near_one(D, seed=4), "bias": random(D, seed=5, dtype=F16)}
    if post_norm:
        inputs["post_weight"] = near_one(D, seed=6)
    upstream = [random(B, T, D, seed=20 + i).sign() * near_one(D, seed=30) for i in range(3)]

    def call(given):
        given = {n: t.detach().requires_grad_() for n, t in given.items()}
        wide = given["x"].dtype == F64
        options = {"table": given.get("table"), "rows": rows}
        if operator != "adaln":
            options |= {"gate_fn": gate_fn, "post_norm": post_norm, "post_weight": given.get("post_weight")}
        if operator != "gate_residual":
            options |= {"norm": norm, "weight": given.get("weight"), "bias": given.get("bias"), "dtype": None if wide else out}
            shift, scale = given.get("shift"), given.get("scale")
            if two:
                shift, scale = (shift, given.get("shift_2")), (scale, given.get("scale_2"))
        if operator == "adaln":
            results = ops.adaln(given["x"], shift, scale, **options)
        elif operator == "gate_residual":
            results = ops.gate_residual(given["x"], given["y"], given.get("gate"), **options)
        else:
            residual, modulated = ops.gate_residual_adaln(given["x"], given["y"], given.get("gate"), shift, scale, **options)
            results = (residual, *modulated) if two else (residual, modulated)
        results = results if isinstance(results, tuple) else (results,)
        grads = torch.autograd.grad(results, list(given.values()), [u.to(r.dtype) for u, r in zip(upstream, results, strict=False)])
        answer = {f"result {i}": r.detach() for i, r in enumerate(results)}
        return answer | {f"gradient of {n}": g for n, g in zip(given, grads, strict=True)}

    return inputs, call


def by(implementation, call, inputs):
    with mk.use_backend(implementation):
        return call(inputs)


def assert_law(**options):
    """fp32 and fp64 results by the tolerance law. Of half precision the reference's bits: where both round once, they may differ
    by a unit in the last place and only where fp32 was a hair from a tie."""
    inputs, call = run(**options)
    ours, plain = by("triton", call, inputs), by("reference", call, inputs)
    truth = by("reference", call, {n: t.double() for n, t in inputs.items()})
    for name, value in ours.items():
        assert value.dtype == plain[name].dtype and value.shape == plain[name].shape, name
        if value.dtype in (BF16, F16):
            difference = (value.double() - plain[name].double()).abs()
            unit = tolerance.ulp(plain[name].double(), value.dtype) + 1e-6 * plain[name].double().abs().max()
            assert (difference <= unit).all(), name
            assert (difference > 0).double().mean() <= 0.02, name
        elif value.dtype == F64 and F32 in options["dtypes"][:2]:  # what is computed in fp32 is no better for being stored so
            failed = tolerance.failure(name, value.float(), plain[name].float(), truth[name])[1]
            assert failed is None, failed
        elif options.get("dtypes", (F32,))[0] in (BF16, F16):  # fp32 of a residual that was rounded in between
            error, allowed = (value - plain[name]).abs().max(), plain[name].abs().max()
            assert error <= 1e-5 * allowed, (name, error, allowed)
        else:
            failed = tolerance.failure(name, value, plain[name], truth[name])[1]
            assert failed is None, failed


def assert_same(a, b):
    for name in a:
        assert torch.equal(a[name], b[name]), name
