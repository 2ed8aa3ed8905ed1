"""The command line as users call it: results, one-line errors, exit codes, nothing half-written."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from onnxq.cli.main import _run as run

ROOT = Path(__file__).parent.parent
CNN = ROOT / "models" / "digits_cnn.onnx"
TRANSFORMER = ROOT / "models" / "digits_transformer.onnx"
DATA = ROOT / "calibration_data" / "digits"
LABELLED = ROOT / "calibration_data" / "digits_eval"
NORMALISE = ["--mean", "0.5", "--std", "0.5"]


@pytest.fixture(scope="session")
def quantized(tmp_path_factory):
    """The shipped CNN quantized by a fresh process from another folder; (path, JSON document)."""
    folder = tmp_path_factory.mktemp("cli")
    command = [sys.executable, str(ROOT / "cli.py"), "quantize", str(CNN), "--data", str(DATA), *NORMALISE]
    options = ["-o", "out.onnx", "--json", "--eval", str(LABELLED), "--save-plan", "plan.json", "--save-recipe"]
    done = subprocess.run([*command, *options], cwd=folder, capture_output=True, text=True, check=True)
    return folder / "out.onnx", json.loads(done.stdout)


def test_a_fresh_process_quantizes_the_shipped_cnn_whole(quantized):
    path, document = quantized
    verdict = document["verdict"]
    assert verdict["integer_coverage"] == 1.0
    assert verdict["kernels"]["QLinearConv"] == 10
    assert verdict["kernels"]["QGemm"] == 1
    assert verdict["sqnr_db"]["logits"] > 30
    assert verdict["quantized_bytes"] == path.stat().st_size < 0.35 * CNN.stat().st_size
    assert verdict["optimized_gap_steps"] <= 1
    assert document["evaluation"]["accuracy"]["value"] >= 0.985
    assert document["calibration_rows"] == 112
    onnx.checker.check_model(str(path), full_check=True)


def test_the_file_records_how_it_was_made(quantized):
    path, document = quantized
    found = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert json.loads(found["onnxq.recipe"]) == document["recipe"] | {"keep_float": []}
    assert found["onnxq.source"] == "digits_cnn.onnx"
    assert len(found["onnxq.source_sha256"]) == 64
    assert str(ROOT) not in json.dumps(found)


def test_the_same_seed_gives_the_same_bytes(quantized, tmp_path):
    recipe = quantized[0].with_name("out.onnx.toml")
    again = tmp_path / "again.onnx"
    arguments = ["quantize", str(CNN), "--data", str(DATA), *NORMALISE, "--recipe", str(recipe), "-o", str(again), "-q"]
    assert run([*arguments, "--no-timing"]) == 0
    assert again.read_bytes() == quantized[0].read_bytes()


def test_the_saved_plan_emits_the_same_file(quantized):
    import onnxq
    from onnxq.emit import emit
    from onnxq.plan import load_learned, load_plan

    path, _ = quantized
    plan = load_plan(path.with_name("plan.json"))
    learned = load_learned(path.with_name("plan.npz"))
    assert learned
    model = emit(onnxq.simplify(CNN).model, plan, learned=learned)
    made = {v.name: v.const_value.numpy() for v in model.graph.initializers.values()}
    for tensor in onnx.load(path).graph.initializer:
        np.testing.assert_array_equal(made[tensor.name], onnx.numpy_helper.to_array(tensor))


def test_the_transformer_has_integer_linears_and_float_attention(tmp_path, capsys):
    out = tmp_path / "t.onnx"
    arguments = ["quantize", str(TRANSFORMER), "--data", str(DATA), *NORMALISE, "-o", str(out), "--json", "--no-timing"]
    assert run(arguments) == 0
    verdict = json.loads(capsys.readouterr().out)["verdict"]
    assert verdict["kernels"]["QGemm"] + verdict["kernels"]["MatMulIntegerToFloat"] == 13
    assert "QLinearSoftmax" not in verdict["kernels"]
    assert {node["op_type"] for node in verdict["float_nodes"]} == {"MatMul"}
    assert {node["reason"] for node in verdict["float_nodes"]} == {"both operands are computed at run time"}
    assert verdict["agreement"]["value"] == 1.0


def test_inspect_shows_grids_coverage_and_provenance(quantized, capsys):
    assert run(["inspect", str(quantized[0]), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["coverage"]["integer_coverage"] == 1.0
    assert document["opset"] == 17
    assert document["ir_version"] == 8
    layers = document["layers"]
    assert len(layers) == 11
    assert {layer["weight_dtype"] for layer in layers} == {"int8"}
    assert all(layer["weight_scales"] == layer["weight_shape"][0] for layer in layers)
    assert run(["inspect", str(CNN)]) == 0
    assert "float32" in capsys.readouterr().out


def test_inspect_shows_blocks_and_stages(quantized, capsys):
    assert run(["inspect", str(CNN), "--blocks", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    blocks = document["blocks"]
    layers = [layer["name"] for layer in document["layers"]]
    assert [name for block in blocks for name in block["layers"]] == layers
    assert sum(block["nodes"] for block in blocks) == sum(document["operators"].values())
    assert blocks[0]["stage"] == 0
    assert blocks[-1]["outputs"] == document["outputs"]
    assert run(["inspect", str(CNN), "--blocks"]) == 0
    shown = capsys.readouterr().out
    assert "hands on" in shown
    assert blocks[1]["name"] in shown
    assert run(["inspect", str(quantized[0]), "--blocks"]) == 0
    assert "no blocks: they are found in float models" in capsys.readouterr().out
    assert run(["inspect", str(CNN), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["blocks"] is None


def test_evaluate_compares_with_the_float_model(quantized, capsys):
    arguments = ["evaluate", str(quantized[0]), "--data", str(LABELLED), *NORMALISE, "--reference", str(CNN), "--json"]
    assert run(arguments) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["rows"] == 360
    assert document["reference_accuracy"]["value"] == pytest.approx(358 / 360)
    assert document["accuracy"]["low"] < document["accuracy"]["value"] < document["accuracy"]["high"]
    assert document["fidelity"]["sqnr_db"]["logits"] > 30
    assert run(["evaluate", str(quantized[0]), "--data", str(DATA), *NORMALISE, "--reference", str(CNN)]) == 0
    assert "agreement" in capsys.readouterr().out


def test_benchmark_measures_pairs_and_keeps_the_samples(quantized, capsys):
    arguments = ["benchmark", str(CNN), str(quantized[0]), "--threads", "1,2", "--batch", "2", "--seconds", "0.05"]
    arguments.append("--no-peak")
    assert run([*arguments, "--provider", "cpu", "--json", "-q"]) == 0
    latencies = json.loads(capsys.readouterr().out)["latencies"]
    assert [(entry["threads"], entry["batch"]) for entry in latencies] == [(1, 2), (1, 2), (2, 2), (2, 2)]
    assert [entry["ratio"] is None for entry in latencies] == [True, False, True, False]
    assert all(len(entry["samples_ms"]) >= 10 for entry in latencies)
    assert latencies[0]["ran_on"] == ["cpu"]
    assert run([*arguments, "--provider", "cpu", "-q"]) == 0
    assert str(quantized[0]) in capsys.readouterr().out


def test_simplify_folds_batch_normalization(tmp_path, capsys):
    out = tmp_path / "s.onnx"
    assert run(["simplify", str(CNN), "-o", str(out), "-q"]) == 0
    operators = [node.op_type for node in onnx.load(out).graph.node]
    assert "BatchNormalization" not in operators
    assert operators.count("Conv") == 10
    assert "FoldBatchNorm: 10" in capsys.readouterr().out


def test_a_dry_run_writes_nothing(tmp_path, capsys):
    out = tmp_path / "none.onnx"
    arguments = ["quantize", str(CNN), "--data", str(DATA), "-o", str(out), "--dry-run", "-q", "--keep-float", "*/fc*"]
    code = run(arguments)
    text = capsys.readouterr()
    assert code in (0, 2), text.err
    arguments = arguments[:-2]
    assert run(arguments) == 0
    assert "nothing was written" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def bad_model(folder, content):
    path = folder / "bad.onnx"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["quantize", "nowhere.onnx", "--data", "d"], 3, ["nowhere.onnx", "does not exist"]),
        (["quantize", "{models}/digits_cn.onnx", "--data", "d"], 3, ["Did you mean", "digits_cnn.onnx"]),
        (["quantize", "{models}", "--data", "d"], 3, ["is a folder"]),
        (["quantize", "{empty}", "--data", "d"], 3, ["is empty"]),
        (["quantize", "{garbage}", "--data", "d"], 3, ["not an ONNX"]),
        (["quantize", "{cnn}"], 2, ["--data"]),
        (["quantize", "{cnn}", "--data", "{tmp}/none"], 3, ["none", "no such file"]),
        (["quantize", "{cnn}", "--data", "{tmp}/blank"], 3, ["blank"]),
        (["quantize", "{cnn}", "--data", "{data}", "--preset", "balancd"], 2, ["Did you mean", "balanced"]),
        (["quantize", "{cnn}", "--data", "{data}", "--weight-bits", "9"], 2, ["2 to 8"]),
        (["quantize", "{cnn}", "--data", "{data}", "--ranges", "mes"], 2, ["mse"]),
        (["quantize", "{cnn}", "--data", "{data}", "--target", "tpu"], 2, ["target"]),
        (["quantize", "{cnn}", "--data", "{data}", "--keep-float", "nope*"], 2, ["nope*", "matches no node"]),
        (["quantize", "{cnn}", "--data", "{data}", "--mean", "a"], 2, ["'a'"]),
        (["quantize", "{cnn}", "--data", "{data}", "-o", "{cnn}"], 2, ["is the input model"]),
        (["quantize", "{cnn}", "--data", "{data}", "-o", "{tmp}/no/out.onnx"], 6, ["folder", "does not exist"]),
        (["quantize", "{cnn}", "--data", "{data}", "--save-plan", "{tmp}/no/p.json"], 6, ["folder", "does not exist"]),
        (["quantize", "{cnn}", "--data", "{wrong}"], 3, ["image", "32"]),
        (["quantize", "{relu}", "--data", "{data}"], 4, ["nothing to quantize"]),
        (["quantize", "{cnn}", "--data", "{data}", "--recipe", "{bad_recipe}"], 3, ["unknown key", "Did you mean"]),
        (["benchmark", "{cnn}", "--provider", "tensorrt"], 6, ["tensorrt", "available: cpu"]),
        (["evaluate", "{cnn}", "--data", "{data}"], 3, ["label"]),
        (["inspect", "{garbage}"], 3, ["not an ONNX"]),
        (["quantise", "{cnn}"], 2, ["quantise", "Did you mean"]),
    ],
)
def test_refusals_are_one_line_with_an_exit_code_and_leave_nothing(arguments, code, words, tmp_path, capsys):
    (tmp_path / "blank").mkdir()
    (tmp_path / "recipe.toml").write_text("sampels = 3\n")
    np.savez(tmp_path / "wrong.npz", image=np.zeros((2, 3, 8, 8), np.float32))
    relu = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[n] x) => (float[n] y) {y=Relu(x)}'
    )
    onnx.save(relu, tmp_path / "relu.onnx")
    (tmp_path / "empty.onnx").touch()
    before = sorted(tmp_path.rglob("*"))
    places = {
        "models": CNN.parent, "cnn": CNN, "data": DATA, "tmp": tmp_path, "wrong": tmp_path / "wrong.npz",
        "empty": tmp_path / "empty.onnx", "relu": tmp_path / "relu.onnx", "bad_recipe": tmp_path / "recipe.toml",
    }  # fmt: skip
    if any("{garbage}" in argument for argument in arguments):
        places["garbage"] = bad_model(tmp_path, b"this is no protobuf" * 9)
        before = sorted(tmp_path.rglob("*"))
    given = [argument.format(**places) for argument in arguments]
    if given[0] == "quantize" and "-o" not in given:
        given += ["-o", str(tmp_path / "out.onnx")]
    assert run([*given, *(["-q"] if given[0] in ("quantize", "benchmark") else [])]) == code
    out, err = capsys.readouterr()
    assert out == ""
    lines = [line for line in err.splitlines() if line and not line.startswith(("warning:", "data:"))]
    assert len(lines) == 1
    assert lines[0].startswith("onnxq: error: ")
    for word in words:
        assert word in lines[0]
    assert sorted(tmp_path.rglob("*")) == before


def test_help_needs_neither_onnx_nor_the_runtime():
    code = (
        "import sys; from onnxq.cli.main import _run; assert _run(['--help']) == 0; "
        "heavy = {'torch', 'onnx', 'onnx_ir', 'onnxruntime', 'numpy', 'rich'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "quantize" in done.stdout


def test_quantizing_a_quantized_file_is_declined(quantized, tmp_path, capsys):
    out = tmp_path / "twice.onnx"
    assert run(["quantize", str(quantized[0]), "--data", str(DATA), "-o", str(out), "-q"]) == 4
    assert "already quantized" in capsys.readouterr().err
    assert not out.exists()


def test_reparam_says_what_each_rewrite_did_and_how_exact_it_is(tmp_path, capsys):
    out = tmp_path / "r.onnx"
    assert run(["reparam", str(CNN), "-o", str(out), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["kind"] == "reparam"
    assert 0 < document["gap"] < 1e-5
    assert document["nodes_after"] == len(onnx.load(out).graph.node) < document["nodes_before"]
    counts = {entry["name"]: entry["count"] for entry in document["passes"] if entry["count"]}
    assert counts["FoldBatchNorm"] == 10
    assert run(["reparam", str(CNN), "-o", str(out), "--without", "FoldBatchNorm", "-q"]) == 0
    text = capsys.readouterr().out
    assert "FoldBatchNorm" not in text
    assert "NormToConv: 10" in text


def test_reparam_refuses_unknown_rewrites_and_quantized_files(quantized, tmp_path, capsys):
    out = tmp_path / "r.onnx"
    assert run(["reparam", str(CNN), "-o", str(out), "--without", "FoldNothing", "-q"]) == 2
    assert "there is no rewrite 'FoldNothing'" in capsys.readouterr().err
    assert run(["reparam", str(quantized[0]), "-o", str(out), "-q"]) == 4
    assert not out.exists()


def test_rewrites_can_be_left_out_of_a_quantization(tmp_path, capsys):
    out = tmp_path / "q.onnx"
    arguments = ["quantize", str(CNN), "--data", str(DATA), *NORMALISE, "-o", str(out), "--no-timing", "-q", "--json"]
    assert run([*arguments, "--without", "FoldBatchNorm", "--no-bn-tuning", "--no-migrate-norms"]) == 0
    recipe = json.loads(capsys.readouterr().out)["recipe"]
    assert (recipe["without"], recipe["bn_tuning"], recipe["migrate_norms"]) == (["FoldBatchNorm"], False, False)
    assert [node.op_type for node in onnx.load(out).graph.node].count("Conv") == 20
