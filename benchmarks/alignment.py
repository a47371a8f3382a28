"""Alignment against the naive method, interleaved in one run on one core, and the coverage of real tokenizer pairs.

    python benchmarks/alignment.py speed                 # the table of docs/alignment.md
    python benchmarks/alignment.py maps [--cold]         # MinED maps, exactness checked on a sample
    python benchmarks/alignment.py coverage --output docs # coverage.md and coverage.png

Real tokenizers and texts are read from $FUSION_SHARED, or ../shared beside the repository.
"""

import argparse
import itertools
import json
import os
import resource
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
from rapidfuzz.distance import Levenshtein
from transformers import AutoTokenizer

from fusion.alignment import Aligner, byte_ends, read_vocabulary, span_positions, vocabulary_map
from fusion.config import Alignment

SHARED = Path(os.environ.get("FUSION_SHARED", Path(__file__).parents[2] / "shared"))
PAIRS = (
    ("mpt-7b", "llama2-7b"),
    ("mistral-7b-v0.1", "llama2-7b"),
    ("llama3-8b", "llama2-7b"),
    ("llama3-8b", "mistral-7b-v0.1"),
    ("falcon-7b", "mpt-7b"),
    ("llama2-7b", "gpt2"),
    ("phi-3-mini", "mistral-7b-v0.1"),
)


def tokenizer(name: str):
    return AutoTokenizer.from_pretrained(SHARED / "data/tokenizers" / name)


def texts(domain: str, characters: int) -> str:
    if domain == "other":  # German, French, Czech captions and the like; many scripts from the standard library
        return other(characters)
    got, size = [], 0
    with open(SHARED / f"data/corpora/{domain}.jsonl") as file:
        for line in itertools.islice(file, 20, None):
            got.append(json.loads(line)["text"])
            size += len(got[-1])
            if size > characters:
                break
    return "\n\n".join(got)[:characters]


def other(characters: int) -> str:
    """Translations of one declaration's opening lines and a Chinese, a Japanese and an Arabic paragraph."""
    parts = [
        "人人生而自由，在尊严和权利上一律平等。他们赋有理性和良心，并应以兄弟关系的精神相对待。",
        "すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。",
        "يولد جميع الناس أحراراً متساوين في الكرامة والحقوق، وقد وهبوا عقلاً وضميراً.",
        "Все люди рождаются свободными и равными в своем достоинстве и правах. Они наделены разумом и совестью.",
        "Alle Menschen sind frei und gleich an Würde und Rechten geboren. Sie sind mit Vernunft und Gewissen begabt.",
        "Tous les êtres humains naissent libres et égaux en dignité et en droits. Ils sont doués de raison.",
        "כל בני האדם נולדו בני חורין ושווים בערכם ובזכויותיהם. כולם חוננו בתבונה ובמצפון.",
        "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है।",
        "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다.",
    ]
    return "\n".join(parts)[:characters]


def ids_of(made, text: str) -> np.ndarray:
    return np.array([*made(text, add_special_tokens=False, verbose=False)["input_ids"], made.eos_token_id])


def best(call, repeats: int) -> float:
    """CPU seconds, the least of several calls after one to warm up."""
    call()
    found = []
    for _ in range(repeats):
        begin = time.process_time()
        call()
        found.append(time.process_time() - begin)
    return min(found)


def naive_dtw(source: list[str], target: list[str]) -> int:
    """The full recurrence, as the release walks it: one edit distance per cell, in Python."""
    row: list[int] = []
    for i, a in enumerate(source):
        new: list[int] = []
        for j, b in enumerate(target):
            before = [row[j]] if i else []
            before += [new[j - 1]] if j else []
            before += [row[j - 1]] if i and j else []
            new.append(Levenshtein.distance(a, b) + (min(before) if before else 0))
        row = new
    return row[-1]


def naive_projection(positions, ids, logprobs, mapping: dict) -> list:
    out = []
    for j in positions.tolist():
        row: dict = {}
        if j >= 0:
            for s, p in zip(ids[j].tolist(), logprobs[j].tolist(), strict=True):
                if s in mapping:
                    row.setdefault(mapping[s], p)
        out.append(row)
    return out


