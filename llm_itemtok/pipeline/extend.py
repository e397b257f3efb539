"""`itemtok extend`: a trained model that can recommend items that it was not trained on.

New items get codes that nobody has, near the items that they are like (`items.newcomers`). Nothing of the model
changes: its tokens mean what they meant, so a new item is ranked by what was learnt of the items whose codewords it
shares. A model that reads item vectors gets those of the new ones, too. Old items keep their codes, rows and scores.

Decisions:
- Vectors of new items must be of the source of the old ones'. Of a run they are made anew from its recipe, its data and
  the text of the new items; what is fitted, such as TF-IDF, is fitted on the catalogue of the run alone, so that codes
  do not depend on who comes with whom. A bundle without its run knows a sentence-transformers model only; everything
  else must be given.
- A run folder gets the next version of codes, with a trace, and then the new bundle; a bundle alone is exchanged in one
  step. If the first is there and the second is not, the same command does both again. With `out`, nothing is changed
  where the model is.
- What was measured stands in the run folder as it was: of the items that the model was trained with.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llm_itemtok import bundle, hub
from llm_itemtok.artifacts import (
    CATEGORIES,
    CODES,
    METRICS,
    MODEL,
    QUALITY,
    RECIPE,
    TRACE,
    atomic_folder,
    code_versions,
    read_json,
    refuse_model_of_run,
    remove_leftovers,
    run_of,
    write_json,
)
from llm_itemtok.config import RunConfig
from llm_itemtok.data.catalog import Catalog
from llm_itemtok.data.readers import read_items
from llm_itemtok.errors import ArtifactError, DataError
from llm_itemtok.items import vectors as item_vectors
from llm_itemtok.items.base import Quantizer
from llm_itemtok.items.codes import ItemCodes
from llm_itemtok.items.doctor import examine
from llm_itemtok.items.findings import judged
from llm_itemtok.items.newcomers import Newcomers, add_items
from llm_itemtok.items.quality import quality
from llm_itemtok.items.quantizers import read_quantizer
from llm_itemtok.pipeline.base_model import base_model
from llm_itemtok.pipeline.evaluate import write_categories
from llm_itemtok.pipeline.prepare import Dataset, load_data, progress_lines
from llm_itemtok.pipeline.push import card_of
from llm_itemtok.pipeline.run import alone_in
from llm_itemtok.pipeline.vectors import GIVE_VECTORS, Log, Sources
from llm_itemtok.recommender import Recommender
from llm_itemtok.settings import TfidfSvdVectors

OWN, NEAREST = "a new item, on the code of its vector", "a new item, on the nearest free code to its vector's"
"""Why a new item has its code."""


@dataclass(frozen=True)
class Extended:
    """What was done.

    Attributes:
        folder: of the bundle that has the new items.
        version: of the codes in the run folder; None where none was written.
        old: number of items before.
        added: number of new items.
        displaced: how many of these have the nearest free code, because another item had that of their vector.
        known: how many items of the file the model had already; they stay what they are.
    """

    folder: Path
    version: str | None
    old: int
    added: int
    displaced: int
    known: int

    def __str__(self) -> str:
        """For people."""
        codes = "" if self.version is None else f", codes {self.version}"
        return (
            f"{self.folder}: {self.added:,} new items beside {self.old:,}{codes}\n"
            f"  {self.added - self.displaced:,} on the code of their vector, {self.displaced:,} on the nearest free one"
            + (f"\n  {self.known:,} more of the file are known already, and stay what they are" if self.known else "")
        )


def extend(
    model: str | Path,
    items: Path,
    *,
    vectors: Path | None = None,
    out: Path | None = None,
    log: Log = lambda _line: None,
) -> Extended:
    """Give a model new items.

    Args:
        model: run folder, bundle or Hub id.
        items: the new items, in the format of a data folder's items file; known ones among them are passed over.
        vectors: of the new items (see `items.vectors.from_file`); made as the run made those of its items when None.
            For codes without a quantizer it must have the old items, too, so be parquet.
        out: folder of the extended bundle, new or itself a bundle; the model's own place when None.
        log: called with progress lines.

    Raises:
        ArtifactError: if there is no bundle at `model`, its parts do not belong together, or `out` is in use.
        CollisionError: if not all new items can have a code.
        DataError: if the file cannot be read, no item of it is new, or there are no vectors to be had.
    """
    run = run_of(Path(model))
    folder = bundle.locate(model).resolve() if run is None else run / MODEL
    _refuse_place(model, run, out)
    # From the beginning: two at once would begin with the same codes, and the items of one of them would be lost.
    with alone_in(out or run or folder):
        if run is not None and out is None:
            remove_leftovers(run)  # a kill in the middle of the exchange may have left no model
        folder = bundle.locate(run or folder)
        if out is None:
            _refuse_strangers(folder)
        return _extend(folder, run, items, vectors, out, log)


def _extend(folder: Path, run: Path | None, items: Path, vectors: Path | None, out: Path | None, log: Log) -> Extended:
    """As `extend`, of the bundle in `folder`, which belongs to `run`."""
    config = None if run is None else RunConfig.load(run / RECIPE)
    renamed = config.data.columns if config is not None and config.data.source == "folder" else {}
    given = read_items(items, columns=renamed)
    recommender = Recommender.from_pretrained(
        folder, device="cpu", trust_remote_code=config is not None and config.model.trust_remote_code
    )
    known_ids = set(recommender.item_ids)
    new = given.subset([row for row, item_id in enumerate(given.item_ids) if item_id not in known_ids])
    if not len(new):
        raise DataError(f"{items}: at least one item must be new to the model, but all {len(given):,} are known")
    codes, old = recommender.model.vocab.codes, len(recommender.item_ids)
    version = None if run is None else _version_of(run, codes)
    if recommender.quantizer is None and version is not None:
        recommender.quantizer = read_quantizer(version)  # of a run before bundles had it
    matrix, known = _matrices(recommender, new, vectors, run, config, log)
    found = add_items(codes, matrix, quantizer=recommender.quantizer, known=known)
    extended = recommender.extended(found.codes, new.item_ids, new.titles, matrix)
    card = card_of(extended, folder)
    place, name = folder if out is None else out, None
    if run is None or version is None or out is not None:
        extended.save_pretrained(place, card=card)
    else:
        name = _write_version(run, version, new, found, recommender.quantizer)
        extended.save_pretrained(folder, card=card)
    return Extended(place, name, old, len(new), int(found.displaced.sum()), len(given) - len(new))


def _refuse_place(model: str | Path, run: Path | None, out: Path | None) -> None:
    """Raise `ArtifactError` if something else than a bundle would be overwritten, or a download changed."""
    if out is not None:
        bundle.refuse_others(out, "an extended bundle")
        refuse_model_of_run(out)
    elif run is None and not Path(model).exists():
        raise ArtifactError(f"{model}: the copy of a Hub repository must stay as it is; name a folder with `--out`")


def _refuse_strangers(folder: Path) -> None:
    """Raise `ArtifactError` if files that are none of a bundle's would be lost with the folder that is exchanged."""
    others = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    others -= bundle.files(folder).keys()
    if others:
        raise ArtifactError(
            f"{folder}: a bundle that is exchanged must hold nothing else, found: {sorted(others)[:3]}; name another "
            "folder with `--out`"
        )


