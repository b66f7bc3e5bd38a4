import json
import multiprocessing
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mmgen.presets import Experiment
from mmgen.tasks.train import train, trainer
from mmgen.training import checkpoint, log
from mmgen.training.stopwatch import Stopwatch
from mmgen.training.vqvae import fingerprint

CPU = torch.device("cpu")
TIMES = ("quantizer_ms", "step_seconds")


def untimed(path: Path) -> list[dict]:
    return [{k: v for k, v in record.items() if k not in TIMES} for record in log.read(path)]


def require_same_bits(a, b, folder_a: Path, folder_b: Path) -> None:
    for (name, p), (_, q) in zip(a.model.state_dict().items(), b.model.state_dict().items(), strict=True):
        assert torch.equal(p, q), name
    moments_a, moments_b = a.optimizer.state_dict()["state"], b.optimizer.state_dict()["state"]
    assert moments_a.keys() == moments_b.keys()
    for i in moments_a:
        assert all(torch.equal(moments_a[i][k], moments_b[i][k]) for k in moments_a[i]), i
    assert torch.equal(a.window_counts, b.window_counts)
    records = untimed(folder_a / "log.jsonl")
    assert [record["step"] for record in records] == list(range(1, a.config.steps + 1))
    assert records == untimed(folder_b / "log.jsonl")


@pytest.mark.parametrize("quantizer", ["stock", "fused"])
def test_resuming_changes_no_bit(tmp_path, tiny, quantizer):
    tiny = replace(tiny, model=replace(tiny.model, quantizer=quantizer))
    whole = train(tiny, tmp_path / "whole", device=CPU)
    rng = torch.get_rng_state()
    trainer(tiny, tmp_path / "cut", CPU).run(until=10)
    torch.manual_seed(12345)
    resumed = trainer(tiny, tmp_path / "cut", CPU)
    assert resumed.step == 10
    resumed.run()
    require_same_bits(whole, resumed, tmp_path / "whole", tmp_path / "cut")
    assert torch.equal(torch.get_rng_state(), rng)


def test_another_seed_does_change_them(tmp_path, tiny):
    a = train(tiny, tmp_path / "a", device=CPU)
    b = train(replace(tiny, training=replace(tiny.training, seed=1)), tmp_path / "b", device=CPU)
    assert not torch.equal(a.model.encoder.conv_in.weight, b.model.encoder.conv_in.weight)


def train_one_threaded(experiment: Experiment, folder: Path) -> None:
    torch.set_num_threads(1)
    train(experiment, folder, device=CPU)


def start_and_wait_for_checkpoint(experiment: Experiment, folder: Path) -> multiprocessing.Process:
    process = multiprocessing.get_context("fork").Process(target=train_one_threaded, args=(experiment, folder))
    process.start()
    deadline = time.monotonic() + 60
    while checkpoint.latest(folder / "checkpoints") is None and time.monotonic() < deadline:
        time.sleep(0.005)
    return process


def long_enough_to_be_caught(tiny: Experiment) -> Experiment:
    return replace(tiny, training=replace(tiny.training, steps=30, checkpoint_every=1))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_run_goes_on_as_if_nothing_had_been(tmp_path, tiny, number):
    tiny = long_enough_to_be_caught(tiny)
    whole = train(tiny, tmp_path / "whole", device=CPU)
    process = start_and_wait_for_checkpoint(tiny, tmp_path / "cut")
    os.kill(process.pid, number)
    process.join()
    resumed = trainer(tiny, tmp_path / "cut", CPU)
    assert 1 <= resumed.step < 30
    resumed.run()
    require_same_bits(whole, resumed, tmp_path / "whole", tmp_path / "cut")


def test_an_interruption_saves_the_step_it_is_at(tmp_path, tiny):
    run = trainer(tiny, tmp_path, CPU)
    step = run._train_step

    def interrupt_at_seven(image):
        metrics = step(image)
        if run.step == 7:
            os.kill(os.getpid(), signal.SIGINT)
        return metrics

    run._train_step = interrupt_at_seven
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run.run()
    assert signal.getsignal(signal.SIGINT) is before
    assert trainer(tiny, tmp_path, CPU).step == 7


def test_an_interruption_while_the_last_step_is_saved_is_one(tmp_path, tiny):
    """Else the next run of a comparison would begin."""
    run = trainer(tiny, tmp_path, CPU)
    save = run._save

    def interrupted_save():
        save()
        if run.step == run.config.steps:
            os.kill(os.getpid(), signal.SIGINT)

    run._save = interrupted_save
    with pytest.raises(KeyboardInterrupt):
        run.run()
    assert trainer(tiny, tmp_path, CPU).step == run.config.steps


def test_a_finished_run_is_left_as_it_is(tmp_path, tiny):
    train(tiny, tmp_path, device=CPU)
    before = (tmp_path / "log.jsonl").read_text()
    train(tiny, tmp_path, device=CPU)
    assert (tmp_path / "log.jsonl").read_text() == before


def test_other_settings_are_refused_by_name_and_no_resume_starts_over(tmp_path, tiny):
    trainer(tiny, tmp_path, CPU).run(until=5)
    other = replace(tiny, training=replace(tiny.training, batch_size=3))
    with pytest.raises(ValueError, match=r"--out .* other settings \(training.batch_size was 2, now 3\)"):
        trainer(other, tmp_path, CPU)
    assert train(other, tmp_path, device=CPU, resume=False).step == 20


