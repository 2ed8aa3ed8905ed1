"""A sum of parallel linear branches of one tensor becomes one Conv (RepVGG, MobileOne, ACNet, DBB and their kin).

    Add(branch(x), branch'(x))  ->  Conv(x)      with the kernels and biases added, see `branch_algebra`

A sum is an Add or Sum, or a tree of them whose inner sums nobody else reads; terms of it that are no branches stay. A
branch is x itself or a sequence of Conv, BatchNormalization, AveragePool and products or sums with a constant per
channel (LayerScale), and x is the nearest tensor that two terms have in common. At least one branch has a Conv with
constant weights, and nothing inside a branch may be read by anybody else. Branches of different grouping meet in the
largest grouping that both divide into.

One Conv instead of several saves the additions and, on an integer grid, their roundings; so it may spend up to
`GROWTH` times the multiplications of its parts, which a 1x3 beside a 3x1 needs. A dense 1x1 beside a depthwise 3x3
would become a dense 3x3 of many times the work and stays.

X. Ding et al., "RepVGG: Making VGG-style ConvNets Great Again", arXiv 2101.03697, section 3.3; "Diverse Branch Block",
arXiv 2103.13425, section 3.2.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from onnxq import graph
from onnxq.graph import Model, Node, Value
from onnxq.passes.affine import AFFINE_OPS, operand
from onnxq.passes.base import Pass
from onnxq.passes.branch_algebra import add_branches, compose
from onnxq.passes.branches import (
    Branch,
    conv_branch,
    identity_branch,
    insert_conv,
    pool_branch,
    scale_branch,
)

GROWTH = 2.0
"""Largest ratio of the fused Conv's multiplications to those of the branches."""

_SUMS = ("Add", "Sum")
_DEPTH = 8
"""Longest sequence of nodes that is looked through for a common tensor."""


@dataclass(frozen=True)
class FuseBranches(Pass):
    """Fuse sums of linear branches.

    Attributes:
        floor_db: Least signal-to-noise ratio of the fused kernel on an 8-bit grid with one step per output channel.
            A large identity among small weights makes a kernel that 8 bits cannot hold; such a branch is better
            added in integers. None fuses whatever is exact in float.
    """

    floor_db: float | None = None

    def __call__(self, model: Model) -> int:
        """Rewrite `model` in place; returns the number of additions removed."""
        fused, found = 0, True
        while found:
            found = False
            for root in list(_roots(model)):
                plan = _plan(root, self.floor_db) if root.graph is model.graph else ""
                if isinstance(plan, _Fusion):
                    _write(model, plan)
                    fused += len(plan.terms) - 1
                    found = True
        return fused

    def refused(self, model: Model) -> Mapping[str, str]:
        """Sums of branches of one tensor that stay: name of the Add or Sum -> reason."""
        reasons = {str(root.name): _plan(root, self.floor_db) for root in _roots(model)}
        return {name: reason for name, reason in reasons.items() if isinstance(reason, str) and reason}


@dataclass(frozen=True)
class _Term:
    """One operand of a tree of sums, and the linear nodes behind it.

    Attributes:
        holder: The Add or Sum that reads it.
        index: The input of `holder` that it is.
        chain: Linear nodes, the last one first; each reads the output of the next.
        sources: The tensors on the way: the operand itself, then what each node of `chain` reads.
    """

    holder: Node
    index: int
    chain: tuple[Node, ...]
    sources: tuple[Value, ...]

    def part(self, source: Value) -> tuple[Node, ...]:
        """The nodes between `source` and the operand, the last one first."""
        return self.chain[: self.sources.index(source)]


@dataclass(frozen=True)
class _Fusion:
    """Terms that become one Conv; the holder of the first is nearest to the root."""

    terms: list[_Term]
    branch: Branch


def _roots(model: Model) -> Iterator[Node]:
    """The sums that are no terms of other sums."""
    for node in graph.nodes(model, *_SUMS):
        reader = graph.only_user(node.outputs[0])
        if reader is None or not _is_sum(reader):
            yield node


def _is_sum(node: Node) -> bool:
    return node.op_type in _SUMS and node.domain in ("", "ai.onnx")


def _terms(holder: Node) -> Iterator[_Term]:
    """The computed operands of the tree below `holder`, those nearer to the root first."""
    inner = []
    for index, value in enumerate(holder.inputs):
        below = graph.producer(value)
        if value is None or graph.constant(value) is not None:
            continue
        if below is not None and _is_sum(below) and graph.only_user(value) is holder:
            inner.append(below)
        else:
            yield _term(holder, index, value)
    for below in inner:
        yield from _terms(below)


def _term(holder: Node, index: int, value: Value) -> _Term:
    chain: list[Node] = []
    sources = [value]
    while len(chain) < _DEPTH:
        node = graph.producer(sources[-1])
        data = _data(node) if node is not None else None
        if node is None or data is None or len(node.outputs) != 1:
            break
        chain.append(node)
        sources.append(data)
    return _Term(holder, index, tuple(chain), tuple(sources))


def _data(node: Node) -> Value | None:
    """What a linear node reads, None where it is not linear."""
    if node.domain in ("", "ai.onnx") and node.op_type in ("Conv", "AveragePool"):
        return node.inputs[0]
    return operand(node) if node.op_type in AFFINE_OPS else None


