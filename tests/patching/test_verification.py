"""Verification finds what differs, and leaves no trace. A rule that is wrong on purpose stands for every mistake."""

import random
import threading

import pytest
import torch
from torch import nn
from twins import VectorQuantizer, VectorQuantizer2

import mmgen_kernels as mk
from mmgen_kernels.patching import Forward, llamagen, taming, verification
from mmgen_kernels.patching.handle import patch_with


@pytest.fixture(autouse=True)
def _no_memory(monkeypatch):
    monkeypatch.setattr(verification, "_verified", set())


def make(codes=9):
    torch.manual_seed(0)
    return VectorQuantizer2(codes, 4, 0.25)


def with_forward(call, rule=taming.VectorQuantizer2Rule):
    """A rule whose forward is `call(self, stock results, *args)`."""

    class Wrong(Forward):
        def __call__(self, *args, **kwargs):
            return call(self, self.stock(*args, **kwargs), *args)

    return type("WrongRule", (rule,), {"forward": lambda self, module: Wrong(module)})()


def reasons(rule, module):
    handle = patch_with([rule], module, families=None, verify=True, strict=False)
    assert "forward" not in vars(module) or handle.replaced
    return handle.kept[0].reasons if handle.kept else ()


def changed(position, change):
    def call(self, results, *args):
        results = list(results)
        results[position] = change(results[position])
        return tuple(results)

    return call


def off_in_eval(self, results, *args):
    return results if self.module.training else (results[0] + 1e-3, *results[1:])


def fails(self, results, *args):
    raise ArithmeticError("no")


def without_gradient_of_codes(self, results, z):
    """The right loss, whose gradient misses the codebook."""
    rows, codebook = z.movedim(1, -1), self.module.embedding.weight.detach()
    return results[0], mk.vector_quantize(rows, codebook, beta=self.module.beta, legacy_beta=True).loss, results[2]


def drifts(self, results, *args):
    if self.module.training:
        with torch.no_grad():
            self.module.embedding.weight.mul_(1.001)
    return results


