"""Both benchmarks of training on a toy: they run, and what they print is what was measured."""

import json

import numpy as np
import pytest
import torch

from benchmarks.training_memory import held_over_steps, main, slope
from benchmarks.training_step import ARMS, PARTS, PRESETS, StepTimer, Workload, measure, random_row, table
from train.data import check_dataset


@pytest.fixture(scope="module")
def timer(tmp_path_factory) -> StepTimer:
    return StepTimer(Workload(PRESETS["toy"], tmp_path_factory.mktemp("training")))


def test_rows_are_training_data(timer):
    row = random_row(0, 32, 4, 20)
    assert row == random_row(0, 32, 4, 20) and len(row["segments"]) == 4
    check_dataset(timer.trainer.train_dataset.dataset, [str(number) for number in range(20)], progress=False)


def test_steps_run_both_towers_but_a_cached_one_neither(timer, monkeypatch):
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
    for arm in ("online", "published"):
        ran.clear()
        timer(arm)
        assert sorted(ran) == ["image", "text"]
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("arm", ARMS)
def test_parts_add_up_to_the_step(timer, arm):
    student = timer.published if arm == "published" else timer.model.student
    before = [parameter.clone() for parameter in student.model.parameters()]
    parts = timer(arm)
    assert parts.keys() == {"all", *PARTS}
    for index in (0, 1):
        assert 0.9 * parts["all"][index] <= sum(parts[part][index] for part in PARTS) <= parts["all"][index]
    after = student.model.parameters()
    assert any(not torch.equal(old, new) for old, new in zip(before, after, strict=True)), "nothing was learned"


def test_the_table_shows_what_was_measured():
    found = measure(PRESETS["toy"], rounds=1, warm_up=0)
    assert found["regions"] == 6 and json.loads(json.dumps(found)) == found
    seconds = found["seconds"]
    lines = table(found).splitlines()
    for arm in ("online", "published"):
        ratio = seconds[arm]["clock"]["all"]["median"] / seconds["cached"]["clock"]["all"]["median"]
        assert found["ratios"][arm]["clock"]["median"] == pytest.approx(ratio)
        assert f"the {arm} step costs {ratio:.2f}" in table(found)
    assert len([line for line in lines if line.startswith(tuple(f"| {arm}" for arm in ARMS))]) == 6
    assert f"{seconds['cached']['clock']['all']['median']:.2f}" in lines[2]


def test_the_slope_and_its_error():
    steps = np.arange(0, 500, 5)
    noise = np.random.default_rng(0).normal(0, 3, len(steps))
    rise, error = slope(steps.tolist(), (100 + (2 * steps + noise) / 1024).tolist())
    assert abs(rise - 2) < 3 * error < 0.02


def test_memory_is_read_every_few_steps():
    reader = held_over_steps(6, every=2)
    assert reader.steps == [2, 4, 6] and all(held > 10 for held in reader.held_mb)


def test_the_memory_command(capsys):
    """In this process, but for the peak, which the other benchmark's command measures in its own."""
    main(["--steps", "4", "--every", "1", "--preset", "toy", "--arms", "cached", "--threads", "1"])
    printed = capsys.readouterr().out
    found = json.loads(next(line for line in printed.splitlines() if line.startswith('{"machine"')))
    assert found["steps"] == [1, 2, 3, 4] and found["peak_mb"]["cached"] > 10
    assert "slope of the second half" in printed and "peak of the step, toy, cached" in printed
