"""Random configs and runs per scheduler class, in proportions that reach every option and the pairs of them."""

from random_options import clipping, descending, late, respacing, spaced, steps, thresholding, training, visible


def ddim(rng):
    config = training(rng) | spaced(rng) | clipping(rng) | {"set_alpha_to_one": rng.random() < 0.5}
    config = visible(config | {"prediction_type": rng.choice(("epsilon", "sample", "v_prediction"))})
    # with eta 1 and no signal left diffusers has the root of a rounding error, NaN or 1e-9, where the planner has 0
    most = 0.9 if config["rescale_betas_zero_snr"] else 1.0
    run = steps(rng) | {"eta": rng.choice((0.0, 0.0, 0.3, most)), "use_clipped_model_output": rng.random() < 0.3}
    return config, late(rng, run, run["num_inference_steps"])


def euler(rng):
    config = training(rng) | spaced(rng) | {"final_sigmas_type": rng.choice(("zero", "sigma_min"))}
    config |= {
        "prediction_type": rng.choice(("epsilon", "sample", "v_prediction")),
        "timestep_type": rng.choice(("discrete", "continuous")),
    }
    run = steps(rng)
    if rng.random() < 0.15:
        run = {"sigmas": [*sorted((rng.uniform(0.05, 12) for _ in range(6)), reverse=True), 0.0]}
    elif rng.random() < 0.15 and config["timestep_type"] == "discrete":
        run = {"timesteps": descending(rng, 0, config["num_train_timesteps"], 6)}
    else:
        config |= respacing(rng) | {"interpolation_type": rng.choice(("linear", "linear", "log_linear"))}
        if rng.random() < 0.3:
            config |= {"sigma_min": 0.02, "sigma_max": 20.0}
    if rng.random() < 0.4:
        run |= {
            "s_churn": rng.choice((0.5, 3.0, 40.0)),
            "s_tmin": rng.choice((0.0, 0.5)),
            "s_tmax": rng.choice((5.0, 1e9)),
            "s_noise": 1.003,
        }
    return config, late(rng, run, run.get("num_inference_steps", 6))


def ddpm(rng):
    config = training(rng, {"beta_schedule": "sigmoid"}, {"beta_schedule": "laplace"}) | spaced(rng) | clipping(rng)
    config = visible(config | {"prediction_type": rng.choice(("epsilon", "sample", "v_prediction"))})
    config["variance_type"] = rng.choice(("fixed_small", "fixed_small_log", "fixed_large", "learned_range"))
    run = {"timesteps": descending(rng, 0, config["num_train_timesteps"], 6)} if rng.random() < 0.2 else steps(rng)
    return config, late(rng, run, run.get("num_inference_steps", 6))


def euler_ancestral(rng):
    config = training(rng) | spaced(rng) | {"prediction_type": rng.choice(("epsilon", "v_prediction"))}
    run = steps(rng)
    return config, late(rng, run, run["num_inference_steps"])


def lcm(rng):
    config = training(rng) | clipping(rng) | {"set_alpha_to_one": rng.random() < 0.5}
    config = visible(config | {"prediction_type": rng.choice(("epsilon", "sample", "v_prediction"))})
    config |= {"original_inference_steps": rng.choice((20, 40)), "timestep_scaling": rng.choice((10.0, 1.0, 0.1))}
    run = {"strength": rng.choice((1.0, 1.0, 0.7, 0.5))}
    if rng.random() < 0.3:
        run["timesteps"] = descending(rng, 0, config["num_train_timesteps"], 6)
        return config, late(rng, run, int(6 * run["strength"]))
    run["num_inference_steps"] = rng.randint(1, 10)
    if rng.random() < 0.3:
        run["original_inference_steps"] = 30
    return config, late(rng, run, run["num_inference_steps"])


def tcd(rng):
    """Clipping stands in its config and is read by no step."""
    config, run = lcm(rng)
    return config, run | {"eta": rng.choice((0.0, 0.3, 0.3, 0.8, 1.0))}


