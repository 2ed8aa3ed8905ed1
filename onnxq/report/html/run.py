"""The report of one run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

from onnxq.report import words
from onnxq.report.document import quantize_document, to_json
from onnxq.report.html.bits import front_section, sensitivity_section
from onnxq.report.html.layers import bits, layers_section, map_section, worst
from onnxq.report.html.markup import Html, page, section, tag
from onnxq.report.html.outliers import outliers_section
from onnxq.report.html.tuning import float_section, rewrites_section, tuning_section
from onnxq.report.html.verdict import headline, verdict_section
from onnxq.types import Summary
from onnxq.types.details import Details
from onnxq.version import __version__


def html_report(summary: Summary, details: Details, *, command: str = "") -> str:
    """One run as a self-contained HTML document.

    Args:
        summary: The run.
        details: Its layers and tensors.
        command: What to type to get the same file again; left out where it is empty.

    Returns:
        The document. Names of nodes, tensors and files are escaped; nothing is loaded from anywhere. It holds what
        `quantize_document` gives, too, so that reports can be compared.
    """
    coverage = summary.verdict.coverage if summary.verdict is not None else None
    parts = [
        ("verdict", "Verdict", verdict_section(summary)),
        ("map", "Map", map_section(details)),
        ("worst", "Largest errors", _worst_section(details)),
        ("layers", "Layers", layers_section(details, coverage)),
        ("outliers", "Outliers", outliers_section(details)),
        ("float", "Float", float_section(summary)),
        ("tuning", "Tuning", tuning_section(summary)),
        ("sensitivity", "Sensitivity", sensitivity_section(details)),
        ("front", "Size against error", front_section(details)),
        ("rewrites", "Rewrites", rewrites_section(details.passes)),
        ("again", "Reproduce", _again_section(summary, details, command)),
    ]
    document = to_json(quantize_document(summary))
    return page(f"{_file(summary)} - onnxq", headline(summary), parts, f"Made by onnxq {__version__}.", document)


def _file(summary: Summary) -> str:
    return (summary.output or summary.source).replace("\\", "/").rsplit("/", 1)[-1]


def _worst_section(details: Details) -> Html:
    """Where to look first."""
    items = [
        tag(
            "li",
            tag("a", layer.name, href=f"#layer-{index}"),
            f": {words.decibels(layer.sqnr_db)} at {bits(layer)}",
            _blame(layer.name, details),
        )
        for index, layer in worst(details.layers)
    ]
    said = tag("p", "The layers behind which the quantized network is furthest from the float one.")
    return section("worst", "Largest errors", said, tag("ol", items)) if items else Html()


def _blame(name: str, details: Details) -> str:
    """Which grid of a layer costs most by itself."""
    layer = next(layer for layer in details.layers if layer.name == name)
    source = details.tensors.get(layer.source)
    costs = {
        "its weights": layer.weight.sqnr_db if layer.weight is not None else None,
        "its input": source.sqnr_db if source is not None else None,
    }
    known = {what: cost for what, cost in costs.items() if cost is not None}
    if not known:
        return ""
    what = min(known, key=lambda key: known[key])
    return f"; rounding {what} alone leaves {words.decibels(known[what])}"


def _again_section(summary: Summary, details: Details, command: str) -> Html:
    """Everything that another run needs to give the same file."""
    typed = (tag("h3", "Command"), tag("pre", tag("code", command), tabindex=0)) if command else ()
    recipe = "\n".join(f"{key} = {_toml(value)}" for key, value in summary.recipe.items())
    data = {"rows that calibrated": summary.rows, **summary.data}
    return section(
        "again",
        "Reproduce",
        typed,
        tag("h3", "Recipe"),
        tag("p", "Saved as a .toml file, it is what --recipe takes."),
        tag("pre", tag("code", recipe), tabindex=0),
        tag("h3", "Data"),
        _listed(data),
        tag("h3", "Versions"),
        _listed({"file": summary.output or "not written", **details.versions}),
        tag("p", f"The run took {summary.seconds:.1f} s.") if summary.seconds else None,
    )


def _listed(values: Mapping[str, object]) -> Html:
    return tag("dl", ((tag("dt", key), tag("dd", text)) for key, text in _flat(values)))


def _flat(values: Mapping[str, object], above: str = "") -> Iterator[tuple[str, str]]:
    """Nested mappings as one list of dotted names."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{key}.")
        elif value is not None:
            yield f"{above}{key}", ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _toml(value: object) -> str:
    """A recipe's value as TOML, which is JSON for all of them."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(str(key))} = {_toml(entry)}" for key, entry in value.items()) + "}"
    return json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False, default=str)
