"""All kinds of quantizer there are, and reading one back from disk.

Apart from `base`, because it must know the final classes, which are built on `base`.
"""

import json
from pathlib import Path

import safetensors
import torch

from llm_itemtok.artifacts import FORMAT_VERSION
from llm_itemtok.errors import ArtifactError, DataError
from llm_itemtok.items.base import QUANTIZER_FILE, QUANTIZER_FORMAT, Quantizer
from llm_itemtok.items.product import ProductQuantizer
from llm_itemtok.items.residual_kmeans import ResidualKMeansQuantizer
from llm_itemtok.items.rqvae import RQVAEQuantizer

_CLASSES: dict[str, type[ResidualKMeansQuantizer] | type[RQVAEQuantizer] | type[ProductQuantizer]] = {
    "ResidualKMeansQuantizer": ResidualKMeansQuantizer,
    "RQVAEQuantizer": RQVAEQuantizer,
    "ProductQuantizer": ProductQuantizer,
}


def read_quantizer(folder: Path) -> Quantizer | None:
    """The quantizer that a folder holds, or None where there is none; see `load_quantizer`."""
    return load_quantizer(folder) if (folder / QUANTIZER_FILE).is_file() else None


def load_quantizer(folder: str | Path) -> Quantizer:
    """Read a quantizer written by `Quantizer.save`, on the CPU and in evaluation mode.

    Args:
        folder: the folder that was saved into, or the file itself.

    Raises:
        ArtifactError: if the file is missing, not of this format or version, or does not fit its own settings.
    """
    path = Path(folder)
    path = path / QUANTIZER_FILE if path.is_dir() else path
    if not path.is_file():
        raise ArtifactError(f"{path}: no quantizer there; expected a folder with {QUANTIZER_FILE}, or that file")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("quantizer", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (safetensors.SafetensorError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: not a readable safetensors file of a quantizer: {error}") from error
    if not isinstance(header, dict) or header.get("format") != QUANTIZER_FORMAT:
        raise ArtifactError(f"{path}: a safetensors file, but not of a quantizer written by this package")
    if header.get("format_version") != FORMAT_VERSION:
        raise ArtifactError(
            f"{path}: a quantizer of format version {header.get('format_version')!r}; this version of llm-itemtok "
            f"reads version {FORMAT_VERSION}"
        )
    if header.get("class") not in _CLASSES:
        raise ArtifactError(f"{path}: unknown kind of quantizer {header.get('class')!r}; known: {', '.join(_CLASSES)}")
    try:
        with torch.device("meta"):  # takes no memory: the sizes may be anything until the weights fit them
            _CLASSES[header["class"]](**header["settings"]).load_state_dict(tensors, assign=True)
        with torch.random.fork_rng(devices=[]):  # the caller's random numbers are not ours to use up
            quantizer = _CLASSES[header["class"]](**header["settings"])
        quantizer.load_state_dict(tensors)
    except (KeyError, TypeError, RuntimeError, DataError) as error:
        raise ArtifactError(f"{path}: the quantizer contradicts its own settings: {error}") from error
    return quantizer.eval()
