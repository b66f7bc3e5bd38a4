import math
from dataclasses import replace

import pytest
import torch

from mmgen import presets
from mmgen.evaluation.codes import Bigram, bits_per_code, encoded, entropy
from mmgen.presets import CodeExperiment, Experiment
from mmgen.tasks.codes import read_model
from mmgen.tasks.train import code_trainer, read_tokenizer, train, train_codes
from mmgen.training import checkpoint, log

CPU = torch.device("cpu")
KINDS = ["causal", "diffusion", "mask_and_replace"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """The folder of a tokenizer that has seen a little."""
    torch.set_num_threads(1)
    preset = presets.unseen_photographs()
    experiment = Experiment(
        replace(preset.data, image_size=16),
        replace(preset.model, channels=(8, 16), codebook_size=32, codebook_dim=4),
        replace(preset.training, steps=25, batch_size=4, warmup_steps=5, checkpoint_every=25, eval_every=25),
    )
    folder = tmp_path_factory.mktemp("tokenizer")
    train(experiment, folder, device=CPU)
    return folder


def tiny(kind: str, **training) -> CodeExperiment:
    data, vqvae = replace(presets.unseen_photographs().data, image_size=16), read_settings()
    preset = presets.codes(kind, data, vqvae)
    training = {"steps": 20, "batch_size": 4, "warmup_steps": 2, "log_every": 5, "eval_every": 10, "checkpoint_every": 5} | training
    return replace(
        preset,
        model=replace(preset.model, hidden_size=32, depth=2, num_heads=2),
        training=replace(preset.training, **training),
    )


def read_settings():
    return replace(presets.unseen_photographs().model, channels=(8, 16), codebook_size=32, codebook_dim=4)


def untimed(folder):
    return [{k: v for k, v in record.items() if k != "step_seconds"} for record in log.read(folder / "log.jsonl")]


@pytest.mark.parametrize("kind", KINDS)
def test_resuming_changes_no_bit(tmp_path, tokenizer, kind):
    whole = train_codes(tiny(kind), tokenizer, tmp_path / "whole", device=CPU)
    code_trainer(tiny(kind), tokenizer, tmp_path / "cut", CPU).run(until=10)
    torch.manual_seed(12345)
    resumed = code_trainer(tiny(kind), tokenizer, tmp_path / "cut", CPU)
    assert resumed.step == 10
    resumed.run()
    for of_whole, of_resumed in ((whole.model, resumed.model), (whole.ema, resumed.ema), (whole.best, resumed.best)):
        for (name, p), (_, q) in zip(of_whole.state_dict().items(), of_resumed.state_dict().items(), strict=True):
            assert torch.equal(p, q), name
    assert untimed(whole.folder) == untimed(resumed.folder)
    assert [record["step"] for record in untimed(whole.folder)] == list(range(1, 21))


@pytest.mark.parametrize("kind", KINDS)
def test_training_learns_more_than_the_shares_of_codes(tmp_path, tokenizer, kind):
    """On the codes of the crops that it is trained on, far below what any model of single codes reaches."""
    short = {"steps": 150, "batch_size": 8, "learning_rate": 5e-3, "eval_every": 150, "checkpoint_every": 150}
    run = code_trainer(tiny(kind, **short), tokenizer, tmp_path, CPU)
    first = torch.stack([run.train[i] for i in range(8)])  # (B, C, H, W)
    run.train.items_per_epoch = 8  # eight crops again and again
    codes = run.tokenizer.encode(first).indices.flatten(1)  # (B, T)

    def bits_of(model):
        return bits_per_code(lambda x, k: run.nats(model, x, k), codes, key=torch.tensor([5, 0]), batch_size=8, replicates=20)

    assert bits_of(run.model).mean == pytest.approx(math.log2(32), abs=0.5)
    run.run()
    bits = bits_of(run.ema)
    assert bits.mean + 3 * bits.standard_error < entropy(codes, 32) - 0.5
    assert untimed(tmp_path)[-1]["held_out_bits"] == run.scores()["bits"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_best_step_on_held_out_pictures_is_kept(tmp_path, tokenizer, kind):
    """One crop again and again is learnt by heart, and the held-out pictures get worse by it: the best comes before the end."""
    short = {"steps": 40, "learning_rate": 2e-2, "ema_decay": 0.5, "eval_every": 5, "checkpoint_every": 5}
    run = code_trainer(tiny(kind, **short), tokenizer, tmp_path, CPU)
    run.train.items_per_epoch = 1
    run.run(until=25)
    cut = code_trainer(tiny(kind, **short), tokenizer, tmp_path, CPU)
    assert (cut.best_step, cut.best_bits) == (run.best_step, run.best_bits)
    cut.train.items_per_epoch = 1
    cut.run()
    scored = {record["step"]: record["held_out_bits"] for record in untimed(tmp_path) if "held_out_bits" in record}
    assert [*scored] == [*range(5, 41, 5)]
    assert cut.best_step == min(scored, key=scored.get) < 40
    assert cut.best_bits == scored[cut.best_step] == cut.held_out_bits(cut.best) < cut.held_out_bits(cut.ema) == scored[40]
    drawn_from, _, _ = read_model(checkpoint.latest(tmp_path / "checkpoints"))
    for (name, p), (_, q) in zip(cut.best.state_dict().items(), drawn_from.state_dict().items(), strict=True):
        assert torch.equal(p, q), name


def test_all_kinds_see_the_same_pictures(tmp_path, tokenizer):
    first, *others = (code_trainer(tiny(kind), tokenizer, tmp_path / kind, CPU) for kind in KINDS)
    for run in others:
        assert torch.equal(first.held_out, run.held_out)
        assert torch.equal(first.train[5], run.train[5])


def test_a_run_keeps_its_tokenizer_and_refuses_another(tmp_path, tokenizer):
    run = code_trainer(tiny("causal"), tokenizer, tmp_path / "run", CPU)
    run.run(until=5)
    kept, _, _ = read_tokenizer(tmp_path / "run" / "tokenizer", "--run")
    for (name, p), (_, q) in zip(kept.state_dict().items(), run.tokenizer.state_dict().items(), strict=True):
        assert torch.equal(p, q), name
    last = checkpoint.latest(tokenizer / "checkpoints")
    weights = checkpoint.read_weights(last)
    weights["quantize.embedding.weight"] += 0.1
    checkpoint.save(tmp_path / "other" / "checkpoints", 1, weights, checkpoint.read_config(last), {}, keep=1)
    with pytest.raises(ValueError, match=r"holds a run with other settings \(tokenizer.weights was"):
        code_trainer(tiny("causal"), tmp_path / "other", tmp_path / "run", CPU)


def test_a_run_goes_on_by_its_own_copy_of_the_tokenizer(tmp_path, tokenizer):
    """Where the tokenizer's run is gone the copy is all there is: it must outlive being named as the tokenizer."""
    code_trainer(tiny("causal"), tokenizer, tmp_path / "run", CPU).run(until=5)
    own = tmp_path / "run" / "tokenizer"
    assert train_codes(tiny("causal"), own, tmp_path / "run", device=CPU, until=10).step == 10
    read_tokenizer(own, "--run")
    with pytest.raises(ValueError, match="--out must be another folder than --tokenizer"):
        train_codes(tiny("causal"), own, own, device=CPU, resume=False)
    read_tokenizer(own, "--run")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["checkpoints", "log.jsonl", "tokenizer"]


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("mask_and_replace", "diffusion", "process.replaced was 0.2, now None"),
        ("diffusion", "mask_and_replace", "process.replaced was None, now 0.2"),
        ("causal", "diffusion", "process.num_timesteps was None, now 256"),
        ("diffusion", "causal", "process.num_timesteps was 256, now None"),
    ],
)
def test_a_run_of_another_kind_is_refused_by_name(tmp_path, tokenizer, before, after, message):
    code_trainer(tiny(before), tokenizer, tmp_path, CPU).run(until=5)
    with pytest.raises(ValueError, match=f"holds a run with other settings .*{message}"):
        code_trainer(tiny(after), tokenizer, tmp_path, CPU)


