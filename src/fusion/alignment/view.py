"""The alignment of one text, made visible: rows of tokens in the terminal, a self-contained page for the browser."""

import html
import json
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.console import Group
from rich.table import Table
from rich.text import Text

from fusion.alignment.normalise import Vocabulary
from fusion.alignment.project import Aligner

COLOURS = ("cyan", "green", "yellow", "magenta", "blue", "red")


class View(NamedTuple):
    """What is shown. `links` are (source position, target position); `positions` as `Aligner.positions` gives them."""

    title: str
    cost: int | None
    source: list[str]
    target: list[str]
    links: list[tuple[int, int]]
    positions: list[int]
    maps: list[str]  # per source position: the target token its own token stands for
    candidates: dict[int, list[list[tuple[str, float]]]]  # target position → [source's top-k, its projection]

    @property
    def coverage(self) -> float:
        return float(np.mean([p >= 0 for p in self.positions])) if self.positions else 0.0


def shown(vocabulary: Vocabulary, token: int) -> str:
    """A token as a person reads it: its text with visible blanks, bytes that are no character in hexadecimal."""
    text = vocabulary.text[token]
    if text is None:
        return vocabulary.tokens[token] or "∅"
    marks = {" ": "·", "\n": "↵", "\t": "⇥", "\r": "␍", "\0": "␀"}
    parts = text.decode("utf-8", "surrogateescape")
    return "".join(f"‹{ord(c) - 0xDC00:02X}›" if 0xDC80 <= ord(c) <= 0xDCFF else marks.get(c, c) for c in parts) or "∅"


def look(
    aligner: Aligner,
    source_ids: NDArray,
    target_ids: NDArray,
    distributions: tuple[NDArray, NDArray] | None = None,
) -> View:
    """The view of one text; `distributions` (ids, logprobs [Ts, K]): the source's top-k, shown with its projection."""
    source, target = aligner.source, aligner.target
    positions = aligner.positions(source_ids, target_ids)
    if aligner.config.criterion == "span":
        links = [(int(j), i) for i, j in enumerate(positions) if j >= 0]
        cost = None
    else:
        cost, links = aligner.path(source_ids, target_ids)
        links = [(int(j), int(i)) for j, i in links]
    maps = [shown(target, aligner.map[s]) if aligner.map[s] >= 0 else "—" for s in source_ids]
    candidates = {}
    if distributions is not None:
        moved = aligner.project(positions, *distributions, target_ids)
        for i, j in enumerate(positions):
            mine = [(moved.ids[i], moved.logprobs[i], target)]
            if j >= 0:
                mine.insert(0, (distributions[0][j], distributions[1][j], source))
            candidates[i] = [
                [(shown(v, int(t)), float(np.exp(p))) for t, p in zip(ids, logprobs, strict=True) if p > -np.inf]
                for ids, logprobs, v in mine
            ]
    criterion = aligner.config.criterion
    return View(
        f"{criterion}: {len(source_ids)} source tokens, {len(target_ids)} target tokens",
        cost,
        [shown(source, s) for s in source_ids],
        [shown(target, t) for t in target_ids],
        links,
        positions.tolist(),
        maps,
        candidates,
    )


def terminal(view: View, width: int = 100) -> Group:
    """Two rows of tokens; matched groups share a colour and a column, positions that take a distribution are bold."""
    groups = _groups(view)
    blocks: list[Any] = []
    line: list[tuple[Text, Text]] = []
    used = 0
    for n, (sources, targets) in enumerate(groups):
        colour = COLOURS[n % len(COLOURS)] if sources and targets else "bright_black"
        above, below = Text(), Text()
        for k, j in enumerate(sources):
            above.append(("|" if k else "") + view.source[j], colour)
        for k, i in enumerate(targets):
            below.append("|" if k else "", colour)
            below.append(view.target[i], f"bold {colour}" if view.positions[i] >= 0 else f"dim {colour}")
        cells = max(above.cell_len, below.cell_len) + 2
        if line and used + cells > width - 8:
            blocks.append(_lines(line))
            line, used = [], 0
        line.append((above, below))
        used += cells
    if line:
        blocks.append(_lines(line))
    cost = "no cost: positions by byte" if view.cost is None else f"cost {view.cost}"
    foot = Text(f"{view.title}; {cost}; coverage {view.coverage:.1%} of the target's positions (bold)")
    return Group(*blocks, foot)


