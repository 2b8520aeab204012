"""The benchmarks of inference on a toy: what they compare is equal, what they print is what they measured."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import harness, inference, models
from benchmarks.baselines import CLIPSeg, make_two_stage, measure_clipseg, measure_two_stage
from benchmarks.harness import Options, OutputMismatch, Result, Rounds, compare, memory_mb, time_interleaved
from benchmarks.inference import (
    GKC,
    MASK2FORMER,
    Pair,
    candidate_name,
    check_agreement,
    end_to_end_call,
    first_masks,
    memory_of,
)
from benchmarks.models import PRESETS
from benchmarks.operator_kernels import STRIDES, measure_operator, operator_inputs
from benchmarks.report import BEGIN, END, markdown, update_document

ROOT = Path(__file__).parent.parent
TOY = PRESETS["toy"]
SIZE = TOY.sizes[0]
EAGER_ONLY = Options("toy", threads=1, compile=False)


@pytest.fixture
def uncompiled(monkeypatch):
    """Replace torch.compile by functions that record their arguments and compile nothing."""
    recorded = []

    def compile_module(module, **kwargs):
        recorded.append((module, kwargs))
        module._compiled_call_impl = module._call_impl

    monkeypatch.setattr(torch.nn.Module, "compile", compile_module)

    def compile_function(function, **kwargs):
        recorded.append((function, kwargs))
        return function

    monkeypatch.setattr(torch, "compile", compile_function)
    return recorded


def make_pair(dtype: str = "fp32") -> Pair:
    source = models.make_mask2former(TOY, 5)
    gkc = models.prepare_gkc(models.make_converted(source, TOY), models.EAGER, dtype, "cpu", SIZE)
    return Pair(models.EAGER, dtype, gkc, models.prepare_mask2former(source, models.EAGER, dtype, "cpu"))


@torch.no_grad()
def fp32_masks() -> torch.Tensor:
    return models.make_mask2former(TOY, 5)(models.random_pixels(SIZE)).masks_queries_logits


def record_of(results: list[Result], options: Options = EAGER_ONLY) -> dict:
    """Return the content of results.json with these results."""
    found = [asdict(result) | {"load_average": [1.0, 2.0]} for result in results]
    return {
        "command": "python -m benchmarks",
        "date": "today",
        "options": asdict(options),
        "machine": harness.machine(1),
        "planned": ["one", "another"],
        "measurements": {"one": {"took": 1.0, "results": found}},
    }


def test_every_other_round_runs_in_reverse_order():
    called = []
    candidates = {name: lambda name=name: called.append(name) for name in "abc"}
    taken = time_interleaved(candidates, rounds=3, warm_up=1)
    assert called == taken.order == [*"abc", *"cba", *"abc", *"cba"]
    assert {candidate: len(samples) for candidate, samples in taken.samples.items()} == dict.fromkeys("abc", 3)


def test_no_round_starts_after_the_time_limit():
    taken = time_interleaved({"a": lambda: time.sleep(0.01), "b": lambda: None}, rounds=50, limit=0.0)
    assert len(taken.samples["a"]) == len(taken.samples["b"]) == 2


def test_calls_are_timed_by_wall_clock_and_processor_time():
    def work(until: float) -> None:
        while time.process_time() < until:
            pass

    clock, processor = harness.timed(lambda: work(time.process_time() + 0.05))
    assert 0.05 <= processor < clock + 0.02
    clock, processor = harness.timed(lambda: time.sleep(0.05))
    assert clock >= 0.05 and processor < 0.04


def test_ratios_are_computed_within_rounds():
    taken = Rounds({"slow": [(2.0, 4.0), (9.0, 6.0), (8.0, 8.0)], "fast": [(1.0, 1.0), (3.0, 2.0), (2.0, 4.0)]}, [])
    ratio = taken.ratio("slow / fast", "slow", "fast", at_least=2.5)
    assert ratio["clock"] == {"median": 3.0, "min": 2.0, "max": 4.0} and ratio["goal"] == {"at_least": 2.5}
    assert ratio["processor"] == {"median": 3.0, "min": 2.0, "max": 4.0}
    assert taken.ratio("ten of slow / fast", "slow", "fast", scale=10)["clock"]["median"] == 30.0
    assert taken.ratio("none", "slow", "missing") is None
    assert taken.seconds()["slow"]["clock"] == {"median": 8.0, "min": 2.0, "max": 9.0}


def test_differences_above_the_bound_are_errors():
    expected = torch.randn(1000)
    found = compare("x", expected + 0.001, expected, 0.01)
    assert found["max_abs"] == pytest.approx(0.001, rel=1e-2) and found["rms"] == pytest.approx(0.001, rel=0.1)
    with pytest.raises(OutputMismatch, match=r"x: the largest difference is .* times cannot be compared"):
        compare("x", expected + 0.1, expected, 0.01)
    outlier = expected.clone()
    outlier[0] += 1
    compare("x", outlier, expected, 0.1, "rms")
    for value in (float("nan"), 100.0):
        outlier[0] = value
        with pytest.raises(OutputMismatch, match="rms"):
            compare("x", outlier, expected, 0.1, "rms")


def test_memory_is_the_peak_of_the_calls():
    held = memory_mb("VmRSS")
    found = memory_of(lambda: torch.zeros(50, 2**18).sum())  # 50 MB
    assert found["before"] == pytest.approx(held, abs=30)
    assert 45 < found["later"] - found["before"] < 100 and found["peak"] >= found["later"] - 10
    assert memory_of(lambda: None)["later"] < found["later"] - 30, "the earlier peak was not reset"


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_outputs_agree_only_if_the_weights_are_equal(dtype):
    pair, expected = make_pair(dtype), fp32_masks()
    assert 0.05 < (expected > 0).float().mean() < 0.95, "the comparison needs masks with inside and outside"
    mask2former = first_masks(pair.mask2former, pair, SIZE)
    found = check_agreement(pair, SIZE, mask2former, expected)
    assert [each["name"].split()[2] for each in found] == [f"{MASK2FORMER},", f"{GKC},"]
    assert found[1]["largest"] < 1e-3 if dtype == "fp32" else 0 < found[1]["rms"] < 0.5
    with torch.no_grad():
        pair.gkc.model.pixel_decoder.mask_projection.weight.neg_()
    with pytest.raises(OutputMismatch, match=f"masks of {GKC}"):
        check_agreement(pair, SIZE, mask2former, expected)


@torch.no_grad()
def test_every_candidate_returns_logits_and_label_map(tmp_path):
    pair = make_pair()
    path = models.write_image(tmp_path, TOY)
    target = TOY.image_file_size[::-1]
    for library, model in pair.named_models():
        labels = end_to_end_call(library, model, 7, SIZE, path, target)()
        assert labels.shape == target and labels.min() >= 0 and labels.max() < 7
        outputs = inference.model_call(library, model, 7, models.random_pixels(SIZE))()
        assert outputs.class_queries_logits.shape == (1, 10, 8)


def table_row(text: str, name: str) -> list[str]:
    """Return the cells after the first one of the table row with this name."""
    row = next(line for line in text.splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in row.strip("|").split("|")][1:]


def check_table(results: list[Result]) -> str:
    """Check that the numbers of the table are those of the JSON and that goals are marked correctly."""
    record = json.loads(json.dumps(record_of(results)))
    text = markdown(record)
    about = record["machine"]
    for part in (about["processor"], f"torch {torch.__version__}", "transformers", "1 threads", "load average"):
        assert part in text
    for result in record["measurements"]["one"]["results"]:
        section = text.split(f"### {result['title']}\n")[1].split("###")[0]
        for ratio in result["ratios"]:
            clock, _, goal = table_row(section, ratio["name"])
            median = ratio["clock"]["median"]
            assert clock.startswith(f"{median:.2f} (")
            pairs = zip(result["samples"][ratio["over"]], result["samples"][ratio["under"]], strict=True)
            quotients = [ratio["scale"] * over[0] / under[0] for over, under in pairs]
            assert min(quotients) <= median <= max(quotients)
            if "at_least" in ratio["goal"]:
                assert goal.endswith("met" if median >= ratio["goal"]["at_least"] else "missed")
        for candidate, seconds in result["seconds"].items():
            assert table_row(section, candidate)[0].startswith(f"{seconds['clock']['median']:.4f} (")
        rounds = result["rounds"][0]
        assert all(len(samples) == rounds for samples in result["samples"].values())
    assert "another" in text and "On a GPU: not measured" in text
    return text


def test_image_measurement_times_all_modes_and_class_counts():
    model, whole = inference.measure_images(TOY, EAGER_ONLY, SIZE)
    check_table([model, whole])
    candidates = {
        candidate_name(library, "eager, fp32", count) for library in (MASK2FORMER, GKC) for count in TOY.classes
    }
    candidates |= {candidate_name(GKC, "optimized, fp32", count) for count in TOY.classes}
    backbones = {"backbone of GKC, eager, fp32", "backbone of GKC, optimized, fp32"}
    assert set(whole.seconds) == candidates and set(model.seconds) == candidates | backbones
    firsts = list(model.seconds)
    rounds = [model.order[start : start + len(firsts)] for start in range(0, len(model.order), len(firsts))]
    assert rounds == [firsts, firsts[::-1], firsts]
    names = [ratio["name"] for ratio in model.ratios]
    assert "GKC, eager, fp32, 7 classes / 3 classes" in names and "GKC / its backbone, eager, fp32" in names
    assert "transformers, eager / GKC, optimized, fp32, 5 classes" in names
    assert len(model.agreement) == 3


def test_image_measurement_compiles_both_models(uncompiled):
    model, whole = inference.measure_images(TOY, Options("toy", threads=1), SIZE)
    assert not model.not_measured and len(model.agreement) == 7
    check_table([model, whole])
    for mode in ("eager, fp32", "compiled, fp32", "compiled, bf16"):
        assert {candidate_name(library, mode, 5) for library in (MASK2FORMER, GKC)} <= set(whole.seconds)
    goals = {ratio["name"]: ratio["goal"] for ratio in model.ratios}
    assert goals["transformers / GKC, compiled, fp32, 5 classes"] == {"at_least": 1.6}
    assert goals["transformers, eager, fp32 / GKC, compiled, bf16, 5 classes"] == {"at_least": 5.0, "needs": "amx"}
    compiled = [type(module).__name__ for module, _ in uncompiled]
    assert compiled.count("Mask2FormerModel") == compiled.count("GKCModel") == 2


def test_table_names_missing_compiler(monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(harness.shutil, "which", lambda name: None)
    options = Options("toy", threads=1)
    results = inference.measure_images(TOY, options, SIZE)
    assert set(results[0].not_measured) == {"compiled, fp32", "compiled, bf16"}
    assert "compiled, bf16: not measured (no C++ compiler: install g++)." in markdown(record_of(results, options))
    memory = inference.measure_memory(TOY, options, GKC, models.COMPILED, "fp32")[0]
    assert memory.not_measured == {"GKC, compiled, fp32": "no C++ compiler: install g++"}


def test_failing_baseline_does_not_stop_other_candidates(monkeypatch, uncompiled):
    def fail(*args):
        raise RuntimeError("the compiler gave up\nat length")

    prepare = models.prepare_mask2former
    monkeypatch.setattr(
        models, "prepare_mask2former", lambda *args: (prepare if args[1] == models.EAGER else fail)(*args)
    )
    model, _ = inference.measure_images(TOY, Options("toy", dtypes=("fp32",), threads=1), SIZE)
    assert model.not_measured == {"transformers, compiled, fp32": "the compiler gave up"}
    assert candidate_name(GKC, "compiled, fp32", 5) in model.seconds and len(model.agreement) == 4


def test_operator_measurement_compares_all_kernels():
    (result,) = measure_operator(TOY, EAGER_ONLY, SIZE)
    assert len(result.seconds) == 4 and len(result.agreement) == 2
    assert "grid_sample / embedding_bag, fp32, forward and backward" in check_table([result])
    value, shapes, locations, _ = operator_inputs(512, "cpu", "fp32")
    assert value.shape == (1, 5376, 8, 32) and shapes == [(512 // stride,) * 2 for stride in STRIDES]
    assert locations.shape == (1, 5376, 8, 3, 4, 2)
    assert ((locations > 0) & (locations < 1)).float().mean() > 0.8


def test_failed_compilation_is_an_error(monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **kwargs: None)
    with pytest.raises(RuntimeError, match="would run uncompiled"):
        inference.measure_images(TOY, Options("toy", dtypes=("fp32",), threads=1), SIZE)


@torch.no_grad()
def test_two_stage_baseline_classifies_masked_crops():
    (result,) = measure_two_stage(TOY, EAGER_ONLY, SIZE)
    assert "two stages / GKC, optimized, fp32" in check_table([result])
    baseline = make_two_stage(TOY, models.EAGER, "fp32", EAGER_ONLY, SIZE)
    masks = torch.full((1, 2, SIZE // 4, SIZE // 4), -1.0)
    masks[0, 0, :, : SIZE // 8] = 1
    left, whole = baseline.crops(masks)
    assert left.shape == whole.shape == (TOY.crop_size, TOY.crop_size, 3)
    assert not torch.equal(left, whole) and whole.float().std() > 10
    pixels = models.random_pixels(SIZE)
    assert baseline(pixels).shape == (10, TOY.num_classes)
    outputs = baseline.segmenter(pixels, class_embeds=baseline.class_embeds)
    assert 0.05 < (outputs.masks_queries_logits > 0).float().mean() < 0.95


@torch.no_grad()
def test_clipseg_with_image_encoded_once_matches_documented_call(within):
    (result,) = measure_clipseg(TOY, EAGER_ONLY, SIZE)
    check_table([result])
    scales = {ratio["name"]: ratio["scale"] for ratio in result.ratios}
    assert scales["CLIPSeg as documented / GKC, 4 classes"] == 2.0
    baseline = CLIPSeg(TOY, "cpu")
    class_embeds = baseline.random_class_embeds(5)
    error = (baseline.encoded_once(class_embeds, batch=2) - baseline.as_documented(class_embeds)).abs().max()
    within("CLIPSeg with its image encoded once against as documented, max abs", error, 1e-5)


@pytest.fixture
def in_process(monkeypatch):
    """Run measurements in this process and collect their names."""
    planned = []

    def measure(name: str, options: Options) -> dict:
        planned.append(name)
        return json.loads(json.dumps(command.measure_in_process(name, options)))

    monkeypatch.setattr(command, "measure_in_subprocess", measure)
    yield planned
    torch.set_num_threads(1)


OPTIONS = ["--preset", "toy", "--threads", "1", "--no-compile"]


def test_command_writes_and_continues_results(in_process, tmp_path, capsys):
    out, document = tmp_path / "new", tmp_path / "page.md"
    document.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    arguments = [*OPTIONS, "--out", str(out), "--docs", str(document), "--only"]
    assert command.main([*arguments, "operator", "memory"]) == 0
    sides = ["memory transformers, eager, fp32", "memory GKC, eager, fp32", "memory GKC, optimized, fp32"]
    candidates = [*sides, "memory two-stage", "memory clipseg"]
    assert in_process == ["operator 64", *candidates]
    record, printed = json.loads((out / "results.json").read_text()), capsys.readouterr()
    table = (out / "results.md").read_text()
    assert printed.out == table == markdown(record) and "[2/6] memory" in printed.err
    assert document.read_text() == f"before\n{BEGIN}\n\n{table}\n{END}\nafter\n"
    memory = table.split("### Memory")[1]
    assert table.count("### Memory") == 1 and all(
        f"| {candidate}" in memory for candidate in ("GKC", "two stages", "CLIPSeg")
    )

    in_process.clear()
    assert command.main([*arguments, "operator"]) == command.USAGE_ERROR
    assert "name another folder with --out, or add --continue" in capsys.readouterr().err and in_process == []
    assert json.loads((out / "results.json").read_text()) == record
    assert command.main([*arguments, "operator", "clipseg", "--continue"]) == 0 and in_process == ["clipseg 64"]
    kept = json.loads((out / "results.json").read_text())["measurements"]
    assert (
        list(kept) == [*record["measurements"], "clipseg 64"]
        and kept["operator 64"] == record["measurements"]["operator 64"]
    )
    assert command.main([*arguments, "operator", "--continue", "--dtype", "fp32"]) == command.USAGE_ERROR
    assert "belongs to a run that differs in options" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_interrupted_run_keeps_results_and_continues(monkeypatch, tmp_path, capsys, number, code):
    done = {"took": 1.0, "results": []}

    def measure(name, options):
        if name == "two-stage 64":
            os.kill(os.getpid(), number)
            time.sleep(5)
        return done

    monkeypatch.setattr(command, "measure_in_subprocess", measure)
    arguments = [*OPTIONS, "--out", str(tmp_path), "--only", "operator", "two-stage", "clipseg"]
    assert command.main(arguments) == code
    assert "--continue" in capsys.readouterr().err
    assert list(json.loads((tmp_path / "results.json").read_text())["measurements"]) == ["operator 64"]
    assert "(the run was interrupted): two-stage 64, clipseg 64." in (tmp_path / "results.md").read_text()
    measured = []
    monkeypatch.setattr(command, "measure_in_subprocess", lambda name, options: measured.append(name) or done)
    assert command.main([*arguments, "--continue"]) == 0 and measured == ["two-stage 64", "clipseg 64"]


def test_failed_measurement_is_reported_and_repeated(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(
        command, "measure_in_subprocess", lambda name, options: {"failed": "exit code 1: OutputMismatch: x"}
    )
    arguments = [*OPTIONS, "--out", str(tmp_path), "--only", "operator"]
    assert command.main(arguments) == command.FAILED
    assert "**operator 64** failed: exit code 1: OutputMismatch: x" in capsys.readouterr().out
    monkeypatch.setattr(command, "measure_in_subprocess", lambda name, options: {"took": 1.0, "results": []})
    assert command.main([*arguments, "--continue"]) == 0, "a failed measurement was not repeated"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_usage_errors_name_the_option(tmp_path, capsys):
    assert command.main(["--device", "cuda", "--out", str(tmp_path)]) == command.USAGE_ERROR
    assert "torch finds no CUDA device" in capsys.readouterr().err
    assert command.main([*OPTIONS, "--only", "batch", "--out", str(tmp_path)]) == command.USAGE_ERROR
    assert "nothing to measure with --device cpu" in capsys.readouterr().err
    assert command.main([*OPTIONS, "--continue", "--out", str(tmp_path)]) == command.USAGE_ERROR
    assert "there is no run to continue" in capsys.readouterr().err
    (tmp_path / "page.md").write_text("no marks")
    with pytest.raises(ValueError, match="no place for the tables"):
        update_document(tmp_path / "page.md", "")
    with pytest.raises(SystemExit):
        command.main(["--help"])
    help_text = capsys.readouterr().out
    assert all(re.search(rf"^  {group} ", help_text, re.MULTILINE) for group in command.GROUPS)


def test_measurement_process_needs_no_training_packages():
    absent = ["datasets", "evaluate", "nltk", "accelerate", "torchvision", "timm"]
    code = (
        f"import sys; [sys.modules.__setitem__(name, None) for name in {absent}]\n"
        "from benchmarks.__main__ import main\n"
        f"sys.exit(main({[*OPTIONS, '--measure', 'operator 64']}))"
    )
    finished = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert json.loads(finished.stdout)["results"][0]["seconds"]


def test_failed_process_returns_its_last_line():
    found = command.measure_in_subprocess("no such thing", EAGER_ONLY)
    assert found == {"failed": "exit code 1: KeyError: 'no such thing'"}
