"""A bundle's model card: what it is, how to use it with and without this package, what was measured, and how.

Decisions:
- Built from the bundle, `metrics.json` and the recipe alone, so it says nothing about users. Of a local path only the
  last name is told, of secrets nothing, and the name of whoever made the run is struck out.
- The metadata block is `huggingface_hub.ModelCardData`, with every test metric as `model-index` and the protocol as its
  arguments: a number without its protocol compares with nothing.
- Code in the card runs as it stands. Where the bundle is stands once a block, in `HERE = ...`: the folder until it is
  pushed, the repository from then on (`for_repo`).
- No licence is guessed: the weights come from somebody's base model and the titles from somebody's catalogue.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from llm_itemtok import hub
from llm_itemtok.bundle import Generation
from llm_itemtok.errors import HubError
from llm_itemtok.evaluation.metrics import metric_name
from llm_itemtok.model.item_lm import Reads
from llm_itemtok.papers import cited

_TAGS = ("recommendation", "generative-retrieval", "semantic-ids", "llm-itemtok")
_HERE = re.compile(r'^HERE = ".*"$', re.MULTILINE)
_SECRET = re.compile(r"(^|_)(tokens?|secrets?|secret_name|passwords?|passwd|credentials?|keys?)$|apikey$")
"""Names of settings, in small letters, whose texts are never told."""
_NO_LICENCE = "none is stated here, so ask before you use it"

_LOAD_MERGED = "model = {auto}.from_pretrained(HERE)"
_LOAD_ADAPTER = """base = {auto}.from_pretrained("{base}"{revision})
{untie}base.resize_token_embeddings(max(base.config.vocab_size, len(tokenizer)), mean_resizing=False)
model = PeftModel.from_pretrained(base, HERE)"""

_OURS = """## Use

```python
from llm_itemtok import Recommender

HERE = "."
model = Recommender.from_pretrained(HERE)
for item in model.recommend({ids}, k=10):  # a history of item ids, oldest first
    print(item.rank, item.item_id, item.title, item.score)
```
"""
_PLAIN = """
Without that package, with `transformers`{peft} alone (`trust_remote_code` runs `custom_generate/generate.py` of this
repository, which keeps the beams to items that exist):

```python
{imports}

HERE = "."
tokenizer = AutoTokenizer.from_pretrained(HERE)
{load}
history = "{history}"{comment}
prompt = tokenizer(history, add_special_tokens=False, return_tensors="pt")
ids = model.generate(**prompt, num_return_sequences={k}, custom_generate=HERE, trust_remote_code=True{bundle})
print(tokenizer.batch_decode(ids[:, -{levels}:]))  # item tokens of the {k} best items, best first
```

