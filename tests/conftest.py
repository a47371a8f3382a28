"""Real data is used where it is: a folder `shared` beside the repository, or `$FUSION_SHARED`."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real tokenizers, models, corpora and golden files; the test skips without it."""
    folder = Path(os.environ.get("FUSION_SHARED", ROOT.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"no real data: {folder} is absent (set FUSION_SHARED)")
    return folder
