"""Every kind of tokenizer and every option of one goes from a recipe to codes on disk."""

import pytest

from llm_itemtok.artifacts import read_json
from llm_itemtok.config import RunConfig
from llm_itemtok.items.codes import ItemCodes
from llm_itemtok.items.quantizers import load_quantizer
from llm_itemtok.pipeline.run import run

RECIPE = """
data: {source: synthetic, items: 60, users: 80}
vectors: {kind: tfidf-svd, dimensions: 16}
tokenizer: {kind: residual-kmeans, levels: 2, codebook_size: 8}
"""
RQVAE = ("tokenizer.kind=rqvae", "tokenizer.epochs=2", "tokenizer.hidden=[8]", "tokenizer.latent=4")
ALIGNED = (
    *("tokenizer.alignment=0.1", "tokenizer.collaborative.source=co-occurrence"),
    *("tokenizer.collaborative.dimensions=4", "tokenizer.diversity=0.1"),
)


@pytest.fixture
def made(tmp_path):
    def make(*overrides):
        path = tmp_path / "tiny.yaml"
        path.write_text(RECIPE, encoding="utf-8")
        return run(RunConfig.load(path, overrides), tmp_path / "run", until="items") / "codes" / "v0"

    return make


@pytest.mark.parametrize(
    "overrides",
    [
        ("tokenizer.balance=true", "tokenizer.sample=50"),
        (*RQVAE, "tokenizer.estimator=rotation", "tokenizer.revive=2"),
        (*RQVAE, "tokenizer.estimator=gumbel"),
        (*RQVAE, *ALIGNED),
        ("tokenizer.kind=product", "tokenizer.components=8"),
        ("tokenizer.kind=product", "tokenizer.rotation=opq"),
    ],
    ids=lambda overrides: " ".join(overrides)[10:50],
)
def test_options_reach_the_quantizer_that_is_saved(made, overrides):
    folder = made(*overrides)
    assert ItemCodes.load(folder).is_injective
    assert load_quantizer(folder).num_levels == 2


@pytest.mark.parametrize("source", ["co-occurrence", "vectors"])
def test_hierarchical_codes_are_unique_without_a_policy_and_have_no_quantizer(made, source):
    folder = made("tokenizer.kind=hierarchical", f"tokenizer.source={source}")
    codes = ItemCodes.load(folder)
    assert (codes.num_levels, codes.is_injective) == (2, True)
    assert codes.provenance["collisions"]["policy"] == "forbid"
    assert codes.provenance["tokenizer"]["source"] == source
    assert not (folder / "quantizer.safetensors").exists()
    assert read_json(folder / "quality.json")["collision_rate"] == 0


def test_defaults_of_the_options_are_what_a_recipe_without_them_asked_for(tmp_path):
    """Records of runs from before the options serve recipes of now: what was not there yet is off."""
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE, encoding="utf-8")
    off = {"revive": 0, "estimator": "straight-through", "alignment": 0.0, "diversity": 0.0}
    plain = RunConfig.load(path, ["tokenizer.kind=rqvae"]).to_dict()["tokenizer"]
    assert {name: plain[name] for name in off} == off
    assert "collaborative" not in plain
    plain = RunConfig.load(path).to_dict()["tokenizer"]
    assert (plain["balance"], plain["sample"]) == (False, 0)
