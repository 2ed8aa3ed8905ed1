"""The rows of `field.py` as markdown: a table per bits and policy, the failures, and where a rival leads onnxq."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
OURS = "onnxq-"
HEAD = (
    "model | quantizer | metric | agreement % | SQNR dB | KB | size | int/float kernels | latency | its 95 % interval "
    "| wall s | CPU s | peak MB"
)
CONFIDENCE = 1.96


def markdown(rows: Sequence[Row]) -> str:
    """All tables; the policies of the first and last layer are never in one."""
    floats = {(row["model"], row["limit"]): row for row in rows if row["quantizer"] == "float"}
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row["quantizer"] != "float":
            key = (row["bits"], row["first_last"], row["samples"], row["limit"])
            groups.setdefault(key, []).append(row)
    return "\n".join(_table(key, groups[key], floats) for key in sorted(groups, key=_order))


def _order(key: tuple[Any, ...]) -> tuple[int, int, str, int, int]:
    bits, policy, samples, limit = key
    return -int(bits[1]), -int(bits[3]), policy, samples, limit or 0


def _table(key: tuple[Any, ...], rows: Sequence[Row], floats: Mapping[tuple[str, int | None], Row]) -> str:
    bits, policy, samples, limit = key
    ends = "" if bits == "W8A8" else f", first and last layer {'as the others' if policy == 'same' else 'at 8 bits'}"
    scored = f"the first {limit} evaluation rows" if limit else "all evaluation rows"
    lines = [f"### {bits}{ends}", "", f"{samples} calibration rows, {scored}.", ""]
    lines += [_line(HEAD.split(" | ")), _line(["---"] * len(HEAD.split(" | ")))]
    models = dict.fromkeys(row["model"] for row in rows)
    for model in models:
        before = floats.get((model, limit))
        if before:
            lines.append(_line(_cells(before, before)))
        here = sorted((row for row in rows if row["model"] == model), key=_place)
        lines += [_line(_cells(row, before)) for row in here]
    failures = [f"- {row['model']}, {row['quantizer']}: {row['message']}" for row in rows if row["message"]]
    ahead = [f"- {row['model']}, {lead}" for model in models for row, lead in leads(_of(rows, model))]
    for title, notes in (("Messages", failures), ("Ahead of onnxq by more than the noise", ahead)):
        lines += ["", f"{title}:", "", *notes] if notes else []
    return "\n".join([*lines, ""])


def _place(row: Row) -> tuple[bool, str]:
    """The order in a table: onnxq's first, then by name."""
    return not row["quantizer"].startswith(OURS), row["quantizer"]


def _of(rows: Iterable[Row], model: str) -> list[Row]:
    return [row for row in rows if row["model"] == model and row["status"] == "ok"]


def leads(rows: Sequence[Row]) -> list[tuple[Row, str]]:
    """Where a rival is ahead of the best of onnxq's files of one model, in words.

    The metric, where it is a share of right rows, and agreement count with 95 % confidence; two files can differ only
    in rows where one of them differs from the float model, which bounds the variance. Latency counts where the
    intervals do not overlap. Size is what it is.
    """
    ours = [row for row in rows if row["quantizer"].startswith(OURS)]
    found = []
    for row in rows if ours else []:
        if row in ours:
            continue
        for key, what in (("value", "metric"), ("agreement", "agreement")):
            best = max(ours, key=lambda one: one["score"][key] or 0)
            gain, noise = (row["score"][key] or 0) - (best["score"][key] or 0), _noise(row, best)
            if gain > noise:
                found.append((row, f"{row['quantizer']}: {what} {100 * gain:+.2f} +- {100 * noise:.2f} points"))
        timed = [one for one in ours if "latency" in one]
        if timed and "latency" in row:
            fastest = min(timed, key=lambda one: one["latency"]["ratio"])
            if row["latency"]["ratio_high"] < fastest["latency"]["ratio_low"]:
                ratios = f"{row['latency']['ratio']:.2f} against {fastest['latency']['ratio']:.2f}"
                found.append((row, f"{row['quantizer']}: latency {ratios}"))
    return found


def _noise(one: Row, other: Row) -> float:
    shares = [1 - row["score"]["agreement"] for row in (one, other) if row["score"]["agreement"] is not None]
    return CONFIDENCE * float((sum(shares) / one["score"]["rows"]) ** 0.5)


def _cells(row: Row, before: Row | None) -> list[str]:
    score, cost, latency = row.get("score") or {}, row.get("cost") or {}, row.get("latency") or {}
    size = row.get("bytes")
    share = size / before["bytes"] if size and before and before.get("bytes") else None
    kernels = row.get("kernels")
    both = "/".join(str(sum(group.values())) for group in kernels.values()) if kernels else "-"
    interval = f"{latency['ratio_low']:.2f}-{latency['ratio_high']:.2f}" if latency else "-"
    return [
        row["model"],
        row["quantizer"] if row["status"] == "ok" else f"{row['quantizer']} ({row['status']})",
        _number(score.get("value"), 2, 100),
        _number(score.get("agreement"), 1, 100),
        _number(None if row is before else score.get("sqnr_db"), 1),
        _number(size, 0, 1 / 1024),
        _number(share, 2),
        both,
        _number(latency.get("ratio"), 2),
        interval,
        _number(cost.get("wall_s"), 0),
        _number(cost.get("cpu_s"), 0),
        _number(cost.get("peak_mb"), 0),
    ]


def _number(value: float | None, digits: int, factor: float = 1) -> str:
    return "-" if value is None else f"{factor * value:.{digits}f}"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
