import time
from itertools import pairwise

import hypothesis.strategies as st
import numpy as np
import pytest
from helpers import model, run, weights
from hypothesis import given, settings

from onnxq import graph
from onnxq.plan import find_blocks, layer_slices
from onnxq.plan.cuts import ROOT, cuts_of, flow_of

RESNET = """g (float[n,3,8,8] x, float[4,3,3,3] w0, float[4,4,3,3] w1, float[4,4,3,3] w2, float[6,4,3,3] w3,
             float[6,6,3,3] w4, float[6,4,1,1] w5, float[6,5] w6) => (float[n,5] y) {
    [stem] a = Conv<pads = [1,1,1,1]>(x, w0)
    [stem_relu] b = Relu(a)
    [first] c = Conv<pads = [1,1,1,1]>(b, w1)
    [r1] d = Relu(c)
    [second] e = Conv<pads = [1,1,1,1]>(d, w2)
    [add1] f = Add(e, b)
    [out1] h = Relu(f)
    [down1] i = Conv<pads = [1,1,1,1], strides = [2,2]>(h, w3)
    [r2] j = Relu(i)
    [down2] k = Conv<pads = [1,1,1,1]>(j, w4)
    [short] l = Conv<strides = [2,2]>(h, w5)
    [add2] m = Add(k, l)
    [out2] o = Relu(m)
    [pool] p = GlobalAveragePool(o)
    [flat] q = Flatten(p)
    [head] y = Gemm(q, w6)
}"""
RESNET_WEIGHTS = {
    "w0": weights(4, 3, 3, 3),
    "w1": weights(4, 4, 3, 3),
    "w2": weights(4, 4, 3, 3, seed=1),
    "w3": weights(6, 4, 3, 3),
    "w4": weights(6, 6, 3, 3),
    "w5": weights(6, 4, 1, 1),
    "w6": weights(6, 5),
}
ENCODER = """g (int64[n,s] ids, int64[n,s] mask, float[9,4] table, float[4] one, float[4] zero, float[4,4] wq,
              float[4,4] wk, float[4,4] wv, float[4,4] wo, float[4] bo, float[4,8] wu, float[8,4] wd, int64[2] ax,
              float far) => (float[n,s,4] y) {
    [embed] e = Gather(table, ids)
    [shape] s = Shape(e)
    [cast] mf = Cast<to = 1>(mask)
    [penalty] mp = Mul(mf, far)
    [open] mu = Unsqueeze(mp, ax)
    [squeeze] mq = Squeeze(mu, ax)
    [axes] pen = Unsqueeze(mq, ax1)
    LAYERS
}"""


def encoder_layer(number, source, target, *, pre):
    """Half-blocks of one head: x + Attn(LN(x)), x + MLP(LN(x)), or normalised behind the sum."""
    p = f"t{number}"
    into, mid_in, after = (f"{p}n", f"{p}k", f"{p}a") if pre else (source, f"{p}a", f"{p}s")
    norm = "LayerNormalization<axis = -1>"
    return f"""
    {f"[{p}_ln1] {p}n = {norm}({source}, one, zero)" if pre else ""}
    [{p}_q] {p}q0 = MatMul({into}, wq)
    [{p}_qs] {p}q = Reshape({p}q0, s)
    [{p}_k] {p}kk = MatMul({into}, wk)
    [{p}_kt] {p}kt = Transpose<perm = [0,2,1]>({p}kk)
    [{p}_v] {p}v = MatMul({into}, wv)
    [{p}_qk] {p}l = MatMul({p}q, {p}kt)
    [{p}_mask] {p}m = Add({p}l, pen)
    [{p}_soft] {p}p = Softmax({p}m)
    [{p}_pv] {p}c = MatMul({p}p, {p}v)
    [{p}_o] {p}o0 = MatMul({p}c, wo)
    [{p}_ob] {p}o = Add({p}o0, bo)
    [{p}_sum1] {after} = Add({source}, {p}o)
    {f"[{p}_ln2] {p}k = {norm}({p}a, one, zero)" if pre else f"[{p}_ln1] {p}a = {norm}({p}s, one, zero)"}
    [{p}_up] {p}u = MatMul({mid_in}, wu)
    [{p}_act] {p}g = Relu({p}u)
    [{p}_down] {p}d = MatMul({p}g, wd)
    [{p}_sum2] {target if pre else f"{p}z"} = Add({p}a, {p}d)
    {"" if pre else f"[{p}_ln2] {target} = {norm}({p}z, one, zero)"}"""


