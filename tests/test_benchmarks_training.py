"""Both benchmarks of training on a toy: they run, and what they print is what was measured."""

import itertools
import json

import numpy as np
import pytest
import torch

from benchmarks.training_memory import main, memory_over_steps, slope
from benchmarks.training_step import PARTS, PRESETS, VARIANTS, StepTimer, Workload, measure, random_row, table
from train.data import check_dataset


@pytest.fixture(scope="module")
def timer(tmp_path_factory) -> StepTimer:
    return StepTimer(Workload(PRESETS["toy"], tmp_path_factory.mktemp("training")))


def test_random_rows_are_valid_training_data(timer):
    row = random_row(0, 32, 4, 20)
    assert row == random_row(0, 32, 4, 20) and len(row["segments"]) == 4
    check_dataset(timer.trainer.train_dataset.dataset, [str(number) for number in range(20)], progress=False)


def test_clip_runs_in_online_steps_but_not_in_cached_steps(timer, monkeypatch):
    ran = []
    towers = {
        "text": timer.trainer.student.text_model,
        "image": timer.trainer.losses[0].context.teacher.teacher.vision_model,
    }
    hooks = [
        tower.register_forward_hook(lambda module, inputs, output, name=name: ran.append(name))
        for name, tower in towers.items()
    ]
    timer("cached")
    assert ran == []
    for variant in ("online", "mask2former"):
        ran.clear()
        timer(variant)
        assert sorted(ran) == ["image", "text"]
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("variant", VARIANTS)
def test_parts_of_a_step_do_not_overlap(timer, variant, monkeypatch):
    """With a clock that counts its readings, parts that overlapped would sum to more than the whole step."""
    readings = itertools.count()
    monkeypatch.setattr(timer, "_clocks", lambda: np.full(2, float(next(readings))))
    student = timer.mask2former if variant == "mask2former" else timer.model.student
    before = [parameter.clone() for parameter in student.model.parameters()]
    parts = timer(variant)
    assert parts.keys() == {"all", *PARTS}
    for index in (0, 1):
        assert len(PARTS) <= sum(parts[part][index] for part in PARTS) <= parts["all"][index]
    after = student.model.parameters()
    assert any(not torch.equal(old, new) for old, new in zip(before, after, strict=True)), "no weight was updated"


def test_table_shows_measured_values():
    found = measure(PRESETS["toy"], rounds=1, warm_up=0)
    assert found["regions"] == 6 and json.loads(json.dumps(found)) == found
    seconds = found["seconds"]
    lines = table(found).splitlines()
    for variant in ("online", "mask2former"):
        ratio = seconds[variant]["clock"]["all"]["median"] / seconds["cached"]["clock"]["all"]["median"]
        assert found["ratios"][variant]["clock"]["median"] == pytest.approx(ratio)
        assert f"{variant} step over cached step, clock seconds: {ratio:.2f}" in table(found)
    assert len([line for line in lines if line.startswith(tuple(f"| {variant}" for variant in VARIANTS))]) == 6
    assert f"{seconds['cached']['clock']['all']['median']:.2f}" in lines[2]


def test_slope_of_noisy_line_is_within_its_standard_error():
    steps = np.arange(0, 500, 5)
    noise = np.random.default_rng(0).normal(0, 3, len(steps))
    rise, error = slope(steps.tolist(), (100 + (2 * steps + noise) / 1024).tolist())
    assert abs(rise - 2) < 3 * error < 0.02


def test_memory_is_read_at_the_given_interval():
    reader = memory_over_steps(6, every=2)
    assert reader.steps == [2, 4, 6] and all(held > 10 for held in reader.held_mb)


def test_memory_command_prints_slope_and_peak(capsys):
    """The command runs in this process; the peak is measured in a process of its own."""
    main(["--steps", "4", "--every", "1", "--preset", "toy", "--variants", "cached", "--threads", "1"])
    printed = capsys.readouterr().out
    found = json.loads(next(line for line in printed.splitlines() if line.startswith('{"machine"')))
    assert found["steps"] == [1, 2, 3, 4] and found["peak_mb"]["cached"] > 10
    assert "slope of the second half" in printed and "peak of the step, toy, cached" in printed
