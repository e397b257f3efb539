"""`itemtok push`: a run's model, or a bundle, into a Hub repository.

What is pushed is the bundle on disk, model card included, so what was measured and what is pushed are the same files.
Only a merged model is made anew, and with it the card: of the run's numbers where there is a run around the bundle.
"""

import os
from pathlib import Path
from typing import Any

from llm_itemtok import bundle
from llm_itemtok.artifacts import ENVIRONMENT, METRICS, MODEL, RECIPE, read_json, run_of
from llm_itemtok.config import RunConfig
from llm_itemtok.hub import Pushed
from llm_itemtok.pipeline.stages import LOCAL
from llm_itemtok.recipe_file import place_of
from llm_itemtok.recommender import Recommender, push_folder


def push(
    path: Path,
    repo: str,
    *,
    revision: str | None = None,
    public: bool = False,
    message: str | None = None,
    merged: bool = False,
    licence: str | None = None,
) -> Pushed:
    """Push.

    Args:
        path: run folder or bundle.
        repo: `OWNER/NAME`; made when missing.
        revision: branch, made when missing; the main one when None.
        public: make a new repository public, or push into one that is.
        message: of the commit.
        merged: push the whole model in place of an adapter.
        licence: identifier for the card.

    Raises:
        ArtifactError: if there is no bundle at `path`, or its parts do not belong together.
        HubError: if it cannot be pushed; the repository then shows what it did before.
    """
    folder = bundle.locate(path)
    message = message or "Push a recommender"
    if not merged or bundle.read_generation(folder / bundle.GENERATION).layout == "merged":
        return push_folder(folder, repo, revision=revision, private=not public, message=message, licence=licence)
    recommender = Recommender.from_pretrained(folder, device="cpu").merged()
    return recommender.push_to_hub(
        repo,
        revision=revision,
        private=not public,
        message=message,
        card=card_of(recommender, folder),
        licence=licence,
    )


def card_of(recommender: Recommender, folder: Path) -> str:
    """The card of what was made of a bundle: with the recipe of its run, and its numbers if they are of this catalogue.

    Items added later were not ranked when the numbers were taken.

    Args:
        recommender: the card's.
        folder: of the bundle.
    """
    run = run_of(folder)
    if run is None:
        return recommender.card()
    theirs = bundle.read_generation(run / MODEL / bundle.GENERATION)
    metrics = read_json(run / METRICS) if (run / METRICS).is_file() else None
    if metrics is not None and (
        theirs.catalog_sha256 != recommender.generation.catalog_sha256
        or theirs.codes_sha256 != recommender.generation.codes_sha256
        or metrics["protocol"]["counts"]["items"] != len(recommender.item_ids)
    ):
        metrics = None
    return recommender.card(metrics, _recipe_of(run))


def _recipe_of(run: Path) -> dict[str, Any]:
    """The recipe of a run folder, in which what was a place then looks like one, wherever one stands now."""
    recipe = RunConfig.load(run / RECIPE).to_dict()
    known = read_json(run / ENVIRONMENT) if (run / ENVIRONMENT).is_file() else {}
    for dotted in known.get(LOCAL, ()):
        place, name = place_of(recipe, dotted)
        place[name] = os.path.join(".", place[name])
    return recipe


def told(pushed: Pushed) -> str:
    """What a push did, for people."""
    where = f"{pushed.repo} ({'private' if pushed.private else 'public'}, branch {pushed.revision})"
    if not pushed.uploaded and not pushed.deleted:
        return f"{where}: nothing had changed\n{pushed.url}"
    lines = [f"{where}: {len(pushed.uploaded)} files pushed, {len(pushed.unchanged)} were there already"]
    lines += [f"  {name}" for name in pushed.uploaded]
    lines += [f"  {name} (deleted)" for name in pushed.deleted]
    return "\n".join([*lines, pushed.url])
