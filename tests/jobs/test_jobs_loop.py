"""Jobs in processes of this machine: order, failures, and processes that die."""

import os
from pathlib import Path

import pytest
from jobbing import die, die_once, divide, refuse, total

from onnxq.errors import EnvironmentFault, UsageError
from onnxq.jobs import Failed, Task, open_backend, outcomes, require_backend, results
from onnxq.jobs.local import Local
from onnxq.jobs.task import shipped, versions


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.txt").write_text("2")
    (tmp_path / "sub" / "b.txt").write_text("5")
    return tmp_path


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))


def tasks(arguments, folder):
    return [Task(f"job {n}", argument, folder, ("a.txt", "sub/b.txt")) for n, argument in enumerate(arguments)]


def test_one_worker_works_here_and_in_order(folder):
    made = iter(tasks(range(4), folder))
    with Local(1) as backend:
        found = results(backend, total, made)
        task, answer = next(found)
        assert (task.name, answer) == ("job 0", (0, os.getpid()))
        assert next(made).name == "job 1"  # nothing was taken before it could run
        assert [answer for _, answer in found] == [(14, os.getpid()), (21, os.getpid())]


def test_a_job_that_raises_is_an_outcome_and_the_others_go_on(folder):
    with Local(1) as backend:
        found = [answer for _, answer in outcomes(backend, refuse, tasks(range(4), folder))]
        assert [found[0], found[1], found[3]] == [0, 1, 3]
        assert isinstance(found[2], Failed)
        assert str(found[2].error) == "not 2"
        with pytest.raises(ValueError, match="not 2") as caught:
            list(results(backend, refuse, tasks(range(4), folder)))
    assert "in refuse" in caught.value.__notes__[0]


def test_jobs_of_a_process_that_dies_run_again(folder):
    arguments = [(number, str(folder / "died")) for number in range(8)]
    with Local(2) as backend:
        found = {task.name: answer for task, answer in results(backend, die_once, tasks(arguments, folder))}
    assert (folder / "died").exists()
    assert {name: value for name, (value, _) in found.items()} == {f"job {n}": 7 * n for n in range(8)}
    assert os.getpid() not in {process for _, process in found.values()}


def test_a_job_that_kills_every_process_is_given_up_alone(folder):
    with Local(2) as backend:
        found = {task.argument: answer for task, answer in outcomes(backend, die, tasks(range(4), folder))}
    assert {argument for argument, answer in found.items() if argument == answer} == {0, 2, 3}
    assert isinstance(found[1].error, EnvironmentFault)
    assert str(found[1].error).startswith("job 1: its worker died every time")


@pytest.mark.parametrize("name", ["ray", "dask://", "dask://host", "dask://h:x", "dask://h:99999", "ssh://h:22", ""])
def test_names_of_backends_that_make_no_sense(name):
    with pytest.raises(UsageError, match="--backend takes local, dask://host:port or ray://host:port, not"):
        require_backend(name)


def test_a_missing_package_and_a_silent_address_are_said_before_any_work(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(EnvironmentFault, match=r"ray://h:1 needs a package .*: pip install 'onnxq\[ray\]'"):
        open_backend("ray://h:1")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: "there")
    with pytest.raises(EnvironmentFault, match=r"dask://127\.0\.0\.1:1 cannot be reached: Connection refused"):
        open_backend("dask://127.0.0.1:1")
    with pytest.raises(UsageError, match="--workers takes 0 or more"):
        open_backend("local", -1)


def test_a_job_may_make_jobs_of_itself(folder):
    """As one of a sweep does whose recipe has a budget; its process must not wait for itself."""
    with Local(1) as backend:
        assert [answer for _, answer in results(backend, divide, tasks([5, 7], folder))] == [5, 7]


def test_a_worker_with_other_versions_does_nothing():
    failed = shipped(b"not looked at", (), {**versions(), "numpy": "1.0"})
    assert isinstance(failed.error, EnvironmentFault)
    assert f"numpy {versions()['numpy']} instead of 1.0" in str(failed.error)
    failed = shipped(b"not looked at", (), {name: value for name, value in versions().items() if name != "numpy"})
    assert "a worker has more packages" in str(failed.error)
