"""`doctor`: what it finds on this machine, and what it advises on machines that lack something."""

import json
import os
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version

import pytest

from onnxq import runtime
from onnxq.cli.main import _run as run
from onnxq.errors import EnvironmentFault
from onnxq.pipeline import doctor
from onnxq.pipeline.doctor import Machine, diagnose
from onnxq.version import __version__

MACHINE = Machine(
    system="Linux 6",
    architecture="x86_64",
    python="3.11.7",
    features={"avx2": True, "avx_vnni": True},
    saturates=False,
    processors=8,
    usable=8,
    memory_bytes=32 * 10**9,
    free_bytes=20 * 10**9,
)


@pytest.fixture(scope="module")
def found():
    return diagnose()


@pytest.fixture
def on(monkeypatch, found):
    """Diagnose as if the machine were another."""

    def look(machine=MACHINE, missing=(), extra=(), **providers):
        def installed(name):
            if name in missing or (name not in extra and name.startswith("onnxruntime-")):
                raise PackageNotFoundError(name)
            return "1.2.3"

        monkeypatch.setattr(doctor, "_machine", lambda: machine)
        monkeypatch.setattr(doctor, "version", installed)
        monkeypatch.setattr(doctor, "_provider", lambda name: providers.get(name, "not built"))
        monkeypatch.setattr(doctor, "find_device", lambda name: "cpu")
        return diagnose()

    return look


def test_this_machine_is_described_as_the_runtime_sees_it(found):
    assert found.version == __version__
    assert found.providers["cpu"] == "works"
    assert {name for name, state in found.providers.items() if state != "not built"} == set(
        runtime.available_providers()
    )
    assert found.machine.saturates == runtime.saturates()
    present = {name for name, has in found.machine.features.items() if has}
    assert present == set(found.machine.features) & runtime.cpu_features()
    assert 1 <= found.machine.usable <= found.machine.processors
    versions = {part.name: part.version for part in found.parts}
    assert versions["onnxruntime"] == runtime.version()
    assert versions["numpy"] == version("numpy")
    assert all(part.purpose for part in found.parts)
    if found.machine.memory_bytes is not None:
        pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        assert found.machine.memory_bytes == pytest.approx(pages, rel=0.05)
        assert 0 < found.machine.free_bytes <= found.machine.memory_bytes


def test_json_is_one_document_and_the_tables_say_the_same(found, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "diagnose", lambda: replace(found, advice=("mind [this]",)))
    assert run(["doctor", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["schema"], document["kind"]) == (1, "doctor")
    assert document["providers"]["cpu"] == "works"
    assert document["advice"] == ["mind [this]"]
    assert run(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "advice: mind [this]" in shown
    assert "cpu works" in shown
    assert f"onnxruntime  {runtime.version()}" in shown
    monkeypatch.setattr(doctor, "diagnose", lambda: replace(found, advice=(), learning_device=None))
    assert run(["doctor"]) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_a_complete_machine_needs_no_advice(on):
    assert on(cpu="works").advice == ()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"features": {"avx2": True, "avx_vnni": False}, "saturates": True}, "AVX2 but no VNNI"),
        ({"features": {"avx2": False, "avx_vnni": False}, "saturates": True}, "no int8 instructions"),
        ({"features": {"avx2": None, "avx_vnni": None}, "saturates": True}, "cannot be read"),
        ({"usable": 2}, "may use 2 of 8 processors: measure with --threads 2"),
        ({"free_bytes": 10**9}, "only 1.0 GB of memory are free"),
    ],
)
def test_one_line_for_each_weakness_of_the_machine(on, changes, said):
    (line,) = on(replace(MACHINE, **changes)).advice
    assert said in line


def test_a_provider_that_is_built_in_but_does_not_load_is_named(on):
    (line,) = on(cpu="works", cuda="does not load").advice
    assert "the cuda provider, but it does not load" in line


def test_missing_parts_come_with_the_command_that_installs_them(on):
    found = on(missing=("torch", "scipy", "onnxsim"))
    assert [line.split(" is missing")[0] for line in found.advice] == ["onnxsim", "torch", "scipy"]
    assert "pip install onnxsim" in found.advice[0]
    assert "pip install 'onnxq[learn]'" in found.advice[1]
    assert found.learning_device is None
    assert {part.name for part in found.parts if part.version is None} == {"torch", "scipy", "onnxsim"}


def test_another_build_of_the_runtime_counts_and_two_of_them_clash(on):
    other = on(missing=("onnxruntime",), extra=("onnxruntime-gpu",))
    assert other.advice == ()
    (line,) = on(extra=("onnxruntime-gpu",)).advice
    assert "onnxruntime and onnxruntime-gpu are both installed" in line


def test_a_torch_that_does_not_load_is_reported(on, monkeypatch):
    on()

    def broken(name):
        raise OSError("libtorch.so:\n not found")

    monkeypatch.setattr(doctor, "find_device", broken)
    found = diagnose()
    assert found.learning_device is None
    (line,) = found.advice
    assert "does not load (libtorch.so: not found)" in line


def test_a_provider_loads_only_where_the_session_has_it(monkeypatch):
    class Fallen:
        def __init__(self, *_):
            self.providers = ("CPUExecutionProvider",)

    def refuse(*_):
        raise EnvironmentFault("no")

    monkeypatch.setattr(runtime, "available_providers", lambda: ("cpu", "cuda"))
    monkeypatch.setattr(doctor, "Session", Fallen)
    assert [doctor._provider(name) for name in ("cpu", "cuda", "tensorrt")] == ["works", "does not load", "not built"]
    monkeypatch.setattr(doctor, "Session", refuse)
    assert doctor._provider("cuda") == "does not load"


def test_a_system_without_proc_has_unknown_memory(monkeypatch):
    def refuse(*_, **__):
        raise FileNotFoundError

    monkeypatch.setattr(doctor.Path, "read_text", refuse)
    machine = doctor._machine()
    assert machine.memory_bytes is None
    assert machine.free_bytes is None
    assert set(machine.features.values()) == {None}
