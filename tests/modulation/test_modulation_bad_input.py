"""Bad input raises TypeError or ValueError that names the argument, what it got and what it takes. Values never raise."""

import pytest
import torch

import mmgen_kernels as mk
from mmgen_kernels import battery

X, V = torch.zeros(3, 6, 4), torch.zeros(3, 4)
ROWS, META = torch.zeros(3, 6, dtype=torch.int32), torch.device("meta")
MANY = torch.zeros(4097, 4)

# changed arguments, the error, what its message says
EVERY = {
    "x_list": ({"x": [[0.0]]}, TypeError, "x must be a tensor, got list"),
    "x_int": ({"x": X.int()}, TypeError, "x must be float64, float32, bfloat16 or float16, got torch.int32"),
    "x_complex": ({"x": X.cfloat()}, TypeError, "x must be .*got torch.complex64"),
    "x_rank_1": ({"x": X[0, 0]}, ValueError, r"x must be \(B, T, D\).*got shape \(4,\)"),
    "x_no_channels": ({"x": X[..., :0]}, ValueError, r"x must be .*D >= 1, got shape \(3, 6, 0\)"),
    "table_list": ({"table": [0.0]}, TypeError, "table must be a tensor, got list"),
    "table_int": ({"table": torch.zeros(1, 4).long()}, TypeError, "table must be .*got torch.int64"),
    "table_rows": ({"table": torch.zeros(9, 4)}, ValueError, r"table must have a row for each vector given, \(\d, 4\), got .*9, 4"),
    "table_rank": ({"table": torch.zeros(4)}, ValueError, r"table must .*got shape \(4,\)"),
    "rows_list": ({"rows": [0]}, TypeError, "rows must be int32 or int64, got list"),
    "rows_dtype": ({"rows": ROWS.float()}, TypeError, "rows must be int32 or int64, got torch.float32"),
    "rows_int16": ({"rows": ROWS.short()}, TypeError, "rows must be int32 or int64, got torch.int16"),
    "rows_shape": ({"rows": ROWS[:, :5]}, ValueError, r"rows must have x's leading shape \(3, 6\), got \(3, 5\)"),
    "rows_flat": ({"rows": ROWS.flatten()}, ValueError, r"rows must have x's leading shape \(3, 6\), got \(18,\)"),
    "rows_device": ({"rows": ROWS.to(META)}, ValueError, "rows must be on x's device cpu, got meta"),
}
NORMED = {
    "norm": ({"norm": "batch"}, ValueError, "norm must be one of layer, rms, got 'batch'"),
    "norm_none": ({"norm": None}, ValueError, "norm must be one of layer, rms, got None"),
    "eps_string": ({"eps": "1"}, TypeError, "eps must be a number, got str"),
    "eps_bool": ({"eps": True}, TypeError, "eps must be a number, got bool"),
    "eps_tensor": ({"eps": torch.tensor(1.0)}, TypeError, "eps must be a number, got Tensor"),
    "eps_negative": ({"eps": -1e-6}, ValueError, "eps must be at least 0 and finite, got -1e-06"),
    "eps_nan": ({"eps": float("nan")}, ValueError, "eps must be at least 0 and finite, got nan"),
    "eps_inf": ({"eps": float("inf")}, ValueError, "eps must be at least 0 and finite, got inf"),
    "weight_shape": ({"weight": torch.zeros(5)}, ValueError, r"weight must be \(4,\), got shape \(5,\)"),
    "weight_int": ({"weight": torch.zeros(4).int()}, TypeError, "weight must be .*got torch.int32"),
    "weight_device": ({"weight": torch.zeros(4, device=META)}, ValueError, "weight must be on x's device cpu, got meta"),
    "bias_rank": ({"bias": torch.zeros(1, 4)}, ValueError, r"bias must be \(4,\), got shape \(1, 4\)"),
    "bias_list": ({"bias": [0.0] * 4}, TypeError, "bias must be a tensor, got list"),
    "dtype": ({"dtype": torch.int32}, TypeError, "dtype must be float64, float32, bfloat16 or float16, got torch.int32"),
    "dtype_string": ({"dtype": "fp32"}, TypeError, "dtype must be .*got fp32"),
    "shift_string": ({"shift": "ab", "scale": None}, TypeError, "shift must be a tensor, None or a sequence of two, got str"),
    "shift_number": ({"shift": 1.0, "scale": None}, TypeError, "shift must be a tensor, None or a sequence of two, got float"),
    "scale_three": ({"shift": None, "scale": (V, V, V)}, ValueError, "scale must hold two vectors, got 3"),
    "one_sequence": ({"shift": (V, V)}, TypeError, "shift and scale must both be sequences of two vectors, or both be one"),
    "no_second": ({"shift": (V, None), "scale": (V, None)}, ValueError, "the second output needs a shift or a scale"),
    "second_int": ({"shift": (V, V.int()), "scale": (V, V)}, TypeError, "shift_2 must be .*got torch.int32"),
}
UPDATED = {
    "y_list": ({"y": None}, TypeError, "y must be a tensor, got NoneType"),
    "y_int": ({"y": X.int()}, TypeError, "y must be .*got torch.int32"),
    "y_shape": ({"y": X[:, :5]}, ValueError, r"y must have x's shape \(3, 6, 4\), got \(3, 5, 4\)"),
    "y_device": ({"y": X.to(META)}, ValueError, "y must be on x's device cpu, got meta"),
    "gate_fn": ({"gate_fn": "relu"}, ValueError, "gate_fn must be one of identity, tanh, sigmoid_one_minus, got 'relu'"),
    "post_norm": ({"post_norm": "group"}, ValueError, "post_norm must be one of layer, rms, got 'group'"),
    "post_eps": ({"post_eps": -1.0}, ValueError, "post_eps must be at least 0 and finite, got -1.0"),
    "post_eps_none": ({"post_eps": None}, TypeError, "post_eps must be a number, got NoneType"),
    "post_weight_alone": ({"post_weight": V[0]}, ValueError, "post_weight needs post_norm, got post_norm=None"),
    "post_weight_shape": ({"post_weight": V, "post_norm": "rms"}, ValueError, r"post_weight must be \(4,\), got shape \(3, 4\)"),
}
# of shift in adaln and of gate elsewhere
VECTOR = {
    "int": (V.long(), None, TypeError, "must be float64, float32, bfloat16 or float16, got torch.int64"),
    "rank_0": (torch.tensor(1.0), None, ValueError, r"must have D = 4 as its last size, got shape \(\)"),
    "width": (V[:, :3], None, ValueError, r"must have D = 4 as its last size, got shape \(3, 3\)"),
    "samples": (V[:2], None, ValueError, r"must be \(4,\), \(3, 4\) or \(3, F, 4\) where F divides T = 6, got shape \(2, 4\)"),
    "frames": (torch.zeros(3, 4, 4), None, ValueError, r"must be .*F divides T = 6, got shape \(3, 4, 4\)"),
    "no_frames": (torch.zeros(3, 0, 4), None, ValueError, r"must be .*F divides T = 6, got shape \(3, 0, 4\)"),
    "too_long": (torch.zeros(3, 12, 4), None, ValueError, r"must be .*F divides T = 6, got shape \(3, 12, 4\)"),
    "device": (V.to(META), None, ValueError, "must be on x's device cpu, got meta"),
    "rows_rank": (torch.zeros(3, 6, 4), ROWS, ValueError, r"must be \(R, 4\) or \(4,\) with rows, got \(3, 6, 4\)"),
    "rows_width": (V[:, :3], ROWS, ValueError, r"must be \(R, 4\) or \(4,\) with rows, got \(3, 3\)"),
    "no_rows": (V[:0], ROWS, ValueError, "must have 1 to 4096 rows, got 0"),
    "many_rows": (MANY, ROWS, ValueError, "must have 1 to 4096 rows, got 4097"),
}
OPERATORS = {
    "adaln": (("x", "shift", "scale"), EVERY | NORMED),
    "gate_residual": (("x", "y", "gate"), EVERY | UPDATED),
    "gate_residual_adaln": (("x", "y", "gate", "shift", "scale"), EVERY | NORMED | UPDATED),
}


