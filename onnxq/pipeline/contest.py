"""The integer program proposes, measurement decides.

The program takes errors of layers for additive. They nearly are, but not at few bits, and layers with the fewest are
where its sums go wrong. So it is also asked for the best choices with at least 3, 4, ... bits everywhere, and uniform
bits join in. The network of each is built, its moments matched; the nearest to the float model wins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from onnxq.pipeline.allocate import allocate, built, errors_of
from onnxq.pipeline.calibrated import Calibrated
from onnxq.pipeline.choice import Choice
from onnxq.plan.program import Infeasible
from onnxq.runtime import Session, SessionConfig
from onnxq.tune.sensitivity import output_error
from onnxq.types import Feeds, Log, Silence
from onnxq.types.mixed import BASE, Budget, Sensitivities


def contested(
    found: Calibrated,
    known: Sensitivities,
    budgets: Sequence[Budget],
    batches: Sequence[Feeds],
    fits: Callable[[Choice], bool] = lambda choice: True,
    *,
    log: Log = Silence(),
) -> Choice:
    """The proposal whose network's outputs are nearest to the float model's.

    Args:
        found: The calibrated model.
        known: Its sensitivities.
        budgets: What every proposal keeps.
        batches: Calibration rows.
        fits: Whether a proposal may take part, beside the program's own choice. Uniform bits keep a size by this
            alone: the bytes of their file are foreseen best by writing it.
        log: Progress.

    Raises:
        Infeasible: The budgets cannot be met; says what can.
    """
    best = allocate(found, known, budgets)
    rivals = [choice for choice in proposals(found, known, budgets) if choice.bits != best.bits and fits(choice)]
    if not rivals:
        return best
    log.stage("Comparing allocations of bits")
    reference = Session(found.model, SessionConfig(stop_spinning=True))
    wanted = [reference.run(feeds) for feeds in batches]

    def error(choice: Choice) -> float:
        reached = output_error(built(choice, batches), batches, wanted, simulate=True, decisions=True)
        log.step(f"noise over signal {reached:.4g}")
        return reached

    return min([best, *rivals], key=error)


def proposals(found: Calibrated, known: Sensitivities, budgets: Sequence[Budget]) -> Iterator[Choice]:
    """Choices within the budgets, each once: no layer below some bits, and uniform but for the first and last layer."""
    errors = errors_of(known)
    widths = sorted({bits for entries in errors.values() for bits in entries if bits != BASE})
    layers = found.placement.layers
    ends = {group for group, names in found.groups.items() if {layers[0].name, layers[-1].name} & {*names}}
    unsized = [budget for budget in budgets if budget.costs.name != "size"]
    seen: list[object] = []
    for least in widths:
        uniform = {group: {BASE if group in ends else least} for group in errors}
        wider = {group: {bits for bits in entries if bits[0] >= least[0]} for group, entries in errors.items()}
        for allowed, kept in ((wider, budgets), (uniform, unsized)):
            added = {
                group: {bits: entry for bits, entry in entries.items() if bits in allowed[group]}
                for group, entries in known.added.items()
            }
            if not all(added.values()):
                continue
            try:
                choice = allocate(found, replace(known, added=added), kept)
            except Infeasible:
                continue
            if choice.bits not in seen:
                seen.append(choice.bits)
                yield choice
