"""The house keeps its order: imports go downwards, files stay readable, nothing unsafe comes in."""

import ast
import re
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "fusion"
FLOORS = [
    {"config", "topk", "artifact"},
    {"alignment", "fusing", "objective", "merging"},
    {"store", "corpus", "sources", "checkpoint", "head", "sharding", "tiny", "plan"},
    {"data", "module", "evaluation", "training"},
    {"stages", "launch"},
    {"mainjob"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
FILES = sorted(SOURCE.rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Rooms of this package that a file imports, also inside functions."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fusion"):
            names = [node.module] if node.module != "fusion" else [f"fusion.{a.name}" for a in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.startswith("fusion.")]
        rooms |= {name.split(".")[1] for name in names}
    return rooms


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_go_downwards(path: Path) -> None:
    if room(path) == "__init__":
        return
    above = {r for r in imported(path) if FLOOR[r] > FLOOR[room(path)]}
    assert not above, f"{path.name} reaches up to {above}"


def test_no_room_without_a_floor() -> None:
    assert {room(path) for path in FILES} - {"__init__"} <= FLOOR.keys()


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_nothing_unsafe(path: Path) -> None:
    text = path.read_text()
    assert not re.search(r"^\s*(import|from) pickle|trust_remote_code=True|weights_only=False", text, re.M)
    assert path.name != "utils.py"
