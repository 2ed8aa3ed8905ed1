"""What `inspect` says about weights of few bits, packed or not."""

import json

import numpy as np
import pytest
from helpers import model, weights

import onnxq
from onnxq import graph
from onnxq.cli.main import _run as run
from onnxq.emit import emit, packed_bytes
from onnxq.plan import Precision, Range, make_plan, place
from onnxq.types import LearnedLayer

TEXT = """g (float[2,3,8,8] x, float[60,3,3,3] w, float[60] b, float[90,60,3,3] v, float[90,90,1,1] t,
    float[5,90,1,1] u) => (float[2,5,4,4] y) {
    [one] h = Conv(x, w, b) [two] i = Conv(h, v) r = Relu(i) [also] j = Conv(r, t) [last] y = Conv(j, u)
}"""
SHAPES = {"w": (60, 3, 3, 3), "v": (90, 60, 3, 3), "t": (90, 90, 1, 1), "u": (5, 90, 1, 1)}


def files(folder, bits, opset=17):
    """(float, plain, packed) files; the first and last layer have 8 bits."""
    made = model(TEXT, opset, b=weights(60), **{name: weights(*shape) for name, shape in SHAPES.items()})
    placement = place(made)
    ranges = {name: Range(-3.0, 3.0, "given") for name in placement.tensors}
    plan = make_plan(made, placement, ranges, Precision(weight_bits=bits))
    codes = np.random.default_rng(0).integers(-(2 ** (bits - 1)), 2 ** (bits - 1), SHAPES["v"]).astype(np.int8)
    paths = [folder / f"{name}.onnx" for name in ("float", "plain", "packed")]
    learned = {"two": LearnedLayer(codes)}
    emitted = [emit(made, plan, learned=learned, packed=packed) for packed in (False, True)]
    for path, written in zip(paths, (made, *emitted), strict=True):
        graph.save(written, path)
    return paths, codes


@pytest.mark.parametrize(("bits", "opset", "stored"), [(2, 17, "uint8"), (3, 17, "uint8"), (4, 21, "int4")])
def test_bits_bytes_and_codes_of_each_layer(tmp_path, bits, opset, stored):
    (_, plain, packed), codes = files(tmp_path, bits, opset)
    seen, small = onnxq.inspect(plain), onnxq.inspect(packed)
    assert small.bytes < seen.bytes
    assert (
        [layer.name for layer in small.layers]
        == [layer.name for layer in seen.layers]
        == ["one", "two", "also", "last"]
    )
    wanted = {int(code): int((codes == code).sum()) for code in np.unique(codes)}
    for before, after in zip(seen.layers, small.layers, strict=True):
        assert after.codes == before.codes
        assert after.weight_bits == before.weight_bits == (bits if after.name in ("two", "also") else 8)
        assert after.weight_shape == before.weight_shape
        assert (before.weight_dtype, before.packed) == ("int8", False)
        assert sum(after.codes.values()) == np.prod(after.weight_shape)
    two = small.layers[1]
    assert two.codes == wanted
    assert two.packed
    assert two.weight_dtype == stored
    assert two.weight_scales == 90
    assert seen.layers[1].weight_bytes == codes.size + 5 * 90
    shape = 0 if stored == "int4" else 4 * 8  # of a Reshape; tables are shared
    assert two.weight_bytes == packed_bytes(codes.size, bits) + 5 * 90 + shape
    assert small.coverage.share == seen.coverage.share == 1.0
    assert small.coverage.total_macs == seen.coverage.total_macs > 0
    sizes = [np.prod(layer.weight_shape) for layer in small.layers]
    assert small.layer_weights == sum(sizes)
    total = 8 * (sizes[0] + sizes[3]) + bits * (sizes[1] + sizes[2])
    assert small.average_bits == pytest.approx(total / sum(sizes))
    assert small.layer_bytes == sum(layer.weight_bytes for layer in small.layers)


