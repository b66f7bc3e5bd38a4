"""mmgen-kernels info and check, and the battery's own machinery: a judge that cannot fail would be worth nothing."""

import json
import runpy
import sys

import pytest
import torch

from mmgen_kernels import backends, battery, cli
from mmgen_kernels.battery import Case, Outcome, Row, tolerance
from mmgen_kernels.library import OPERATORS

CPU = torch.device("cpu")
FP32 = ((torch.float32,),)


def fake_cases(monkeypatch, *judges):
    made = [
        Case("vq", "nearest_code", f"case_{i}", FP32, lambda device, dtypes, judge=judge: judge, True)
        for i, judge in enumerate(judges)
    ]
    monkeypatch.setattr(battery, "cases", lambda family=None: made)


def broken():
    raise RuntimeError("no kernel image")


# -- check ------------------------------------------------------------------------------------------------------------


def test_check_quick_passes(capsys, tmp_path):
    """The real thing; here its allocations are poisoned too, which the families' tests of the cases leave out."""
    path = tmp_path / "rows.json"
    assert cli.main(["check", "--quick", "--json", str(path)]) == 0
    out = capsys.readouterr().out
    assert "all passed" in out and "FAIL" not in out
    record = json.loads(path.read_text())
    assert record["device"] == "cpu" and all(row["passed"] for row in record["rows"])
    found = {(row["operator"], row["implementation"]) for row in record["rows"]}
    assert found == {(o, i) for o in OPERATORS for i in battery.implementations(o, CPU)}


@pytest.mark.parametrize(
    ("judge", "says"),
    [
        (lambda: Outcome(0.25, True, ("l2: 1 of 4 rows differ",)), "case_1: l2: 1 of 4 rows differ"),
        (lambda: Outcome(0.0, False), "NO"),
        (broken, "case_1: RuntimeError: no kernel image"),
    ],
)
def test_check_fails_on_any_failure(monkeypatch, capsys, tmp_path, judge, says):
    fake_cases(monkeypatch, Outcome, judge, Outcome)
    path = tmp_path / "rows.json"
    assert cli.main(["check", "--json", str(path)]) == 1
    out = capsys.readouterr().out
    assert says in out and "FAIL" in out and "rows failed" in out
    rows = json.loads(path.read_text(), parse_constant=pytest.fail)["rows"]  # no Infinity
    assert [row["cases"] for row in rows] == [3] * len(rows)  # the cases after it still ran
    assert not any(row["passed"] for row in rows)