def cogvideox(rng):
    config = training(rng) | spaced(rng) | {"set_alpha_to_one": rng.random() < 0.5, "clip_sample": rng.random() < 0.5}
    config = visible(config | {"prediction_type": rng.choice(("epsilon", "sample", "v_prediction"))})
    run = steps(rng)
    return config | {"snr_shift_scale": rng.choice((1.0, 3.0, 0.7))}, late(rng, run, run["num_inference_steps"])


def flow_match_heun(rng):
    config, run = {"num_train_timesteps": rng.choice((100, 1000)), "shift": rng.choice((1.0, 3.0, 0.5))}, steps(rng)
    if rng.random() < 0.5:
        run |= {"s_churn": rng.choice((0.5, 3.0, 40.0)), "s_tmin": rng.choice((0.0, 0.3)), "s_tmax": rng.choice((0.8, 1e9))}
        run["s_noise"] = rng.choice((1.0, 1.003))
    return config, late(rng, run, 2 * run["num_inference_steps"] - 1)


def flow_match_lcm(rng):
    config, run = flow_match(rng)
    del config["stochastic_sampling"]
    return config, run


def flow_match(rng):
    config = {"num_train_timesteps": rng.choice((100, 1000)), "invert_sigmas": rng.random() < 0.2}
    config |= respacing(rng) if rng.random() < 0.6 else {}
    config |= {"stochastic_sampling": rng.random() < 0.3, "time_shift_type": rng.choice(("exponential", "linear"))}
    config |= {"shift": rng.choice((1.0, 3.0, 0.5)), "shift_terminal": rng.choice((None, None, 0.1))}
    run = {"num_inference_steps": 6} if rng.random() < 0.3 else {}
    if rng.random() < 0.3:
        run["sigmas"] = sorted((rng.uniform(0.02, 1) for _ in range(6)), reverse=True)
    if rng.random() < 0.2:
        run["timesteps"] = sorted((rng.uniform(1, config["num_train_timesteps"]) for _ in range(6)), reverse=True)
    if "sigmas" not in run and "timesteps" not in run:
        run = steps(rng)
    if rng.random() < 0.3:
        config["use_dynamic_shifting"] = True
        run["mu"] = rng.uniform(0.3, 2)
    elif rng.random() < 0.3:
        run["shift"] = rng.choice((1.0, 2.0))
    return config, late(rng, run, run.get("num_inference_steps", 6))


def multistep(rng):
    """What DPM-Solver and UniPC share: half of the time a flow, else a variance preserving process."""
    config = training(rng) | spaced(rng) | {"solver_order": rng.randint(1, 3), "lower_order_final": rng.random() < 0.7}
    return config | {"final_sigmas_type": rng.choice(("zero", "sigma_min"))}


def dpmsolver(rng):
    config = multistep(rng) | {"euler_at_final": rng.random() < 0.2, "solver_type": rng.choice(("midpoint", "heun"))}
    config |= {"algorithm_type": rng.choice(("dpmsolver++", "dpmsolver++", "sde-dpmsolver++", "dpmsolver", "sde-dpmsolver"))}
    kinds = ("epsilon", "sample", "v_prediction", "flow_prediction")
    run = {"num_inference_steps": rng.choice((2, 3, 5, 8, 12, 16))}
    if not config["algorithm_type"].endswith("++"):
        kinds = kinds[:3]
        config["final_sigmas_type"] = "sigma_min"
    if config["algorithm_type"] == "sde-dpmsolver":
        config["solver_order"] = rng.randint(1, 2)
    config |= {"prediction_type": rng.choice(kinds)} | thresholding(rng)
    if config["prediction_type"] == "flow_prediction" or rng.random() < 0.1:
        config |= {"use_flow_sigmas": True, "flow_shift": rng.choice((1.0, 3.0))}
        if config["rescale_betas_zero_snr"]:
            config["final_sigmas_type"] = "zero" if config["algorithm_type"].endswith("++") else "sigma_min"
        if rng.random() < 0.3:
            config |= {"use_dynamic_shifting": True}
            run["mu"] = rng.uniform(0.3, 1.5)
    elif rng.random() < 0.2:
        run = {"timesteps": descending(rng, 1, config["num_train_timesteps"], 6)}
    else:
        config |= respacing(rng, "use_lu_lambdas")
        if rng.random() < 0.2:
            config["lambda_min_clipped"] = -3.0
    return config, late(rng, run, run.get("num_inference_steps", 6))


