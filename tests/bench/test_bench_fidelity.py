import math

import numpy as np
import pytest

from onnxq.bench import compare, gap_in_steps, top1
from onnxq.errors import DataError
from onnxq.runtime import Session


@pytest.fixture
def scores(write):
    """Sessions that give `x + shift` as [N, 4] scores, their sum over classes, and their arg-max."""

    def build(shift, name):
        return Session(
            write(
                """g (float[N, 4] x) => (float[N, 1] total, float[N, 4] scores, int64[N] best) {
                    scores = Add(x, shift)
                    total = ReduceSum <keepdims = 1> (scores, axes)
                    best = ArgMax <axis = 1, keepdims = 0> (scores)
                }""",
                {"shift": np.asarray(shift, np.float32), "axes": np.array([1])},
                name,
            )
        )

    return build


def batches(count=5, rows=8):
    rng = np.random.default_rng(0)
    return [{"x": rng.normal(size=(rows, 4)).astype(np.float32)} for _ in range(count)]


def test_noise_of_known_power_is_streamed_over_batches(scores):
    noisy = scores([0.1, -0.1, 0.1, -0.1], "noisy")
    found = compare(scores(np.zeros(4), "clean"), noisy, iter(batches()))
    energy = sum(float((batch["x"].astype(np.float64) ** 2).sum()) for batch in batches())
    assert found.rows == 40
    assert found.sqnr_db["scores"] == pytest.approx(10 * math.log10(energy / (160 * 0.01)), abs=1e-3)
    assert found.sqnr_db["total"] > 100  # the shifts cancel, up to rounding
    assert set(found.sqnr_db) == {"scores", "total"}


def test_agreement_is_counted_on_the_first_output_that_looks_like_scores(scores):
    shift = np.array([0.5, 0.0, 0.0, 0.0])
    found = compare(scores(np.zeros(4), "clean"), scores(shift, "shifted"), batches())
    rows = np.concatenate([batch["x"] for batch in batches()])
    same = int((rows.argmax(axis=1) == (rows + shift).argmax(axis=1)).sum())
    assert 0 < same < 40
    assert found.agreement.value == same / 40
    assert found.agreement.low < same / 40 < found.agreement.high
    expected = rows.argmax(axis=1) == (rows + shift).argmax(axis=1)
    assert found.agreed.right == "".join("01"[int(one)] for one in expected)


def test_rows_are_known_by_their_content_however_they_are_cut(scores):
    one, other = scores(np.zeros(4), "one"), scores(np.array([0.5, 0.0, 0.0, 0.0]), "other")
    whole = [{"x": np.concatenate([batch["x"] for batch in batches()])}]
    changed = [{"x": whole[0]["x"] + np.eye(40, 4, dtype=np.float32)}]
    digest = compare(one, other, batches()).agreed.rows
    assert digest == compare(other, one, whole).agreed.rows
    assert digest != compare(one, other, changed).agreed.rows
    labels = np.arange(40) % 4
    scored = top1(one, [(whole[0], labels)])
    cut = [(batch, labels[8 * index : 8 * index + 8]) for index, batch in enumerate(batches())]
    assert scored.per_row.rows == top1(other, cut).per_row.rows
    assert scored.per_row.right == "".join("01"[int(one)] for one in scored.correct)
    assert scored.per_row.rows != top1(one, [(changed[0], labels)]).per_row.rows
    assert scored.per_row.rows != top1(one, [(whole[0], labels[::-1])]).per_row.rows


def test_equal_models_have_infinite_sqnr(scores):
    found = compare(scores(np.ones(4), "a"), scores(np.ones(4), "b"), batches())
    assert found.sqnr_db == {"total": math.inf, "scores": math.inf}
    assert found.agreement.value == 1.0


def test_no_logits_no_agreement(write):
    text = "g (float[N, 4] x) => (float[N, 1, 4] y) { y = Unsqueeze(x, axes) }"
    session = Session(write(text, {"axes": np.array([1])}))
    assert compare(session, session, batches()).agreement is None


def test_values_lost_to_infinity_are_no_signal(write):
    clean = Session(write("g (float[N, 4] x) => (float[N, 4] y) { y = Identity(x) }", name="clean"))
    lost = Session(write("g (float[N, 4] x) => (float[N, 4] y) { y = Log(x) }", name="lost"))
    assert compare(clean, lost, batches()).sqnr_db == {"y": -math.inf}
    # Where the reference itself is not finite, nothing can be compared; the other values still count.
    feeds = [{"x": np.array([[1.0, 1.0, 0.0, -1.0]], np.float32)}]
    assert compare(lost, lost, feeds).sqnr_db == {"y": math.inf}


