"""Entry point for `accelerate launch` from a checkout: `accelerate launch scripts/train.py --config RECIPE …`.

The same flags as `itemtok run`; from an installed wheel use `accelerate launch -m llm_itemtok run RECIPE …`.
"""

import sys

from llm_itemtok.cli import main


def run_arguments(arguments: list[str]) -> list[str]:
    """Turn `--config RECIPE …` into the arguments of `itemtok run`."""
    rest = list(arguments)
    if "--config" in rest:
        place = rest.index("--config")
        rest = [*rest[place + 1 : place + 2], *rest[:place], *rest[place + 2 :]]
    return ["run", *rest]


if __name__ == "__main__":
    sys.exit(main(run_arguments(sys.argv[1:])))
