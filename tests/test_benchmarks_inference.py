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
from benchmarks.harness import Disagreement, Options, Result, Rounds, compare, memory_mb, take_turns
from benchmarks.inference import OURS, THEIRS, Pair, arm_name, check_agreement, first_masks, memory_of, whole_call
from benchmarks.models import PRESETS
from benchmarks.operator_kernels import STRIDES, measure_operator, operator_inputs
from benchmarks.report import BEGIN, END, markdown, update_document

ROOT = Path(__file__).parent.parent
TOY = PRESETS["toy"]
SIZE = TOY.sizes[0]
EAGER_ONLY = Options("toy", threads=1, compile=False)


@pytest.fixture
def uncompiled(monkeypatch):
    """torch.compile that only notes what it was given: the toys run as compiled arms in no time."""
    noted = []

    def call_as_it_is(module, **kwargs):
        noted.append((module, kwargs))
        module._compiled_call_impl = module._call_impl

    monkeypatch.setattr(torch.nn.Module, "compile", call_as_it_is)

    def compile_nothing(function, **kwargs):
        noted.append((function, kwargs))
        return function

    monkeypatch.setattr(torch, "compile", compile_nothing)
    return noted


def make_pair(dtype: str = "fp32") -> Pair:
    source = models.make_source(TOY, 5)
    ours = models.prepare_ours(models.make_converted(source, TOY), models.EAGER, dtype, "cpu", SIZE)
    return Pair(models.EAGER, dtype, ours, models.prepare_source(source, models.EAGER, dtype, "cpu"))


@torch.no_grad()
def fp32_masks() -> torch.Tensor:
    return models.make_source(TOY, 5)(models.random_pixels(SIZE)).masks_queries_logits


def record_of(results: list[Result], options: Options = EAGER_ONLY) -> dict:
    """What the command would keep of these results."""
    found = [asdict(result) | {"load_average": [1.0, 2.0]} for result in results]
    return {
        "command": "python -m benchmarks",
        "date": "today",
        "options": asdict(options),
        "machine": harness.machine(1),
        "planned": ["one", "another"],
        "measurements": {"one": {"took": 1.0, "results": found}},
    }


def test_arms_take_turns():
    called = []
    arms = {name: lambda name=name: called.append(name) for name in "abc"}
    taken = take_turns(arms, rounds=3, warm_up=1)
    assert called == taken.order == [*"abc", *"cba", *"abc", *"cba"]
    assert {arm: len(samples) for arm, samples in taken.samples.items()} == dict.fromkeys("abc", 3)


def test_no_round_is_begun_after_the_limit():
    taken = take_turns({"a": lambda: time.sleep(0.01), "b": lambda: None}, rounds=50, limit=0.0)
    assert len(taken.samples["a"]) == len(taken.samples["b"]) == 2


def test_a_call_is_timed_by_both_clocks():
    def work(until: float) -> None:
        while time.process_time() < until:
            pass

    clock, processor = harness.timed(lambda: work(time.process_time() + 0.05))
    assert 0.05 <= processor < clock + 0.02
    clock, processor = harness.timed(lambda: time.sleep(0.05))
    assert clock >= 0.05 and processor < 0.04


def test_ratios_are_taken_within_rounds():
    taken = Rounds({"slow": [(2.0, 4.0), (9.0, 6.0), (8.0, 8.0)], "fast": [(1.0, 1.0), (3.0, 2.0), (2.0, 4.0)]}, [])
    ratio = taken.ratio("slow / fast", "slow", "fast", at_least=2.5)
    assert ratio["clock"] == {"median": 3.0, "least": 2.0, "most": 4.0} and ratio["goal"] == {"at_least": 2.5}
    assert ratio["processor"] == {"median": 3.0, "least": 2.0, "most": 4.0}
    assert taken.ratio("ten of slow / fast", "slow", "fast", scale=10)["clock"]["median"] == 30.0
    assert taken.ratio("none", "slow", "missing") is None
    assert taken.seconds()["slow"]["clock"] == {"median": 8.0, "least": 2.0, "most": 9.0}


def test_differences_are_told_and_bounded():
    expected = torch.randn(1000)
    found = compare("x", expected + 0.001, expected, 0.01)
    assert found["max_abs"] == pytest.approx(0.001, rel=1e-2) and found["rms"] == pytest.approx(0.001, rel=0.1)
    with pytest.raises(Disagreement, match=r"x: the largest difference is .* times cannot be compared"):
        compare("x", expected + 0.1, expected, 0.01)
    outlier = expected.clone()
    outlier[0] += 1
    compare("x", outlier, expected, 0.1, "rms")
    for value in (float("nan"), 100.0):
        outlier[0] = value
        with pytest.raises(Disagreement, match="rms"):
            compare("x", outlier, expected, 0.1, "rms")


