"""Atomic writing: what is at the final name is the old file or the whole new one."""

import os
import signal
import stat

import pytest

from modeling_gkc.atomic_files import (
    atomic_folder,
    atomic_path,
    atomic_write,
    atomic_write_json,
    remove_leftovers,
    replaced_files,
)


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing_behind(tmp_path):
    target = tmp_path / "result.json"
    atomic_write(target, "old")
    with pytest.raises(OSError, match="disk"), atomic_path(target) as temporary:
        temporary.write_text("half")
        raise OSError("disk full")
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["result.json"]


def test_the_temporary_file_lies_beside_the_target_and_keeps_its_suffix(tmp_path):
    with atomic_path(tmp_path / "map.png") as temporary:
        assert temporary.parent == tmp_path
        assert temporary.suffix == ".png"
        assert not (tmp_path / "map.png").exists()
        temporary.write_bytes(b"whole")
    assert (tmp_path / "map.png").read_bytes() == b"whole"


def test_results_have_the_permissions_of_ordinary_files(tmp_path):
    mask = os.umask(0o022)
    try:
        atomic_write(tmp_path / "result.txt", b"x", sync=True)
    finally:
        os.umask(mask)
    assert stat.S_IMODE((tmp_path / "result.txt").stat().st_mode) == 0o644


def test_long_names_fit_into_the_limit_of_the_file_system(tmp_path):
    name = "n" * 250 + ".json"
    atomic_write_json(tmp_path / name, {"a": 1})
    assert os.listdir(tmp_path) == [name]


def test_values_that_json_cannot_represent_raise(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        atomic_write_json(tmp_path / "result.json", {"score": float("nan")})
    assert not list(tmp_path.iterdir())


def test_folder_is_written_completely_or_not_at_all(tmp_path):
    with pytest.raises(OSError, match="disk"), atomic_folder(tmp_path / "checkpoint") as unfinished:
        (unfinished / "model.safetensors").write_bytes(b"half")
        raise OSError("disk full")
    assert os.listdir(tmp_path) == []
    with atomic_folder(tmp_path / "checkpoint") as unfinished:
        (unfinished / "model.safetensors").write_bytes(b"whole")
    assert os.listdir(tmp_path) == ["checkpoint"]
    with pytest.raises(FileExistsError, match="already exists"), atomic_folder(tmp_path / "checkpoint"):
        pass
    assert (tmp_path / "checkpoint" / "model.safetensors").read_bytes() == b"whole"


def test_folder_is_replaced_only_by_a_complete_one(tmp_path):
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "old").touch()
    with (
        pytest.raises(OSError, match="disk"),
        atomic_folder(tmp_path / "checkpoint", overwrite=True) as unfinished,
    ):
        (unfinished / "new").touch()
        raise OSError("disk full")
    assert os.listdir(tmp_path) == ["checkpoint"] and os.listdir(tmp_path / "checkpoint") == ["old"]
    mask = os.umask(0o022)
    try:
        with atomic_folder(tmp_path / "checkpoint", overwrite=True) as unfinished:
            (unfinished / "new").touch()
    finally:
        os.umask(mask)
    assert os.listdir(tmp_path) == ["checkpoint"] and os.listdir(tmp_path / "checkpoint") == ["new"]
    assert stat.S_IMODE((tmp_path / "checkpoint").stat().st_mode) == 0o755


def test_only_leftovers_of_killed_writers_are_removed(tmp_path):
    left = []
    for name in ("result.json", "other.json", "data"):
        with pytest.raises(OSError, match="killed"), atomic_path(tmp_path / name) as temporary:
            left.append(temporary.name)
            raise OSError("killed")
    kept = [".hidden", "result.json", ".result.part.json", ".gitignore"]
    for name in [*kept, *left[:2]]:
        (tmp_path / name).touch()
    (tmp_path / left[2]).mkdir()
    (tmp_path / left[2] / "shard").touch()
    remove_leftovers(tmp_path, "result.json")
    assert sorted(os.listdir(tmp_path)) == sorted([*kept, *left[1:]])
    remove_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted(kept)
    remove_leftovers(tmp_path / "nothing")


def test_files_of_a_folder_are_replaced_only_by_complete_ones(tmp_path):
    (tmp_path / "config.json").write_text("old")
    (tmp_path / "other.txt").write_text("kept")
    with pytest.raises(OSError, match="the disk is full"), replaced_files(tmp_path) as unfinished:
        (unfinished / "config.json").write_text("new")
        raise OSError("the disk is full")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"config.json": "old", "other.txt": "kept"}
    with replaced_files(tmp_path) as unfinished:
        (unfinished / "config.json").write_text("new")
        (unfinished / "model.safetensors").write_text("weights")
    found = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert found == {"config.json": "new", "model.safetensors": "weights", "other.txt": "kept"}


def test_leftover_folder_of_replaced_files_is_removed(tmp_path):
    child = os.fork()
    if not child:
        with replaced_files(tmp_path) as unfinished:
            (unfinished / "config.json").write_text("new")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert len(list(tmp_path.iterdir())) == 1
    remove_leftovers(tmp_path)
    assert not any(tmp_path.iterdir())