@pytest.mark.parametrize(("bits", "opset", "stored"), [(1, 17, "uint8"), (3, 17, "uint8"), (4, 21, "int4")])
def test_a_codebook_has_the_bits_of_its_indices(tmp_path, capsys, bits, opset, stored):
    made = model(TEXT, opset, b=weights(60), **{name: weights(*shape) for name, shape in SHAPES.items()})
    placement = place(made)
    ranges = {name: Range(-3.0, 3.0, "given") for name in placement.tensors}
    plan = make_plan(made, placement, ranges, Precision(codebook_bits=bits))
    for name, packed in (("plain", False), ("packed", True)):
        graph.save(emit(made, plan, packed=packed), tmp_path / f"{name}.onnx")
    before, after = (onnxq.inspect(tmp_path / f"{name}.onnx").layers for name in ("plain", "packed"))
    books = len(plan.weights["also"].values)  # 90 weights per channel: too few for 16 values of their own
    assert (len(plan.weights["two"].values), books) == (90, 1 if bits > 3 else 90)
    assert min(layer.weight_bits for layer in before) >= 7  # whole int8 codes
    assert [layer.weight_bits for layer in after] == [8, bits, bits, 8]
    assert [layer.codebook for layer in after] == [0, 2**bits, 2**bits, 0]
    assert [layer.codes for layer in after] == [layer.codes for layer in before]
    assert (after[1].packed, after[1].weight_dtype, before[1].codebook) == (True, stored, 0)
    shapes = (0 if stored == "int4" else 2 * 8) + 4 * 8  # of two Reshapes, the last one to the weight's four axes
    assert after[1].weight_bytes == packed_bytes(90 * 540, bits) + 90 * 2**bits + 5 * 90 + shapes
    assert run(["inspect", str(tmp_path / "packed.onnx")]) == 0
    assert f"packed {stored} book of {2**bits} x 90 scales" in " ".join(capsys.readouterr().out.split())


def test_a_float_file_has_no_codes(tmp_path):
    (source, *_), _ = files(tmp_path, 4)
    found = onnxq.inspect(source)
    assert [(layer.weight_bits, layer.codes, layer.packed) for layer in found.layers] == [(32, None, False)] * 4
    assert [layer.weight_bytes for layer in found.layers] == [4 * int(np.prod(shape)) for shape in SHAPES.values()]
    assert found.average_bits == 32


def test_the_document_and_the_table_show_them(tmp_path, capsys):
    (_, _, packed), codes = files(tmp_path, 3)
    assert run(["inspect", str(packed), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    two = document["layers"][1]
    assert two["weight_bits"] == 3
    assert two["packed"] is True
    assert two["codes"] == {str(code): int((codes == code).sum()) for code in range(-4, 4)}
    found = onnxq.inspect(packed)
    assert document["layer_weights"] == {
        "elements": found.layer_weights,
        "bytes": found.layer_bytes,
        "average_bits": found.average_bits,
    }
    assert run(["inspect", str(packed)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "-4 .. 3" in shown
    assert "packed" in shown
    assert f"4 layers: {found.layer_weights} weights of {found.average_bits:.2f} bits" in shown


@pytest.mark.parametrize(("dtype", "lowest"), [("uint8", 0), ("int8", -8)])
def test_weights_of_other_tools_have_bits_too(tmp_path, dtype, lowest):
    """Both ends of 4 bits occur: the lowest signed code is one that symmetric grids leave out."""
    text = f"""g (uint8[1,4] q, float s, uint8 z, {dtype}[4,3] c, float t, {dtype} o) => (float[1,3] y) {{
        x = DequantizeLinear(q, s, z) w = DequantizeLinear(c, t, o) [n] y = MatMul(x, w)
    }}"""
    codes = (np.asarray([[0, 1, 15], [2, 3, 4], [5, 6, 7], [8, 9, 9]]) + lowest).astype(dtype)
    scalars = {"s": np.float32(0.1), "z": np.uint8(3), "t": np.float32(0.2), "o": np.asarray(0, dtype)}
    graph.save(model(text, c=codes, **scalars), tmp_path / "m.onnx")
    layer = onnxq.inspect(tmp_path / "m.onnx").layers[0]
    assert (layer.weight_bits, layer.weight_dtype, layer.weight_bytes, layer.packed) == (4, dtype, 17, False)
    assert layer.codes == {**dict.fromkeys([*range(lowest, lowest + 9), lowest + 15], 1), lowest + 9: 2}
