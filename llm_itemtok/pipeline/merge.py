"""`itemtok merge`: an adapter and its base model as one bundle with a whole model, for servers that take no adapters.

The base model is read where the adapter says it is, so it must be reachable; nothing of the adapter's bundle changes.
"""

from pathlib import Path

from llm_itemtok import bundle
from llm_itemtok.artifacts import refuse_model_of_run
from llm_itemtok.errors import ArtifactError
from llm_itemtok.pipeline.push import card_of
from llm_itemtok.recommender import Recommender


def merge(path: str | Path, out: Path) -> Path:
    """Merge.

    Args:
        path: run folder, bundle or Hub id with an adapter.
        out: folder of the merged bundle; one that is there already is replaced only if it is a bundle and nothing else.

    Returns:
        `out`, written whole or not at all.

    Raises:
        ArtifactError: if there is no adapter at `path`, its parts do not belong together, or `out` is in use.
    """
    bundle.refuse_others(out, "a merged bundle")
    refuse_model_of_run(out)
    folder = bundle.locate(path)
    if bundle.read_generation(folder / bundle.GENERATION).layout == "merged":
        raise ArtifactError(f"{path}: what is merged must be an adapter, found: a whole model; use it as it is")
    if out.resolve() == folder.resolve():
        raise ArtifactError(f"{out}: a merged bundle must not take its adapter's place; choose another folder")
    recommender = Recommender.from_pretrained(folder, device="cpu").merged()
    return recommender.save_pretrained(out, card=card_of(recommender, folder))
