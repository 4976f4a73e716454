"""Two result files compared: which ratios fell, beyond 10% and beyond the noise.

The noise of a median is (max - min) / median / sqrt(runs): for seven runs about twice the standard error that their
range suggests. The noise of a change is the root of the sum of squares over the four medians that it rests on, ours and
the peer's in both files. A ratio fell if even raised by the noise it stays below 90% of the old one:

    new * (1 + noise) < 0.9 * old
"""

import math
from typing import Any

from report import times

ALLOWED = 0.10


def compare(new: dict[str, Any], old: dict[str, Any]) -> tuple[list[str], int, int]:
    """Lines to print, how many ratios could be compared and how many of them fell; a failed gate counts as fallen.

    new, old: result files as read. Cases are matched by name; those that only one file has are not compared.
    """
    lines, compared, fallen = [], 0, 0
    if new["device"] != old["device"]:
        lines.append(f"against: measured on another device ({old['device']}), ratios may differ for that alone")
    before = {case["case"]: case for case in old["cases"]}
    for case in new["cases"]:
        if case["check"].startswith("failed"):
            lines.append(f"{case['case']}: {case['check']}")
            compared, fallen = compared + 1, fallen + 1
            continue
        for peer, was in before.get(case["case"], {"ratio": {}})["ratio"].items():
            if was is None:
                continue
            now = case["ratio"].get(peer)
            if now is None:
                lines.append(f"{case['case']}: {peer}: was {times(was)}, now not measured ({_why_not(case, peer)})")
                continue
            noise = change_noise(case, before[case["case"]], peer)
            fell = now * (1 + noise) < (1 - ALLOWED) * was
            compared, fallen = compared + 1, fallen + fell
            word = "FELL" if fell else "held"
            lines.append(f"{case['case']}: {peer}: {times(was)} -> {times(now)}, noise {noise:.0%}: {word}")
    return lines, compared, fallen


def change_noise(new: dict[str, Any], old: dict[str, Any], peer: str) -> float:
    """Relative noise of the change of one case's ratio to a peer between two files."""
    of = new.get("ratio_of", "seconds")
    rows = [_find(case, name) for case in (new, old) for name in (case["ours"], peer)]
    return math.sqrt(sum(median_noise(row, of) ** 2 for row in rows))


def median_noise(row: dict[str, Any], of: str = "seconds") -> float:
    """Relative noise of one contestant's median, of its seconds or its passes; 0 for a given figure."""
    if not row["runs"]:
        return 0.0
    least, median, most = (row[f"{word}_s"] if of == "seconds" else row[of][word] for word in ("min", "median", "max"))
    return (most - least) / median / math.sqrt(row["runs"])


def _why_not(case: dict[str, Any], peer: str) -> str:
    if case["check"] != "ok":
        return case["check"]
    names = [row["name"] for row in case["contestants"]]
    return _find(case, peer).get("missing", "ours is missing") if peer in names else "not a peer any more"


def _find(case: dict[str, Any], name: str) -> dict[str, Any]:
    return next(row for row in case["contestants"] if row["name"] == name)
