"""`itemtok inspect`: the item-token doctor, wherever codes are kept.

A run knows most of its codes: figures that need item vectors and training sequences were measured when the codes were
made, and stand beside them. A bundle, a folder or a file of codes is judged by its table alone, with the items and
categories that lie around it.

Two tables are compared item by item: by id where both say which items they are of, else by row, and then that is said.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from llm_itemtok.artifacts import CODES, ITEMS, MODEL, RECIPE, code_versions, run_of, write_text
from llm_itemtok.config import RunConfig
from llm_itemtok.errors import ArtifactError, ItemTokError
from llm_itemtok.items.codes import FILE_NAME, ItemCodes
from llm_itemtok.items.compare import compare_codes, comparison_text
from llm_itemtok.items.doctor import examine, facts_text
from llm_itemtok.items.files import are_rows, export_codes, read_items_and_codes
from llm_itemtok.items.findings import Finding, findings, gaps, judged, verdict_text
from llm_itemtok.items.quality import figures_table, quality
from llm_itemtok.pipeline.prepare import load_data
from llm_itemtok.report.codes import movement as movement_of
from llm_itemtok.report.page import render_codes
from llm_itemtok.report.run_folder import Item, RunFolder, Version, codes_alone, read_items, read_run


def inspect(path: Path, compare: Path | None = None, *, export: Path | None = None, html: Path | None = None) -> str:
    """Examine the item tokens of a run, a bundle, a codes folder or a file of codes.

    Args:
        path: what to look at; of a run, the newest version.
        compare: other codes of the same items.
        export: file to write the codes to, in the format that its name says (see `items.files`).
        html: page to write, with what is said here and pictures.

    Returns:
        Figures, verdict and what moved, as text.

    Raises:
        ArtifactError: if there are no codes, the two are of different items, or ids to export are not known.
        DataError: if the name of a file says no format, or a file of codes is not of its format.
    """
    patient = _Patient.at(path)
    parts, shown, movement = [patient.text], [patient], None
    if compare is not None:
        other = _Patient.at(compare)
        rows, joined = _joined(patient, other)
        codes = other.codes
        there = ItemCodes(codes.table[rows], codes.sizes, names=codes.names, words=codes.words)
        found = compare_codes(patient.codes, there)
        parts += [other.text, f"{joined}\n{comparison_text(found, patient.codes, there, patient.labels)}"]
        shown.append(other)
        movement = movement_of(joined, found, patient.codes, there, patient.labels)
    if export is not None:
        parts.append(f"codes: {export_codes(patient.codes, patient.item_ids(), export)}")
    if html is not None:
        lead = verdict_text(patient.findings, patient.gaps).splitlines()[0]
        write_text(html, render_codes([one.on_a_page() for one in shown], lead, movement))
        parts.append(f"page: {html}")
    return "\n\n".join(parts)


def _joined(patient: "_Patient", other: "_Patient") -> tuple[np.ndarray, str]:
    """For each item of the one its row in the other, int64 `[N]`, and a sentence that says how that is known.

    Raises:
        ArtifactError: if they are of different items.
    """
    rows = np.arange(patient.codes.num_items)
    if patient.run_path is not None and patient.run_path == other.run_path:
        _refuse_other_numbers(patient, other)
        return rows, "Items are those of one run, in its order."
    here, there = patient.known_ids, other.known_ids
    if here is None or there is None:
        _refuse_other_numbers(patient, other)
        silent = [str(one.place) for one, ids in ((patient, here), (other, there)) if ids is None]
        verb = "does" if len(silent) == 1 else "do"
        return rows, f"Items are joined by row, because {' and '.join(silent)} {verb} not say which items there are."
    place = {item_id: row for row, item_id in enumerate(there)}
    if place.keys() == set(here):
        return np.array([place[item_id] for item_id in here], dtype=np.int64), "Items are joined by id."
    if are_rows(set(there), here) or are_rows(set(here), there):
        return rows, "Items are joined by row, because the ids of one side are the numbers of the rows."
    absent, more = [item_id for item_id in here if item_id not in place], len(place.keys() - set(here))
    sample = ", ".join(map(repr, absent[:3] or sorted(place.keys() - set(here))[:3]))
    raise ArtifactError(
        f"codes to compare must be of the same items, but of {len(here):,} items in {patient.place} and {len(there):,} "
        f"in {other.place}, {len(absent):,} are in the first only and {more:,} in the second only, such as {sample}"
    )


def _refuse_other_numbers(patient: "_Patient", other: "_Patient") -> None:
    if other.codes.num_items != patient.codes.num_items:
        raise ArtifactError(
            f"codes to compare must be of the same items, found: {patient.codes.num_items:,} in {patient.place} "
            f"and {other.codes.num_items:,} in {other.place}"
        )


@dataclass(frozen=True)
class _Patient:
    """Codes, and what is known around them.

    Attributes:
        codes: to be judged.
        place: the folder or the file that holds them.
        run: what was found in the run folder around it; None without one.
        run_path: that folder.
        ids: of the items, where the file has them.
    """

    codes: ItemCodes
    place: Path
    run: RunFolder | None = None
    run_path: Path | None = None
    ids: tuple[str, ...] | None = None

    @classmethod
    def at(cls, path: Path) -> "_Patient":
        """Codes in a file, in a folder, in its `model/`, or the newest version of its `codes/`.

        Raises:
            ArtifactError: if there are none.
            DataError: if a file is none of item codes.
        """
        if path.is_file() and path.name != FILE_NAME:
            ids, codes = read_items_and_codes(path)
            return cls(codes, path, ids=ids)
        path = path.parent if path.is_file() else path
        newest_first = [folder for _, folder in reversed(code_versions(path))]
        for place in (path, *newest_first, path / MODEL):
            if (place / FILE_NAME).is_file():
                here = place.resolve()
                run_path = run_of(here.parents[1] if here.parent.name == CODES else here)
                return cls(ItemCodes.load(place), place, read_run(run_path) if run_path else None, run_path)
        raise ArtifactError(
            f"{path}: no item codes here; name a run, a model folder, a folder with item_codes.safetensors, or a file "
            "of codes (*.index.json, *.json, *.csv)"
        )

    @cached_property
    def items(self) -> tuple[Item, ...]:
        """The items, where they are written down; else none."""
        if self.ids is not None:
            return tuple(Item(item_id, "") for item_id in self.ids)
        if (self.place / ITEMS).is_file():
            return read_items(self.place / ITEMS, self.codes.num_items, [])
        return self.run.items if self.run is not None else ()

    @property
    def labels(self) -> list[str]:
        """What to call the items."""
        return [item.label for item in self.items] or [f"row {row}" for row in range(self.codes.num_items)]

    def item_ids(self) -> list[str]:
        """Ids in the order of the rows, from the data of the run if they stand nowhere else.

        Raises:
            ArtifactError: if there are codes only.
        """
        if self.items:
            return [item.item_id for item in self.items]
        if self.run_path is None:
            raise ArtifactError(
                f"{self.place}: codes alone do not say which items they are of; name their run or their model folder"
            )
        config = RunConfig.load(self.run_path / RECIPE)
        return list(load_data(config.data, config.seed, {}).catalog.item_ids)

    @cached_property
    def known_ids(self) -> list[str] | None:
        """`item_ids`, or None where they are not known, or the data of the run have changed or gone."""
        try:
            ids = self.item_ids()
        except (ItemTokError, OSError):
            return None
        return ids if len(ids) == self.codes.num_items else None

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What was measured when the codes were made; else what can be told now."""
        for version in reversed(self.run.versions if self.run is not None else ()):
            known = version.quality.get("doctor", {})
            if known.get("sha256") == self.codes.sha256:
                return dict(known)
        return examine(self.codes, categories=self.run.categories if self.run is not None else None)

    @cached_property
    def report(self) -> dict[str, Any]:
        """What `quality` says."""
        return quality(self.codes)

    @cached_property
    def findings(self) -> list[Finding]:
        """What is not as it should be."""
        return findings(self.report, self.facts)

    @property
    def gaps(self) -> list[str]:
        """What was not judged."""
        return gaps(self.report, self.facts)

    @property
    def text(self) -> str:
        """Figures and verdict."""
        verdict = verdict_text(self.findings, self.gaps)
        return "\n".join([str(self.place), figures_table(self.report), facts_text(self.facts), "", verdict])

    def on_a_page(self) -> RunFolder:
        """The same for a page about item tokens."""
        figures = {**self.report, "doctor": judged(self.report, self.facts)}
        version = Version(self.place.resolve().name, self.codes, figures, {})
        categories = self.run.categories if self.run is not None else None
        name = f"{self.run.name}, {version.name}" if self.run is not None else version.name
        return codes_alone(name, version, self.items, categories)