def test_check_without_cases_is_no_success(monkeypatch, capsys):
    fake_cases(monkeypatch)
    assert cli.main(["check"]) == 1
    assert "nothing to run" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check", "--device", "nonsense"], "argument --device: 'nonsense' cannot be used"),
        (["check", "--device", "meta"], "argument --device: 'meta' cannot be used"),
        (["check", "--family", "audio"], "argument --family: invalid choice: 'audio'"),
        (["check", "--json", "/no/such/folder/rows.json"], "argument --json: /no/such/folder is not a directory"),
        (["check", "--slow"], "--slow"),
        (["benchmark"], "benchmark"),
        ([], "required"),
    ],
)
def test_wrong_arguments_are_named(capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.skipif("torch.cuda.is_available()", reason="needs a machine without a GPU")
def test_device_that_is_not_there(capsys):
    with pytest.raises(SystemExit):
        cli.main(["check", "--device", "cuda"])
    assert "argument --device: 'cuda' cannot be used: " in capsys.readouterr().err


def test_every_implementation_is_run_and_none_that_cannot(monkeypatch):
    seen = []

    def judge():
        seen.append(backends._forced[None])
        return Outcome()

    fake_cases(monkeypatch, judge)
    rows = battery.run(CPU)
    assert seen == [row.implementation for row in rows] == battery.implementations("nearest_code", CPU)
    assert [row.implementation for row in battery.run(CPU, only=["reference"])] == ["reference"]


def test_the_battery_notices_a_wrong_kernel(monkeypatch):
    """A lookup that takes the highest index of a tie, one that is off in a single row, losses in half precision."""
    from mmgen_kernels.vq import reference

    right_lookup, right_quantize = reference.nearest_code, reference.vector_quantize
    few = [c for c in battery.cases("vq") if c.quick and c.name in ("gaussian", "all_equal", "mask", "options_defaults")]
    monkeypatch.setattr(battery, "cases", lambda family=None: few)

    def run(operator):
        (row,) = (r for r in battery.run(CPU, quick=True, only=["reference"]) if r.operator == operator and r.dtype == "fp32")
        return row

    kernels = OPERATORS["nearest_code"].overloads

    def last_index(x, codebook, mask, metric, precision):
        flipped = right_lookup(x, codebook.flip(-2), mask, metric, precision)
        return torch.where(flipped < 0, flipped, codebook.shape[-2] - 1 - flipped)

    def off_by_one_row(x, codebook, mask, metric, precision):
        indices = right_lookup(x, codebook, mask, metric, precision)
        indices.view(-1)[-1:] += 1
        return indices

    for wrong, caught in ((last_index, "all_equal: l2: "), (off_by_one_row, "gaussian: l2: 1 of 37")):
        with monkeypatch.context() as patch:
            patch.setitem(kernels, "reference", wrong)
            row = run("nearest_code")
        assert not row.passed and any(caught in f for f in row.failures), row.failures

    def half_losses(*arguments):
        quantized, indices, *losses = right_quantize(*arguments)
        return quantized, indices, *[loss.half().to(loss.dtype) for loss in losses]

    def wrong_codes(*arguments):
        quantized, *rest = right_quantize(*arguments)
        return torch.nextafter(quantized, quantized + 1), *rest

    for wrong, caught in ((half_losses, "loss: rms error"), (wrong_codes, "are not the codes bit for bit")):
        with monkeypatch.context() as patch:
            patch.setitem(OPERATORS["vector_quantize"].overloads, "reference", wrong)
            row = run("vector_quantize")
        assert not row.passed and any(caught in f for f in row.failures), row.failures
    assert run("nearest_code").passed and run("vector_quantize").passed


def test_unknown_family():
    with pytest.raises(ValueError, match=r"family must be one of vq.* or None, got 'audio'"):
        battery.cases("audio")


def test_row_collects_the_worst():
    row = Row("nearest_code", "cpp", "fp32")
    row.add("a", Outcome(0.5))
    row.add("b", Outcome(0.25, failures=("wrong",)))
    assert (row.cases, row.worst_error, row.failures, row.passed) == (2, 0.5, ["b: wrong"], False)


# -- the tolerance ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "of_rms"), [(torch.float32, 1.5), (torch.bfloat16, 1.0), (torch.float16, 1.0)])
def test_tolerance_is_what_the_law_says(dtype, of_rms):
    torch.manual_seed(0)
    truth = torch.randn(10_000, dtype=torch.float64)
    noise = torch.randn(10_000, dtype=torch.float64) * 0.1  # far above the rounding of any dtype
    plain = (truth + noise).to(dtype)
    for factor, passes in ((0.5, True), (of_rms * 0.98, True), (of_rms * 1.02, False)):
        _, failure = tolerance.failure("y", (truth + factor * noise).to(dtype), plain, truth)
        assert (failure is None) == passes, (factor, failure)


def test_tolerance_of_the_maximum_in_fp32():
    truth = torch.randn(10_000, dtype=torch.float64)
    plain = (truth + 1e-3 * torch.ones(10_000)).float()
    ours = truth.float()
    ours[77] += 1.9e-3
    assert tolerance.failure("y", ours, plain, truth)[1] is None
    ours[77] += 0.3e-3
    assert "maximum" in tolerance.failure("y", ours, plain, truth)[1]


def test_tolerance_where_plain_pytorch_is_exact():
    truth = torch.tensor([1 / 3, 2 / 3, 1.0], dtype=torch.float64)
    ours = truth.float()
    assert tolerance.failure("y", ours, ours, truth)[1] is None  # the best that fp32 can do
    worse = torch.nextafter(ours, torch.tensor(2.0))
    assert tolerance.failure("y", worse, ours, truth)[1] is not None


def test_tolerance_of_a_single_number_is_one_unit_in_the_last_place():
    truth = torch.tensor(1 / 3, dtype=torch.float64)
    best = truth.float()  # a third of a unit above the truth
    below, above = torch.nextafter(best, torch.tensor(0.0)), torch.nextafter(best, torch.tensor(1.0))
    assert tolerance.failure("y", below, best, truth)[1] is None
    assert "rms error" in tolerance.failure("y", above, best, truth)[1]


@pytest.mark.parametrize("value", (torch.nan, torch.inf))
def test_tolerance_of_values_that_are_not_finite(value):
    truth, bad = torch.zeros(4, dtype=torch.float64), torch.tensor([0.0, value, 0, 0])
    assert "finite" in tolerance.failure("y", bad, torch.zeros(4), truth)[1]
    assert "finite" in tolerance.failure("y", torch.zeros(4), torch.zeros(4), bad.double())[1]
    assert tolerance.failure("y", bad, bad, bad.double())[1] is None


def test_tolerance_of_shapes_and_dtypes():
    truth = torch.zeros(4, dtype=torch.float64)
    assert "expected torch.float32" in tolerance.failure("y", torch.zeros(4).half(), torch.zeros(4), truth)[1]
    assert "(5,)" in tolerance.failure("y", torch.zeros(5), torch.zeros(4), truth)[1]


# -- info -------------------------------------------------------------------------------------------------------------


def test_info(capsys, monkeypatch):
    monkeypatch.setenv("MMGEN_KERNELS_CPU", "avx2")
    monkeypatch.delenv("MMGEN_KERNELS_BACKEND", raising=False)
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    loaded = "loaded         " + ("no: not built" if backends.library_error() else "yes")
    for text in (
        torch.__version__,
        f"{'MMGEN_KERNELS_CPU':<30} avx2",
        f"{'MMGEN_KERNELS_BACKEND':<30} not set",
        loaded,
        "nearest_code on cpu:",
    ):
        assert text in out


def test_info_names_the_reason_when_the_library_is_missing(capsys, monkeypatch):
    monkeypatch.setattr(backends, "_library_error", "not built: no compiler")
    monkeypatch.setattr(backends, "build_facts", dict)
    cli.main(["info"])
    out = capsys.readouterr().out
    assert "loaded         no: not built: no compiler" in out and "warning" not in out
    monkeypatch.setattr(backends, "build_facts", lambda: {"built": True, "torch": "2.7.0"})
    cli.main(["info"])
    assert "warning: the C++ part was built and does not load: not built: no compiler" in capsys.readouterr().out


def test_foreign_files_in_mmgen(tmp_path, capsys, monkeypatch):
    package = tmp_path / "mmgen"
    package.mkdir()
    for ours in ("__init__.py", "cli.py", "presets.py"):
        (package / ours).touch()
    assert cli.foreign_mmgen_files(package) == []
    (package / "apis").mkdir()
    (package / "version.py").touch()
    assert cli.foreign_mmgen_files(package) == ["mmgen/version.py", "mmgen/apis"]
    monkeypatch.setattr(cli, "foreign_mmgen_files", lambda: ["mmgen-wallet"])
    cli.main(["info"])
    assert "warning: the installed package `mmgen` holds files of another distribution (mmgen-wallet)" in capsys.readouterr().out


def test_other_distributions_that_own_mmgen(monkeypatch):
    owners = {"mmgen": ["mmgen_kernels", "mmgen-wallet"]}
    monkeypatch.setattr(cli.importlib.metadata, "packages_distributions", lambda: owners)
    assert "mmgen-wallet" in cli.foreign_mmgen_files()
    assert not any("kernels" in name for name in cli.foreign_mmgen_files())


def test_our_own_mmgen_is_not_foreign():
    """The list of foreign names must not hold a name that our own package uses."""
    assert [name for name in cli.foreign_mmgen_files() if name.startswith("mmgen/")] == []


@pytest.mark.parametrize("module", ("mmgen_kernels", "mmgen_kernels.cli"))
def test_run_as_a_module(monkeypatch, capsys, module):
    monkeypatch.setattr(sys, "argv", ["mmgen-kernels", "info"])
    monkeypatch.delitem(sys.modules, "mmgen_kernels.cli")
    with pytest.raises(SystemExit) as stop:
        runpy.run_module(module, run_name="__main__")
    assert stop.value.code == 0 and "implementations" in capsys.readouterr().out
