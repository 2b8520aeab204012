"""Checkpoints: which one is complete."""

import json
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

TRAINER_STATE_NAME = "trainer_state.json"  # as transformers names it


def last_complete_checkpoint(output_dir: str | Path) -> Path:
    """The checkpoint of most steps whose writing was not interrupted.

    Raises:
        ValueError: there is none.
    """
    prefix = f"{PREFIX_CHECKPOINT_DIR}-"
    checkpoints = [path for path in Path(output_dir).glob(f"{prefix}*") if path.name.removeprefix(prefix).isdigit()]
    for path in sorted(checkpoints, key=lambda path: int(path.name.removeprefix(prefix)), reverse=True):
        try:
            # The Trainer writes this file last.
            json.loads((path / TRAINER_STATE_NAME).read_text())
        except (OSError, json.JSONDecodeError):
            continue
        return path
    raise ValueError(f"There is no complete checkpoint in {output_dir}; train without `resume_from_checkpoint`.")
