"""What a mistyped name was probably meant to be."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

LEAST = 0.6
"""Share of a pattern that a name must have in common with it to be worth naming."""


def did_you_mean(word: object, known: Iterable[str]) -> str:
    """A sentence that names the nearest of `known`, with a space in front; "" where none is near.

    >>> did_you_mean("balancd", ["fast", "balanced"])
    " Did you mean 'balanced'?"
    """
    near = difflib.get_close_matches(str(word), list(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def nearest(pattern: str, names: Iterable[str], count: int = 3) -> list[str]:
    """The names that have most in common with a glob pattern, the nearest first; at most `count`, maybe none.

    >>> nearest("*/atn/*", ["/l0/conv/Conv", "/l0/attn/MatMul"])
    ['/l0/attn/MatMul']
    """
    plain = re.sub(r"[*?\[\]!]", "", pattern).lower()
    scored = [(_common(plain, name.lower()), name) for name in names] if plain else []
    return [name for score, name in sorted(scored, key=lambda pair: -pair[0]) if score >= LEAST][:count]


def _common(pattern: str, name: str) -> float:
    """How much of a pattern is in a name: in runs of two characters and more, or by likeness of the whole."""
    matcher = difflib.SequenceMatcher(None, pattern, name, autojunk=False)
    runs = sum(block.size for block in matcher.get_matching_blocks() if block.size > 1)
    return max(runs / len(pattern), matcher.ratio()) + 1e-3 * matcher.ratio()