def _version_of(run: Path, codes: ItemCodes) -> Path:
    """The folder of the codes that a run's model has.

    Raises:
        ArtifactError: if it has others.
    """
    versions = [path for _, path in code_versions(run)]
    for version in reversed(versions):
        if ItemCodes.load(version) == codes:
            return version
    raise ArtifactError(
        f"{run}: model and {CODES} of a run must belong together, but none of the {len(versions)} versions is that of "
        "the model; were files mixed from two runs?"
    )


def _matrices(
    recommender: Recommender,
    new: Catalog,
    given: Path | None,
    run: Path | None,
    config: RunConfig | None,
    log: Log,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Vectors of the new items, float32 `[M, D]`, and, without a quantizer, of those that have vectors in the run."""
    wants_known = recommender.quantizer is None
    if recommender.model.vocab.codes.words is not None:
        return np.zeros((len(new), 1), dtype=np.float32), None  # refused with the reason where codes are given
    if given is not None:
        if wants_known and given.suffix != ".parquet":
            raise DataError(
                f"{given}: these codes have no quantizer, so the vectors of the old items are needed, too; give all in "
                "a .parquet with `item_id` and `vector`"
            )
        known = item_vectors.from_file(given, _named(recommender.item_ids)) if wants_known else None
        return item_vectors.from_file(given, new), known
    if run is None or config is None:
        return _of_a_bundle(recommender, new, log)
    sources = _sources(recommender, run, config, log)
    return sources.of_new(new, log), sources.make(log) if wants_known else None


def _named(item_ids: tuple[str, ...]) -> Catalog:
    """A catalogue of which nothing is known but ids."""
    nothing = ("",) * len(item_ids)
    return Catalog(item_ids, nothing, ((),) * len(item_ids), nothing, nothing)


def _of_a_bundle(recommender: Recommender, new: Catalog, log: Log) -> tuple[np.ndarray, None]:
    """Vectors where there is no run to ask: by the encoder that the bundle names, which must be one of the Hub."""
    source = recommender.generation.vectors
    encoder, is_text = source.get("model"), source.get("kind") == "sentence-transformers"
    if recommender.quantizer is not None and is_text and isinstance(encoder, str) and hub.is_id(encoder):
        log(f"item vectors by {encoder}, which the model names")
        return item_vectors.sentence_transformers(new.texts(), model=encoder), None
    kind = f"`{source['kind']}`" if "kind" in source else "a kind that it does not tell"
    if is_text:
        kind += " by a folder of another machine"
    raise DataError(
        f"a model without its run folder cannot make item vectors of {kind}, which takes the data of the run; "
        f"{GIVE_VECTORS}, or extend the run folder and push it again"
    )


def _sources(recommender: Recommender, run: Path, config: RunConfig, log: Log) -> Sources:
    """What the run's item vectors are made of.

    Raises:
        ArtifactError: if the data of the run are no longer those that the model was trained on.
    """
    data: Dataset = load_data(config.data, config.seed, {})
    size = len(data.catalog)
    if tuple(data.catalog.item_ids) != recommender.item_ids[:size]:
        raise ArtifactError(
            f"{run}: the data of the run must have the catalogue that the model was trained on, but their items "
            f"differ; {GIVE_VECTORS}"
        )
    fitted = any(isinstance(source, TfidfSvdVectors) for source in config.vector_sources.values())
    if fitted and (run / METRICS).is_file():
        trained_on = read_json(run / METRICS)["protocol"]["catalog_sha256"]
        if data.catalog.sha256 != trained_on:
            raise ArtifactError(
                f"{run}: `vectors.kind: tfidf-svd` is fitted to the texts of the catalogue, which must be "
                f"those that the model was trained on, but their texts differ; {GIVE_VECTORS}"
            )
    return Sources(
        config,
        data.catalog,
        data.split,
        base_model=lambda: base_model(config, data.catalog, run, log),
        progress=progress_lines(log, "item vectors"),
    )


def _write_version(run: Path, before: Path, new: Catalog, found: Newcomers, quantizer: Quantizer | None) -> str:
    """Write the next version of a run's codes, and the categories of all items where those of the old ones stand."""
    name = f"v{int(before.name[1:]) + 1}"
    whole = _with_categories(run / CATEGORIES, new, found.codes.num_items - len(new))
    with atomic_folder(run / CODES / name) as folder:
        found.codes.save(folder)
        if quantizer is not None:
            quantizer.save(folder)
        figures = quality(found.codes)
        facts = examine(found.codes, categories=None if whole is None else whole.categories)
        write_json(folder / QUALITY, {**figures, "doctor": judged(figures, facts)})
        pq.write_table(_trace(new, found), folder / TRACE)
    if whole is not None:
        write_categories(run / CATEGORIES, whole)
    return name


def _with_categories(path: Path, new: Catalog, old: int) -> Catalog | None:
    """Old and new items with their categories, as far as a run has written those of the old ones down."""
    if not path.is_file():
        return None
    table = pq.read_table(path).slice(0, old)  # more, if a call before this one was stopped half way
    ids = (*map(str, table["item"].to_pylist()), *new.item_ids)
    parts = (*(tuple(map(str, value or ())) for value in table["categories"].to_pylist()), *new.categories)
    return replace(_named(ids), categories=parts)


def _trace(new: Catalog, found: Newcomers) -> pa.Table:
    """Which items came, in the columns that an update's trace has."""
    size, codes = len(new), pa.list_(pa.int32())
    table = found.codes.table[-size:]
    return pa.table(
        {
            "item": pa.array(new.item_ids, pa.string()),
            "old": pa.nulls(size, codes),
            "new": pa.array(table.tolist(), codes),
            "why": pa.array([NEAREST if other else OWN for other in found.displaced.tolist()], pa.string()),
            "likelihood_before": pa.nulls(size, pa.float32()),
            "likelihood_after": pa.nulls(size, pa.float32()),
        }
    )