def _plan(root: Node, floor_db: float | None) -> _Fusion | str:
    """Terms below `root` that can become a Conv, a reason against it, or "" when no two read the same tensor."""
    terms = list(_terms(root))
    depths: dict[Value, dict[Value, int]] = {}  # source -> operand -> distance
    for term in terms:
        for depth, source in enumerate(term.sources):
            depths.setdefault(source, {})[term.sources[0]] = depth
    shared = [source for source, found in depths.items() if len(found) > 1]
    reasons = []
    for source in sorted(shared, key=lambda source: sum(sorted(depths[source].values())[:2])):
        plan = _fusion([term for term in terms if source in term.sources], source, floor_db)
        if isinstance(plan, _Fusion):
            return plan
        reasons.append(plan)
    return next(filter(None, reasons), "")


def _fusion(terms: Sequence[_Term], source: Value, floor_db: float | None) -> _Fusion | str:
    """As many of `terms` as fit into one Conv of `source`, or why no two do; "" where none has a Conv."""
    first = next((conv for term in terms for conv in reversed(term.part(source)) if conv.op_type == "Conv"), None)
    weight = graph.constant(first.inputs[1]) if first is not None else None
    if first is None or weight is None:
        return ""
    inputs, rank = weight.shape[1] * graph.attribute(first, "group", 1), weight.ndim - 2
    branches, reasons = [], []
    for term in terms:
        branch = _branch(term, source, inputs, rank)
        if isinstance(branch, str):
            reasons.append(branch)
        else:
            branches.append((term, branch))
    branches.sort(key=lambda pair: -pair[1].cost)
    members: list[_Term] = []
    total: Branch | None = None
    for term, branch in branches:
        added = branch if total is None else _added(total, branch, floor_db)
        if isinstance(added, str):
            reasons.append(added)
        else:
            members, total = [*members, term], added
    if total is None or len(members) < 2 or not any(node.op_type == "Conv" for node in total.nodes):
        return next(iter(reasons), "")
    return _Fusion([term for term in terms if term in members], total)


def _added(total: Branch, branch: Branch, floor_db: float | None) -> Branch | str:
    """The sum of two branches, unless it costs too much work or precision."""
    added = add_branches(total, branch)
    if isinstance(added, str):
        return added
    if added.kernel.size > GROWTH * added.cost:
        return f"the fused kernel would multiply {added.kernel.size / added.cost:.1f} times as much"
    if floor_db is not None and added.sqnr_db() < floor_db:
        return f"the fused kernel would keep only {added.sqnr_db():.0f} dB at 8 bits"
    return added


def _branch(term: _Term, source: Value, inputs: int, rank: int) -> Branch | str:
    """The branch between `source`, of `inputs` channels and `rank` spatial axes, and a term."""
    part = term.part(source)
    reader = term.holder
    for node in part:
        if graph.only_user(node.outputs[0]) is not reader:
            return f"{node.name} is read elsewhere, too"
        reader = node
    branch: Branch | str = identity_branch(source, inputs, rank)
    for node in reversed(part):
        assert isinstance(branch, Branch)
        outer = _leaf(node, len(branch.bias), rank)
        branch = compose(branch, outer) if isinstance(outer, Branch) else outer
        if isinstance(branch, str):
            return branch
    return branch


def _leaf(node: Node, channels: int, rank: int) -> Branch | str:
    """The branch of one node that reads `channels` channels over `rank` spatial axes."""
    if node.op_type == "AveragePool":
        found = pool_branch(node, channels)
    elif node.op_type == "Conv":
        found = conv_branch(node)
    else:
        found = scale_branch(node, channels, rank)
    if isinstance(found, Branch) and len(found.strides) != rank:
        return f"{node.name} has other axes"
    return found


def _write(model: Model, plan: _Fusion) -> None:
    """Put the Conv in the place of the first term and take the others out of their sums."""
    first, *others = plan.terms
    value = first.holder.inputs[first.index]
    assert value is not None
    new = insert_conv(model, plan.branch, value, first.holder)
    first.holder.replace_input_with(first.index, new)
    dropped, emptied = _dropped(others)
    for holder, indices in dropped.items():
        if holder not in emptied:
            _drop(model, holder, indices)
    for holder in reversed(emptied):
        model.graph.remove(holder, safe=True)
    for node in plan.branch.nodes:
        model.graph.remove(node, safe=True)


def _dropped(terms: Sequence[_Term]) -> tuple[dict[Node, set[int]], list[Node]]:
    """The inputs that each sum loses, and the sums that lose all of them, each in front of the one that reads it."""
    dropped: dict[Node, set[int]] = {}
    emptied: list[Node] = []
    queue = [(term.holder, term.index) for term in terms]
    for holder, index in queue:
        lost = dropped.setdefault(holder, set())
        lost.add(index)
        reader = graph.only_user(holder.outputs[0])
        if len(lost) == len(holder.inputs) and reader is not None:
            emptied.append(holder)
            queue.append((reader, list(reader.inputs).index(holder.outputs[0])))
    return dropped, emptied


def _drop(model: Model, holder: Node, indices: set[int]) -> None:
    """Take operands out of a sum; of two left it is an Add, of one left nothing."""
    kept = [index for index in range(len(holder.inputs)) if index not in indices]
    if len(kept) == 1:
        graph.bypass(holder, model, kept[0])
        return
    for place, index in enumerate(kept):
        holder.replace_input_with(place, holder.inputs[index])
    holder.resize_inputs(len(kept))
    if len(kept) == 2:
        holder.op_type = "Add"
