"""Tests that run a few hundred inputs of every fuzzer; `python -m tests.fuzz` runs any number of them."""

import importlib.util

import pytest

from tests.fuzz import SURFACES, run

COUNT = 200
AVAILABLE = [surface for surface in SURFACES if importlib.util.find_spec(f"tests.fuzz.{surface}")]


@pytest.mark.parametrize("surface", AVAILABLE)
def test_inputs_are_read_correctly_or_rejected(surface):
    report = run(surface, COUNT)
    assert not report.failures, "\n".join(f"input {index}: {text}" for index, text in report.failures[:5])
    assert report.outcomes["accepted"] and report.outcomes["refused"], "the fuzzer produced only one kind of outcome"
