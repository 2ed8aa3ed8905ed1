import numpy as np
import pytest
from helpers import assert_same_outputs, model, ops, run, weights

from onnxq import graph

X = weights(2, 4)
BODY = """y = If(c) <then_branch = t () => (float[2,4] a) { a = Add(h, h) },
                     else_branch = e () => (float[2,4] b) { b = Neg(h) }>"""


def captured(first):
    """x -> `first` -> h, which only the branches of an If read."""
    return model(f"g (float[2,4] x, bool c) => (float[2,4] y) {{ p = Neg(x) [first] {first} {BODY} }}")


def feeds(flag=True):
    return {"x": X, "c": np.asarray(flag)}


def node(m, name):
    return graph.node_names(m)[name]


def test_unique_names_avoid_values_nodes_and_each_other():
    m = model("g (float[4] x, float[4] w) => (float[4] y) { [n] h = Add(x, w) y = Relu(h) }", w=weights(4))
    assert graph.unique_name(m, "fresh") == "fresh"
    assert [graph.unique_name(m, "fresh") for _ in range(2)] == ["fresh_1", "fresh_2"]
    for taken in ("x", "w", "h", "y", "n"):
        assert graph.unique_name(m, taken) == f"{taken}_1"


def test_unique_names_avoid_those_inside_branches():
    m = captured("h = Relu(p)")
    assert graph.unique_name(m, "a") == "a_1"


def test_a_copy_has_names_of_its_own():
    m = model("g (float[4] x) => (float[4] y) { y = Relu(x) }")
    graph.unique_name(m, "a")
    copy = m.clone()
    graph.add_constant(copy, "b", weights(2))
    assert graph.unique_name(m, "b") == "b"


def test_an_added_constant_keeps_shape_and_type():
    m = model("g (float[4] x) => (float[4] y) { y = Relu(x) }")
    for array in (np.asarray(3, np.int8), weights(2, 3).T, np.zeros((0, 2), np.float32)):
        value = graph.add_constant(m, "c", array)
        np.testing.assert_array_equal(graph.constant(value), array)
        assert graph.constant(value).shape == array.shape
        assert graph.dtype_name(value) == array.dtype.name
    assert list(m.graph.initializers) == ["c", "c_1", "c_2"]


@pytest.mark.parametrize("place", ["before", "after", "end"])
def test_a_node_is_added_where_it_is_wanted(place):
    m = model("g (float[4] x) => (float[4] y) { [a] h = Relu(x) [b] y = Neg(h) }")
    value = graph.value_map(m)["h" if place != "before" else "x"]
    where = {"before": {"before": node(m, "a")}, "after": {"after": node(m, "a")}, "end": {}}[place]
    graph.add_node(m, "Abs", [value], "new", **where)
    assert (
        ops(m)
        == {"before": ["Abs", "Relu", "Neg"], "after": ["Relu", "Abs", "Neg"], "end": ["Relu", "Neg", "Abs"]}[place]
    )


def test_attributes_of_an_added_node():
    m = model("g (float[4,3] x) => (float[4,3] y) { [a] y = Relu(x) }")
    made = graph.add_node(
        m, "Test", [None], "t", attributes={"i": 1, "f": 0.5, "s": "word", "is": [1, 2], "fs": [0.5]}, domain="our"
    ).producer()
    assert [graph.attribute(made, key, None) for key in ("i", "f", "s", "is", "fs")] == [1, 0.5, "word", [1, 2], [0.5]]
    assert made.domain == "our"
    assert graph.attribute(made, "none", 7) == 7


def test_redirect_reaches_into_branches():
    m = captured("h = Relu(p)")
    h, p = graph.value_map(m)["h"], graph.value_map(m)["p"]
    assert graph.redirect(h, p) == 3
    graph.remove_unused(m)
    assert ops(m) == ["Neg", "If"]
    np.testing.assert_array_equal(run(m, feeds())["y"], -2 * X)
    np.testing.assert_array_equal(run(m, feeds(False))["y"], X)


def test_redirect_spares_whom_it_is_told_to():
    m = model("g (float[4] x) => (float[4] y, float[4] z, float[4] h) { h = Neg(x) [a] y = Relu(h) [b] z = Abs(h) }")
    h = graph.value_map(m)["h"]
    new = graph.add_node(m, "Exp", [h], "e", after=h.producer())
    assert graph.redirect(h, new, lambda reader: reader.op_type != "Relu", skip=new.producer()) == 1
    assert node(m, "a").inputs[0] is h
    assert node(m, "b").inputs[0] is new
    assert h.is_graph_output()


def test_bypass_joins_neighbours():
    m = model("g (float[4] x) => (float[4] y) { h = Neg(x) [mid] i = Identity(h) y = Relu(i) }")
    assert graph.bypass(node(m, "mid"), m)
    assert ops(m) == ["Neg", "Relu"]


def test_bypass_keeps_the_name_of_a_graph_output():
    m = model("g (float[4] x) => (float[4] y) { h = Neg(x) [last] y = Identity(h) z = Relu(h) }")
    before = run(m, {"x": X[0]})
    assert graph.bypass(node(m, "last"), m)
    assert [value.name for value in m.graph.outputs] == ["y"]
    assert_same_outputs(before, run(m, {"x": X[0]}))


def test_bypass_reaches_into_branches():
    m = captured("h = Identity(p)")
    before = [run(m, feeds(flag)) for flag in (True, False)]
    assert graph.bypass(node(m, "first"), m)
    assert ops(m) == ["Neg", "If"]
    for flag, expected in zip((True, False), before, strict=True):
        assert_same_outputs(expected, run(m, feeds(flag)))


