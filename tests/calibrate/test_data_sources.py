"""Finding data: paths, code, things in memory; and what is said where there is nothing."""

import sys

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from onnxq.calibrate.data import open_data
from onnxq.calibrate.data.files import natural
from onnxq.errors import DataError, EnvironmentFault
from onnxq.types import InputSpec

X = (InputSpec("x", "float32", ("N", 3)),)
TWO = (InputSpec("a", "float32", ("N", 3)), InputSpec("b", "float32", ("N", 2)))


def rows(count, width=3):
    return np.arange(count * width, dtype=np.float32).reshape(count, width)


def refusal(source, inputs=X, error=DataError):
    with pytest.raises(error) as caught:
        list(open_data(source, inputs))
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Write a module into the current folder; return its name."""
    monkeypatch.chdir(tmp_path)
    written = []

    def write(text, name="calibration_code"):
        (tmp_path / f"{name}.py").write_text(text)
        written.append(name)
        return name

    yield write
    for name in written:
        sys.modules.pop(name, None)


def test_a_callable_is_called_anew_for_every_pass(module):
    name = module(
        "import numpy as np\ncalls = []\n"
        "def make():\n"
        "    calls.append(1)\n"
        "    for i in range(3):\n"
        "        yield {'x': np.full((2, 3), i, np.float32)}\n"
    )
    path = list(sys.path)
    data = open_data(f"{name}:make", X)
    calls = sys.modules[name].calls
    assert calls == []
    for _ in range(2):
        assert [b["x"][0, 0] for b in data] == [0, 1, 2]
    assert len(calls) == 2
    assert data.provenance["kind"] == "callable"
    assert data.provenance["name"] == "calibration_code:make"
    assert sys.path == path


def test_a_callable_may_import_from_the_current_folder_while_it_runs(module):
    module("VALUE = 7.0", "calibration_constants")
    name = module(
        "import numpy as np\n"
        "class Source:\n"
        "    @staticmethod\n"
        "    def make():\n"
        "        from calibration_constants import VALUE\n"
        "        yield np.full((1, 3), VALUE)\n"
    )
    (batch,) = open_data(f"{name}:Source.make", X)
    assert batch["x"].tolist() == [[7, 7, 7]]


def test_only_the_rows_asked_for_are_made(module):
    name = module(
        "import numpy as np\ndef make():\n    yield {'x': np.zeros((2, 3))}\n    raise KeyError('too far')\n"
    )
    assert len(list(open_data(f"{name}:make", X, samples=2))) == 1
    assert refusal(f"{name}:make") == (
        "calibration_code:make failed (KeyError: 'too far'): it must return an iterable of dicts of arrays"
    )


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("return 3", "failed (TypeError: 'int' object is not iterable)"),
        ("raise ValueError('two\\nlines')", "failed (ValueError: two lines)"),
        ("raise SystemExit(1)", "failed (SystemExit: 1)"),
        ("return [(1, 2)]", "item 0 is a tuple: give an array, or a dict of arrays by input name"),
        ("return [{'x': 'text'}]", "item 0, 'x' is a str"),
        ("return [{'x': [[1, 2, 3], [4]]}]", "item 0, 'x' cannot be made an array"),
        ("return [{'z': [[1, 2, 3]], 'w': 1}]", "(found z, w): give {'x': float32[?, 3]}"),
        ("return []", "gave no rows"),
    ],
)
def test_a_callable_that_fails(module, body, said):
    name = module(f"def make():\n    {body}\n")
    message = refusal(f"{name}:make")
    assert message.startswith("calibration_code:make")
    assert said in message


def test_lists_of_numbers_will_do(module):
    name = module("def make():\n    return [{'x': [[1, 2, 3]]}]\n")
    assert [b["x"].tolist() for b in open_data(f"{name}:make", X)] == [[[1, 2, 3]]]


def test_an_iterator_that_runs_dry_is_noticed(module):
    name = module("import numpy as np\nrows = iter([np.zeros((1, 3))])\ndef make():\n    return rows\n")
    data = open_data(f"{name}:make", X)
    assert len(list(data)) == 1
    with pytest.raises(DataError, match="gave no rows: .* again every time it is read"):
        list(data)


def test_a_module_or_name_that_is_not_there(module):
    name = module("def make_rows():\n    return []\nnumber = 1\n")
    assert refusal(f"{name}:make_row") == (
        "calibration_code:make_row: calibration_code has no 'make_row': did you mean 'make_rows'?"
    )
    assert "name a function of that module" in refusal(f"{name}:zzz")
    assert "is a int: name a function that takes no arguments" in refusal(f"{name}:number")
    assert refusal("no_such_module:make") == (
        "no_such_module:make: there is no module no_such_module: run from the folder of the module, or install it"
    )
    assert "write calibration_code:make_rows" in refusal(f"{name}.py:make_rows")


def test_a_module_that_cannot_be_imported(module):
    name = module("import no_such_package\n")
    assert "it needs no_such_package, which is not installed" in refusal(f"{name}:make")
    name = module("def make(:\n", "calibration_broken")
    assert "importing calibration_broken failed (SyntaxError" in refusal(f"{name}:make")
    name = module("raise SystemExit('bye')\n", "calibration_exit")
    assert "failed (SystemExit: bye)" in refusal(f"{name}:make")


def test_a_file_with_a_colon_in_its_name_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a:b").mkdir()
    np.save(tmp_path / "a:b" / "0.npy", rows(2))
    assert [len(b["x"]) for b in open_data("a:b", X)] == [2]


def test_arrays_in_memory():
    assert [b["x"].tolist() for b in open_data(rows(2), X)] == [rows(2).tolist()]
    (batch,) = open_data({"a": rows(2), "b": rows(2, 2), "c": rows(1)}, TWO)
    assert sorted(batch) == ["a", "b"]
    assert refusal(rows(2), TWO) == (
        "one array was given, but the model has the inputs a, b: give a dict of arrays by name"
    )
    assert refusal({"a": rows(2)}, TWO) == (
        "the arrays: no array for input 'b' (found a): give {'a': float32[?, 3], 'b': float32[?, 2]}"
    )


def test_lists_of_feeds_and_functions():
    feeds = [{"x": rows(2)}, {"x": rows(70)}, {"x": rows(1)[0]}, {"x": rows(1)[0]}]
    assert [len(b["x"]) for b in open_data(feeds, X)] == [2, 64, 6, 2]
    assert [len(b["x"]) for b in open_data(lambda: iter(feeds), X, samples=3)] == [2, 1]
    assert open_data(feeds, X).provenance["kind"] == "iterable"
    with pytest.raises(DataError, match="the list, item 1: no array for input 'b'"):
        list(open_data([{"a": rows(1), "b": rows(1, 2)}, {"a": rows(1)}], TWO))
    assert "item 0 is a ndarray: give a dict" in refusal([rows(2)], TWO)


def test_what_can_be_read_once_only_is_refused():
    message = refusal(item for item in [{"x": rows(2)}])
    assert message.startswith("a generator can be read once only")
    assert refusal(3).startswith("a int is no data: give a folder of images")


def test_a_dataset_of_ours_is_kept_and_anothers_is_checked():
    ours = open_data(rows(700), X, samples=600)
    assert open_data(ours, X) is ours

    class Theirs:
        provenance = {"made by": "hand"}  # noqa: RUF012 - a test's stand-in

        def __iter__(self):
            return iter([{"x": rows(600)}])

    data = open_data(Theirs(), X, samples=100)
    assert [len(b["x"]) for b in data] == [64, 36]
    assert data.provenance["source"] == {"made by": "hand"}
    assert data.provenance["kind"] == "dataset"


def test_a_path_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "calibration").mkdir()
    assert refusal("calibraton") == "calibraton: no such file or folder: did you mean calibration?"
    assert refusal("zzz") == (
        "zzz: no such file or folder: give a folder of images, .npz or .npy files, one such file, or module:callable"
    )
    assert "(there is no folder nowhere)" in refusal("nowhere/x.npz")
    assert "the name of the data is empty" in refusal("")


def test_a_folder_without_data(tmp_path):
    name = tmp_path.name
    assert f"{name}: no data in this folder (it is empty)" in refusal(tmp_path)
    for file in ("a.gif", "b.GIF", "c.txt", "README"):
        (tmp_path / file).write_text("")
    assert refusal(tmp_path) == (
        f"{name}: no data in this folder (found only 2 .gif, 1 .txt, 1 without extension): "
        "put .jpg .jpeg .png .bmp .webp .npz .npy files there"
    )


def test_a_file_of_another_kind(tmp_path):
    (tmp_path / "a.csv").write_text("")
    assert refusal(tmp_path / "a.csv").startswith("a.csv is not data that can be read here: give a folder")


def test_two_kinds_in_one_folder(tmp_path):
    (tmp_path / "a.png").write_text("")
    np.save(tmp_path / "b.npy", rows(1))
    assert refusal(tmp_path) == (
        f"{tmp_path.name} holds 1 images and 1 array files: keep one kind in the folder"
    )


def test_linked_folders_are_followed_and_loops_end(tmp_path):
    outside = tmp_path / "outside"
    inside = tmp_path / "inside"
    for folder in (outside, inside):
        folder.mkdir()
    np.save(outside / "0.npy", rows(1))
    (inside / "link").symlink_to(outside)
    (inside / "loop").symlink_to(inside)
    assert [len(b["x"]) for b in open_data(inside, X)] == [1]


def test_a_folder_that_cannot_be_listed(tmp_path, monkeypatch):
    def denied(_path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("os.scandir", denied)
    message = refusal(tmp_path, error=EnvironmentFault)
    assert message == f"{tmp_path.name}: cannot be listed (Permission denied): check its permissions"


def test_the_current_folder_has_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("0.npy", rows(1))
    assert open_data(".", X).provenance["name"] == tmp_path.name


def test_natural_order():
    names = ["10", "9", "a10b2", "a10b10", "a9", "a", "A1", "09"]
    assert sorted(names, key=lambda name: natural([name])) == [
        "09",
        "9",
        "10",
        "A1",
        "a",
        "a9",
        "a10b2",
        "a10b10",
    ]


@given(
    counts=st.lists(st.integers(1, 90), min_size=1, max_size=6),
    batch=st.none() | st.integers(1, 100),
    samples=st.integers(1, 300),
)
def test_the_batches_of_a_dynamic_model_are_the_rows(counts, batch, samples):
    feeds = [{"x": rows(count) + 1000 * i} for i, count in enumerate(counts)]
    got = [b["x"] for b in open_data(feeds, X, batch=batch, samples=samples)]
    assert np.array_equal(np.concatenate(got), np.concatenate([f["x"] for f in feeds])[:samples])
    assert max(map(len, got)) <= min(batch or 64, 64)


@given(counts=st.lists(st.integers(1, 90), min_size=1, max_size=6), size=st.integers(1, 100))
def test_the_batches_of_a_fixed_model_are_its_full_batches(counts, size):
    feeds = [{"x": rows(count) + 1000 * i} for i, count in enumerate(counts)]
    got = [b["x"] for b in open_data(feeds, (InputSpec("x", "float32", (size, 3)),), batch=7)]
    everything = np.concatenate([f["x"] for f in feeds])
    full = len(everything) // size * size
    assert {len(b) for b in got} == {size}
    if full:
        assert np.array_equal(np.concatenate(got), everything[:full])
    else:
        assert np.array_equal(got[0][: len(everything)], everything)
        assert (got[0][len(everything) :] == everything[-1]).all()


@given(lengths=st.lists(st.integers(1, 3), min_size=1, max_size=20), batch=st.integers(1, 6))
@settings(suppress_health_check=[HealthCheck.too_slow])
def test_stacked_samples_keep_order_and_length(lengths, batch):
    inputs = (InputSpec("x", "float32", ("N", "S")),)
    feeds = [{"x": np.full(length, i, np.float32)} for i, length in enumerate(lengths)]
    got = [b["x"] for b in open_data(feeds, inputs, batch=batch)]
    assert [row.tolist() for b in got for row in b] == [f["x"].tolist() for f in feeds]
    assert max(map(len, got)) <= batch
