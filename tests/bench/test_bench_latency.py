import gc

import numpy as np
import pytest

from onnxq import runtime
from onnxq.bench import latency, measure
from onnxq.errors import DataError, EnvironmentFault, UnsupportedError, UsageError
from onnxq.types import Interval, Latency

DENSE = "g (float[N, 8] x) => (float[N, 4] y) { y = MatMul(x, w) }"
WEIGHT = {"w": np.ones((8, 4), np.float32)}
QUICK = {"seconds": 0.0, "min_rounds": 3, "warmup": 1}


@pytest.fixture
def dense(write):
    return write(DENSE, WEIGHT, "dense")


@pytest.fixture
def deeper(write):
    return write("g (float[N, 8] x) => (float[N, 4] y) { h = Relu(x) y = MatMul(h, w) }", WEIGHT, "deeper")


def test_every_setting_has_one_entry_per_model(dense, deeper):
    found = measure([dense, deeper], threads=(1, 2), batches=(1, 3), **QUICK)
    assert [(entry.threads, entry.batch, entry.model) for entry in found] == [
        (threads, batch, str(model)) for threads in (1, 2) for batch in (1, 3) for model in (dense, deeper)
    ]
    for first, second in zip(found[::2], found[1::2], strict=True):
        assert first.ratio is None
        paired = np.divide(second.samples_ms, first.samples_ms)
        assert second.ratio.value == pytest.approx(float(np.median(paired)))
        assert second.ratio.low <= second.ratio.value <= second.ratio.high
    for entry in found:
        assert len(entry.samples_ms) == 3
        assert entry.median_ms == pytest.approx(sorted(entry.samples_ms)[1])
        assert min(entry.samples_ms) > 0
        assert (entry.provider, entry.ran_on) == ("cpu", ("cpu",))


def test_openvino_gets_the_number_of_threads_as_an_option_of_its_own(dense, monkeypatch):
    given = []

    def recorded(model, options, providers):
        given.append((options.intra_op_num_threads, providers))
        return opened(model, options, providers=["CPUExecutionProvider"])

    opened = runtime.ort.InferenceSession
    monkeypatch.setattr(runtime, "available_providers", lambda: ("cpu", "openvino", "cuda"))
    monkeypatch.setattr(runtime.ort, "InferenceSession", recorded)
    for provider, threads in (("openvino", 3), ("openvino", 0), ("cuda", 3), ("cpu", 3)):
        runtime.Session(dense, runtime.SessionConfig(provider, threads))
    cpu = ("CPUExecutionProvider", {})
    assert given == [
        (3, [("OpenVINOExecutionProvider", {"num_of_threads": "3"}), cpu]),
        (0, [("OpenVINOExecutionProvider", {}), cpu]),
        (3, [("CUDAExecutionProvider", {}), cpu]),
        (3, [cpu]),
    ]


def test_rounds_go_on_until_the_time_is_used_up(dense):
    (found,) = measure([dense], seconds=0.02, min_rounds=1)
    assert len(found.samples_ms) > 1
    assert sum(found.samples_ms[:-1]) < 20.0 <= sum(found.samples_ms)
    two = measure([dense, dense], seconds=0.02, min_rounds=1)
    assert sum(sum(entry.samples_ms) for entry in two) >= 40.0


def test_models_take_turns_in_changing_order_after_the_warm_up(dense, deeper, monkeypatch):
    calls = []
    run = runtime.Session.run

    def recorded(self, feeds, outputs=None, **limit):
        calls.append((id(self), gc.isenabled()))
        return run(self, feeds, outputs, **limit)

    monkeypatch.setattr(runtime.Session, "run", recorded)
    measure([dense, deeper], seconds=0.0, min_rounds=12, warmup=2)
    warmup, timed = calls[:4], calls[4:]
    assert all(collecting for _, collecting in warmup)
    assert len(timed) == 24
    assert not any(collecting for _, collecting in timed)
    assert gc.isenabled()
    rounds = [(timed[i][0], timed[i + 1][0]) for i in range(0, 24, 2)]
    assert all(first != second for first, second in rounds)
    assert len(set(rounds)) == 2


