"""Facts worth knowing that come up while data is read; they end in the dataset's provenance."""

from __future__ import annotations

_MOST = 20


class Notes:
    """Facts by topic. A fact that comes up again and again is kept once; a topic keeps its first few."""

    def __init__(self) -> None:
        self._facts: dict[str, list[str]] = {}

    def add(self, topic: str, fact: str) -> None:
        """Keep the fact beside the topic's others."""
        facts = self._facts.setdefault(topic, [])
        if fact not in facts and len(facts) < _MOST:
            facts.append(fact)

    def put(self, topic: str, fact: str) -> None:
        """Keep the fact as the topic's only one: for counts, which every pass makes anew."""
        self._facts[topic] = [fact]

    def as_dict(self) -> dict[str, str]:
        """Return one line per topic."""
        return {topic: ", ".join(facts) for topic, facts in self._facts.items()}
