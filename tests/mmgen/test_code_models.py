import itertools
import math

import pytest
import torch

import mmgen_kernels as mk
from mmgen import presets
from mmgen.data import DataConfig
from mmgen.models import CodeDiffusion, CodeDiffusionConfig, CodeTransformer, CodeTransformerConfig, VQVAEConfig
from mmgen.models.code_transformer import Cache, choice

TINY = {"num_codes": 3, "grid_size": 2, "hidden_size": 16, "depth": 2, "num_heads": 2}
SMALL = {"num_codes": 7, "grid_size": 4, "hidden_size": 32, "depth": 3, "num_heads": 2}


def causal(config: dict = SMALL, seed: int = 0) -> CodeTransformer:
    """With weights so large that codes matter to each other."""
    torch.manual_seed(seed)
    model = CodeTransformer(CodeTransformerConfig(**config)).double().eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.4 if "table" in name else 0.3)
    return model


def keys(n: int, seed: int = 0) -> torch.Tensor:
    return mk.fold_in(torch.tensor([seed, 0]), torch.arange(n))


def all_pictures(num_codes: int, num_tokens: int) -> torch.Tensor:
    return torch.tensor(list(itertools.product(range(num_codes), repeat=num_tokens)))


def test_the_likelihoods_of_all_pictures_sum_to_one():
    model, pictures = causal(TINY), all_pictures(3, 4)
    with torch.no_grad():
        likelihood = (-model.nats(pictures)).exp()  # (81,)
    assert likelihood.sum().item() == pytest.approx(1, abs=1e-12)
    assert likelihood.max() > 3 * likelihood.min()  # not the uniform one, which would sum to one whatever the model does


def test_a_likelihood_is_the_product_of_what_is_said_place_by_place():
    model = causal()
    codes = torch.randint(7, (3, 16))
    with torch.no_grad():
        said = [model(codes[:, :i])[:, -1].log_softmax(dim=1).gather(1, codes[:, i : i + 1]) for i in range(16)]
        torch.testing.assert_close(model.nats(codes), -torch.cat(said, dim=1).sum(dim=1))


def test_no_place_sees_its_own_code_or_later_ones():
    model = causal()
    codes = torch.randint(7, (1, 16))
    with torch.no_grad():
        before = model(codes)
        for i in range(16):
            other = codes.clone()
            other[0, i:] = (other[0, i:] + 1) % 7
            after = model(other)
            assert torch.equal(before[:, : i + 1], after[:, : i + 1])
            assert i == 15 or (before - after)[:, i + 1 :].abs().amax(dim=2).min() > 1e-4


@pytest.mark.parametrize("given", [0, 5])
def test_the_cache_says_what_the_whole_pass_says(given):
    model = causal()
    codes = torch.randint(7, (2, 16))
    inputs = torch.cat([torch.full((2, 1), 7), codes[:, :-1]], dim=1)
    with torch.no_grad():
        whole, cache = model(codes), Cache(model.config, 2, model.head.weight)
        parts = [model.logits(inputs[:, : given + 1], cache)]
        parts += [model.logits(inputs[:, i : i + 1], cache) for i in range(given + 1, 16)]
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-12, rtol=1e-12)


def test_a_cache_that_is_begun_takes_one_place_at_a_time():
    model = causal()
    cache = Cache(model.config, 1, model.head.weight)
    with torch.no_grad():
        model.logits(torch.zeros(1, 3, dtype=torch.int64), cache)
        with pytest.raises(ValueError, match=r"inputs must be \(B, 1\) once the cache holds places, got \(1, 2\)"):
            model.logits(torch.zeros(1, 2, dtype=torch.int64), cache)