def test_what_cannot_be_compared_is_a_data_error(write, scores):
    clean = scores(np.zeros(4), "clean")
    with pytest.raises(DataError, match="no rows"):
        compare(clean, clean, [])
    other = Session(write("g (float[N, 4] x) => (float[N, 4] z) { z = Relu(x) }", name="other"))
    with pytest.raises(DataError, match="no float output in common"):
        compare(clean, other, batches())
    text = "g (float[N, 4] x) => (float[N, M] scores) { scores = Concat <axis = 1> (x, x) }"
    with pytest.raises(DataError, match=r"shape \[8, 4\] in one model and \[8, 8\] in the other"):
        compare(clean, Session(write(text, name="wide")), batches())


def test_outputs_of_as_many_rows_as_were_found_are_left_out(write):
    text = """g (float[N, 4] x) => (float[N, 4] z, float[K] y) {{
        z = Relu(x) t = Constant<value = float[1] {{{}}}>() b = Greater(x, t) i = NonZero(b) j = Transpose(i)
        y = GatherND(x, j) }}"""
    one, other = (Session(write(text.format(bound), name=f"found{bound}")) for bound in (0.1, 0.3))
    found = compare(one, other, batches())
    assert found.uneven == ("y",)
    assert found.sqnr_db == {"z": math.inf}
    assert found.agreement.value == 1.0
    assert compare(one, one, batches()).uneven == ()


def test_top1_on_labelled_batches(scores):
    session = scores(np.zeros(4), "clean")
    eye = np.eye(4, dtype=np.float32)
    found = top1(session, [({"x": eye}, np.array([0, 1, 2, 0])), ({"x": eye[:2]}, np.array([[1], [1]]))])
    assert found.correct.tolist() == [True, True, True, False, False, True]
    assert found.accuracy.value == 4 / 6
    assert (found.accuracy.low, found.accuracy.high) == pytest.approx((0.3000, 0.9032), abs=5e-5)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.array([0, 1]), "2 labels for 4 rows"),
        (np.array([1, 2, 3, 4]), "labels run from 1 to 4, but the model has classes 0 to 3"),
        (np.array([0.0, 1.0, 2.0, 3.0]), "class indices, not float64"),
    ],
)
def test_labels_that_do_not_fit_are_a_data_error(scores, labels, message):
    with pytest.raises(DataError, match=message):
        top1(scores(np.zeros(4), "clean"), [({"x": np.eye(4, dtype=np.float32)}, labels)])


def test_accuracy_needs_scores_and_rows(write, scores):
    flat = Session(write("g (float[N] x) => (float[N] y) { y = Relu(x) }"))
    with pytest.raises(DataError, match="no output of the model is"):
        top1(flat, [({"x": np.ones(3, np.float32)}, np.zeros(3, int))])
    with pytest.raises(DataError, match="no labelled rows"):
        top1(scores(np.zeros(4), "clean"), [])


def test_gap_is_in_steps_of_each_outputs_own_range():
    a = {"wide": np.array([0.0, 255.0]), "narrow": np.array([-1.0, 1.55]), "ids": np.array([1, 2])}
    b = {"wide": np.array([0.5, 254.0]), "narrow": np.array([-1.0, 1.53]), "ids": np.array([1, 9])}
    assert gap_in_steps(a, b) == pytest.approx(0.02 / 0.01)
    assert gap_in_steps(a, {**b, "narrow": a["narrow"]}) == pytest.approx(1.0)
    assert gap_in_steps(a, a) == 0.0


def test_gap_of_constant_and_of_infinite_outputs():
    flat, inf = np.array([2.0, 2.0]), np.array([0.0, 1.0, np.inf])
    assert gap_in_steps({"y": flat}, {"y": flat.copy()}) == 0.0
    assert gap_in_steps({"y": flat}, {"y": np.array([2.0, 2.1])}) == math.inf
    assert gap_in_steps({"y": inf}, {"y": np.array([0.0, 0.5, np.inf])}) == pytest.approx(127.5)
    assert gap_in_steps({"y": inf}, {"y": np.array([0.0, 1.0, 9.0])}) == math.inf
