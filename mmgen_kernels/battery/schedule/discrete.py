"""Cases of vq_diffusion_step and unmask_step.

The law: a drawn class may trail the best of the exact race by rounding alone, TRAIL roundings of the dtype that is computed in; a
log-probability is the exact one of that class to as many; exactly as many positions as the schedule asks for are masked again, the
least confident ones. The truth is the transition matrices multiplied out in fp64, not the closed form. Positions keep their bits
whatever the run, the number of threads, the batch and the layout; inputs are never written.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

import mmgen_kernels as mk
from mmgen_kernels.battery import Case, Dtypes, Outcome, on_other_threads
from mmgen_kernels.battery.draws import rand, randint, randn
from mmgen_kernels.battery.laws import Tensors, same_bits, written
from mmgen_kernels.battery.schedule.law import FEW, FP64, SAME

TRAIL = 64
STEPS = 6
KEPT = torch.tensor([0.999, 0.9, 0.6, 0.35, 0.1, 9e-6], dtype=FP64)
DIFFUSIONS = {
    "absorbing": 1 - KEPT,
    "uniform": torch.zeros(STEPS, dtype=FP64),
    "mask_and_replace": (1 - KEPT) * 0.9,
}


def transitions(row: Tensor, K: int) -> list[Tensor]:
    """The matrices (K + 1, K + 1) of a row's transitions, from row to column: the step, all steps, all before it. The mask is K."""

    def matrix(a: float, b: float, c: float) -> Tensor:
        q = torch.full((K + 1, K + 1), b, dtype=FP64)
        q[range(K), range(K)] += a
        q[:, K], q[K] = c, 0.0
        q[K, K] = 1.0
        return q

    return [matrix(*numbers.tolist()) for numbers in row.view(3, 3)]


def posterior(p: Tensor, x_t: Tensor, row: Tensor) -> Tensor:
    """(N, K + 1) weights of x_{t-1} from p (N, K) in fp64, by the matrices of the row's transitions."""
    K = p.shape[-1]
    one, all_, before = transitions(row, K)
    likelihood = all_[:K][:, x_t].T  # (N, K): q(x_t | x_0)
    ratio = torch.where(likelihood > 0, p / likelihood, 0.0)
    return one[:, x_t].T * (ratio @ before[:K])


