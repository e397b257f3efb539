"""What a bundle carries for users who do not have this package: code that `transformers` runs by `custom_generate`.

`generate.py` is copied into every bundle as it stands, so it imports nothing of this package.
"""
