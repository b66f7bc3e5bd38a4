"""Results survive a round trip and an interruption, never mix versions, and the pages made of them go stale."""

import json

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import bars, harness, plot, report, results, tables
from benchmarks.harness import Settings

STAMP = {
    "device": "Test CPU", "instruction_sets": ["avx2"], "threads": 1, "packages": {"torch": "2.13"}, "commit": "abc",
    "sources": "1234", "date": "2026-01-01",
}  # fmt: skip


def entry(ms, **fields):
    return {"errors": {"rows": 8, "wrong": 0}, "ms": [ms, ms, ms], "rounds": 3, "share_of_limit": 0.5, **fields}


def record(ours=1.0, rival=3.0):
    bounds = {"fma_gflops": 100.0, "fma_source": "test", "bf16_gflops": 100.0, "copy_gb_s": 10.0}
    wrong = {"errors": {"rows": 8, "wrong": 2}}
    return {
        "group": "lookup", "dims": {"D": 8}, "note": "a model", "flops": 1e9, "bytes": 1e6, "limit": "fma_gflops",
        "limits": bounds, "contestants": {
            "ours": entry(ours, extra_bytes=2**20), "rival": entry(rival, **wrong),
            "absent": {"skipped": "not installed"}, "liar": entry(0.001, refused="claims to be exact", **wrong),
        },
    }  # fmt: skip


@pytest.fixture
def committed(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    path = tmp_path / "results" / "test-cpu" / "vq.json"
    results.save(path, "vq", STAMP, {"lookup/8": record()})
    return path


def test_round_trip(committed):
    assert results.load(committed) == {"family": "vq", "stamp": STAMP, "cases": {"lookup/8": record()}}
    assert results.committed() == [("test-cpu", results.load(committed))]
    assert [path.name for path in committed.parent.iterdir()] == ["vq.json"]


def test_only_the_same_code_and_settings_are_resumed(committed):
    assert list(results.resumable(committed, {**STAMP, "date": "2027-01-01", "commit": "def"})) == ["lookup/8"]
    assert results.resumable(committed, {**STAMP, "sources": "5678"}) == {}
    assert results.resumable(committed, {**STAMP, "settings": {"seconds": 1}}) == {}
    assert results.resumable(committed.with_name("none.json"), STAMP) == {}


def test_partial_runs_are_not_quoted(committed):
    results.save(results.RESULTS / "partial" / "test-cpu" / "vq.json", "vq", STAMP, {"lookup/8": record()})
    assert len(results.committed()) == 1


def test_an_interrupted_run_goes_on(tmp_path, monkeypatch, capsys):
    class Named:
        def __init__(self, name):
            self.name = name

    cases, ran = [Named("lookup/1"), Named("lookup/2")], []
    path, arguments = tmp_path / "vq.json", (STAMP, Settings(), torch.device("cpu"))

    def run_case(case, *_):
        ran.append(case.name)
        if ran == ["lookup/1", "lookup/2"]:
            raise KeyboardInterrupt
        return record()

    monkeypatch.setattr(harness, "run_case", run_case)
    monkeypatch.setattr(plot, "draw", lambda *_: True)
    assert command.run("vq", cases, path, *arguments) == 130
    assert list(results.load(path)["cases"]) == ["lookup/1"]
    assert "1 cases are kept" in capsys.readouterr().err
    assert command.run("vq", cases, path, *arguments) == 1  # a refused time is a failure
    assert ran == ["lookup/1", "lookup/2", "lookup/2"]
    assert list(results.load(path)["cases"]) == ["lookup/1", "lookup/2"]


def test_tables_put_the_error_beside_the_time_and_hide_refused_times():
    text = tables.case_table("lookup/8", record())
    assert "2 wrong (25 %)" in text and "absent skipped: not installed" in text and "8 rows checked" in text
    assert "liar refused: claims to be exact" in text and "0.001" not in text
    row = tables.group_table({"lookup/8": record()}).splitlines()[-1]
    assert row == "| 8<br>a model | 1.00<br>0 wrong | 3.00<br>2 wrong (25 %) | - | refused<br>2 wrong (25 %) | 50% |"
    assert tables.memory_table({"lookup/8": record()}).splitlines()[-1] == "| 8<br>a model | 1.0 | ? | - | - |"


@pytest.mark.parametrize(("wrong", "text"), [(0, "0 wrong"), (3, "3 wrong (0.073 %)"), (4096, "4096 wrong (100 %)")])
def test_error_text(wrong, text):
    assert tables.error_text({"rows": 4096, "wrong": wrong}) == text


def test_error_text_of_a_ratio_has_its_standard_error():
    errors = {"error": 6e-3, "times_ours": 2.0, "standard_error": 0.003}
    assert tables.error_text(errors) == "err 6e-03, 2.000 ± 0.006 of ours"


@pytest.mark.parametrize(("ms", "text"), [(123.4, "123"), (12.34, "12.3"), (1.234, "1.23"), (0.1234, "0.123")])
def test_milliseconds(ms, text):
    assert tables.milliseconds(ms) == text


def test_report_goes_stale_and_is_renewed(committed, tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- results: overview -->\nold\n<!-- /results -->\nafter\n")
    assert report.main(["--check"], tmp_path) == 1
    stale = capsys.readouterr().err
    assert "docs/performance.md is stale" in stale and "README.md is stale" in stale
    assert report.main([], tmp_path) == 0 and report.main(["--check"], tmp_path) == 0
    text = readme.read_text()
    assert text.startswith("before\n<!-- results: overview -->\n|") and text.endswith("<!-- /results -->\nafter\n")
    assert "| nearest code, exact | 1 | rival | 3.00x | 3.00x | 3.00x | test-cpu |" in text and "old" not in text
    results.save(committed, "vq", STAMP, {"lookup/8": record(ours=2.0)})
    assert report.main(["--check"], tmp_path) == 1


def test_report_names_an_unknown_block(committed, tmp_path):
    (tmp_path / "README.md").write_text("<!-- results: vq.nothing -->\n<!-- /results -->\n")
    with pytest.raises(SystemExit, match=r"README.md: no results for block 'vq.nothing'.*vq.lookup"):
        report.main([], tmp_path)


def test_bars():
    held = {"lookup/8": record()}
    assert bars.faster(held, "lookup/8", "ours", "rival", 2.9).passed
    assert not bars.faster(held, "lookup/8", "ours", "rival", 3.1).passed
    assert not bars.faster(held, "lookup/8", "liar", "rival", 1.0).passed
    assert not bars.faster(held, "lookup/9", "ours", "rival", 1.0).passed
    assert bars.fastest(held, "lookup/8", "ours", ["rival", "absent", "liar"]).reached == 3.0
    assert not bars.fastest(held, "lookup/8", "ours", ["absent"]).passed
    assert bars.share(held, "lookup/8", "ours", 0.5).passed and not bars.share(held, "lookup/8", "ours", 0.51).passed
    assert bars.below("memory", 40.0, 48.0).passed and not bars.below("memory", None, 48.0).passed
    text = bars.describe([bars.faster(held, "lookup/8", "ours", name, 1.0) for name in ("rival", "absent", "liar")])
    assert "UNKNOWN" in text and "absent: not installed" in text and text.endswith("1 of 3 bars passed")


def test_plot(committed):
    pytest.importorskip("matplotlib")
    assert plot.draw(json.loads(committed.read_text()), committed.with_suffix(".png"))
    assert committed.with_suffix(".png").stat().st_size > 1000
