"""Experiment plans: matched, powered, resumable runs of recipes, and the pages their results are read on."""