def encoder(*, pre):
    layers = encoder_layer(0, "e", "h", pre=pre) + encoder_layer(1, "h", "y", pre=pre)
    text = ENCODER.replace("LAYERS", layers)
    text = text.replace("float far)", "float far, int64[1] ax1)")
    squares = {name: weights(4, 4, seed=k) for k, name in enumerate(("wq", "wk", "wv", "wo"))}
    return model(
        text,
        table=weights(9, 4),
        one=np.ones(4, np.float32),
        zero=np.zeros(4, np.float32),
        bo=weights(4),
        wu=weights(4, 8),
        wd=weights(8, 4),
        ax=np.asarray([1, 2]),
        ax1=np.asarray([1]),
        far=np.float32(-3.0),
        **squares,
    )


def blocks_of(m, **choices):
    graph.infer_shapes(m)
    return find_blocks(m, **choices)


def renamed(m, **names):
    """The model with names that its text cannot give."""
    nodes = graph.node_names(m)
    for old, new in names.items():
        nodes[old].name = new
    return m


def layers_of(blocks):
    return [block.layers for block in blocks]


def run_in_turn(m, blocks, feeds):
    """Outputs of the model when its blocks run one after the other, each on what earlier ones returned."""
    known = dict(feeds)
    for block in blocks:
        part = graph.sub_model(m, list(block.inputs), list(block.outputs))
        known |= run(part, {name: known[name] for name in block.inputs})
    return {output.name: known[output.name] for output in m.graph.outputs}


def assert_exact(m, blocks, feeds):
    expected = run(m, feeds)
    found = run_in_turn(m, blocks, feeds)
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)


def assert_partition(m, blocks):
    """Every node in one block, layers where they belong, and nothing read before it is made."""
    order = [str(node.name) for node in graph.nodes(m)]
    assert sorted(name for block in blocks for name in block.nodes) == sorted(order)
    place = {name: k for k, name in enumerate(order)}
    layers = [str(node.name) for node in graph.nodes(m) if not isinstance(graph.layer_of(node), str)]
    assert sorted(name for block in blocks for name in block.layers) == sorted(layers)
    made = {value.name for value in m.graph.inputs}
    for block in blocks:
        assert list(block.nodes) == sorted(block.nodes, key=place.__getitem__)
        assert set(block.layers) <= set(block.nodes)
        assert set(block.inputs) <= made
        assert not set(block.outputs) & made
        made |= set(block.outputs)
    assert len({block.name for block in blocks}) == len(blocks)
    assert all(behind.stage - front.stage in (0, 1) for front, behind in pairwise(blocks))


def test_residual_blocks_and_stages():
    names = {"stem": "/stem/Conv", "first": "/a/net/b/layer.1/conv1/Conv", "second": "/a/net/b/layer.1/conv2/Conv"}
    m = renamed(model(RESNET, **RESNET_WEIGHTS), **names)
    stem, first, second, head = blocks = blocks_of(m)
    assert [block.name for block in blocks] == ["stem", "net/b/layer.1/conv1", "down1", "head"]
    assert stem.nodes == ("/stem/Conv", "stem_relu")
    assert (first.inputs, first.outputs) == (("b",), ("h",))
    assert first.layers == ("/a/net/b/layer.1/conv1/Conv", "/a/net/b/layer.1/conv2/Conv")
    assert second.nodes == ("down1", "r2", "down2", "short", "add2", "out2")
    assert head.nodes == ("pool", "flat", "head")  # pooling is not the last residual block's
    assert [block.stage for block in blocks] == [0, 0, 1, 2]
    assert_exact(m, blocks, {"x": weights(2, 3, 8, 8)})


def test_an_unknown_size_begins_a_stage():
    text = RESNET.replace("[n,3,8,8] x", "[n,3,?,8] x")
    assert [block.stage for block in blocks_of(model(text, **RESNET_WEIGHTS))] == [0, 1, 2, 3]
    text = """g (float[n,3,h,4] x, float[4,4] w0, float[4,4] w1, float[4,2] w2) => (float[n,3,h,2] y) {
        a = MatMul(x, w0)  b = MatMul(a, w1)  y = MatMul(b, w2) }"""
    constants = {"w0": weights(4, 4), "w1": weights(4, 4), "w2": weights(4, 2)}
    assert [block.stage for block in blocks_of(model(text, **constants))] == [0, 0, 1]


