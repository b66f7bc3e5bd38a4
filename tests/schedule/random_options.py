"""Options that several scheduler classes share, drawn at random: betas, spacing, clipping, what a run is given."""

BETAS = (
    {},
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"beta_start": 0.0005, "beta_end": 0.03},
)


def training(rng, *more, counts=(40, 100, 1000)):
    """Betas and what goes with them."""
    count = rng.choice(counts)
    config = dict(rng.choice(BETAS + more)) | {"num_train_timesteps": count}
    if rng.random() < 0.1:
        config["trained_betas"] = [0.001 + 0.019 * (j / count) ** 1.5 for j in range(count)]
    return config | {"rescale_betas_zero_snr": rng.random() < 0.2}


def spaced(rng):
    return {"timestep_spacing": rng.choice(("linspace", "leading", "trailing")), "steps_offset": rng.choice((0, 0, 1))}


def clipping(rng):
    config = {"clip_sample": rng.random() < 0.5, "clip_sample_range": rng.choice((0.5, 1.0, 2.0))}
    return config | thresholding(rng)


def thresholding(rng):
    return {
        "thresholding": rng.random() < 0.25,
        "dynamic_thresholding_ratio": rng.choice((0.8, 0.95, 0.995)),
        "sample_max_value": rng.choice((1.0, 1.5, 3.0)),
    }


def visible(config):
    """A zero terminal SNR asks for another prediction than epsilon."""
    if config["rescale_betas_zero_snr"] and config["prediction_type"] == "epsilon":
        config["prediction_type"] = "v_prediction"
    return config


def respacing(rng, *more):
    """None half of the time, else one of the ways to space the levels."""
    names = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", *more)
    return {rng.choice(names): True} if rng.random() < 0.5 else {}


def descending(rng, low, high, count):
    return sorted(rng.sample(range(low, high), count), reverse=True)


def steps(rng):
    return {"num_inference_steps": rng.randint(2, 12)}


def late(rng, run, count):
    """Sometimes a run that begins after its first step."""
    return run | {"begin": rng.randrange(1, count)} if count > 1 and rng.random() < 0.15 else run
