"""What every test gets: no network, no Hub, one thread, draws of its own, and a small catalogue with planted structure.

Sockets that leave the loopback are refused by pytest-socket (`--allow-hosts` in pyproject.toml).
"""

import os
from collections.abc import Iterator
from pathlib import Path

# Before any import of torch or transformers, which read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"

import huggingface_hub.constants
import hypothesis
import pytest
import torch

from llm_itemtok.data import splits, synthetic
from llm_itemtok.data.catalog import Catalog
from llm_itemtok.data.interactions import Interactions
from tests import hub_server

# How long an example takes says what the machine does beside.
hypothesis.settings.register_profile("here", deadline=None)
hypothesis.settings.load_profile("here")


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """Nothing that another run kept decides a test, commands in processes of their own included."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ITEMTOK_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _own_draws():
    """What a test draws does not go by the tests that were before it, which is for chance to say."""
    torch.manual_seed(987)


@pytest.fixture(scope="session")
def _generated():
    return synthetic.generate(num_items=60, num_users=80, seed=7)


@pytest.fixture(scope="session")
def catalog(_generated) -> Catalog:
    """60 items with titles, categories and brands."""
    return _generated[0]


@pytest.fixture(scope="session")
def interactions(_generated) -> Interactions:
    """80 users' log over `catalog`."""
    return _generated[1]


@pytest.fixture(scope="session")
def split(catalog, interactions) -> splits.Split:
    """Leave-last-out of `interactions`."""
    return splits.leave_last_out(interactions, num_items=len(catalog))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[hub_server.Hub]:
    """A Hub on this machine that the real client talks to, and a token that may write there."""
    with hub_server.serve() as server:
        template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        settings = {
            "ENDPOINT": server.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": template,
            "HF_HUB_CACHE": str(tmp_path / "hub-cache"),
            "HF_TOKEN_PATH": str(tmp_path / "no-token"),
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
        }
        for name, value in settings.items():
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        # transformers keeps a client, and with it the address of the test that asked first.
        monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)
        monkeypatch.setenv("HF_TOKEN", hub_server.TOKEN)
        yield server
