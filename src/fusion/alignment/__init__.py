"""Alignment: a source LLM's distributions, moved to the target's tokens and vocabulary.

normalise (tokens → bytes and roles) → dtw or spans (positions) → vocabulary (ids) → project.
"""

from fusion.alignment.dtw import TokenAlignment, align_tokens
from fusion.alignment.normalise import Vocabulary, read_vocabulary, token_bytes
from fusion.alignment.project import ALIGNED, NONE, ONE_HOT, Aligner, Projection
from fusion.alignment.spans import byte_ends, span_positions
from fusion.alignment.statistics import Statistics
from fusion.alignment.vocabulary import vocabulary_map

__all__ = [
    "ALIGNED",
    "NONE",
    "ONE_HOT",
    "Aligner",
    "Projection",
    "Statistics",
    "TokenAlignment",
    "Vocabulary",
    "align_tokens",
    "byte_ends",
    "read_vocabulary",
    "span_positions",
    "token_bytes",
    "vocabulary_map",
]
