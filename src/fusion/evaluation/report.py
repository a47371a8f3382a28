"""The report of a whole run: results.json, report.md, report.html (one file, no network) and its pictures.

Everything it says is computed from the numbers it is given; the baseline is whatever row `baseline` names.
"""

import base64
import html
import math
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from fusion.artifact import write_atomic
from fusion.evaluation.tables import as_html, colour, markdown, number, print_table, write_results

STYLE = """
:root{color-scheme:light}body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:auto;padding:0 1rem 3rem;
color:#1a1a1a;background:#fff}h1{font-size:1.5rem;line-height:1.2}h2{font-size:1.15rem;margin-top:2.2rem}
img{width:100%;height:auto;max-width:40rem;display:block}p,li{max-width:42rem}.wide{overflow-x:auto;margin:.5rem 0}
table{border-collapse:collapse;font-size:.85rem;font-variant-numeric:tabular-nums}
td,th{padding:.3rem .6rem;text-align:right;border-bottom:1px solid #ddd;white-space:nowrap}
td:first-child,th:first-child{text-align:left;position:sticky;left:0;background:#fff;white-space:normal;min-width:7.5rem}
th{border-bottom:2px solid #888;vertical-align:bottom}code,pre{font:.8rem/1.4 ui-monospace,monospace}
pre{overflow-x:auto;background:#f5f5f5;padding:.6rem}li{margin:.3rem 0}
"""


def write_report(results: dict[str, Any], output: Path) -> dict[str, Any]:
    """Write results.json, report.md, report.html and PNG pictures into `output`; print the table; return the results.

    `results` (only title, baseline, domains and rows are needed; what is absent or empty is left out of the report):
        title: str
        baseline: name of the row the others are compared with (the text-only target)
        domains: [name], the order of the table's columns
        rows: [{"name": str, "group": str (source, target, text only, fused, merged, …),
                "seeds": {seed: {domain: bits per byte}}}]; a model that no seed touches (a source, the target as it
                was) has one entry under any key and is compared with the baseline's mean over seeds
        curves: {run: {"step": [int], "clm": [float], "kl": [float], "total": [float]}}; a curve may lack "kl"
        won: {run: {source: share of training sequences whose distribution was used, 0…1}}
        coverage: {source: share of counted target positions with an aligned distribution, 0…1}
        varm: {"title": str, "units": [str], "models": [str], "weights": [[float]] units × models}
        facts: {what: value} (budget, tokens, hyper-parameters), versions: {package: version}, commands: [str]

    In results.json each row also has: bits_per_byte {domain: mean over seeds}, average, spread (largest minus smallest
    average over seeds), change (%, of the average against the baseline, mean over seeds), changes {seed: %}; the
    sentences of the report are under `seen`.
    """
    output.mkdir(parents=True, exist_ok=True)
    rows = [summarized(row, results["domains"]) for row in results["rows"]]
    base = next(row for row in rows if row["name"] == results["baseline"])
    for row in rows:
        row |= compared(row, base)
    results = results | {"rows": rows}
    results["seen"] = sentences(results, base)
    head, lines = table(results, base)
    print_table(head, lines, results["title"])
    pictures = draw(results, base, output)
    write_atomic(output / "report.md", as_markdown(results, head, lines, pictures).encode())
    write_atomic(output / "report.html", as_page(results, head, lines, pictures, output).encode())
    write_results(output / "results.json", results)
    return results


def summarized(row: dict[str, Any], domains: list[str]) -> dict[str, Any]:
    """The row with means over seeds."""
    averages = {seed: mean(found[d] for d in domains) for seed, found in row["seeds"].items()}
    return row | {
        "bits_per_byte": {d: mean(found[d] for found in row["seeds"].values()) for d in domains},
        "averages": averages,
        "average": mean(averages.values()),
        "spread": max(averages.values()) - min(averages.values()),
    }


