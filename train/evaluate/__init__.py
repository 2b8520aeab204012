"""Evaluation: a model's predictions on a prepared benchmark, scored as the field scores them.

`vocabulary` (the words that the model is asked) -> `segmenter`, `adapters` (models) -> `samples` (rows) -> `chunks`
(work in pieces that survive a kill) -> `loop` -> `session` (all that one evaluation needs) -> `run` -> `result` (the
file) -> `report` (tables). `command` is what is typed. Metrics register themselves in `train.metrics`; what a
benchmark asks for stands with its reader in `train.data.benchmarks`.
"""