def speed() -> None:
    source, target = tokenizer("mpt-7b"), tokenizer("llama2-7b")
    text = texts("books_en", 20_000)
    end = target(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"][2046][1]
    s, t = (ids_of(made, text[:end]) for made in (source, target))
    em = Aligner(source, target, Alignment(criterion="em"))
    print(f"prose, {len(s)} source tokens, {len(t)} target tokens; CPU time, least of several calls, warm")
    cost, _ = em.path(s, t)
    raw = [[em.source.keys[i] for i in s], [em.target.keys[i] for i in t]]
    raw[1][0] = raw[1][0].removeprefix(b" ")
    begin = time.process_time()
    proven = naive_dtw(*raw)
    slow = time.process_time() - begin
    assert cost == proven, (cost, proven)
    fast = best(lambda: em.path(s, t), 20)
    print(
        f"DTW: {fast * 1e3:.2f} ms; full recurrence in Python, rapidfuzz per cell, {slow:.2f} s: "
        f"{slow / fast:,.0f} times; cost {cost} equal"
    )
    whole = best(lambda: em.positions(s, t), 20)
    print(f"EM positions with it: {whole * 1e3:.2f} ms")
    ends = [read_vocabulary(source), read_vocabulary(target)]
    spans = best(lambda: span_positions(byte_ends(s[:-1], ends[0]), byte_ends(t[:-1], ends[1])), 50)
    print(f"spans: {len(t) / spans:,.0f} target tokens/s ({slow / spans:,.0f} times the naive DTW's rate)")
    rng = np.random.default_rng(0)
    ids = rng.integers(0, len(source), (len(s), 10)).astype(np.uint32)
    logprobs = -np.sort(rng.exponential(3, (len(s), 10))).astype(np.float32)
    with tempfile.TemporaryDirectory() as cache:
        for criterion in ("em", "mined", "span"):
            aligner = Aligner(source, target, Alignment(criterion=criterion), cache=Path(cache))
            positions = aligner.positions(s, t)
            fast = best(lambda a=aligner, p=positions: a.project(p, ids, logprobs, t), 50)
            mapping = {i: int(m) for i, m in enumerate(aligner.map) if m >= 0}
            slow = best(lambda p=positions, m=mapping: naive_projection(p, ids, logprobs, m), 3)
            print(f"projection, {criterion}: {len(t) / fast:,.0f} tokens/s, {slow / fast:,.0f} times a Python loop")


def maps() -> None:
    rng = np.random.default_rng(0)
    for a, b in (("mpt-7b", "llama2-7b"), ("llama3-8b", "llama2-7b")):
        source, target = tokenizer(a), tokenizer(b)
        s, t = read_vocabulary(source), read_vocabulary(target)
        vocabulary_map(target, target, "mined")  # compiled
        with tempfile.TemporaryDirectory() as cache:
            wall, cpu = time.perf_counter(), time.process_time()
            made = vocabulary_map(source, target, "mined", cache=Path(cache)).numpy()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            warm = best(lambda x=source, y=target, c=cache: vocabulary_map(x, y, "mined", cache=Path(c)), 3)
        exact = vocabulary_map(source, target, "em").numpy()
        rest = np.array([i for i in np.flatnonzero(exact < 0) if s.text[i] is not None])
        sample = rng.choice(rest, 100, replace=False)
        begin = time.process_time()
        for i in sample.tolist():
            found = [10**6 if k is None else Levenshtein.distance(s.text[i], k) for k in t.text]
            assert made[i] == int(np.argmin(found)), (i, made[i])
        naive = (time.process_time() - begin) / len(sample) * len(rest)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(
            f"MinED {a} → {b}: cold {wall:.1f} s wall, {cpu:.1f} s CPU; from its cache {warm:.3f} s; one by one "
            f"{naive:,.0f} s CPU ({naive / cpu:.0f} times); 100 sampled tokens equal; peak of the process {peak:.0f} MB"
        )


def coverage(folder: Path) -> None:
    domains = {"prose": "books_en", "code": "code", "mathematics": "math_en", "non-English": "other"}
    criteria = ("em", "mined", "ms", "span")
    lines = ["| target ← source | text | EM | MinED | MS | span |", "|---|---|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as cache:
        for a, b in PAIRS:
            source, target = tokenizer(a), tokenizer(b)
            for name, domain in domains.items():
                whole = texts(domain, 40_000)
                pieces = [whole[at : at + 4000] for at in range(0, len(whole), 4000)]
                rows = [(ids_of(source, p), ids_of(target, p)) for p in pieces]
                counter = Aligner(source, target, Alignment(criterion="ms"))
                for row in rows:
                    counter.count(*row)
                shares = []
                for criterion in criteria:
                    aligner = Aligner(
                        source,
                        target,
                        Alignment(criterion=criterion),
                        statistics=counter.statistics,
                        cache=Path(cache),
                    )
                    found = np.concatenate([aligner.positions(*row) >= 0 for row in rows])
                    shares.append(100 * found.mean())
                lines.append(f"| {b} ← {a} | {name} | " + " | ".join(f"{v:.1f}" for v in shares) + " |")
                print(lines[-1], flush=True)
    (folder / "coverage.md").write_text("\n".join(lines) + "\n")
    plot(folder)


def plot(folder: Path) -> None:
    """coverage.png from coverage.md."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    table = (folder / "coverage.md").read_text().splitlines()[2:]
    rows = [[c.strip() for c in line.strip("| ").split("|")] for line in table]
    pairs, domains = (list(dict.fromkeys(row[n] for row in rows)) for n in (0, 1))
    colours = {"EM": "#8c96c6", "MinED": "#41b6c4", "MS": "#fdae61", "span": "#1a5276"}
    figure, axes = plt.subplots(1, len(domains), figsize=(12, 4.2), sharey=True, layout="constrained")
    for axis, domain in zip(axes, domains, strict=True):
        for n, (criterion, colour) in enumerate(colours.items()):
            shares = {row[0]: float(row[2 + n]) for row in rows if row[1] == domain}
            places = np.arange(len(pairs)) + 0.2 * (1.5 - n)
            axis.barh(places, [shares[p] for p in pairs], 0.19, color=colour, label=criterion)
        axis.set(title=domain, xlim=(0, 100), xlabel="% of target positions")
        axis.set_yticks(range(len(pairs)), pairs)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncol=4, frameon=False)
    figure.savefig(folder / "coverage.png", dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("speed", "maps", "coverage"))
    parser.add_argument("--output", type=Path, default=Path("docs"))
    options = parser.parse_args()
    if options.what == "coverage":
        coverage(options.output)
    else:
        {"speed": speed, "maps": maps}[options.what]()
