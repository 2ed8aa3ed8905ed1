"""Whatever ends a run - a signal, a full disk, no memory - leaves the old file or the whole new one; equal runs agree.

Children are forked by a small process that has everything imported but no session yet, so that a run takes seconds.
"""

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from helpers import proto, weights

from onnxq import runlimit, runtime
from onnxq.cli.main import _run as run
from onnxq.cli.main import group
from onnxq.errors import EnvironmentFault

ROOT = Path(__file__).parent.parent
CNN = ROOT / "models" / "digits_cnn.onnx"
DATA = ROOT / "calibration_data" / "digits"
OLD = b"what was there before"

FORKING = """
import json, os, resource, signal, sys, tempfile, time
from pathlib import Path
import onnxq.pipeline.run, onnxq.report
from onnxq.cli.main import main

def child(folder, prepare):
    pid = os.fork()
    if pid == 0:
        os.setsid()
        (folder / "tmp").mkdir(exist_ok=True)
        os.environ["TMPDIR"], tempfile.tempdir = str(folder / "tmp"), None
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(folder / name, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.alarm(150)
        try:
            prepare()
            given = [str(folder / "model.onnx"), "--data", str(folder / "data.npz"), "-o", str(folder / "out.onnx")]
            main(["quantize", *given, "-q", "--no-timing"])
        except SystemExit as error:
            sys.stderr.flush()
            os._exit(error.code or 0)
        finally:
            os._exit(99)
    return pid

folder, plans = Path(sys.argv[1]), json.loads(sys.argv[2])
for kind, amount in plans:
    (folder / "out.onnx").write_bytes(bytes.fromhex(sys.argv[3]))
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    limits = {"disk": (resource.RLIMIT_FSIZE, amount), "memory": (resource.RLIMIT_AS, used + amount)}
    pid = child(folder, (lambda: resource.setrlimit(limits[kind][0], (limits[kind][1],) * 2)) if kind in limits
                else lambda: None)
    if kind.startswith("SIG"):
        time.sleep(amount)
        os.kill(pid, getattr(signal, kind))
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    print(json.dumps({
        "kind": kind, "amount": amount, "code": code,
        "out": (folder / "out.onnx").read_bytes().hex(),
        "files": sorted(file.name for file in folder.iterdir()),
        "scratch": [file.name for file in (folder / "tmp").iterdir() if file.name.startswith("onnxq")],
        "stderr": (folder / "stderr").read_text(),
    }), flush=True)
"""