def test_memory_is_that_of_the_calls():
    held = memory_mb("VmRSS")
    found = memory_of(lambda: torch.zeros(50, 2**18).sum())  # 50 MB
    assert found["before"] == pytest.approx(held, abs=30)
    assert 45 < found["later"] - found["before"] < 100 and found["peak"] >= found["later"] - 10
    assert memory_of(lambda: None)["later"] < found["later"] - 30, "the earlier peak was not forgotten"


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_both_sides_agree_on_the_same_weights_only(dtype):
    pair, expected = make_pair(dtype), fp32_masks()
    assert 0.05 < (expected > 0).float().mean() < 0.95, "the comparison needs masks with inside and outside"
    theirs = first_masks(pair.theirs, pair, SIZE)
    found = check_agreement(pair, SIZE, theirs, expected)
    assert [each["name"].split()[2] for each in found] == [f"{THEIRS},", f"{OURS},"]
    assert found[1]["largest"] < 1e-3 if dtype == "fp32" else 0 < found[1]["rms"] < 0.5
    with torch.no_grad():
        pair.ours.model.pixel_decoder.mask_projection.weight.neg_()
    with pytest.raises(Disagreement, match=f"masks of {OURS}"):
        check_agreement(pair, SIZE, theirs, expected)


@torch.no_grad()
def test_every_arm_gives_what_its_user_wants(tmp_path):
    pair = make_pair()
    path = models.write_picture(tmp_path, TOY)
    target = TOY.picture[::-1]
    for side, model in pair.sides():
        labels = whole_call(side, model, 7, SIZE, path, target)()
        assert labels.shape == target and labels.min() >= 0 and labels.max() < 7
        outputs = inference.model_call(side, model, 7, models.random_pixels(SIZE))()
        assert outputs.class_queries_logits.shape == (1, 10, 8)


def shown(text: str, name: str) -> list[str]:
    """Cells of the table row of this name."""
    row = next(line for line in text.splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in row.strip("|").split("|")][1:]


def check_table(results: list[Result]) -> str:
    """Every number of the table is that of the JSON; what the table says of the goals is so."""
    record = json.loads(json.dumps(record_of(results)))
    text = markdown(record)
    about = record["machine"]
    for part in (about["processor"], f"torch {torch.__version__}", "transformers", "1 threads", "load average"):
        assert part in text
    for result in record["measurements"]["one"]["results"]:
        section = text.split(f"### {result['title']}\n")[1].split("###")[0]
        for ratio in result["ratios"]:
            clock, _, goal = shown(section, ratio["name"])
            median = ratio["clock"]["median"]
            assert clock.startswith(f"{median:.2f} (")
            pairs = zip(result["samples"][ratio["over"]], result["samples"][ratio["under"]], strict=True)
            quotients = [ratio["scale"] * over[0] / under[0] for over, under in pairs]
            assert min(quotients) <= median <= max(quotients)
            if "at_least" in ratio["goal"]:
                assert goal.endswith("met" if median >= ratio["goal"]["at_least"] else "missed")
        for arm, seconds in result["seconds"].items():
            assert shown(section, arm)[0].startswith(f"{seconds['clock']['median']:.4f} (")
        rounds = result["rounds"][0]
        assert all(len(samples) == rounds for samples in result["samples"].values())
    assert "another" in text and "On a GPU: not measured" in text
    return text


def test_image_measurement():
    model, whole = inference.measure_images(TOY, EAGER_ONLY, SIZE)
    check_table([model, whole])
    arms = {arm_name(side, "eager, fp32", count) for side in (THEIRS, OURS) for count in TOY.classes}
    arms |= {arm_name(OURS, "optimised, fp32", count) for count in TOY.classes}
    backbones = {"backbone of ours, eager, fp32", "backbone of ours, optimised, fp32"}
    assert set(whole.seconds) == arms and set(model.seconds) == arms | backbones
    firsts = list(model.seconds)
    rounds = [model.order[start : start + len(firsts)] for start in range(0, len(model.order), len(firsts))]
    assert rounds == [firsts, firsts[::-1], firsts]
    names = [ratio["name"] for ratio in model.ratios]
    assert "ours, eager, fp32, 7 words / 3 words" in names and "ours / its backbone, eager, fp32" in names
    assert "transformers, eager / ours, optimised, fp32, 5 words" in names
    assert len(model.agreement) == 3