def test_real_rows_are_fed(dense, monkeypatch):
    seen = []
    run = runtime.Session.run
    monkeypatch.setattr(runtime.Session, "run", lambda self, feeds, **_: seen.append(feeds["x"]) or run(self, feeds))
    rows = np.arange(16, dtype=np.float32).reshape(2, 8)
    measure([dense], batches=(3,), feeds={"x": rows}, **QUICK)
    assert all((batch == rows[[0, 1, 0]]).all() for batch in seen)
    with pytest.raises(DataError, match="no input 'x'"):
        measure([dense], feeds={"z": rows}, **QUICK)


def test_a_fixed_batch_is_kept_and_noted(write, dense):
    fixed = write("g (float[2, 8] x) => (float[2, 4] y) { y = MatMul(x, w) }", WEIGHT, "fixed")
    lines = []
    found = measure([dense, fixed], batches=(1, 8), progress=lines.append, **QUICK)
    assert [entry.batch for entry in found] == [2, 2]
    notes = [line for line in lines if line.startswith("note:")]
    assert notes == ["note: the model's inputs fix the batch at 2; it is measured with that instead of 1, 8."]
    assert "cpu, 1 thread, batch 2: timing 2 models" in lines


def test_what_cannot_be_measured_is_a_usage_error(write, dense):
    other = write("g (float[N, 8] z) => (float[N, 4] y) { y = MatMul(z, w) }", WEIGHT, "other")
    with pytest.raises(UsageError, match=r"dense.onnx and .*other.onnx cannot be compared: .*'x' and 'z'"):
        measure([dense, other], **QUICK)
    with pytest.raises(UsageError, match="no model"):
        measure([])
    with pytest.raises(UsageError, match="at least one row, not 0"):
        measure([dense], batches=(4, 0))
    with pytest.raises(UsageError, match="cannot be negative: -1"):
        measure([dense], threads=(-1,))


def test_a_provider_that_is_not_there_is_named_before_anything_runs(dense, monkeypatch):
    monkeypatch.setattr(runtime, "available_providers", lambda: ("cpu",))
    with pytest.raises(EnvironmentFault, match=r"no tensorrt provider; available: cpu\.$"):
        measure([dense], providers=("cpu", "tensorrt"), **QUICK)


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_silent_fallback_is_detected(dense, monkeypatch):
    # onnxruntime says the provider is built in, but every node is executed by another.
    monkeypatch.setattr(runtime, "available_providers", lambda: ("cpu", "openvino"))
    (found,) = measure([dense], providers=("openvino",), **QUICK)
    assert (found.provider, found.ran_on) == ("openvino", ("cpu",))
    assert found.words == "the reference; ran on cpu, not on openvino"


ENDLESS = """g (float[N, 8] x) => (float[N, 8] y) {
    always = Constant<value = bool {1}>()
    y = Loop(, always, x) <body = b (int64 i, bool c, float[N, 8] h) => (bool d, float[N, 8] k) {
        d = Identity(c) k = Neg(h) }>
}"""


@pytest.mark.parametrize("provider", ["cpu", "openvino"])
@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_loop_without_end_is_given_up(write, monkeypatch, provider):
    monkeypatch.setattr(latency, "FIRST_RUN_SECONDS", 0.2)
    monkeypatch.setattr(runtime, "available_providers", lambda: ("cpu", "openvino"))
    with pytest.raises(UnsupportedError, match=r"does not finish a run within 0\.2 s"):
        measure([write(ENDLESS)], providers=(provider,), **QUICK)


def entry(ratio, provider="cpu"):
    return Latency("m.onnx", provider, ("cpu",), 1, 1, (1.0,), 1.0, 1.0, ratio)


@pytest.mark.parametrize(
    ("ratio", "text"),
    [
        (None, "the reference"),
        (Interval(0.617, 0.595, 0.645), "1.62x faster (95 % CI 1.55-1.68)"),
        (Interval(1.3, 1.25, 1.36), "1.30x SLOWER (95 % CI 1.25-1.36)"),
        (Interval(0.97, 0.94, 1.02), "no difference (95 % CI 0.98-1.06)"),
        (Interval(0.996, 0.994, 0.998), "no difference (95 % CI 1.00-1.01)"),
    ],
)
def test_verdicts(ratio, text):
    assert entry(ratio).words == text
    assert entry(ratio, "cuda").words == f"{text}; ran on cpu, not on cuda"
