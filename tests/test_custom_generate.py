"""Plain `transformers` with the bundle's own code gives the items that this package recommends, and no others."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoTokenizer, GenerationConfig

from llm_itemtok.custom_generate import generate as module
from llm_itemtok.custom_generate.generate import generate
from llm_itemtok.recommender import Recommender
from tests import hub_server
from tests.test_bundle import shifted
from tests.test_recommender import IDS, adapter, made_of, merged
from tests.tiny import ENCODER_DECODERS, FAMILIES, KINDS, plain_class, tiny_codes, tiny_item_model

HISTORIES = [["item-3", "item-7", "item-3"], [], ["item-1"]]


def prompts(folder: Path, recommender: Recommender, histories, family: str):
    """Histories as the card says: item tokens after the start token, or before the end token."""
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    items = [json.loads(line) for line in (folder / "items.jsonl").read_text().splitlines()]
    codes = {item["id"]: item["code"] for item in items}
    texts = ["".join(codes[item] for item in history) for history in histories]
    texts = [text + "</s>" if family in ENCODER_DECODERS else "<s>" + text for text in texts]
    return tokenizer(texts, add_special_tokens=False, return_tensors="pt", padding=True)


def ids_of(recommender: Recommender, sequences: torch.Tensor, users: int) -> list[list[str]]:
    """Item ids of generated rows, by user; a KeyError for a path of no item."""
    vocab = recommender.model.vocab
    rows = {tuple(path): row for row, path in enumerate(vocab.paths.tolist())}
    found = [recommender.item_ids[rows[tuple(path)]] for path in sequences[:, -vocab.num_levels :].tolist()]
    each = len(found) // users
    return [found[user * each : (user + 1) * each] for user in range(users)]


def saved(recommender: Recommender, folder: Path, family: str):
    recommender.save_pretrained(folder)
    return plain_class(family).from_pretrained(folder)


@pytest.mark.parametrize("normaliser", ["vocab", "level", "items", "children"])
@pytest.mark.parametrize("family", KINDS)
def test_the_items_and_scores_are_those_of_the_recommender(family, normaliser, tmp_path):
    """For every normaliser: over a level or the items, log-probabilities differ from the vocabulary's by a constant."""
    recommender = merged(family, tied=False, normaliser=normaliser)
    model = saved(recommender, tmp_path, family)
    inputs = prompts(tmp_path, recommender, HISTORIES, family)
    out = generate(model, **inputs, num_return_sequences=12, return_dict_in_generate=True, output_scores=True)
    expected = recommender.recommend_batch(HISTORIES, 12)
    assert ids_of(recommender, out.sequences, 3) == [[item.item_id for item in items] for items in expected]
    scores = torch.tensor([item.score for items in expected for item in items])
    assert torch.allclose(out.sequences_scores, scores, atol=1e-5)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in KINDS])
def test_other_families_agree_too(family, tmp_path):
    recommender = merged(family)
    model = saved(recommender, tmp_path, family)
    sequences = generate(model, **prompts(tmp_path, recommender, HISTORIES, family), num_return_sequences=20)
    expected = recommender.recommend_batch(HISTORIES, 20)
    assert ids_of(recommender, sequences, 3) == [[item.item_id for item in items] for items in expected]


@pytest.mark.parametrize("sizes", [(60,), (60, 1), (1, 60), (2, 2, 3, 5), (6, 5, 4)])
@pytest.mark.parametrize("beams", [1, 3, 25])
def test_only_items_come_out_each_once(sizes, beams, tmp_path):
    """Also where fewer codewords may follow than there are beams, which is when `transformers` makes paths up."""
    recommender = merged(codes=tiny_codes(60, sizes))
    model = saved(recommender, tmp_path, "llama")
    inputs = prompts(tmp_path, recommender, HISTORIES, "llama")
    for found in ids_of(recommender, generate(model, **inputs, num_beams=beams, num_return_sequences=beams), 3):
        assert len(set(found)) == beams


def test_more_than_the_catalogue_are_all_of_it(tmp_path):
    recommender = merged(codes=tiny_codes(9))
    model = saved(recommender, tmp_path, "llama")
    inputs = prompts(tmp_path, recommender, HISTORIES, "llama")
    for found in ids_of(recommender, generate(model, **inputs, num_return_sequences=50), 3):
        assert sorted(found) == sorted(IDS[:9])


def test_how_the_base_model_likes_to_write_changes_nothing(tmp_path):
    recommender = merged()
    model = saved(recommender, tmp_path, "llama")
    inputs = prompts(tmp_path, recommender, HISTORIES, "llama")
    plain = generate(model, **inputs, num_return_sequences=9)
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.6, top_k=3, top_p=0.5, repetition_penalty=1.7, length_penalty=2.0,
        no_repeat_ngram_size=1, num_beams=2, max_length=200, bos_token_id=1, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    assert torch.equal(generate(model, **inputs, num_return_sequences=9), plain)


