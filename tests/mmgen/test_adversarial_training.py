from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from mmgen import presets
from mmgen.models import PatchDiscriminator
from mmgen.models.vqgan import GradientPyramid
from mmgen.tasks.train import trainer, vae_trainer
from mmgen.training import AdversarialTrainer, VQGANTrainer, checkpoint, log

CPU = torch.device("cpu")
TIMES = ("quantizer_ms", "step_seconds")
START, WARMUP = 10, 4


def small(kind: str):
    """A VQGAN or a KL autoencoder of the photographs at a size where a step takes milliseconds."""
    preset = presets.AUTOENCODERS[kind](presets.photographs())
    size = {"codebook_size": 64, "codebook_dim": 4} if kind == "vqgan" else {"latent_channels": 2}
    steps = {"steps": 20, "batch_size": 2, "warmup_steps": 2, "log_every": 5, "eval_every": 10, "checkpoint_every": 6}
    return replace(
        preset,
        data=replace(preset.data, image_size=16),
        model=replace(preset.model, channels=(8, 16), **size),
        training=replace(preset.training, disc_start=START, disc_warmup=WARMUP, disc_channels=8, disc_layers=1, **steps),
    )


def start(kind: str, folder: Path, **training) -> AdversarialTrainer:
    experiment = small(kind)
    experiment = replace(experiment, training=replace(experiment.training, **training))
    return trainer(experiment, folder, CPU) if kind == "vqgan" else vae_trainer(experiment, folder, CPU)


def untimed(folder: Path) -> list[dict]:
    return [{k: v for k, v in record.items() if k not in TIMES} for record in log.read(folder / "log.jsonl")]


def tensors(run: AdversarialTrainer) -> dict[str, torch.Tensor]:
    """All that a run carries from step to step."""
    found = {f"model.{name}": t for name, t in run.model.state_dict().items()}
    found |= {f"discriminator.{name}": t for name, t in run.discriminator.state_dict().items()}
    for which, optimizer in (("model", run.optimizer), ("discriminator", run.disc_optimizer)):
        for i, moments in optimizer.state_dict()["state"].items():
            found |= {f"{which}.{i}.{name}": t for name, t in moments.items()}
    return found


def batch(run: AdversarialTrainer, size: int = 2) -> torch.Tensor:
    return torch.stack([run.data.train[i] for i in range(size)])


@pytest.fixture(params=["vqgan", "vae"])
def kind(request) -> str:
    return request.param


@pytest.mark.parametrize("cut", [6, 12])  # before the discriminator learns, and amid the game
def test_resuming_changes_no_bit(tmp_path, kind, cut):
    whole = start(kind, tmp_path / "whole")
    whole.run()
    start(kind, tmp_path / "cut").run(until=cut)
    torch.manual_seed(12345)
    resumed = start(kind, tmp_path / "cut")
    assert resumed.step == cut
    resumed.run()
    a, b = tensors(whole), tensors(resumed)
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
    assert [record["step"] for record in untimed(tmp_path / "whole")] == list(range(1, 21))
    assert untimed(tmp_path / "whole") == untimed(tmp_path / "cut")


def test_the_discriminator_learns_before_it_is_heard(tmp_path, kind):
    run = start(kind, tmp_path)
    fresh = {name: p.clone() for name, p in run.discriminator.state_dict().items()}
    run.run(until=START - WARMUP)
    assert all(torch.equal(p, fresh[name]) for name, p in run.discriminator.state_dict().items())
    run.run()
    # The last bias may stand still: while no score is beyond a hinge, real and fake pull it apart equally.
    moved = {name for name, p in run.discriminator.state_dict().items() if not torch.equal(p, fresh[name])}
    assert moved >= {name for name in fresh if name.endswith("weight")}
    for record in untimed(tmp_path):
        taken = record["step"] - 1  # steps before this one
        assert (record["adaptive_weight"] > 0) == (taken >= START), record
        assert (record["adversarial"] != 0) == (taken >= START), record
        assert (record["disc_loss"] > 0) == (taken >= START - WARMUP), record
        assert (record["disc_grad_norm"] > 0) == (taken >= START - WARMUP), record


