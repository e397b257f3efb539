"""A bundle is read as it was saved or refused in words; nothing that it brings is run, nothing else is taken along."""

import json
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from llm_itemtok import bundle
from llm_itemtok.cli import main
from llm_itemtok.errors import ArtifactError, HubError, ItemTokError
from llm_itemtok.model.prompts import encode_text
from llm_itemtok.recommender import Recommender
from llm_itemtok.vocab.text_vocab import extended
from tests.test_recommender import adapter, answers, made_of, merged
from tests.tiny import tiny_item_model, tiny_tokenizer

CODE = """
open({marker!r}, "w").write("ran")
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class T(PreTrainedTokenizerFast): pass
class C(LlamaConfig): model_type = "custom"
class M(LlamaForCausalLM): config_class = C
"""


def change(path: Path, **values) -> None:
    """Set values of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("kind", ["llama", "custom"])
@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_in_a_bundle_is_neither_run_nor_asked_about(file, kind, tmp_path, monkeypatch):
    """Whoever presses `y` at a prompt of the library would have run it."""
    folder = merged().save_pretrained(tmp_path / "bundle")
    (folder / "evil.py").write_text(CODE.format(marker=str(tmp_path / "marker")))
    if file == "config.json":
        places = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}
        change(folder / file, auto_map=places, model_type=kind)
    else:
        change(folder / file, auto_map={"AutoTokenizer": ["evil.T", None]}, tokenizer_class="T")
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda question="": asked.append(question) or "y")
    if (file, kind) == ("config.json", "llama"):  # the library has its own code for this one
        Recommender.from_pretrained(folder)
    else:
        with pytest.raises(ArtifactError, match="need no code of its own, which is never run"):
            Recommender.from_pretrained(folder)
    assert not asked
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_saved_tokenizer_cuts_and_pads_nothing_whatever_was_done_with_it(family, tmp_path):
    """A server reads `tokenizer.json` itself, and would cut every longer history without a word."""
    recommender = merged(family)
    encode_text(recommender.tokenizer, ["kids toy " * 100])
    recommender.tokenizer(["toy", "toy car kids"], truncation=True, max_length=2, padding=True)
    folder = recommender.save_pretrained(tmp_path / "bundle")
    read = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert (read.truncation, read.padding) == (None, None)
    assert len(read.encode("<a_0>" * 300, add_special_tokens=False).ids) == 300
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    assert not settings.keys() & {"is_local", "local_files_only", "max_length", "stride", "truncation_strategy"}
    assert settings["padding_side"] == ("right" if family == "t5" else "left")
    again = Recommender.from_pretrained(folder).save_pretrained(tmp_path / "again")
    for file in folder.rglob("*"):
        if file.is_file():
            assert (again / file.relative_to(folder)).read_bytes() == file.read_bytes(), file.name


def test_only_an_adapter_needs_a_base_model_that_others_have(tmp_path):
    (tmp_path / "base").mkdir()
    bundle.refuse_unshareable(merged(base=str(tmp_path / "base")).generation)
    of_hub = merged().with_generation(layout="adapter", base="org/base").generation
    bundle.refuse_unshareable(of_hub)
    places = (str(tmp_path / "base"), "../mine/base", "~/mine/base", "mine/more/base", "C:\\mine", "file:///mine/base")
    for base in places:
        with pytest.raises(HubError, match=r"must have a base model on the Hub, was: the folder .*; push the whole"):
            bundle.refuse_unshareable(merged().with_generation(layout="adapter", base=base).generation)


def test_weights_of_another_time_or_layout_are_not_of_the_bundle(tmp_path):
    whole = merged().save_pretrained(tmp_path / "whole")
    before = set(bundle.files(whole))
    shards = {"model.safetensors.index.json", "model-00001-of-00002.safetensors"}
    for name in (*shards, "adapter_model.safetensors", "adapter_config.json"):
        (whole / name).write_text("{}")
    (whole / "model-a").mkdir()
    (whole / "model-a" / "bc-of-xxxxx.safetensors").write_text("user-17")
    assert set(bundle.files(whole)) == before
    beside = adapter(tmp_path / "base").save_pretrained(tmp_path / "adapter")
    before = set(bundle.files(beside))
    for name in (*shards, "model.safetensors", "config.json"):
        (beside / name).write_text("{}")
    assert set(bundle.files(beside)) == before


def test_an_adapter_beside_a_whole_model_is_refused(tmp_path):
    """The library would put it into the model, though a push leaves it out."""
    whole, beside = merged().save_pretrained(tmp_path / "whole"), tmp_path / "adapter"
    adapter(tmp_path / "base").save_pretrained(beside)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        shutil.copy(beside / name, whole / name)
    with pytest.raises(ItemTokError, match=r"must have no adapter beside it, found: adapter_config.json in .*whole"):
        Recommender.from_pretrained(whole)


def test_links_to_other_places_are_not_followed(tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "generate.py").write_text("user-17 bought item-3")
    folder = merged().save_pretrained(tmp_path / "bundle")
    (folder / "merges.txt").symlink_to(tmp_path / "outside" / "generate.py")
    with pytest.raises(ArtifactError, match=r"these are links to another place: \['merges.txt'\]; put the files there"):
        bundle.files(folder)
    (folder / "merges.txt").unlink()
    shutil.rmtree(folder / "custom_generate")
    (folder / "custom_generate").symlink_to(tmp_path / "outside")
    with pytest.raises(ArtifactError, match=r"links to another place: \['custom_generate/generate.py'\]"):
        bundle.files(folder)


@pytest.mark.parametrize("place", ["../outside.safetensors", "/etc/passwd", "evil.bin"])
def test_parts_of_a_model_lie_in_its_folder(place, tmp_path):
    folder = merged().save_pretrained(tmp_path / "bundle")
    (folder / "model.safetensors").rename(tmp_path / "outside.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {"x": place}}))
    for read in (Recommender.from_pretrained, bundle.files):
        with pytest.raises(ArtifactError, match="an index must name parts"):
            read(folder)


def test_a_folder_with_something_else_in_it_is_not_replaced(tmp_path):
    recommender = merged()
    folder = recommender.save_pretrained(tmp_path / "bundle")
    recommender.save_pretrained(folder)
    (tmp_path / "empty").mkdir()
    recommender.save_pretrained(tmp_path / "empty")
    (folder / "notes.txt").write_text("mine")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "README.md").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for place in (folder, tmp_path / "thesis", tmp_path / "file"):
        with pytest.raises(ArtifactError, match=r"a new folder or replace a bundle, found: other files \['\w"):
            recommender.save_pretrained(place)
    assert (folder / "notes.txt").read_text() == (tmp_path / "thesis" / "README.md").read_text() == "mine"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layout": "whole"}, "`layout` must be merged or adapter, was: 'whole'"),
        ({"normaliser": "softmax"}, "`normaliser` must be .*children.*, was: 'softmax'"),
        ({"dtype": ["float32"]}, "`dtype` must be float32 or bfloat16 or auto, was"),
        ({"beam": 0}, "`beam` must be a whole number of at least 1, was: '0'"),
        ({"beam": True}, "`beam` must be a whole number"),
        ({"history_length": "5"}, "`history_length` must be a whole number"),
        ({"mask_seen": 1}, "`mask_seen` must be true or false"),
        ({"repeats": 0}, "`repeats` must be true or false"),
        ({"codes_sha256": None}, "`codes_sha256` must be a text, was"),
        ({"base": 3}, "`base` must be a text or null"),
        ({"protocol": []}, "`protocol` must be a JSON object"),
        ({"format_version": "1"}, "`format_version` must be a whole number"),
    ],
)
def test_settings_of_the_wrong_kind_are_refused(changes, message, tmp_path):
    folder = merged().save_pretrained(tmp_path / "bundle")
    change(folder / "generation.json", **changes)
    with pytest.raises(ArtifactError, match=f"generation.json: {message}"):
        Recommender.from_pretrained(folder)


@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "item_codes.safetensors",
     "items.jsonl", "generation.json"],
)  # fmt: skip
def test_a_file_cut_short_is_one_message(name, tmp_path, capsys):
    folder = merged().save_pretrained(tmp_path / "bundle")
    content = (folder / name).read_bytes()
    for kept in (content[: len(content) // 2], b"", b"\xff\xfe" + content):
        (folder / name).write_bytes(kept)
        assert main(["recommend", str(folder), "--history", "item-3"]) == 2
        assert str(folder) in capsys.readouterr().err


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_file_of_an_adapter_cut_short_is_one_message(name, tmp_path):
    folder = adapter(tmp_path / "base").save_pretrained(tmp_path / "bundle")
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(ArtifactError, match=r"was (a|the) file cut short"):
        Recommender.from_pretrained(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"id": ["x"]}, "1: a line must hold an item with `id` and `title` and `code`, each a text in UTF-8, was: "),
        ({"id": None}, "1: a line must hold"),
        ({"id": 7}, "1: a line must hold"),
        ({"id": "\ud800"}, "1: a line must hold"),
        ({"title": {"en": "x"}}, "1: a line must hold"),
        ({"title": None}, "1: a line must hold"),
        ({"title": "\ud800"}, "1: a line must hold"),
        ({"code": 1}, "1: a line must hold"),
        ({"id": "item-1"}, " each item must be there once, but 'item-1' is there 2 times"),
        ("[" * 100_000, "1: not JSON: maximum recursion"),
        ('{"id": ' + "1" * 5000 + "}", "1: not JSON: Exceeds the limit"),
    ],
)
def test_items_have_distinct_ids_and_titles_that_are_texts(changes, message, tmp_path, capsys):
    """What they are is printed, encoded and looked up later, far from the file that would have to be named."""
    folder = merged().save_pretrained(tmp_path / "bundle")
    first, *others = (folder / "items.jsonl").read_text().split("\n")
    line = changes if isinstance(changes, str) else json.dumps(json.loads(first) | changes)
    (folder / "items.jsonl").write_text("\n".join([line, *others]))
    assert main(["recommend", str(folder), "--history", "item-3"]) == 2
    assert f"items.jsonl:{message}" in capsys.readouterr().err


def test_items_may_have_no_title(tmp_path):
    folder = merged().save_pretrained(tmp_path / "bundle")
    lines = [json.loads(line) | {"title": ""} for line in (folder / "items.jsonl").read_text().splitlines()]
    (folder / "items.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert {item.title for item in Recommender.from_pretrained(folder).recommend([], 3)} == {""}


def shifted(folder: Path, recommender: Recommender) -> None:
    """Put the tokenizer of another run there, whose item tokens are the same and stand elsewhere."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["extra"])
    extended(tokenizer, recommender.model.vocab.codes)
    tokenizer.save_pretrained(folder)


