"""Steps of discrete diffusion: VQ-Diffusion's and masked generation's, beside diffusers' schedulers, eager and compiled.

Shapes are B x N x K: samples, positions, codes. Logits are (B, K, N), as VQ-Diffusion's model gives them, or (B, N, K), as
Amused's and other transformers do. "ours" draws in registers; "ours, stock's noise" is the scheduler of mk.schedulers, which draws
the noise that diffusers draws. Wrong are the positions where not the class was drawn that wins in fp64 with the contestant's own
noise.

"bound" is a training step's share of VQ-Diffusion's loss: forward, and the gradient of the logits. Its script, in
peers/vq_diffusion_script.py, is the paper's in log space; errors are against it in fp64.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.bars import Bar, below, faster
from benchmarks.harness import Case, Contestant
from benchmarks.peers.compiled import compile_static
from benchmarks.peers.vq_diffusion_script import loss as script_loss
from benchmarks.schedule_losses import judged, step_with

QUIET_SECONDS = 0.0  # everybody here computes on torch's threads: nobody else's spin
KEEPS_FREED_MEMORY = True  # what a call allocates must not cost what glibc did with the last
DIFFUSED = {"1x1024x4096": "VQ-Diffusion's ITHQ, half of it masked", "4x256x1024": "a tokenizer of 256 codes, half of them masked"}
UNMASKED = {"1x1024x4096": "all masked", "4x256x8192": "Amused, 256 px, all masked"}
BOUNDED = {"1x1024x4096": "VQ-Diffusion's ITHQ", "4x1024x4096": "VQ-Diffusion's ITHQ, four pictures"}
QUICK = ("vq/4x256x1024", "unmask/4x256x8192", "bound/1x1024x4096")
SEED, STEP, STEPS = 2026, 50, 100
SPEED, MEMORY = 5.0, 0.1
BOUND_MEMORY, BOUND_TOLERANCE, AUX = 0.2, 1e-3, 5e-4

Make = Callable[..., Callable[[], Any]]


def sizes(shape: str) -> tuple[int, ...]:
    return tuple(int(size) for size in shape.split("x"))


def compiled(step: Callable) -> Callable:
    torch._dynamo.reset()
    return torch.compile(step, dynamic=False, options={"fallback_random": True})  # the noise is eager's: judged with it


def key_of_seed() -> Tensor:
    torch.manual_seed(SEED)
    return torch.randint(-(2**63), 2**63 - 1, (2,))


def own_exponentials(B: int, N: int, K: int, step: int) -> Tensor:
    """(B, N, K) of our key, in fp64."""
    import mmgen_kernels as mk

    words = mk.philox_integers((B, N, (K + 4) // 4 * 4), mk.fold_in(key_of_seed(), step))[..., :K]
    return -torch.where(words >= 2**31, torch.log1p(-(2**32 - words - 0.5) * 2.0**-32), torch.log((words + 0.5) * 2.0**-32))


def wrong(log_weights: Tensor, exponentials: Tensor, drawn: Tensor) -> dict:
    """(B, N, K) each, and (B, N)."""
    best = (log_weights - exponentials.cpu().log()).argmax(-1)
    return {"rows": drawn.numel(), "wrong": int((best != drawn.cpu()).sum())}


# -- VQ-Diffusion -----------------------------------------------------------------------------------------------------


def stock_vq(K: int, compiles: bool = False) -> Make:
    def make(log_p: Tensor, x_t: Tensor) -> Callable[[], Any]:
        from diffusers import VQDiffusionScheduler

        scheduler = VQDiffusionScheduler(K + 1)
        scheduler.set_timesteps(STEPS, device=log_p.device)
        step = compiled(scheduler.step) if compiles else scheduler.step
        call = torch.no_grad()(lambda: step(log_p, STEP, x_t, return_dict=False)[0])
        if compiles:
            call()
        torch.manual_seed(SEED)
        return call

    return make


def our_vq(K: int, noise: str, codes_last: bool = False) -> Make:
    def make(log_p: Tensor, x_t: Tensor) -> Callable[[], Any]:
        import mmgen_kernels as mk

        scheduler = mk.schedulers.VQDiffusionScheduler(K + 1)
        if noise == "torch":
            torch.manual_seed(SEED)
            return lambda: scheduler.step(log_p, STEP, x_t, return_dict=False)[0]
        key, table = key_of_seed().to(log_p.device), scheduler.transitions
        logits = log_p.mT.contiguous() if codes_last else log_p
        return lambda: mk.vq_diffusion_step(logits, x_t, table, STEP, noise=key, dim=-1 if codes_last else 1)

    return make


def vq_case(shape: str, device: torch.device) -> Case:
    B, N, K = sizes(shape)

    def inputs(tiny: bool) -> dict[str, tuple]:
        generator = torch.Generator().manual_seed(0)
        n = 8 if tiny else N
        log_p = torch.log_softmax(2 * torch.randn(B, K, n, generator=generator), 1)
        x_t = torch.randint(0, K, (B, n), generator=generator)
        x_t[:, ::2] = K
        return {"data": (log_p.to(device), x_t.to(device))}

    def judge(contestant: Contestant, given: tuple, drawn: Tensor) -> dict:
        import mmgen_kernels as mk

        log_p, x_t = (t.cpu() for t in given)
        table = mk.schedulers.VQDiffusionScheduler(K + 1).transitions
        a, b, _, A, B_, _, A_1, B_1, C_1 = table[STEP].tolist()
        p = torch.softmax(log_p.double(), 1).mT  # (B, N, K)
        own = torch.nn.functional.one_hot(x_t, K + 1)[..., :K].double()
        q = p / (A * own + B_)  # of x_0 over the likelihood of x_t
        v = (a * own + b) * (A_1 * q + B_1 * q.sum(-1, keepdim=True))
        masked = (x_t == K)[..., None]
        v = torch.where(masked, A_1 * p + B_1, v)
        of_mask = torch.where(masked, C_1 / table[STEP, 2], 0.0)
        if contestant.name.startswith("ours") and "stock" not in contestant.name:
            e = own_exponentials(*x_t.shape, K + 1, STEP)
        else:
            torch.manual_seed(SEED)
            e = 1e-30 - (torch.rand(len(x_t), K + 1, x_t.shape[1], device=device).double() + 1e-30).log().mT
        return wrong(torch.cat((v, of_mask), -1).log(), e, drawn)

    makes = {
        "ours": our_vq(K, "philox"),
        "ours, codes last": our_vq(K, "philox", codes_last=True),
        "ours, stock's noise": our_vq(K, "torch"),
        "diffusers": stock_vq(K),
        "compile": stock_vq(K, compiles=True),
    }
    return case("vq", shape, makes, inputs, judge, DIFFUSED[shape])


# -- masked generation ------------------------------------------------------------------------------------------------


def stock_unmask(K: int, compiles: bool = False) -> Make:
    def make(logits: Tensor, sample: Tensor) -> Callable[[], Any]:
        from diffusers import AmusedScheduler

        scheduler = AmusedScheduler(K)
        scheduler.set_timesteps(STEPS, device=logits.device)
        t = scheduler.timesteps[STEP]
        step = compiled(scheduler.step) if compiles else scheduler.step
        call = torch.no_grad()(lambda: step(logits, t, sample, return_dict=False)[1])
        if compiles:
            call()
        torch.manual_seed(SEED)
        return call

    return make


def our_unmask(K: int, noise: str) -> Make:
    def make(logits: Tensor, sample: Tensor) -> Callable[[], Any]:
        import mmgen_kernels as mk

        if noise == "torch":
            scheduler = mk.schedulers.AmusedScheduler(K)
            scheduler.set_timesteps(STEPS, device=logits.device)
            t = scheduler.timesteps[STEP]
            torch.manual_seed(SEED)
            return lambda: scheduler.step(logits, t, sample, return_dict=False)[1]
        key, table = key_of_seed().to(logits.device), mk.masking_table(STEPS)
        return lambda: mk.unmask_step(logits, sample, table, STEP, mask_id=K, noise=key)[1]

    return make


def unmask_case(shape: str, device: torch.device) -> Case:
    B, N, K = sizes(shape)

    def inputs(tiny: bool) -> dict[str, tuple]:
        generator = torch.Generator().manual_seed(0)
        n = 8 if tiny else N
        return {"data": ((2 * torch.randn(B, n, K, generator=generator)).to(device), torch.full((B, n), K, device=device))}

    def judge(contestant: Contestant, given: tuple, drawn: Tensor) -> dict:
        logits = given[0].cpu().double()
        if contestant.name == "ours":
            e = own_exponentials(*logits.shape, STEP)
        else:
            torch.manual_seed(SEED)
            e = torch.empty(logits.shape, device=device).exponential_().double()
        return wrong(logits, e, drawn)

    makes = {
        "ours": our_unmask(K, "philox"),
        "ours, stock's noise": our_unmask(K, "torch"),
        "diffusers": stock_unmask(K),
        "compile": stock_unmask(K, compiles=True),
    }
    return case("unmask", shape, makes, inputs, judge, UNMASKED[shape])


def case(group: str, shape: str, makes: dict[str, Make], inputs: Callable, judge: Callable, note: str) -> Case:
    B, N, K = sizes(shape)
    requires = {"diffusers": "diffusers", "compile": "mmgen_kernels" if "script" in makes else "diffusers"}
    contestants = [Contestant(n, make, requires.get(n, "mmgen_kernels"), compiles=n == "compile") for n, make in makes.items()]
    return Case(
        name=f"{group}/{shape}",
        group=group,
        contestants=contestants,
        inputs=inputs,
        judge=judge,
        flops=10.0 * B * N * K,
        bytes=4.0 * B * N * K,
        limit="copy_gb_s",
        dims={"B": B, "N": N, "K": K},
        note=note,
    )


# -- VQ-Diffusion's loss ----------------------------------------------------------------------------------------------


def kept_and_masked() -> tuple[Tensor, Tensor]:
    """What stays falls in a straight line, as VQ-Diffusion has it; of what does not, a tenth is replaced."""
    kept = torch.linspace(0.99999, 9e-6, STEPS, dtype=torch.float64)
    return kept, 0.9 * (1 - kept)


def our_bound(codes_last: bool = False) -> Make:
    def make(logits: Tensor, x0: Tensor, x_t: Tensor, t: Tensor) -> Callable[[], Any]:
        import mmgen_kernels as mk

        kept, masked = kept_and_masked()
        table = mk.transition_table(kept, logits.shape[1], gammas_cumprod=masked).to(logits.device)
        given, dim = (logits.mT.contiguous(), -1) if codes_last else (logits, 1)
        step = step_with(lambda z: mk.vq_diffusion_loss(z, x0, x_t, table, t, aux_weight=AUX, dim=dim).loss, given)

        def call() -> tuple[Tensor, Tensor]:
            loss, slope = step()
            return loss, slope.mT if codes_last else slope

        return call

    return make


def script_bound(compiles: bool = False, precise: bool = False) -> Make:
    def make(logits: Tensor, x0: Tensor, x_t: Tensor, t: Tensor) -> Callable[[], Any]:
        import mmgen_kernels as mk

        kept, masked = kept_and_masked()
        dtype = torch.float64 if precise else torch.float32
        rows = mk.transition_table(kept, logits.shape[1], gammas_cumprod=masked)[t.cpu()].to(logits.device, dtype)  # (B, 9)
        of = compile_static(script_loss, logits.device) if compiles else script_loss
        return step_with(lambda z: of(z, x0, x_t, rows, AUX), logits.to(dtype))

    return make


def bound_case(shape: str, device: torch.device) -> Case:
    B, N, K = sizes(shape)

    def inputs(tiny: bool) -> dict[str, tuple]:
        generator = torch.Generator().manual_seed(0)
        n = 8 if tiny else N
        logits = 2 * torch.randn(B, K, n, generator=generator)
        x0, x_t = (torch.randint(0, K, (B, n), generator=generator) for _ in range(2))
        x_t[:, ::2], x_t[:, 1::4] = K, x0[:, 1::4]  # half of it masked, a quarter as it was, a quarter replaced
        t = torch.tensor([50, 20, 80, 0])[:B]
        return {"data": tuple(tensor.to(device) for tensor in (logits, x0, x_t, t))}

    makes = {
        "ours": our_bound(),
        "ours, codes last": our_bound(codes_last=True),
        "script": script_bound(),
        "compile": script_bound(compiles=True),
    }
    judge = judged(lambda *given: script_bound(precise=True)(*given)())
    found = case("bound", shape, makes, inputs, judge, BOUNDED[shape])
    return dataclasses.replace(found, flops=60.0 * B * N * K, bytes=12.0 * B * N * K, tolerance=BOUND_TOLERANCE)  # logits twice


def cases(device: torch.device) -> list[Case]:
    drawn = [*map(partial(vq_case, device=device), DIFFUSED), *map(partial(unmask_case, device=device), UNMASKED)]
    return drawn + [bound_case(shape, device) for shape in BOUNDED]


def memory_share(results: dict[str, dict], name: str, who: str, rival: str = "diffusers") -> float | None:
    contestants = results.get(name, {}).get("contestants", {})
    ours, stock = (contestants.get(each, {}).get("extra_bytes") for each in (who, rival))
    return None if ours is None or not stock else ours / stock


def bars(results: dict[str, dict]) -> list[Bar]:
    """What the project promises on one thread of a CPU; `results` maps case names to their records."""
    found = []
    for shape in DIFFUSED:
        name = f"vq/{shape}"
        for who in ("ours", "ours, codes last"):
            found += [faster(results, name, who, "diffusers", SPEED), faster(results, name, who, "compile", 1.0)]
            found.append(below(f"{name}: memory of {who} over diffusers'", memory_share(results, name, who), MEMORY))
    for shape in UNMASKED:
        found += [faster(results, f"unmask/{shape}", "ours", rival, 1.0) for rival in ("diffusers", "compile")]
    for shape in BOUNDED:
        name = f"bound/{shape}"
        for who in ("ours", "ours, codes last"):
            found += [faster(results, name, who, "script", SPEED), faster(results, name, who, "compile", 1.0)]
            share = memory_share(results, name, who, "script")
            found.append(below(f"{name}: memory of {who} over the script's", share, BOUND_MEMORY))
    return found
