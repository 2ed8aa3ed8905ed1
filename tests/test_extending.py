"""Parts of users' own: the example of the documentation, and what registering refuses."""

import importlib.util
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import pytest
from helpers import model, ops, proto, run, weights

import onnxq
from onnxq import passes
from onnxq.calibrate.histogram import Histogram
from onnxq.calibrate.ranges import RULES
from onnxq.errors import UsageError
from onnxq.grid import Grid
from onnxq.tune.methods import LEARNED
from onnxq.types import Silence

ROOT = Path(__file__).parent.parent
TEXT = """g (float[N,6,8,8] x, float[7,6,3,3] w, float[5,7,1,1] v) => (float[N,5,6,6] y) {
    a = Conv(x, w) b = Relu(a) c = Conv(b, v) d = Sigmoid(c)
    s = Constant<value = float[5,1,1] {2.0, 4.0, 0.5, 3.0, 8.0}>() y = Div(d, s)
}"""
ROWS = {"x": weights(40, 6, 8, 8)}


@dataclass
class Heard(Silence):
    warnings: list = field(default_factory=list)

    def warn(self, text):
        self.warnings.append(text)


@pytest.fixture
def parts(monkeypatch):
    """The example, registered for one test."""
    monkeypatch.setattr(passes, "_REGISTERED", {})
    for registry in (RULES, LEARNED):
        for name in ("three-sigma", "nudge", "mine"):
            monkeypatch.delitem(registry, name, raising=False)
            monkeypatch.setitem(registry, name, None)
            del registry[name]
    spec = importlib.util.spec_from_file_location("own_parts", ROOT / "examples" / "own_parts.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    found.register()
    return found


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    found = tmp_path_factory.mktemp("own") / "net.onnx"
    made = proto(TEXT, w=weights(7, 6, 3, 3), v=weights(5, 7, 1, 1))
    onnx.save(made, found)
    return found


def quantize(path, **options):
    return onnxq.quantize(path, ROWS, "w3a8", checks=onnxq.Checks(time_it=False), first_last=3, **options)


def test_all_three_parts_do_their_work(path, parts):
    found = quantize(path, ranges="three-sigma", reconstruction="nudge", bn_tuning=False)
    assert {applied.name: applied.count for applied in found.prepared.passes}["DivideByMultiplying"] == 1
    assert "Div" not in ops(found.prepared.model)
    assert {grid.rule for grid in found.plan.tensors.values()} == {"three-sigma"}
    assert [step.name for step in found.steps] == ["weights"]
    assert found.steps[0].after < found.steps[0].before
    assert {block.method for block in found.blocks} == {"nudge"}
    plainly = quantize(path, ranges="three-sigma", bn_tuning=False, without=["DivideByMultiplying"])
    assert "Div" in ops(plainly.prepared.model)
    assert found.verdict.fidelity.sqnr_db["y"] > plainly.verdict.fidelity.sqnr_db["y"]
    assert found.recipe.ranges == "three-sigma"


def test_the_rule_is_what_it_says(parts):
    values = np.random.default_rng(0).normal(1.0, 2.0, 200_000).astype(np.float32)
    histogram = Histogram("t")
    histogram.add(values, rows=False)
    stats = histogram.stats()
    assert parts.three_sigma(stats, Grid(8)) == pytest.approx((-5.0, 7.0), abs=0.1)


def test_the_rewrite_keeps_what_is_computed(parts):
    before = model(TEXT, w=weights(7, 6, 3, 3), v=weights(5, 7, 1, 1))
    from onnxq import graph

    graph.lift_constants(before)
    after = before.clone()
    assert parts.divide_by_multiplying(after) == 1
    graph.remove_unused(after)
    assert parts.divide_by_multiplying(after) == 0
    np.testing.assert_allclose(run(after, ROWS)["y"], run(before, ROWS)["y"], rtol=1e-5, atol=1e-5)


def test_a_rewrite_that_changes_outputs_is_undone_and_named(path, parts):
    def wrong(graph_model):
        node = next((node for node in graph_model.graph if node.op_type == "Relu"), None)
        return int(node is not None and onnxq.passes.base.graph.bypass(node, graph_model))

    onnxq.register_pass("Wrong", wrong)
    log = Heard()
    found = quantize(path, log=log)
    assert "Relu" in ops(found.prepared.model)
    (warning,) = log.warnings
    assert warning.startswith("Wrong changed the model's outputs")
    assert warning.endswith("It was registered with register_pass.")


@pytest.mark.parametrize(
    ("register", "name"),
    [
        (onnxq.register_range_rule, "mse"),
        (onnxq.register_range_rule, "auto"),
        (onnxq.register_pass, "FoldPad"),
        (onnxq.register_tuner, "adaquant"),
        (onnxq.register_tuner, "none"),
    ],
)
def test_names_of_the_package_cannot_be_taken(register, name):
    with pytest.raises(UsageError, match=f"{name}' is one of onnxq's own"):
        register(name, print)


def test_names_that_are_not_registered_are_refused_with_a_hint(path, parts):
    with pytest.raises(UsageError, match=r"ranges takes .*three-sigma, not 'three-sgima'. Did you mean 'three-sigma'"):
        quantize(path, ranges="three-sgima")
    with pytest.raises(UsageError, match=r"reconstruction takes none, .*nudge, not 'nudg'"):
        quantize(path, reconstruction="nudg")
    with pytest.raises(UsageError, match=r"rewrites: .*DivideByMultiplying. Did you mean 'DivideByMultiplying'"):
        quantize(path, without=["DivideByMultiplyng"])


def test_a_second_registration_replaces_the_first(parts):
    onnxq.register_range_rule("mine", min)
    onnxq.register_range_rule("mine", max)
    assert RULES["mine"] is max


def test_importing_costs_nothing():
    code = "import sys, onnxq; dir(onnxq); print([name for name in ('numpy', 'onnx', 'torch') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"
    assert all(getattr(onnxq, name) is not None for name in onnxq.__all__)
