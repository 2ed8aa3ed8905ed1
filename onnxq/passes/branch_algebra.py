"""Branches side by side and one behind the other, as one branch.

**Sum.** Two branches of equal stride may be added when their taps lie on one lattice and their outputs have equal
sizes whatever the input's size: then the sum of their kernels, each laid at its own offsets, is their sum. Positions
outside the input read zero in both forms.

**Sequence.** The inner branch K, b (stride s, dilation d, padding p) and the outer one K', b' (s', d', p') make

    y[t] = sum_i K[i] x[t s + i d - p] + b
    z[o] = sum_j K'[j] y[o s' + j d' - p'] + b'
         = sum_ji K'[j] K[i] x[o s s' + (j d' s + i d) - (p + p' s)]  +  b' + sum_j K'[j] b

so the taps lie at  j d' s + i d,  the stride is s s' and the padding p + p' s on either side; the sizes agree for every
input:  floor((floor((L - 1 + m) / s) + m') / s') = floor((L - 1 + m + m' s) / (s s')).  In between, the outer branch
reads zeros beyond the ends of y, where the sum above goes on. That is the same on an axis where p' = 0, for then
nothing beyond is read; or where the inner branch has one tap, for then  x[t s - p]  is beyond the ends, too, and zero,
if b = 0. Elsewhere a sequence is no single convolution.

Of channels, both are block matrices; with gcd(g, g') groups in both, the blocks multiply.
"""

from __future__ import annotations

from math import gcd

import numpy as np
import numpy.typing as npt

from onnxq.passes.branches import Branch, Floats


def add_branches(first: Branch, second: Branch) -> Branch | str:
    """The branch that returns the sum of two branches of one tensor, or why there is none."""
    if first.strides != second.strides:
        return f"strides {first.strides} and {second.strides} differ"
    if len(first.bias) != len(second.bias):
        return f"{len(first.bias)} and {len(second.bias)} channels cannot be added"
    dilations = []
    for axis in range(len(first.strides)):
        if first.shrink(axis) != second.shrink(axis):
            return "their outputs differ in size"
        steps = {b.dilations[axis] for b in (first, second) if b.taps[axis] > 1}
        if len(steps) > 1:
            return f"dilations {sorted(steps)} differ"
        step = steps.pop() if steps else 1
        if (first.begins[axis] - second.begins[axis]) % step:
            return "their taps do not meet"
        dilations.append(step)
    group = gcd(first.group, second.group)
    begins = tuple(max(pair) for pair in zip(first.begins, second.begins, strict=True))
    wide = [_laid(branch, group, begins, dilations) for branch in (first, second)]
    taps = np.maximum(wide[0].shape[2:], wide[1].shape[2:])
    kernel = sum(_behind(part, taps) for part in wide)
    assert isinstance(kernel, np.ndarray)
    ends = tuple(
        first.shrink(axis) - begins[axis] + (int(taps[axis]) - 1) * dilations[axis] for axis in range(len(taps))
    )
    if min(ends, default=0) < 0:
        return "their padding would have to be negative"
    return Branch(
        source=first.source,
        nodes=(*first.nodes, *second.nodes),
        kernel=kernel,
        bias=first.bias + second.bias,
        group=group,
        strides=first.strides,
        dilations=tuple(dilations),
        begins=begins,
        ends=ends,
        cost=first.cost + second.cost,
    )


def compose(inner: Branch, outer: Branch) -> Branch | str:
    """The branch that returns `outer` of `inner`, or why there is none. What `outer` names as its source is unused."""
    if len(inner.bias) != outer.inputs:
        return f"{outer.inputs} channels are read and {len(inner.bias)} are there"
    for axis in range(len(outer.strides)):
        if not (outer.begins[axis] or outer.ends[axis]):
            continue
        if inner.taps[axis] > 1:
            return "padding between two kernels reads zeros where a single kernel would not"
        if inner.bias.any():
            return "padding behind a bias reads zeros where a single kernel would read the bias"
    return Branch(
        source=inner.source,
        nodes=(*outer.nodes, *inner.nodes),
        kernel=_composed_kernel(inner, outer),
        bias=outer.bias + _through(outer, inner.bias),
        group=gcd(inner.group, outer.group),
        strides=tuple(s * t for s, t in zip(inner.strides, outer.strides, strict=True)),
        dilations=tuple(step if size > 1 else 1 for _, _, step, size in _lattice(inner, outer)),
        begins=tuple(p + q * s for p, q, s in zip(inner.begins, outer.begins, inner.strides, strict=True)),
        ends=tuple(p + q * s for p, q, s in zip(inner.ends, outer.ends, inner.strides, strict=True)),
        cost=inner.cost * int(np.prod(outer.strides)) + outer.cost,
    )