def _lines(line: list[tuple[Text, Text]]) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_row(Text("source", "dim"), *(a for a, _ in line))
    table.add_row(Text("target", "dim"), *(b for _, b in line))
    table.add_row("")
    return table


def _groups(view: View) -> list[tuple[list[int], list[int]]]:
    """Runs of tokens joined by links, in text order, with unlinked tokens between them."""
    out: list[tuple[list[int], list[int]]] = []
    at_s = at_t = 0
    joined: list[list[int]] = []
    for j, i in sorted(view.links):
        if joined and (j <= joined[-1][1] or i <= joined[-1][3]):
            joined[-1][1], joined[-1][3] = max(j, joined[-1][1]), max(i, joined[-1][3])
        else:
            joined.append([j, j, i, i])
    for a, b, c, d in [*joined, [len(view.source), -1, len(view.target), -1]]:
        if a > at_s or c > at_t:
            out.append((list(range(at_s, a)), list(range(at_t, c))))
        if b >= 0:
            out.append((list(range(a, b + 1)), list(range(c, d + 1))))
            at_s, at_t = b + 1, d + 1
    return out


def page(view: View, source_name: str, target_name: str) -> str:
    """One HTML file that needs nothing else: rows that wrap together, links, what a token maps to on hover or focus."""
    groups = []
    linked = {}
    for j, i in view.links:
        linked.setdefault(("s", j), []).append(f"t{i}")
        linked.setdefault(("t", i), []).append(f"s{j}")
    for n, (sources, targets) in enumerate(_groups(view)):
        rows = []
        for side, places in (("s", sources), ("t", targets)):
            tokens = []
            for k in places:
                text = view.source[k] if side == "s" else view.target[k]
                taken = " on" if side == "t" and view.positions[k] >= 0 else ""
                tip = f"source token {k}: {text} → {view.maps[k]}" if side == "s" else f"target token {k}: {text}"
                if side == "t":
                    j = view.positions[k]
                    tip += f" takes the distribution at source {j}: {view.source[j]}" if j >= 0 else " takes none"
                tokens.append(
                    f'<button class="tok{taken}" id="{side}{k}" data-to="{" ".join(linked.get((side, k), []))}" '
                    f'data-tip="{html.escape(tip, quote=True)}"><bdi>{html.escape(text)}</bdi></button>'
                )
            rows.append(f'<div class="row">{"".join(tokens)}</div>')
        joined = "joined" if sources and targets else "single"
        groups.append(f'<div class="group {joined} c{n % 6}">{rows[0]}<svg></svg>{rows[1]}</div>')
    cost = "positions by byte" if view.cost is None else f"cost {view.cost}"
    facts = f"{view.title}; {cost}; coverage {view.coverage:.1%}"
    held = json.dumps(view.candidates, ensure_ascii=False).replace("<", "\\u003c")
    return PAGE.format(
        title=html.escape(f"{source_name} → {target_name}"),
        facts=html.escape(facts),
        groups="\n".join(groups),
        candidates=held,
    )


PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ --bg:#fff; --ink:#1c1c1e; --dim:#6b6b70; --line:#c9c9ce; --soft:#f3f3f5 }}
@media (prefers-color-scheme: dark) {{ :root {{
  --bg:#151517; --ink:#eee; --dim:#a0a0a8; --line:#4a4a50; --soft:#222226 }} }}
body {{ background:var(--bg); color:var(--ink); font:15px/1.4 system-ui, sans-serif; margin:0 auto; max-width:1100px;
  padding:1rem 1rem 9rem }}
h1 {{ font-size:1.15rem; margin:0; overflow-wrap:anywhere }} p {{ color:var(--dim); margin:.3rem 0 1rem }}
.text {{ display:flex; flex-wrap:wrap; gap:.9rem .35rem; align-items:stretch }}
.group {{ display:flex; flex-direction:column; align-items:center; justify-content:space-between; max-width:100% }}
.row {{ display:flex; flex-wrap:wrap; gap:2px; min-height:1.8rem; justify-content:center; max-width:100% }}
.tok {{ font:13px/1.3 ui-monospace, monospace; color:inherit; background:var(--soft); border:1px solid var(--line);
  border-radius:4px; padding:2px 4px; cursor:default; overflow-wrap:anywhere; max-width:100% }}
.single .tok {{ border-style:dashed }} .tok.on {{ font-weight:700; border-color:var(--hue); border-width:2px }}
.tok.lit, .tok:focus-visible {{ outline:2px solid var(--hue); outline-offset:1px }}
svg {{ width:0; min-width:100%; height:22px; overflow:visible }} svg line {{ stroke:var(--hue); stroke-width:1.5 }}
.c0 {{ --hue:#0f7b8a }} .c1 {{ --hue:#3b7d23 }} .c2 {{ --hue:#a56a00 }} .c3 {{ --hue:#a03080 }} .c4 {{ --hue:#2f5fc4 }}
.c5 {{ --hue:#b8392b }}
#panel {{ position:fixed; inset:auto 0 0 0; background:var(--bg); border-top:1px solid var(--line); padding:.6rem 1rem;
  min-height:2.6rem; max-height:40vh; overflow:auto }}
table {{ border-collapse:collapse; display:inline-table; margin:.3rem 2rem 0 0; vertical-align:top; font-size:13px }}
td, th {{ text-align:start; padding:0 .6rem 0 0; font-weight:400 }} th {{ color:var(--dim) }}
</style>
<h1>{title}</h1><p>{facts}. Upper row: source; lower row: target; thick border: takes a distribution.</p>
<div class="text">
{groups}
</div>
<div id="panel" role="status">Point at a token.</div>
<script>
const candidates = {candidates};
const at = id => document.getElementById(id);
function draw() {{
  for (const group of document.querySelectorAll('.group')) {{
    const svg = group.querySelector('svg'), box = svg.getBoundingClientRect(); svg.replaceChildren();
    for (const token of group.children[0].children) for (const id of token.dataset.to.split(' ').filter(Boolean)) {{
      const a = token.getBoundingClientRect(), b = at(id).getBoundingClientRect();
      const line = document.createElementNS('http://www.w3.org/2000/svg', 'line');
      line.setAttribute('x1', a.left + a.width / 2 - box.left); line.setAttribute('y1', a.bottom - box.top);
      line.setAttribute('x2', b.left + b.width / 2 - box.left); line.setAttribute('y2', b.top - box.top);
      svg.append(line);
    }}
  }}
}}
function tell(token) {{
  document.querySelectorAll('.lit').forEach(e => e.classList.remove('lit'));
  token.classList.add('lit'); token.dataset.to.split(' ').filter(Boolean).forEach(id => at(id).classList.add('lit'));
  const panel = at('panel'); panel.textContent = token.dataset.tip;
  const held = token.id[0] === 't' ? candidates[token.id.slice(1)] : undefined;
  if (!held) return;
  panel.append(document.createElement('br'));
  held.forEach((rows, n) => {{
    const table = document.createElement('table');
    table.createCaption().textContent = n < held.length - 1 ? "source's next token" : "on the target's vocabulary";
    for (const [name, p] of rows) {{
      const row = table.insertRow(); const cell = document.createElement('bdi'); cell.textContent = name;
      row.insertCell().append(cell); row.insertCell().textContent = (100 * p).toFixed(1) + ' %';
    }}
    panel.append(table);
  }});
}}
for (const token of document.querySelectorAll('.tok'))
  for (const event of ['mouseenter', 'focus', 'click']) token.addEventListener(event, () => tell(token));
addEventListener('resize', draw); draw(); if (document.fonts) document.fonts.ready.then(draw);
const asked = at(location.hash.replace('#show-', '')); if (asked) tell(asked);
</script></html>
"""