`items.jsonl` has the item tokens (`code`), id and title of every item. {prompt}.
Rows of several histories are padded on the left. The model reads the {length} most recent items of a history: leave
older ones out{seen}.
"""
_NETWORK = """
It loads through this package only: what it {knows} stands in `item_network.safetensors`, which plain `transformers` and
`peft` pass over, so the model that they load would answer wrongly.
"""
_RESCORED = """
A dense model of the log, in `rescorer.safetensors`, has a share of {share:g} in the scores. Only this package asks it.
"""
_UNLIKE = "What plain `transformers` finds is ranked by the language model alone, which is not what was measured.\n"
_WORDS = """
The items are spelled in words of the model's own vocabulary, so no plain `transformers` code keeps to them yet.
"""


@dataclass(frozen=True)
class Subject:
    """What a card is about.

    Attributes:
        generation: of the bundle.
        items: number of items.
        levels: tokens an item has, the most where they differ.
        example: ids of one or two items.
        codes: their item tokens; None for items spelled in existing words.
        start: token that a decoder-only model's prompt begins with.
        end: token that a prompt ends with which an encoder reads; None for decoder-only models.
        tied: whether the head is the input table.
        varied: whether items differ in how many tokens they have.
        reads: how items stand in what the model reads.
    """

    generation: Generation
    items: int
    levels: int
    example: Sequence[str]
    codes: Sequence[str] | None
    start: str
    end: str | None
    tied: bool
    varied: bool = False
    reads: Reads = "tokens"


def card(subject: Subject, metrics: Mapping[str, Any] | None = None, recipe: Mapping[str, Any] | None = None) -> str:
    """Write the card.

    Args:
        subject: the bundle.
        metrics: as in `metrics.json`; a card without them says that nothing was measured.
        recipe: resolved, as plain values; secrets and places are struck out here.

    Returns:
        Markdown with its metadata block.
    """
    base = _hub_base(subject.generation.base) or _hub_base((recipe or {}).get("model", {}).get("name"))
    recipe = None if recipe is None else redacted(recipe)
    plain = subject.reads == "tokens"
    library = "transformers" if subject.generation.layout == "merged" else "peft"
    data = ModelCardData(
        library_name=library if plain else "llm-itemtok",
        tags=[*_TAGS, *(["custom_generate"] if subject.codes and plain else [])],
        base_model=base,
        model_name=None if metrics is None else "recommender",
        eval_results=None if metrics is None else list(_results(metrics, recipe)),
    )
    parts = [
        f"---\n{data.to_yaml()}\n---\n",
        _introduction(subject, base),
        _usage(subject) + _rescored(subject),
        *(() if metrics is None else (_measured(metrics), _data(metrics), _item_tokens(metrics))),
        *(() if recipe is None else (_made(recipe),)),
        f"## Licence\n\nOf the model: {_NO_LICENCE}. Those of the base model and of the item data hold too.\n",
        _citation(recipe or {}),
    ]
    return "\n".join(part.rstrip("\n") + "\n" for part in parts)


def for_repo(text: str, repo: str, licence: str | None = None) -> str:
    """Make a card that of a Hub repository.

    Args:
        text: a card of `card`, or any other.
        repo: `OWNER/NAME`.
        licence: identifier such as `apache-2.0`, for the metadata and the text.

    Raises:
        HubError: if its metadata, between the first lines of dashes, are no YAML.
    """
    text = _HERE.sub(lambda _: f'HERE = "{repo}"', text)  # not a template: a name may hold what `re` would read
    try:
        made = ModelCard(text)
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise HubError(f"{repo}: the metadata of the card, its first lines, must be YAML: {reason}") from error
    assert isinstance(made.data, ModelCardData)
    if made.data.eval_results:
        made.data.model_name = repo.partition("/")[2]
    if licence is not None:
        made.data.license = licence
        made.text = made.text.replace(_NO_LICENCE, licence)
    return str(made)


def redacted(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe without places and names of the machine it ran on: of a path its last name, of a secret nothing."""
    clean = _redact(recipe, "", anywhere=False)
    assert isinstance(clean, dict)
    return clean


def _redact(value: Any, key: str, *, anywhere: bool) -> Any:
    """Strike out what must not be told.

    Args:
        value: of a setting.
        key: the setting's name.
        anywhere: whether any text with a separator counts as a path, as among the arguments of the trainer.
    """
    if isinstance(value, Mapping):
        return {
            # A data set of the Hub goes by its name there.
            str(name): _redact(
                inner,
                "name" if name == "path" and value.get("source") == "hub" else str(name),
                anywhere=anywhere or name == "trainer",
            )
            for name, inner in value.items()
        }
    if isinstance(value, list | tuple):
        return [_redact(inner, key, anywhere=anywhere) for inner in value]
    if not isinstance(value, str) or not value:
        return value
    if _SECRET.search(key.lower()):
        return "(left out)"
    value = re.sub(r"hf_\w+", "(left out)", value)
    value = re.sub(r"([A-Za-z][\w+.-]*://)[^/\s@]*@", r"\1", value)  # who logs in, and by which password
    if _is_local(value, key) or (anywhere and re.search(r"[/\\]", value)):
        value = _last_name(value)
    value = re.sub(r"(?<![\w/:.])/(?:[^\s/'\"]+/)+([^\s/'\"]*)", r"\1", value)
    user = Path.home().name
    return re.sub(rf"\b{re.escape(user)}\b", "(user)", value) if user not in ("", "root") else value


def _last_name(place: str) -> str:
    return re.split(r"[/\\]", place.rstrip("/\\"))[-1].strip(".~") or "(local)"


def _is_local(value: str, key: str) -> bool:
    """Whether a text names a place: by its form, or because the setting holds one and it can be no Hub id."""
    if re.match(r"[/~\\]|\.{1,2}([/\\]|$)|[A-Za-z]:[/\\]|\$\{|file:", value):
        return True
    if key in ("path", "output_dir"):
        return re.search(r"[/\\]", value) is not None or Path(value).exists()
    return key in ("name", "model") and re.search(r"[/\\]", value) is not None and not hub.is_id(value)


