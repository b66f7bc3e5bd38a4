import base64
import io
import json
import re

import pytest
import torch
from PIL import Image

import mmgen_kernels as mk
from mmgen.cli import main
from mmgen.tasks import digits
from mmgen.tasks.comparison import Side, agreement, as_text, compare, table
from mmgen.training import checkpoint, log

SMALL = "--steps=4 --batch-size=8 --image-size=32 --codebook-size=8192 --threads=1 --device=cpu"
SMALL_DIT = "--dit-steps=4 --samples=40 --num-inference-steps=2"
MATRIX = 4 * 8 * 8 * 8 * 8192  # bytes of one N x K matrix of fp32


@pytest.fixture(scope="module", autouse=True)
def short_races():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, "ROUNDS", 1)
        patch.setattr(digits, "STEPS_OF_A_ROUND", 1)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory, short_races):
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("demo")
    main(["demo", *SMALL.split(), *SMALL_DIT.split(), "--out", str(out)])
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
    assert len(sizes) == 7  # two whole photographs and the curves; samples, real digits and a curve
    assert sizes[4] == (6 * 4 * 9, 6 * 10 * 9)  # four samples of each class, each with a line
    assert sizes[5] == (6 * 14 * 9, 6 * 10 * 9)
    told = ("quantizer, peak memory", "held-out PSNR", "Indices of the two runs", "Frechet distance of pixels", "with kernels off")
    for words in (*told, torch.__version__):
        assert words in page


def test_run_again_the_finished_demo_trains_nothing(finished, capsys):
    before = (finished / "fused" / "log.jsonl").read_text()
    report = (finished / "report.html").stat().st_mtime_ns
    main(["demo", *SMALL.split(), *SMALL_DIT.split(), "--out", str(finished)])
    assert (finished / "fused" / "log.jsonl").read_text() == before
    assert (finished / "report.html").stat().st_mtime_ns > report
    assert "quantizer, ms/step" in capsys.readouterr().out


def test_the_second_stage_trains_a_transformer_of_digits(finished):
    result = json.loads((finished / "results.json").read_text())["digits"]
    assert result["speed"]["plain"] > 0 and result["speed"]["ours"] > 0 and result["samples_per_second"] > 0
    assert result["scores"]["held_out_agreement"] > 0.98
    assert [record["step"] for record in log.read(finished / "dit" / "log.jsonl")] == [1, 2, 3, 4]
    assert checkpoint.read_config(checkpoint.latest(finished / "dit" / "checkpoints"))["training"]["steps"] == 4


def test_digits_are_drawn_from_a_run(finished, tmp_path, capsys):
    picture = tmp_path / "digits.png"
    command = f"sample --run {finished / 'dit'} --labels 3 7 --samples 12 --num-inference-steps 2 --threads 1 --out {picture}"
    main(command.split())
    first = picture.read_bytes()
    assert Image.open(picture).size == (6 * 10 * 9, 6 * 2 * 9)  # ten in a row
    assert "12 digits of step 4" in capsys.readouterr().out
    main(command.split())
    assert picture.read_bytes() == first
    main(f"{command} --seed 1".split())
    assert picture.read_bytes() != first


def test_a_transformer_is_trained_as_the_options_say(tmp_path):
    small = "--steps 2 --batch-size 2 --hidden-size 16 --num-heads 2 --depth 1 --threads 1"
    main(f"train-dit {small} --target v --out {tmp_path}".split())
    saved = checkpoint.read_config(checkpoint.latest(tmp_path / "checkpoints"))
    assert (saved["model"]["hidden_size"], saved["objective"]["target"], saved["objective"]["times"]) == (16, "v", "uniform")
    main(f"sample --run {tmp_path} --samples 2 --num-inference-steps 2 --threads 1 --out {tmp_path / 'digits.png'}".split())
    assert (tmp_path / "digits.png").exists()
    drawn = []
    for name in ("DDIMScheduler", "UniPCMultistepScheduler", "UniPCMultistepScheduler"):
        out = tmp_path / "again.png"
        main(f"sample --run {tmp_path} --samples 2 --steps 3 --scheduler {name} --guidance 1.5 --seed 3 --out {out}".split())
        drawn.append(out.read_bytes())
    assert drawn[0] != drawn[1] == drawn[2]


def test_ancestral_steps_follow_a_learned_variance(tmp_path, monkeypatch):
    small = "--steps 2 --batch-size 2 --hidden-size 16 --num-heads 2 --depth 1 --threads 1"
    main(f"train-dit {small} --target epsilon --learn-sigma --out {tmp_path}".split())
    asked, step = [], mk.schedulers.DDPMScheduler.step

    def watched(scheduler, output, *args, **options):
        asked.append((scheduler.config.variance_type, output.shape[1]))
        return step(scheduler, output, *args, **options)

    monkeypatch.setattr(mk.schedulers.DDPMScheduler, "step", watched)
    main(f"sample --run {tmp_path} --samples 2 --steps 3 --scheduler DDPMScheduler --out {tmp_path / 'digits.png'}".split())
    assert asked == [("learned_range", 2)] * 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("train-dit --hidden-size 30", "error: hidden_size must be a multiple of 4"),
        ("train-dit --target v --times logit_normal", "error: times must be 'uniform' with target 'v'"),
        ("train-dit --ema-decay 1", r"error: ema_decay must be in [0, 1), got 1.0"),
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--run {finished}/nowhere", "error: --run must be a folder that train-dit has written to, got"),
        ("--run {finished}/fused", "error: --run must hold a DiT, got"),
        ("--run {finished}/dit --labels 10", "error: --labels must be between 0 and 9, got 10"),
        ("--run {finished}/dit --samples 0", "error: --samples must be at least 1, got 0"),
        ("--run {finished}/dit --scheduler Euler", "error: --scheduler must be one of "),
        ("--run {finished}/dit --scheduler DDIMScheduler", "error: --scheduler must sample models with target 'flow', got 'DDIM"),
    ],
)
def test_what_cannot_be_drawn_is_said_in_one_line(finished, tmp_path, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        main(["sample", *arguments.format(finished=finished).split(), "--out", str(tmp_path / "x.png")])
    assert str(stopped.value).startswith(message)


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
