"""`doctor`: what this machine offers, and what to do about what is missing."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from onnxq import runtime
from onnxq.errors import OnnxqError
from onnxq.runtime import PROVIDERS, Session, SessionConfig
from onnxq.tune.methods import find_device
from onnxq.version import __version__

PROBE = (
    b'\x08\x08:4\n\r\n\x01x\x12\x01y"\x03Neg:\x00\x12\x01gZ\x0f\n\x01x\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01'
    b"b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x04\n\x00\x10\r"
)
"""An ONNX file with one node, y = -x, float[1]: enough to see whether a provider loads."""
FEATURES: Mapping[str, Mapping[str, str]] = {
    "x86": {
        "avx2": "vector instructions that int8 kernels need at least",
        "avx512_vnni": "int8 products summed in 32 bits, 512 bits wide",
        "avx_vnni": "int8 products summed in 32 bits, 256 bits wide",
        "amx_int8": "int8 matrix tiles",
    },
    "arm": {
        "asimddp": "int8 dot products",
        "i8mm": "int8 matrix products",
    },
}
"""Processor flags that decide how fast int8 is, by kind of machine."""
REQUIRED: Mapping[str, str] = {
    "onnxruntime": "runs models; version and providers decide what is fast",
    "onnx": "checks and converts models",
    "onnx-ir": "reads, edits and writes graphs",
    "numpy": "arrays",
    "click": "the command line",
    "rich": "tables and progress",
    "pillow": "calibration images",
    "onnxsim": "simplification; without it `quantize` goes on unsimplified",
}
OPTIONAL: Mapping[str, tuple[str, str]] = {
    "torch": ("learned weights (preset advanced, --bias-tuning) and harden", "pip install 'onnxq[learn]'"),
    "scipy": ("mixed precision: sensitivities and budgets", "pip install scipy"),
    "joblib": ("sensitivities, sweeps and --unit parallel, over processes", "pip install joblib"),
    "distributed": ("the same on a Dask cluster: pip install 'onnxq[dask]'", ""),
    "ray": ("the same on a Ray cluster: pip install 'onnxq[ray]'", ""),
}
"""Parts that only some commands need: what for, and how to get them; "" where few people miss them."""
LITTLE_MEMORY = 2 * 10**9


@dataclass(frozen=True)
class Part:
    """One package.

    Attributes:
        name: As pip knows it.
        version: Installed version; None where it is missing.
        purpose: What onnxq uses it for.
        optional: Most commands do without.
    """

    name: str
    version: str | None
    purpose: str
    optional: bool


@dataclass(frozen=True)
class Machine:
    """Processor and memory.

    Attributes:
        system: Operating system.
        architecture: As the system names it ("x86_64", "aarch64").
        python: Version.
        features: Flag -> whether the processor has it; None where flags cannot be read.
        saturates: Pairs of int8 products are added in 16 bits.
        processors: Logical processors of the machine.
        usable: Those that this process may use.
        memory_bytes: Of the machine, None where unknown.
        free_bytes: Available now, None where unknown.
    """

    system: str
    architecture: str
    python: str
    features: Mapping[str, bool | None]
    saturates: bool
    processors: int
    usable: int
    memory_bytes: int | None
    free_bytes: int | None


@dataclass(frozen=True)
class Diagnosis:
    """What `doctor` found.

    Attributes:
        version: Of onnxq.
        machine: Processor and memory.
        providers: Name -> "works", "does not load" (built in, but something on this machine is missing) or "not built".
        parts: Packages.
        learning_device: Where PyTorch would compute ("cuda", "cpu"); None without PyTorch.
        advice: One line per problem.
    """

    version: str
    machine: Machine
    providers: Mapping[str, str]
    parts: tuple[Part, ...]
    learning_device: str | None
    advice: tuple[str, ...]


def diagnose() -> Diagnosis:
    """Look at this machine; takes the seconds that PyTorch and the providers need to load."""
    machine = _machine()
    providers = {name: _provider(name) for name in PROVIDERS}
    parts = tuple(_parts())
    device, broken = _learning(parts)
    advice = (*_machine_advice(machine), *_provider_advice(providers), *_part_advice(parts), *broken)
    return Diagnosis(__version__, machine, providers, parts, device, advice)


def _machine() -> Machine:
    kind = "x86" if platform.machine().lower() in ("x86_64", "amd64", "i386", "i686") else "arm"
    flags = runtime.cpu_features()
    memory = _memory()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Machine(
        system=f"{platform.system()} {platform.release()}",
        architecture=platform.machine(),
        python=platform.python_version(),
        features={name: name in flags if flags else None for name in FEATURES[kind]},
        saturates=runtime.saturates(),
        processors=os.cpu_count() or 1,
        usable=usable,
        memory_bytes=memory.get("MemTotal"),
        free_bytes=memory.get("MemAvailable"),
    )


def _memory() -> dict[str, int]:
    """Bytes by the names of /proc/meminfo; empty where there is none."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    pairs = (line.partition(":") for line in lines)
    return {name: int(text.split()[0]) * 1024 for name, _, text in pairs if text.split()[1:] == ["kB"]}


