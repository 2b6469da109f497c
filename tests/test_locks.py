"""Locks on files: one training in a folder, and file systems that have none."""

import errno
import fcntl
from concurrent.futures import ThreadPoolExecutor

import pytest

from launcher import rundir
from launcher.errors import UserError
from launcher.weights import one_at_a_time


def test_a_folder_takes_one_training(tmp_path):
    another = rundir.locked(tmp_path)
    with rundir.locked(tmp_path), pytest.raises(UserError, match="another training writes here now"):
        another.__enter__()
    with rundir.locked(tmp_path):
        pass


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_no_other_training(tmp_path, monkeypatch, capsys, number):
    def has_no_locks(*_):
        raise OSError(number, "not here")

    monkeypatch.setattr(fcntl, "flock", has_no_locks)
    for _ in range(2):
        with rundir.locked(tmp_path), one_at_a_time(tmp_path / "weights"):
            pass
    assert capsys.readouterr().err == (
        f"note: {tmp_path} has no file locks (not here); start no two trainings in it at once\n"
    )


def test_two_writers_of_one_file_leave_it_whole(tmp_path):
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: rundir.write_atomically(tmp_path / "file", b"the rain" * 1000), range(200)))
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"the rain" * 1000