@pytest.mark.parametrize("pre", [True, False])
def test_halves_of_transformer_layers(pre):
    m = encoder(pre=pre)
    embedding, *halves = blocks = blocks_of(m)
    assert embedding.layers == ()
    assert embedding.outputs == ("e",)
    assert layers_of(halves) == [
        tuple(f"t{k}_{part}" for part in parts) for k in (0, 1) for parts in (("q", "k", "v", "o"), ("up", "down"))
    ]
    # The mask and the shape are made by the first block that needs them, and read by the others.
    assert {"cast", "penalty", "shape"} <= set(halves[0].nodes)
    assert {"pen", "s"} <= set(halves[0].outputs)
    assert set(halves[1].inputs) == {halves[0].outputs[-1]}
    assert set(halves[2].inputs) == {halves[1].outputs[-1], "pen", "s"}
    assert len({block.stage for block in blocks}) == 1
    assert_partition(m, blocks)
    ids = np.asarray([[1, 2, 8], [0, 3, 3]])
    assert_exact(m, blocks, {"ids": ids, "mask": np.asarray([[0, 0, 1], [0, 1, 1]])})


def test_a_chain_gives_one_block_per_layer():
    text = """g (float[n,3,8,8] x, float[3,3,1,1] a, float[3,3,1,1] b, float[3,3,1,1] c) => (float[n,3,4,4] y) {
        [one] p = Conv(x, a)  [act] q = Relu(p)
        [pool] r = MaxPool<kernel_shape = [2,2], strides = [2,2]>(q)
        [two] s = Conv(r, b)  [sig] t = Sigmoid(s)  [swish] u = Mul(t, s)
        [three] v = Conv(u, c)  [last] y = Softmax(v)
    }"""
    kernel = weights(3, 3, 1, 1)
    blocks = blocks_of(model(text, a=kernel, b=kernel, c=kernel))
    assert [block.nodes for block in blocks] == [("one", "act"), ("pool", "two", "sig", "swish"), ("three", "last")]
    assert [block.stage for block in blocks] == [0, 1, 1]


def test_what_shrinks_joins_the_layer_behind():
    text = """g (float[n,3,4,4] x, float[5,3,1,1] a, float[3,5,1,1] b, float[48,2] c) => (float[n,2] y) {
        [one] p = Conv(x, a) [two] q = Conv(p, b) [flat] r = Flatten(q) [scaled] s = Neg(r) [head] y = Gemm(s, c)
    }"""
    blocks = blocks_of(model(text, a=weights(5, 3, 1, 1), b=weights(3, 5, 1, 1), c=weights(48, 2)))
    assert [block.nodes for block in blocks] == [("one",), ("two",), ("flat", "scaled", "head")]
    assert [block.stage for block in blocks] == [0, 0, 1]  # channels make no stage


def test_one_of_two_results_of_a_node_is_no_cut():
    text = "[a] p = MatMul(x, w0) [s] q, r = Split<axis = 1>(p) "
    m = square(text + "[c] t = Concat<axis = 1>(r, q) [b] y = MatMul(t, w1)", y=0)
    graph.infer_shapes(m)
    cuts, _ = cuts_of(flow_of(m))
    assert {value.name for value in cuts.values()} == {"x", "p", "t", "y"}


def test_pooling_with_nothing_behind_it_stays_with_its_layer():
    text = """g (float[n,3,8,8] x, float[3,3,1,1] a) => (float[n,3] y) {
        [one] p = Conv(x, a) [pool] q = GlobalAveragePool(p) [flat] y = Flatten(q)
    }"""
    (block,) = blocks_of(model(text, a=weights(3, 3, 1, 1)))
    assert block.nodes == ("one", "pool", "flat")


SQUARE = {f"w{k}": weights(4, 4, seed=k) for k in range(12)}


def square(text, inputs="", **outputs):
    """A model of [2,4] tensors and square weights."""
    used = {name: array for name, array in SQUARE.items() if f"{name})" in text}
    heads = ", ".join(["float[2,4] x", *([inputs] if inputs else []), *(f"float[4,4] {name}" for name in used)])
    returned = ", ".join(f"float[2,4] {name}" for name in outputs)
    return model(f"g ({heads}) => ({returned}) {{ {text} }}", **used)


UNET = """
    [d0] a = MatMul(x, w0) [e0] a1 = Relu(a)
    [d1] b = MatMul(a1, w1) [e1] b1 = Relu(b) [d2] c = MatMul(b1, w2) [e2] c1 = Relu(c)
    [d3] d = MatMul(c1, w3) [d4] e = MatMul(d, w4)
    [s1] f = Add(e, c1) [u1] g = MatMul(f, w5) [u2] h = MatMul(g, w6)
    [s2] i = Add(h, a1) [u3] j = MatMul(i, w7) [u4] y = MatMul(j, w8)"""


