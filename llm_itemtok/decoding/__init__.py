"""From a model and a trie to items: beams that share one encoding of the history, and exact scores."""
