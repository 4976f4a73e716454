"""Result files for people: a table in text, an HTML page, a plot."""

import html
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLUE, GREY, RED = "#4477aa", "#aab4be", "#cc3311"
COLUMNS = ("contestant", "median", "min", "max", "runs", "peak", "ratio", "goal")


def text_of(case: dict[str, Any]) -> str:
    """One measured case as a table of text."""
    head = f"{case['case']}: {case['size']}"
    if case["check"] != "ok":
        return f"{head}\n  {case['check']}\n"
    rows = [COLUMNS, *table(case)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    lines = ["  " + "  ".join(_align(i, word, widths[i]) for i, word in enumerate(row)).rstrip() for row in rows]
    checked = f"  {case['threads']} thread{'s' * (case['threads'] != 1)}; gate: {case['checked']}"
    return "\n".join([head, checked, *lines, *notes(case)]) + "\n"


def table(case: dict[str, Any]) -> list[tuple[str, ...]]:
    """Words for each contestant, as COLUMNS names them."""
    found = []
    for row in case["contestants"]:
        name, missing = row["name"], row.get("missing")
        ratio, goal = case["ratio"].get(name), case["goal"].get(name)
        verdict = "" if goal is None else f">= {goal:g}"
        if goal is not None and ratio is not None:
            verdict += " met" if ratio >= goal else " missed"
        keys = ("median_s", "min_s", "max_s")
        words = [f"missing: {missing}"] if missing else [seconds(row[key]) for key in keys]
        ratio_word = "ours" if name == case["ours"] else "" if ratio is None else times(ratio)
        peak = "" if row["peak_bytes"] is None else mebibytes(row["peak_bytes"])
        words += [""] * (3 - len(words))
        found.append((name, *words, str(row["runs"] or ""), peak, ratio_word, verdict))
    return found


def notes(case: dict[str, Any]) -> list[str]:
    """What the table cannot hold: scaled and given times, memory beyond inputs and outputs, and the floor."""
    lines, scaled = [], {}
    for row in case["contestants"]:
        if "scaled_from" in row:
            how = f"{row['scaled_from']} codes a run, {row.get('sampled', 'spread over the grid')}, scaled up to all"
            scaled.setdefault(how, []).append(row["name"])
    lines += [f"  {', '.join(names)}: {how}" for how, names in scaled.items()]
    for row in case["contestants"]:
        if row.get("given"):
            lines.append(f"  {row['name']}: a given time, not a program's")
    for row in case["contestants"]:
        if "fastest" in row:
            lines.append(f"  {row['name']}: the fastest of {', '.join(row['best_of'])}; here {row['fastest']}")
    ours = next(row for row in case["contestants"] if row["name"] == case["ours"])
    if counted := [row for row in case["contestants"] if row.get("passes")]:
        told = [f"{row['name']} {row['passes']['median']:,.0f}{_settled(row)}" for row in counted]
        lines.append(f"  sequential evaluations (codes settled by each): {', '.join(told)}")
    if case.get("ratio_of") == "passes":
        lines.append(f"  ratio and goal are of evaluations; in time {_in_time(case, ours)}")
    limit, extra = case.get("extra_limit_bytes"), ours.get("extra_bytes")
    if limit and extra is not None:
        verdict = "met" if extra <= limit else "missed"
        lines.append(f"  memory beyond inputs and outputs: {mebibytes(extra)} of at most {mebibytes(limit)}, {verdict}")
    if case["floor_s"] and ours["median_s"]:
        share = case["floor_s"] / ours["median_s"]
        counted = f" ({case['floor_from']})" if case.get("floor_from") else ""
        lines.append(f"  floor {seconds(case['floor_s'])}{counted}: {case['ours']} reaches {share:.3g} of it")
    return lines


def _settled(row: dict[str, Any]) -> str:
    return f" ({row['codes_per_pass']:.3g})" if row.get("codes_per_pass") else ""


def _in_time(case: dict[str, Any], ours: dict[str, Any]) -> str:
    known = [row for row in case["contestants"] if row["name"] in case["ratio"] and row["median_s"]]
    return ", ".join(f"{row['name']} {times(row['median_s'] / ours['median_s'])}" for row in known if ours["median_s"])


def mebibytes(count: int) -> str:
    """A number of bytes in MiB."""
    return f"{count / 2**20:.1f} MiB"


def seconds(value: float) -> str:
    """A time in the unit that suits it."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if value >= size:
            return f"{value / size:.3g} {unit}" if value / size < 1000 else f"{value / size:.0f} {unit}"
    return f"{value * 1e6:.3g} us"


def times(ratio: float) -> str:
    """A ratio with three digits, or all of those before the point."""
    return f"{ratio:,.0f}x" if ratio >= 1000 else f"{ratio:.3g}x"


def write_html(results: dict[str, Any], path: Path) -> None:
    """A page that stands alone: every case's table, with a bar for each contestant's time on a log scale."""
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    parts = [f"<h1>fastvid benchmark</h1><p>{html.escape(results['device'])}; {html.escape(versions)}</p>"]
    for case in results["cases"]:
        parts.append(f"<h2>{html.escape(case['case'])}</h2><p>{html.escape(case['size'])}</p>")
        if case["check"] != "ok":
            parts.append(f"<p>{html.escape(case['check'])}</p>")
            continue
        head = "".join(f"<th>{word}</th>" for word in (*COLUMNS, ""))
        rows = "".join(
            "<tr>" + "".join(f"<td>{html.escape(word)}</td>" for word in words) + f"<td>{bar}</td></tr>"
            for words, bar in zip(table(case), _bars(case), strict=True)
        )
        told = "".join(f"<p>{html.escape(note.strip())}</p>" for note in [case["checked"], *notes(case)])
        parts.append(f"<table><tr>{head}</tr>{rows}</table>{told}")
    style = (
        "body{font:15px sans-serif;margin:2em}td,th{padding:.2em .8em;text-align:right}td:first-child{text-align:left}"
        "i{display:block;height:.8em;background:#47a}"
    )
    head = f'<!doctype html><meta charset="utf-8"><title>fastvid benchmark</title><style>{style}</style>'
    path.write_text(head + "".join(parts) + "\n", encoding="utf-8")


def _bars(case: dict[str, Any]) -> list[str]:
    medians = [row["median_s"] for row in case["contestants"]]
    least = min((median for median in medians if median), default=1.0)
    widths = [40 + 80 * math.log10(median / least) if median else 0 for median in medians]
    return [f'<i style="width:{width:.0f}px"></i>' if width else "" for width in widths]


def write_plot(results: dict[str, Any], path: Path) -> None:
    """A PNG with the ratio to each peer on a log scale, goals as ticks. Raises ImportError without matplotlib."""
    from matplotlib.figure import Figure

    lines = list(_lines(results))
    figure = Figure(figsize=(9, 1.3 + 0.32 * max(3, len(lines))), layout="constrained")
    axes = figure.add_subplot()
    values = [value for _, ratio, goal in lines for value in (ratio, goal) if value is not None] + [1.0]
    least, most = min(values) / 2.5, max(values) * 2.5  # room for the figures beside the bars
    for i, (_, ratio, goal) in enumerate(lines):
        if ratio is None:
            continue
        met = goal is None or ratio >= goal
        axes.barh(i, ratio - 1, left=1, height=0.72, color=BLUE if met else GREY)  # from 1, where both are equally fast
        side = {"ha": "left", "xytext": (4, 0)} if ratio >= 1 else {"ha": "right", "xytext": (-4, 0)}
        paper = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # a goal's tick may pass behind the figure
        axes.annotate(
            times(ratio), (ratio, i), va="center", fontsize=9, textcoords="offset points", bbox=paper, zorder=5, **side
        )
        if goal is not None:
            axes.plot([goal, goal], [i - 0.42, i + 0.42], color=RED, linewidth=2)
    axes.set_yticks(range(len(lines)), [label for label, _, _ in lines], fontsize=9)
    for label, (_, ratio, _) in zip(axes.get_yticklabels(), lines, strict=True):
        label.set_fontweight("bold" if ratio is None else "normal")
    axes.tick_params(axis="y", length=0)
    axes.set_xscale("log")
    axes.set_xlim(least, most)
    axes.set_ylim(len(lines) - 0.4, -0.6)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axes.grid(axis="x", color="#dddddd")
    axes.set_axisbelow(True)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_xlabel("peer's time over ours; red: goal, grey: goal missed")
    axes.set_title(results["device"], fontsize=11)
    figure.savefig(path, dpi=120)


def _lines(results: dict[str, Any]) -> Iterator[tuple[str, float | None, float | None]]:
    """A line of the plot for each case that has a ratio, then one for each peer: label, ratio, goal."""
    for case in results["cases"]:
        ratios = {peer: ratio for peer, ratio in case["ratio"].items() if ratio is not None}
        if ratios:
            yield case["case"], None, None
        for peer, ratio in ratios.items():
            of = " (evaluations)" if case.get("ratio_of") == "passes" else ""
            yield f"against {peer}{of}", ratio, case["goal"][peer]


def _align(column: int, word: str, width: int) -> str:
    return word.ljust(width) if column in (0, len(COLUMNS) - 1) or word.startswith("missing") else word.rjust(width)