def _hub_base(name: str | None) -> str | None:
    """The base model if it is one of the Hub."""
    return name if name is not None and name != "scratch" and hub.is_id(name) else None


def _rescored(subject: Subject) -> str:
    """What to know of a dense model beside the language model."""
    share, plain = subject.generation.dense_share, subject.codes is not None and subject.reads == "tokens"
    return _RESCORED.format(share=share) + (_UNLIKE if plain else "") if share > 0 else ""


def _introduction(subject: Subject, base: str | None) -> str:
    way = "It is an adapter for" if subject.generation.layout == "adapter" else "It was trained from"
    told = "" if base is None else f"\n{way} [{base}](https://huggingface.co/{base})."
    spelled = "" if subject.codes is None else f" ({_span(subject.codes[0])} is {_span(subject.example[0])})"
    kind = "words that it has" if subject.codes is None else "tokens that were added to its vocabulary"
    most = "at most " if subject.varied else ""
    if subject.reads == "items":
        return f"""# A recommender over {subject.items:,} items

A language model that reads each item as one vector, runs once, and writes an item by a recursive network over
{subject.levels} tokens that were added to its vocabulary{spelled}.
Given the items of a history, it ranks the whole catalogue; items that do not exist cannot come out.{told}
"""
    return f"""# A recommender over {subject.items:,} items

A language model that writes items: each is a path of {most}{subject.levels} {kind}{spelled}.
Given the items of a history, it ranks the whole catalogue; items that do not exist cannot come out.{told}
"""


def _usage(subject: Subject) -> str:
    """Code with this package and without it."""
    ours = _OURS.format(ids=_python_list(subject.example))
    if subject.codes is None:
        return ours + _WORDS
    if subject.reads != "tokens":
        knows = "makes of an item's vector, and of its answer," if subject.reads == "items" else "knows of each item"
        return ours + _NETWORK.format(knows=knows)
    generation = subject.generation
    encoder, adapter = subject.end is not None, generation.layout == "adapter"
    auto = "AutoModelForSeq2SeqLM" if encoder else "AutoModelForCausalLM"
    # The library takes every T5's head for tied, and without this would make it so where the table grows.
    untie = "base.config.tie_word_embeddings = False\n" if encoder and not subject.tied else ""
    revision = "" if generation.revision is None else f", revision={json.dumps(generation.revision)}"
    load = (_LOAD_ADAPTER if adapter else _LOAD_MERGED).format(
        auto=auto, base=_hub_base(generation.base) or "BASE", revision=revision, untie=untie
    )
    shown = ", ".join(map(_escaped, subject.example))
    prompt = (
        f"A prompt is the item tokens of the history, oldest first, and {_span(str(subject.end))}"
        if encoder
        else f"A prompt is {_span(subject.start)} and the item tokens of the history, oldest first"
    )
    return ours + _PLAIN.format(
        peft=" and `peft`" if adapter else "",
        imports=("from peft import PeftModel\n" if adapter else "") + f"from transformers import {auto}, AutoTokenizer",
        load=load,
        history=_escaped("".join([*subject.codes, str(subject.end)] if encoder else [subject.start, *subject.codes])),
        comment=f"  # {shown}" if len(shown) <= 40 else "",
        k=min(10, subject.items),
        bundle=", bundle=HERE" if adapter else "",
        levels=subject.levels,
        prompt=prompt,
        length=generation.history_length,
        seen=",\nand drop items of the history from the list, as the package does"
        if generation.leaves_out_seen
        else "",
    )


def _python_list(ids: Sequence[str]) -> str:
    """Ids as a list of Python texts in double quotes, on one line whatever is in them."""
    return "[" + ", ".join(f'"{_escaped(item_id)}"' for item_id in ids) + "]"


def _escaped(text: str) -> str:
    """A text as it stands between double quotes, on one line: ids are the catalogue's makers' to choose."""
    quoted = json.dumps(text, ensure_ascii=False)[1:-1]
    return "".join(letter if letter.isprintable() else f"\\U{ord(letter):08x}" for letter in quoted)


