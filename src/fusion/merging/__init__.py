"""Weight-space merging, streamed from disk to disk: VaRM and its baselines."""

from fusion.merging.run import merge, stage

__all__ = ["merge", "stage"]
