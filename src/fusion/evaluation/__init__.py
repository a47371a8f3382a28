"""What models are worth: bits per byte, lm-eval's suites, MT-Bench; tables and reports."""

from typing import Any

from fusion.config import Evaluate


def evaluate(config: Evaluate) -> dict[str, Any]:
    """The stage of evaluate.py; torch is imported when there is something to do, not while the command line is read."""
    from fusion.evaluation import stage

    return stage.evaluate(config)


__all__ = ["evaluate"]