def compared(row: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    """Relative change of the average in %; seed by seed where both have the seed."""
    changes = {s: 100 * (a / base["averages"][s] - 1) for s, a in row["averages"].items() if s in base["averages"]}
    if set(row["averages"]) != set(base["averages"]):
        changes = {}
    return {
        "changes": changes,
        "change": mean(changes.values()) if changes else 100 * (row["average"] / base["average"] - 1),
    }


def table(results: dict[str, Any], base: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    head = ["model", "average", f"vs {base['name']}", *results["domains"]]
    lines = []
    for row in results["rows"]:
        spread = f" ± {number(row['spread'] / 2)}" if len(row["seeds"]) > 1 else ""
        change = "–" if row is base else f"{row['change']:+.2f} %"
        cells = [number(row["bits_per_byte"][d]) for d in results["domains"]]
        if row is not base:
            ratios = [row["bits_per_byte"][d] / base["bits_per_byte"][d] for d in results["domains"]]
            cells = [f"{cell} ({100 * (ratio - 1):+.1f} %)" for cell, ratio in zip(cells, ratios, strict=True)]
        lines.append([row["name"], number(row["average"]) + spread, change, *cells])
    return head, lines


def sentences(results: dict[str, Any], base: dict[str, Any]) -> list[str]:
    """What was seen, in words, out of the numbers."""
    rows, seeds = results["rows"], len(base["seeds"])
    share = 100 * base["spread"] / base["average"]
    said = [
        f"{base['name']}: {number(base['average'])} bits per byte on average"
        + (f"; its {seeds} seeds lie {share:.2f} % apart." if seeds > 1 else " (one seed).")
    ]
    for row in rows:
        if row is base or row["group"] == "source":
            continue
        word = "better" if row["change"] < 0 else "worse"
        line = f"{row['name']}: {abs(row['change']):.2f} % {word} than {base['name']}"
        if len(row["changes"]) > 1:
            agree = sum((c < 0) == (row["change"] < 0) for c in row["changes"].values())
            each = ", ".join(f"{c:+.2f} %" for c in row["changes"].values())
            low, high = min(row["changes"].values()), max(row["changes"].values())
            line += f" ({each}); {word} in {agree} of {len(row['changes'])} seeds"
            clear = abs(row["change"]) > high - low
            line += ", more than the seeds differ." if clear else ", no more than the seeds differ."
        else:
            line += "."
        said.append(line)
    trained = [row for row in rows if row["group"] != "source" and row is not base]
    if trained:
        best = min(trained, key=lambda row: row["average"])
        said.append(
            f"The best on average, sources aside, is {best['name']} with {number(best['average'])} bits per byte."
        )
    if sources := [row for row in rows if row["group"] == "source"]:
        for domain in results["domains"]:
            expert = min(sources, key=lambda row: row["bits_per_byte"][domain])
            gap = base["bits_per_byte"][domain] - expert["bits_per_byte"][domain]
            line = f"On {domain} the best source is {expert['name']} ({number(expert['bits_per_byte'][domain])}"
            line += f" against {number(base['bits_per_byte'][domain])} of {base['name']})"
            if gap > 0 and trained:
                near = min(trained, key=lambda row: row["bits_per_byte"][domain])
                closed = 100 * (base["bits_per_byte"][domain] - near["bits_per_byte"][domain]) / gap
                line += f"; {near['name']} comes nearest" + (
                    f" and closes {closed:.0f} % of the gap" if closed > 0 else ", without closing any of the gap"
                )
            elif gap <= 0:
                line += "; it has nothing to teach there that the text did not"
            said.append(line + ".")
    for run, shares in (results.get("won") or {}).items():
        said.append(
            f"{run}: the distribution came from "
            + ", ".join(f"{s} in {100 * v:.0f} %" for s, v in shares.items())
            + " of the sequences."
        )
    if coverage := results.get("coverage"):
        said.append(
            "Positions with an aligned distribution: "
            + ", ".join(f"{s} {100 * v:.1f} %" for s, v in coverage.items())
            + "."
        )
    return said


# --- pictures --------------------------------------------------------------------------------------------------------


def draw(results: dict[str, Any], base: dict[str, Any], output: Path) -> list[tuple[str, str, str]]:
    """(file, heading, what it shows) of every picture; narrow, so that a phone shows them without zooming."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    pictures = []

    def save(figure: Any, name: str, heading: str, caption: str) -> None:
        figure.savefig(output / name, dpi=160)
        plt.close(figure)
        pictures.append((name, heading, caption))

    with plt.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        save(_bars(plt, results, base), "bits_per_byte.png", "Bits per byte on held-out texts",
             f"Mean over seeds; dots are seeds; the dashed line is {base['name']}. Less is better.")  # fmt: skip
        if results.get("curves"):
            save(_curves(plt, results["curves"]), "training.png", "Training",
                 "Nats per counted token: language modelling (CLM), fusion (KL), their weighted total.")  # fmt: skip
        if results.get("won"):
            save(_won(plt, results["won"]), "won.png", "Which source won",
                 "Share of training sequences whose fused distribution came from each model.")  # fmt: skip
        if results.get("coverage"):
            save(_coverage(plt, results["coverage"]), "coverage.png", "Alignment coverage",
                 "Share of counted target positions that got a source's distribution.")  # fmt: skip
        if (results.get("varm") or {}).get("weights"):
            save(_heat(plt, results["varm"]), "varm.png", "VaRM weights",
                 "Weight of each fused target in each parameter unit; a row adds up to 1.")  # fmt: skip
    return pictures


def _bars(plt: Any, results: dict[str, Any], base: dict[str, Any]) -> Any:
    rows, panels = results["rows"], [*results["domains"], "average"]
    groups = list(dict.fromkeys(row["group"] for row in rows))
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(5, len(panels) * (0.5 + 0.21 * len(rows))), layout="constrained"
    )
    for axis, panel in zip(np.atleast_1d(axes), panels, strict=True):

        def of(row: dict[str, Any], panel: str = panel) -> list[float]:
            return [*row["averages"].values()] if panel == "average" else [f[panel] for f in row["seeds"].values()]

        values = [mean(of(row)) for row in rows]
        axis.barh(range(len(rows)), values, color=[colour(groups.index(row["group"])) for row in rows], height=0.75)
        for i, row in enumerate(rows):
            axis.text(max(of(row)), i, f" {number(values[i])}", va="center", fontsize=8)
            if len(row["seeds"]) > 1:
                axis.plot(of(row), [i] * len(row["seeds"]), ".", color="black", ms=3)
        axis.axvline(mean(of(base)), ls="--", lw=0.8, color="black")
        axis.set_yticks(range(len(rows)), [row["name"] for row in rows], fontsize=8)
        axis.invert_yaxis()
        axis.set_xlim(0, max(values) * 1.15)
        axis.set_title(panel, loc="left", fontsize=10, fontweight="bold")
    return figure


def _curves(plt: Any, curves: dict[str, dict[str, list[float]]]) -> Any:
    panels = {"clm": "CLM", "kl": "KL", "total": "total"}
    panels = {k: v for k, v in panels.items() if any(curve.get(k) for curve in curves.values())}
    figure, axes = plt.subplots(len(panels), 1, figsize=(5, 0.6 + 1.9 * len(panels)), sharex=True, layout="constrained")
    for axis, (key, label) in zip(np.atleast_1d(axes), panels.items(), strict=True):
        for i, (name, curve) in enumerate(curves.items()):
            if curve.get(key):
                step = curve["step"][: len(curve[key])]
                axis.plot(step, curve[key], lw=1.2, color=colour(i), label=name, ls="-" if i < 8 else "--")
        axis.set_ylabel(label)
    np.atleast_1d(axes)[-1].set_xlabel("step")
    handles = {
        label: h for axis in np.atleast_1d(axes) for h, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside upper left", ncols=2, fontsize=8, frameon=False)
    return figure


def _won(plt: Any, won: dict[str, dict[str, float]]) -> Any:
    sources = list(dict.fromkeys(s for shares in won.values() for s in shares))
    figure, axis = plt.subplots(figsize=(5, 1.1 + 0.32 * len(won)), layout="constrained")
    start = np.zeros(len(won))
    for i, source in enumerate(sources):
        shares = np.array([100 * found.get(source, 0.0) for found in won.values()])
        axis.barh(range(len(won)), shares, left=start, color=colour(i), label=source, height=0.7)
        for row, share in enumerate(shares):
            if share >= 8:
                axis.text(
                    start[row] + share / 2, row, f"{share:.0f}", ha="center", va="center", fontsize=8, color="white"
                )
        start += shares
    axis.set_yticks(range(len(won)), list(won), fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(0, 100)
    axis.set_xlabel("% of sequences")
    figure.legend(loc="outside upper left", ncols=3, fontsize=8, frameon=False)
    return figure


def _coverage(plt: Any, coverage: dict[str, float]) -> Any:
    figure, axis = plt.subplots(figsize=(5, 0.7 + 0.32 * len(coverage)), layout="constrained")
    axis.barh(range(len(coverage)), [100 * v for v in coverage.values()], color=colour(0), height=0.7)
    for i, v in enumerate(coverage.values()):
        axis.text(100 * v, i, f" {100 * v:.1f}", va="center", fontsize=8)
    axis.set_yticks(range(len(coverage)), list(coverage), fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(0, 112)
    axis.set_xticks([0, 25, 50, 75, 100])
    axis.set_xlabel("% of positions")
    return figure


def _heat(plt: Any, varm: dict[str, Any]) -> Any:
    weights, units = np.array(varm["weights"], dtype=float), varm["units"]
    figure, axis = plt.subplots(figsize=(5, 1.1 + max(1.2, 0.15 * len(units))), layout="constrained")
    image = axis.imshow(weights, aspect="auto", cmap="viridis", vmin=0, vmax=max(float(weights.max()), 1e-9))
    axis.set_xticks(range(len(varm["models"])), varm["models"], fontsize=8)
    every = math.ceil(len(units) / 60)
    axis.set_yticks(range(0, len(units), every), units[::every], fontsize=6)
    for spine in axis.spines.values():
        spine.set_visible(False)
    figure.colorbar(image, ax=axis, fraction=0.06)
    return figure


# --- pages -----------------------------------------------------------------------------------------------------------


def _facts(results: dict[str, Any]) -> list[tuple[str, list[list[str]]]]:
    blocks = [("Budget", results.get("facts")), ("Versions", results.get("versions"))]
    return [(name, [[str(k), str(v)] for k, v in found.items()]) for name, found in blocks if found]


def as_markdown(results: dict[str, Any], head: list[str], lines: list[list[str]], pictures: list) -> str:
    parts = [f"# {results['title']}\n", markdown(head, lines), note(results)]
    parts += ["## What was seen\n", "".join(f"- {line}\n" for line in results["seen"])]
    parts += [f"## {heading}\n\n{caption}\n\n![{heading}]({name})\n" for name, heading, caption in pictures]
    parts += [f"## {name}\n\n{markdown(['', ''], rows)}" for name, rows in _facts(results)]
    if results.get("commands"):
        parts.append("## Commands\n\n```\n" + "\n".join(results["commands"]) + "\n```\n")
    return "\n".join(parts)


def as_page(results: dict[str, Any], head: list[str], lines: list[list[str]], pictures: list, output: Path) -> str:
    """One HTML file with its pictures inside: opens anywhere, fetches nothing."""
    title = html.escape(results["title"])
    parts = [
        f"<h1>{title}</h1>\n",
        as_html(head, lines),
        f"<p>{html.escape(note(results))}</p>\n<h2>What was seen</h2>\n<ul>",
    ]
    parts += [f"<li>{html.escape(line)}</li>\n" for line in results["seen"]]
    parts.append("</ul>\n")
    for name, heading, caption in pictures:
        data = base64.b64encode((output / name).read_bytes()).decode()
        parts.append(f"<h2>{html.escape(heading)}</h2>\n<p>{html.escape(caption)}</p>\n")
        parts.append(f'<img alt="{html.escape(heading)}" src="data:image/png;base64,{data}">\n')
    parts += [f"<h2>{name}</h2>\n{as_html(['', ''], rows)}" for name, rows in _facts(results)]
    if results.get("commands"):
        parts.append(f"<h2>Commands</h2>\n<pre>{html.escape(chr(10).join(results['commands']))}</pre>\n")
    view = '<meta name="viewport" content="width=device-width,initial-scale=1">'
    top = f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">{view}<title>{title}</title>'
    return f"{top}\n<style>{STYLE}</style></head><body>\n{''.join(parts)}</body></html>\n"


def note(results: dict[str, Any]) -> str:
    seeds = max(len(row["seeds"]) for row in results["rows"])
    spread = f" Means over {seeds} seeds, ± half the distance between the highest and the lowest." if seeds > 1 else ""
    return f"Bits per byte on held-out texts, less is better; changes are against {results['baseline']}.{spread}\n"