WRONG = {
    "value": (changed(0, lambda q: q + 1e-3), "output 0 differs by up to 0.001 at 128 places"),
    "loss": (changed(1, lambda loss: loss * 1.001), "training step 1, call 1: output 1 differs by up to"),
    "detached": (changed(0, torch.detach), "output 0 requires a gradient is False, stock True"),
    "dtype": (changed(0, torch.Tensor.double), "output 0 has dtype torch.float64, stock torch.float32"),
    "shape": (changed(0, lambda q: q[:1]), "output 0 has shape torch.Size"),
    "indices": (changed(2, lambda info: (None, None, info[2].roll(1))), "output 4 differs at"),
    "no tensor": (changed(2, lambda info: (1, None, info[2])), "output 2 is 1, stock None"),
    "gradient": (without_gradient_of_codes, "gradient of embedding.weight is None, stock a tensor (9, 4)"),
    "straight-through": (changed(0, lambda q: q.detach() + 2 * (q - q.detach())), "gradient of input 0 differs by up to"),
    "parameter": (drifts, "training step 1, call 1: embedding.weight differs by up to"),
    "eval only": (off_in_eval, "eval, call 1: output 0 differs by up to 0.001"),
    "draws": (lambda self, results, *args: (torch.rand(1), results)[1], "state of random generator 0 differs"),
    "raises": (fails, "call 1: raises ArithmeticError('no'), stock None"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_mistake_is_found(name):
    call, told = WRONG[name]
    module = make()
    assert reasons(with_forward(lambda self, results, *args: results), module) == ()
    del module.forward
    assert told in "; ".join(reasons(with_forward(call), module))


def test_a_buffer_that_is_not_written():
    def forgets(self, results, *args):
        self.module.codebook_used.zero_()
        return results

    module = VectorQuantizer(9, 4, 0.25, 0.0, True, True)
    assert "codebook_used differs" in "; ".join(reasons(with_forward(forgets, llamagen.VectorQuantizerRule), module))


def test_not_verified_is_adopted():
    handle = patch_with([with_forward(fails)], make(), families=None, verify=False, strict=False)
    assert handle.replaced and not handle.replaced[0].verified


# -- no trace ---------------------------------------------------------------------------------------------------------


def everything(module):
    named = [*module.named_parameters(), *module.named_buffers()]
    return {
        "values": {n: t.detach().clone() for n, t in named},
        "versions": [t._version for _, t in named],
        "gradients": [None if t.grad is None else t.grad.clone() for _, t in named],
        "gradient": [t.grad for _, t in named],
        "requires": [t.requires_grad for _, t in named],
        "training": [m.training for m in module.modules()],
        "hooks": [dict(vars(m)[name]) for m in module.modules() for name in verification.HOOKS],
        "names": [list(vars(m)) for m in module.modules()],
    }


def same(a, b):
    if torch.is_tensor(a):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a is b or a == b


@pytest.mark.parametrize("training", (True, False))
@pytest.mark.parametrize("frozen", (True, False))
def test_the_module_is_left_alone(training, frozen):
    module = VectorQuantizer(9, 4, 0.25, 0.0, True, True).train(training).requires_grad_(not frozen)
    module.embedding.train(not training)
    if not frozen:
        module.embedding.weight.grad = torch.randn(9, 4)
    called = []
    module.register_forward_hook(lambda *a: called.append("forward"))
    module.register_forward_pre_hook(lambda *a: called.append("pre"))
    module.register_full_backward_hook(lambda *a: called.append("backward"))
    before = everything(module)
    assert verification.differences(llamagen.VectorQuantizerRule(), module) == []
    assert same(everything(module), before) and not called


def test_random_states_are_left_alone():
    for found in (make(), VectorQuantizer(9, 4, 0.25, 0.0, True, True)):
        torch.manual_seed(5)
        random.seed(5)
        before = torch.get_rng_state(), random.getstate()
        assert mk.patch(found).replaced
        assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
    assert not torch.cuda.is_initialized() or torch.cuda.is_available()


@pytest.mark.parametrize("precision", ("highest", "high", "medium"))
def test_the_precision_of_products_is_left_alone(precision):
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        assert mk.patch(make()).replaced
        assert torch.get_float32_matmul_precision() == precision
        assert torch.backends.cuda.matmul.allow_tf32 == (precision != "highest")
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("mode", (torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)))
def test_modes_of_the_caller(mode):
    module = make()
    with mode():
        before = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")
        assert mk.patch(module).replaced
        assert before == (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu"))


def test_a_mistake_is_found_without_gradients_too():
    with torch.no_grad():
        assert "gradient of input 0" in "; ".join(reasons(with_forward(WRONG["straight-through"][0]), make()))


def test_hooks_that_cannot_be_copied():
    module = make()
    module.register_forward_pre_hook(threading.Lock().__enter__)
    assert mk.patch(module).replaced


def test_modules_that_cannot_be_copied_or_run():
    module = make()
    module.lock = threading.Lock()
    assert "verification fails: TypeError: cannot pickle" in mk.patch(module).kept[0].reasons[0]
    assert mk.patch(module, verify=False).replaced
    assert "meta device" in mk.patch(make().to("meta")).kept[0].reasons[0]
    refuses = make()
    refuses.remap = True  # without the buffer that goes with it
    assert "verification: the stock module raises AttributeError" in mk.patch(refuses).kept[0].reasons[0]


# -- once per kind ----------------------------------------------------------------------------------------------------


def test_once_per_kind(monkeypatch):
    runs = []
    original = verification._differences
    monkeypatch.setattr(verification, "_differences", lambda *a: (runs.append(1), original(*a))[1])
    rule = taming.VectorQuantizer2Rule()
    for count, module in (
        (1, nn.ModuleList([make() for _ in range(5)])),
        (1, make().eval()),
        (2, make(codes=8)),
        (3, make().double()),
        (4, make().requires_grad_(False)),
    ):
        patch_with([rule], module, families=None, verify=True, strict=True)
        assert len(runs) == count
    other = make()
    other.beta = 0.5
    mk.patch(other, strict=True)
    assert len(runs) == 5
    wrong = with_forward(fails)
    assert reasons(wrong, make()) and reasons(wrong, make()) and len(runs) == 7  # it may be the values of this one


def test_a_flag_makes_another_kind():
    """Whether k-means has run decides what a call does."""
    module = make()
    module.register_buffer("initted", torch.tensor(False))
    kinds = [verification.kind(taming.VectorQuantizer2Rule(), module)]
    module.initted.fill_(True)
    kinds.append(verification.kind(taming.VectorQuantizer2Rule(), module))
    assert kinds[0] != kinds[1] and len({*kinds}) == 2


# -- near ties --------------------------------------------------------------------------------------------------------


def test_new_codebooks_are_no_obstacle():
    """Libraries start with codes of 1/K around 0: next to inputs of 1 all of them are near ties."""
    module = make(codes=512)
    with torch.no_grad():
        module.embedding.weight.uniform_(-1 / 512, 1 / 512)
    before = module.embedding.weight.detach().clone()
    assert mk.patch(module).replaced
    assert torch.equal(module.embedding.weight, before)


def test_indices_that_stock_cannot_tell_are_said_to_be_near_ties():
    """Far from 0 stock's x^2 - 2 x c + c^2 in fp32 cannot tell codes apart."""

    class Rule(taming.VectorQuantizer2Rule):
        def prepare(self, module, draw):
            super().prepare(module, lambda *shape: 1000 + draw(*shape))

        def calls(self, module, draw):
            return super().calls(module, lambda *shape: 1000 + draw(*shape))

    assert "all with near ties" in reasons(Rule(), make())[0]


def test_another_draw_is_made_after_a_near_tie():
    """The first draw lies half way between two codes, where the wrong rule takes the other one; later draws do not."""
    drawn = []

    class Rule(taming.VectorQuantizer2Rule):
        def prepare(self, module, draw):
            pass

        def calls(self, module, draw):
            drawn.append(1)
            z = draw(2, 4, 4, 4)
            if len(drawn) <= 2 * len(verification.STEPS):
                z = z * 0 + module.embedding.weight.detach()[:2].mean(0).view(4, 1, 1)
            yield (z,), {}

        def forward(self, module):
            return Other(module)

    class Other(taming.VectorQuantizer2Forward):
        def __call__(self, z):
            quantized, loss, info = super().__call__(z)
            tie = (z.detach() - self.module.embedding.weight.detach()[:2].mean(0).view(4, 1, 1)).abs().max() < 1e-6
            return quantized, loss, (None, None, 1 - info[2] if tie else info[2])

    module = make()
    with torch.no_grad():
        module.embedding.weight[2:].add_(100)
    assert reasons(Rule(), module) == () and len(drawn) == 4 * len(verification.STEPS)


def test_a_rule_may_magnify_rounding():
    class Rule(taming.VectorQuantizer2Rule):
        def magnification(self, module):
            return 100.0

        def forward(self, module):
            return with_forward(changed(1, lambda loss: loss * 1.001)).forward(module)

    assert reasons(Rule(), make()) == ()


def test_near_ties_by_metric():
    codes = torch.eye(3)
    for metric, x, tie in (("l2", [0.5, 0.5, 0], True), ("l2", [0.6, 0.4, 0], False), ("dot", [1.0, 1.0, 0], True),
                           ("dot", [1.0, 0.9, 0], False)):
        with verification.Lookups() as seen:
            mk.nearest_code(torch.tensor([x]), codes, metric=metric)
        assert seen.near_ties() == tie
    with verification.Lookups() as seen:
        mk.nearest_code(torch.ones(1, 3), codes[:1])
        mk.nearest_code(torch.ones(2, 1, 3), torch.stack([codes, codes + 1]))
    assert len(seen.seen) == 2 and seen.near_ties()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_on_a_gpu():
    module = make().cuda()
    before = torch.cuda.get_rng_state(), torch.get_rng_state()
    assert mk.patch(module, strict=True).replaced[0].verified
    assert torch.equal(torch.cuda.get_rng_state(), before[0]) and torch.equal(torch.get_rng_state(), before[1])
