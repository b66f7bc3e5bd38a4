import base64
import io
import json
import re

import pytest
import torch
from PIL import Image

from mmgen.cli import main
from mmgen.tasks.comparison import Side, agreement, as_text, compare, table
from mmgen.training import checkpoint, log

SMALL = "--steps=4 --batch-size=8 --image-size=32 --codebook-size=8192 --threads=1 --device=cpu"
MATRIX = 4 * 8 * 8 * 8 * 8192  # bytes of one N x K matrix of fp32


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("demo")
    main(["demo", *SMALL.split(), "--out", str(out)])
    return out


def test_both_runs_leave_a_log_and_a_checkpoint(finished):
    for quantizer in ("stock", "fused"):
        assert [record["step"] for record in log.read(finished / quantizer / "log.jsonl")] == [1, 2, 3, 4]
        last = checkpoint.latest(finished / quantizer / "checkpoints")
        assert last.name == "step-00000004"
        assert checkpoint.read_config(last)["model"]["quantizer"] == quantizer


def test_both_runs_saw_the_same_and_agree(finished):
    results = json.loads((finished / "results.json").read_text())
    assert results["steps_compared"] == 4
    assert results["loss_disagreement"] < 1e-5
    stock, ours = results["stock"], results["ours"]
    assert stock["held_out_psnr"] == pytest.approx(ours["held_out_psnr"], abs=0.01)
    logs = [log.read(finished / quantizer / "log.jsonl") for quantizer in ("stock", "fused")]
    assert logs[0][0]["fingerprint"] == logs[1][0]["fingerprint"]


def test_only_the_stock_quantizer_holds_the_distance_matrix(finished):
    results = json.loads((finished / "results.json").read_text())
    assert results["stock"]["peak_memory"] > 2 * MATRIX
    assert results["ours"]["peak_memory"] < MATRIX / 2


def test_the_report_needs_nothing_beside_it(finished):
    page = (finished / "report.html").read_text()
    assert re.findall(r'(?:src|href)="(?!data:)[^"]*"', page) == []
    sizes = [
        Image.open(io.BytesIO(base64.b64decode(data))).size
        for data in re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    ]
    assert sizes[0] == (2 * 12 * 32, 2 * 3 * 32)  # twelve crops in three versions
    assert len(sizes) == 4  # two whole photographs and the curves
    for words in ("quantizer, peak memory", "held-out PSNR", "Indices of the two runs", torch.__version__):
        assert words in page


def test_run_again_the_finished_demo_trains_nothing(finished, capsys):
    before = (finished / "fused" / "log.jsonl").read_text()
    report = (finished / "report.html").stat().st_mtime_ns
    main(["demo", *SMALL.split(), "--out", str(finished)])
    assert (finished / "fused" / "log.jsonl").read_text() == before
    assert (finished / "report.html").stat().st_mtime_ns > report
    assert "quantizer, ms/step" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("train --dataset folder", "error: --dataset folder needs --path DIR"),
        ("train --dataset folder --path /nowhere", "error: --path must be a folder of images, got '/nowhere'"),
        ("train --path x", "error: --path is read by --dataset folder only"),
        ("train --steps 0", "error: --steps must be at least 1, got 0"),
        ("train --learning-rate 0", "error: --learning-rate must be positive, got 0.0"),
        ("train --seed -1", "error: --seed must be between 0 and"),
        ("train --threads 0", "error: --threads must be at least 1, got 0"),
        ("train --device abacus", "error: --device abacus cannot be used here"),
        ("train --image-size 30", "error: --image-size must be divisible by 4, the pixels per token, got 30"),
        ("train --codebook-size 0", "error: codebook_size must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(tmp_path, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        main([*arguments.split(), "--out", str(tmp_path)])
    assert str(stopped.value).startswith(message)
    assert "\n" not in str(stopped.value)


def test_digits_train(tmp_path):
    main(f"train --dataset digits --steps 2 --batch-size 2 --threads 1 --out {tmp_path}".split())
    assert len(log.read(tmp_path / "log.jsonl")) == 2


def side(**changes) -> Side:
    values = {name: 1.0 for name in Side.__dataclass_fields__} | {"peak_memory": 8 * 10**6}
    return Side(**(values | changes))


def records(losses, fingerprints):
    pairs = zip(losses, fingerprints, strict=True)
    return [{"step": i, "loss": loss, "fingerprint": f} for i, (loss, f) in enumerate(pairs, 1)]


def test_the_comparison_finds_the_first_difference():
    stock, ours = records([1.0, 2.0, 4.0], [7, 8, 9]), records([1.0, 2.002, 4.0], [7, 8, 5])
    comparison = compare(side(), side(), stock, ours)
    assert comparison.first_different_step == 3
    assert comparison.loss_disagreement == pytest.approx(1e-3)
    assert "first different at step 3. Losses of the first 3 steps agree within 1.0e-03" in agreement(comparison)
    assert "the same at every step" in agreement(compare(side(), side(), stock, stock))


def test_the_comparison_of_losses_stops_after_fifty_steps():
    stock, ours = records([1.0] * 60, [0] * 60), records([1.0] * 50 + [2.0] * 10, [0] * 60)
    assert compare(side(), side(), stock, ours).loss_disagreement == 0
    assert compare(side(), side(), stock, ours).steps_compared == 50


def test_the_table_says_by_how_much():
    rows = table(
        compare(
            side(quantizer_ms=200.0, peak_memory=8 * 10**8, held_out_psnr=25.0, steps_per_second=2.0),
            side(quantizer_ms=10.0, peak_memory=4 * 10**6, held_out_psnr=24.9, steps_per_second=5.0),
            records([1.0], [0]),
            records([1.0], [0]),
        )
    )
    by_name = {row[0]: row[1:] for row in rows}
    assert by_name["steps/s"] == ("2.00", "5.00", "2.50x")
    assert by_name["quantizer, ms/step"] == ("200.0", "10.0", "20.0x faster")
    assert by_name["quantizer, peak memory"] == ("800.0 MB", "4.0 MB", "200x less")
    assert by_name["held-out PSNR"] == ("25.00 dB", "24.90 dB", "-0.10 dB")
    assert len({len(line.rstrip()) for line in as_text(rows).splitlines()}) == 1


def test_a_system_that_tells_no_memory_gets_a_table_all_the_same():
    rows = table(compare(side(peak_memory=None), side(peak_memory=None), records([1.0], [0]), records([1.0], [0])))
    assert ("quantizer, peak memory", "not told", "not told", "by this system") in rows
