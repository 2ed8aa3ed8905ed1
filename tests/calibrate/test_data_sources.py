"""Finding data: paths, code, things in memory; and what is said where there is nothing."""

import sys

import numpy as np
import pytest

from onnxq.calibrate.data import open_data
from onnxq.errors import DataError
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
    name = module("import numpy as np\ndef make():\n    yield {'x': np.zeros((2, 3))}\n    raise KeyError('too far')\n")
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
        ("return [(1, 2)]", "item 0 is of type tuple: give an array, or a dict of arrays by input name"),
        ("return [{'x': 'text'}]", "item 0, 'x' is of type str"),
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


def test_a_callable_may_refuse_in_our_words(module):
    name = module(
        "from onnxq.errors import DataError\ndef make():\n    raise DataError('rows.db is locked: close it')\n"
    )
    assert refusal(f"{name}:make") == "rows.db is locked: close it"


def test_lists_of_numbers_will_do(module):
    name = module("def make():\n    return [{'x': [[1, 2, 3]]}]\n")
    assert [b["x"].tolist() for b in open_data(f"{name}:make", X)] == [[[1, 2, 3]]]


def test_an_iterator_that_runs_dry_is_noticed(module):
    name = module("import numpy as np\nrows = iter([np.zeros((1, 3))])\ndef make():\n    return rows\n")
    data = open_data(f"{name}:make", X)
    assert len(list(data)) == 1
    with pytest.raises(DataError, match=r"gave no rows: .* again every time it is read"):
        list(data)


def test_a_module_or_name_that_is_not_there(module):
    name = module("def make_rows():\n    return []\nnumber = 1\n")
    assert refusal(f"{name}:make_row") == (
        "calibration_code:make_row: calibration_code has no 'make_row': did you mean 'make_rows'?"
    )
    assert "name a function of that module" in refusal(f"{name}:zzz")
    assert "is of type int: name a function that takes no arguments" in refusal(f"{name}:number")
    assert refusal("no_such_module:make") == (
        "no_such_module:make: there is no module 'no_such_module': run from the folder of the module, or install it"
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
    assert "item 0 is of type ndarray: give a dict" in refusal([rows(2)], TWO)


def test_what_can_be_read_once_only_is_refused():
    message = refusal(item for item in [{"x": rows(2)}])
    assert message.startswith("a generator can be read once only")
    assert refusal(3).startswith("something of type int is no data: give a folder of images")


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