def call(operator, changed):
    positional, _ = OPERATORS[operator]
    arguments = {"x": X, "y": X, "gate": V, "shift": V, "scale": V} | changed
    if "y" not in changed and isinstance(arguments["x"], torch.Tensor):
        arguments["y"] = torch.zeros_like(arguments["x"])
    options = {n: v for n, v in changed.items() if n not in ("x", "y", "gate", "shift", "scale")}
    return getattr(mk, operator)(*(arguments[n] for n in positional), **options)


@pytest.mark.parametrize(("operator", "name"), [(o, n) for o, (_, cases) in OPERATORS.items() for n in cases])
def test_bad_input(operator, name):
    changed, error, message = OPERATORS[operator][1][name]
    with pytest.raises(error, match=f"^{message}"):
        call(operator, changed)


@pytest.mark.parametrize(("operator", "vector"), [(o, v) for o, (p, _) in OPERATORS.items() for v in p if v not in ("x", "y")])
@pytest.mark.parametrize("name", VECTOR)
def test_bad_vectors(operator, vector, name):
    value, rows, error, message = VECTOR[name]
    others = {} if rows is None else {"rows": rows}
    with pytest.raises(error, match=f"^{vector} {message}"):
        call(operator, {vector: value} | others)


def test_a_vector_that_would_be_misread():
    """Beside x (B, H, W, D), flattened, (B, 1, W, D) would be taken for W spans of H tokens."""
    x = torch.randn(3, 2, 3, 4)
    with pytest.raises(ValueError, match=r"^shift must be .*where F divides T = 6"):
        mk.adaln(x, torch.randn(3, 1, 3, 4), None)
    n = mk.adaln(x, None, None)
    for shape in ((3, 2, 3, 4), (3, 2, 1, 4), (3, 1, 1, 4), (1, 2, 3, 4)):
        shift = torch.randn(shape)
        assert torch.equal(mk.adaln(x, shift, None), n + shift)