def of_process(rng, config, run, **flow):
    """A prediction, and a flow's levels or those of a variance preserving process; now and then one beside the other."""
    config["prediction_type"] = rng.choice(("epsilon", "sample", "v_prediction", "flow_prediction"))
    if (config["prediction_type"] == "flow_prediction" and rng.random() < 0.9) or rng.random() < 0.1:
        config |= {"use_flow_sigmas": True, "flow_shift": rng.choice((1.0, 3.0))}
        if flow and rng.random() < 0.3:
            config |= flow
            run["mu"] = rng.uniform(0.3, 1.5)
        return config, run
    return config | respacing(rng), run


def no_zero_snr(config):
    return {option: value for option, value in config.items() if option != "rescale_betas_zero_snr"}


def deis(rng):
    config = no_zero_snr(training(rng)) | spaced(rng) | thresholding(rng) | {"lower_order_final": rng.random() < 0.7}
    config["solver_order"] = rng.randint(1, 3)
    run = {"num_inference_steps": rng.choice((2, 3, 5, 8, 12, 16))}
    config, run = of_process(rng, config, run, use_dynamic_shifting=True)
    return config, late(rng, run, run["num_inference_steps"])


def growing(timestep):
    return timestep / 500


def still(timestep):
    return 0.0


def sasolver(rng):
    config = no_zero_snr(training(rng)) | spaced(rng) | thresholding(rng) | {"lower_order_final": rng.random() < 0.7}
    config |= {"predictor_order": rng.randint(1, 4), "corrector_order": rng.randint(1, 4)}
    config |= {"tau_func": rng.choice((None, None, growing, still))}
    run = {"num_inference_steps": rng.choice((2, 3, 5, 8, 12, 16))}
    config, run = of_process(rng, config, run)
    if rng.random() < 0.3:
        config |= {"algorithm_type": "noise_prediction", "thresholding": False}
        if config["prediction_type"] == "flow_prediction":
            config["prediction_type"] = "v_prediction"
    if rng.random() < 0.2:
        config["lambda_min_clipped"] = -3.0
    return config, late(rng, run, run["num_inference_steps"])


def singlestep(rng):
    config = no_zero_snr(training(rng)) | thresholding(rng) | {"lower_order_final": rng.random() < 0.5}
    config |= {"solver_order": rng.randint(1, 3), "final_sigmas_type": rng.choice(("zero", "sigma_min"))}
    config |= {"algorithm_type": rng.choice(("dpmsolver++", "dpmsolver++", "sde-dpmsolver++", "dpmsolver"))}
    run = {"num_inference_steps": rng.choice((2, 3, 5, 6, 8, 9, 12))}
    config, run = of_process(rng, config | {"solver_type": rng.choice(("midpoint", "heun"))}, run, use_dynamic_shifting=True)
    if config["algorithm_type"] == "dpmsolver":
        config |= {"final_sigmas_type": "sigma_min", "thresholding": False}
        if config["prediction_type"] == "flow_prediction":
            config["prediction_type"] = "epsilon"
    respaced = any(value for option, value in config.items() if option.startswith("use_"))
    if not respaced and rng.random() < 0.3:
        run = {"timesteps": descending(rng, 1, config["num_train_timesteps"], 6)}
    elif not respaced and rng.random() < 0.2:
        config["lambda_min_clipped"] = -3.0
    return config, late(rng, run, run.get("num_inference_steps", 6))


