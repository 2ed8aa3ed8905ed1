"""Jobs on a Dask cluster of two processes, one of which is killed at work."""

import os
from pathlib import Path

import pytest

pytest.importorskip("distributed", reason="needs the extra dask", exc_type=ImportError)

from distributed import LocalCluster
from jobbing import die_once, refuse, together, total

from onnxq.errors import EnvironmentFault
from onnxq.jobs import Failed, Task, open_backend, outcomes, results
from onnxq.jobs import task as task_module
from onnxq.jobs.parcels import Parcels

pytestmark = pytest.mark.filterwarnings("default")  # Dask's own, about ports and event loops


@pytest.fixture(scope="module")
def backend():
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    settings = {"n_workers": 2, "threads_per_worker": 2, "processes": True, "dashboard_address": None}
    with (
        LocalCluster(**settings, env={"PYTHONPATH": path}, silence_logs=50) as cluster,
        open_backend(cluster.scheduler_address.replace("tcp", "dask")) as opened,
    ):
        yield opened


@pytest.fixture
def tasks(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.txt").write_text("2")
    (tmp_path / "sub" / "b.txt").write_text("5")

    def made(arguments):
        return [Task(f"job {n}", argument, tmp_path, ("a.txt", "sub/b.txt")) for n, argument in enumerate(arguments)]

    return made


def test_files_travel_and_a_killed_worker_changes_nothing(backend, tasks, tmp_path):
    arguments = [(number, str(tmp_path / "died")) for number in range(8)]
    found = {task.name: answer for task, answer in results(backend, die_once, tasks(arguments))}
    assert (tmp_path / "died").exists()
    assert {name: value for name, (value, _) in found.items()} == {f"job {n}": 7 * n for n in range(8)}
    assert os.getpid() not in {process for _, process in found.values()}


def test_what_a_job_raises_comes_back(backend, tasks):
    found = {task.argument: answer for task, answer in outcomes(backend, refuse, tasks(range(4)))}
    assert isinstance(found.pop(2), Failed)
    assert found == {0: 0, 1: 1, 3: 3}


def test_a_process_does_one_job_at_a_time(backend, tasks, tmp_path):
    """PyTorch's random numbers belong to the process; a worker with two threads must not mix them."""
    assert [answer for _, answer in results(backend, together, tasks([str(tmp_path)] * 6))] == [1] * 6


def test_lost_data_is_sent_again(backend, tasks, monkeypatch):
    real, lost = type(backend).answer, []

    def answer(self, future):
        found = real(self, future)
        if not lost:
            lost.append(found)
            self._parcels.forget()
            raise task_module.Lost("gone")
        return found

    monkeypatch.setattr(type(backend), "answer", answer)
    found = sorted(value for _, (value, _) in results(backend, total, tasks(range(5))))
    assert found == [0, 7, 14, 21, 28]
    assert lost


def test_workers_of_other_versions_end_the_run(backend, tasks, monkeypatch):
    monkeypatch.setattr("onnxq.jobs.dask.versions", lambda: {"onnxq": "0.0"})
    with pytest.raises(EnvironmentFault, match=r"instead of 0\.0: results would depend on where a job runs"):
        list(results(backend, total, tasks([1])))


def test_contents_are_sent_once_and_dropped_when_nobody_needs_them(tmp_path):
    sent = []
    parcels = Parcels(lambda content: sent.append(content) or len(sent))
    for name, text in (("a", "x"), ("b", "x"), ("c", "y")):
        (tmp_path / name).write_text(text)
    first, digests = parcels.of(tmp_path, ["a", "b", "c"])
    assert (first, sent) == ([1, 1, 2], [b"x", b"y"])
    parcels.hold("one", digests)
    second, others = parcels.of(tmp_path, ["c"])
    parcels.hold("two", others)
    assert second == [2]
    parcels.release("one")
    assert parcels.of(tmp_path, ["c"])[0] == [2]
    assert parcels.of(tmp_path, ["a"])[0] == [3]
    assert sent == [b"x", b"y", b"x"]