def test_what_is_heard_changes_the_autoencoder_from_its_first_step_on(tmp_path, kind):
    heard, unheard = start(kind, tmp_path / "a"), start(kind, tmp_path / "b", disc_weight=0.0)
    for until, same in ((START, True), (START + 1, False)):
        for run in (heard, unheard):
            run.run(until=until)
        assert torch.equal(heard.model.last_layer, unheard.model.last_layer) == same
    assert all(record["disc_loss"] == record["adaptive_weight"] == 0 for record in untimed(tmp_path / "b"))


def reference_step(run: AdversarialTrainer, image: torch.Tensor) -> tuple[dict[str, torch.Tensor], float]:
    """Gradients of all parameters, and the weight, by the loss as the paper writes it, which passes the discriminator twice."""
    config = run.config
    out = run.model(image) if isinstance(run, VQGANTrainer) else run.model(image, torch.tensor([9, 9]))
    similarity = F.l1_loss(out.image, image) + config.perceptual_weight * GradientPyramid()(out.image, image)
    adversarial = -run.discriminator(out.image).mean()
    norms = [
        torch.autograd.grad(part, run.model.decoder.conv_out.weight, retain_graph=True)[0].norm()
        for part in (similarity, adversarial)
    ]
    weight = (norms[0] / (norms[1] + 1e-6)).clamp(0, 1e4).detach()
    loss = similarity + regularizer(run, out, image) + config.disc_weight * weight * adversarial
    names, parameters = zip(*run.model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True)), weight.item()


def regularizer(run: AdversarialTrainer, out, image: torch.Tensor) -> torch.Tensor:
    return out.vq_loss if isinstance(run, VQGANTrainer) else run.config.kl_weight * out.posterior.kl().mean() / image[0].numel()


def test_the_gradient_is_that_of_the_loss_and_leaves_the_discriminator_alone(tmp_path, kind):
    run = start(kind, tmp_path, kl_weight=1.0) if kind == "vae" else start(kind, tmp_path)
    run.run(until=START + 2)
    run.discriminator.zero_grad(set_to_none=True)
    image = batch(run)
    expected, weight = reference_step(run, image)
    out = run.model(image) if kind == "vqgan" else run.model(image, torch.tensor([9, 9]))
    loss, parts = run.loss(image, out.image, regularizer(run, out, image))
    assert parts["adaptive_weight"].item() == pytest.approx(weight, rel=1e-4)
    run.model.zero_grad()
    loss.backward()
    for name, p in run.model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], atol=1e-6, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}")
    assert all(p.grad is None for p in run.discriminator.parameters())
    judged = run.config.disc_weight * weight * parts["adversarial"]
    whole = parts["reconstruction"] + parts["perceptual"] + regularizer(run, out, image) + judged
    torch.testing.assert_close(parts["loss"], whole.detach())


def test_the_discriminator_is_taught_by_its_own_loss_alone(tmp_path, kind):
    run = start(kind, tmp_path)
    run.run(until=START + 2)
    image, fake = batch(run), torch.rand(2, 3, 16, 16) * 2 - 1
    copy = PatchDiscriminator(run.discriminator.config)
    copy.load_state_dict(run.discriminator.state_dict())
    real_scores, fake_scores = copy(image), copy(fake)
    hinge = (F.relu(1 - real_scores).mean() + F.relu(1 + fake_scores).mean()) / 2
    hinge.backward()
    before = {name: p.clone() for name, p in run.model.state_dict().items()}
    measures = run.discriminator_step(image, fake, run.step)
    assert measures["disc_loss"].item() == pytest.approx(hinge.item())
    assert measures["logits_real"].item() == pytest.approx(real_scores.mean().item(), abs=1e-6)
    norm = torch.cat([p.grad.flatten() for p in copy.parameters()]).norm()
    assert measures["disc_grad_norm"].item() == pytest.approx(norm.item(), rel=1e-4)
    for p, q in zip(run.discriminator.parameters(), copy.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad * min(1.0, run.config.grad_clip / norm.item()), atol=1e-6, rtol=1e-3)
    assert all(torch.equal(p, before[name]) for name, p in run.model.state_dict().items())


def test_a_vqgan_starts_as_the_vq_vae_of_its_seed(tmp_path):
    experiment = small("vqgan")
    steps = {name: getattr(experiment.training, name) for name in ("steps", "batch_size")}
    plain = presets.Experiment(experiment.data, experiment.model, replace(presets.photographs().training, **steps))
    a, b = (trainer(e, tmp_path / name, CPU) for e, name in ((experiment, "a"), (plain, "b")))
    assert all(torch.equal(p, q) for p, q in zip(a.model.parameters(), b.model.parameters(), strict=True))