def unipc(rng):
    config = multistep(rng) | {"solver_type": rng.choice(("bh1", "bh2")), "predict_x0": rng.random() < 0.75}
    config |= {"disable_corrector": rng.choice(([], [], [0], [1, 2]))} | thresholding(rng)
    run = {"num_inference_steps": rng.choice((2, 3, 5, 8, 12))}
    if not config["predict_x0"]:
        config["final_sigmas_type"] = "sigma_min"
    kinds = ("epsilon", "sample", "v_prediction", "flow_prediction")
    config["prediction_type"] = rng.choice(kinds if config["predict_x0"] else kinds[:3])
    if config["prediction_type"] != "flow_prediction" and rng.random() < 0.9:
        config |= respacing(rng)
        if rng.random() < 0.2:
            config |= {"sigma_min": 0.03, "sigma_max": 30.0}
        return config, late(rng, run, run["num_inference_steps"])
    config |= {"use_flow_sigmas": True, "flow_shift": rng.choice((1.0, 3.0)), "use_karras_sigmas": rng.random() < 0.2}
    if rng.random() < 0.3:
        config |= {"use_dynamic_shifting": True, "time_shift_type": rng.choice(("exponential", "linear"))}
        run["mu"] = rng.uniform(0.3, 1.5)
    if rng.random() < 0.2:
        config["shift_terminal"] = 0.1
    if not config["use_karras_sigmas"] and rng.random() < 0.3:
        run |= {"sigmas": sorted((rng.uniform(0.05, 1) for _ in range(6)), reverse=True)}
        del run["num_inference_steps"]
    return config, late(rng, run, run.get("num_inference_steps", 6))


def ddim_inverse(rng):
    config = training(rng) | {"timestep_spacing": rng.choice(("leading", "trailing")), "steps_offset": rng.choice((0, 0, 1))}
    config |= {"clip_sample": rng.random() < 0.5, "clip_sample_range": rng.choice((0.5, 1.0, 2.0))}
    config |= {"prediction_type": rng.choice(("epsilon", "sample", "v_prediction"))}
    # a model of x0 says nothing of the noise in a sample that has none
    config["set_alpha_to_one"] = config["prediction_type"] != "sample" and rng.random() < 0.5
    run = steps(rng)
    return config, late(rng, run, run["num_inference_steps"])


def pndm(rng):
    config = training(rng) | spaced(rng) | {"prediction_type": rng.choice(("epsilon", "v_prediction"))}
    config |= {"set_alpha_to_one": rng.random() < 0.5, "skip_prk_steps": rng.random() < 0.6}
    del config["rescale_betas_zero_snr"]
    run = {"num_inference_steps": rng.randint(2 if config["skip_prk_steps"] else 4, 14)}
    late_ones = config["skip_prk_steps"]  # a run has to begin with all of Runge and Kutta's evaluations
    return config, late(rng, run, run["num_inference_steps"] + 1) if late_ones else run


def sigma_space(rng, **counts):
    """What LMS, Heun and KDPM2 share."""
    config = training(rng, **counts) | spaced(rng) | respacing(rng)
    del config["rescale_betas_zero_snr"]
    return config


def lms(rng):
    config = sigma_space(rng) | {"prediction_type": rng.choice(("epsilon", "sample", "v_prediction"))}
    run = steps(rng) | {"order": rng.choice((1, 2, 3, 4, 4))}
    return config, late(rng, run, run["num_inference_steps"])


def heun(rng):
    config = sigma_space(rng) | {"prediction_type": rng.choice(("epsilon", "sample", "v_prediction"))}
    config |= {"clip_sample": rng.random() < 0.4, "clip_sample_range": rng.choice((0.5, 1.0, 2.0))}
    if rng.random() < 0.1:
        config["beta_schedule"] = "exp"
    run = two_evaluations(rng, config)
    if rng.random() < 0.2 and not any(name.startswith("use_") for name in config):
        run = {"timesteps": descending(rng, 0, config["num_train_timesteps"], 6)}
    return config, late(rng, run, 2 * run.get("num_inference_steps", 6) - 1)


def two_evaluations(rng, config):
    # from a level of 20000 to one of 0.006 at once the second slope has six digits in fp64 too
    run = {"num_inference_steps": rng.randint(6 if config.get("beta_schedule") == "squaredcos_cap_v2" else 2, 12)}
    return run | {"num_train_timesteps": config["num_train_timesteps"] - 7} if rng.random() < 0.1 else run


def kdpm2(rng):
    config = sigma_space(rng, counts=(40, 100, 200))  # stock's constructor looks for each level among all of them
    config["prediction_type"] = rng.choice(("epsilon", "v_prediction"))
    run = two_evaluations(rng, config)
    return config, late(rng, run, 2 * run["num_inference_steps"] - 1)


