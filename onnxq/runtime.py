"""The one door to onnxruntime: sessions, providers, threads, and the graph the runtime really executes."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime as ort

from onnxq import graph
from onnxq.errors import DataError, EnvironmentFault, ModelError, OnnxqError, UnsupportedError, lacks_memory
from onnxq.runlimit import limited
from onnxq.types import Array, Feeds, InputSpec

PROVIDERS: Mapping[str, str] = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
    "qnn": "QNNExecutionProvider",
}
"""Names that users give -> names that onnxruntime knows."""

Level = Literal["all", "extended", "basic", "off"]
_LEVELS = {
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
    "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "off": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
}
RUN_SECONDS = 1800.0
"""A run that takes longer is given up: a loop in the model may never end."""
ort.disable_telemetry_events()
_NUMPY = {
    "tensor(float)": "float32",
    "tensor(double)": "float64",
    "tensor(string)": "object",
    "tensor(bfloat16)": "bfloat16",
}


@dataclass(frozen=True)
class SessionConfig:
    """How a session executes.

    Attributes:
        provider: "cpu", "cuda", "tensorrt" or "openvino".
        threads: Intra-op threads; 0 leaves it to the runtime.
        optimize: Graph optimisation level.
        profile: File prefix for the runtime's own profile, or None.
        stop_spinning: Worker threads sleep as soon as a call returns instead of waiting busily for the next one:
            needed where several sessions take turns, or each slows the next.
        simulate: Run a QDQ graph as written, in float kernels on rounded values, instead of in integer kernels: for
            reading values that integer kernels never make, at float speed.
    """

    provider: str = "cpu"
    threads: int = 0
    optimize: Level = "all"
    profile: str | None = None
    stop_spinning: bool = False
    simulate: bool = False


class Session:
    """A model that onnxruntime has loaded.

    Args:
        model: A model in memory, its bytes, or the path of a file.
        config: Provider, threads, optimisation level.
        save_optimized: Where to write the optimised graph.

    Raises:
        ModelError: onnxruntime refuses the model.
        EnvironmentFault: The provider is not there, or memory ran out.
    """

    def __init__(
        self,
        model: graph.Model | bytes | Path,
        config: SessionConfig = SessionConfig(),
        *,
        save_optimized: Path | None = None,
    ) -> None:
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        self._weights: dict[str, Array] = {}  # the runtime reads them where they are, and does not keep them alive
        require_provider(config.provider)
        options = _options(config, save_optimized)
        apart = config.provider == "cpu" and save_optimized is None
        source = self._as_source(model, options if apart else None)
        name = source.name if isinstance(source, Path) else "the model"
        try:
            self._session = ort.InferenceSession(
                str(source) if isinstance(source, Path) else source, options, providers=_providers(config)
            )
        except Exception as error:
            if lacks_memory(error):
                raise EnvironmentFault(f"not enough memory to load {name} into onnxruntime") from error
            raise ModelError(f"onnxruntime cannot load {name}: {_reason(error)}") from error
        self.inputs: tuple[InputSpec, ...] = tuple(_spec(entry) for entry in self._session.get_inputs())
        self.outputs: tuple[InputSpec, ...] = tuple(_spec(entry) for entry in self._session.get_outputs())
        self.providers: tuple[str, ...] = tuple(self._session.get_providers())

    def _as_source(self, model: graph.Model | bytes | Path, options: Any) -> bytes | Path:
        """What onnxruntime loads; large weights are handed over as they are, by the session's `options` if given."""
        if isinstance(model, bytes | Path):
            return model
        if options is not None and graph.nbytes(model) >= graph.WHOLE:
            source, self._weights = graph.to_parts(model)
            values = [ort.OrtValue.ortvalue_from_numpy(array) for array in self._weights.values()]
            options.add_external_initializers(list(self._weights), values)
            return source
        if graph.nbytes(model) <= graph.SINGLE_FILE_LIMIT:
            return graph.to_bytes(model)
        self._scratch = tempfile.TemporaryDirectory(prefix="onnxq-")
        path = Path(self._scratch.name) / "model.onnx"
        graph.save(model, path, external=True)
        return path

    def run(
        self, feeds: Feeds, outputs: Sequence[str] | None = None, *, limit_s: float | None = RUN_SECONDS
    ) -> dict[str, Array]:
        """Run once; returns the outputs asked for (all by default) by name.

        Args:
            feeds: Arrays by input.
            outputs: Their names.
            limit_s: Give up after so many seconds. A run with a limit is interrupted by a signal, too; one without
                (None) has no thread of its own, for measuring.

        Raises:
            DataError: The feeds do not fit the model.
            UnsupportedError: The run took longer than `limit_s`.
        """
        names = list(outputs) if outputs is not None else [spec.name for spec in self.outputs]
        try:
            values = self._session.run(names, feeds) if limit_s is None else self._limited(names, feeds, limit_s)
        except OnnxqError:
            raise
        except Exception as error:
            if lacks_memory(error):
                raise EnvironmentFault("not enough memory to run the model; use a smaller batch") from error
            shapes = ", ".join(f"{name} {list(np.shape(value))}" for name, value in feeds.items())
            raise DataError(f"the model cannot be run on inputs {shapes}: {_reason(error)}") from error
        return dict(zip(names, values, strict=True))

    def _limited(self, names: list[str], feeds: Feeds, limit_s: float) -> Any:
        """Run in another thread, so that this one stays free for signals and the clock."""
        options = ort.RunOptions()
        options.log_severity_level = 4

        def give_up() -> None:
            options.terminate = True

        try:
            return limited(lambda: self._session.run(names, feeds, options), limit_s, give_up)
        except TimeoutError as error:
            raise UnsupportedError(f"the model does not finish a run within {limit_s:g} s.") from error

    def end_profiling(self) -> Path:
        """Stop the profile that `SessionConfig.profile` started; returns its JSON file."""
        return Path(self._session.end_profiling())


