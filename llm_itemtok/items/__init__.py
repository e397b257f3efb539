"""From item text to item codes: vectors, tokenizers, collisions, quality.

Knows items, never token ids or language models' vocabularies: that is `llm_itemtok.vocab`.
"""
