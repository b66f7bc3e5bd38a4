"""mk.schedulers' VQDiffusionScheduler and AmusedScheduler: diffusers' runs from the same generator, its configs, its signatures."""

import inspect

import pytest
import torch

import mmgen_kernels as mk
from mmgen_kernels.battery.draws import randint, randn

NAMES = {"VQDiffusionScheduler": {"num_vec_classes": 38}, "AmusedScheduler": {"mask_token_id": 37}}


def logits_of(step, *shape, dtype=torch.float32):
    return (3 * randn(*shape, seed=step)).to(dtype)


@pytest.mark.parametrize("as_view", [True, False])
def test_vq_diffusion_runs_are_diffusers_own(as_view):
    diffusers = pytest.importorskip("diffusers")
    B, K, N, steps = 2, 37, 90, 25
    ours, stock = (of.VQDiffusionScheduler(K + 1) for of in (mk.schedulers, diffusers))
    x, y = torch.full((B, N), K), torch.full((B, N), K)
    generators = [torch.Generator().manual_seed(5) for _ in range(2)]
    for scheduler in (ours, stock):
        scheduler.set_timesteps(steps)
    assert torch.equal(ours.timesteps, stock.timesteps)
    for t in ours.timesteps:
        log_p = torch.log_softmax(logits_of(int(t), B, K, N), 1)
        x = ours.step(log_p, t if as_view else int(t), x, generator=generators[0]).prev_sample
        (y,) = stock.step(log_p, t, y, generator=generators[1], return_dict=False)
        assert torch.equal(x, y)
    assert (x < K).all()


@pytest.mark.parametrize("kind", ["cosine", "linear"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_amused_runs_are_diffusers_own(kind, dtype):
    diffusers = pytest.importorskip("diffusers")
    B, K, H, W, steps = 2, 37, 6, 8, 12
    ours, stock = (of.AmusedScheduler(K, masking_schedule=kind) for of in (mk.schedulers, diffusers))
    generators = [torch.Generator().manual_seed(5) for _ in range(2)]
    sample = randint(0, K, (B, H, W), 1)
    for scheduler in (ours, stock):
        scheduler.set_timesteps(steps, temperature=(3, 0))
    assert torch.equal(ours.timesteps, stock.timesteps) and torch.allclose(ours.temperatures, stock.temperatures)
    noised = [s.add_noise(sample, s.timesteps[1], generator=g) for s, g in zip((ours, stock), generators, strict=True)]
    assert torch.equal(*noised)
    x, y = noised
    for t in ours.timesteps:
        logits = logits_of(int(t), B, K, H, W, dtype=dtype)
        found = ours.step(logits, t, x, 0.9, generator=generators[0])
        expected = stock.step(logits, t, y, 0.9, generator=generators[1])
        if dtype == torch.float32:  # in 16 bits stock rounds the probabilities, from which it then draws
            assert torch.equal(found.pred_original_sample, expected.pred_original_sample)
            assert torch.equal(found.prev_sample, expected.prev_sample)
        x, y = found.prev_sample, expected.prev_sample
        assert int((x == K).sum()) == int((y == K).sum()) or dtype != torch.float32
    assert x.shape == (B, H, W) and (x < K).all()


@pytest.mark.parametrize("name", NAMES)
def test_configs_and_signatures_are_diffusers_own(name, tmp_path):
    made = getattr(mk.schedulers, name)(**NAMES[name])
    made.save_pretrained(tmp_path)
    assert getattr(mk.schedulers, name).from_pretrained(tmp_path).config == made.config
    assert made.order == 1
    with pytest.raises(FileNotFoundError, match="folder must hold"):
        getattr(mk.schedulers, name).from_pretrained(tmp_path / "nowhere")
    diffusers = pytest.importorskip("diffusers")
    stock = getattr(diffusers, name).from_pretrained(tmp_path)
    assert {n: v for n, v in stock.config.items() if not n.startswith("_")} == made.config
    assert getattr(mk.schedulers, name).from_config(dict(stock.config)).config == made.config
    for method in ("__init__", "set_timesteps", "step", *(["add_noise"] if name == "AmusedScheduler" else [])):
        ours, theirs = (inspect.signature(getattr(c, method)).parameters for c in (type(made), type(stock)))
        assert {n: p.default for n, p in ours.items()} == {n: p.default for n, p in theirs.items()}


def test_philox_draws_no_noise_of_the_logits_size():
    """The same run whatever the batch around it is not asked of one key; the same from the same seed is."""
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        scheduler = mk.schedulers.VQDiffusionScheduler.from_config({"num_vec_classes": 20}, noise="philox")
        scheduler.set_timesteps(10)
        x, seen = torch.full((2, 30), 19), set()
        for t in scheduler.timesteps:
            x = scheduler.step(logits_of(int(t), 2, 19, 30), t, x).prev_sample
            seen.add(tuple(x.flatten().tolist()))
        runs.append(x)
        assert len(seen) > 5 and (x < 19).all()
    assert torch.equal(*runs)
    amused = mk.schedulers.AmusedScheduler.from_config({"mask_token_id": 19}, noise="philox")
    amused.set_timesteps(6, temperature=1.5)
    x = torch.full((2, 30), 19)
    for t in amused.timesteps:
        x = amused.step(logits_of(int(t), 2, 30, 19), t, x, return_dict=False)[0]
    assert (x < 19).all()


def test_bad_input():
    amused = mk.schedulers.AmusedScheduler(5)
    with pytest.raises(ValueError, match="call set_timesteps before step"):
        amused.step(torch.zeros(1, 2, 5), 0, torch.full((1, 2), 5))
    with pytest.raises(ValueError, match="masking_schedule must be one of cosine, linear, got 'sine'"):
        mk.schedulers.AmusedScheduler(5, "sine")
    with pytest.raises(ValueError, match="noise must be one of torch, philox, got 'cuda'"):
        amused.use_noise("cuda")
    with pytest.raises(ValueError, match=r"step must be in \[0, 100\), got 100"):
        mk.schedulers.VQDiffusionScheduler(6).step(torch.zeros(1, 5, 2), 100, torch.full((1, 2), 5))
