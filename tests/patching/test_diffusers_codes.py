"""mk.patch on diffusers' schedulers of codes: the codes of stock from the same generator, as pipelines call them, and back."""

import copy
import importlib
import inspect
import pickle
import sys
import types

import pytest
import torch

import mmgen_kernels as mk
from mmgen_kernels.battery.draws import randint, randn
from mmgen_kernels.patching import diffusers_codes
from tests.patching import twins_codes

NAMES = {"VQDiffusionScheduler": (38,), "AmusedScheduler": (37,)}
K = 37
B, N = 2, 48


@pytest.fixture(params=["twin", "diffusers"])
def schedulers(request, monkeypatch):
    """A module with both classes: copies of their structure, or diffusers itself where it is installed."""
    monkeypatch.setattr(diffusers_codes, "_verified", set())
    if request.param == "diffusers":
        return pytest.importorskip("diffusers")
    module = types.ModuleType("diffusers.twins")
    for name, made in vars(twins_codes).items():
        if name.endswith(("Scheduler", "Output")):
            monkeypatch.setattr(made, "__module__", module.__name__)
            setattr(module, name, made)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def made(schedulers, name, **config):
    return getattr(schedulers, name)(*NAMES[name], **config)


def logits_of(step, *shape):
    return 3 * randn(*shape, seed=step).float()


def sampled(scheduler, seed=5, steps=9, **options):
    """As VQDiffusionPipeline and AmusedPipeline call the schedulers: every sample, and the generator's next number."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    if type(scheduler).__name__ == "VQDiffusionScheduler":
        sample = torch.full((B, N), K)
        scheduler.set_timesteps(steps, device=torch.device("cpu"))
        for t in scheduler.timesteps.to("cpu"):
            output = torch.log_softmax(logits_of(int(t), B, K, N), 1).clamp(-70)
            sample = scheduler.step(output, timestep=t, sample=sample, generator=generator).prev_sample
            found.append(sample)
    else:
        sample = torch.full((B, 6, 8), K)
        scheduler.set_timesteps(steps, (3, 0), torch.device("cpu"))
        for t in scheduler.timesteps:
            output = logits_of(int(t), B, K, 6, 8)
            result = scheduler.step(model_output=output, timestep=t, sample=sample, generator=generator, **options)
            sample = result.prev_sample
            found += [sample, result.pred_original_sample]
    return [*found, torch.rand(1, generator=generator)]


class Fresh(torch.utils._python_dispatch.TorchDispatchMode):
    """Names of operators, and how many new tensors of the logits' size they made."""

    def __init__(self, logits):
        super().__init__()
        self.logits, self.names, self.seen = logits, [], {logits.untyped_storage().data_ptr(): logits}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        out = func(*args, **(kwargs or {}))
        for made in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(made, torch.Tensor) and made.numel() >= self.logits.numel():
                self.seen[made.untyped_storage().data_ptr()] = made  # held, so that no place is used again
        return out

    @property
    def count(self):
        return len(self.seen) - 1


@pytest.mark.parametrize("name", NAMES)
def test_runs_are_stock_s_and_back(schedulers, name):
    scheduler = made(schedulers, name)
    signatures = {m: inspect.signature(getattr(scheduler, m)) for m in ("step", "set_timesteps")}
    attributes, expected = vars(made(schedulers, name)).keys() | vars(scheduler).keys(), sampled(scheduler)
    with mk.patch(scheduler, strict=True) as handle:
        operator = diffusers_codes.VQDiffusion.BY if name == "VQDiffusionScheduler" else diffusers_codes.Amused.BY
        assert f"replaced {name} ({name}) by {operator}, verified" in handle.report()
        assert {m: inspect.signature(getattr(scheduler, m)) for m in signatures} == signatures
        found = sampled(scheduler)
        assert all(map(torch.equal, found, expected)) and int((found[-2] == K).sum()) == 0
        assert scheduler.step.fused == scheduler.step.calls == 9
        output = scheduler.step(logits_of(1, B, *((K, N) if name[0] == "V" else (N, K))), 3, randint(0, K, (B, N), 1))
        assert type(output).__name__ == f"{name}Output" and type(output).__module__.split(".")[0] == "diffusers"
        again = mk.patch(scheduler)
        assert not again.replaced and again.kept[0].already_patched
    assert vars(scheduler).keys() == attributes and type(scheduler) is getattr(schedulers, name)
    assert all(map(torch.equal, sampled(scheduler), expected))


@pytest.mark.parametrize("config", [{"masking_schedule": "linear"}, {}], ids=str)
def test_amused_from_an_image(schedulers, config):
    """As the image to image and the inpainting pipelines call it: codes noised at a step, a part of the run, a smaller share."""
    image, generators, runs = randint(0, K, (B, 6, 8), 3), [torch.Generator().manual_seed(2) for _ in range(2)], []
    scheduler = made(schedulers, "AmusedScheduler", **config)
    for patched, generator in zip((False, True), generators, strict=True):
        handle = mk.patch(scheduler, strict=True) if patched else None
        scheduler.set_timesteps(12, 1.5, "cpu")
        sample = scheduler.add_noise(image, scheduler.timesteps[3], generator=generator)
        ratio = float((sample == K).float().mean())
        runs.append([sample])
        for t in scheduler.timesteps[4:]:
            output = logits_of(int(t), B, K, 6, 8)
            step = scheduler.step(output, timestep=t, sample=sample, starting_mask_ratio=ratio, generator=generator)
            sample = step.prev_sample
            runs[-1].append(sample)
        if handle is not None:
            assert scheduler.step.fused == 8
            handle.revert()
    assert all(map(torch.equal, *runs)) and torch.equal(*(g.get_state() for g in generators))


