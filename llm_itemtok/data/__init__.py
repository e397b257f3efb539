"""Raw logs and item text in, checked sequences out.

`readers.read` turns a folder or a foreign format into a `Catalog` and `Interactions`; `splits`
cuts them into training sequences and evaluation cases; `describe` says what was found. Knows
nothing of vectors, codes, language models or torch.
"""
