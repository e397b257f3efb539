"""Item codes as tokens of the language model: spellings, paths, initial rows, the trie of legal paths."""