@pytest.mark.parametrize("family", KINDS)
def test_an_adapter_decodes_on_its_base_model(family, tmp_path):
    recommender = adapter(tmp_path / "base", family, tied=False)
    recommender.save_pretrained(tmp_path / "bundle")
    base = plain_class(family).from_pretrained(tmp_path / "base")
    base.config.tie_word_embeddings = False
    base.resize_token_embeddings(36, mean_resizing=False)
    model = PeftModel.from_pretrained(base, tmp_path / "bundle").base_model.model
    inputs = prompts(tmp_path / "bundle", recommender, HISTORIES, family)
    sequences = generate(model, **inputs, num_return_sequences=9, bundle=str(tmp_path / "bundle"))
    expected = recommender.recommend_batch(HISTORIES, 9)
    assert ids_of(recommender, sequences, 3) == [[item.item_id for item in items] for items in expected]
    with pytest.raises(ValueError, match=r"with an adapter, name the adapter's repository: bundle=REPO"):
        generate(model, **inputs)


TASTES = [
    {"forced_eos_token_id": 2}, {"forced_bos_token_id": 1}, {"suppress_tokens": list(range(21, 30))},
    {"begin_suppress_tokens": [21, 22, 23]}, {"min_length": 30}, {"min_new_tokens": 20}, {"bad_words_ids": [[22]]},
    {"sequence_bias": [[[22], -9.0]]}, {"early_stopping": True}, {"renormalize_logits": True}, {"guidance_scale": 1.5},
    {"max_length": 2}, {"eos_token_id": list(range(21, 36))}, {"stop_strings": "<a_1>"}, {"max_time": 0.0},
    {"encoder_no_repeat_ngram_size": 1}, {"typical_p": 0.3, "min_p": 0.1}, {"prompt_lookup_num_tokens": 3},
    {"exponential_decay_length_penalty": (1, 1.5)}, {"num_return_sequences": 3, "num_beams": 4},
    {"watermarking_config": {"greenlist_ratio": 0.25, "bias": 9.0}}, {"output_scores": True},
]  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_no_setting_of_the_models_own_configuration_changes_what_comes_out(family, tmp_path):
    """Each of these once changed the items, or ended in an error."""
    recommender = merged(family)
    model = saved(recommender, tmp_path, family)
    inputs = prompts(tmp_path, recommender, HISTORIES, family)
    plain = generate(model, **inputs, num_return_sequences=9)
    for taste in TASTES:
        own = GenerationConfig.from_model_config(model.config)
        for name, value in taste.items():
            setattr(own, name, value)
        model.generation_config = own
        assert torch.equal(generate(model, **inputs, num_return_sequences=9), plain), taste
        assert model.generation_config is own


def test_a_bundle_exchanged_in_its_place_is_read_anew(tmp_path):
    for seed in (0, 5):
        recommender = merged(codes=tiny_codes(seed=seed))
        model = saved(recommender, tmp_path / "bundle", "llama")
        inputs = prompts(tmp_path / "bundle", recommender, HISTORIES, "llama")
        expected = [[item.item_id for item in items] for items in recommender.recommend_batch(HISTORIES, 9)]
        assert ids_of(recommender, generate(model, **inputs, num_return_sequences=9), 3) == expected


@pytest.mark.parametrize("own", [True, False])
def test_codes_of_another_run_are_refused(own, tmp_path):
    """Beside the model, or where `bundle` says: its paths would be items of another catalogue."""
    recommender = merged()
    model = saved(recommender, tmp_path / "bundle", "llama")
    inputs = prompts(tmp_path / "bundle", recommender, HISTORIES, "llama")
    if own:
        tiny_codes(seed=5).save(tmp_path / "bundle")
        with pytest.raises(ValueError, match=r"the model and item_codes.safetensors must belong together"):
            generate(model, **inputs)
        model.config.item_codes_sha256 = None  # of an earlier version
        with pytest.raises(ValueError, match=r"generation.json and item_codes.safetensors must belong together"):
            generate(model, **inputs)
    else:
        merged(codes=tiny_codes(seed=5)).save_pretrained(tmp_path / "other")
        with pytest.raises(
            ValueError, match=r"the model is of the codes \w{12} and these are \w{12}; were files mixed"
        ):
            generate(model, **inputs, bundle=str(tmp_path / "other"))


def test_a_tokenizer_of_another_run_is_refused(tmp_path):
    """Its item tokens stand elsewhere; where the table has padding, nothing else would tell."""
    recommender = made_of(*tiny_item_model("llama", padding=40))
    model = saved(recommender, tmp_path, "llama")
    inputs = prompts(tmp_path, recommender, HISTORIES, "llama")
    shifted(tmp_path, recommender)
    with pytest.raises(ValueError, match=r"item tokens begin at id 21 and the tokenizer's at 22; were files mixed"):
        generate(model, **inputs)


