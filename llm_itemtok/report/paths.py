"""The report's part on a recursive model: which items' vectors go by their codes, and how far.

A recursive network makes an item's vector of codewords that it chooses for the item. Where it chooses those of the
item's code, the model reads what it writes; elsewhere the item was moved to where recommending is easier. Both are
meant; how many items do which tells what an alignment does, and whether redistribution took place at all.

This module decides what is shown; `item_paths.json` holds the shares, and `plots` draws.
"""

from llm_itemtok.report.plots import Bar, Chart, bar_chart
from llm_itemtok.report.run_folder import RunFolder


def charts(run: RunFolder) -> list[Chart]:
    """Draw the share of items whose vector has the codeword of their code, by level and over all levels."""
    found = run.item_paths
    if not found.get("levels"):
        return []
    names = run.codes.names if run.codes is not None else [f"level-{level}" for level in range(len(found["levels"]))]
    bars = [Bar(name, share) for name, share in zip(names, found["levels"], strict=True)]
    bars += [Bar("all levels", found["whole"], ours=True), Bar("unlike vectors", found["distinct"])]
    title = (
        f"Share of {found['items']:,} items whose vector is made of the codewords of their code, and of unlike vectors"
    )
    return [bar_chart(title, bars)]