@dataclasses.dataclass(frozen=True)
class Draw:
    """A call of either operator: its sizes, and how its arguments lie."""

    shape: tuple[int, int, int] = (3, 5, 37)  # B, N, K
    step: int | tuple[int, ...] = 2
    on_device: bool = False  # step and table
    noise: str = "key"  # key, key per sample, tensor
    temperature: float = 1.0
    codes_first: bool = False  # (B, K, N)
    layout: Callable[[Tensor], Tensor] = lambda t: t
    values: Callable[[Tensor], Tensor] = lambda t: t  # of logits
    diffusion: str = "mask_and_replace"
    beyond: bool = False  # codes out of range
    known: float = 0.3  # how many of unmask_step's positions are
    ratio: float | None = None

    def but(self, **changed) -> Draw:
        return dataclasses.replace(self, **changed)

    def table(self) -> Tensor:
        gammas = None if self.diffusion == "absorbing" else DIFFUSIONS[self.diffusion]
        return mk.transition_table(KEPT, self.shape[2], gammas_cumprod=gammas)

    def schedule(self) -> Tensor:
        table = mk.masking_table(STEPS, temperature=(2.0, 0.0))
        if self.ratio is not None:
            table[:, 0] = self.ratio
        return table

    def arguments(self, operator: str, device: torch.device, dtypes: Dtypes) -> Tensors:
        B, N, K = self.shape
        logits = self.values(3 * randn(B, N, K, seed=1)).to(dtypes[0])
        t = {"logits": self.layout(logits.mT.contiguous() if self.codes_first else logits)}
        if operator == "vq_diffusion_step":
            some = K + bool(DIFFUSIONS[self.diffusion].any())  # where nothing is masked there is no mask
            t["codes"] = randint(0, some, (B, N), 2)
            t["codes"] = torch.where(rand(B, N, seed=3) < 0.4, some - 1, t["codes"])
            if self.beyond:
                t["codes"] = torch.where(t["codes"] == K, 2**40, torch.where(t["codes"] == 0, -5, t["codes"]))
            table = self.table()
        else:
            t["codes"] = torch.where(rand(B, N, seed=3) < self.known, randint(0, K, (B, N), 2), -7)
            table = self.schedule()
        if self.on_device:
            t |= {"table": table, "step": torch.tensor(self.step)}
        t = {"table": table} | {n: v.to(device) for n, v in t.items()}
        if self.noise == "tensor":
            e = -rand(B, N, K + 1, seed=4).clamp(min=1e-30).log().to(dtypes[0] if dtypes[0] == FP64 else torch.float32)
            t["e"] = e.to(device)
        else:
            keys = torch.tensor([[91 + b, 2**40 - b] for b in range(max(B, 1))])[:B]
            t["key"] = (keys if self.noise == "key per sample" else torch.tensor([7, 2**33])).to(device)
        return t

    def call(self, operator: str, t: Tensors) -> list[Tensor]:
        step, dim = t.get("step", self.step), 1 if self.codes_first else -1
        e = t.get("e")
        if operator == "vq_diffusion_step":
            noise = t["key"] if e is None else e.mT if self.codes_first else e
            return list(mk.vq_diffusion_step(t["logits"], t["codes"], t["table"], step, noise=noise,  # type: ignore[arg-type]
                                             temperature=self.temperature, dim=dim, return_log_prob=True))  # fmt: skip
        given = None if e is None else (e[..., :-1].mT if self.codes_first else e[..., :-1], e[..., -1])
        return list(mk.unmask_step(t["logits"], t["codes"], t["table"], step, mask_id=-7,  # type: ignore[arg-type]
                                   noise=t["key"] if given is None else given, temperature=self.temperature, dim=dim))  # fmt: skip

    # -- the truth, in fp64 on the CPU --------------------------------------------------------------------------------

    def steps(self) -> Tensor:
        """Of each sample."""
        return torch.tensor(self.step).clamp(0, STEPS - 1).expand(self.shape[0])

    def exponentials(self, t: Tensors) -> Tensor:
        """(B, N, K + 1), from the words that the implementation in force gives."""
        B, N, K = self.shape
        if "e" in t:
            return t["e"].cpu().double()
        key = t["key"]
        folded = mk.fold_in(key, self.steps().to(key.device) if key.dim() == 2 else self.steps()[:1].squeeze(0).to(key.device))
        words = mk.philox_integers((B, N, (K + 4) // 4 * 4), folded).cpu()[..., : K + 1]
        return -torch.where(words >= 2**31, torch.log1p(-(2**32 - words - 0.5) * 2.0**-32), torch.log((words + 0.5) * 2.0**-32))

    def probabilities(self, t: Tensors) -> Tensor:
        """(B, N, K); NaN where there are none."""
        logits = t["logits"].cpu().double()
        return torch.softmax((logits.mT if self.codes_first else logits) / (self.temperature or 1.0), -1)

    def weights(self, t: Tensors) -> Tensor:
        """Of vq_diffusion_step's classes, (B, N, K + 1), of sum 1."""
        x_t, rows = t["codes"].cpu().clamp(0, self.shape[2]), t["table"].cpu()[self.steps()]
        v = torch.stack([posterior(p, x, row) for p, x, row in zip(self.probabilities(t), x_t, rows, strict=True)])
        return v / v.sum(-1, keepdim=True)


def failures_of_vq(draw: Draw, t: Tensors, results: list[Tensor], eps: float) -> tuple[float, list[str]]:
    prev, log_prob = (r.cpu() for r in results)
    if prev.numel() == 0:
        return 0.0, []
    K, x_t = draw.shape[2], t["codes"].cpu().clamp(0, draw.shape[2])
    v = draw.weights(t)
    if bool((prev < 0).any() or (prev > K).any()):
        return 1.0, ["a code is out of range"]
    settled = (x_t < K) & (draw.diffusion == "absorbing")
    defined = ~v.isnan().any(-1) | settled
    failures = []
    if not torch.equal(prev[~defined], x_t[~defined]) or not bool(log_prob[~defined].isnan().all()):
        failures.append("without probabilities a position does not keep its code and have no log-probability")
    if not torch.equal(prev[settled], x_t[settled]) or bool((log_prob[settled] != 0).any()):
        failures.append("a code that can only have been itself does not stay")
    judged = defined & ~settled
    score = v.log() - draw.exponentials(t).log()
    trails = (score.amax(-1) - score.gather(-1, prev[..., None])[..., 0])[judged]
    exact = v.gather(-1, prev[..., None])[..., 0].log()
    off = ((log_prob - exact).abs() / (1 + exact.abs()))[judged]
    for name, far in (("a class trails the best by", trails), ("a log-probability is off by", off)):
        if not bool((far <= TRAIL * eps).all()):
            failures.append(f"{name} {float(far.nan_to_num(math.inf).max()):.1e}")
    return float((score.argmax(-1) != prev)[judged].double().mean().nan_to_num(0)), failures


def failures_of_unmask(draw: Draw, t: Tensors, results: list[Tensor], eps: float) -> tuple[float, list[str]]:
    prev, pred = (r.cpu() for r in results)
    if prev.numel() == 0:
        return 0.0, []
    B, N, K = draw.shape
    sample, p, e = t["codes"].cpu(), draw.probabilities(t), draw.exponentials(t)
    unknown, defined = sample == -7, ~p.isnan().any(-1)
    drawn = unknown & defined
    failures = []
    if not torch.equal(pred[~drawn], sample[~drawn]):
        failures.append("what was known, or has no probabilities, has changed")
    if bool((pred[drawn] < 0).any() or (pred[drawn] >= K).any()):
        return 1.0, [*failures, "a code is out of range"]
    score = p.log() - (e[..., :K].log() if draw.temperature else 0.0)
    trails = (score.amax(-1) - score.gather(-1, pred.clamp(0, K - 1)[..., None])[..., 0])[drawn]
    if not bool((trails <= TRAIL * eps).all()):
        failures.append(f"a code trails the best by {float(trails.max()):.1e}")
    rows = t["table"].cpu()[draw.steps()]
    confidence = p.gather(-1, pred.clamp(0, K - 1)[..., None])[..., 0].log() - rows[:, 1:] * e[..., K].log()
    confidence = torch.where(defined, confidence, -torch.inf)
    masked_again = (prev == -7) & unknown
    if not torch.equal(prev[~masked_again], pred[~masked_again]):
        failures.append("a position that is not masked again differs from its prediction")
    for b in range(B):
        M, ratio = int(unknown[b].sum()), float(rows[b, 0])
        count = min(max(1, min(M - 1, int(N * torch.tensor(ratio, dtype=torch.float32)))), M) if ratio > 0 else 0
        stay_masked = int((~defined[b] & unknown[b]).sum())  # which they are without being chosen
        if int(masked_again[b].sum()) != max(count, stay_masked):
            failures.append(f"sample {b}: {int(masked_again[b].sum())} masked again, not {max(count, stay_masked)}")
        kept = unknown[b] & ~masked_again[b]
        if kept.any() and masked_again[b].any():
            far = float(confidence[b][masked_again[b]].max() - confidence[b][kept].min())
            if not far <= TRAIL * eps * (1 + float(confidence[b][kept].abs().max())):
                failures.append(f"sample {b}: one masked again is more confident than one that is not, by {far:.1e}")
    return float((score.argmax(-1) != pred)[drawn].double().mean().nan_to_num(0)), failures


LAWS = {"vq_diffusion_step": failures_of_vq, "unmask_step": failures_of_unmask}


def prepared(operator: str, draw: Draw) -> Callable[[torch.device, Dtypes], Callable[[], Outcome]]:
    def prepare(device: torch.device, dtypes: Dtypes) -> Callable[[], Outcome]:
        t = draw.arguments(operator, device, dtypes)
        before = {n: v.cpu().clone() for n, v in t.items()}
        eps = torch.finfo(FP64 if dtypes[0] == FP64 else torch.float32).eps

        def judge() -> Outcome:
            results = draw.call(operator, t)
            error, failures = LAWS[operator](draw, t, results, eps)
            failures += written(t, before)
            if device.type == "cpu" and not all(map(same_bits, results, on_other_threads(lambda: draw.call(operator, t)))):
                failures.append("the number of threads changes the bits")
            dense = t | {"logits": t["logits"].contiguous()}
            if not all(map(same_bits, results, draw.call(operator, dense))):
                failures.append("the layout changes the bits")
            B = draw.shape[0]
            for b in (0, B - 1) if B > 1 and draw.noise != "key" else ():
                alone = {n: v if n == "table" or v.dim() == 0 else v[b : b + 1] for n, v in t.items()}
                if not all(map(same_bits, draw.call(operator, alone), [r[b : b + 1] for r in results])):
                    failures.append(f"alone it differs, sample {b}")
            return Outcome(error, all(map(same_bits, results, draw.call(operator, t))), tuple(failures))

        return judge

    return prepare


def spoiled(*values: float) -> Callable[[Tensor], Tensor]:
    """Every third position has one of the values among its logits; the second has nothing but it."""

    def change(t: Tensor) -> Tensor:
        t = t.clone()
        for i, value in enumerate(values):
            t[:, i :: len(values) * 3, i] = value
        t[:, 1] = values[-1]
        return t

    return change


def ties(t: Tensor) -> Tensor:
    return torch.zeros_like(t)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "one_class_more": lambda t: torch.cat((t, t), -1)[..., : t.shape[-1]],
    "every_second": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "expanded": lambda t: t[:1].expand(t.shape),
    "positions_outside": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
}
PLAIN = Draw()
SIZES = ((1, 1, 1), (2, 3, 2), (1, 17, 3), (2, 16, 16), (1, 33, 64), (2, 5, 63), (1, 3, 65), (1, 2, 4097), (2, 70, 129))
COMMON = {
    **{f"size_{'x'.join(map(str, s))}": PLAIN.but(shape=s) for s in SIZES},
    **{f"codes_first_{'x'.join(map(str, s))}": PLAIN.but(shape=s, codes_first=True) for s in SIZES},
    **{f"size_{'x'.join(map(str, s))}": PLAIN.but(shape=s) for s in ((0, 4, 5), (3, 0, 5))},
    **{n: PLAIN.but(layout=change) for n, change in LAYOUTS.items()},
    "key_per_sample": PLAIN.but(noise="key per sample"),
    "codes_first_key_per_sample": PLAIN.but(shape=(3, 40, 21), noise="key per sample", codes_first=True),
    "noise_codes_first": PLAIN.but(shape=(2, 19, 36), noise="tensor", codes_first=True),
    "temperature": PLAIN.but(temperature=0.3, noise="tensor"),
    "first_step": PLAIN.but(step=0),
    "last_step": PLAIN.but(step=STEPS - 1),
    "step_on_device": PLAIN.but(step=1, on_device=True),
    "step_per_sample": PLAIN.but(step=(4, 0, 2), on_device=True, noise="key per sample"),
    "step_out_of_range": PLAIN.but(step=(-3, 99, 2), on_device=True, noise="key per sample"),
    "nan": PLAIN.but(values=spoiled(math.nan)),
    "inf": PLAIN.but(values=spoiled(math.inf)),
    "minus_inf": PLAIN.but(values=spoiled(-math.inf)),
    "nothing": PLAIN.but(values=lambda t: torch.full_like(t, -math.inf)),
    "large": PLAIN.but(values=lambda t: 3000 * t),
    "ties": PLAIN.but(values=ties),
}
OF_VQ = {
    **{n: PLAIN.but(diffusion=n, shape=(2, 40, 9)) for n in DIFFUSIONS},
    "absorbing_first_step": PLAIN.but(diffusion="absorbing", step=0),
    "absorbing_nan": PLAIN.but(diffusion="absorbing", values=spoiled(math.nan)),
    "beyond": PLAIN.but(beyond=True, shape=(2, 40, 9)),
}
OF_UNMASK = {
    "likeliest": PLAIN.but(temperature=0.0),
    "likeliest_codes_first": PLAIN.but(temperature=0.0, noise="tensor", codes_first=True),
    "all_known": PLAIN.but(known=1.0),
    "none_known": PLAIN.but(known=0.0, shape=(2, 300, 11)),
    "many": PLAIN.but(known=0.5, shape=(2, 2048, 5), noise="tensor"),
    "all_again": PLAIN.but(ratio=1.0),
    "one_again": PLAIN.but(ratio=1e-9),
    "without_chance": PLAIN.but(step=STEPS - 1, ratio=0.5, values=ties),
}


def cases_of(operator: str, draws: dict[str, Draw]) -> list[Case]:
    quick = {
        "quick": PLAIN.but(shape=(2, 5, 67)),
        "quick_codes_first": PLAIN.but(shape=(2, 24, 67), codes_first=True),  # whole tiles of positions and of classes
        "quick_noise": PLAIN.but(shape=(2, 24, 67), codes_first=True, noise="tensor"),
    }
    return [
        *[Case("schedule", operator, n, SAME, prepared(operator, d), True) for n, d in quick.items()],
        *[Case("schedule", operator, n, FEW, prepared(operator, d)) for n, d in draws.items()],
    ]


CASES = [*cases_of("vq_diffusion_step", COMMON | OF_VQ), *cases_of("unmask_step", COMMON | OF_UNMASK)]
