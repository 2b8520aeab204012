"""Evaluation: a model's predictions on a prepared benchmark, scored as the field scores them.

`protocol` (what a benchmark asks for) -> `words` (what the model is asked) -> `segmenter`, `adapters` (models) ->
`samples` (rows) -> `scores` (metrics of the tasks) -> `chunks` (work in pieces that survive a kill) -> `loop` ->
`session` (all that one evaluation needs) -> `outcome` -> `result` (the file) -> `report` (tables). `command` is
what is typed.
"""