def kdpm2_ancestral(rng):
    """A run that ends in a second evaluation ends in NaN: its level is 0."""
    config, run = kdpm2(rng)
    return config, run | {"begin": run.get("begin", 0) // 2 * 2}


def edm(rng):
    config = {"sigma_min": rng.choice((0.002, 0.03)), "sigma_max": rng.choice((80.0, 14.0)), "sigma_data": rng.choice((0.5, 1.0))}
    config |= {"sigma_schedule": rng.choice(("karras", "exponential")), "rho": rng.choice((7.0, 5.0, 3))}
    return config | {"final_sigmas_type": rng.choice(("zero", "sigma_min"))}


def edm_euler(rng):
    config = edm(rng) | {"prediction_type": rng.choice(("epsilon", "v_prediction"))}
    run = {"sigmas": sorted(rng.random() for _ in range(6))} if rng.random() < 0.2 else steps(rng)
    if rng.random() < 0.4:
        run |= {"s_churn": rng.choice((0.5, 3.0, 40.0)), "s_tmin": rng.choice((0.0, 0.5)), "s_tmax": rng.choice((5.0, 1e9))}
        run["s_noise"] = 1.003
    return config, late(rng, run, run.get("num_inference_steps", 6))


def edm_dpmsolver(rng):
    config = edm(rng) | thresholding(rng) | {"prediction_type": rng.choice(("epsilon", "v_prediction"))}
    config |= {"algorithm_type": rng.choice(("dpmsolver++", "dpmsolver++", "sde-dpmsolver++", "deis"))}
    if config["algorithm_type"] == "deis":  # another name, which diffusers takes with that last level alone
        config["final_sigmas_type"] = "sigma_min"
    config |= {"solver_order": rng.randint(1, 2 if config["algorithm_type"].startswith("sde") else 3)}
    config |= {"solver_type": rng.choice(("midpoint", "heun")), "lower_order_final": rng.random() < 0.7}
    config |= {"euler_at_final": rng.random() < 0.2}
    run = {"num_inference_steps": rng.choice((2, 3, 5, 8, 12, 16))}
    return config, late(rng, run, run["num_inference_steps"])


def consistency(rng):
    config = edm(rng) | {"num_train_timesteps": rng.choice((18, 40, 151)), "s_noise": rng.choice((1.0, 1.003))}
    config |= {"clip_denoised": rng.random() < 0.5}
    if rng.random() < 0.4:
        run = {"timesteps": descending(rng, 0, config["num_train_timesteps"], rng.randint(1, 6))}
    else:
        run = {"num_inference_steps": rng.randint(1, 12)}
    return config, late(rng, run, run.get("num_inference_steps") or len(run["timesteps"]))


RANDOM = {
    "DDIMInverseScheduler": ddim_inverse,
    "PNDMScheduler": pndm,
    "LMSDiscreteScheduler": lms,
    "HeunDiscreteScheduler": heun,
    "KDPM2DiscreteScheduler": kdpm2,
    "KDPM2AncestralDiscreteScheduler": kdpm2_ancestral,
    "EDMEulerScheduler": edm_euler,
    "EDMDPMSolverMultistepScheduler": edm_dpmsolver,
    "CMStochasticIterativeScheduler": consistency,
    "DDPMScheduler": ddpm,
    "DDIMScheduler": ddim,
    "EulerDiscreteScheduler": euler,
    "EulerAncestralDiscreteScheduler": euler_ancestral,
    "DPMSolverMultistepScheduler": dpmsolver,
    "UniPCMultistepScheduler": unipc,
    "FlowMatchEulerDiscreteScheduler": flow_match,
    "LCMScheduler": lcm,
    "TCDScheduler": tcd,
    "CogVideoXDDIMScheduler": cogvideox,
    "CogVideoXDPMScheduler": cogvideox,
    "FlowMatchHeunDiscreteScheduler": flow_match_heun,
    "DEISMultistepScheduler": deis,
    "DPMSolverSinglestepScheduler": singlestep,
    "SASolverScheduler": sasolver,
    "FlowMatchLCMScheduler": flow_match_lcm,
}
