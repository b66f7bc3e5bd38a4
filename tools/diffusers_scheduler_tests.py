"""Runs diffusers' own tests of its schedulers, with stock steps and with ours in their place, and compares.

    python tools/diffusers_scheduler_tests.py --tests CHECKOUT/tests/schedulers [arguments of pytest]

CHECKOUT is one of diffusers' repository, near the version that is installed. As a plugin of pytest this file puts subclasses of the
same names into `diffusers` before any test is imported: their steps and noising are those that `mk.patch` puts on an instance.
What a test does that fails with stock as well (no network, a package that is not there) says nothing and is not counted.
"""

from __future__ import annotations

import argparse
import collections
import functools
import importlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
STEPS, RECORD = "scheduler_steps", "scheduler_record"  # options of the plugin
FUSED_SHARE = 0.95


# -- the plugin -------------------------------------------------------------------------------------------------------


def with_our_step(stock: type, counts: collections.Counter[str]) -> type:
    """A subclass that passes for `stock`; `counts` learns who served its steps: "fused", or why stock did."""
    from mmgen_kernels.patching.diffusers_schedulers import NOISING, Noising, Step
    from mmgen_kernels.schedule.schedulers.stepper import Stepper
    from mmgen_kernels.schedule.schedulers.steps import ALSO_STEP
    from mmgen_kernels.schedule.schedulers.steps_codes import STEPS_OF_CODES, CodeStepper

    name = stock.__name__

    class OurStep(Step):
        def stock(self, *args: Any, **kwargs: Any) -> Any:
            counts[str(sys.exc_info()[1])] += 1  # called where Unplanned is caught
            return getattr(stock, self.name)(self.scheduler, *args, **kwargs)

    class OurNoising(Noising):
        def stock(self, *args: Any, **kwargs: Any) -> Any:
            return getattr(stock, self.name)(self.scheduler, *args, **kwargs)

    def stepping(method: str) -> Any:
        @functools.wraps(getattr(stock, method))
        def step(self: Any, *args: Any, **kwargs: Any) -> Any:
            if not hasattr(self, "_our_steps"):
                stepper = CodeStepper() if name in STEPS_OF_CODES else Stepper(name)
                self._our_steps = {m: OurStep(self, name, stepper, m) for m in methods}
            own = self._our_steps[method]
            before = own.fused
            try:
                return own(*args, **kwargs)
            finally:
                counts["fused"] += own.fused - before

        return step

    def noising(method: str) -> Any:
        function = NOISING[name][method]

        @functools.wraps(getattr(stock, method))
        def add(self: Any, *args: Any, **kwargs: Any) -> Any:
            return OurNoising(self, method, function)(*args, **kwargs)

        return add

    methods = ("step", *ALSO_STEP.get(name, ()))
    replaced = {method: stepping(method) for method in methods}
    replaced |= {method: noising(method) for method in NOISING.get(name, ()) if hasattr(stock, method)}
    return type(name, (stock,), {**replaced, "__module__": stock.__module__, "__qualname__": name})


class Recorder:
    """Outcome and scheduler class of every test, and who served the steps."""

    def __init__(self, path: Path, ours: bool):
        from mmgen_kernels.patching.diffusers_schedulers import STEPPING

        self.path, self.names = path, list(STEPPING)
        self.outcomes: dict[str, str] = {}
        self.classes: dict[str, str] = {}
        self.counts = {name: collections.Counter(fused=0) for name in self.names}
        diffusers = importlib.import_module("diffusers")
        for name in self.names if ours else ():
            setattr(diffusers, name, with_our_step(getattr(diffusers, name), self.counts[name]))

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        for item in items:
            tested = getattr(item.cls, "scheduler_classes", None) or (None,)
            self.classes[item.nodeid] = getattr(tested[0], "__name__", "others")

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[report.nodeid] = report.outcome

    def pytest_sessionfinish(self) -> None:
        self.path.write_text(json.dumps({"outcomes": self.outcomes, "classes": self.classes, "counts": self.counts}))


def pytest_addoption(parser: Any) -> None:
    parser.addoption("--scheduler-steps", dest=STEPS, choices=("stock", "ours"))
    parser.addoption("--scheduler-record", dest=RECORD, type=Path)


def pytest_configure(config: Any) -> None:
    config.pluginmanager.register(Recorder(config.getoption(RECORD), config.getoption(STEPS) == "ours"))


# -- the command ------------------------------------------------------------------------------------------------------


def run(tests: list[Path], steps: str, arguments: list[str]) -> dict[str, Any]:
    """pytest in a process of its own: what the recorder wrote."""
    package = next(folder for folder in tests[0].joinpath("_").parents if folder.is_dir() and not (folder / "__init__.py").exists())
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "record.json"
        paths = [str(ROOT), str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        options = [f"--scheduler-steps={steps}", f"--scheduler-record={record}", "-q", "-p", "no:cacheprovider"]
        command = [sys.executable, "-m", "pytest", "-p", Path(__file__).stem, *options, *arguments, *map(str, tests)]
        subprocess.run(command, cwd=package, env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)}, check=False)
        if not record.exists():
            raise SystemExit(f"pytest with {steps} steps ended before its tests did")
        return json.loads(record.read_text())


def passed_by_class(record: dict[str, Any]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = collections.defaultdict(set)
    for test, outcome in record["outcomes"].items():
        if outcome == "passed":
            found[record["classes"][test]].add(test)
    return found


def summary(stock: dict[str, Any], ours: dict[str, Any]) -> tuple[list[str], bool]:
    """A line for each class, the tests that pass with stock alone, and whether all is as it should be."""
    passed, passed_ours = passed_by_class(stock), passed_by_class(ours)
    lines, good = [f"{'':34}{'stock':>7}{'ours':>7}{'steps':>8}{'fused':>9}"], True
    for name in [*ours["counts"], "others"]:
        tests = passed[name] if name != "others" else set().union(*(t for n, t in passed.items() if n not in ours["counts"]))
        kept = tests & set().union(*passed_ours.values())
        line = f"{name:34}{len(tests):7}{len(kept):7}"
        counts = dict(ours["counts"].get(name, {}))
        if calls := sum(counts.values()):
            share = counts.pop("fused") / calls
            line, good = f"{line}{calls:8}{share:9.2%}", good and share >= FUSED_SHARE
        lines.append(line)
        lines += [f"    stock steps, {count}: {reason}" for reason, count in counts.items() if count]
        lines += [f"    passes with stock alone: {test}" for test in sorted(tests - kept)]
        good = good and kept == tests
    return lines, good


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    help = "tests/schedulers of a checkout of diffusers, or files in it"
    parser.add_argument("--tests", type=Path, nargs="+", required=True, help=help)
    options, arguments = parser.parse_known_args()
    tests = [path.resolve() for path in options.tests]
    if missing := [str(path) for path in tests if not path.exists()]:
        parser.error(f"--tests must be {help}, got {', '.join(missing)}")
    stock, ours = (run(tests, steps, arguments) for steps in ("stock", "ours"))
    lines, good = summary(stock, ours)
    print("\n".join(lines))
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