def test_any_callable_is_a_perceptual_loss(tmp_path):
    experiment = small("vqgan")
    plain = trainer(experiment, tmp_path / "a", CPU)
    seen = []

    def blind(reconstruction, image):
        seen.append(reconstruction.shape)
        return 0 * reconstruction.sum() + 7

    options = {"settings": experiment.settings, "device": CPU, "perceptual": blind}
    run = VQGANTrainer(plain.model, plain.data, experiment.training, tmp_path / "b", **options)
    run.run(until=1)
    assert seen == [(2, 3, 16, 16)]
    assert log.read(tmp_path / "b" / "log.jsonl")[0]["perceptual"] == 7


@pytest.mark.parametrize(("kind", "usage"), [("vqgan", True), ("vae", False)])
def test_training_learns_and_is_told_of(tmp_path, kind, usage):
    experiment = small(kind)
    longer = {"steps": 120, "disc_start": 60, "disc_warmup": 20, "batch_size": 8, "eval_every": 60, "checkpoint_every": 120}
    experiment = replace(experiment, training=replace(experiment.training, **longer))
    run = trainer(experiment, tmp_path, CPU) if kind == "vqgan" else vae_trainer(experiment, tmp_path, CPU)
    at_first = run.scores()["psnr"]
    run.run()
    records = log.read(tmp_path / "log.jsonl")
    disc_losses = [sum(r["disc_loss"] for r in part) / 10 for part in (records[40:50], records[-10:])]
    assert disc_losses[1] < disc_losses[0]  # it tells the two apart better than at first
    assert all(r["logits_real"] > r["logits_fake"] for r in records[-10:])
    held_out = [r for r in records if "held_out_psnr" in r]
    assert [r["step"] for r in held_out] == [60, 120]
    assert all(r["held_out_psnr"] > at_first + 2 for r in held_out)  # dB; the game does not undo what was learnt before it
    assert ("held_out_perplexity" in held_out[0]) == ("window_usage" in records[0]) == usage


def test_the_variance_of_the_latents_is_followed_and_kept(tmp_path):
    run = start("vae", tmp_path)
    seen = []
    follow = run.follow
    run.follow = lambda latents: (seen.append(latents.var().item()), follow(latents))
    run.run(until=6)
    expected = 1.0
    for step, variance in enumerate(seen, 1):
        decay = min(0.99, step / (step + 10))
        expected = decay * expected + (1 - decay) * variance
    assert run.model.latent_variance.item() == pytest.approx(expected, rel=1e-5)
    assert run.model.scaling_factor.item() == pytest.approx(expected**-0.5, rel=1e-5)
    saved = checkpoint.read_weights(checkpoint.latest(tmp_path / "checkpoints"))
    assert torch.equal(saved["latent_variance"], run.model.latent_variance)
    assert log.read(tmp_path / "log.jsonl")[-1]["scaling_factor"] == pytest.approx(expected**-0.5, rel=1e-5)


def test_a_number_that_is_not_finite_in_the_discriminator_stops_the_run_and_is_named(tmp_path, kind):
    run = start(kind, tmp_path)
    run.run(until=12)
    run.discriminator.main[0].weight.data[0, 0, 0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match=r"step 13: .*disc_loss is nan.*discriminator.main.0.weight.*step-00000012"):
        run.run()
    assert start(kind, tmp_path).step == 12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"disc_start": 20}, "--disc-start must be below --steps, 20, or --disc-weight 0 for no discriminator, got 20"),
        ({"disc_weight": -1.0}, "--disc-weight must be 0 or more, got -1.0"),
        ({"perceptual_weight": float("nan")}, "--perceptual-weight must be 0 or more, got nan"),
        ({"kl_weight": -1.0}, "--kl-weight must be 0 or more, got -1.0"),
        ({"disc_learning_rate": 0.0}, "--disc-learning-rate must be positive, got 0.0"),
        ({"variance_decay": 1.0}, r"variance_decay must be in \[0, 1\), got 1.0"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        replace(small("vae").training, **options)
