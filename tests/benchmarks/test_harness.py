"""The harness tells the truth: who runs when, what is counted, and what is not believed."""

from collections import Counter

import pytest
import torch

from benchmarks import harness, limits
from benchmarks.harness import Case, Contestant, Settings

CPU = torch.device("cpu")
BOUNDS = {"fma_gflops": 100.0, "fma_source": "test", "bf16_gflops": 100.0, "copy_gb_s": 10.0}


@pytest.fixture(autouse=True)
def _known_limits(monkeypatch):
    monkeypatch.setattr(limits, "measure", lambda device, threads: dict(BOUNDS))


def make_case(*contestants, **changes):
    """Doubling a vector; the judge counts the elements that are not doubled."""

    def judge(contestant, given, output):
        return {"rows": given[0].numel(), "wrong": int((output != 2 * given[0]).sum())}

    fields = {
        "name": "double/8", "group": "double", "contestants": contestants, "judge": judge,
        "inputs": lambda tiny: {"data": (torch.arange(1.0, 9.0),)}, "flops": 8e9, "bytes": 64e9, "limit": "fma_gflops",
    }  # fmt: skip
    return Case(**{**fields, **changes})


def doubles(name="right", **fields):
    return Contestant(name, lambda x: lambda: 2 * x, **fields)


def triples(name="false", **fields):
    return Contestant(name, lambda x: lambda: 3 * x, **fields)


def run(case, **settings):
    return harness.run_case(
        case, CPU, Settings(seconds=0, min_rounds=2, memory=False, **settings), "none", lambda _: None
    )


def test_every_contestant_takes_every_position_equally_often():
    names = ["a", "b", "c"]
    orders = [harness.rounds_order(names, index) for index in range(6)]
    assert all(sorted(order) == names for order in orders)
    for position in range(3):
        assert set(Counter(order[position] for order in orders).values()) == {2}


def test_timed_calls_are_interleaved():
    log = []

    def call(name):
        def timed():
            log.append(name)
            return 1.0  # long enough for no untimed call before it, but for the very first

        return timed

    timings = harness.race({name: call(name) for name in "abc"}, Settings(seconds=0, min_rounds=3))
    assert {name: len(values) for name, values in timings.items()} == {"a": 3, "b": 3, "c": 3}
    assert "".join(log) == "aabbcc" + "bca" + "cab"


def test_short_calls_are_settled_by_an_untimed_one():
    durations = iter([9.0, 0.001] * 4)
    timings = harness.race({"short": lambda: next(durations)}, Settings(seconds=0, min_rounds=4))
    assert timings == {"short": [0.001] * 4}


@pytest.mark.parametrize(("seconds", "rounds"), [(0, 3), (5, 5), (1e9, 6)])
def test_rounds_stop_at_the_budget_between_the_bounds(seconds, rounds):
    timings = harness.race({"a": lambda: 1.0}, Settings(seconds=seconds, min_rounds=3, max_rounds=6))
    assert len(timings["a"]) == rounds


def test_a_race_without_contestants_ends():
    assert harness.race({}, Settings()) == {}


def test_quartiles():
    assert harness.quartiles([5.0]) == (5.0, 5.0, 5.0)
    assert harness.quartiles([4.0, 1.0, 3.0, 2.0, 5.0]) == (2.0, 3.0, 4.0)
    assert harness.quartiles([1.0, 2.0]) == (1.25, 1.5, 1.75)


def test_record_holds_time_error_and_share_of_the_limit():
    record = run(make_case(doubles(exact=True)))
    entry = record["contestants"]["right"]
    assert entry["errors"] == {"rows": 8, "wrong": 0} and entry["rounds"] == 2 and "refused" not in entry
    low, middle, high = entry["ms"]
    assert 0 <= low <= middle <= high
    assert entry["share_of_limit"] == pytest.approx(8e9 / (middle / 1e3) / 1e9 / 100.0, rel=0.05)


def test_share_of_a_copy_counts_bytes():
    assert harness.work_rate(make_case(limit="copy_gb_s"), 2.0) == 32.0
    assert harness.work_rate(make_case(), 2.0) == 4.0


def test_an_exact_contestant_that_is_wrong_is_refused_and_a_rival_is_not():
    record = run(make_case(triples("liar", exact=True), triples("rival")))["contestants"]
    assert record["liar"]["refused"] == "claims to be exact and has 8 wrong of 8"
    assert "refused" not in record["rival"] and record["rival"]["errors"]["wrong"] == 8


@pytest.mark.parametrize(("error", "refused"), [(0.0, False), (1e-4, False), (2e-4, True), (float("nan"), True)])
def test_tolerance_refuses_large_errors_and_nan(error, refused):
    case = make_case(tolerance=1e-4)
    assert (harness.verdict(doubles(), case, {"error": error}) is not None) == refused


def test_reasons_to_skip():
    def broken(x):
        raise ValueError("no such\nshape")

    record = run(
        make_case(
            doubles("absent", requires="surely_not_installed"),
            doubles("cuda-only", devices=("cuda",)),
            doubles("greedy", scratch=2.0**40),
            Contestant("broken", broken),
            doubles(),
            scratch_units=2.0**20,
        )
    )["contestants"]
    assert record["absent"] == {"skipped": "surely_not_installed is not installed"}
    assert record["cuda-only"] == {"skipped": "runs on cuda only"}
    assert record["greedy"]["skipped"].startswith("needs 1073741824 GiB of scratch")
    assert record["broken"] == {"skipped": "ValueError: no such shape"}
    assert "ms" in record["right"]


def test_a_contestant_is_judged_by_the_inputs_it_was_given():
    inputs = {"data": (torch.ones(3),), "other": (torch.full((5,), 7.0),)}
    record = run(make_case(doubles(), doubles("twin", inputs="other"), inputs=lambda tiny: inputs))["contestants"]
    assert record["right"]["errors"] == {"rows": 3, "wrong": 0} and record["twin"]["errors"] == {"rows": 5, "wrong": 0}


def test_the_higher_of_two_measured_limits_counts():
    assert limits.highest({"a": 1.0, "source": "x"}, {"a": 2.0, "source": "x"}) == {"a": 2.0, "source": "x"}
