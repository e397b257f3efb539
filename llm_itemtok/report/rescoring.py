"""The report's part on a dense model that scores items beside the language model: what its share does.

At a share of 0 the language model ranks what either found, at 1 the dense model does. A curve that is highest between
the two says that they err on different users.

This module decides what is shown; `rescoring.json` holds the figures, and `plots` draws.
"""

from llm_itemtok.report.plots import Chart, Series, line_chart
from llm_itemtok.report.run_folder import RunFolder


def charts(run: RunFolder) -> list[Chart]:
    """Draw validation NDCG@10, by which the share was chosen, over the share of the dense model."""
    found = run.rescoring
    if not found.get("validation"):
        return []
    line = Series("NDCG@10", [(at["share"], at["ndcg@10"]) for at in found["validation"]])
    title = (
        "Validation by the dense model's share in the scores: at 0 the language model ranks what both found, at 1 the "
        f"dense one; {found['share']:g} was chosen"
    )
    return [line_chart(title, [line], x_label="share", mark_best=True)]
