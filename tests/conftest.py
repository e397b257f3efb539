"""What every test gets: no network, no Hub, one thread, and a small catalogue with planted structure.

Sockets that leave the loopback are refused by pytest-socket (`--allow-hosts` in pyproject.toml).
"""

import os

# Before any import of torch or transformers, which read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"

import pytest

from llm_itemtok.data import splits, synthetic
from llm_itemtok.data.catalog import Catalog
from llm_itemtok.data.interactions import Interactions


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """Nothing that another run kept decides a test, commands in processes of their own included."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ITEMTOK_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


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