def test_before_the_first_score_the_latest_average_is_drawn_from(tmp_path, tokenizer):
    run = code_trainer(tiny("causal"), tokenizer, tmp_path, CPU)
    run.run(until=5)
    drawn_from, _, step = read_model(checkpoint.latest(tmp_path / "checkpoints"))
    assert step == 5
    for (name, p), (_, q) in zip(run.ema.state_dict().items(), drawn_from.state_dict().items(), strict=True):
        assert torch.equal(p, q), name


def test_a_number_that_is_not_finite_stops_the_run(tmp_path, tokenizer):
    run = code_trainer(tiny("diffusion"), tokenizer, tmp_path, CPU)
    run.model.final_layer.linear.bias.data[0] = torch.nan
    with pytest.raises(FloatingPointError, match=r"step 1: loss is nan.*final_layer.linear.bias"):
        run.run()


def test_what_holds_no_tokenizer_is_refused(tmp_path, tokenizer):
    with pytest.raises(FileNotFoundError, match="--tokenizer must be a folder that train has written to, got"):
        code_trainer(tiny("causal"), tmp_path, tmp_path / "run", CPU)
    code_trainer(tiny("causal"), tokenizer, tmp_path / "run", CPU).run(until=5)
    with pytest.raises(ValueError, match=r"--tokenizer must hold a VQ-VAE, got .* which holds another model"):
        read_tokenizer(tmp_path / "run", "--tokenizer")


