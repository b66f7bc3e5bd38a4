"""The Triton kernels of qk_norm_rope by the interpreter, without a GPU: the battery's cases, and what launches there are.

Each test runs in a process in which TRITON_INTERPRET is set, or there needs none.
"""

import importlib.util

import pytest
import torch

import mmgen_kernels as mk
from mmgen_kernels import battery

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
CPU = torch.device("cpu")
CASES = {(c.operator, c.name): c for c in battery.cases("attn") if c.operator.startswith("qk_norm_rope")}


def judge(operator, name, of_16_bits):
    """(dtypes, failures) of those dtypes of a case that fail."""
    case, failed = CASES[operator, name], []
    for dtypes in case.dtypes:
        if (dtypes[0].itemsize == 2) != of_16_bits:
            continue
        with mk.use_backend("triton"):
            outcome = case.prepare(CPU, dtypes)()
        if outcome.failures or not outcome.repeatable:
            failed.append((dtypes, outcome.failures, outcome.repeatable))
    return failed


# The interpreter takes half a minute for a case in a dtype. Between them the normal run has both directions, both norms, heads
# alone and together, pairs of either kind, a part that is not turned, biases, wide and 16-bit dtypes.
NORMAL = {
    ("qk_norm_rope", "half_split", False), ("qk_norm_rope", "wan", True), ("qk_norm_rope", "partial_True", False),
    ("qk_norm_rope_backward", "cogvideo", False), ("qk_norm_rope_backward", "partial_across_False", False),
    ("qk_norm_rope_backward", "mixed_dtypes", True),
}  # fmt: skip


def parameters():
    for (operator, name), case in CASES.items():
        for of_16_bits in sorted({dtypes[0].itemsize == 2 for dtypes in case.dtypes}):
            marks = [] if (operator, name, of_16_bits) in NORMAL else [pytest.mark.long]
            yield pytest.param(operator, name, of_16_bits, id=f"{operator}-{name}-{'16' if of_16_bits else 'wide'}", marks=marks)


@pytest.mark.parametrize(("operator", "name", "of_16_bits"), [*parameters()])
def test_case(process, operator, name, of_16_bits):
    assert not process.submit(judge, operator, name, of_16_bits).result()


def test_launches_and_views(process):
    process.submit(count_launches_and_copies).result()


def count_launches_and_copies():
    """One launch forward; two backward, and one where no weight wants a gradient. Views are read in place, those of tables too."""
    from mmgen_kernels.attn.triton_kernels import rope_backward, rope_forward

    launched, seen = [], []

    class Count:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            def launch(*arguments, **options):
                launched.append(self.kernel.__name__)
                seen.extend(a.data_ptr() for a in arguments if isinstance(a, torch.Tensor))
                return self.kernel[grid](*arguments, **options)

            return launch

    for module, name in ((rope_forward, "norm_and_turn"), (rope_backward, "backward_chunks"), (rope_backward, "sum_chunks")):
        setattr(module, name, Count(getattr(module, name)))
    q, k, _ = torch.randn(2, 3, 3, 2, 8).unbind(2)
    angle = torch.randn(3, 4).repeat_interleave(2, -1)
    tables = {"cos": angle.cos()[:, ::2], "sin": angle.sin()[:, ::2]}
    weight = torch.ones(8, requires_grad=True)
    with mk.use_backend("triton"):
        for given, expected in ((weight, ["backward_chunks", "sum_chunks"]), (None, ["backward_chunks"])):
            q, k = q.detach().requires_grad_(), k.detach().requires_grad_()
            launched.clear()
            seen.clear()
            out = mk.qk_norm_rope(q, k, q_weight=given, interleaved=True, **tables)
            assert launched == ["norm_and_turn"]
            assert {t.data_ptr() for t in (q, k, *tables.values(), *out)} <= set(seen)
            torch.autograd.grad(out, [q, k, *([] if given is None else [given])], [torch.ones_like(o) for o in out])
            assert launched[1:] == expected
