"""library.define on operators of the test's own, and what must hold for every operator registered."""

import pytest
import torch

import mmgen_kernels as mk
from mmgen_kernels import battery, library
from mmgen_kernels.library import OPERATORS, define


@pytest.fixture(scope="module")
def axpy():
    """a x + y with a saved input, a saved output, an option, a shape and an optional tensor: every source of an argument."""
    registered = set(OPERATORS)

    def forward(x, y, bias, a):
        total = a * x + y + (0 if bias is None else bias)
        return total, total.square().sum()

    def backward(grad_total, grad_square, x, total, y_shape, a, need_grad_x, need_grad_y):
        g = torch.zeros_like(total) if grad_total is None else grad_total
        if grad_square is not None:
            g = g + 2 * grad_square * total
        return a * g if need_grad_x else x.new_empty(0), g.sum_to_size(y_shape) if need_grad_y else x.new_empty(0)

    def backward_fake(grad_total, grad_square, x, total, y_shape, a, need_grad_x, need_grad_y):
        return x.new_empty(x.shape if need_grad_x else 0), x.new_empty(y_shape if need_grad_y else 0)

    operator = define(
        "test_axpy(Tensor x, Tensor y, Tensor? bias, float a) -> (Tensor total, Tensor square)",
        reference=forward,
        fake=lambda x, y, bias, a: (x.new_empty(x.shape), x.new_empty(())),
        backward="test_axpy_backward(Tensor? grad_total, Tensor? grad_square, Tensor x, Tensor total, SymInt[] y_shape,"
        " float a, bool need_grad_x, bool need_grad_y) -> (Tensor grad_x, Tensor grad_y)",
        backward_reference=backward,
        backward_fake=backward_fake,
        launchers={"triton": ("tests_have_no_such_module:forward", "tests_have_no_such_module:backward")},
    )
    for name in set(OPERATORS) - registered:  # it works on, and the walks over all operators do not see it
        del OPERATORS[name]
    return operator


def plain(x, y, a):
    total = a * x + y
    return total, total.square().sum()


@pytest.mark.parametrize("outputs", ((0,), (1,), (0, 1)))
@pytest.mark.parametrize("needs", ((True, True), (True, False), (False, True)))
def test_gradients_are_wired_by_name(axpy, outputs, needs):
    for call in (
        lambda x, y: axpy("reference", x, y, None, 3.0),
        lambda x, y: torch.ops.mmgen_kernels.test_axpy(x, y, None, 3.0),
        lambda x, y: torch.ops.mmgen_kernels.test_axpy.reference(x, y, None, 3.0),
        torch.compile(lambda x, y: axpy("reference", x, y, None, 3.0), fullgraph=True, backend="aot_eager"),
        lambda x, y: plain(x, y, 3.0),
    ):
        x = torch.arange(6.0).view(2, 3).requires_grad_(needs[0])
        y = torch.tensor([1.0, -2, 3]).requires_grad_(needs[1])
        out = call(x, y)
        sum(out[i].sum() * (i + 2) for i in outputs).backward()
        total = 3 * x.detach() + y.detach()
        g = torch.zeros(2, 3) + (2 if 0 in outputs else 0) + (6 * total if 1 in outputs else 0)
        assert torch.equal(x.grad, 3 * g) if needs[0] else x.grad is None
        assert torch.equal(y.grad, g.sum(0)) if needs[1] else y.grad is None


def test_an_input_without_gradient_in_the_backward_gets_none(axpy):
    x, y, bias = torch.ones(2, 3, requires_grad=True), torch.ones(3), torch.ones(3, requires_grad=True)
    total, _ = axpy("reference", x, y, bias, 1.0)
    total.sum().backward()
    assert bias.grad is None and torch.equal(x.grad, torch.ones(2, 3))


def test_vmap_without_a_rule_is_the_loop(axpy):
    x, y = torch.randn(4, 2, 3), torch.randn(3, 4)
    total, square = torch.vmap(lambda a, b: axpy("reference", a, b, None, 2.0), in_dims=(0, 1))(x, y)
    for i in range(4):
        assert torch.equal(total[i], 2 * x[i] + y[:, i])
        torch.testing.assert_close(square[i], total[i].square().sum())


