"""Weight-space merging, streamed from disk to disk: VaRM and its baselines."""

from fusion.merging.stage import merge, stage

__all__ = ["merge", "stage"]
