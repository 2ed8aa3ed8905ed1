"""A run with awkward names to make reports of, and a reader of HTML that insists on well-formed pages."""

from html.parser import HTMLParser

from onnxq.types import (
    Applied,
    BlockResult,
    Coverage,
    Evaluation,
    Fidelity,
    FloatNode,
    Interval,
    Latency,
    Paired,
    PerRow,
    QuantPlan,
    Summary,
    TensorGrid,
    Verdict,
    WeightGrid,
)
from onnxq.types.details import Bars, Details, LayerDetail, TensorDetail, WeightDetail

PLAIN = str.maketrans({"\N{MINUS SIGN}": "-", "\N{EN DASH}": "-", "\N{MULTIPLICATION SIGN}": "x"})
VOID = {"meta", "link", "input", "br"}
NASTY = "</script><script>alert('&\")</script>"
FLAT = Bars((1.0, 8.0, 3.0), -1.0, 2.0)


def latency(model, median, ratio=None):
    return Latency(model, "cpu", ("cpu",), 1, 4, (median,) * 7, median, 2 * median, ratio)


def plan(**changes):
    given = {
        "target": "cpu",
        "source": "0" * 64,
        "tensors": {"x": TensorGrid(0.1, 3, rule="mse")},
        "weights": {"conv": WeightGrid((0.1,), None)},
        "integer": ("conv",),
        "skipped": {NASTY: "both operands are computed at run time", "mask": "it works on shapes or masks"},
    }
    return QuantPlan(**(given | changes))


def verdict(**changes):
    given = {
        "fidelity": Fidelity(16, {"y": 31.24}, Interval(0.975, 0.9, 0.995)),
        "coverage": Coverage(800, 1000, {"QLinearConv": 1}, (FloatNode(NASTY, "MatMul", "both are computed", 200),)),
        "float_bytes": 4_000_000,
        "quantized_bytes": 1_250_000,
        "latency": (latency("f", 2.0), latency("q", 1.0, Interval(0.5, 0.45, 0.55))),
        "optimized_gap": 1.0,
        "warnings": (f"mind {NASTY}",),
    }
    return Verdict(**(given | changes))


def summary(**changes):
    given = {
        "source": "/models/net.onnx",
        "output": "/models/net.int8.onnx",
        "recipe": {"preset": "balanced", "weight_bits": 8, "per_channel": True, "keep_float": ("a*",)},
        "data": {"name": NASTY, "preprocess": {"mean": [0.5, 0.25]}, "resize": None},
        "rows": 112,
        "plan": plan(),
        "verdict": verdict(),
        "evaluation": None,
        "seconds": 12.5,
        "blocks": (
            BlockResult("stem", "adaquant", 0.5, 0.2, True, 3.0),
            BlockResult("head", "adaround", 0.25, 0.3, False, 4.0),
        ),
    }
    return Summary(**(given | changes))


def evaluation(value, p_value, right=None):
    both = Paired(7, 3, Interval(value - 0.9, value - 0.93, value - 0.85), p_value)
    correct = None if right is None else PerRow("a" * 64, right)
    return Evaluation(200, Interval(value, value - 0.03, value + 0.02), Interval(0.9, 0.85, 0.93), both, None, correct)


def layer(name="conv", **changes):
    given = {
        "name": name,
        "op_type": "Conv",
        "block": "stem",
        "stage": 0,
        "shape": (8, 3, 3, 5),
        "weight_bits": 4,
        "input_bits": 8,
        "float_bytes": 1440,
        "stored_bytes": 400,
        "macs": 750,
        "reason": "",
        "tuned": True,
        "source": "x",
        "result": "r",
        "sqnr_db": 24.5,
        "weight": WeightDetail(FLAT, FLAT, (-0.5, 1.25), 33.3, 5, 7.5),
    }
    return LayerDetail(**(given | changes))


def details(**changes):
    tensor = TensorDetail(FLAT, -1.0, 1.75, (-0.5, 1.25), 0.1, 3, 8, "mse", 0.0125, 41.5)
    floating = layer(NASTY, op_type="MatMul", stage=1, shape=(), weight_bits=32, input_bits=32, float_bytes=0, macs=250,
                     stored_bytes=0, reason="both are computed", tuned=False, sqnr_db=None, weight=None)  # fmt: skip
    given = {
        "layers": (layer(), floating),
        "tensors": {"x": tensor},
        "rows": 16,
        "passes": (Applied("FoldBatchNorm", 3, {}), Applied("FuseBranches", 0, {NASTY: "no branch"})),
        "versions": {"onnxq": "0.1.0"},
    }
    return Details(**(given | changes))


class Page(HTMLParser):
    """Reads a page, typographic signs as plain ones; fails on an element that is not closed where it was opened."""

    def __init__(self, text):
        super().__init__()
        self.text, self.ids, self.links, self.elements, self.tables = "", [], [], [], []
        self._open = []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, name, attributes):
        found = dict(attributes)
        self.elements.append((name, found))
        if "id" in found:
            self.ids.append(found["id"])
        if "href" in found:
            self.links.append(found["href"])
        if name == "table":
            self.tables.append([])
        if name == "tr":
            self.tables[-1].append([])
        if name in ("td", "th"):
            self.tables[-1][-1].append("")
        if name not in VOID:
            self._open.append(name)

    def handle_endtag(self, name):
        assert self._open.pop() == name

    def handle_data(self, data):
        data = data.translate(PLAIN)
        if self._open and self._open[-1] not in ("style", "script"):
            self.text += data
            if self.tables and self.tables[-1] and self.tables[-1][-1] and {"td", "th"} & set(self._open):
                self.tables[-1][-1][-1] += data

    def named(self, kind, name):
        """Attributes of the elements `kind` of class `name`."""
        return [found for element, found in self.elements if element == kind and name in _classes(found)]


def _classes(found):
    return (found.get("class") or "").split()