def test_what_is_kept_between_calls_is_not_changed_by_them(tmp_path):
    recommender = merged()
    model = saved(recommender, tmp_path, "llama")
    sha256 = model.config.item_codes_sha256
    _, kept = module._read(str(tmp_path), None, sha256)
    before = list(kept.prefixes)
    generate(model, **prompts(tmp_path, recommender, HISTORIES, "llama"))
    assert module._read(str(tmp_path), None, sha256)[1] is kept
    assert all(now is then for now, then in zip(kept.prefixes, before, strict=True))
    assert kept.to(torch.device("cpu")) is not kept


def test_padding_on_the_right_is_refused_and_the_tokenizer_pads_on_the_left(tmp_path):
    recommender = merged()
    model = saved(recommender, tmp_path, "llama")
    left = prompts(tmp_path, recommender, HISTORIES, "llama")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    texts = tokenizer.batch_decode(left["input_ids"])
    assert tokenizer.padding_side == "left"
    tokenizer.padding_side = "right"
    right = tokenizer([texts[0], "<s>"], add_special_tokens=False, return_tensors="pt", padding=True)
    with pytest.raises(ValueError, match=r"must be padded on the left, but `attention_mask` ends in 0; set `tokenizer"):
        generate(model, **right)


@pytest.mark.parametrize("given", [{"num_beams": 0}, {"num_return_sequences": 0}, {"num_return_sequences": -1}])
def test_numbers_below_one_are_refused(given, tmp_path):
    recommender = merged()
    model = saved(recommender, tmp_path, "llama")
    with pytest.raises(ValueError, match=rf"`{next(iter(given))}` must be at least 1, was: "):
        generate(model, **prompts(tmp_path, recommender, HISTORIES, "llama"), **given)


@pytest.mark.parametrize(
    "given",
    [{"do_sample": True}, {"max_new_tokens": 20}, {"repetition_penalty": 1.2}, {"foo": 1},
     {"generation_config": GenerationConfig()}, {"prefix_allowed_tokens_fn": list}, {"logits_processor": [len]}],
)  # fmt: skip
def test_other_ways_of_decoding_are_refused(given, tmp_path):
    recommender = merged()
    model = saved(recommender, tmp_path, "llama")
    with pytest.raises(
        ValueError, match=rf"which takes inputs, .*attention_mask.*; leave these out: .*{next(iter(given))}"
    ):
        generate(model, **prompts(tmp_path, recommender, HISTORIES, "llama"), **given)


def test_the_file_needs_torch_transformers_and_safetensors_alone(tmp_path):
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    tops = {name.split(".")[0] for name in names}
    assert tops - sys.stdlib_module_names == {"torch", "transformers", "safetensors"}
    merged().save_pretrained(tmp_path)
    for name in ("generate.py", "requirements.txt"):
        ours = Path(module.__file__).with_name(name)
        assert (tmp_path / "custom_generate" / name).read_bytes() == ours.read_bytes()


ALONE = """
import contextlib, io, json, re, sys
sys.modules["llm_itemtok"] = None  # nobody has installed it here
from huggingface_hub import hf_hub_download

def blocks(repo):
    card = open(hf_hub_download(repo, "README.md"), encoding="utf-8").read()
    return re.findall(r"```python\\n(.*?)```", card, re.DOTALL)

for repo in sys.argv[1:]:
    ours, plain = blocks(repo)
    try:
        exec(ours, {})
    except ImportError:
        pass
    else:
        raise AssertionError("the package was there")
    space = {}
    exec(plain, space)
    if "auto" in repo:  # the other way in: loaded with trust, `model.generate` is the repository's own
        kind = type(space["model"])
        model = kind.from_pretrained(repo, trust_remote_code=True)
        again = model.generate(**space["prompt"], num_return_sequences=10)
        assert (again == space["ids"]).all()
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
def test_the_code_of_the_card_runs_where_this_package_is_not_installed(hub, tmp_path):
    """By the real loader: the code and the codes come from the Hub, for a whole model, a T5 and an adapter."""
    recommenders = {"anna/auto": merged("llama", tied=False), "anna/t5": merged("t5", tied=False)}
    based = adapter(tmp_path / "base")
    files = {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()}
    hub.repos["models", "anna/base"] = hub_server.Repo("models", private=True)
    hub.repos["models", "anna/base"].commit("main", files, "a base model")
    recommenders["anna/adapter"] = based.with_generation(base="anna/base")
    for repo, recommender in recommenders.items():
        recommender.push_to_hub(repo)
    environment = os.environ | {
        "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": hub_server.READ_TOKEN, "PYTHONPATH": "",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", ALONE, *recommenders],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    printed = [ast.literal_eval(line) for line in done.stdout.splitlines() if line.startswith("[")]
    for recommender, spelled in zip(recommenders.values(), printed, strict=True):
        vocab = recommender.model.vocab
        best = recommender.recommend(["item-0", "item-1"], 10)
        assert [re.sub(" ", "", text) for text in spelled] == [vocab.spell(IDS.index(item.item_id)) for item in best]
