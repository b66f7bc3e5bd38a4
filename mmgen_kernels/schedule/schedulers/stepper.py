"""A scheduler's steps by their plan: what `mk.schedulers` and `mk.patch` share.

A `Stepper` belongs to one scheduler, ours or diffusers', and keeps no state of the run but its plans: step index and history stay
in the attributes where diffusers has them, so that its own methods find them and may take over at any step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mmgen_kernels.checks import DTYPES
from mmgen_kernels.philox.ops import fold_in
from mmgen_kernels.schedule import planner
from mmgen_kernels.schedule.ops import scheduler_step
from mmgen_kernels.schedule.ops.checks import check_inputs, split_noise
from mmgen_kernels.schedule.ops.steps import planned_pair, planned_step, sums_alone
from mmgen_kernels.schedule.planner import Plan, Run, Schedule
from mmgen_kernels.schedule.reference import INPUTS
from mmgen_kernels.schedule.schedulers.noise import Generators, key_from, randn

# may step from timesteps that are not in the run
ANY_TIMESTEP = ("DDIMScheduler", "DDIMInverseScheduler", "PNDMScheduler", "CogVideoXDDIMScheduler")


class Unplanned(ValueError):
    """A call that no plan serves; the message names what it was."""


PAIR = ("sample", "model_output")  # what `check_tensors` and `of_channels` have compared
LEVELS = ("timesteps", "sigmas", "alphas_cumprod")


class Table:
    """A plan as the operator takes it. Its tensors may be made in inference mode and wanted by autograd later."""

    @torch.inference_mode(False)
    def __init__(self, plan: Plan, alone: int | None = None):
        self.plan, self.alone = plan, alone  # alone: the one timestep that it is of
        rows = torch.tensor(plan.rows, dtype=torch.float64)
        if plan.log_variance is not None:
            limits = torch.zeros(len(rows), 1, rows.shape[2], dtype=torch.float64)
            limits[:, 0, :2] = torch.tensor(plan.log_variance, dtype=torch.float64)
            rows = torch.cat((rows, limits), 1)
        self.rows = rows
        self.used = [  # of each row, the inputs that it looks at; the sample gives the outputs their shape
            tuple(name for j, name in enumerate(plan.inputs) if name == "sample" or any(line[j] != 0 for line in row))
            for row in plan.rows
        ]
        self.parts: dict[tuple[tuple[str, ...], int | None], Tensor] = {}
        self.calls = [(used, 2 if used[:2] == PAIR else 1, self.of_inputs(used)) for used in self.used]
        self.clamp = None if plan.clamp is None else plan.clamp[1]
        unlimited = plan.clamp is None and plan.threshold is None and plan.log_variance is None and len(plan.outputs) < 3
        self.pairs = [part if unlimited and used == PAIR else None for used, _, part in self.calls]  # rows that need nothing else
        self.shares = [share_of(row, plan.inputs, len(plan.outputs)) if pair is not None else None
                       for row, pair in zip(plan.rows, self.pairs, strict=True)]  # fmt: skip
        self.place = {int(t): k for k, t in reversed(list(enumerate(plan.timesteps)))}

    def require(self, k: int, named: Mapping[str, Tensor | None]) -> None:
        if missing := [name for name in self.used[k] if named.get(name) is None]:
            raise Unplanned(f"history must hold {', '.join(missing)}: the run was entered in its middle")

    def of_inputs(self, names: tuple[str, ...], lines: int | None = None) -> Tensor:
        """The table with these inputs alone, and so many lines of a row."""
        if (names, lines) not in self.parts:
            n = len(self.plan.inputs)
            with torch.inference_mode(False):
                part = self.rows[:, :lines, [*map(self.plan.inputs.index, names), n, n + 1]]
                self.parts[names, lines] = part.contiguous()
        return self.parts[names, lines]


class Stepper:
    """
    Args:
        class_name: whose steps these are, a key of `planner.DEFAULTS`.
        noise: "torch" draws what diffusers draws; "philox" draws a key at the first step of a run, and its normals in registers.
    """

    def __init__(self, class_name: str, noise: str = "torch"):
        self.class_name, self.noise = class_name, noise
        self.tables: dict[Any, Table] = {}
        self.seen: tuple[Any, tuple[tuple[str, Any, int | None], ...]] | None = None
        self.planned: tuple[Any, Schedule] | None = None
        self.fetched: dict[int, tuple[Any, Any, tuple[Any, ...]]] = {}
        self.key: Tensor | None = None
        self.gaps: tuple[Tensor, ...] | None = None

    # -- plans --------------------------------------------------------------------------------------------------------

    def table(self, scheduler: Any, begin: int = 0, alone: int | None = None, **run: Any) -> Table:
        """The plan of the run that the scheduler is set to; `alone`: of a single timestep that is not in it."""
        if self.has_changed(scheduler):
            self.look_at(scheduler)
        asked = (begin, alone, scheduler.num_inference_steps, *run.items())
        found = self.tables.get(asked)
        if found is None:
            try:
                of_run = Run(begin=begin, **self.length(scheduler, alone), **run)
                plan = planner.plan(self.class_name, dict(scheduler.config), of_run, levels=self.schedule(self.levels, alone))
            except (ValueError, ArithmeticError, NotImplementedError) as error:
                raise Unplanned(str(error)) from error
            found = self.tables[asked] = Table(plan, alone)
        return found

    def has_changed(self, scheduler: Any) -> bool:
        """Whether there was set_timesteps, or somebody who changed its result. Asked in every step: attributes and versions."""
        if self.seen is None or scheduler.config is not self.seen[0]:
            return True
        held = vars(scheduler)
        for name, level, version in self.seen[1]:
            if held.get(name) is not level or (version is not None and level._version != version):
                return True
        return False

    def look_at(self, scheduler: Any) -> None:
        held = vars(scheduler)
        self.levels = tuple(held.get(name) for name in LEVELS)
        planned = scheduler.config, self.schedule(self.levels, None)
        if self.planned is None or planned[0] is not self.planned[0] or planned[1] != self.planned[1]:
            self.tables.clear()  # else it is the same run once more
        self.planned, self.key, self.gaps = planned, None, None
        self.seen = scheduler.config, tuple((name, v, version_of(v)) for name, v in zip(LEVELS, self.levels, strict=True))

    def gap(self, scheduler: Any, k: int) -> Tensor:
        """sigmas[k + 1] - sigmas[k], of a run whose table was asked for: all at once, since each alone takes 4 us."""
        if self.gaps is None:
            with torch.inference_mode(False):
                self.gaps = scheduler.sigmas.diff().unbind()
        return self.gaps[k]

    def length(self, scheduler: Any, alone: int | None) -> dict[str, Any]:
        if self.class_name in ANY_TIMESTEP or alone is None:
            return {"num_inference_steps": scheduler.num_inference_steps or len(scheduler.timesteps)}
        return {"num_inference_steps": 1}

    def schedule(self, levels: tuple[Any, ...], alone: int | None) -> Schedule:
        timesteps, sigmas, alphas = (None if v is None else self.numbers(i, v) for i, v in enumerate(levels))
        assert timesteps is not None
        dtype = str(levels[0].dtype).removeprefix("torch.")
        return Schedule(timesteps if alone is None else (float(alone),), dtype, sigmas, alphas)

    def know(self, timesteps: Tensor, numbers: Sequence[float]) -> None:
        """What timesteps hold, so that no device is asked for it."""
        self.fetched[0] = timesteps, version_of(timesteps), tuple(numbers)

    def numbers(self, i: int, level: Any) -> tuple[Any, ...]:
        """On the host; what a run leaves alone, as a thousand alphas_cumprod, is not fetched again."""
        version, kept = version_of(level), self.fetched.get(i)
        if kept is None or kept[0] is not level or kept[1] != version or version is None:
            kept = self.fetched[i] = level, version, tuple(torch.as_tensor(level).tolist())
        return kept[2]

    def place(self, scheduler: Any, timestep: Any) -> int:
        """Where in `timesteps` the argument of `step` stands. A view of them tells it without waiting for a device."""
        place = place_in(scheduler.timesteps, timestep)
        if place is not None:
            return place
        found = self.table(scheduler).place.get(int(timestep))
        return -1 if found is None else found

    # -- a step -------------------------------------------------------------------------------------------------------

    def run(
        self,
        table: Table,
        k: int,
        named: Mapping[str, Tensor | None],
        dtypes: dict[str, torch.dtype],
        noise: Tensor | None = None,
        variance: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Row k of the table on tensors by name: of the plan's outputs by name, in their order, as many as `dtypes` has."""
        plan, (names, compared, coefficients) = table.plan, table.calls[k]
        if len(names) > INPUTS:
            return self.in_two(table, k, named, dtypes, noise)
        if len(dtypes) < len(plan.outputs):
            coefficients = table.of_inputs(names, 1 + len(dtypes))
        inputs: list[Tensor] = [named[name] for name in names]  # type: ignore[misc]
        wanted = [*dtypes.values()]
        if plan.threshold is not None or variance is not None:
            options: dict[str, Any] = {"threshold": plan.threshold, "variance": variance, "dtypes": wanted}
            outputs = scheduler_step(inputs, coefficients, k, noise=noise, clamp=table.clamp, **options)
        else:
            if len(inputs) > compared:
                check_inputs(inputs)
            z, key = (None, None) if noise is None else split_noise(noise, "sample", inputs[0])
            outputs = planned_step(inputs, coefficients, k, wanted, table.clamp, z, key)
        return dict(zip(dtypes, outputs, strict=True))

    def run_pair(
        self, table: Table, k: int, sample: Tensor, prediction: Tensor, dtypes: tuple[torch.dtype, ...], noise: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """`run` of a sample and a prediction alone: the first outputs, as many as `dtypes`."""
        coefficients = table.pairs[k]
        if coefficients is None or noise is not None or len(dtypes) < len(table.plan.outputs):
            named = {"sample": sample, "model_output": prediction}
            made = dict(zip(table.plan.outputs, dtypes, strict=False))
            return tuple(self.run(table, k, named, made, noise).values())
        share = table.shares[k]
        if share is not None and sums_alone(sample, prediction, dtypes[0]):
            return (torch.add(sample, prediction, alpha=share),)
        return planned_pair(sample, prediction, coefficients, k, dtypes)

    def in_two(
        self,
        table: Table,
        k: int,
        named: Mapping[str, Tensor | None],
        dtypes: dict[str, torch.dtype],
        noise: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """More inputs than the operator takes: first the derived value, of sample and model output, then all that comes of it."""
        plan, row = table.plan, table.rows[k]
        first, rest = (0, 1), [plan.inputs.index(name) for name in table.used[k] if name not in PAIR]
        if bool((row[1:, list(first)] != 0).any()) or bool((row[0, rest] != 0).any()):
            raise Unplanned(f"a step must have at most {INPUTS} inputs, got {', '.join(table.used[k])}")
        n = len(plan.inputs)
        derive = torch.zeros(1, 2, 4, dtype=torch.float64)
        derive[0, 0, :2], derive[0, 1, 2] = row[0, :2], 1
        pair = [named[plan.inputs[j]] for j in first]
        (m0,) = scheduler_step(pair, derive, 0, clamp=table.clamp, threshold=plan.threshold, dtypes=[dtypes["m0"]])  # type: ignore[arg-type]
        left = [i for i, name in enumerate(plan.outputs) if name != "m0"]
        inputs: list[Tensor] = [*(named[plan.inputs[j]] for j in rest), m0]  # type: ignore[list-item]
        columns = row[[1 + i for i in left]][:, [*rest, n]]
        if len(inputs) > INPUTS:
            inputs, columns = with_two_as_one(inputs, columns)
        then = torch.zeros(1, 1 + len(left), len(inputs) + 2, dtype=torch.float64)
        then[0, 1:, : len(inputs)], then[0, 1:, -1] = columns, row[[1 + i for i in left], n + 1]
        outputs = scheduler_step(inputs, then, 0, noise=noise, dtypes=[dtypes[plan.outputs[i]] for i in left])
        return {"m0": m0, **{plan.outputs[i]: o for i, o in zip(left, outputs, strict=True)}}

    def draw(self, table: Table, like: Tensor, generator: Generators, dtype: torch.dtype) -> Tensor:
        """Noise of a step, or the key of the run, into which the operator folds the number of the row.

        Rows are counted from where their plan begins: those of a plan that begins later have a key of their own.
        """
        if self.noise == "torch":
            return randn(like.shape, generator, like.device, dtype)
        if self.key is None or self.key.device != like.device:
            self.key = key_from(generator, like.device)
        if table.alone is not None:
            return fold_in(self.key, table.alone)
        return fold_in(self.key, -table.plan.begin) if table.plan.begin else self.key


def share_of(row: Sequence[Sequence[float]], inputs: Sequence[str], outputs: int) -> float | None:
    """Of a row whose one output is sample + share model_output, the share."""
    share = row[1][inputs.index("model_output")]
    rest = [c for name, c in zip((*inputs, "derived", "noise"), row[1], strict=True) if name not in PAIR]
    return share if outputs == 1 and row[1][inputs.index("sample")] == 1 and share != 0 and not any(rest) else None


def with_two_as_one(inputs: list[Tensor], columns: Tensor) -> tuple[list[Tensor], Tensor]:
    """The first two inputs in one, by a pass of their own: all results have them in one ratio, as a sample and its noise."""
    pair = columns[-1, :2]
    share = columns[:, :1] / pair[0]
    if not torch.allclose(columns[:, :2], share * pair, rtol=1e-12) or len(inputs) - 1 > INPUTS:
        raise Unplanned(f"a step must have at most {INPUTS} inputs beside sample and model_output, got {len(inputs) - 1}")
    row = torch.zeros(1, 2, 4, dtype=torch.float64)
    row[0, 1, :2] = pair
    (one,) = scheduler_step(inputs[:2], row, 0, dtypes=[torch.promote_types(torch.float32, inputs[0].dtype)])
    return [one, *inputs[2:]], torch.cat((share, columns[:, 2:]), 1)


def place_in(timesteps: Tensor, timestep: Any) -> int | None:
    """Where a view of the timesteps stands in them; None if it is none, or one that a run of every second timestep leaves out."""
    if not isinstance(timestep, Tensor):
        return None
    if timestep.numel() != 1:
        raise Unplanned(f"timestep must be one, got shape {tuple(timestep.shape)}")
    if timestep.untyped_storage().data_ptr() != timesteps.untyped_storage().data_ptr() or timesteps.dim() != 1:
        return None
    away, stride = int(timestep.storage_offset() - timesteps.storage_offset()), max(timesteps.stride(0), 1)
    place = away // stride
    return None if away % stride or not 0 <= place < len(timesteps) else place


def version_of(level: Any) -> int | None:
    """Tells a tensor that was written from what it was; None where that is not known: no tensor, or one made in inference mode."""
    return level._version if isinstance(level, Tensor) and not level.is_inference() else None


def check_tensors(model_output: Any, sample: Any) -> None:
    for name, tensor in (("model_output", model_output), ("sample", sample)):
        if not isinstance(tensor, Tensor) or tensor.dtype not in DTYPES:
            got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise Unplanned(f"{name} must be a float64, float32, bfloat16 or float16 tensor, got {got}")
    if model_output.device != sample.device:
        raise Unplanned(f"model_output must be on sample's device {sample.device}, got {model_output.device}")


def of_channels(plan: Plan, model_output: Tensor, sample: Tensor) -> tuple[Tensor, Tensor | None]:
    """The prediction, and what the model says of the variance."""
    variance = None
    channels = plan.channels
    if plan.log_variance is not None:
        if model_output.shape[1] != 2 * sample.shape[1]:
            raise Unplanned(
                f"model_output must have {2 * sample.shape[1]} channels for a learned variance, got {model_output.shape[1]}"
            )
        model_output, variance = model_output.split(sample.shape[1], dim=1)
    elif channels is not None:
        model_output = model_output[:, :channels]
    if model_output.shape != sample.shape:
        raise Unplanned(f"model_output must have sample's shape {tuple(sample.shape)}, got {tuple(model_output.shape)}")
    return model_output, variance
