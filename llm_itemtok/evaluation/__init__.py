"""Evaluation: full item-level ranking, intervals, segments, and baselines on the same split."""
