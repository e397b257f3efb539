"""`python -m llm_itemtok` is the command `itemtok`."""

from llm_itemtok.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