def test_16_bits_are_not_rounded_again(schedulers):
    """VQDiffusion widens them too. Amused draws from rounded probabilities, ours from what it draws of the same numbers in fp32."""
    log_p, codes = logits_of(1, B, K, N).log_softmax(1).bfloat16(), randint(0, K + 1, (B, N), 1)
    for name, output in (("VQDiffusionScheduler", log_p), ("AmusedScheduler", log_p.mT)):
        scheduler = made(schedulers, name)
        scheduler.set_timesteps(5)
        stock, ours = (torch.Generator().manual_seed(4) for _ in range(2))
        expected = scheduler.step(output.float(), 3, codes, generator=stock, return_dict=False)[-1]
        with mk.patch(scheduler, strict=True):
            assert torch.equal(scheduler.step(output, 3, codes, generator=ours, return_dict=False)[-1], expected)
            assert scheduler.step.fused == 1


@pytest.mark.parametrize("name", NAMES)
def test_nothing_of_the_logits_size_is_made_but_the_noise(schedulers, name):
    scheduler, of_codes = made(schedulers, name), name == "VQDiffusionScheduler"
    logits = logits_of(0, B, K, N) if of_codes else logits_of(0, B, N, K)
    sample = torch.where(randn(B, N, seed=1) < 0, K, randint(0, K, (B, N), 1))
    for noise, most in (("torch", 1), ("philox", 0)):
        with mk.patch(scheduler, noise=noise, strict=True):
            scheduler.set_timesteps(5)
            for t in (4, 0):
                with Fresh(logits) as fresh:
                    scheduler.step(logits, t, sample)
                assert fresh.count == most, fresh.names
                assert ("vq_diffusion_step" if of_codes else "unmask_step") in " ".join(fresh.names)
                assert not {"_local_scalar_dense", "nonzero", "item"} & set(fresh.names)


@pytest.mark.parametrize("name", NAMES)
def test_steps_wait_for_no_device(schedulers, name):
    """Tensors of the meta device have no values to wait for; views of timesteps are told by their place."""
    scheduler, of_codes = made(schedulers, name), name == "VQDiffusionScheduler"
    mk.patch(scheduler, strict=True)
    scheduler.set_timesteps(5)
    logits = torch.empty((B, K, N) if of_codes else (B, N, K), device="meta")
    for t in scheduler.timesteps:
        found = scheduler.step(logits, t, torch.empty(B, N, dtype=torch.int64, device="meta"), return_dict=False)
        assert all(codes.shape == (B, N) and codes.is_meta for codes in found)
    assert scheduler.step.fused == 5


@pytest.mark.parametrize("name", NAMES)
def test_philox_draws_a_key_for_each_run(schedulers, name):
    scheduler = made(schedulers, name)
    mk.patch(scheduler, noise="philox", strict=True)
    first, again, other = (sampled(scheduler, seed)[:-1] for seed in (1, 1, 2))
    assert all(map(torch.equal, first, again)) and not torch.equal(first[-1], other[-1])
    assert (first[-1] < K).all()
    generator = torch.Generator().manual_seed(1)
    torch.randint(-(2**63), 2**63 - 1, (2,), generator=generator)
    assert torch.equal(sampled(scheduler, 1)[-1], torch.rand(1, generator=generator))  # the key, and nothing else


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))], ids=["deepcopy", "pickle"])
def test_a_copy_steps_for_itself(schedulers, name, copied):
    if copied is not copy.deepcopy and schedulers.__name__ != "diffusers":
        pytest.skip("pickle looks classes up by the twin's own module")
    scheduler = made(schedulers, name)
    mk.patch(scheduler, strict=True)
    expected, other = sampled(scheduler), copied(scheduler)
    assert other.step.scheduler is other
    assert all(map(torch.equal, sampled(other), expected)) and other.step.fused == 18 and scheduler.step.fused == 9


@pytest.mark.parametrize("name", NAMES)
def test_in_a_pipeline_and_by_family(schedulers, name):
    pipeline = types.SimpleNamespace(scheduler=made(schedulers, name), transformer=torch.nn.Linear(2, 2))
    with mk.patch(pipeline) as handle:
        assert [r.name for r in handle.replaced] == ["scheduler"]
        assert not mk.patch(pipeline, families="vq").replaced
    assert not {"step", "add_noise"} & vars(pipeline.scheduler).keys()


# -- what is left to stock ----------------------------------------------------------------------------------------------


