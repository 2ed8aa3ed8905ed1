"""What rewriting a float graph gave."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Applied:
    """What one pass did.

    Attributes:
        name: The pass.
        count: Rewrites made.
        refused: Node name -> why it was left as it is.
        gap: Largest change of any output over all passes, relative to the output's range; None when not
            measured.
    """

    name: str
    count: int
    refused: Mapping[str, str]
    gap: float | None = None


@dataclass(frozen=True)
class Rewriting:
    """One run of `reparam`, as reports show it.

    Attributes:
        source: The file rewritten.
        output: The file written.
        nodes_before: Nodes of the graph as loaded.
        nodes_after: Nodes of the result.
        gap: Largest difference of any output on the probe, relative to the output's range; None when not measured.
        passes: What each pass did, in order.
        simplified: None, or why simplification was left out.
    """

    source: str
    output: str
    nodes_before: int
    nodes_after: int
    gap: float | None
    passes: tuple[Applied, ...]
    simplified: str | None = None
