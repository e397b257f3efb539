"""`itemtok inspect`: the item-token doctor, wherever codes are kept.

A run knows most of its codes: figures that need item vectors and training sequences were measured when the codes were
made, and stand beside them. A bundle or a folder of codes is judged by its table alone, with the items and categories
that lie around it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from llm_itemtok.artifacts import CODES, ITEMS, MODEL, RECIPE, write_text
from llm_itemtok.config import RunConfig
from llm_itemtok.errors import ArtifactError
from llm_itemtok.items.codes import FILE_NAME, ItemCodes
from llm_itemtok.items.compare import compare_codes, comparison_text
from llm_itemtok.items.doctor import Finding, as_json, examine, facts_text, findings, verdict_text
from llm_itemtok.items.files import export_codes
from llm_itemtok.items.quality import figures_table, quality
from llm_itemtok.pipeline.prepare import load_data
from llm_itemtok.report import render_codes
from llm_itemtok.report_run import Item, RunFolder, Version, read_items, read_run


def inspect(path: Path, compare: Path | None = None, *, export: Path | None = None, html: Path | None = None) -> str:
    """Examine the item tokens of a run, a bundle or a codes folder.

    Args:
        path: what to look at; of a run, the newest version.
        compare: other codes of the same items.
        export: file to write the codes to, in the format that its name says (see `items.files`).
        html: page to write, with what is said here and pictures.

    Returns:
        Figures, verdict and what moved, as text.

    Raises:
        ArtifactError: if there are no codes, the two have different numbers of items, or ids to export are not known.
        DataError: if the name of the file to export says no format.
    """
    patient = _Patient.at(path)
    parts = [patient.text]
    if compare is not None:
        other = _Patient.at(compare)
        if other.codes.num_items != patient.codes.num_items:
            raise ArtifactError(
                f"codes to compare must be of the same items, found: {patient.codes.num_items:,} in {patient.place} "
                f"and {other.codes.num_items:,} in {other.place}"
            )
        found = compare_codes(patient.codes, other.codes)
        parts += [other.text, comparison_text(found, patient.codes, other.codes, patient.labels)]
    if export is not None:
        parts.append(f"codes: {export_codes(patient.codes, patient.item_ids(), export)}")
    if html is not None:
        write_text(html, patient.page())
        parts.append(f"page: {html}")
    return "\n\n".join(parts)


@dataclass(frozen=True)
class _Patient:
    """Codes, and what is known around them.

    Attributes:
        codes: to be judged.
        place: the folder that holds them.
        run: what was found in the run folder around it; None without one.
        run_path: that folder.
    """

    codes: ItemCodes
    place: Path
    run: RunFolder | None
    run_path: Path | None

    @classmethod
    def at(cls, path: Path) -> "_Patient":
        """Codes in a folder, in its `model/`, or the newest version of its `codes/`.

        Raises:
            ArtifactError: if there are none.
        """
        versions = (path / CODES).glob("v[0-9]*") if path.is_dir() else []
        newest_first = sorted(versions, key=lambda folder: int(folder.name[1:]), reverse=True)
        for place in (path, *newest_first, path / MODEL):
            if (place / FILE_NAME).is_file():
                codes = ItemCodes.load(place)
                around = (place, *place.resolve().parents[:2])
                run_path = next((folder for folder in around if (folder / RECIPE).is_file()), None)
                return cls(codes, place, read_run(run_path) if run_path else None, run_path)
        raise ArtifactError(
            f"{path}: no item codes here; name a run, a model folder or a folder with item_codes.safetensors"
        )

    @cached_property
    def items(self) -> tuple[Item, ...]:
        """The items, where they are written down; else none."""
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
    def facts(self) -> dict[str, Any]:
        """What was measured when the codes were made; else what can be told now."""
        for version in reversed(self.run.versions if self.run is not None else ()):
            known = version.quality.get("doctor", {})
            if known.get("sha256") == self.codes.sha256:
                return dict(known)
        categories = self.run.categories if self.run is not None else None
        return examine(self.codes, categories=categories)

    @cached_property
    def report(self) -> dict[str, Any]:
        """What `quality` says."""
        return quality(self.codes)

    @cached_property
    def findings(self) -> list[Finding]:
        """What is not as it should be."""
        return findings(self.report, self.facts)

    @property
    def text(self) -> str:
        """Figures and verdict."""
        return "\n".join(
            [str(self.place), figures_table(self.report), facts_text(self.facts), "", verdict_text(self.findings)]
        )

    def page(self) -> str:
        """The same with pictures."""
        facts: Mapping[str, Any] = self.facts | {"findings": as_json(self.findings)}
        version = Version(self.place.resolve().name, self.codes, {**self.report, "doctor": facts}, {})
        categories = self.run.categories if self.run is not None else None
        lead = verdict_text(self.findings).splitlines()[0]
        name = f"{self.run.name}, {version.name}" if self.run is not None else version.name
        return render_codes(name, version, self.items, categories, lead)
