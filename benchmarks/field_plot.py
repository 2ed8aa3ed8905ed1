"""The rows of `field.py` as figures: how often a file agrees with the float model, against its latency.

    python benchmarks/field_plot.py FIELD.json OUT.svg [--bits W8A8] [--first-last 8]

One panel per model. Bars are 95 % intervals: Wilson's of the agreement, and that of the paired latency ratio. Needs
matplotlib, which nothing else does.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]
OURS = "onnxq-"
OUR_MARKS, LEGEND = ("D", "s", "^"), 6
TICKS = (0.25, 0.5, 1, 2, 4)
STYLE = {"svg.hashsalt": "onnxq", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9}


def points(rows: Sequence[Row], bits: str, first_last: str) -> dict[str, list[Row]]:
    """Model -> files that were scored and timed; at 8 bits the policies of the first and last layer are one."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        fits = row["bits"] == bits and (bits == "W8A8" or row["first_last"] == first_last)
        if fits and "latency" in row and row.get("score", {}).get("agreement") is not None:
            found.setdefault(row["model"], []).append(row)
    return found


def bars(row: Row) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Latency share and agreement in percent, each with the lengths of its bar below and above."""
    from onnxq.bench.stats import wilson

    latency, count = row["latency"], row["score"]["rows"]
    agreed = wilson(round(row["score"]["agreement"] * count), count)
    across = (latency["ratio"], latency["ratio"] - latency["ratio_low"], latency["ratio_high"] - latency["ratio"])
    return across, (100 * agreed.value, 100 * (agreed.value - agreed.low), 100 * (agreed.high - agreed.value))


def draw(found: Mapping[str, Sequence[Row]], path: Path) -> None:
    """One panel per model, saved as `path`."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    names = sorted({row["quantizer"] for rows in found.values() for row in rows}, key=lambda n: (OURS not in n, n))
    with mpl.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(found), figsize=(3.2 * len(found), 3.4), squeeze=False)
        for axis, (model, rows) in zip(axes[0], found.items(), strict=True):
            for row in rows:
                (x, left, right), (y, down, up) = bars(row)
                ours = row["quantizer"].startswith(OURS)
                place = names.index(row["quantizer"])
                color, marker = ("black", OUR_MARKS[place % len(OUR_MARKS)]) if ours else (f"C{place}", "o")
                axis.errorbar(
                    x, y, xerr=[[left], [right]], yerr=[[down], [up]], color=color, capsize=2, linewidth=1,
                    marker=marker, markersize=6 if ours else 4, label=row["quantizer"],
                )  # fmt: skip
            axis.axvline(1.0, color="0.7", linewidth=1, zorder=0)
            axis.set_title(model, fontsize=9)
            axis.set_xlabel("time, float = 1")
            axis.set_xscale("log")
            axis.set_xticks(TICKS, [f"{tick:g}" for tick in TICKS])
            axis.minorticks_off()
        axes[0][0].set_ylabel("same answer as the float model, %")
        marks = {label: mark for axis in axes[0] for mark, label in zip(*axis.get_legend_handles_labels(), strict=True)}
        kept = [name for name in names if name in marks]
        columns = min(len(kept), LEGEND)
        figure.legend([marks[name] for name in kept], kept, loc="lower center", ncols=columns, frameon=False)
        figure.tight_layout(rect=(0, 0.07 * -(-len(kept) // LEGEND), 1, 1))
        figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Draw one figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("field", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--bits", default="W8A8")
    parser.add_argument("--first-last", default="8", choices=["8", "same"])
    args = parser.parse_args()
    stored = json.loads(args.field.read_text(encoding="utf-8"))
    found = points(stored["rows"], args.bits, args.first_last)
    if not found:
        raise SystemExit(f"{args.field} has no timed files of {args.bits}: run field.py without --seconds 0.")
    draw(found, args.out)


if __name__ == "__main__":
    main()