def test_a_table_needs_a_vector():
    for call_it in (
        lambda table: mk.adaln(X, None, None, table=table),
        lambda table: mk.gate_residual(X, X, None, table=table),
        lambda table: mk.gate_residual_adaln(X, X, None, None, None, table=table),
    ):
        with pytest.raises(ValueError, match=r"^table needs a vector that it is added to, got none"):
            call_it(torch.zeros(0, 4))


def test_unknown_keywords_and_positional_options():
    with pytest.raises(TypeError, match="unexpected keyword argument 'epsilon'"):
        mk.adaln(X, V, V, epsilon=1e-6)
    for function, arguments in ((mk.adaln, (X, V, V)), (mk.gate_residual, (X, X, V)), (mk.gate_residual_adaln, (X, X, V, V, V))):
        with pytest.raises(TypeError, match="positional"):
            function(*arguments, "layer")


def test_bad_input_in_compiled_code():
    compiled = torch.compile(lambda x, v: mk.adaln(x, v, v), backend="aot_eager")
    with pytest.raises(Exception, match="shift must have D = 4 as its last size"):
        compiled(X, V[:, :3])


@pytest.mark.parametrize("implementation", battery.implementations("gate_residual_adaln", torch.device("cpu")))
def test_values_never_raise(implementation):
    bad = torch.tensor([torch.nan, torch.inf, -torch.inf, 3e38, 0.0])
    x, y, v = (bad[torch.randint(0, 5, s)].requires_grad_() for s in ((3, 6, 4), (3, 6, 4), (5, 4)))
    rows = torch.tensor([-(2**63), 2**63 - 1, 2**40, -1, 4, 0]).repeat(3, 1)
    with mk.use_backend(implementation):
        for norm in ("layer", "rms"):
            residual, modulated = mk.gate_residual_adaln(x, y, v, v, v, rows=rows, norm=norm, post_norm=norm, eps=0.0)
            (residual.sum() + modulated.sum()).backward()


def test_meta_tensors_have_the_right_shapes():
    """Shape inference without data, as meta-device initialisation does."""
    x, v = X.to(META), V.to(META)
    with mk.use_backend("reference"):
        residual, (first, second) = mk.gate_residual_adaln(x, x, v, (v, v), (v, None), dtype=torch.bfloat16)
    assert residual.shape == first.shape == second.shape == (3, 6, 4) and first.device == META
    assert residual.dtype == torch.float32 and first.dtype == torch.bfloat16
