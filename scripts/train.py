"""Entry point for `accelerate launch` from a checkout: `accelerate launch scripts/train.py --config RECIPE …`.

The same flags as `itemtok run`; from an installed wheel use `accelerate launch -m llm_itemtok run RECIPE …`.
"""

import argparse
import sys

from llm_itemtok.cli import main


def run_arguments(arguments: list[str]) -> list[str]:
    """Turn `--config RECIPE …` into the arguments of `itemtok run`."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--config", required=True, help="the recipe")
    known, rest = parser.parse_known_args(arguments)
    return ["run", known.config, *rest]


if __name__ == "__main__":
    sys.exit(main(run_arguments(sys.argv[1:])))
