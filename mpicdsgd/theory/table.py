"""The figures of `report.py` as text."""

from __future__ import annotations

from typing import Any


def table(report: dict[str, Any]) -> str:
    """The report: the run, its constants, and a line for each bound."""
    one = report["spectrum"]
    alpha = report["alpha"]
    if alpha is None:
        steps = "step sizes not known"
    elif alpha[0] == alpha[1]:
        steps = f"alpha {alpha[0]:g}"
    else:
        steps = f"alpha {alpha[0]:g} to {alpha[1]:g}"
    rounds = f", {one['rounds']} mixing rounds a step" if one["rounds"] > 1 else ""
    lines = [
        f"{report['run']}: {report['optim']}, {report['agents']} agents, "
        f"{report['parameters']} parameters, {steps}",
        f"mixing {report['mixing']}{rounds}: lambda_2 {one['lambda_2']:.6f}, lambda_N "
        f"{one['lambda_n'] + 0.0:.6f}, gap {one['gap']:.6f}; trace: {report['trace']}",
        *_distance(report),
        *_constants(report),
        "",
        *_verdicts(report["verdicts"]),
    ]
    return "\n".join(lines)


def _distance(report: dict[str, Any]) -> list[str]:
    found = report["consensus"]
    if not isinstance(found, dict):
        return []
    return [
        f"consensus distance at step {report['step']}: {_number(found.get('max'))} of the farthest "
        f"agent, {_number(found.get('rms'))} root mean square"
    ]


def _constants(report: dict[str, Any]) -> list[str]:
    found = dict(report["constants"] or {})
    places = found.pop("places", [])
    agents = found.pop("agents", [])
    found.pop("Q_V", None)
    if report["L"] is not None:
        found["L"] = report["L"]
    lines = [f"constants, measured at: {', '.join(places)}" if places else "constants:"]
    for name, one in found.items():
        error = "" if one["uncertainty"] is None else f" +- {_number(one['uncertainty'])}"
        lines.append(f"  {name:8} {_number(one['value'])}{error}  ({one['how']})")
    kinds = sorted({one["kind"] for one in agents})
    if kinds:
        gammas = [_number(one["gamma"]["value"]) for one in agents]
        most = 8
        rest = ", ..." if len(gammas) > most else ""
        lines.append(f"  gamma_j  {', '.join(gammas[:most])}{rest}  ({', '.join(kinds)}; Q_V = 0)")
    return lines


def _verdicts(verdicts: list[dict[str, Any]]) -> list[str]:
    """A line each; what is to be known of several stands once, below, by its number."""
    rows = [["", "", "step", "measured", "bound", "factor", "verdict"]]
    notes: dict[str, int] = {}
    for one in verdicts:
        number = notes.setdefault(one["detail"], len(notes) + 1) if one["detail"] else 0
        applies = one["verdict"] != "not applicable"
        rows.append(
            [
                one["bound"],
                one["version"],
                "" if one["step"] is None else str(one["step"]),
                _number(one["measured"]),
                _number(one["limit"]),
                _number(one["factor"]),
                (one["text"] if applies else one["verdict"]) + (f" [{number}]" if number else ""),
            ]
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row[:-1], widths, strict=True))
        ]
        lines.append("  ".join([*cells, row[-1]]).rstrip())
    return [*lines, *(f"[{number}] {note}" for note, number in notes.items())]


def _number(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else f"{value:.4g}"