def test_calls_that_stock_serves(schedulers):
    """Each is told apart before anything is drawn: the same result, or the same error, and the generator in the same state."""
    vq, amused = (made(schedulers, name) for name in NAMES)
    for scheduler in (vq, amused):
        scheduler.set_timesteps(5)
    log_p, logits, codes = logits_of(1, B, K, N).log_softmax(1), logits_of(1, B, N, K), torch.full((B, N), K)
    calls = {
        "another number of codes": (vq, (log_p[:, 1:], 3, codes)),
        "no timestep of the process": (vq, (log_p, 100, codes)),
        "codes of 32 bits": (vq, (log_p, 3, codes.int())),
        "several timesteps": (vq, (log_p, torch.tensor([3, 3]), codes)),
        "generators": (vq, (log_p, 3, codes, [torch.Generator()])),
        "integers": (amused, (logits.int(), 3, codes)),
        "no timestep of the run": (amused, (logits, 7, codes)),
        "a share for each sample": (amused, (logits, 3, codes, torch.tensor([[0.5], [0.6]]))),
    }
    for what, (scheduler, arguments) in calls.items():
        results = []
        for patched in (False, True):
            handle = mk.patch(scheduler, strict=True) if patched else None
            torch.manual_seed(1)
            try:
                results.append(list(scheduler.step(*arguments, return_dict=False)))
            except Exception as error:
                results.append((type(error), str(error)))
            results.append(torch.get_rng_state().tolist())
            if handle is not None:
                assert (scheduler.step.calls, scheduler.step.fused) == (1, 0) and scheduler.step.unplanned, what
                handle.revert()
        assert str(results[:2]) == str(results[2:]), what


def test_tables_that_were_replaced_are_heard(schedulers):
    scheduler = made(schedulers, "VQDiffusionScheduler")
    mk.patch(scheduler, strict=True)
    log_p, codes = logits_of(1, B, K, N).log_softmax(1), randint(0, K + 1, (B, N), 1)
    before, scheduler.log_at = scheduler.log_at, scheduler.log_at - 0.01
    scheduler.step(log_p, 40, codes)
    assert scheduler.step.unplanned == "log_at does not follow from the config" and not scheduler.step.fused
    scheduler.log_at = before
    scheduler.step(log_p, 40, codes)
    assert scheduler.step.fused == 1


def test_runs_that_do_not_count_down(schedulers):
    scheduler = made(schedulers, "VQDiffusionScheduler")
    log_p, codes, results = logits_of(1, B, K, N).log_softmax(1), torch.full((B, N), K), []
    for patched in (False, True):
        if patched:
            mk.patch(scheduler, strict=True)
        whole = torch.tensor([90, 40, 3, 0])
        scheduler.timesteps = whole[1::2]  # VQDiffusion steps by the timestep itself, from wherever it comes
        generator = torch.Generator().manual_seed(3)
        results.append([scheduler.step(log_p, t, codes, generator=generator).prev_sample for t in whole])
    assert all(map(torch.equal, *results)) and scheduler.step.fused == 4
    with pytest.raises(Exception):  # noqa: B017 - diffusers says what is wrong with a timestep between two
        scheduler.step(log_p, 2.5, codes)
    assert scheduler.step.unplanned == "timestep must be a whole number, got 2.5"


@pytest.mark.parametrize("name", NAMES)
def test_subclasses_and_forks_are_refused(schedulers, name, monkeypatch):
    stock = getattr(schedulers, name)
    for method in ("step", "set_timesteps", "q_posterior" if name[0] == "V" else "add_noise"):
        mine = type("Mine", (stock,), {method: lambda self, *args, **kwargs: None})
        handle = mk.patch(mine(*NAMES[name]))
        assert handle.kept[0].reasons[0] == f"Mine overrides {name}.{method}" and not handle.replaced
    with pytest.raises(RuntimeError, match="strict=True, and kept as they were"):
        mk.patch(mine(*NAMES[name]), strict=True)
    served = type("Named", (stock,), {})(*NAMES[name])
    assert mk.patch(served).replaced
    there = made(schedulers, name)
    there.step = lambda *args: None
    assert mk.patch(there).kept[0].reasons == ("its step was already replaced on the instance",)
    right = stock.step
    monkeypatch.setattr(stock, "step", lambda self, sample: None)
    assert f"{name}.step takes other arguments" in mk.patch(made(schedulers, name)).report()

    def tilted(self, *args, **kwargs):
        args = (args[0] * 1.1, *args[1:])
        return right(self, *args, **kwargs)

    tilted.__signature__ = inspect.signature(right)
    monkeypatch.setattr(stock, "step", tilted)
    diffusers_codes._verified.clear()
    handle = mk.patch(made(schedulers, name))
    assert not handle.replaced and "differs from stock in" in handle.kept[0].reasons[0]


def test_patched_by_name_only():
    """A class of that name that is none of diffusers is nobody's to patch."""
    module = importlib.import_module("tests.patching.twins_codes")
    with pytest.raises(TypeError, match=r"object must be an nn\.Module or a scheduler"):
        mk.patch(module.AmusedScheduler(5))