def test_a_region_of_many_layers_is_split_where_few_tensors_cross():
    m = square(UNET, y=0)
    assert layers_of(blocks_of(m)) == [("d0",), ("d1", "d2", "d3", "d4", "u1", "u2"), ("u3",), ("u4",)]
    blocks = blocks_of(m, limit=4)
    assert layers_of(blocks) == [("d0",), ("d1", "d2", "d3", "d4"), ("u1", "u2"), ("u3",), ("u4",)]
    assert blocks[1].nodes == ("d1", "e1", "d2", "e2", "d3", "d4", "s1")
    blocks = blocks_of(m, limit=3)
    # Two tensors cross behind e2 (c1, a1), three behind d3 and d4, two behind s1 and u1.
    assert layers_of(blocks) == [("d0",), ("d1", "d2"), ("d3", "d4", "u1"), ("u2",), ("u3",), ("u4",)]
    assert blocks[1].nodes == ("d1", "e1", "d2", "e2")
    assert [block.inputs for block in blocks[1:4]] == [("a1",), ("c1",), ("g", "a1")]
    assert_exact(m, blocks, {"x": weights(2, 4)})
    for limit in (1, 2, 3):
        blocks = blocks_of(m, limit=limit)
        assert max(len(block.layers) for block in blocks) == limit
        assert_partition(m, blocks)
        assert_exact(m, blocks, {"x": weights(2, 4)})
    with pytest.raises(ValueError, match="not 0"):
        find_blocks(m, limit=0)


def test_a_side_head_at_the_end_of_the_file_destroys_no_cut():
    m = square(
        """[a] p = MatMul(x, w0) [b] q = MatMul(p, w1) [c] r = MatMul(q, w2) [d] y = MatMul(r, w3)
           [aux1] s = MatMul(p, w4) [aux2] z = MatMul(s, w5)""",
        y=0,
        z=0,
    )
    assert layers_of(blocks_of(m)) == [("a",), ("b",), ("c",), ("d",), ("aux1",), ("aux2",)]
    assert blocks_of(m)[0].outputs == ("p",)


def test_gates_and_the_sum_with_the_input_are_branches():
    m = square(
        """[a] p = MatMul(x, w0) [gate] q = MatMul(p, w1) [sig] r = Sigmoid(q) [mul] s = Mul(p, r)
           [b] t = MatMul(s, w2) [sum] y = Add(t, x)""",
        y=0,
    )
    assert layers_of(blocks_of(m)) == [("a", "gate", "b")]


def test_pieces_that_need_each_others_shapes_become_one():
    m = square(
        """[a] p = MatMul(x, w0) [b] q = MatMul(p, w1) [c] r = MatMul(p, w2)
           [sq] qs = Shape(q) [sr] rs = Shape(r) [eq] y = Reshape(q, rs) [er] z = Reshape(r, qs)""",
        y=0,
        z=0,
    )
    blocks = blocks_of(m)
    assert layers_of(blocks) == [("a",), ("b", "c")]
    assert_partition(m, blocks)
    assert_exact(m, blocks, {"x": weights(2, 4)})


def test_what_subgraphs_read_counts():
    text = """g (float[2,4] x, bool c, float[4,4] w0, float[4,4] w1, float[4,4] w2) => (float[2,4] y) {
        [a] p = MatMul(x, w0)
        [not] d = Not(c)
        [b] q = MatMul(p, w1)
        [if] r = If(c) <
            then_branch = t () => (float[2,4] k) { k = Neg(p) },
            else_branch = f () => (float[2,4] m) { m = If(d) <
                then_branch = tt () => (float[2,4] mk) { mk = Exp(q) },
                else_branch = ff () => (float[2,4] mm) { mm = Neg(q) }> }
        >
        [z] y = MatMul(r, w2)
    }"""
    m = model(text, **{name: SQUARE[name] for name in ("w0", "w1", "w2")})
    blocks = blocks_of(m)
    assert layers_of(blocks) == [("a",), ("b",), ("z",)]
    assert blocks[1].nodes == ("not", "b", "if")
    assert (blocks[1].inputs, blocks[1].outputs) == (("c", "p"), ("r",))
    assert_partition(m, blocks)


def test_models_without_layers():
    m = model("g (float[2,4] x) => (float[2,4] y) { [a] p = Neg(x) [b] y = Exp(p) }")
    (block,) = blocks_of(m)
    assert (block.name, block.nodes, block.layers) == ("block_0", ("a", "b"), ())
    assert (block.inputs, block.outputs) == (("x",), ("y",))