@pytest.mark.parametrize(
    "text",
    [
        "g (float[4] x) => (float[4] y) { [n] y = Identity(x) }",
        "g (float[4] x, float[4] w) => (float[4] y, float[4] z) { [n] y = Identity(w) z = Neg(x) }",
        "g (float[4] x) => (float[4] y, float[4] z) { z = Neg(x) [n] y = Identity(z) }",
    ],
    ids=["an input", "an initializer", "another output"],
)
def test_bypass_refuses_to_join_an_output_with(text):
    m = model(text, **({"w": weights(4)} if " w)" in text else {}))
    before = graph.to_bytes(m)
    assert not graph.bypass(node(m, "n"), m)
    assert graph.to_bytes(m) == before


def test_bypass_of_a_node_without_that_input_is_refused():
    m = model("g (float[4] x, float w) => (float[4] y) { h = Neg(x) [n] y = Clip(h, , w) }", w=np.float32(1))
    assert not graph.bypass(node(m, "n"), m, source=1)
    assert ops(m) == ["Neg", "Clip"]


def test_move_name_replaces_every_mention_of_an_output():
    m = model("g (float[4] x) => (float[4] y) { y = Neg(x) }")
    y = graph.value_map(m)["y"]
    m.graph.outputs.append(y)
    new = graph.add_node(m, "Relu", [y], "r")
    graph.move_name(y, new, m)
    assert [value.name for value in m.graph.outputs] == ["y", "y"]
    assert all(value is new for value in m.graph.outputs)
    assert y.name not in ("y", None)
    assert new.shape == y.shape


def test_unused_nodes_and_weights_are_removed():
    m = model(
        "g (float[4] x, float[4] w, float[4] v) => (float[4] y) { y = Add(x, w) h = Mul(x, v) i = Neg(h) }",
        w=weights(4),
        v=weights(4),
    )
    graph.remove_unused(m)
    assert ops(m) == ["Add"]
    assert list(m.graph.initializers) == ["w"]


def test_constant_nodes_become_initializers():
    m = model("g (float[4] x) => (float[4] y) { c = Constant<value_floats = [1.0, 2.0, 3.0, 4.0]>() y = Add(x, c) }")
    graph.lift_constants(m)
    assert ops(m) == ["Add"]
    np.testing.assert_array_equal(graph.constant(graph.value_map(m)["c"]), [1, 2, 3, 4])


def test_a_replaced_constant_leaves_other_readers_alone():
    m = model("g (float[4] x, float[4] w) => (float[4] y) { [a] h = Add(x, w) [b] y = Mul(h, w) }", w=weights(4))
    new = graph.replace_constant(m, node(m, "a"), 1, 2 * weights(4))
    assert new.name != "w"
    np.testing.assert_array_equal(graph.constant(node(m, "b").inputs[1]), weights(4))
    graph.replace_constant(m, node(m, "b"), 1, 3 * weights(4))
    assert node(m, "b").inputs[1].name == "w"  # nobody else reads the old one: the name is free
    np.testing.assert_allclose(run(m, {"x": X[0]})["y"], (X[0] + 2 * weights(4)) * 3 * weights(4), rtol=1e-6)


def test_an_absent_input_can_be_given_a_constant():
    m = model("g (float[1,1,4] x, float[2,1,1] w) => (float[1,2,4] y) { [c] y = Conv(x, w) }", w=weights(2, 1, 1))
    graph.replace_constant(m, node(m, "c"), 2, weights(2, seed=3), name="bias")
    assert node(m, "c").inputs[2].name == "bias"
    expected = weights(2, 1, 1)[:, 0] * X[0] + weights(2, seed=3)[:, None]
    np.testing.assert_allclose(run(m, {"x": X[:1, None]})["y"][0], expected, rtol=1e-5)


def test_shapes_of_inner_values_are_inferred_and_forgotten():
    m = model("g (float[2,4] x) => (float[4,2] y) { h = Relu(x) y = Transpose(h) }")
    graph.infer_shapes(m)
    h = graph.value_map(m)["h"]
    assert list(h.shape) == [2, 4]
    graph.forget_shapes(m)
    assert h.shape is None
    assert list(graph.value_map(m)["y"].shape) == [4, 2]


def test_shapes_next_to_foreign_operators_are_kept():
    m = model("g (float[2,4] x) => (float[2,4] y) { h = Relu(x) y = Neg(h) }")
    graph.infer_shapes(m)
    graph.add_node(m, "Own", [graph.value_map(m)["h"]], "own", domain="our.domain")
    graph.forget_shapes(m)
    assert graph.value_map(m)["h"].shape is not None


def test_the_only_user_is_counted_with_branches_and_outputs():
    m = captured("h = Relu(p)")
    values = graph.value_map(m)
    assert graph.only_user(values["p"]) is node(m, "first")
    assert graph.only_user(values["h"]) is None
    assert graph.only_user(values["y"]) is None
    assert {reader.op_type for reader in graph.users(values["h"])} == {"Add", "Neg"}
    twice = model("g (float[4] x) => (float[4] y) { h = Neg(x) y = Add(h, h) }")
    assert graph.only_user(graph.value_map(twice)["h"]) is None


def test_a_node_inside_a_branch_is_nobodys_only_user():
    m = model(
        """g (float[4] x, float[4] z, bool c) => (float[4] y) {
            h = Neg(x)
            y = If(c) <then_branch = t () => (float[4] a) { a = Relu(h) },
                       else_branch = e () => (float[4] b) { b = Neg(z) }>
        }"""
    )
    h = graph.value_map(m)["h"]
    assert [reader.op_type for reader in graph.users(h)] == ["Relu"]
    assert graph.users(h)[0].graph is not m.graph
    assert graph.only_user(h) is None
    assert graph.activation_after(h) is None
