"""A fixed sample of the ONNX backend tests through `onnxq quantize`; `benchmarks/sweep.py` runs all of them."""

import importlib
import sys
import types
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from helpers import proto, weights

ROOT = Path(__file__).parent.parent

MODULES = (
    "conv",
    "gemm",
    "matmul",
    "convtranspose",
    "relu",
    "cast",
    "optionalgetelement",
    "if_",
    "sequenceinsert",
    "resize",
    "softmax",
)
QUANTIZED = (
    "node/test_gemm_all_attributes/baked",
    "node/test_gemm_transposeB/baked",
    "node/test_matmul_2d/baked",
    "node/test_conv_with_strides_and_asymmetric_padding/baked",
    "pytorch-converted/test_Conv2d_groups/raised",
    "pytorch-converted/test_Linear/raised",
)
OTHERS = 54


@pytest.fixture
def sweep(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import sweep

    return sweep


def test_a_sample_of_the_backend_tests_is_quantized_or_declined(sweep, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "__main__", types.ModuleType("__main__"))  # else each child imports pytest anew
    known = {case.name: case for case in sweep.cases(MODULES)}
    layers = {"Conv", "Gemm", "MatMul"}
    others = [case for case in known.values() if case.name not in QUANTIZED]
    cheap = [case for case in others if not layers & {node.op_type for node in case.model.graph.node}]
    chosen = [known[name] for name in QUANTIZED] + cheap[:: len(cheap) // OTHERS][:OTHERS]
    endings = list(sweep.run_all(chosen, tmp_path, sweep.Limits(seconds=120), workers=2))
    assert [(ending.case, ending.message) for ending in endings if ending.end == "failed"] == []
    assert len(endings) == len(QUANTIZED) + OTHERS
    quantized = {ending.case for ending in endings if ending.end == "quantized"}
    assert quantized >= set(QUANTIZED) - {"node/test_gemm_all_attributes/baked"}
    assert Counter(ending.end for ending in endings)["declined"] >= OTHERS
    assert list(tmp_path.iterdir()) == []


def test_the_sweep_sees_what_breaks(sweep, tmp_path, monkeypatch):
    """A wrong output, a crash, a hang, an error of ours and a changed input are failures."""
    made = proto("g (float[4,3] x, float[3,2] w) => (float[4,2] y) { y = MatMul(x, w) }", w=weights(3, 2))
    place = tmp_path / "case"
    (place / "data").mkdir(parents=True)
    onnx.save(made, place / "model.onnx")
    np.savez(place / "data" / "0.npz", x=weights(4, 3))

    def judged(code, said="", result=None):
        def command(arguments):
            (place / "err").write_text(said)
            if result is not None:
                onnx.save(result, arguments[arguments.index("-o") + 1])
            return code

        monkeypatch.setattr(importlib.import_module("onnxq.cli.main"), "_run", command)
        end = sweep.judge(place, [])
        (place / "result.onnx").unlink(missing_ok=True)
        return end

    wrong = proto("g (float[4,3] x, float[3,2] w) => (float[4,2] y) { y = MatMul(x, w) }", w=-weights(3, 2))
    refusal = "onnxq: error: there is nothing to quantize.\n"
    assert judged(0, result=made)[0] == "untouched"
    assert judged(0, result=wrong)[0] == "failed"
    assert judged(0) == ("failed", "exit 0: ")
    assert judged(4, refusal) == ("declined", "there is nothing to quantize.")
    assert judged(3, "warning: odd\n" + refusal)[0] == "declined"
    assert judged(4, refusal * 2)[0] == "failed"
    assert judged(4, "Traceback\n")[0] == "failed"
    assert judged(4, refusal, made)[0] == "failed"
    assert judged(1, refusal)[0] == "failed"
    assert judged(6, refusal)[0] == "failed"


def test_outputs_are_close_by_signal_to_noise_or_by_range(sweep):
    x = np.linspace(-1, 1, 101, dtype=np.float32)
    assert sweep.distance(x, x, touched=False) == ("", np.inf)
    assert sweep.distance(x, x + 0.04, touched=True)[0] == ""
    assert sweep.distance(x, x + 0.04, touched=False)[0]
    spike = np.where(x == x[50], 0.3, x).astype(np.float32)
    assert sweep.distance(x, spike, touched=True)[0] == ""
    assert sweep.distance(x, x * 0.8, touched=True)[0]
    assert "instead of" in sweep.distance(x, x.astype(np.float64), touched=True)[0]
    assert "infinities" in sweep.distance(x, np.where(x > 0.9, np.nan, x).astype(np.float32), touched=True)[0]
    assert sweep.distance(np.arange(3), np.array([0, 1, 3]), touched=False)[0]