def test_the_log_forgets_what_the_checkpoint_does_not_know(tmp_path):
    path = tmp_path / "log.jsonl"
    log.append(path, [{"step": step} for step in range(1, 8)])
    with path.open("a") as file:
        file.write('{"step": 8, "lo')  # a kill amid a line
    assert [record["step"] for record in log.read(path)] == list(range(1, 8))
    log.rewind(path, 5)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("name", ["decoder.conv_in.weight", "encoder.conv_in.bias"])
def test_a_number_that_is_not_finite_stops_the_run_and_is_named(tmp_path, tiny, name):
    run = trainer(tiny, tmp_path, CPU)
    run.run(until=10)
    run.model.get_parameter(name).data.view(-1)[0] = torch.nan
    with pytest.raises(FloatingPointError, match=f"step 11: reconstruction is nan.*{name}.*step-00000010"):
        run.run()
    assert trainer(tiny, tmp_path, CPU).step == 10


class NoHostSync(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function is not torch.ops.aten._local_scalar_dense.default, "a value was read back from the device"
        return function(*args, **(kwargs or {}))


def test_a_training_step_reads_nothing_back(tmp_path, tiny):
    run = trainer(tiny, tmp_path, CPU)
    image = torch.stack([run.data.train[i] for i in range(2)])
    with NoHostSync():
        for _ in range(4):  # the fourth revives codes
            run._train_step(image)
    with pytest.raises(AssertionError, match="read back"), NoHostSync():
        image.sum().item()


def test_the_log_counts_codes_by_batch_and_by_window(tmp_path, tiny):
    train(tiny, tmp_path, device=CPU)
    records = log.read(tmp_path / "log.jsonl")
    for record in records:
        alone = record["step"] % 4 == 1  # the first step of a window
        if alone:
            assert record["window_usage"] == record["batch_usage"]
            assert record["window_perplexity"] == record["batch_perplexity"]
        assert record["window_usage"] >= record["batch_usage"]
        assert 1 <= record["batch_perplexity"] <= 32
    assert [record["step"] for record in records if "held_out_psnr" in record] == [10, 20]


def test_codes_are_revived_until_they_are_left_in_peace(tmp_path, tiny, monkeypatch):
    run = trainer(tiny, tmp_path, CPU)
    revived_at = []

    def note(z, counts, turn):
        revived_at.append((run.step, counts.sum().item()))

    monkeypatch.setattr(run.model.quantize, "revive_", note)
    run.run()
    tokens = 4 * 2 * 16  # steps of a window, images, tokens of each
    assert revived_at == [(4, tokens), (8, tokens), (12, tokens), (16, tokens)]


def test_training_learns(tmp_path, tiny):
    longer = replace(tiny.training, steps=120, batch_size=8, eval_every=120, checkpoint_every=120)
    train(replace(tiny, training=longer), tmp_path, device=CPU)
    records = log.read(tmp_path / "log.jsonl")
    first, last = (sum(r["psnr"] for r in part) / 10 for part in (records[:10], records[-10:]))
    assert last > first + 3  # dB; 4.5 when this was written


def test_fingerprints_tell_single_indices_and_their_places():
    indices = torch.randint(0, 16384, (2, 16, 16), generator=torch.Generator().manual_seed(0))
    reference = fingerprint(indices).item()
    assert reference == fingerprint(indices.clone()).item()
    seen = {reference}
    for place in range(512):
        other = indices.clone()
        other.view(-1)[place] = (other.view(-1)[place] + 1) % 16384
        seen.add(fingerprint(other).item())
    seen.add(fingerprint(indices.flip(0)).item())
    assert len(seen) == 514
    assert int(float(reference)) == reference


class Ticking(torch.nn.Module):
    """Takes a known time: `forward` and `backward` of a clock that nothing else moves."""

    def __init__(self, clock: list[float], forward: float, backward: float):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3))

        class Tick(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                clock[0] += forward
                return x.clone()

            @staticmethod
            def backward(ctx, grad):
                clock[0] += backward
                return grad

        self.tick = Tick.apply

    def forward(self, x):
        return self.tick(x * self.tick(self.weight))


class Output(NamedTuple):
    values: torch.Tensor
    indices: torch.Tensor


class TickingPair(Ticking):
    """With several outputs, one of them integers, as a quantizer has."""

    def forward(self, x):
        return Output(super().forward(x), torch.arange(3))


def test_the_stopwatch_counts_its_module_and_nothing_else(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    before, module, after = Ticking(clock, 100, 1000), TickingPair(clock, 2, 0.5), Ticking(clock, 10000, 100000)
    stopwatch = Stopwatch(module, CPU)
    x = torch.ones(3)
    for _ in range(2):
        y, indices = module(before(x))
        (after(y).sum() + y.square().sum()).backward()
        assert indices.dtype == torch.int64
    with torch.no_grad():
        module(x)
    assert stopwatch.milliseconds() == [5000.0, 5000.0]
    assert stopwatch.milliseconds() == []
    torch.testing.assert_close(module.weight.grad, torch.full((3,), 2 * (1.0 + 2.0)))
