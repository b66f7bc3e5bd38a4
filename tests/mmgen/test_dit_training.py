import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import mmgen_kernels as mk
from mmgen.diffusion import sample
from mmgen.models import DiT
from mmgen.tasks.train import dit_trainer, train_dit
from mmgen.training import checkpoint, log

CPU = torch.device("cpu")
TARGETS = [{"target": "flow"}, {"target": "epsilon", "times": "uniform"}, {"target": "v", "times": "uniform"}]


def untimed(folder: Path) -> list[dict]:
    return [{k: v for k, v in record.items() if k != "step_seconds"} for record in log.read(folder / "log.jsonl")]


def require_same_bits(a, b) -> None:
    for of_a, of_b in ((a.model, b.model), (a.ema, b.ema)):
        for (name, p), (_, q) in zip(of_a.state_dict().items(), of_b.state_dict().items(), strict=True):
            assert torch.equal(p, q), name
    moments_a, moments_b = a.optimizer.state_dict()["state"], b.optimizer.state_dict()["state"]
    for i in moments_a:
        assert all(torch.equal(moments_a[i][k], moments_b[i][k]) for k in moments_a[i]), i
    assert [record["step"] for record in untimed(a.folder)] == list(range(1, a.config.steps + 1))
    assert untimed(a.folder) == untimed(b.folder)


@pytest.mark.parametrize("objective", TARGETS)
def test_resuming_changes_no_bit(tmp_path, tiny_dit, objective):
    tiny_dit = replace(tiny_dit, objective=replace(tiny_dit.objective, **objective))
    whole = train_dit(tiny_dit, tmp_path / "whole", device=CPU)
    dit_trainer(tiny_dit, tmp_path / "cut", CPU).run(until=10)
    torch.manual_seed(12345)
    resumed = dit_trainer(tiny_dit, tmp_path / "cut", CPU)
    assert resumed.step == 10
    resumed.run()
    require_same_bits(whole, resumed)


def test_an_interrupted_run_goes_on(tmp_path, tiny_dit):
    whole = train_dit(tiny_dit, tmp_path / "whole", device=CPU)
    run = dit_trainer(tiny_dit, tmp_path / "cut", CPU)
    step = run.metrics_of_step

    def interrupt_at_seven(*batch):
        metrics = step(*batch)
        if run.step == 7:
            os.kill(os.getpid(), signal.SIGINT)
        return metrics

    run.metrics_of_step = interrupt_at_seven
    with pytest.raises(KeyboardInterrupt):
        run.run()
    resumed = dit_trainer(tiny_dit, tmp_path / "cut", CPU)
    assert resumed.step == 7
    resumed.run()
    require_same_bits(whole, resumed)


def test_another_seed_does_change_them(tmp_path, tiny_dit):
    a = train_dit(tiny_dit, tmp_path / "a", device=CPU)
    b = train_dit(replace(tiny_dit, training=replace(tiny_dit.training, seed=1)), tmp_path / "b", device=CPU)
    assert not torch.equal(a.ema.x_embedder.proj.weight, b.ema.x_embedder.proj.weight)


@pytest.mark.parametrize("objective", TARGETS)
def test_training_learns(tmp_path, tiny_dit, objective):
    tiny_dit = replace(
        tiny_dit,
        objective=replace(tiny_dit.objective, **objective),
        training=replace(tiny_dit.training, steps=120, batch_size=32, eval_every=60, checkpoint_every=120, log_every=60),
    )
    run = train_dit(tiny_dit, tmp_path, device=CPU)
    records = untimed(tmp_path)
    first, last = (sum(r["loss"] for r in part) / 10 for part in (records[:10], records[-10:]))
    assert last < 0.7 * first
    held_out = [record["held_out_loss"] for record in records if "held_out_loss" in record]
    assert len(held_out) == 2
    assert held_out[1] < held_out[0] < first
    assert run.scores()["loss"] == held_out[1]


def test_the_average_follows_the_model_and_is_what_a_checkpoint_holds_besides(tmp_path, tiny_dit):
    run = dit_trainer(tiny_dit, tmp_path, CPU)
    assert all(torch.equal(p, q) for p, q in zip(run.model.parameters(), run.ema.parameters(), strict=True))
    expected = {name: p.detach().double().clone() for name, p in run.model.named_parameters()}
    for step in range(1, 4):
        run.run(until=step)
        for name, p in run.model.named_parameters():
            expected[name] += (1 - step / (step + 10)) * (p.detach() - expected[name])
    for name, p in run.ema.named_parameters():
        torch.testing.assert_close(p.double(), expected[name], atol=1e-6, rtol=1e-5)
    assert not any(p.requires_grad for p in run.ema.parameters()) and not run.ema.training
    saved = checkpoint.read_state(checkpoint.latest(tmp_path / "checkpoints"))["ema"]
    assert all(torch.equal(saved[name], tensor) for name, tensor in run.ema.state_dict().items())


def test_a_number_that_is_not_finite_stops_the_run_and_is_named(tmp_path, tiny_dit):
    run = dit_trainer(tiny_dit, tmp_path, CPU)
    run.run(until=10)
    run.model.final_layer.linear.weight.data[0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match=r"step 11: loss is nan.*final_layer.linear.weight.*step-00000010"):
        run.run()
    assert dit_trainer(tiny_dit, tmp_path, CPU).step == 10


def test_other_settings_are_refused_by_name(tmp_path, tiny_dit):
    dit_trainer(tiny_dit, tmp_path, CPU).run(until=5)
    other = replace(tiny_dit, objective=replace(tiny_dit.objective, times="uniform"))
    with pytest.raises(ValueError, match=r"objective.times was 'logit_normal', now 'uniform'"):
        dit_trainer(other, tmp_path, CPU)


def test_sampling_is_a_function_of_its_key(tiny_dit):
    torch.manual_seed(0)
    model = DiT(tiny_dit.model).eval()
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    labels = torch.arange(6)

    def draw(key: int, guidance_scale: float = 2.0) -> torch.Tensor:
        options = {"key": torch.tensor([key, 0]), "guidance_scale": guidance_scale}
        return sample(model, labels, tiny_dit.objective.scheduler, 4, **options)

    a = draw(0)
    torch.rand(3)
    assert torch.equal(a, draw(0))
    assert (a - draw(1)).abs().amax(dim=(1, 2, 3)).min() > 0.1
    assert (a - draw(0, guidance_scale=1.0)).abs().max() > 1e-3
    with mk.use_backend("reference"):
        torch.testing.assert_close(draw(0), a, atol=1e-3, rtol=1e-3)