def _options(config: SessionConfig, save_optimized: Path | None) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = config.threads
    options.graph_optimization_level = _LEVELS[config.optimize]
    if save_optimized is not None:
        options.optimized_model_filepath = str(save_optimized)
    if config.stop_spinning:
        options.add_session_config_entry("session.force_spinning_stop", "1")
    if config.simulate:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    if config.profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = config.profile
    return options


def _providers(config: SessionConfig) -> list[tuple[str, dict[str, str]]]:
    """The provider asked for, then the CPU's. OpenVINO does not read the session's number of threads."""
    own = {"num_of_threads": str(config.threads)} if config.provider == "openvino" and config.threads else {}
    first = (PROVIDERS[config.provider], own)
    return [first] if config.provider == "cpu" else [first, (PROVIDERS["cpu"], {})]


def _spec(entry: Any) -> InputSpec:
    dtype = _NUMPY.get(entry.type) or entry.type.removeprefix("tensor(").removesuffix(")")
    return InputSpec(entry.name, dtype, tuple(entry.shape or ()))


def _reason(error: BaseException) -> str:
    """The runtime's message without its prefix, on one line."""
    text = " ".join(str(error).split())
    if text.startswith("[ONNXRuntimeError]"):
        text = text.split(" : ", 3)[-1]
    return text if len(text) <= 300 else f"{text[:297]}..."


def available_providers() -> tuple[str, ...]:
    """Names of `PROVIDERS` that this onnxruntime build has."""
    built = set(ort.get_available_providers())
    return tuple(name for name, full in PROVIDERS.items() if full in built)


def require_provider(name: str) -> None:
    """Raise `EnvironmentFault` when this onnxruntime build lacks provider `name`."""
    if name not in available_providers():
        have = ", ".join(available_providers())
        raise EnvironmentFault(f"onnxruntime {ort.__version__} here has no {name} provider; available: {have}.")


def version() -> str:
    """Version of onnxruntime."""
    return str(ort.__version__)


def fuses_silu() -> bool:
    """Whether QuickGelu works in the layout of integer convolutions: before 1.30 each costs two Transposes there."""
    return tuple(int(part) for part in version().split(".")[:2]) >= (1, 30)


def optimized(model: graph.Model | bytes | Path, config: SessionConfig = SessionConfig()) -> graph.Model:
    """The graph that a session with `config` executes, contrib operators included.

    Its weights are the runtime's own copies; it is for looking at, not for running elsewhere.
    """
    folder = Path(tempfile.mkdtemp(prefix="onnxq-"))
    try:
        path = folder / "optimized.onnx"
        Session(model, config, save_optimized=path)
        return graph.parse(path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def saturates() -> bool:
    """Whether this machine adds pairs of uint8 x int8 products in 16 bits: x86 without VNNI.

    Where the processor's features cannot be read (no /proc/cpuinfo), an x86 processor is taken to saturate.
    """
    if platform.machine().lower() not in ("x86_64", "amd64", "i386", "i686"):
        return False
    return not {"avx512_vnni", "avx_vnni", "amx_int8"} & cpu_features()


def cpu_features() -> frozenset[str]:
    """Instruction set flags of this machine's processor, empty where unknown."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return frozenset()
    line = next((line for line in text.splitlines() if line.startswith(("flags", "Features"))), "")
    return frozenset(line.partition(":")[2].split())


def processor() -> str:
    """What this machine's processor calls itself, "" where unknown."""
    with suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        return next((line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")), "")
    return ""


def machine() -> dict[str, object]:
    """What a measurement should be recorded with."""
    vector = sorted({"avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm"} & cpu_features())
    return {
        "onnxruntime": version(),
        "machine": platform.machine(),
        "system": platform.system(),
        "cores": os.cpu_count(),
        "features": vector,
    }
