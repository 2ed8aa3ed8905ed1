"""The network as a map and as a table: bits, bytes, errors and histograms of every layer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import groupby

from onnxq.report import words
from onnxq.report.html import charts
from onnxq.report.html.flow import flow_map
from onnxq.report.html.markup import Html, section, tag
from onnxq.types import Coverage
from onnxq.types.details import Details, LayerDetail, TensorDetail, WeightDetail

OUTLIER = 4.0
"""A weight channel this much wider than the median one is named."""
COLUMNS = (
    ("Layer", "index"),
    ("Bits", "bits"),
    ("Weight", "size"),
    ("Bytes", "bytes"),
    ("SQNR", "sqnr"),
    ("Work", "macs"),
    ("Runs in", None),
)
"""Headings, and what each sorts by."""


def map_section(details: Details) -> Html:
    """Layers in graph order, stage by stage, coloured by error."""
    if not details.layers:
        return Html()
    numbered = list(enumerate(details.layers))
    stages = [
        tag("li", tag("span.stage", f"stage {stage}"), tag("ol", (_cell(index, layer) for index, layer in group)))
        for stage, group in groupby(numbered, key=lambda entry: entry[1].stage)
    ]
    names = ("below 10 dB", "10 to 20", "20 to 30", "30 to 40", "40 dB and more")
    legend = [tag("li", tag(f"span.swatch.d{index}"), name) for index, name in enumerate(names)]
    legend.append(tag("li", tag("span.swatch.float"), "float"))
    words_about = (
        f"Each box is a layer with its weight and input bits and the SQNR behind it, on "
        f"{words.times(details.rows, 'held-out row', 'held-out rows')}, in the order in which they run. "
        "What earlier layers lost is part of it. A stage is a chain of blocks of one resolution."
    )
    boxes = (tag("ol.map", stages), tag("ul.legend", legend))
    return section("map", "Map", tag("p", words_about), boxes, flow_map(details))


def _cell(index: int, layer: LayerDetail) -> Html:
    kind = f"d.{charts.level(layer.sqnr_db)}" if layer.integer else "float"
    label = f"{layer.name}: {bits(layer)}, {words.decibels(layer.sqnr_db)}"
    return tag(
        "li",
        tag(
            f"a.cell.{kind}",
            tag("b", layer.op_type),
            tag("span", _short(layer)),
            tag("span", _brief(layer.sqnr_db)),
            href=f"#layer-{index}",
            title=label,
            aria_label=label,
        ),
    )


def _short(layer: LayerDetail) -> str:
    return f"{layer.weight_bits}/{layer.input_bits}" if layer.integer else "float"


def _brief(sqnr_db: float | None) -> str:
    return "\N{EN DASH}" if sqnr_db is None else words.decibels(sqnr_db)


def bits(layer: LayerDetail) -> str:
    """Bits as people write them."""
    if not layer.integer:
        return "float"
    return f"A{layer.input_bits}" if layer.weight is None else f"W{layer.weight_bits} A{layer.input_bits}"


def layers_section(details: Details, coverage: Coverage | None) -> Html:
    """The table; each layer opens to its histograms."""
    if not details.layers:
        return Html()
    refused = {node.name: node.reason for node in coverage.floats} if coverage is not None else {}
    total = sum(layer.macs for layer in details.layers)
    head = tag("thead", tag("tr", (tag("th", name, scope="col", data_sort=key) for name, key in COLUMNS)))
    caption = "Layers in graph order"
    bodies = [_body(index, layer, details, total, refused) for index, layer in enumerate(details.layers)]
    whole = tag(
        "div.scroll",
        tag("table.layers", tag("caption", caption), head, bodies),
        role="region",
        tabindex=0,
        aria_label=caption,
    )
    explained = (
        "SQNR compares the tensor behind each layer in the whole quantized network with the float one; the bar is full "
        f"at {charts.BEST_DB:.0f} dB. Open a layer for its weights, codes and input."
    )
    return section("layers", "Layers", tag("p", explained), whole)


def _body(index: int, layer: LayerDetail, details: Details, total: int, refused: dict[str, str]) -> Html:
    where = layer.reason and f"float: {layer.reason}"
    if layer.integer:
        missed = layer.name in refused
        where = f"float, though planned in integers: {refused[layer.name]}" if missed else "integers"
    count = math.prod(layer.shape) if layer.shape else 0
    stored = (
        f"{words.size(layer.float_bytes)} to {words.size(layer.stored_bytes)}"
        if layer.integer
        else words.size(layer.float_bytes)
    )
    finite = layer.sqnr_db is not None and math.isfinite(layer.sqnr_db)
    part = layer.macs / total if total else 0.0
    row = tag(
        "tr",
        tag(
            "th",
            tag("span.name", layer.name),
            tag("span.sub", f"{layer.op_type} in {layer.block}"),
            scope="row",
            data_index=index,
        ),
        tag(
            "td",
            tag(f"span.chip.{'int' if layer.integer else 'float'}", bits(layer)),
            tag("span.sub", "tuned") if layer.tuned else None,
            data_label="Bits",
            data_bits=layer.weight_bits,
        ),
        tag("td", words.shape(layer.shape) or "\N{EN DASH}", data_label="Weight", data_size=count),
        tag("td", stored if layer.shape else "\N{EN DASH}", data_label="Bytes", data_bytes=layer.stored_bytes),
        tag("td", charts.bar(layer.sqnr_db), data_label="SQNR", data_sqnr=layer.sqnr_db if finite else ""),
        tag(
            "td",
            words.percent(part),
            tag("span.sub", f"{words.millions(layer.macs)} MACs"),
            data_label="Work",
            data_macs=layer.macs,
        ),
        tag("td", where, data_label="Runs in"),
    )
    pictures = list(_pictures(layer, details.tensors.get(layer.source)))
    summary = tag("summary", "Histograms", tag("span.unseen", f" of {layer.name}"))
    opened = tag("details", summary, tag("div.figures", pictures))
    more = tag("tr.more", tag("td", opened, colspan=len(COLUMNS))) if pictures else None
    return tag("tbody", row, more, id=f"layer-{index}", data_name=layer.name)


def _pictures(layer: LayerDetail, source: TensorDetail | None) -> Iterator[Html]:
    if layer.weight is not None:
        yield from _weight_pictures(layer.weight)
    if source is not None and layer.integer:
        yield tensor_picture(layer.source, source)


def _weight_pictures(weight: WeightDetail) -> Iterator[Html]:
    wide = (
        f"; channel {weight.widest} is {weight.spread:.1f}x as wide as the median one"
        if weight.spread >= OUTLIER
        else ""
    )
    grid = "" if weight.clip is None else f"widest grid \N{PLUS-MINUS SIGN}{words.number(weight.clip[1])}, "
    alone = "stays in float" if weight.sqnr_db is None else f"SQNR of rounding alone {words.decibels(weight.sqnr_db)}"
    yield charts.histogram(weight.values, "Weights", f"{grid}{alone}{wide}", weight.clip)
    if weight.codes is not None:
        used = sum(1 for count in weight.codes.counts if count)
        per = round((weight.codes.high - weight.codes.low) / len(weight.codes.counts))
        unit = "codes" if per == 1 else f"bins of {per} codes"
        yield charts.histogram(weight.codes, "Codes", f"{used} of {len(weight.codes.counts)} {unit} occur")


def tensor_picture(name: str, tensor: TensorDetail) -> Html:
    """The histogram of an activation with its chosen range."""
    ends, seen = (
        f"{words.number(low)} to {words.number(high)}" for low, high in (tensor.clip, (tensor.low, tensor.high))
    )
    clipped = words.percent(tensor.clipped, 3) if tensor.clipped else "none"
    caption = (
        f"{name}: range {ends} ({tensor.rule or 'given'}), seen {seen}; {clipped} of the values clipped; "
        f"SQNR of rounding alone {words.decibels(tensor.sqnr_db)}"
    )
    return charts.histogram(tensor.values, f"Input, {tensor.bits} bits", caption, tensor.clip)


def worst(layers: Sequence[LayerDetail], count: int = 3) -> list[tuple[int, LayerDetail]]:
    """Layers with the lowest SQNR, worst first, with their place in the graph."""
    known = [(index, layer) for index, layer in enumerate(layers) if layer.sqnr_db is not None and layer.integer]
    return sorted(known, key=lambda entry: entry[1].sqnr_db or 0.0)[:count]
