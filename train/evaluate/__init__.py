"""Evaluation of segmentation models on prepared benchmarks.

The modules in the order of the data flow: `vocabulary` (class names of a benchmark as the prompts of a model),
`segmenter` and `adapters` (models behind one interface), `samples` (images with ground truth), `chunks` (crash-safe
partial results), `loop` (evaluation of one chunk), `session` (loaded data and model), `run` (distribution over
processes), `result` (result file) and `report` (tables). `command` is the command line. Metrics are registered in
`train.metrics`; the protocol of a benchmark is defined beside its reader in `train.data.benchmarks`.
"""
