"""The map of a graph: what is passed through, where branches meet, and what is left out."""

from helpers import model, weights

from onnxq.pipeline.flow import flow


def rows(m):
    found = flow(m)
    return [(node.name, node.op_type, [found[source].name for source in node.sources]) for node in found]


def test_layers_and_junctions_are_kept_and_all_else_is_passed_through():
    text = """g (float[1,4,6,6] x, float[4,4,3,3] w, float[4,4,1,1] v, float[4,5] u) => (float[1,5] y) {
        [one] a = Conv<pads = [1, 1, 1, 1]>(x, w) b = Relu(a) [two] c = Conv(b, v) d = Sigmoid(c)
        [join] e = Add(d, b) f = Relu(e) [gate] g = Mul(f, f) p = GlobalAveragePool(g) q = Flatten(p)
        [last] y = MatMul(q, u)
    }"""
    assert rows(model(text, w=weights(4, 4, 3, 3), v=weights(4, 4, 1, 1), u=weights(4, 5))) == [
        ("x", "input", []),
        ("one", "Conv", ["x"]),
        ("two", "Conv", ["one"]),
        ("join", "Add", ["one", "two"]),
        ("last", "MatMul", ["join"]),
    ]


def test_products_of_activations_and_second_inputs_are_there():
    text = """g (float[2,3] x, float[2,3] z, float[3,3] w) => (float[2,2] y) {
        [q] a = MatMul(x, w) t = Transpose<perm = [1, 0]>(z) [product] y = MatMul(a, t)
    }"""
    assert rows(model(text, w=weights(3, 3))) == [
        ("x", "input", []),
        ("z", "input", []),
        ("q", "MatMul", ["x"]),
        ("product", "MatMul", ["z", "q"]),
    ]


def test_what_reaches_no_output_and_what_reads_nothing_is_left_out():
    text = """g (float[2,3] x, float[2,3] unread, float[3,3] w, float[2,3] c, float[3,3] d) => (float[2,3] y) {
        [a] h = MatMul(x, w) [constant] k = MatMul(c, d) [y] y = Add(h, k) [idle] i = MatMul(unread, w)
    }"""
    m = model(text, w=weights(3, 3), c=weights(2, 3), d=weights(3, 3))
    assert rows(m) == [("x", "input", []), ("a", "MatMul", ["x"])]