def endings(folder, *plans):
    """How runs on a small model ended: each is hit by a signal after seconds, or limited in bytes of disk or memory."""
    text = "g (float[n,3,5,5] x, float[4,3,3,3] w, float[36,5] f) => (float[n,5] y) {"
    made = proto(
        text + "a = Conv(x, w) b = Relu(a) c = Flatten(b) y = Gemm(c, f) }", w=weights(4, 3, 3, 3), f=weights(36, 5)
    )
    onnx.save(made, folder / "model.onnx")
    np.savez(folder / "data.npz", x=weights(10, 3, 5, 5, seed=1))
    command = [sys.executable, "-W", "ignore", "-c", FORKING, str(folder), json.dumps(plans), OLD.hex()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def assert_whole(found, folder):
    path = folder / "check.onnx"
    path.write_bytes(bytes.fromhex(found["out"]))
    onnx.checker.check_model(str(path), full_check=True)
    path.unlink()


def test_a_signal_leaves_the_old_file(tmp_path):
    moments = (0.1, 0.8)
    plans = [(kind, moment) for kind in ("SIGINT", "SIGTERM", "SIGKILL") for moment in moments]
    for found in endings(tmp_path, *plans):
        new = found["out"] != OLD.hex()
        stopped = {"SIGINT": 130, "SIGTERM": 143, "SIGKILL": -9}[found["kind"]]
        if new:
            assert_whole(found, tmp_path)
        assert found["code"] in ((0, stopped) if new else (stopped,))
        assert found["files"] == ["data.npz", "model.onnx", "out.onnx", "stderr", "stdout", "tmp"]
        if found["kind"] != "SIGKILL":
            assert found["scratch"] == []
            said = [line for line in found["stderr"].splitlines() if line and not line.startswith("warning: ")]
            wanted = {"SIGINT": "interrupted", "SIGTERM": "terminated"}[found["kind"]]
            ending = "out.onnx had been written" if new else "nothing was written"
            assert said == ([f"onnxq: error: {wanted}; {ending}"] if found["code"] else [])
        for scratch in (tmp_path / "tmp").iterdir():
            scratch.rename(tmp_path / "tmp" / f"seen-{scratch.name}-{found['kind']}-{found['amount']}")


@pytest.mark.parametrize("late", [False, True])
def test_an_interruption_says_whether_the_file_is_there(late, tmp_path, monkeypatch, capsys):
    """The signal comes right before or right after the file takes its place."""
    made = proto("g (float[n,5] x, float[5,4] w) => (float[n,4] y) { y = MatMul(x, w) }", w=weights(5, 4))
    onnx.save(made, tmp_path / "model.onnx")
    np.savez(tmp_path / "data.npz", x=weights(10, 5, seed=1))
    (tmp_path / "out.onnx").write_bytes(OLD)
    replace = Path.replace

    def struck(self, target):
        if late or target.name != "out.onnx":
            replace(self, target)
        if target.name == "out.onnx":
            raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", struck)
    given = ["quantize", str(tmp_path / "model.onnx"), "--data", str(tmp_path / "data.npz")]
    assert run([*given, "-o", str(tmp_path / "out.onnx"), "-q", "--no-timing"]) == 130
    ending = "out.onnx had been written" if late else "nothing was written"
    assert capsys.readouterr().err.splitlines()[-1] == f"onnxq: error: interrupted; {ending}"
    assert ((tmp_path / "out.onnx").read_bytes() != OLD) == late
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.npz", "model.onnx", "out.onnx"]


def test_a_full_disk_and_too_little_memory_are_one_line(tmp_path):
    plans = [("disk", 1000), ("disk", 3000), ("memory", 1_000_000), ("memory", 8_000_000)]
    for found in endings(tmp_path, *plans):
        if found["out"] != OLD.hex():
            assert_whole(found, tmp_path)
            assert found["code"] == 0
            continue
        if found["kind"] == "memory" and "onnxq: error: " not in found["stderr"]:
            assert found["code"] not in (0, -signal.SIGALRM)  # a native library that cannot allocate ends the process
            assert "Traceback" not in found["stderr"]
            continue
        assert found["code"] == 6, found["stderr"]
        printed_by_onnx = "Schema error: "
        lines = [x for x in found["stderr"].splitlines() if not x.startswith(("warning: ", printed_by_onnx))]
        assert len(lines) == 1
        assert lines[0].startswith("onnxq: error: ")
        assert found["files"] == ["data.npz", "model.onnx", "out.onnx", "stderr", "stdout", "tmp"]
        assert found["scratch"] == []


def test_a_thread_that_never_starts_is_no_hang(tmp_path, monkeypatch):
    onnx.save(proto("g (float[n,5] x) => (float[n,5] y) { y = Relu(x) }"), tmp_path / "model.onnx")
    session = runtime.Session(tmp_path / "model.onnx")
    monkeypatch.setattr(runlimit._thread, "start_new_thread", lambda *_: None)
    monkeypatch.setattr(runlimit, "_START_S", 0.01)
    with pytest.raises(EnvironmentFault, match="not enough memory to run the model"):
        session.run({"x": weights(2, 5)}, limit_s=60)


def test_lack_of_memory_is_seen_through_what_it_was_turned_into(monkeypatch, capsys):
    def starved(*_arguments, **_options):
        try:
            raise MemoryError
        except MemoryError as error:
            raise SystemError("returned NULL") from error

    monkeypatch.setattr(group, "main", starved)
    assert run(["doctor"]) == 6
    assert capsys.readouterr().err == "onnxq: error: out of memory; use fewer --samples or a smaller --batch\n"


KILLED = """
import os, signal, sys
from pathlib import Path
from onnxq import graph

model, old, target = graph.load(sys.argv[1]), graph.load(sys.argv[2]), Path(sys.argv[3])
external = sys.argv[4] == "external"
graph.save(old, target, external=external)
print("old", 0, 0, graph.digest(old))
print("new", 0, 0, graph.digest(model))

def die(*_arguments, **_options):
    os.kill(os.getpid(), signal.SIGKILL)

def half(self, content):
    with self.open("wb") as file:
        file.write(content[: len(content) // 2])
    die()

for owner, name, action in ((Path, "write_bytes", half), (os, "fsync", die), (Path, "replace", die)):
    for calls in range(1, 3):
        pid = os.fork()
        if pid == 0:
            real, left = getattr(owner, name), [calls]
            def replaced(*arguments):
                left[0] -= 1
                return action(*arguments) if left[0] == 0 else real(*arguments)
            setattr(owner, name, replaced)
            graph.save(model, target, external=external)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        print(name, calls, code, graph.digest(graph.load(target)))
        if code == 0:
            graph.save(old, target, external=external)
"""


@pytest.mark.parametrize("kind", ["whole", "external"])
def test_a_kill_while_writing_leaves_the_old_model_or_the_new_one(kind, tmp_path):
    target, other = tmp_path / "out.onnx", ROOT / "models" / "digits_transformer.onnx"
    command = [sys.executable, "-W", "ignore", "-c", KILLED, str(CNN), str(other), str(target), kind]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    (*_, old), (*_, new), *rest = [line.split() for line in done.stdout.splitlines()]
    assert len(rest) == 6
    assert {(code, digest) for _, _, code, digest in rest} == {("-9", old), ("0", new)}
    killed = {(name, calls) for name, calls, code, _ in rest if code == "-9"}
    twice = {("fsync", "2"), ("replace", "2")} if kind == "external" else {("write_bytes", "1")}
    assert killed == {("fsync", "1"), ("replace", "1"), *twice}


def test_weights_of_a_replaced_model_are_removed(tmp_path):
    from onnxq import graph

    target = tmp_path / "out[1].onnx"
    (tmp_path / "out[1].onnx.mydata").write_bytes(b"another's")
    model = graph.load(CNN)
    names = []
    for _ in range(3):
        graph.save(model, target, external=True)
        assert graph.digest(graph.load(target)) == graph.digest(model)
        names.append(sorted(path.name.removeprefix(target.name) for path in tmp_path.iterdir()))
    assert names == [["", ".data", ".mydata"], ["", ".1.data", ".mydata"], ["", ".data", ".mydata"]]


def test_equal_runs_give_equal_bytes_and_other_threads_the_same_plan(tmp_path):
    """The same call twice in this process, and once in a process that may use one processor only."""
    given = ["quantize", str(CNN), "--data", str(DATA), "--mean", "0.5", "--std", "0.5", "--samples", "16"]
    given += ["-q", "--no-timing"]
    for name in ("a", "b"):
        assert run([*given, "-o", str(tmp_path / f"{name}.onnx"), "--save-plan", str(tmp_path / f"{name}.json")]) == 0
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    code = (
        "import os, sys; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); "
        "from onnxq.cli.main import main; main(sys.argv[1:])"
    )
    out = [*given, "-o", str(tmp_path / "c.onnx"), "--save-plan", str(tmp_path / "c.json")]
    subprocess.run([sys.executable, "-W", "ignore", "-c", code, *out], cwd=ROOT, capture_output=True, check=True)
    assert json.loads((tmp_path / "c.json").read_text()) == json.loads((tmp_path / "a.json").read_text())


def test_a_simplifier_that_is_not_wanted_any_more_ends_at_once(tmp_path, monkeypatch):
    from threading import Event, Timer
    from time import monotonic

    import onnxq.simplifier
    from onnxq import graph

    child = tmp_path / "child.py"
    child.write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setattr(onnxq.simplifier, "CHILD", child)
    stop = Event()
    timer = Timer(0.3, stop.set)
    timer.start()
    began = monotonic()
    _, reason = onnxq.simplifier.simplify(graph.load(CNN), stop=stop)
    assert monotonic() - began < 30
    assert reason is not None
    timer.join()
