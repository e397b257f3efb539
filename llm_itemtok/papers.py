"""The papers of the methods that a recipe names; docs/papers.md says what of them is done where."""

from collections.abc import Mapping
from typing import Any, NamedTuple


class Paper(NamedTuple):
    """A paper on arXiv."""

    number: str
    year: int
    author: str
    title: str

    def bibtex(self) -> str:
        """As an entry of a bibliography, under `arxiv:NUMBER`."""
        fields = {
            "title": self.title,
            "author": f"{self.author} and others",
            "eprint": self.number,
            "archivePrefix": "arXiv",
            "year": str(self.year),
        }
        lines = ",\n".join(f"  {field:<13} = {{{text}}}" for field, text in fields.items())
        return f"@misc{{arxiv:{self.number},\n{lines}\n}}"


ITEM_TOKENS = Paper("2305.05065", 2023, "Rajput, Shashank", "Recommender Systems with Generative Retrieval")
"""Cited whatever the recipe says."""

PAPERS = {
    ("tokenizer", "kind", "rqvae"): Paper(
        "2203.01941", 2022, "Lee, Doyup", "Autoregressive Image Generation using Residual Quantization"
    ),
    ("tokenizer", "kind", "hierarchical"): Paper(
        "2305.06569", 2023, "Hua, Wenyue", "How to Index Item IDs for Recommendation Foundation Models"
    ),
    ("tokenizer", "estimator", "rotation"): Paper(
        "2410.06424", 2024, "Fifty, Christopher", "Restructuring Vector Quantization with the Rotation Trick"
    ),
    ("tokenizer", "collisions", "sinkhorn"): Paper(
        "2311.09049", 2023, "Zheng, Bowen",
        "Adapting Large Language Models by Integrating Collaborative Semantics for Recommendation",
    ),
    ("vectors", "source", "sasrec"): Paper(
        "1808.09781", 2018, "Kang, Wang-Cheng", "Self-Attentive Sequential Recommendation"
    ),
    ("model", "adapter", "lora"): Paper(
        "2106.09685", 2021, "Hu, Edward J.", "LoRA: Low-Rank Adaptation of Large Language Models"
    ),
    ("scoring", "kind", "recursive"): Paper(
        "2602.20704", 2026, "Wang, Z.", "IntRR: A Framework for Integrating SID Redistribution and Length Reduction"
    ),
    ("objective", "kind", "token-weighted"): Paper(
        "2601.17787", 2026, "Chiu, Wei-Ning",
        "Token-Weighted Multi-Target Learning for Generative Recommenders with Curriculum Learning",
    ),
    ("update", "kind", "self-improve"): Paper(
        "2412.17171", 2024, "Chen, Runjin",
        "Enhancing Item Tokenization for Generative Recommendation through Self-Improvement",
    ),
    ("update", "kind", "bilevel"): Paper(
        "2510.21242", 2025, "Bai, Y.",
        "Bi-Level Optimization for Generative Recommendation: Bridging Tokenization and Generation",
    ),
    ("update", "kind", "alternate"): Paper(
        "2409.05546", 2024, "Liu, Enze", "Generative Recommender with End-to-End Learnable Item Tokenization"
    ),
    ("rescoring", "kind", "sasrec"): Paper(
        "2411.18814", 2024, "Yang, Liu", "Unifying Generative and Dense Retrieval for Sequential Recommendation"
    ),
}  # fmt: skip
"""Section of a recipe, setting, value → the method's paper."""


def cited(recipe: Mapping[str, Any]) -> list[Paper]:
    """The papers of a recipe, given section by section as read from YAML."""

    def has(section: str, name: str, value: str) -> bool:
        given = recipe.get(section, {})
        return any(part.get(name) == value for part in (given, *given.get("parts", ())))

    return [ITEM_TOKENS, *(paper for place, paper in PAPERS.items() if has(*place))]