def test_codes_are_those_of_the_pictures_in_order(tokenizer):
    vqvae, _, _ = read_tokenizer(tokenizer, "--tokenizer")
    images = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    codes = encoded(vqvae, list(images), batch_size=2, device=CPU)
    assert codes.shape == (5, 16)
    with torch.no_grad():
        assert torch.equal(codes[3].view(4, 4), vqvae.encode(images[3:4]).indices[0])


def test_bits_of_replicates_and_their_error():
    codes = torch.zeros(6, 10, dtype=torch.int64)
    drawn = iter([1.0, 2.0, 3.0, 5.0, 5.0, 8.0])  # batches of 4 and 2, three replicates
    key = torch.tensor([0, 0])
    bits = bits_per_code(lambda x, key: torch.full((len(x),), next(drawn)), codes, key=key, batch_size=4, replicates=3)
    means = torch.tensor([(4 * 1 + 2 * 2) / 6, (4 * 3 + 2 * 5) / 6, (4 * 5 + 2 * 8) / 6]) / (10 * math.log(2))
    assert bits.mean == pytest.approx(means.mean().item())
    assert bits.standard_error == pytest.approx((means.std() / 3**0.5).item())


def test_bits_of_replicates_are_drawn_by_keys_of_their_own():
    seen = []
    codes = torch.zeros(5, 1, dtype=torch.int64)
    bits_per_code(lambda x, key: seen.append(tuple(key.tolist())) or torch.ones(len(x)), codes, key=torch.tensor([0, 0]),
                  batch_size=2, replicates=4)  # fmt: skip
    assert len(seen) == len(set(seen)) == 12


def test_the_bigram_is_a_distribution_that_knows_pairs():
    torch.manual_seed(0)
    steps = torch.randint(0, 2, (200, 12)).cumsum(dim=1) % 5  # each code is the last one or the next
    model = Bigram(steps, 5)
    torch.testing.assert_close(model.after.sum(dim=1), torch.ones(6, dtype=torch.float64))
    assert model.after.min() > 0
    alone, paired = model.bits(torch.randint(0, 2, (50, 12)).cumsum(dim=1) % 5)
    assert alone == pytest.approx(math.log2(5), abs=0.15)
    assert paired == pytest.approx(1, abs=0.1)
    n, d = 200, 2  # of first codes: 0 or 1
    first = torch.bincount(steps[:, 0], minlength=5)
    torch.testing.assert_close(model.after[5], (first + d * model.alone) / (n + d))


def test_entropy_is_that_of_the_shares():
    assert entropy(torch.tensor([[0, 1], [2, 3]]), 9) == pytest.approx(2)
    assert entropy(torch.tensor([[4, 4, 4, 1]]), 5) == pytest.approx(-0.75 * math.log2(0.75) + 0.5)
