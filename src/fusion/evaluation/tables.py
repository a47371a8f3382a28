"""The table of an evaluation: terminal, results.json, results.md, a plot, W&B; and tables of tables."""

import html
import json
import math
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fusion.artifact import write_atomic
from fusion.config import UserError

RESULTS = "results.json"


def write(results: dict[str, Any], output: Path) -> None:
    """results.json, results.md and results.png into `output`, and the table to the terminal."""
    output.mkdir(parents=True, exist_ok=True)
    head, lines = cells(results)
    print_table(head, lines, results["title"])
    plot(results, output / "results.png")
    write_atomic(output / "results.md", as_text(results, head, lines).encode())
    write_results(output / RESULTS, results)


def cells(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and lines of the main table: value, relative change against the baseline, `*` where it is significant."""
    columns = results["columns"]
    arrows = {True: "↑", False: "↓", None: ""}
    head = ["model", *(f"{c} {arrows[f.get('higher_is_better')]}".strip() for c, f in columns.items())]
    lines = []
    for name, row in results["rows"].items():
        lines.append([name, *(cell_text(row.get(c), name == results["baseline"]) for c in columns)])
    return head, lines


def cell_text(cell: dict[str, Any] | None, is_baseline: bool = False) -> str:
    if cell is None:
        return "–"
    text = number(cell["value"])
    if is_baseline or cell.get("change") is None:
        return text
    return f"{text} ({cell['change']:+.2f} %){'*' if cell.get('significant') else ''}"


def number(value: float) -> str:
    """Four digits that matter: 2.541, 45.30, 1234."""
    if not math.isfinite(value):
        return str(value)
    digits = 3 if abs(value) < 10 else 2 if abs(value) < 1000 else 0
    return f"{value:.{digits}f}"


def as_text(results: dict[str, Any], head: list[str], lines: list[list[str]]) -> str:
    """results.md."""
    columns = results["columns"]
    resamples = results["bootstrap"]
    parts = [f"# {results['title']}\n", markdown(head, lines)]
    parts.append(
        f"In brackets the relative change against {results['baseline']}. "
        + (f"`*`: the middle 95 % of {resamples} paired bootstrap resamples of the difference leave out zero.\n"
           if resamples else "No bootstrap was asked for.\n")
    )  # fmt: skip
    if resamples:
        rows = [
            [
                name,
                *(
                    "–" if not (cell := row.get(c)) else "{} … {}".format(*map(number, cell["interval"]))
                    for c in columns
                ),
            ]
            for name, row in results["rows"].items()
        ]
        parts += ["## 95 % intervals\n", markdown(head, rows)]
    others = {
        (c, m) for row in results["rows"].values() for c, cell in row.items() if cell for m in cell.get("metrics", {})
    }
    shown = {(f["task"], f["metric"]) for f in columns.values()}
    others = sorted(others - shown)
    if others:
        rows = [
            [name, *(number(row[c]["metrics"][m]) if row.get(c) else "–" for c, m in others)]
            for name, row in results["rows"].items()
        ]
        parts += ["## Other metrics\n", markdown(["model", *(f"{c}: {m}" for c, m in others)], rows)]
    facts = [
        [name, c, str(f.get("examples", "")), ", ".join(f"{k} {v}" for k, v in found.items() if k != "vocabulary")]
        for c, f in columns.items()
        for name, found in f.get("facts", {}).items()
    ]
    parts += ["## How it was measured\n", markdown(["model", "task", "examples", "facts"], facts)]
    parts += [f"Not measured: {line}\n" for line in results["skipped"]]
    parts.append("Versions: " + ", ".join(f"{k} {v}" for k, v in results["versions"].items()) + "\n")
    parts.append(f"Command: `{results['command']}`\n")
    parts.append("![results](results.png)\n")
    return "\n".join(parts)


def markdown(head: list[str], lines: list[list[str]]) -> str:
    def line(row: list[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |\n"

    return line(head) + "|" + "---|" * len(head) + "\n" + "".join(map(line, lines))


def as_html(head: list[str], lines: list[list[str]]) -> str:
    """A table that scrolls sideways on a narrow screen."""
    first = "".join(f"<th>{html.escape(c)}</th>" for c in head)
    rest = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>\n" for row in lines)
    return f'<div class="wide"><table><thead><tr>{first}</tr></thead>\n<tbody>{rest}</tbody></table></div>\n'


def print_table(head: list[str], lines: list[list[str]], caption: str) -> None:
    """To the terminal; on its side when it is wide and short (BBH has 27 columns)."""
    if len(head) > 9 > len(lines):
        head, *lines = [list(row) for row in zip(head, *lines, strict=True)]
    table = Table(title=caption)
    for i, column in enumerate(head):
        table.add_column(column, justify="right" if i else "left", overflow="fold")
    for row in lines:
        table.add_row(*row)
    console = Console(markup=False)
    if not console.is_terminal:  # a log has no width: one line a row
        console = Console(
            markup=False,
            width=max(100, 3 * len(head) + sum(max(len(r[i]) for r in [head, *lines]) for i in range(len(head)))),
        )
    console.print(table)


def write_results(path: Path, results: dict[str, Any]) -> None:
    """JSON in the order of the table."""
    write_atomic(path, (json.dumps(strict(results), indent=1, ensure_ascii=False) + "\n").encode())


def strict(value: Any) -> Any:
    """The same with numbers that JSON has no word for (NaN, ∞) as null."""
    if isinstance(value, dict):
        return {k: strict(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def plot(results: dict[str, Any], path: Path) -> None:
    """A panel per kind of number, a group of bars per task, a bar per model with its 95 % interval."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = [c for c, facts in results["columns"].items() if facts["metric"]]
    names = list(results["rows"])
    if not columns:
        return
    thick = 0.8 / len(names)
    size = (7, 1.4 + len(columns) * max(0.4, 0.2 * len(names)) + 0.18 * len(names))
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    for i, name in enumerate(names):
        found = [results["rows"][name].get(c) or {} for c in columns]
        values = [cell.get("value", math.nan) for cell in found]
        ends = [cell.get("interval", (v, v)) for cell, v in zip(found, values, strict=True)]
        whiskers = [
            [max(0, v - low) for v, (low, _) in zip(values, ends, strict=True)],
            [max(0, high - v) for v, (_, high) in zip(values, ends, strict=True)],
        ]
        places = [row + (i - (len(names) - 1) / 2) * thick for row in range(len(columns))]
        axes.barh(places, values, thick * 0.9, xerr=whiskers, label=name, error_kw={"lw": 0.8}, color=colour(i))
    axes.set_yticks(range(len(columns)), columns)
    axes.invert_yaxis()
    metrics = [results["columns"][c]["metric"] for c in columns if "examples" in results["columns"][c]]
    axes.set_xlabel(", ".join(dict.fromkeys(m.replace("_", " ") for m in metrics)))
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper left", fontsize=8, frameon=False, ncols=1)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def colour(i: int) -> str:
    """Okabe & Ito's eight, told apart by all readers."""
    return ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#999999", "#F0E442")[i % 8]


def to_wandb(results: dict[str, Any], output: Path) -> None:
    """The table, the plot and every number, to the run that launch opened."""
    import wandb

    head, lines = cells(results)
    figures = {f"{n}/{c}": cell["value"] for n, row in results["rows"].items() for c, cell in row.items() if cell}
    pictures = {"plot": wandb.Image(str(output / "results.png"))} if (output / "results.png").exists() else {}
    wandb.log({"results": wandb.Table(columns=head, data=lines), **pictures, **figures})


def compare(folders: list[Path], output: Path) -> dict[str, Any]:
    """The ablation table: one line per result, whether given one by one or as a multirun directory.

    Reads `results.json` of evaluate.py and of fuse.py, and a sweep job's `result.json` with its overrides.
    """
    lines = [line for folder in folders for line in _lines(folder)]
    columns = list(dict.fromkeys(k for _, figures in lines for k in figures))
    if not columns:
        raise UserError(
            f"compare: no results in {', '.join(map(str, folders))}; give folders of evaluate.py, fuse.py or a sweep"
        )
    rows = [[name, *(number(figures[c]) if c in figures else "–" for c in columns)] for name, figures in lines]
    head = ["run", *columns]
    print_table(head, rows, "comparison")
    output.mkdir(parents=True, exist_ok=True)
    write_atomic(output / "results.md", ("# Comparison\n\n" + markdown(head, rows)).encode())
    write_results(output / RESULTS, {"kind": "compare", "rows": dict(lines)})
    return dict(lines)


def _lines(folder: Path) -> list[tuple[str, dict[str, float]]]:
    """(name, figures) of every result below a folder."""
    if not folder.is_dir():
        raise UserError(f"compare: {folder}: no such folder")
    if (folder / RESULTS).is_file():
        results = json.loads((folder / RESULTS).read_text())
        rows = results.get("rows", {})
        if isinstance(rows, list):  # fuse.py
            return [
                (f"{folder.name}: {row['name']}", row["bits_per_byte"] | {"average": row["average"]}) for row in rows
            ]
        return [
            (
                f"{folder.name}: {name}",
                {c: cell["value"] for c, cell in row.items() if cell and cell["value"] is not None},
            )
            for name, row in rows.items()
        ]
    if (folder / "result.json").is_file():
        figures = json.loads((folder / "result.json").read_text())
        overrides = folder / ".hydra" / "overrides.yaml"
        given = (
            " ".join(line[2:] for line in overrides.read_text().splitlines() if line.startswith("- "))
            if overrides.is_file()
            else ""
        )
        return [(f"{folder.name} {given}".strip(), {k: v for k, v in figures.items() if isinstance(v, (int, float))})]
    jobs = sorted(
        (p for p in folder.iterdir() if p.is_dir() and p.name != ".hydra"), key=lambda p: (len(p.name), p.name)
    )
    return [line for job in jobs for line in _lines(job)]
