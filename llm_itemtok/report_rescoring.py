"""The report's part on a dense model that scores items beside the language model: what its share does.

At a share of 0 the language model ranks what either found, at 1 the dense model does. A curve that is highest between
the two says that they err on different users.

This module decides what is shown; `rescoring.json` holds the figures, and `report_plots` draws.
"""

from llm_itemtok.report_plots import Chart, Series, line_chart
from llm_itemtok.report_run import RunFolder


def charts(run: RunFolder) -> list[Chart]:
    """Draw validation metrics over the share of the dense model, the best of them ringed."""
    found = run.rescoring
    if not found.get("validation"):
        return []
    named = {"Recall@10": "recall@10", "NDCG@10": "ndcg@10"}
    lines = [Series(name, [(at["share"], at[key]) for at in found["validation"]]) for name, key in named.items()]
    title = (
        f"Validation by the dense model's share in the scores: 0 is the language model alone, 1 the dense model alone, "
        f"and {found['share']:g} was chosen"
    )
    return [line_chart(title, lines, x_label="share", from_zero=True, mark_best=True)]