def _span(text: str) -> str:
    """A text as code within a line of Markdown, which it cannot leave: between more backticks than it has in a row."""
    text = _escaped(text)
    ticks, edge = _ticks(text, 1), " " if not text or "`" in (text[0], text[-1]) else ""
    return f"{ticks}{edge}{text}{edge}{ticks}"


def _ticks(text: str, least: int) -> str:
    return "`" * max([least, *(len(row) + 1 for row in re.findall("`+", text))])


def _dataset(recipe: Mapping[str, Any] | None) -> str:
    """Name of the data, as far as it may be told."""
    data = (recipe or {}).get("data", {})
    return str(data.get("path") or data.get("source") or "interactions")


def _protocol(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """What has to agree for numbers to be comparable, without the counts."""
    return {name: value for name, value in metrics["protocol"].items() if name != "counts"}


def _results(metrics: Mapping[str, Any], recipe: Mapping[str, Any] | None) -> Iterator[EvalResult]:
    """Every test metric."""
    dataset = _dataset(recipe)
    for name, value in metrics["test"].items():
        yield EvalResult(
            task_type="recommendation",
            task_name="Next-item recommendation, full ranking",
            dataset_type=dataset,
            dataset_name=dataset,
            dataset_split="test",
            dataset_args=_protocol(metrics),
            metric_type=name,
            metric_name=metric_name(name),
            metric_value=round(float(value), 6),
        )


def _measured(metrics: Mapping[str, Any]) -> str:
    protocol, counts = metrics["protocol"], metrics["protocol"]["counts"]
    seen = "included" if protocol.get("repeats", True) and not protocol["mask_seen"] else "left out"
    share = protocol.get("dense_share")
    shared = "" if share is None else f", of the dense model a share of {share:g}"
    rows = [("**this model**", metrics), *metrics["baselines"].items()]
    return f"""## Measured

Full ranking over all {counts["items"]:,} items by {counts["test_cases"]:,} test users: split {protocol["split"]}, \
{protocol["k_core"]}-core, histories of {protocol["history_length"]}
items at most (seen items {seen}), beam {protocol["beam"]}, scores normalised over the {protocol["normaliser"]}, \
seed {protocol["seed"]}{shared}.

{_table(rows, ("recall@5", "recall@10", "ndcg@10", "mrr@20"))}

Intervals are 95 % by bootstrap over users.
"""


def _table(rows: Sequence[tuple[str, Mapping[str, Any]]], keys: Sequence[str]) -> str:
    lines = ["| | " + " | ".join(keys) + " |", "|---" * (len(keys) + 1) + "|"]
    for name, part in rows:
        cells = ["{:.4f} [{:.4f}, {:.4f}]".format(part["test"][key], *part["ci95"][key]) for key in keys]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _data(metrics: Mapping[str, Any]) -> str:
    counts = metrics["protocol"]["counts"]
    return f"""## Data

{counts["items"]:,} items; {counts["train_interactions"]:,} training interactions of {counts["train_users"]:,} users; \
{counts["validation_cases"]:,} validation and {counts["test_cases"]:,} test cases.
No history of a user is in this repository.
"""


def _item_tokens(metrics: Mapping[str, Any]) -> str:
    """What `quality.json` says of the codes."""
    codes = metrics.get("codes") or {}
    resolved = codes.get("resolved", codes)
    if "levels" not in resolved:
        return ""
    lines = ["| level | codewords | used | perplexity |", "|---|---|---|---|"]
    lines += [
        f"| {level['name']} | {level['size']:,} | {level['used']:,} | {level['perplexity']:,.1f} |"
        for level in resolved["levels"]
    ]
    verdict = resolved.get("verdict", "")
    shared = f"{codes['collision_rate']:.1%} of the items shared their code with another before that was resolved. "
    return f"""## Item tokens

{"" if "shared their code" in verdict else shared}{verdict}

{chr(10).join(lines)}
"""


def _made(recipe: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version(name)}" for name in ("llm-itemtok", "torch", "transformers", "peft"))
    text = yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True, width=100)
    fence = _ticks(text, 3)
    return f"""## How it was made

With {versions}, by this recipe (of local paths, the last name):

{fence}yaml
{text.rstrip()}
{fence}
"""


def _citation(recipe: Mapping[str, Any]) -> str:
    entries = "\n\n".join(paper.bibtex() for paper in cited(recipe))
    return f"## Citation\n\nOf the methods used:\n\n```bibtex\n{entries}\n```\n"
