import base64
import io
import json
import math
import re
import shutil
from dataclasses import replace

import pytest
import torch
from PIL import Image

from mmgen import presets
from mmgen.cli import main
from mmgen.data import DataConfig, load
from mmgen.diffusion.mask_and_replace import MaskAndReplace
from mmgen.evaluation.codes import entropy
from mmgen.tasks import codes
from mmgen.training import checkpoint, log

SMALL = (
    "--steps=4 --tokenizer-steps=4 --batch-size=4 --image-size=16 --codebook-size=32 --hidden-size=32 --depth=1 --num-heads=2 "
    "--replicates=3 --eval-every=2 --threads=1 --device=cpu"
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("codes")
    main(["codes", *SMALL.split(), "--out", str(out)])
    return out


def test_four_runs_leave_logs_and_checkpoints_of_the_options(finished):
    for kind in ("tokenizer", *codes.KINDS):
        assert [record["step"] for record in log.read(finished / kind / "log.jsonl")] == [1, 2, 3, 4]
    saved = checkpoint.read_config(checkpoint.latest(finished / "diffusion" / "checkpoints"))
    assert (saved["model"]["hidden_size"], saved["model"]["num_codes"], saved["training"]["batch_size"]) == (32, 32, 4)
    assert saved["data"]["dataset"] == "unseen-photographs" and saved["process"] == {"num_timesteps": 256}
    replacing = checkpoint.read_config(checkpoint.latest(finished / "mask_and_replace" / "checkpoints"))
    assert replacing["process"] == {"num_timesteps": 256, "replaced": 0.2}
    assert {**replacing, "process": None} == {**saved, "process": None}  # nothing else tells them apart


def test_results_say_what_models_that_know_nothing_need(finished):
    """After four steps the transformers still give all codes alike."""
    result = json.loads((finished / "results.json").read_text())
    assert result["uniform"] == 5 and result["trained_tokens"] == 4 * 4 * 16
    assert result["test_entropy"] <= result["unigram"]
    for kind in codes.KINDS:
        assert result[kind]["test"]["mean"] == pytest.approx(5, abs=0.6), kind
        assert result[kind]["parameters"] > 0 and result[kind]["cpu_seconds_per_step"] > 0
        scored = {r["step"]: r["held_out_bits"] for r in log.read(finished / kind / "log.jsonl") if "held_out_bits" in r}
        assert [*scored] == [2, 4]
        best = min(scored, key=scored.get)
        assert (result[kind]["best_step"], result[kind]["held_out_bits"]) == (best, scored[best])
    assert result["causal"]["test"]["standard_error"] == 0 < result["diffusion"]["test"]["standard_error"] < 0.1


def test_the_table_is_of_photographs_that_no_curve_is_of(finished):
    """The bits of the causal model on the test part by hand, from what its last checkpoint holds."""
    result = json.loads((finished / "results.json").read_text())
    data = load(DataConfig("unseen-photographs", image_size=16), seed=0)
    assert (result["held_out_pictures"], result["test_pictures"]) == (len(data.held_out), len(data.test))
    tokenizer, _, _ = codes.read_tokenizer(finished / "causal" / "tokenizer", "--run")
    model, _, _ = codes.read_model(checkpoint.latest(finished / "causal" / "checkpoints"))
    with torch.no_grad():
        test, held_out = (
            tokenizer.encode(torch.stack([part[i] for i in range(len(part))])).indices.flatten(1)
            for part in (data.test, data.held_out)
        )
        on_test, on_held_out = (model.nats(part).double().mean().item() / (16 * math.log(2)) for part in (test, held_out))
    assert result["causal"]["test"]["mean"] == pytest.approx(on_test, abs=1e-6)
    assert result["causal"]["held_out_bits"] == pytest.approx(on_held_out, abs=1e-6)
    assert result["test_entropy"] == pytest.approx(entropy(test, 32))


def test_the_report_needs_nothing_beside_it(finished):
    page = (finished / "report.html").read_text()
    assert re.findall(r'(?:src|href)="(?!data:)[^"]*"', page) == []
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert len(pictures) == 10  # nine rows and the curves
    assert Image.open(io.BytesIO(base64.b64decode(pictures[0]))).size == (2 * 10 * 17, 2 * 17)
    for words in ("bound from above", "causal transformer, exact", "cpu", torch.__version__):
        assert words in page
    assert Image.open(finished / "codes.png").size == (2 * 10 * 17, 2 * 9 * 17)


def test_run_again_the_finished_comparison_trains_nothing(finished, capsys):
    before = (finished / "diffusion" / "log.jsonl").read_text()
    results = json.loads((finished / "results.json").read_text())
    main(["codes", *SMALL.split(), "--out", str(finished)])
    assert (finished / "diffusion" / "log.jsonl").read_text() == before
    again = json.loads((finished / "results.json").read_text())
    for kind in codes.KINDS:
        assert again[kind]["test"] == results[kind]["test"]
    assert "diffusion transformer, bound from above" in capsys.readouterr().out


def test_the_comparison_stops_where_it_is_told(finished, tmp_path):
    with pytest.raises(SystemExit, match="holds runs of 4, 2, 2 steps: go on to the same step"):
        for kind in ("tokenizer", "causal"):
            shutil.copytree(finished / kind, tmp_path / kind)
        main(["codes", *SMALL.split(), "--until=2", "--out", str(tmp_path)])
    shutil.rmtree(tmp_path / "causal")
    main(["codes", *SMALL.split(), "--until=2", "--out", str(tmp_path)])
    result = json.loads((tmp_path / "results.json").read_text())
    assert (result["steps"], result["trained_tokens"]) == (2, 2 * 4 * 16)
    assert [result[kind]["best_step"] for kind in codes.KINDS] == [2, 2, 2]


def test_a_dataset_without_a_test_part_is_refused(finished, tmp_path):
    preset = presets.digits()
    tokenizer = replace(
        preset, model=replace(preset.model, channels=(8, 16), codebook_size=8), training=replace(preset.training, steps=1)
    )
    kinds = {kind: presets.codes(kind, tokenizer.data, tokenizer.model) for kind in codes.KINDS}
    with pytest.raises(ValueError, match="is scored on a test part, which dataset 'digits' has not"):
        codes.codes(presets.CodeComparison(tokenizer, **kinds), tmp_path, device=torch.device("cpu"))


def test_completions_keep_the_upper_half(finished):
    from mmgen.presets import CodeSamplingConfig

    for kind in ("causal", "diffusion"):
        tokenizer, _, _ = codes.read_tokenizer(finished / kind / "tokenizer", "--run")
        model, process, _ = codes.read_model(checkpoint.latest(finished / kind / "checkpoints"))
        start = torch.randint(32, (3, 8))
        drawn = codes.draw_codes(model, process, start, CodeSamplingConfig(num_inference_steps=4))
        assert drawn.shape == (3, 16) and torch.equal(drawn[:, :8], start) and drawn.max() < 32
        assert codes.decoded(tokenizer, drawn).shape == (3, 3, 16, 16)


@pytest.mark.parametrize("kind", ["causal", "diffusion"])
def test_pictures_are_drawn_from_a_run(finished, tmp_path, capsys, kind):
    picture = tmp_path / "codes.png"
    command = f"sample-codes --run {finished / kind} --samples 12 --num-inference-steps 3 --threads 1 --out {picture}"
    main(command.split())
    first = picture.read_bytes()
    assert Image.open(picture).size == (2 * 10 * 17, 2 * 2 * 17)  # ten in a row
    assert re.search(r"12 pictures of step \d, the best of 4: ", capsys.readouterr().out)
    main(command.split())
    assert picture.read_bytes() == first
    for change in ("--seed 1", "--temperature 0.01", "--top-k 8", *(["--order confidence"] if kind == "diffusion" else [])):
        main(f"{command} {change}".split())
        assert picture.read_bytes() != first, change


def test_one_model_is_trained_on_a_tokenizer_by_itself(finished, tmp_path):
    small = "--steps 2 --batch-size 2 --hidden-size 16 --num-heads 2 --depth 1 --threads 1"
    main(f"train-codes diffusion --tokenizer {finished / 'tokenizer'} --num-timesteps 9 {small} --out {tmp_path}".split())
    saved = checkpoint.read_config(checkpoint.latest(tmp_path / "checkpoints"))
    assert (saved["process"]["num_timesteps"], saved["model"]["grid_size"]) == (9, 4)
    assert (tmp_path / "tokenizer").is_dir()


def test_a_model_of_replaced_codes_is_trained_and_drawn_from(finished, tmp_path):
    small = "--steps 2 --batch-size 2 --hidden-size 16 --num-heads 2 --depth 1 --threads 1"
    main(f"train-codes diffusion --tokenizer {finished / 'tokenizer'} --replaced 0.3 {small} --out {tmp_path}".split())
    last = checkpoint.latest(tmp_path / "checkpoints")
    assert checkpoint.read_config(last)["process"] == {"num_timesteps": 256, "replaced": 0.3}
    assert isinstance(codes.read_model(last)[1], MaskAndReplace)
    main(f"sample-codes --run {tmp_path} --samples 2 --num-inference-steps 2 --threads 1 --out {tmp_path / 'x.png'}".split())
    assert (tmp_path / "x.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("train-codes causal --tokenizer {none}", "error: --tokenizer must be a folder that train has written to, got"),
        ("train-codes causal --tokenizer {finished}/causal", "error: --tokenizer must hold a VQ-VAE, got"),
        ("train-codes causal --tokenizer {finished}/tokenizer --num-timesteps 9", "error: --num-timesteps is of the"),
        ("train-codes diffusion --tokenizer {finished}/tokenizer --replaced 0", "error: replaced must be above 0 and at most 1"),
        ("train-codes diffusion --tokenizer {finished}/tokenizer --hidden-size 30", "error: hidden_size must be a multiple of 8"),
        ("sample-codes --run {none}", "error: --run must be a folder that train-codes has written to, got"),
        ("sample-codes --run {finished}/tokenizer", "error: --run must hold a model of codes, got"),
        ("sample-codes --run {finished}/causal --top-k 33", "error: --top-k must be between 1 and 32, the codes, got 33"),
        ("sample-codes --run {finished}/causal --temperature -1", "error: --temperature must not be negative, got -1.0"),
        ("sample-codes --run {finished}/causal --temperature nan", "error: --temperature must not be negative, got nan"),
        ("sample-codes --run {finished}/causal --samples 0", "error: --samples must be at least 1, got 0"),
        ("codes --until 0", "error: --until must be a multiple of 50, the steps from one score to the next, got 0"),
        ("codes --until 75", "error: --until must be a multiple of 50, the steps from one score to the next, got 75"),
        ("codes --replaced 2", "error: replaced must be above 0 and at most 1, got 2.0"),
        ("train-codes causal --tokenizer {finished}/tokenizer --replaced 0.1", "error: --replaced is of the diffusion model"),
        ("codes --replicates 1", "error: --replicates must be at least 2, for a standard error, got 1"),
        ("codes --image-size 30", "error: --image-size must be divisible by 4, the pixels per token, got 30"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(finished, tmp_path, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        main([*arguments.format(finished=finished, none=tmp_path / "none").split(), "--out", str(tmp_path / "out")])
    assert str(stopped.value).startswith(message)
    assert "\n" not in str(stopped.value)


@pytest.mark.parametrize("out", ("file", "file/run"))
def test_a_folder_that_cannot_be_is_said_in_one_line(tmp_path, out):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match=r"^error: .*file"):
        main(f"train-dit --hidden-size 32 --depth 1 --num-heads 2 --steps 1 --threads 1 --out {tmp_path / out}".split())
