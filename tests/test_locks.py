"""Two runs never write into one output, and a dead one holds nothing."""

import os
import signal

import pytest

from train.data import from_folder
from train.storage.locks import OutputInUseError, lock_output

from .processes import exit_code, start_child


def test_second_process_raises_with_the_lock_holder(tmp_path):
    out = tmp_path / "runs" / "a"

    def second() -> int:
        with (
            pytest.raises(OutputInUseError, match=rf"{out} is being written by process {parent} on .+, since .+: "),
            lock_output(out),
        ):
            pass
        with lock_output(tmp_path / "runs" / "b"):
            return 7

    parent = os.getpid()
    with lock_output(out):
        assert exit_code(start_child(second)) == 7
    assert list((tmp_path / "runs").iterdir()) == []
    with lock_output(out):
        pass


def test_lock_of_a_killed_process_is_released(tmp_path):
    """Also while a forked process is still running, like a data loader worker."""
    reading, writing = os.pipe()

    def killed() -> None:
        with lock_output(tmp_path / "a"):
            worker = start_child(lambda: signal.pause())
            os.write(writing, str(worker).encode())
            os.kill(os.getpid(), signal.SIGKILL)

    assert exit_code(start_child(killed)) == -signal.SIGKILL
    worker = int(os.read(reading, 20))
    try:
        with lock_output(tmp_path / "a"):
            assert (tmp_path / ".a.lock").is_file()
    finally:
        os.kill(worker, signal.SIGKILL)


def test_output_of_a_running_command_is_locked(tmp_path, capsys):
    out = tmp_path / "out"

    def second() -> int:
        return from_folder.main([str(tmp_path), "--out", str(out)])

    with lock_output(out):
        assert exit_code(start_child(second)) == 2
    assert not out.exists()
