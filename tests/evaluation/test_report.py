"""The report of a whole run: numbers, words and pages out of one dictionary."""

import json
import re

import pytest

from fusion.evaluation import tables
from fusion.evaluation.report import write_report

DOMAINS = ["code", "docs", "tables"]


def example():
    def seeds(*averages):
        return {str(s): {"code": a - 0.2, "docs": a, "tables": a + 0.2} for s, a in enumerate(averages)}

    steps = list(range(0, 400, 10))
    curve = [5 / (1 + s / 60) + 1 for s in steps]
    return {
        "title": "Fusion on three domains <&>",
        "baseline": "text only",
        "domains": DOMAINS,
        "rows": [
            {"name": "tiny_code", "group": "source", "seeds": {"-": {"code": 1.6, "docs": 3.2, "tables": 3.4}}},
            {"name": "tiny_docs", "group": "source", "seeds": {"-": {"code": 3.3, "docs": 1.9, "tables": 3.0}}},
            {"name": "tiny_tables", "group": "source", "seeds": {"-": {"code": 3.4, "docs": 3.0, "tables": 1.5}}},
            {"name": "target as it was", "group": "target", "seeds": {"-": {"code": 2.5, "docs": 2.6, "tables": 2.7}}},
            {"name": "text only", "group": "text only", "seeds": seeds(2.45, 2.47)},
            {"name": "FuseLLM", "group": "fused", "seeds": seeds(2.40, 2.43)},
            {"name": "FuseChat tiny_code", "group": "fused", "seeds": seeds(2.46, 2.46)},
            {"name": "Linear merge", "group": "merged", "seeds": seeds(2.44, 2.44)},
            {"name": "VaRM merge", "group": "merged", "seeds": seeds(2.50, 2.52)},
        ],
        "curves": {
            "text only": {"step": steps, "clm": curve, "total": curve},
            "FuseLLM": {"step": steps, "clm": curve, "kl": [c - 0.9 for c in curve], "total": [c - 0.1 for c in curve]},
        },
        "won": {"FuseLLM": {"target": 0.05, "tiny_code": 0.4, "tiny_docs": 0.3, "tiny_tables": 0.25}},
        "coverage": {"tiny_code": 0.91, "tiny_docs": 0.874, "tiny_tables": 0.93},
        "varm": {"units": [f"model.layers.{i // 7}.matrix_{i % 7}" for i in range(28)], "models": ["A", "B", "C"],
                 "weights": [[0.2 + 0.01 * i, 0.3, 0.5 - 0.01 * i] for i in range(28)]},
        "facts": {"steps": 400}, "versions": {"torch": "2.13.0"}, "commands": ["python fuse.py"],
    }  # fmt: skip


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    return write_report(example(), folder), folder


def test_numbers(report):
    folder = report[1]
    rows = {row["name"]: row for row in json.loads((folder / "results.json").read_text())["rows"]}
    assert rows["FuseLLM"]["average"] == pytest.approx(2.415)
    assert rows["FuseLLM"]["change"] == pytest.approx(50 * (2.40 / 2.45 + 2.43 / 2.47) - 100)
    assert rows["text only"]["change"] == 0
    assert rows["tiny_code"]["change"] == pytest.approx(100 * ((1.6 + 3.2 + 3.4) / 3 / 2.46 - 1))
    assert rows["text only"]["spread"] == pytest.approx(0.02)
    assert list(json.loads((folder / "results.json").read_text())["rows"][0]["bits_per_byte"]) == DOMAINS


def test_words_follow_the_numbers(report):
    seen = report[0]["seen"]
    fused = next(s for s in seen if s.startswith("FuseLLM: "))
    assert "better than text only" in fused
    assert "better in 2 of 2 seeds" in fused
    assert "more than the seeds differ" in fused
    chat = next(s for s in seen if s.startswith("FuseChat tiny_code"))
    assert "in 1 of 2 seeds, no more than the seeds differ" in chat
    assert "worse in 2 of 2 seeds" in next(s for s in seen if s.startswith("VaRM"))
    assert any("The best on average, sources aside, is FuseLLM" in s for s in seen)
    assert any("On code the best source is tiny_code" in s for s in seen)


def test_page_is_one_file(report):
    page = (report[1] / "report.html").read_text()
    assert not re.search(r'(?:src|href)="(?!data:)', page)
    assert "http" not in page
    assert page.count("data:image/png;base64,") == 5
    assert "Fusion on three domains &lt;&amp;&gt;" in page
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", (report[1] / "report.md").read_text()):
        assert (report[1] / picture).is_file()


def test_what_is_absent_is_left_out(tmp_path):
    full = example()
    write_report({k: full[k] for k in ("title", "baseline", "domains", "rows")}, tmp_path)
    assert "Training" not in (tmp_path / "report.md").read_text()


def test_compare_reads_it(report):
    figures = tables.compare([report[1]], report[1] / "compared")
    name = f"{report[1].name}: FuseLLM"
    assert figures[name]["average"] == pytest.approx(2.415)
    assert name in (report[1] / "compared/results.md").read_text()