def test_a_launcher_is_imported_at_the_first_call(axpy):
    """So that importing mmgen_kernels needs neither Triton nor a GPU."""
    with pytest.raises(ModuleNotFoundError, match="tests_have_no_such_module"):
        axpy("triton", torch.ones(2, 3), torch.ones(3), None, 1.0)


def test_no_autograd_is_recorded_inside(axpy):
    x = torch.ones(2, 3, requires_grad=True)
    total, _ = axpy("reference", x, torch.ones(3), None, 1.0)
    assert type(total.grad_fn).__name__ == "_EagerBackward"
    with torch.no_grad():
        assert axpy("reference", x, torch.ones(3), None, 1.0)[0].grad_fn is None


def test_outputs_are_dense_as_the_fake_says():
    operator = define(
        "test_transposed(Tensor x) -> Tensor y", reference=lambda x: x.t(), fake=lambda x: x.new_empty(x.shape[1], x.shape[0])
    )
    del OPERATORS["test_transposed"]
    assert operator("reference", torch.randn(2, 3)).is_contiguous()


@pytest.fixture(scope="module")
def shifted():
    """x + a y, whose gradient of x is that of the sum; and a second output, an empty tensor, that nobody asks for."""
    registered = set(OPERATORS)
    operator = define(
        "test_shifted(Tensor x, Tensor y, float a) -> (Tensor total, Tensor nothing)",
        reference=lambda x, y, a: (x + a * y, x.new_empty(0)),
        fake=lambda x, y, a: (x.new_empty(x.shape), x.new_empty(0)),
        backward="test_shifted_backward(Tensor? grad_total, Tensor? grad_nothing, Tensor y, float a, bool need_grad_y)"
        " -> Tensor grad_y",
        backward_reference=lambda grad, nothing, y, a, need: (
            y.new_zeros(y.shape) if grad is None else a * grad if nothing is None else grad * torch.nan
        ),
        backward_fake=lambda grad, nothing, y, a, need: y.new_empty(y.shape),
        passed_on={"x": "total"},
    )
    for name in set(OPERATORS) - registered:
        del OPERATORS[name]
    return operator


def test_a_gradient_passed_on_is_not_copied(shifted):
    calls = (
        lambda x, y: shifted("reference", x, y, 3.0),
        lambda x, y: torch.ops.mmgen_kernels.test_shifted(x, y, 3.0),
        torch.compile(lambda x, y: shifted("reference", x, y, 3.0), fullgraph=True, backend="aot_eager"),
    )
    for call in calls:
        x, y, upstream = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True), torch.randn(2, 3)
        of_x, of_y = torch.autograd.grad(call(x, y)[0], (x, y), upstream)
        assert torch.equal(of_x, upstream) and torch.equal(of_y, 3 * upstream)
        assert of_x.data_ptr() == upstream.data_ptr() or call is calls[2]
        assert torch.autograd.grad(call(x, y)[0].sum(), x)[0].shape == (2, 3)
        assert call(x.detach(), y)[0].requires_grad and not call(x.detach(), y.detach())[0].requires_grad
    weights = torch.randn(2, 3)
    of_x, of_y = torch.func.grad(lambda a, b: (shifted("reference", a, b, 3.0)[0] * weights).sum(), argnums=(0, 1))(
        torch.randn(2, 3), torch.randn(2, 3)
    )
    assert torch.equal(of_x, weights) and torch.equal(of_y, 3 * weights)


def test_an_output_without_gradient_passes_none_on(shifted):
    x, y = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    _, nothing = shifted("reference", x, y, 3.0)
    assert torch.autograd.grad(nothing.sum(), x, allow_unused=True) == (None,)


def test_the_gradient_of_an_empty_output_is_none_to_the_backward(shifted):
    x, y = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    total, nothing = shifted("reference", x, y, 3.0)
    of_y = torch.autograd.grad(total.sum() + nothing.sum(), y)[0]
    assert torch.equal(of_y, torch.full((2, 3), 3.0))


