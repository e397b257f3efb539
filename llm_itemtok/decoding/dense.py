"""A dense model beside the language model: both look for items, and both score what either of them found.

Item tokens are shared, so what the language model learns of one item it says of its neighbours, too; a vector that is
an item's own remembers what followed this very item. The two err on different users. LIGER (arXiv:2411.18814) has both
in one network and ranks what beams found by vectors alone; here the dense model is a network of its own (SASRec, from
the log alone), it brings items as well, and the weighted mean of log-probabilities decides (a logarithmic opinion pool,
doi:10.1214/ss/1177013825).

Shape letters in this file: B histories, N items of the catalogue, M of them known to the dense model.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, final

import numpy as np
import safetensors
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor

from llm_itemtok.artifacts import FORMAT_VERSION, write_bytes
from llm_itemtok.errors import ArtifactError, DataError
from llm_itemtok.sasrec import SASRec

FILE_NAME = "rescorer.safetensors"
_FORMAT = "llm_itemtok.rescorer"
_SIZES = ("num_items", "width", "layers", "heads", "max_length")


@final
class Rescorer:
    """Log-probabilities of all items by a dense model.

    Attributes:
        network: in evaluation mode. Its rows are the first M of the catalogue; items that came later it does not know.
        items_sha256: hash of the ids of these M items, as `bundle.items_sha256` makes it.
    """

    def __init__(self, network: SASRec, items_sha256: str) -> None:
        """Score by `network`."""
        self.network = network.eval()
        self.items_sha256 = items_sha256

    def log_probs(self, histories: Sequence[np.ndarray]) -> NDArray[np.float32]:
        """Score all items that it knows.

        Args:
            histories: B arrays of catalogue rows, oldest first; rows that it does not know are passed over.

        Returns:
            float32 `[B, M]`, natural logarithms; each row's exponentials add up to 1.
        """
        known = [history[history < self.network.num_items] for history in histories]
        return torch.log_softmax(torch.from_numpy(self.network.scores(known)), dim=1).numpy()

    def save(self, folder: str | Path) -> Path:
        """Write `rescorer.safetensors` into a folder, atomically.

        Returns:
            The path of the file.
        """
        network = self.network
        sizes = {
            "num_items": network.num_items,
            "width": network.items.embedding_dim,
            "layers": len(network.layers),
            "heads": network.heads,
            "max_length": network.max_length,
            "items_sha256": self.items_sha256,
        }
        header = {"format": _FORMAT, "format_version": FORMAT_VERSION, **sizes}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
        path = Path(folder) / FILE_NAME
        write_bytes(path, safetensors.torch.save(tensors, metadata={"rescorer": json.dumps(header, sort_keys=True)}))
        return path

    @classmethod
    def load(cls, folder: str | Path) -> "Rescorer":
        """Read what `save` wrote, on the CPU.

        Raises:
            ArtifactError: if the file is missing, not of this format or version, or does not fit its own sizes.
        """
        path = Path(folder) / FILE_NAME
        if not path.is_file():
            raise ArtifactError(f"{path}: the model says that a dense model re-scores its items, and this is missing")
        header, tensors = _read(path)
        try:
            if header["layers"] > len(tensors):
                raise DataError(f"{header['layers']:,} layers, and {len(tensors)} weights")
            with torch.device("meta"):  # takes no memory: the sizes may be anything until the weights fit them
                network = SASRec(**{name: header[name] for name in _SIZES}, dropout=0.0)
            network.load_state_dict(tensors, assign=True)
            return cls(network, str(header["items_sha256"]))
        except (KeyError, TypeError, RuntimeError, DataError) as error:
            raise ArtifactError(
                f"{path}: sizes and weights of a dense model must belong together: {str(error).splitlines()[0]}"
            ) from error


def best_known(
    dense_BM: NDArray[np.float32],
    width: int,
    allowed: Sequence[np.ndarray | None] | None = None,
    excluded: Sequence[np.ndarray | None] | None = None,
) -> list[np.ndarray]:
    """The items that a dense model finds most probable.

    Args:
        dense_BM: as `Rescorer.log_probs` gives them.
        width: how many of each history at most.
        allowed: one array of catalogue rows a history, or None where all may come out.
        excluded: one array of catalogue rows a history that must not come out, or None.

    Returns:
        B arrays of catalogue rows, int64, in no order.
    """
    scores_BM = dense_BM.copy()
    B, M = scores_BM.shape
    for row in range(B):
        if allowed is not None and (only := allowed[row]) is not None:
            barred = np.ones(M, dtype=bool)
            barred[only[only < M]] = False
            scores_BM[row, barred] = -np.inf
        if excluded is not None and (without := excluded[row]) is not None:
            scores_BM[row, without[without < M]] = -np.inf
    last = np.argpartition(scores_BM, max(M - width, 0), axis=1)[:, max(M - width, 0) :]
    return [rows[np.isfinite(scores_BM[row, rows])] for row, rows in enumerate(last)]


class Both(NamedTuple):
    """Items of some histories, scored by the language model and by the dense one."""

    items: Sequence[np.ndarray]
    """B arrays of catalogue rows, int64."""
    own: Sequence[np.ndarray]
    """B float32 arrays beside them: log-probabilities of the language model."""
    dense_BM: NDArray[np.float32]
    """Log-probabilities of the dense model, of all items that it knows."""

    def mixed(self, share: float) -> list[np.ndarray]:
        """Give the dense model a share in [0, 1] of the score.

        Items that it does not know count as ones that it has no opinion of, 1 / M. To let them keep their own score
        would put them on another scale than all others.

        Returns:
            B float32 arrays: (1 - share) own + share dense.
        """
        M = self.dense_BM.shape[1]
        mixed = []
        for rows, own, dense_M in zip(self.items, self.own, self.dense_BM, strict=True):
            dense = np.where(rows < M, dense_M[np.minimum(rows, M - 1)], np.float32(-np.log(M)))
            mixed.append((1 - share) * own + share * dense)
        return mixed


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("rescorer", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (safetensors.SafetensorError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: not a readable safetensors file of a dense model: {error}") from error
    if not isinstance(header, dict) or header.get("format") != _FORMAT:
        raise ArtifactError(f"{path}: a safetensors file, but not of a dense model written by this package")
    version = header.get("format_version")
    if version != FORMAT_VERSION:
        raise ArtifactError(
            f"{path}: format {version} of a dense model is not what this version reads ({FORMAT_VERSION}); update "
            "llm-itemtok"
        )
    return header, tensors
