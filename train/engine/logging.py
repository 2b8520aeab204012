"""Logging of mean losses and throughput, and log lines on the console."""

import time
from collections.abc import Iterable
from datetime import timedelta

import torch
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import IntervalStrategy

from configuration import Recipe
from modeling_gkc.loss_gkc import mean_over_processes

# Values of a log line on the console, in this order; reporters get all values.
_ON_CONSOLE = ("loss", "eval_loss", "grad_norm", "learning_rate", "matched_regions", "images_per_second", "eta_hours")


class TrainingStopped(RuntimeError):
    """Raised when training cannot continue; the message names the step, the images and the reason."""


class Averages:
    """Running means of named scalars, which stay on their device until `take`."""

    def __init__(self):
        self.sums: dict[str, Tensor] = {}
        self.count = 0

    def add(self, values: dict[str, Tensor]) -> None:
        """Add the values of one step."""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach()
        self.count += 1

    def take(self) -> dict[str, float]:
        """Return the means over processes and over the steps since the last call."""
        if not self.sums:
            return {}
        device = next(iter(self.sums.values())).device
        means = mean_over_processes(torch.stack([value.to(device) for value in self.sums.values()]) / self.count)
        averages = dict(zip(self.sums, means.tolist(), strict=True))
        self.sums, self.count = {}, 0
        return averages


class ThroughputLogger(TrainerCallback):
    """Callback that logs images per second, the fraction of time spent waiting for data, and the hours to the end.

    Images per second count steps and waiting for data since the last log line, without evaluations and saving; the
    hours to the end count all. Waiting for data is the time between the end of a step and the start of the next one.

    Args:
        batch_size: Number of images in a step, over all processes.
        clock: Function that returns seconds; tests pass their own.
    """

    def __init__(self, batch_size: int, clock=time.perf_counter):
        self.batch_size = batch_size
        self.clock = clock
        self._mark = self._begin = clock()
        self._first_step = self._steps = self._step = self._last_step = 0
        self._waited = self._worked = 0.0

    def _lap(self) -> float:
        """Return the seconds since the last call."""
        now = self.clock()
        seconds, self._mark = now - self._mark, now
        return seconds

    def on_train_begin(self, args, state, control, **kwargs):
        """Start the clock."""
        self._begin = self._mark = self.clock()
        self._first_step, self._last_step = state.global_step, state.max_steps

    def on_step_begin(self, args, state, control, **kwargs):
        """Count the time since the last step as waiting for data."""
        self._waited += self._lap()

    def on_step_end(self, args, state, control, **kwargs):
        """Count the time of the step, after the accelerator has finished it."""
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        self._worked += self._lap()
        self._steps += 1
        self._step = state.global_step

    def on_log(self, args, state, control, **kwargs):
        """Leave out the time of logging, evaluating and saving."""
        self._lap()

    on_evaluate = on_save = on_log

    def log_values(self) -> dict[str, float]:
        """Return values for the steps since the last call; none before the first step."""
        seconds = self._worked + self._waited
        if not self._steps or not seconds:
            return {}
        per_step = (self.clock() - self._begin) / (self._step - self._first_step)
        values = {
            "images_per_second": self._steps * self.batch_size / seconds,
            "data_wait_share": self._waited / seconds,
            "eta_hours": (self._last_step - self._step) * per_step / 3600,
        }
        self._steps, self._waited, self._worked = 0, 0.0, 0.0
        return values


class ConsoleLogger(ProgressCallback):
    """Progress bar that also prints one short line for each log."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Print the line above the progress bar."""
        shown = [_as_text(name, logs[name]) for name in _ON_CONSOLE if name in logs]
        if state.is_world_process_zero and self.training_bar is not None and shown:
            self.training_bar.write(f"step {state.global_step}/{state.max_steps}  {'  '.join(shown)}")


def _as_text(name: str, value: float) -> str:
    """Format one value for a log line."""
    if name == "eta_hours":
        return f"ends in {timedelta(seconds=round(value * 3600))}"
    return f"{name} {value:.4g}"


def extra_log_values(callbacks: Iterable[TrainerCallback]) -> dict[str, float]:
    """Return the values that callbacks with a method `log_values` add to a log."""
    values = {}
    for callback in callbacks:
        if hasattr(callback, "log_values"):
            values |= callback.log_values()
    return values


class LastEvaluation(TrainerCallback):
    """Callback that also evaluates after the last step, unless evaluation is turned off."""

    def on_step_end(self, args, state, control, **kwargs):
        """Request an evaluation after the last step."""
        if state.global_step >= state.max_steps and args.eval_strategy != IntervalStrategy.NO:
            control.should_evaluate = True


def logging_callbacks(recipe: Recipe) -> list[TrainerCallback]:
    """Return the logging callbacks of a run.

    They must be added last, because `ThroughputLogger` does not count the time of earlier callbacks.

    Args:
        recipe: Recipe of the run.
    """
    return [LastEvaluation(), ThroughputLogger(recipe.data.batch_size)]
