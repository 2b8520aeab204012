"""Logging callbacks: throughput by a simulated clock, and lines on the console."""

from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

from configuration import Recipe
from train.engine.logging import (
    Averages,
    ConsoleLogger,
    LastEvaluation,
    ThroughputLogger,
    extra_log_values,
    logging_callbacks,
)


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def turn(self, seconds: float) -> None:
        self.now += seconds


class Loop:
    """What a Trainer tells its callbacks, with the time that each part takes."""

    def __init__(self, step: int = 0, steps: int = 20):
        self.clock = Clock()
        self.speed = ThroughputLogger(batch_size=8, clock=self.clock)
        self.state = SimpleNamespace(global_step=step, max_steps=steps)
        self.tell("on_train_begin")

    def tell(self, event: str) -> None:
        getattr(self.speed, event)(None, self.state, None)

    def run(self, wait: float, work: float) -> None:
        self.clock.turn(wait)
        self.tell("on_step_begin")
        self.clock.turn(work)
        self.state.global_step += 1
        self.tell("on_step_end")

    def pause(self, event: str, seconds: float) -> None:
        self.clock.turn(seconds)
        self.tell(event)


def test_speed_counts_steps_and_waiting():
    loop = Loop()
    assert loop.speed.log_values() == {}
    for _ in range(4):
        loop.run(wait=0.5, work=1.5)
    values = loop.speed.log_values()
    assert values == pytest.approx({"images_per_second": 4.0, "data_wait_share": 0.25, "eta_hours": 16 * 2 / 3600})
    assert loop.speed.log_values() == {}


def test_speed_excludes_evaluation_and_saving_until_the_end():
    loop = Loop()
    loop.run(wait=1, work=1)
    loop.speed.log_values()
    for event in ("on_log", "on_evaluate", "on_save"):
        loop.pause(event, 10)
    loop.run(wait=1, work=3)
    values = loop.speed.log_values()
    assert values["images_per_second"] == pytest.approx(2) and values["data_wait_share"] == pytest.approx(0.25)
    assert values["eta_hours"] == pytest.approx(18 * 36 / 2 / 3600)


def test_speed_of_a_resumed_run_counts_its_own_steps():
    loop = Loop(step=10)
    loop.run(wait=0, work=2)
    assert loop.speed.log_values()["eta_hours"] == pytest.approx(9 * 2 / 3600)


def test_callbacks_add_to_a_log_line():
    loop = Loop()
    loop.run(wait=1, work=1)
    assert extra_log_values([ConsoleLogger(), loop.speed]).keys() == {
        "images_per_second",
        "data_wait_share",
        "eta_hours",
    }
    assert extra_log_values([ConsoleLogger()]) == {}
    assert [type(callback) for callback in logging_callbacks(Recipe())] == [LastEvaluation, ThroughputLogger]


@pytest.mark.parametrize(("step", "strategy", "expected"), [(4, "steps", False), (5, "steps", True), (5, "no", False)])
def test_the_last_step_is_evaluated_too(tmp_path, step, strategy, expected):
    args = TrainingArguments(tmp_path, eval_strategy=strategy, eval_steps=3, use_cpu=True)
    control = TrainerControl()
    LastEvaluation().on_step_end(args, TrainerState(global_step=step, max_steps=5), control)
    assert control.should_evaluate == expected


@pytest.mark.parametrize("is_main", [True, False])
def test_the_console_shows_one_short_line(is_main):
    lines = []
    console = ConsoleLogger()
    console.training_bar = SimpleNamespace(write=lines.append)
    state = SimpleNamespace(is_world_process_zero=is_main, global_step=50, max_steps=100)
    logs = {"loss": 12.3456, "loss_mask": 1.0, "learning_rate": 3e-4, "eta_hours": 1.5, "images_per_second": 80.0}
    console.on_log(None, state, None, logs)
    console.on_log(None, state, None, {"train_runtime": 3})
    line = "step 50/100  loss 12.35  learning_rate 0.0003  images_per_second 80  ends in 1:30:00"
    assert lines == ([line] if is_main else [])


def test_averages_start_at_the_last_log():
    averages = Averages()
    assert averages.take() == {}
    for value in (1.0, 2.0):
        averages.add({"loss": torch.tensor(value, requires_grad=True)})
    assert averages.take() == {"loss": 1.5}
    averages.add({"loss": torch.tensor(5.0)})
    assert averages.take() == {"loss": 5.0}
