"""`onnxq sweep` as users call it."""

import json
from pathlib import Path

import onnxruntime
import pytest

from onnxq.cli.main import _run as run
from onnxq.errors import DataError, UsageError
from onnxq.pipeline import staging

ROOT = Path(__file__).parent.parent
CNN = ROOT / "models" / "digits_cnn.onnx"
DATA = ["--data", str(ROOT / "calibration_data" / "digits"), "--mean", "0.5", "--std", "0.5"]
QUICK = ["--workers", "1", "-q"]


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A model, a file that is none, two recipes: (folder, exit code, JSON)."""
    folder = tmp_path_factory.mktemp("swept")
    (folder / "bad.onnx").write_text("junk")
    (folder / "w4.toml").write_text('preset = "fast"\nweight_bits = 4\nsamples = 16\n')
    (folder / "few.toml").write_text('preset = "fast"\nsamples = 16\n')
    return folder


def command(folder, *options):
    recipes = ["--recipes", str(folder / "few.toml"), str(folder / "w4.toml")]
    return ["sweep", str(CNN), str(folder / "bad.onnx"), *recipes, *DATA, *QUICK, "-o", str(folder / "out"), *options]


def test_every_job_has_its_files_and_a_failed_one_is_no_end(swept, capsys):
    assert run(command(swept, "--json", "--report", str(swept / "r.html"))) == 3
    found = capsys.readouterr()
    assert found.err.count("\n") == 1
    assert "2 of 4 jobs failed; the first:" in found.err
    assert "bad.onnx is not an ONNX file" in found.err
    document = json.loads(found.out)
    assert document["kind"] == "sweep"
    assert [(Path(job["model"]).name, job["recipe"], job["exit_code"]) for job in document["jobs"]] == [
        ("digits_cnn.onnx", "few", 0), ("digits_cnn.onnx", "w4", 0), ("bad.onnx", "few", 3), ("bad.onnx", "w4", 3),
    ]  # fmt: skip
    sizes = []
    for job in document["jobs"][:2]:
        path = swept / "out" / f"digits_cnn.{job['recipe']}.onnx"
        assert job["run"]["output"] == str(path)
        assert job["run"]["verdict"]["quantized_bytes"] == path.stat().st_size
        assert job["run"]["verdict"]["latency_ratio"]["value"] > 0
        assert json.loads(path.with_suffix(".json").read_text()) == job["run"]
        onnxruntime.InferenceSession(path)
        sizes.append(path.stat().st_size)
    assert sizes[1] < 0.6 * sizes[0]
    assert "digits_cnn.w4.onnx" in (swept / "r.html").read_text()


def test_the_same_again_takes_what_is_there_and_what_changed_is_done_again(swept, capsys):
    out = swept / "out"
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.onnx")}
    assert len(before) == 2
    assert run(command(swept, "--no-timing", "--json")) == 3
    assert [job["known"] for job in json.loads(capsys.readouterr().out)["jobs"]] == [True, True, False, False]
    assert {path.name: path.stat().st_mtime_ns for path in out.glob("*.onnx")} == before
    (swept / "w4.toml").write_text('preset = "fast"\nweight_bits = 3\nsamples = 16\n')
    (out / "digits_cnn.few.onnx").write_bytes(b"not what was written")
    assert run(command(swept, "--no-timing", "--json")) == 3
    document = json.loads(capsys.readouterr().out)
    assert [job["known"] for job in document["jobs"]] == [False] * 4
    assert document["jobs"][1]["run"]["recipe"]["weight_bits"] == 3
    assert (out / "digits_cnn.few.onnx").stat().st_size > 100_000


def test_the_table_names_every_job(swept, capsys):
    assert run(command(swept, "--no-timing")) == 3
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[1:3]] == [["digits_cnn.onnx", "few"], ["w4", lines[2].split()[1]]]
    assert sum("failed" in line for line in lines) == 4
    assert f"{(swept / 'out' / 'digits_cnn.few.onnx').stat().st_size / 1000:.1f} KB" in lines[1]


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ([str(CNN), "--recipes", "fast", "quick"], 2, "no preset 'quick'"),
        ([str(CNN), "--recipes", "fastest", "w4a8"], 2, "recipe fastest decides by the clock"),
        ([str(CNN), "--recipes", "fast", "fast"], 2, "two recipes are called 'fast'"),
        ([str(CNN), str(CNN), "--recipes", "fast"], 2, "two models are called 'digits_cnn'"),
        ([str(CNN), "--recipes", "fast", "--report", "r.html"], 2, "--report compares two jobs or more"),
        (["none.onnx", "--recipes", "fast"], 3, "none.onnx"),
        ([str(CNN), "--recipes", "fast", "--backend", "dask://127.0.0.1:1"], 6, "onnxq: error: dask://127.0.0.1:1 "),
        ([str(CNN), "--recipes"], 2, "--recipes"),
    ],
)
def test_what_makes_no_sense_is_refused(options, code, message, tmp_path, capsys):
    assert run(["sweep", *options, *DATA, *QUICK, "-o", str(tmp_path / "out")]) == code
    complaint = capsys.readouterr().err
    assert message in complaint
    assert complaint.count("\n") == 1


def test_rows_of_each_model_are_found_by_its_name(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b.npz").touch()
    found = staging.rows_of(str(tmp_path), ["a", "b"], "--data")
    assert found == {"a": str(tmp_path / "a"), "b": str(tmp_path / "b.npz")}
    with pytest.raises(DataError, match=r"--data .* has rows for a, b but none for c"):
        staging.rows_of(str(tmp_path), ["a", "b", "c"], "--data")
    assert staging.rows_of(str(tmp_path), ["c"], "--data") == {"c": str(tmp_path)}
    assert staging.rows_of("module:rows", ["a"], "--data") == {"a": "module:rows"}


def test_what_travels_arrives_under_its_own_name(tmp_path):
    source, stage, there = (tmp_path / name for name in ("rows", "stage", "there"))
    (source / "inner").mkdir(parents=True)
    (source / "inner" / "1.txt").write_text("one")
    (tmp_path / "m.onnx").write_text("model")
    (tmp_path / "m.data").write_text("weights")
    stage.mkdir()
    model = staging.place_of(str(tmp_path / "m.onnx"), [tmp_path / "m.data"], stage)
    rows = staging.place_of(str(source), (), stage)
    for name in (*model.files, *rows.files):
        (there / name).parent.mkdir(parents=True, exist_ok=True)
        (there / name).write_bytes((stage / name).read_bytes())
    assert Path(model.found(there)).read_text() == "model"
    assert Path(model.found(there)).with_name("m.data").read_text() == "weights"
    assert Path(rows.found(there)).name == "rows"
    assert (Path(rows.found(there)) / "inner" / "1.txt").read_text() == "one"
    with pytest.raises(UsageError, match="rows have to be files"):
        staging.place_of("module:rows", (), stage)
    here = staging.place_of(str(source), (), None)
    assert (here.found(there), here.files) == (str(source), ())


def test_contents_decide_not_dates(tmp_path):
    (tmp_path / "a").write_text("x")
    first = staging.content_of([tmp_path])
    (tmp_path / "a").write_text("x")
    assert staging.content_of([tmp_path]) == first
    (tmp_path / "a").rename(tmp_path / "b")
    assert staging.content_of([tmp_path]) != first
    (tmp_path / "b").rename(tmp_path / "a")
    (tmp_path / "a").write_text("y")
    assert staging.content_of([tmp_path]) != first