def test_pictures_are_drawn_as_often_as_they_are_likely():
    model, draws = causal(TINY), 4000
    drawn = model.sample(keys(draws))
    pictures = all_pictures(3, 4)
    with torch.no_grad():
        likelihood = (-model.nats(pictures)).exp()  # (81,)
    counts = (drawn[:, None] == pictures).all(dim=2).sum(dim=0)  # (81,)
    assert counts.sum() == draws
    chi_squared = ((counts - draws * likelihood) ** 2 / (draws * likelihood)).sum()
    assert chi_squared < 80 + 5 * math.sqrt(160)  # mean and deviation of 80 degrees of freedom
    uniform = ((counts - draws / 81) ** 2 / (draws / 81)).sum()
    assert uniform > 1000


def test_a_picture_depends_on_its_key_alone_and_begins_as_it_is_told():
    model = causal()
    together = model.sample(keys(5))
    assert torch.equal(model.sample(keys(5)[3:4]), together[3:4])
    assert len(together.unique(dim=0)) == 5
    start = torch.tensor([[1, 2, 3, 4, 5]]).expand(5, 5)
    begun = model.sample(keys(5), start=start)
    assert torch.equal(begun[:, :5], start) and len(begun.unique(dim=0)) == 5
    torch.testing.assert_close(model.sample(keys(1), temperature=0.0), model.sample(keys(1, seed=9), temperature=0.0))


def test_choices_follow_temperature_and_top_k():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0]).expand(20000, 4)
    for temperature in (0.5, 1.0, 2.0):
        shares = torch.bincount(choice(logits, keys(20000), temperature), minlength=4) / 20000
        torch.testing.assert_close(shares, (logits[0] / temperature).softmax(0), atol=0.015, rtol=0)
    shares = torch.bincount(choice(logits, keys(20000), top_k=2), minlength=4) / 20000
    assert shares[2:].sum() == 0 and shares[1].item() == pytest.approx(1 / (1 + math.e), abs=0.015)
    assert choice(logits[:5], keys(5), top_k=1).eq(0).all() and choice(logits[:5], keys(5), temperature=0).eq(0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature must not be negative, got -1.0"),
        ({"top_k": 0}, "top_k must be between 1 and 7, the codes, got 0"),
        ({"top_k": 8}, "top_k must be between 1 and 7, the codes, got 8"),
    ],
)
def test_choices_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        causal().sample(keys(1), **options)


def test_the_diffusion_model_sees_codes_places_and_times():
    torch.manual_seed(0)
    model = CodeDiffusion(CodeDiffusionConfig(**SMALL)).eval()
    codes, t = torch.full((2, 16), 7), torch.full((2,), 500.0)
    codes[:, 3] = 2
    assert torch.equal(model(codes, t), torch.zeros(2, 16, 7))  # of no opinion before training
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    said, other = model(codes, t)[0], codes.clone()
    assert torch.pdist(said).min() > 1e-4  # each place is told from the others
    other[:, 3] = 4
    assert (model(other, t)[0] - said).abs().amax(dim=1).min() > 1e-5  # every place sees place 3, before it or behind
    assert (model(codes, t / 2)[0] - said).abs().amax(dim=1).min() > 1e-5


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hidden_size": 24, "num_heads": 2}, "hidden_size must be a multiple of 8 times num_heads 2, got 24"),
        ({"num_codes": 0}, "num_codes must be at least 1, got 0"),
        ({"cond_dim": 0}, "cond_dim must be at least 1, got 0"),
    ],
)
def test_configurations_that_cannot_be_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        CodeDiffusionConfig(**config)


def test_codes_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"codes must be \(B, t\) with t at most 16, got \(1, 17\)"):
        causal()(torch.zeros(1, 17, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"codes must be \(B, 16\), got \(1, 15\)"):
        CodeDiffusion(CodeDiffusionConfig(**SMALL))(torch.zeros(1, 15, dtype=torch.int64), torch.zeros(1))


def test_the_two_presets_have_as_many_parameters():
    sizes = []
    for kind, model in (("causal", CodeTransformer), ("diffusion", CodeDiffusion)):
        config = presets.codes(kind, DataConfig("unseen-photographs"), VQVAEConfig(codebook_size=512)).model
        sizes.append(sum(p.numel() for p in model(config).parameters()))
    assert sizes[0] == pytest.approx(sizes[1], rel=0.01)
