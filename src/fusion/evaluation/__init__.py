"""What models are worth: bits per byte, lm-eval's suites, MT-Bench; tables and reports."""

from fusion.evaluation.stage import evaluate

__all__ = ["evaluate"]