def test_layer_slices():
    text = """g (float[2,4] x, float[4,4] w0, float[4] b, float[4,4] w1, float low, float high)
        => (float[2,4] y, float[2,4] z) {
        [neg] n = Neg(x) [one] p = MatMul(n, w0) [bias] q = Add(b, p) [clip] r = Clip(q, low, high)
        [two] z = MatMul(r, w1) [sum] y = Add(z, r) }"""
    constants = {"w0": SQUARE["w0"], "b": weights(4), "w1": SQUARE["w1"]}
    one, two = layer_slices(
        renamed(model(text, low=np.float32(-1), high=np.float32(2), **constants), one="/m/one/MatMul")
    )
    assert (one.name, one.nodes, one.layers) == ("m/one", ("/m/one/MatMul", "bias", "clip"), ("/m/one/MatMul",))
    assert (one.inputs, one.outputs) == (("n",), ("r",))
    assert (two.nodes, two.inputs, two.outputs) == (("two",), ("r",), ("z",))


@st.composite
def graphs(draw):
    """Random graphs of [2,4] tensors with layers, branches, merges, splits, shapes, a mask and several outputs."""
    values, lines = ["x", "v"], ["[mf] m = Cast<to = 1>(k)"]
    used = set()
    layers = 0
    for number in range(draw(st.integers(1, 14))):
        kind = draw(st.sampled_from(["layer", "layer", "Relu", "Add", "shape", "Split", "mask"]))
        near = st.integers(max(0, len(values) - 4), len(values) - 1)
        first, second = (values[draw(near if draw(st.booleans()) else st.integers(0, len(values) - 1))] for _ in "ab")
        name = f"n{number}"
        used |= {first, second} if kind in ("Add", "shape") else {first}
        if kind == "layer" and layers < 12:
            lines.append(f"[{name}_l] {name} = MatMul({first}, w{layers})")
            layers += 1
        elif kind == "Add":
            lines.append(f"[{name}_a] {name} = Add({first}, {second})")
        elif kind == "shape":
            lines += [f"[{name}_s] {name}s = Shape({first})", f"[{name}_r] {name} = Reshape({second}, {name}s)"]
        elif kind == "Split":
            lines.append(f"[{name}_p] {name}h, {name}t = Split<axis = 1>({first})")
            lines.append(f"[{name}_c] {name} = Concat<axis = 1>({name}t, {name}h)")
        elif kind == "mask":
            lines.append(f"[{name}_m] {name} = Mul({first}, m)")
        else:
            lines.append(f"[{name}_e] {name} = Relu({first})")
        values.append(name)
    made = values[2:]
    returned = [name for name in made if name not in used or name == made[draw(st.integers(0, len(made) - 1))]]
    return square("\n".join(lines), "float[2,4] v, int64[4] k", **dict.fromkeys(returned))


FEEDS = {"x": weights(2, 4), "v": weights(2, 4, seed=5), "k": np.asarray([1, 0, 1, 2])}


@settings(max_examples=40, deadline=None)
@given(graphs(), st.integers(1, 3))
def test_blocks_of_random_graphs_compute_what_the_model_does(m, limit):
    blocks = blocks_of(m, limit=limit)
    assert_partition(m, blocks)
    assert_exact(m, blocks, FEEDS)
    assert blocks == find_blocks(m, limit=limit)


@settings(max_examples=40, deadline=None)
@given(graphs())
def test_cuts_are_what_every_path_passes(m):
    graph.infer_shapes(m)
    flow = flow_of(m)
    cuts, entry = cuts_of(flow)
    count = len(flow.vertices)

    def reached(start, without):
        seen = {start}
        for vertex in range(count):
            if vertex != without and seen & set(flow.reads[vertex]):
                seen.add(vertex)
        return seen - {start}

    expected = {
        vertex
        for vertex in range(1, count)
        if vertex in flow.tensors and not reached(vertex, None) & reached(ROOT, vertex)
    }
    assert set(cuts) == expected
    for vertex in range(1, count):
        above = [cut for cut in expected if cut < vertex and vertex in reached(cut, None)]
        assert entry[vertex] == max(above, default=ROOT)


def test_time_is_linear_in_the_number_of_nodes():
    count = 6000
    lines = ["[a0] a0 = MatMul(x, w0)"]
    bodies = [f"Add(a{k - 1}, a{k // 2})" if k % 3 else f"MatMul(a{k - 1}, w0)" for k in range(1, count)]
    lines += [f"[a{k}] a{k} = {body}" for k, body in enumerate(bodies, start=1)]
    lines.append(f"[y] y = Relu(a{count - 1})")
    m = square("\n".join(lines), y=0)
    start = time.process_time()
    blocks = find_blocks(m)
    assert time.process_time() - start < 10
    assert max(len(block.layers) for block in blocks) == 8
