"""make gpu-check: wheels that are carried along, the time that it may take, and what it leaves behind. No GPU and no real stage."""

import json
import re
import zipfile

import pytest

from tools import gpu_check

RIVAL = {
    "carried_rival/__init__.py": "NAME = 'rival'\n",
    "carried_rival-1.2.dist-info/METADATA": "Metadata-Version: 2.1\nName: carried-rival\nVersion: 1.2\n",
}


def wheel(folder, name="carried_rival-1.2-py3-none-any.whl", files=RIVAL):
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / name, "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)
    return folder


@pytest.fixture
def checked(tmp_path, monkeypatch):
    """Runs the given stages in place of the real ones: exit status, summary, log. {results} stands for the races' folder."""

    def run(stages, *arguments):
        def given(family, device, results):
            return {name: (limit, ["-c", code.replace("{results}", str(results))]) for name, (limit, code) in stages.items()}

        monkeypatch.setattr(gpu_check, "stages", given)
        out = tmp_path / "out"
        status = gpu_check.main(["vq", "--device", "cpu", "--out", str(out), *map(str, arguments)])
        assert sorted(path.name for path in out.iterdir()) == ["gpu-check-vq.json", "gpu-check-vq.txt"]
        return status, json.loads((out / "gpu-check-vq.json").read_text()), (out / "gpu-check-vq.txt").read_text()

    return run


def test_races_import_what_was_carried_and_nothing_else_does(checked, tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "module_of_mine.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "mine"))
    look = "import importlib.util as u, module_of_mine; print(u.find_spec('carried_rival'))"
    use = "import carried_rival, module_of_mine, importlib.metadata as m; print(carried_rival.NAME, m.version('carried-rival'))"
    status, summary, log = checked({"check": (60, look), "race-vq": (60, use)}, "--wheels", wheel(tmp_path / "wheels"))
    assert status == 0
    assert summary["wheels"] == {"said": "carried-rival 1.2", "versions": {"carried-rival": "1.2"}}
    assert summary["stages"]["check"]["last_line"] == "None"
    assert summary["stages"]["race-vq"]["last_line"] == "rival 1.2"
    assert log.index("wheels: carried-rival 1.2") < log.index("==== check:") < log.index("==== race-vq:") < log.index("\nrival 1.2")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda folder: [], "none: no folder was named"),
        (lambda folder: ["--wheels", folder / "absent"], "none: .*absent is not there"),
        (lambda folder: ["--wheels", folder], "none: .* is empty of them"),
    ],
    ids=["not named", "missing", "empty"],
)
def test_without_wheels_it_runs_and_says_so(checked, tmp_path, make, said, capsys):
    status, summary, _ = checked({"race-vq": (60, "print('raced')")}, *make(tmp_path))
    assert status == 0
    assert summary["wheels"]["versions"] == {}
    assert summary["stages"]["race-vq"]["last_line"] == "raced"
    for text in (summary["wheels"]["said"], capsys.readouterr().out):
        assert re.search(said, text)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"../outside.py": ""}, r"'\.\./outside\.py' lies outside"),
        ({"package/../../outside.py": ""}, "lies outside"),
        ({"/outside.py": ""}, "'/outside.py' lies outside"),
        (RIVAL, r"b\.whl: 'carried_rival/__init__\.py' is in another wheel too"),
        (None, r"b\.whl: File is not a zip file"),
    ],
    ids=["parent", "hidden parent", "absolute", "twice", "no archive"],
)
def test_wheels_that_cannot_be_trusted_are_refused_before_anything_runs(tmp_path, capsys, files, message):
    folder = wheel(tmp_path / "wheels", "a.whl")
    if files is None:
        (folder / "b.whl").write_text("not a wheel")
    else:
        wheel(folder, "b.whl", files)
    with pytest.raises(ValueError, match=message):
        gpu_check.unpack(folder, tmp_path / "deeper" / "unpacked")
    assert not list(tmp_path.rglob("outside.py"))
    with pytest.raises(SystemExit, match="2"):
        gpu_check.main(["vq", "--device", "cpu", "--out", str(tmp_path / "out"), "--wheels", str(folder)])
    assert "--wheels: b.whl" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_results_of_races_are_in_the_summary_even_of_one_that_failed(checked):
    race = """
from pathlib import Path
path = Path("{results}") / "a-device" / "vq.json"
path.parent.mkdir(parents=True)
path.write_text('{"cases": {"one": 1}}')
raise SystemExit(3)
"""
    status, summary, _ = checked({"race-vq": (60, race), "race-vq_more": (60, "")})
    assert status == 1
    assert summary["races"] == {"vq": {"cases": {"one": 1}}}
    assert [stage["exit"] for stage in summary["stages"].values()] == [3, 0]


def test_a_family_without_a_test_for_gpus_passes_and_one_whose_tests_fail_does_not(checked):
    assert checked({"tests": (60, "raise SystemExit(5)")})[0] == 0
    assert checked({"tests": (60, "raise SystemExit(1)")})[0] == 1
    assert checked({"check": (60, "raise SystemExit(5)")})[0] == 1


def test_a_stage_is_stopped_at_its_limit_and_all_of_them_at_theirs(checked):
    stages = {"info": (1, "import time; time.sleep(60)"), "check": (60, "print('here')")}
    status, summary, _ = checked(stages)
    assert status == 1
    assert summary["stages"]["info"]["exit"] == "stopped after 1 s"
    assert summary["stages"]["check"]["last_line"] == "here"
    status, summary, _ = checked(stages, "--seconds", 0.5)
    assert status == 1
    assert {stage["exit"] for stage in summary["stages"].values()} == {"not run: no time left"}


@pytest.mark.parametrize("family", ["mod", "modulation"])
def test_a_family_races_its_own_files_only(tmp_path, monkeypatch, family):
    (tmp_path / "benchmarks").mkdir()
    for name in ("mod", "mod_training", "modulation", "modulation_long"):
        (tmp_path / "benchmarks" / f"{name}.py").write_text("import torch\n\ndef cases(device):\n    return []\n")
    (tmp_path / "benchmarks" / f"{family}_oracle.py").write_text("truth = 1\n")
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    found = gpu_check.stages(family, "cuda", tmp_path / "results")
    others = {"mod": "mod_training", "modulation": "modulation_long"}
    assert [name for name in found if name.startswith("race-")] == [f"race-{family}", f"race-{others[family]}"]
    assert f"tests/{family}" in found["tests"][1]
    assert not any("vq" in word for _, command in found.values() for word in command)