def test_item_tokens_must_stand_where_the_model_was_trained_with_them(tmp_path):
    """Rows are found by their ids, so all answers would be others. Where the table has padding, shapes agree."""
    whole = made_of(*tiny_item_model("llama", padding=40))
    beside = adapter(tmp_path / "base")
    for recommender, name in ((whole, "whole"), (beside, "adapter")):
        folder = recommender.save_pretrained(tmp_path / name)
        assert answers(Recommender.from_pretrained(folder)) == answers(recommender)
        shifted(folder, recommender)
        with pytest.raises(ArtifactError, match=r"item tokens begin at id 21 and the tokenizer's at 22; were files"):
            Recommender.from_pretrained(folder)


def test_a_whole_model_of_an_earlier_version_does_not_say_where_and_is_taken(tmp_path):
    recommender = merged()
    folder = recommender.save_pretrained(tmp_path / "bundle")
    settings = json.loads((folder / "config.json").read_text())
    assert settings.pop("item_tokens_first_id") == 21
    (folder / "config.json").write_text(json.dumps(settings))
    assert answers(Recommender.from_pretrained(folder)) == answers(recommender)


def test_a_tokenizer_pads_as_it_goes_on(tmp_path):
    folder = merged().save_pretrained(tmp_path / "bundle")
    rows = AutoTokenizer.from_pretrained(folder)(["<a_0>", "<a_0><a_1>"], padding=True)["attention_mask"]
    assert [row[-1] for row in rows] == [1, 1]