def _provider(name: str) -> str:
    if name not in runtime.available_providers():
        return "not built"
    try:
        loaded = Session(PROBE, SessionConfig(provider=name)).providers
    except OnnxqError:
        return "does not load"
    return "works" if PROVIDERS[name] in loaded else "does not load"


def _parts() -> Iterator[Part]:
    for name, purpose in REQUIRED.items():
        yield Part(name, _installed(name), purpose, optional=False)
    for name, (purpose, _) in OPTIONAL.items():
        yield Part(name, _installed(name), purpose, optional=True)


def _installed(name: str) -> str | None:
    """Version of a package; the other builds of onnxruntime count as it."""
    builds = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino") if name == "onnxruntime" else (name,)
    for build in builds:
        try:
            return version(build)
        except PackageNotFoundError:
            continue
    return None


def _learning(parts: tuple[Part, ...]) -> tuple[str | None, tuple[str, ...]]:
    """Where PyTorch computes, and what keeps it from loading."""
    if any(part.name == "torch" and part.version is None for part in parts):
        return None, ()
    try:
        return find_device("auto"), ()
    except Exception as error:  # whatever a broken installation raises is what the user must be told
        text = " ".join(str(error).split())
        return None, (f"PyTorch is installed but does not load ({text}): install it again.",)


def _machine_advice(machine: Machine) -> Iterator[str]:
    if None in machine.features.values():
        yield "the processor's features cannot be read here: measure with `onnxq benchmark` before relying on int8."
    elif not any(machine.features.values()):
        yield "this processor has no int8 instructions: the file shrinks, but expect no gain in speed."
    elif machine.saturates:
        yield (
            "this processor has AVX2 but no VNNI: layers whose sums would overflow 16 bits get 7-bit weights; files "
            "made elsewhere for such machines need --portable."
        )
    if machine.usable < machine.processors:
        yield (
            f"this process may use {machine.usable} of {machine.processors} processors: measure with --threads "
            f"{machine.usable} or fewer."
        )
    if machine.free_bytes is not None and machine.free_bytes < LITTLE_MEMORY:
        yield f"only {machine.free_bytes / 1e9:.1f} GB of memory are free: use a small --batch."


def _provider_advice(providers: Mapping[str, str]) -> Iterator[str]:
    for name, state in providers.items():
        if state == "does not load":
            yield (
                f"this onnxruntime has the {name} provider, but it does not load: its driver or libraries are missing "
                "or of another version; sessions would silently run on the CPU."
            )


def _part_advice(parts: tuple[Part, ...]) -> Iterator[str]:
    for part in parts:
        if part.version is None:
            command = OPTIONAL[part.name][1] if part.optional else f"pip install {part.name}"
            if command:
                yield f"{part.name} is missing ({part.purpose}): {command}."
    if len(builds := [name for name in ("onnxruntime", "onnxruntime-gpu") if _has(name)]) > 1:
        yield f"{' and '.join(builds)} are both installed and overwrite each other: uninstall both, install one."


def _has(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True