def composed_size(inner: Branch, outer: Branch) -> int:
    """Multiplications per output position of `outer` of `inner` as one kernel."""
    sizes = [size for _, _, _, size in _lattice(inner, outer)]
    return len(outer.bias) * (inner.inputs // gcd(inner.group, outer.group)) * int(np.prod(sizes))


def _lattice(inner: Branch, outer: Branch) -> list[tuple[int, int, int, int]]:
    """Per axis: distance of the outer and the inner taps in the input, step of the composed kernel, its size."""
    found = []
    for axis in range(len(outer.strides)):
        far = outer.dilations[axis] * inner.strides[axis] if outer.taps[axis] > 1 else 0
        near = inner.dilations[axis] if inner.taps[axis] > 1 else 0
        step = gcd(far, near) or 1
        span = (outer.taps[axis] - 1) * far + (inner.taps[axis] - 1) * near
        found.append((far, near, step, span // step + 1))
    return found


def _composed_kernel(inner: Branch, outer: Branch) -> Floats:
    lattice = _lattice(inner, outer)
    group = gcd(inner.group, outer.group)
    kernel = np.zeros((len(outer.bias), inner.inputs // group, *(size for _, _, _, size in lattice)))
    for late in np.ndindex(outer.taps):
        for early in np.ndindex(inner.taps):
            place = tuple(
                (j * far + i * near) // step for j, i, (far, near, step, _) in zip(late, early, lattice, strict=True)
            )
            product = _product(outer.kernel[(..., *late)], outer.group, inner.kernel[(..., *early)], inner.group)
            kernel[(..., *place)] += product
    return kernel


def _product(outer: Floats, outer_group: int, inner: Floats, inner_group: int) -> Floats:
    """Two block matrices [outputs, inputs per group], multiplied; in gcd(groups) groups."""
    outputs, middle = len(outer), len(inner)
    if outer_group == middle:  # depthwise: each output reads one row
        return outer * inner[np.arange(outputs) // (outputs // middle)]
    if inner_group == middle and inner.shape[1] == 1:  # depthwise: each column is scaled
        return outer * _rows(inner[:, 0], outer_group, outputs)
    group = gcd(outer_group, inner_group)
    left = regrouped(outer, outer_group, group).reshape(group, outputs // group, -1)
    right = regrouped(inner, inner_group, group).reshape(group, middle // group, -1)
    product: Floats = np.matmul(left, right)
    return product.reshape(outputs, -1)


def _through(outer: Branch, constant: Floats) -> Floats:
    """What `outer`, without padding, makes of a tensor that is `constant` per channel."""
    matrix = outer.kernel.reshape(*outer.kernel.shape[:2], -1).sum(axis=2)
    through: Floats = (matrix * _rows(constant, outer.group, len(matrix))).sum(axis=1)
    return through


def _rows(vector: Floats, group: int, outputs: int) -> Floats:
    """[outputs, inputs per group]: for each output, the part of `vector` [inputs] that its group reads."""
    return np.repeat(vector.reshape(group, -1), outputs // group, axis=0)


def _laid(branch: Branch, group: int, begins: tuple[int, ...], dilations: list[int]) -> Floats:
    """The branch's kernel in `group` groups, with empty taps in front so that its padding becomes `begins`."""
    kernel = regrouped(branch.kernel, branch.group, group)
    front = [(wanted - own) // step for wanted, own, step in zip(begins, branch.begins, dilations, strict=True)]
    return np.pad(kernel, [(0, 0), (0, 0), *((count, 0) for count in front)])


def _behind(kernel: Floats, taps: npt.NDArray[np.int64]) -> Floats:
    missing = [(0, int(wanted) - own) for wanted, own in zip(taps, kernel.shape[2:], strict=True)]
    return np.pad(kernel, [(0, 0), (0, 0), *missing])


def regrouped(kernel: Floats, group: int, fewer: int) -> Floats:
    """A kernel of `group` groups as one of `fewer` groups; connections across the old groups are zero."""
    if group == fewer:
        return kernel
    outputs, inputs = kernel.shape[:2]
    merged = group // fewer
    wide = np.zeros((outputs, inputs * merged, *kernel.shape[2:]))
    for output in range(outputs):
        start = (output // (outputs // group)) % merged * inputs
        wide[output, start : start + inputs] = kernel[output]
    return wide