def test_a_gradient_passed_on_names_an_output():
    with pytest.raises(ValueError, match="'sum' is not in list"):
        define(
            "test_bad_d(Tensor x) -> Tensor y",
            reference=lambda x: x.clone(),
            fake=torch.empty_like,
            backward="test_bad_d_backward(Tensor? grad_y) -> ()",
            backward_reference=lambda grad: (),
            backward_fake=lambda grad: (),
            passed_on={"x": "sum"},
        )
    for made in ("test_bad_d", "test_bad_d_backward"):
        OPERATORS.pop(made, None)


@pytest.mark.parametrize(
    ("backward", "message"),
    [
        ("test_bad_a_backward(Tensor? grad_y, Tensor z) -> Tensor grad_x", "argument 'z' names nothing of test_bad_a"),
        ("test_bad_b_backward(Tensor? grad_y, bool need_grad_z) -> Tensor grad_x", "argument 'need_grad_z' names nothing"),
        (
            "test_bad_c_backward(Tensor? grad_y, Tensor x) -> Tensor grad_z",
            r"results \['grad_z'\] are neither grad_<input of test_bad_c> nor an output of it",
        ),
    ],
)
def test_names_that_mean_nothing_are_refused(backward, message):
    name = backward.split("_backward")[0]
    with pytest.raises(ValueError, match=message):
        define(
            f"{name}(Tensor x) -> Tensor y",
            reference=lambda x: x.clone(),
            fake=torch.empty_like,
            backward=backward,
            backward_reference=lambda *a: a[0],
            backward_fake=lambda *a: a[0],
        )
    for made in (name, f"{name}_backward"):
        OPERATORS.pop(made, None)


# -- every operator ---------------------------------------------------------------------------------------------------


def test_every_operator_has_a_case_in_the_battery():
    """Add cases to mmgen_kernels/battery/<family> for what is missing here."""
    covered = {case.operator for case in battery.cases()}
    assert set(OPERATORS) - covered == set()
    quick = {case.operator for case in battery.cases() if case.quick}
    assert set(OPERATORS) - quick == set()


@pytest.mark.parametrize("family", ("modulation", "attn", "blocks", "schedule"))
def test_the_battery_notices_a_kernel_that_writes_its_input(family, monkeypatch):
    case = next(c for c in battery.cases(family) if c.quick and not OPERATORS[c.operator].parts)
    right = OPERATORS[case.operator].reference

    def wrong(*arguments):
        results = right(*arguments)
        arguments[0].detach().view(-1)[:1] += 1
        return results

    monkeypatch.setitem(OPERATORS[case.operator].overloads, "reference", wrong)
    judge = case.prepare(torch.device("cpu"), case.dtypes[0])
    with mk.use_backend("reference"):
        assert any("was written" in failure for failure in judge().failures)


def test_names_of_cases_are_unique():
    names = [(case.operator, case.name) for case in battery.cases()]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("name", [n for n in OPERATORS if not n.startswith("test_")])
def test_every_operator_bears_the_compliance_tag_and_a_namespace(name):
    for overload in OPERATORS[name].overloads.values():
        assert torch.Tag.pt2_compliant_tag in overload.tags
        assert str(overload).startswith(f"{library.NAMESPACE}.{name}.")


def test_allocations_are_poisoned_in_python_and_in_cpp():
    """The fixture of conftest.py works: memory that an operator takes is filled before it is written, by aten itself."""
    assert torch.empty(3).isnan().all() and torch.ones(2).new_empty(5).isnan().all()
    assert (torch.empty(3, dtype=torch.int64) == torch.iinfo(torch.int64).max).all()
    x, codebook = torch.ones(4, 3), torch.ones(2, 3)
    for implementation in battery.implementations("vector_quantize", torch.device("cpu")):
        with mk.use_backend(implementation), torch.profiler.profile() as profile:
            mk.vector_quantize(x, codebook)
        counts = {event.key: event.count for event in profile.key_averages()}
        assert counts["aten::fill_"] >= counts["aten::empty"] >= 5, counts  # five outputs


@pytest.mark.unpoisoned
def test_the_marker_takes_the_poison_away():
    assert not torch.are_deterministic_algorithms_enabled()
