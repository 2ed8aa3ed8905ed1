"""Milliseconds of every layer in float and in integers, from the runtime's own profile on this machine.

A session's profile tells the time of every node that it executes. A node is a layer's when its name is that of the
layer's node, of a node that it absorbs or of its result, with what the runtime appends. What belongs to no layer is the
constant. Weights of fewer than 8 bits are unpacked when the session is made and run in the same kernels; fewer bits of
activations take none off either.

A layer in float between integer ones (or the other way round) makes a QuantizeLinear or DequantizeLinear of its input
necessary; that is priced with the time of one element in such a node, times the elements that pass.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from onnxq import bench, graph
from onnxq.emit import emit
from onnxq.graph import Model, Value
from onnxq.pipeline.calibrated import Calibrated
from onnxq.plan import Unit
from onnxq.plan.units import makers
from onnxq.runtime import Session, SessionConfig
from onnxq.types import Feeds
from onnxq.types.mixed import FLOAT, Bits, Costs

_NOTHING: dict[str, Any] = {"guards": (), "sums": (), "constants": {}, "tables": ()}
_SUFFIX = re.compile(r"(_nchwc|_token_\d+|\.(bias|weight)_dq|/\w*Fusion\w*/?)*")


def latency_costs(
    found: Calibrated, options: Collection[Bits], feeds: Feeds, *, provider: str = "cpu", threads: int = 1
) -> tuple[Costs, float]:
    """Milliseconds by layer and bits, and those of the whole float model.

    Args:
        found: The calibrated model.
        options: Bits that layers may get.
        feeds: One run's rows.
        provider: Where it runs.
        threads: Intra-op threads.
    """
    config = SessionConfig(provider, threads)
    floats = profile(found.model, feeds, config)
    integers = profile(emit(found.model, found.base, fused=True), feeds, config)
    names = names_of(found.placement.layers)
    slow, quick = (by_unit(times, names) for times in (floats, integers))
    layers = {
        unit.name: {bits: slow.get(unit.name, 0.0) if bits == FLOAT else quick.get(unit.name, 0.0) for bits in options}
        for unit in found.placement.layers
    }
    constant = sum(integers.values()) - sum(quick.values())
    costs = Costs("latency", "ms", layers, constant, _boundary(found, feeds, config))
    return costs, sum(floats.values())


def profile(model: Model, feeds: Feeds, config: SessionConfig) -> dict[str, float]:
    """Milliseconds of every executed node, by the name that the runtime gives it."""
    return {name: kernel.ms for name, kernel in bench.profiles([model], feeds, config)[0].items()}


def names_of(units: Iterable[Unit]) -> dict[str, str]:
    """Names that the runtime may derive a node's from -> the unit."""
    names = {}
    for unit in units:
        for node in unit.members:
            names[str(node.name)] = unit.name
            names |= {graph.name_of(value): unit.name for value in node.outputs if value.name}
    return names


def by_unit(times: Mapping[str, float], names: Mapping[str, str]) -> dict[str, float]:
    """Milliseconds of every unit that the runtime executes nodes of; the rest of `times` belongs to none."""
    sums: dict[str, float] = {}
    for name, time in times.items():
        plain = name.removeprefix("fused ")
        owner = next((unit for key, unit in names.items() if _derived(plain, key)), None)
        if owner is not None:
            sums[owner] = sums.get(owner, 0.0) + time
    return sums


def _derived(name: str, key: str) -> bool:
    return name.startswith(key) and _SUFFIX.fullmatch(name[len(key) :]) is not None


def _boundary(found: Calibrated, feeds: Feeds, config: SessionConfig) -> dict[tuple[str, str], float]:
    """Price of one step between integers and float for every pair of neighbouring layers."""
    inputs = {graph.name_of(unit.inputs[0]): None for unit in found.placement.layers}
    inner = [name for name in inputs if name not in feeds]
    seen = dict(feeds) | (Session(graph.with_outputs(found.model, inner, keep=False)).run(feeds) if inner else {})
    rate = _step_rate(found, feeds | seen, config)
    home = makers(list(found.placement.units))
    prices: dict[tuple[str, str], float] = {}
    for unit in found.placement.layers:
        elements = int(np.size(seen[graph.name_of(unit.inputs[0])]))
        for source in dict.fromkeys(_sources(unit.inputs[0], home)):
            if source.name != unit.name:
                prices[source.name, unit.name] = rate * elements
    return prices


def _sources(value: Value, home: Mapping[Value, Unit]) -> Iterator[Unit]:
    """The layers whose results a value is computed from, with nothing weighted in between."""
    pending, passed = [value], set()
    while pending:
        unit = home.get(pending.pop())
        if unit is None or unit in passed:
            continue
        passed.add(unit)
        if unit.layer is not None:
            yield unit
        else:
            pending += unit.inputs


def _step_rate(found: Calibrated, seen: Feeds, config: SessionConfig) -> float:
    """Milliseconds per element of a QuantizeLinear and a DequantizeLinear, on average; from the largest layer input."""
    name = max((graph.name_of(unit.inputs[0]) for unit in found.placement.layers), key=lambda key: np.size(seen[key]))
    reader = next(unit for unit in found.placement.layers if graph.name_of(unit.inputs[0]) == name)
    part = graph.sub_model(found.model, [name], [graph.name_of(reader.node.outputs[0])])
    grids = {name: found.base.tensors[name]}
    pair = emit(part, replace(found.base, tensors=grids, weights={}, integer=(reader.name,), **_NOTHING))
    times = profile(pair, {name: seen[name]}, replace(config, optimize="off"))
    steps = [time for key, time in times.items() if key.startswith((f"{name}_q", f"{name}_dq"))]
    return float(np.mean(steps)) / max(np.size(seen[name]), 1) if steps else 0.0
