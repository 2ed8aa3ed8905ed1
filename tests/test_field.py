"""The parts of `benchmarks/field.py` that need no other quantizer."""

import importlib
import json
from pathlib import Path

import onnx
import pytest
from helpers import proto, weights

ROOT = Path(__file__).parent.parent
BITS = {"float": "float", "onnxq-light": "W4A4"}


@pytest.fixture
def load(monkeypatch):
    """Returns a function that imports a module of the benchmarks or of its adapters."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "adapters"))
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


@pytest.fixture
def options(load, tmp_path):
    def parse(*argv):
        return load("field").options(["--out", str(tmp_path), "--environments", str(tmp_path / "none"), *argv])

    return parse


def row(quantizer, value=0.8, agreement=0.9, rows=10000, ratio=None, **others):
    """A row of field.json of one model; a latency ratio gets an interval of 0.02 to either side."""
    latency = {"ratio": ratio, "ratio_low": ratio - 0.02, "ratio_high": ratio + 0.02} if ratio else None
    score = {"metric": "top1", "value": value, "agreement": agreement, "sqnr_db": 12.34, "rows": rows}
    found = {"model": "net", "bits": BITS.get(quantizer, "W4A4"), "first_last": "8", "quantizer": quantizer}
    found |= {"samples": 512, "limit": None, "status": "ok", "message": "", "bytes": 2048, "score": score}
    found |= {"kernels": {"integer": {"QLinearConv": 3}, "float": {"Gemm": 1}}}
    found |= {"cost": {"wall_s": 7.4, "cpu_s": 6.6, "peak_mb": 99.6}} | ({"latency": latency} if latency else {})
    return found | others


def test_files_are_planned_per_bits_that_a_quantizer_can_write(load, options):
    field = load("field")
    args = options("--bits", "W8A8", "W4A8", "--quantizers", "onnxq-light", "nncf", "--first-last", "same")
    planned = [(one.bits, one.first_last, one.quantizer) for one in field.planned(["net"], args)]
    assert planned == [
        ("float", "8", "float"),
        ("W8A8", "8", "onnxq-light"),  # at 8 bits there is one policy
        ("W8A8", "8", "nncf"),
        ("W4A8", "same", "onnxq-light"),
    ]
    with pytest.raises(ValueError, match="'W9A8'"):
        field.planned(["net"], options("--bits", "W9A8"))


def test_a_row_that_is_there_is_not_repeated(load, options):
    field = load("field")
    runs = field.planned(["net"], options("--bits", "W4A4", "--quantizers", "onnxq-light", "aimet"))
    rows = [row("float"), row("onnxq-light", status="failed")]
    assert [one.quantizer for one in field.missing(runs, rows, again=False)] == ["aimet"]
    for other in ({"limit": 5}, {"samples": 256}, {"first_last": "same"}, {"bits": "W4A8"}, {"model": "other"}):
        assert "onnxq-light" in {one.quantizer for one in field.missing(runs, [rows[0], rows[1] | other], again=False)}
    rows.append(row("quark", status="failed"))  # of another call
    assert [one.quantizer for one in field.missing(runs, rows, again=True)] == ["onnxq-light", "aimet"]
    assert [one["quantizer"] for one in rows] == ["float", "quark"]


def test_an_environment_that_is_not_there_is_a_message(load, options, tmp_path):
    field = load("field")
    args = options("--bits", "W4A8", "--quantizers", "aimet")
    subject = field.Subject("net", tmp_path / "net.onnx", tmp_path, None)
    found = field.measured(field.planned(["net"], args)[1], subject, args)
    assert (found["status"], found["message"]) == ("failed", "environment not built: run rival_environments.py")
    (tmp_path / "none" / "aimet").mkdir(parents=True)
    (tmp_path / "none" / "aimet" / "failed.json").write_text('"ERROR: no such pin"')
    assert field.versions("aimet", tmp_path / "none") == ({}, "environment not built: ERROR: no such pin")
    (tmp_path / "none" / "aimet" / "installed.json").write_text('{"aimet-onnx": "2.42.0", "pip": "1"}')
    assert field.versions("aimet", tmp_path / "none") == ({"aimet-onnx": "2.42.0"}, "")


def test_a_call_makes_what_is_missing_and_then_times_it(load, options, tmp_path, monkeypatch):
    field = load("field")
    made, timed = [], []
    monkeypatch.setattr(field, "timed", lambda one, *_: timed.append(one["quantizer"]) or {"ratio": 0.5})

    def measured(one, *_):
        made.append(one.quantizer)
        return row(**vars(one))

    monkeypatch.setattr(field, "measured", measured)
    monkeypatch.setattr(field, "markdown", len)
    monkeypatch.setattr(Path, "write_text", lambda path, text, **_: path.write_bytes(str(text).encode()))
    chosen = {"net": None}
    for seconds in ("0", "1", "1"):
        args = options("--bits", "W4A4", "--quantizers", "onnxq-light", "--seconds", seconds)
        field.play(chosen, field.load(tmp_path), args)
    assert (made, timed) == (["float", "onnxq-light"], ["onnxq-light"])
    assert [one["quantizer"] for one in field.load(tmp_path)] == made


def test_the_arguments_of_a_rival(load, tmp_path):
    contestants = load("contestants")
    paths = (Path("m.onnx"), Path("feeds"), Path("o.onnx"))
    argv = contestants.command("aimet-adaround", "W4A8", "8", paths, tmp_path)
    assert argv[0] == str(tmp_path / "aimet" / "bin" / "python")
    assert [Path(argv[1]).name, *argv[2:5]] == ["with_aimet.py", "m.onnx", "feeds", "o.onnx"]
    settings = json.loads(argv[5])
    assert {key: settings[key] for key in ("weight_bits", "activation_bits", "first_last")} == {
        "weight_bits": 4,
        "activation_bits": 8,
        "first_last": 8,
    }
    assert settings["adaround"] == 1000
    same = contestants.command("aimet", "W4A8", "same", paths, tmp_path)
    assert json.loads(same[5])["first_last"] is None
    for name, who in contestants.CONTESTANTS.items():
        argv = contestants.command(name, who.bits[0], "8", paths, tmp_path)
        assert not who.script or Path(argv[1]).is_file(), name
        assert not who.environment or who.environment in load("rival_environments").ENVIRONMENTS


def test_the_arguments_of_onnxq(load):
    from click.testing import CliRunner

    contestants = load("contestants")
    paths = (Path("m.onnx"), Path("feeds"), Path("o.onnx"))

    def ends(bits, policy):
        argv = contestants.command("onnxq-light", bits, policy, paths, None)
        return argv[argv.index("--activation-bits") + 2 : argv.index("m.onnx")]

    assert ends("W4A4", "8") == ends("W4A8", "8") == ["--first-last", "8"]
    assert ends("W4A4", "same") == ["--first-last", "4"]
    assert ends("W4A8", "same") == ["--recipe", "o.toml"]
    assert "--preset" not in contestants.command("onnxq-light", "W4A8", "same", paths, None)
    argv = contestants.command("onnxq-light", "W4A8", "8", paths, None)
    help_text = CliRunner().invoke(importlib.import_module("onnxq.cli.main").group, ["quantize", "--help"]).output
    assert all(option in help_text for option in argv if option.startswith("--"))


def test_the_recipe_gives_all_layers_the_same_bits(load):
    import tomllib

    found = tomllib.loads(load("contestants").recipe("W4A8", "light"))
    assert found["preset"] == "light"
    layers = found["layers"]
    assert {layer["op"] for layer in layers} == {"Conv", "Gemm", "MatMul"}
    assert all((layer["weights"]["bits"], layer["activations"]["bits"]) == (4, 8) for layer in layers)


def job(shared, first_last, activation_bits=4):
    return shared.Job(Path("m"), Path("f"), Path("o"), 4, activation_bits, first_last, {})


@pytest.fixture
def net():
    """Four layers; the second also gives to a sum, the last reads a product of two tensors."""
    text = """g (float[1,3,4,4] x, float[5,3,1,1] w0, float[5,5,1,1] w1, float[5,5,1,1] w2, float[5,5,1,1] w3)
        => (float[1,5,4,4] y) {
        a = Conv (x, w0)
        r = Relu (a)
        b = Conv (r, w1)
        s = Add (b, r)
        c = Conv (s, w2)
        d = MatMul (c, c)
        e = Conv (d, w3)
        y = Add (e, e)
    }"""
    return proto(text, w0=weights(5, 3, 1, 1), **{f"w{i}": weights(5, 5, 1, 1) for i in (1, 2, 3)})


def test_who_gets_few_bits(load, net):
    shared = load("shared")
    assert shared.policy(net, job(shared, 8)) == shared.Policy(("w1", "w2"), ("w0", "w3"), ("r", "s"), ("d", "x"))
    everything = shared.policy(net, job(shared, None))
    assert everything == shared.Policy(("w0", "w1", "w2", "w3"), (), ("d", "r", "s", "x"), ())
    net.graph.node[6].input[0] = "r"
    assert shared.policy(net, job(shared, 8)).few_inputs == ("s",)  # one grid for both readers of r


def test_the_types_that_onnxruntime_is_told(load, net):
    shared, ours = load("shared"), load("with_onnxruntime")
    types = {name: entry[0]["quant_type"].name for name, entry in ours.overrides(net, job(shared, 8)).items()}
    assert types == {"w1": "QInt4", "w2": "QInt4", "r": "QUInt4", "s": "QUInt4"}
    assert set(ours.overrides(net, job(shared, 8, 8))) == {"w1", "w2"}
    eight = shared.Job(Path("m"), Path("f"), Path("o"), 8, 8, None, {})
    assert ours.overrides(net, eight) == {}
    gemm = onnx.helper.make_node("Gemm", ["x", "w"], ["y"], transB=1)
    model = onnx.helper.make_model(onnx.helper.make_graph([gemm], "g", [], []))
    assert ours.axis(model, "w") == 0
    del model.graph.node[0].attribute[:]
    assert ours.axis(model, "w") == 1
    model.graph.node[0].op_type = "MatMul"
    assert ours.axis(model, "w") == -1


def test_tables_do_not_mix_policies(load):
    rows = [row("float", bits="float"), row("aimet"), row("onnxq-light"), row("aimet", first_last="same")]
    rows.append(row("aimet", bits="W8A8"))
    text = load("standings").markdown(rows)
    titles = [line for line in text.splitlines() if line.startswith("#")]
    assert titles == [
        "### W8A8",
        "### W4A4, first and last layer at 8 bits",
        "### W4A4, first and last layer as the others",
    ]
    cells = text.split("### W4A4, first and last layer at")[1].splitlines()[7]
    assert cells == "| net | onnxq-light | 80.00 | 90.0 | 12.3 | 2 | 1.00 | 3/1 | - | - | 7 | 7 | 100 |"


def test_a_failure_is_a_row_with_its_message(load):
    failed = {"model": "net", "bits": "W8A8", "first_last": "8", "quantizer": "quark", "samples": 8, "limit": 9}
    text = load("standings").markdown([failed | {"status": "failed", "message": "no such file"}])
    assert "| net | quark (failed) | - |" in text
    assert "- net, quark: no such file" in text


def test_a_lead_is_more_than_the_noise(load):
    leads = load("standings").leads
    ours = row("onnxq-light", 0.800, 0.90, ratio=0.50)
    noise = 1.96 * (0.2 / 10000) ** 0.5  # 0.0088

    def told(**rival):
        return [what for _, what in leads([row("onnxq-balanced", 0.79, 0.89, ratio=0.52), ours, row("nncf", **rival)])]

    assert told(value=0.8 + 0.98 * noise, agreement=0.9, ratio=0.47) == []
    assert told(value=0.8 + 1.02 * noise, agreement=0.9) == ["nncf: metric +0.89 +- 0.88 points"]
    assert told(value=0.5, agreement=0.91) == ["nncf: agreement +1.00 +- 0.85 points"]
    assert told(value=0.5, agreement=0.9, ratio=0.45) == ["nncf: latency 0.45 against 0.50"]
    assert leads([row("nncf", 0.9)]) == []


def test_the_interval_of_a_median(load):
    interval = load("latency").interval
    assert interval([float(i) for i in range(100)]) == (40.0, 59.0)  # ranks 41 and 60 of 100: 95 %
    assert interval([3.0, 1.0, 2.0]) == (1.0, 3.0)


def test_what_pip_said(load):
    environments, process = load("rival_environments"), load("process")
    cost = process.Cost(1, 1, 1)
    said = process.Finished(1, "", "WARNING: a\nERROR: b\nERROR: c\nhint\n", cost)
    assert environments.complaint(said) == "ERROR: c"
    assert environments.complaint(process.Finished(-9, "", "late", cost)) == "late (exit -9)"