def test_compiled_arms(uncompiled):
    """Ours by `optimize_for_inference`, transformers' by torch.compile, each in every type, against the fp32."""
    model, whole = inference.measure_images(TOY, Options("toy", threads=1), SIZE)
    assert not model.not_measured and len(model.agreement) == 7
    check_table([model, whole])
    for mode in ("eager, fp32", "compiled, fp32", "compiled, bf16"):
        assert {arm_name(side, mode, 5) for side in (THEIRS, OURS)} <= set(whole.seconds)
    goals = {ratio["name"]: ratio["goal"] for ratio in model.ratios}
    assert goals["transformers / ours, compiled, fp32, 5 words"] == {"at_least": 1.6}
    assert goals["transformers, eager, fp32 / ours, compiled, bf16, 5 words"] == {"at_least": 5.0, "needs": "amx"}
    compiled = [type(module).__name__ for module, _ in uncompiled]
    assert compiled.count("Mask2FormerModel") == compiled.count("GKCModel") == 2


def test_without_a_compiler_the_table_says_so(monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(harness.shutil, "which", lambda name: None)
    options = Options("toy", threads=1)
    results = inference.measure_images(TOY, options, SIZE)
    assert set(results[0].not_measured) == {"compiled, fp32", "compiled, bf16"}
    assert "compiled, bf16: not measured (no C++ compiler: install g++)." in markdown(record_of(results, options))
    memory = inference.measure_memory(TOY, options, OURS, models.COMPILED, "fp32")[0]
    assert memory.not_measured == {"ours, compiled, fp32": "no C++ compiler: install g++"}


def test_what_transformers_cannot_run_does_not_stop_the_rest(monkeypatch, uncompiled):
    def fail(*args):
        raise RuntimeError("the compiler gave up\nat length")

    prepare = models.prepare_source
    monkeypatch.setattr(models, "prepare_source", lambda *args: (prepare if args[1] == models.EAGER else fail)(*args))
    model, _ = inference.measure_images(TOY, Options("toy", dtypes=("fp32",), threads=1), SIZE)
    assert model.not_measured == {"transformers, compiled, fp32": "the compiler gave up"}
    assert arm_name(OURS, "compiled, fp32", 5) in model.seconds and len(model.agreement) == 4


def test_operator_measurement():
    (result,) = measure_operator(TOY, EAGER_ONLY, SIZE)
    assert len(result.seconds) == 4 and len(result.agreement) == 2
    assert "grid_sample / embedding_bag, fp32, forward and backward" in check_table([result])
    value, shapes, locations, _ = operator_inputs(512, "cpu", "fp32")
    assert value.shape == (1, 5376, 8, 32) and shapes == [(512 // stride,) * 2 for stride in STRIDES]
    assert locations.shape == (1, 5376, 8, 3, 4, 2)
    assert ((locations > 0) & (locations < 1)).float().mean() > 0.8


def test_ours_that_fell_back_to_eager_is_no_compiled_arm(monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **kwargs: None)
    with pytest.raises(RuntimeError, match="would not be one"):
        inference.measure_images(TOY, Options("toy", dtypes=("fp32",), threads=1), SIZE)


@torch.no_grad()
def test_two_stage_measurement():
    (result,) = measure_two_stage(TOY, EAGER_ONLY, SIZE)
    assert "two stages / ours, optimised, fp32" in check_table([result])
    rival = make_two_stage(TOY, models.EAGER, "fp32", EAGER_ONLY, SIZE)
    masks = torch.full((1, 2, SIZE // 4, SIZE // 4), -1.0)
    masks[0, 0, :, : SIZE // 8] = 1
    left, whole = rival.crops(masks)
    assert left.shape == whole.shape == (TOY.crop_size, TOY.crop_size, 3)
    assert not torch.equal(left, whole) and whole.float().std() > 10
    pixels = models.random_pixels(SIZE)
    assert rival(pixels).shape == (10, TOY.num_classes)
    assert 0.05 < (rival.segmenter(pixels, class_embeds=rival.words).masks_queries_logits > 0).float().mean() < 0.95


@torch.no_grad()
def test_clipseg_measurement(within):
    (result,) = measure_clipseg(TOY, EAGER_ONLY, SIZE)
    check_table([result])
    scales = {ratio["name"]: ratio["scale"] for ratio in result.ratios}
    assert scales["CLIPSeg as documented / ours, 4 words"] == 2.0
    rival = CLIPSeg(TOY, "cpu")
    words = rival.words(5)
    error = (rival.encoded_once(words, batch=2) - rival.as_documented(words)).abs().max()
    within("CLIPSeg with its image encoded once against as documented, max abs", error, 1e-5)


@pytest.fixture
def in_process(monkeypatch):
    """The command measures in this process; `planned` are the names that it was asked for."""
    planned = []

    def measure(name: str, options: Options) -> dict:
        planned.append(name)
        return json.loads(json.dumps(command.measure_here(name, options)))

    monkeypatch.setattr(command, "measure_apart", measure)
    yield planned
    torch.set_num_threads(1)


TYPED = ["--preset", "toy", "--threads", "1", "--no-compile"]


def test_the_command(in_process, tmp_path, capsys):
    out, document = tmp_path / "new", tmp_path / "page.md"
    document.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    typed = [*TYPED, "--out", str(out), "--docs", str(document), "--only"]
    assert command.main([*typed, "operator", "memory"]) == 0
    sides = ["memory transformers, eager, fp32", "memory ours, eager, fp32", "memory ours, optimised, fp32"]
    arms = [*sides, "memory two-stage", "memory clipseg"]
    assert in_process == ["operator 64", *arms]
    record, printed = json.loads((out / "results.json").read_text()), capsys.readouterr()
    table = (out / "results.md").read_text()
    assert printed.out == table == markdown(record) and "[2/6] memory" in printed.err
    assert document.read_text() == f"before\n{BEGIN}\n\n{table}\n{END}\nafter\n"
    memory = table.split("### Memory")[1]
    assert table.count("### Memory") == 1 and all(f"| {arm}" in memory for arm in ("ours", "two stages", "CLIPSeg"))

    in_process.clear()
    assert command.main([*typed, "operator"]) == command.MISUSED
    assert "name another folder with --out, or add --continue" in capsys.readouterr().err and in_process == []
    assert json.loads((out / "results.json").read_text()) == record
    assert command.main([*typed, "operator", "clipseg", "--continue"]) == 0 and in_process == ["clipseg 64"]
    kept = json.loads((out / "results.json").read_text())["measurements"]
    assert (
        list(kept) == [*record["measurements"], "clipseg 64"]
        and kept["operator 64"] == record["measurements"]["operator 64"]
    )
    assert command.main([*typed, "operator", "--continue", "--dtype", "fp32"]) == command.MISUSED
    assert "is of another options" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_an_ended_run_keeps_what_it_has(monkeypatch, tmp_path, capsys, number, code):
    done = {"took": 1.0, "results": []}

    def measure(name, options):
        if name == "two-stage 64":
            os.kill(os.getpid(), number)
            time.sleep(5)
        return done

    monkeypatch.setattr(command, "measure_apart", measure)
    typed = [*TYPED, "--out", str(tmp_path), "--only", "operator", "two-stage", "clipseg"]
    assert command.main(typed) == code
    assert "--continue" in capsys.readouterr().err
    assert list(json.loads((tmp_path / "results.json").read_text())["measurements"]) == ["operator 64"]
    assert "(the run was ended before): two-stage 64, clipseg 64." in (tmp_path / "results.md").read_text()
    measured = []
    monkeypatch.setattr(command, "measure_apart", lambda name, options: measured.append(name) or done)
    assert command.main([*typed, "--continue"]) == 0 and measured == ["two-stage 64", "clipseg 64"]


def test_what_failed_is_told(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(command, "measure_apart", lambda name, options: {"failed": "exit code 1: Disagreement: x"})
    typed = [*TYPED, "--out", str(tmp_path), "--only", "operator"]
    assert command.main(typed) == command.FAILED
    assert "**operator 64** failed: exit code 1: Disagreement: x" in capsys.readouterr().out
    monkeypatch.setattr(command, "measure_apart", lambda name, options: {"took": 1.0, "results": []})
    assert command.main([*typed, "--continue"]) == 0, "what failed is measured again"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_misuse(tmp_path, capsys):
    assert command.main(["--device", "cuda", "--out", str(tmp_path)]) == command.MISUSED
    assert "torch sees no CUDA device" in capsys.readouterr().err
    assert command.main([*TYPED, "--only", "batch", "--out", str(tmp_path)]) == command.MISUSED
    assert "nothing of it is measured on the device cpu" in capsys.readouterr().err
    assert command.main([*TYPED, "--continue", "--out", str(tmp_path)]) == command.MISUSED
    assert "nothing to continue" in capsys.readouterr().err
    (tmp_path / "page.md").write_text("no marks")
    with pytest.raises(ValueError, match="no place for the tables"):
        update_document(tmp_path / "page.md", "")
    with pytest.raises(SystemExit):
        command.main(["--help"])
    help_text = capsys.readouterr().out
    assert all(re.search(rf"^  {group} ", help_text, re.MULTILINE) for group in command.GROUPS)


def test_a_process_of_its_own_needs_no_training_package():
    """As the command starts it, in a Python that lacks what only training needs."""
    absent = ["datasets", "evaluate", "nltk", "accelerate", "torchvision", "timm"]
    code = (
        f"import sys; [sys.modules.__setitem__(name, None) for name in {absent}]\n"
        "from benchmarks.__main__ import main\n"
        f"sys.exit(main({[*TYPED, '--measure', 'operator 64']}))"
    )
    finished = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert json.loads(finished.stdout)["results"][0]["seconds"]


def test_a_failing_process_says_why():
    found = command.measure_apart("no such thing", EAGER_ONLY)
    assert found == {"failed": "exit code 1: KeyError: 'no such thing'"}
