"""The figures of `graph_report.py` as text: one graph in detail, several in one table."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mpicdsgd.cli.graph_report import Report
from mpicdsgd.common.text import agents_in_words

NOT_COVERED = "not covered by the paper's theorems"


def details(one: Report) -> str:
    """One report as text."""
    low, high = one["degree_min"], one["degree_max"]
    lines = [
        f"{one['spec']}: {agents_in_words(one['agents'])}, {one['edges']} "
        f"{'directed ' if one['directed'] else ''}edges, degree "
        f"{low if low == high else f'{low} to {high}'}, diameter {one['diameter']}",
        f"mixing {one['mixing']}: lambda_2 {_eigenvalue(one['lambda_2'])}, lambda_N "
        f"{_eigenvalue(one['lambda_n'])}, gap {one['gap']:.6f}",
    ]
    if one["turns"] > 1:
        lines.append(
            f"  these are the moduli of the product of {one['turns']} matrices used in turn; "
            f"gap per turn {one['gap_per_turn']:.6f}"
        )
    mean, most = one["messages_per_step"], one["messages_max"]
    sends = f"{mean:.4g} message{'' if mean == 1 else 's'}" + (
        "" if most == mean else f" (at most {most:.4g})"
    )
    if one["bytes_per_step"] is not None:
        sends += f", {size_of(one['bytes_per_step'])}"
    lines.append(f"  disagreement falls to 1/10 in {_number(one['steps_to_mix'], 'never')} steps")
    lines.append(
        f"  an agent sends {sends} in a step; gap per message {_number(one['gap_per_message'])}"
    )
    lines += _theory_lines(one)
    lines += [
        f"  {'holds' if c['holds'] else 'FAILS'}  {c['condition']}: {c['detail']}"
        for c in one["assumption_2"]
    ]
    lines += [f"  note: {remark}" for remark in one["remarks"]]
    return "\n".join(lines)


def _theory_lines(one: Report) -> list[str]:
    steps, radius = "largest_step_14" in one, "consensus_radius_printed" in one
    if not one["covered"]:
        asked = [("step sizes", steps), ("consensus radius", radius)]
        return [f"  {what}: {NOT_COVERED}" for what, wanted in asked if wanted]
    lines = []
    if steps:
        own, lazy = (
            f"by (14) {_number(one[f'{kind}largest_step_14'], 'none')}, "
            f"by (15) {_number(one[f'{kind}largest_step_15'], 'none')}"
            for kind in ("", "lazy_")
        )
        lines.append(f"  largest step size {own}; the lazy matrix (I + Pi)/2 admits {lazy}")
    if radius:
        lines.append(
            f"  consensus radius (Proposition 1): {one['consensus_radius_printed']:.4g} as "
            f"printed, {one['consensus_radius_corrected']:.4g} corrected"
        )
    return lines


def size_of(size_bytes: float) -> str:
    """So many bytes, in the unit that suits them."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size_bytes >= scale:
            return f"{size_bytes / scale:.4g} {unit}"
    return f"{size_bytes:.4g} bytes"


def _number(value: float | None, without: str = "-") -> str:
    return without if value is None else f"{value:.4g}"


def _eigenvalue(value: float) -> str:
    """With no sign before a zero that rounding left."""
    return f"{round(value, 6) + 0.0:.6f}"


def _degree(one: Report) -> str:
    low, high = one["degree_min"], one["degree_max"]
    return f"{high}" if low == high else f"{low} to {high}"


def _admitted(key: str) -> Callable[[Report], str]:
    return lambda one: _number(one[key], "none") if one["covered"] else "*"


def _radius(key: str) -> Callable[[Report], str]:
    return lambda one: _number(one[key], "*")


def table(reports: Sequence[Report]) -> str:
    """Several reports as text, a line each."""
    first = reports[0]
    columns: list[tuple[str, Callable[[Report], str]]] = [
        ("spec", lambda one: str(one["spec"])),
        ("agents", lambda one: str(one["agents"])),
        ("mixing", lambda one: str(one["mixing"])),
        ("degree", _degree),
        ("diameter", lambda one: str(one["diameter"])),
        ("lambda_2", lambda one: _eigenvalue(one["lambda_2"])),
        ("lambda_N", lambda one: _eigenvalue(one["lambda_n"])),
        ("gap", lambda one: f"{one['gap_per_turn']:.6f}"),
        ("steps to 1/10", lambda one: _number(one["steps_to_mix"], "never")),
        ("messages", lambda one: f"{one['messages_per_step']:.4g}"),
    ]
    if first["bytes_per_step"] is not None:
        columns.append(("sent per step", lambda one: size_of(one["bytes_per_step"])))
    columns.append(("gap per message", lambda one: _number(one["gap_per_message"])))
    if "largest_step_14" in first:
        columns += [
            ("step (14)", _admitted("largest_step_14")),
            ("step (15)", _admitted("largest_step_15")),
            ("lazy (14)", _admitted("lazy_largest_step_14")),
            ("lazy (15)", _admitted("lazy_largest_step_15")),
        ]
    if "consensus_radius_printed" in first:
        columns += [
            ("radius", _radius("consensus_radius_corrected")),
            ("as printed", _radius("consensus_radius_printed")),
        ]
    rows = [[name for name, _ in columns], *([show(one) for _, show in columns] for one in reports)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
    lines = []
    for row in rows:
        # Names to the left, numbers to the right.
        cells = [
            cell.ljust(width) if columns[i][0] in ("spec", "mixing") else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    if any(one["turns"] > 1 for one in reports):
        lines.append(
            "of a cycle, lambda_2 and lambda_N are the moduli of its product; the gap is per turn"
        )
    asked = "largest_step_14" in first or "consensus_radius_printed" in first
    if asked and not all(one["covered"] for one in reports):
        lines.append(f"* {NOT_COVERED}")
    return "\n".join(lines)
