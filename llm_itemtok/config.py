"""A recipe: loading, what contradicts what, and its resolved form.

`RunConfig` holds the sections of `settings.py`, read through `recipe_file.py` and checked by `strict.py`. It never
changes and holds nothing derived. `pipeline`, `experiments`, `explain` and `cli` read it; components take plain
arguments. `trainer` is passed through and checked by `training/arguments.py`, because it needs transformers.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Self

import yaml

from llm_itemtok import strict
from llm_itemtok.errors import RecipeError
from llm_itemtok.model_settings import ALL_POSITIONS_REASON, LOST_STEPS, Model
from llm_itemtok.objective_settings import NextTokenObjective, Objective, TokenWeightedObjective
from llm_itemtok.recipe_file import Dumper, as_plain, defaults_of, place_of, read_layers
from llm_itemtok.settings import (
    ConcatVectors,
    Data,
    Evaluation,
    Examples,
    FileTokenizer,
    FileVectors,
    LlmVectors,
    NoRescoring,
    ProductTokenizer,
    RecursiveScoring,
    Rescoring,
    ResidualKMeansTokenizer,
    RqVaeTokenizer,
    Scoring,
    TextTokenizer,
    TfidfSvdVectors,
    TitleTokenizer,
    Tokenizer,
    TokensScoring,
    UserColumnSegments,
    VectorSource,
    Vocab,
)
from llm_itemtok.strict import Within
from llm_itemtok.update_settings import AlternateUpdate, BilevelUpdate, FixedUpdate, SelfImproveUpdate, Update

SYNTHETIC_COLUMNS = ("item_id", "title", "categories", "brand")
"""Columns that the items of `data.source: synthetic` have."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A recipe: everything a run depends on."""

    seed: Annotated[int, Within(low=0, high=2**32 - 1)] = 0
    """Of every random choice: item tokens, initial rows, order of examples, resampling."""
    data: Data = field(default_factory=Data)
    """Where items and interactions come from, and how they are split."""
    vectors: VectorSource | ConcatVectors = field(default_factory=TfidfSvdVectors)
    """One vector an item, from its text, the training sequences or a file."""
    tokenizer: Tokenizer = field(default_factory=ResidualKMeansTokenizer)
    """Vectors to item codes."""
    vocab: Vocab = field(default_factory=Vocab)
    """Item codes to tokens of the language model."""
    model: Model = field(default_factory=Model)
    """The language model."""
    examples: Examples = field(default_factory=Examples)
    """Sequences to training examples."""
    objective: Objective = field(default_factory=NextTokenObjective)
    """What is minimised."""
    update: Update = field(default_factory=FixedUpdate)
    """Whether item tokens change during training."""
    scoring: Scoring = field(default_factory=TokensScoring)
    """How a next item is scored."""
    rescoring: Rescoring = field(default_factory=NoRescoring)
    """Whether a dense model scores items beside the language model."""
    trainer: Mapping[str, Any] = field(default_factory=dict)
    """Settings of `transformers.TrainingArguments`, under their own names."""
    evaluation: Evaluation = field(default_factory=Evaluation)
    """Validation and test."""

    @classmethod
    def load(cls, path: Path | str, overrides: Sequence[str] = (), *, whose: str = "--set") -> Self:
        """Read, merge and check a recipe.

        Args:
            path: the recipe file; its `extends` is followed.
            overrides: texts `a.b=value` of `--set`, the value in YAML.
            whose: overrides they are, for messages.

        Raises:
            RecipeError: if anything about it is not right; the message names the file and the setting.
        """
        layers = read_layers(Path(path), overrides)
        source = f"{path} with {whose}" if overrides else str(path)
        checker = strict.Checker(source, layers.origins, also=("extends",))
        config: Self = checker.section((cls,), cls, layers.settings, ())
        for contradiction in _contradictions(config):
            raise RecipeError(f"{source}: {contradiction}")
        return config

    def to_dict(self) -> dict[str, Any]:
        """The resolved recipe as plain values; settings that do not apply are left out, so it loads again."""
        plain: dict[str, Any] = as_plain(self)
        return plain

    def defaults(self) -> dict[str, Any]:
        """The defaults of all settings of the kinds that this recipe has chosen, nested; required ones are left out."""
        plain: dict[str, Any] = defaults_of(self)
        return plain

    def to_yaml(self) -> str:
        """The resolved recipe as YAML; `RunConfig.load` of it gives an equal config."""
        return yaml.dump(self.to_dict(), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=100)

    @property
    def vector_sources(self) -> dict[str, VectorSource]:
        """Where item vectors come from, by the dotted setting: one source, or those that are put side by side."""
        if isinstance(self.vectors, ConcatVectors):
            return {f"vectors.parts.{place}": part for place, part in enumerate(self.vectors.parts)}
        return {"vectors": self.vectors}

    def portable(self, path_hashes: Mapping[str, str]) -> dict[str, Any]:
        """The resolved recipe as plain values that do not depend on where inputs lie on a machine.

        Args:
            path_hashes: dotted setting, such as `data.path` (`vectors.parts.0.path` in a list), → hash of the content
                that the local path names, which takes its place as `sha256:…`.
        """
        plain = self.to_dict()
        for dotted, content in path_hashes.items():
            place, name = place_of(plain, dotted)
            assert isinstance(place[name], str), f"{dotted} is not a path of this recipe"
            place[name] = f"sha256:{content}"
        return plain


def _contradictions(config: RunConfig) -> Iterator[str]:
    """Settings that are each right alone but not together, with the reason and the way out."""
    yield from data_contradictions(config.data)
    yield from _model_contradictions(config)
    yield from _segment_contradictions(config)
    yield from _evaluation_contradictions(config.evaluation)
    if not any(config.examples.tasks.values()):
        yield "`examples.tasks` must give at least one task a weight above 0; there would be nothing to train"
    if isinstance(config.tokenizer, RqVaeTokenizer) and not config.tokenizer.hidden:
        yield "`tokenizer.hidden` must have at least one width, was: []"
    yield from _vectors_contradictions(config)
    if config.vocab.init == "base":
        yield from _base_contradictions(config)
    if config.objective.normaliser == "children" and config.evaluation.decode_normaliser not in ("same", "children"):
        yield (
            "`objective.normaliser: children` needs `evaluation.decode_normaliser: same` or `children`, was: "
            f"{config.evaluation.decode_normaliser}"
        )
    if isinstance(config.objective, TokenWeightedObjective):
        yield from _target_contradictions(config.objective)
    if isinstance(config.tokenizer, TextTokenizer):
        yield from _text_contradictions(config, config.tokenizer)
    yield from _update_contradictions(config)
    yield from _rescoring_contradictions(config.rescoring)
    if isinstance(config.scoring, RecursiveScoring):
        yield from _recursive_contradictions(config)
    elif config.scoring.item_embedding and isinstance(config.tokenizer, TextTokenizer):
        yield (
            "`scoring.item_embedding` needs item tokens to be carried by, and `tokenizer.kind: "
            f"{config.tokenizer.kind}` has none; write 0, or choose another tokenizer"
        )


def _evaluation_contradictions(evaluation: Evaluation) -> Iterator[str]:
    if evaluation.k > evaluation.beam:
        yield f"`evaluation.k` must be at most `evaluation.beam`, was: {evaluation.k} > {evaluation.beam}; widen it"
    if evaluation.mask_seen and evaluation.repeats != "keep":
        yield (
            "`evaluation.mask_seen: true` leaves out items of the history but for the target, and `evaluation.repeats: "
            f"{evaluation.repeats}` leaves out the target, too; write one of the two"
        )
    if len(set(evaluation.baselines)) < len(evaluation.baselines):
        yield f"`evaluation.baselines` must name each baseline once, was: {', '.join(evaluation.baselines)}"


def _rescoring_contradictions(rescoring: Rescoring) -> Iterator[str]:
    if isinstance(rescoring, NoRescoring):
        return
    if rescoring.width % 2:
        yield f"`rescoring.width` must be even, for two heads of attention, was: {rescoring.width}"
    if not rescoring.shares:
        yield "`rescoring.shares` must have at least one share, was: []"


def _recursive_contradictions(config: RunConfig) -> Iterator[str]:
    """What a recursive network cannot do: its scores are those of levels, and its codebooks are item tokens."""
    here, decoding = "`scoring.kind: recursive`", config.evaluation.decode_normaliser
    if isinstance(config.tokenizer, TextTokenizer):
        yield f"{here} needs item tokens, and `tokenizer.kind: {config.tokenizer.kind}` has none; choose another one"
    if config.objective.normaliser not in ("level", "children"):
        yield f"{here} needs `objective.normaliser: level` or `children`, was: {config.objective.normaliser}"
    if decoding not in ("same", "level", "children"):
        yield f"`evaluation.decode_normaliser` must be same, level or children with {here}, was: {decoding}"
    chosen = config.objective
    if isinstance(chosen, TokenWeightedObjective) and any(part.kind == "counterfactual" for part in chosen.targets):
        yield (
            f"`objective.targets` cannot have `counterfactual` with {here}: it compares rows of item tokens, which "
            "this model does not read; leave it out"
        )


def _base_contradictions(config: RunConfig) -> Iterator[str]:
    """What training that goes on from a bundle must have of it."""
    model, chosen = config.model, config.tokenizer
    given = chosen.path if isinstance(chosen, FileTokenizer) else f"`tokenizer.kind: {chosen.kind}`"
    if model.name == "scratch" or given != model.name:
        yield (
            "`vocab.init: base` goes on with the item tokens of a trained model, so `model.name` must name a bundle, "
            f"and `tokenizer: {{kind: file, path: ...}}` the same one, was: {model.name} and {given}"
        )
    if not isinstance(config.scoring, TokensScoring) or config.scoring.item_embedding:
        yield (
            "`vocab.init: base` goes on with item tokens alone; a bundle with more of items than these cannot be "
            "trained on yet: write `scoring: {kind: tokens, item_embedding: 0}`, and choose a bundle of that kind"
        )


def _text_contradictions(config: RunConfig, chosen: TextTokenizer) -> Iterator[str]:
    """What needs item tokens of their own, which identifiers in existing words are not."""
    here, decoding = f"`tokenizer.kind: {chosen.kind}`", config.evaluation.decode_normaliser
    if config.objective.normaliser != "vocab":
        yield (
            f"{here} needs `objective.normaliser: vocab`, was: {config.objective.normaliser}; its identifiers are "
            "words of the whole vocabulary, not tokens of a level"
        )
    if decoding not in ("same", "vocab", "children"):
        yield f"`evaluation.decode_normaliser` must be same, vocab or children with {here}, was: {decoding}"
    if config.update.kind != "fixed":
        yield (
            f"{here} needs `update.kind: fixed`, was: {config.update.kind}; a number or a title is no code that could "
            "be improved; use a tokenizer that is fitted on vectors"
        )
    for task, weight in config.examples.tasks.items():
        if isinstance(chosen, TitleTokenizer) and task != "next-item" and weight > 0:
            yield (
                f"`examples.tasks.{task}` must be 0 with {here}, was: {weight:g}; the item's identifier is its title, "
                "so the task would be to copy it"
            )


def _update_contradictions(config: RunConfig) -> Iterator[str]:
    """What all updates need of the rest, and what those need that train the quantizer."""
    update, tokenizer = config.update, config.tokenizer
    if isinstance(update, FixedUpdate):
        return
    every = getattr(update, "every", None)
    if every is not None and (every.steps is None) == (every.epochs is None):
        yield (
            "`update.every` must be either {steps: N} or {epochs: N}, null for the one that a parent gives, was: "
            f"steps {every.steps}, epochs {every.epochs}"
        )
    for name in ("fsdp", "deepspeed"):
        if config.trainer.get(name):
            yield (
                f"`trainer.{name}` shards what `update.kind: {update.kind}` must be able to take back; leave it out, "
                "or write `update.kind: fixed`"
            )
    if isinstance(update, SelfImproveUpdate):
        yield from _self_improve_contradictions(config, update)
        return
    if isinstance(update, BilevelUpdate):
        yield from _bilevel_contradictions(config, update)
    if isinstance(update, AlternateUpdate):
        yield from _alternate_contradictions(config, update)
    if not isinstance(tokenizer, RqVaeTokenizer | ResidualKMeansTokenizer | ProductTokenizer):
        yield (
            f"`update.kind: {update.kind}` trains the quantizer behind the codes, and `tokenizer.kind: "
            f"{tokenizer.kind}` leaves none; use rqvae, residual-kmeans or product"
        )
    if isinstance(config.scoring, RecursiveScoring) or config.scoring.item_embedding:
        yield (
            f"`update.kind: {update.kind}` needs a model that reads items as their tokens and nothing else; write "
            "`scoring: {kind: tokens, item_embedding: 0}`"
        )


def _alternate_contradictions(config: RunConfig, update: AlternateUpdate) -> Iterator[str]:
    """What the alignments read and teach, and a final stage that would never begin."""
    for name in ("sequence", "preference"):
        teaches = getattr(update, f"quantizer_{name}")
        if teaches and not getattr(update, name):
            yield (
                f"`update.quantizer_{name}` needs `update.{name}` above 0, by which the model learns what it teaches "
                f"the quantizer with, was: {teaches:g} and 0"
            )
    if update.variant == "release" and not update.sequence:
        yield "`update.variant: release` is of the first alignment; give `update.sequence` a weight above 0, was: 0"
    weight = config.examples.tasks.get("next-item", 0)
    if weight <= 0:
        yield (
            "`update.kind: alternate` aligns histories with the items that follow them; give "
            f"`examples.tasks.next-item` a weight above 0, was: {weight:g}"
        )
    patience = config.evaluation.patience
    if patience and update.patience >= patience:
        yield (
            "`update.patience` must be below `evaluation.patience`, or training would end before its final stage "
            f"begins, was: {update.patience} and {patience}"
        )


def _bilevel_contradictions(config: RunConfig, update: BilevelUpdate) -> Iterator[str]:
    """What cannot be differentiated twice, or under other parameters."""
    if update.look_ahead == 0:
        return
    if update.order == 2 and config.model.quantization == "nf4":
        yield (
            "`update.order: 2` differentiates the model twice, and `model.quantization: nf4` cannot be; write "
            "`update.order: 1`, which needs the first derivative only"
        )
    for name in ("activation_checkpointing", "gradient_checkpointing"):  # one setting, which the library renamed
        if not config.trainer.get(name):
            continue
        yield (
            f"`trainer.{name}` computes states anew with the model as it is, and the look-ahead of "
            "`update.kind: bilevel` needs them as they would be; leave it out, and make batches smaller"
        )


def _self_improve_contradictions(config: RunConfig, update: SelfImproveUpdate) -> Iterator[str]:
    tasks = {str(task): weight for task, weight in config.examples.tasks.items()}
    for source, task in (("generate", "title-to-item"), ("embeddings", "next-item")):
        if update.source in (source, "both") and tasks.get(task, 0) <= 0:
            yield (
                f"`update.source: {update.source}` asks the model what it learns by the task `{task}`; give "
                f"`examples.tasks.{task}` a weight above 0, was: {tasks.get(task, 0):g}"
            )
    if update.source in ("generate", "both") and config.objective.normaliser == "children":
        yield f"`update.source: {update.source}` writes codes of no item, so `objective.normaliser` cannot be children"
    if update.candidates % update.groups:
        yield f"`update.groups` must divide `update.candidates`, was: {update.candidates} / {update.groups}"
    if update.source == "random" and update.scope == "all":
        yield "`update.source: random` moves a share of the items, `update.outliers`; write `update.scope: outliers`"


def _target_contradictions(objective: TokenWeightedObjective) -> Iterator[str]:
    kinds = [target.kind for target in objective.targets]
    if not kinds:
        yield "`objective.targets` must name at least one target, such as {kind: plain}, was: []"
    if len(set(kinds)) < len(kinds):
        yield f"`objective.targets` must name each kind once, was: {', '.join(kinds)}"


def _vectors_contradictions(config: RunConfig) -> Iterator[str]:
    chosen = config.vectors
    if isinstance(chosen, ConcatVectors):
        if len(chosen.parts) < 2:
            yield f"`vectors.parts` must name at least two sources to put side by side, was: {len(chosen.parts)}"
        if chosen.weights and len(chosen.weights) != len(chosen.parts):
            yield (
                f"`vectors.weights` must be one a source of `vectors.parts`, {len(chosen.parts)} of them, was: "
                f"{len(chosen.weights)}"
            )
    for name, part in config.vector_sources.items():
        if isinstance(part, FileVectors) and not part.path.endswith((".npy", ".safetensors", ".parquet")):
            yield f"`{name}.path` must end in .npy, .safetensors or .parquet, was: {part.path!r}"
        scratch = config.model.scratch
        if isinstance(part, LlmVectors) and config.model.name == "scratch" and scratch.pretrain_epochs == 0:
            yield (
                f"`{name}.kind: llm` takes the base model's states, and with `model.scratch.pretrain_epochs: 0` those "
                "are random; use tfidf-svd, or pre-train"
            )


def data_contradictions(data: Data) -> Iterator[str]:
    """What of a `data` section is each right alone but not together, with the reason and the way out."""
    if data.source != "synthetic" and not data.path:
        yield "`data.path` must be given: the folder to read; or `data.source: synthetic`, which needs none"
    if data.validation_share + data.test_share >= 1:
        yield (
            "`data.validation_share` and `data.test_share` must leave something to train on, "
            f"was: {data.validation_share} + {data.test_share}"
        )
    rule = data.filter
    if rule and rule.min is None and rule.max is None and not rule.keep:
        yield "`data.filter` must say which rows to keep: `min`, `max` or `keep` (not empty)"
    if rule and rule.keep and (rule.min is not None or rule.max is not None):
        yield "`data.filter` takes either `keep` (values) or `min` and `max` (a range), not both"
    if rule and rule.min is not None and rule.max is not None and rule.min > rule.max:
        yield f"`data.filter.min` must be at most `data.filter.max`, was: {rule.min} > {rule.max}"


def _segment_contradictions(config: RunConfig) -> Iterator[str]:
    for name, rule in config.evaluation.segments.items():
        # Without a colon, names made from different rules differ: `NAME up`, `NAME: VALUE`.
        if not re.fullmatch(r"\w([\w -]*\w)?", name):
            yield f"`evaluation.segments` takes names of letters, digits and _, spaces and - between, was: {name!r}"
        here = f"`evaluation.segments.{name}.column`"
        if config.data.source != "synthetic":
            continue
        if isinstance(rule, UserColumnSegments):
            yield (
                f"{here} must be a column of the interactions file, and made-up data (`data.source: synthetic`) have "
                f"none beside user, item and time, was: {rule.column}; leave the rule out"
            )
        elif rule.column not in SYNTHETIC_COLUMNS:
            yield (
                f"{here} must be one of {', '.join(SYNTHETIC_COLUMNS)} with made-up data (`data.source: synthetic`), "
                f"was: {rule.column}"
            )


def _weight_contradictions(model: Model, trainer: Mapping[str, Any]) -> Iterator[str]:
    if model.dtype == "bfloat16" and trainer.get("fp16") is True:
        yield "`trainer.fp16` needs `model.dtype: float32`; with bfloat16 weights use `trainer.bf16`"
    if model.adapter == "none" and model.dtype == "bfloat16":
        yield f"{LOST_STEPS}; `model.dtype` was: bfloat16"
    if model.quantization == "nf4" and model.dtype != "bfloat16":
        yield f"`model.quantization: nf4` computes in bfloat16 and needs `model.dtype: bfloat16`, was: {model.dtype}"


def _model_contradictions(config: RunConfig) -> Iterator[str]:
    model, scratch = config.model, config.model.scratch
    if not model.name:
        yield "`model.name` must be a Hub id, a folder or `scratch`, was: empty"
    yield from _weight_contradictions(model, config.trainer)
    if model.name != "scratch":
        return
    if scratch.width % scratch.heads and not scratch.head_dim:
        yield f"`model.scratch.heads` must divide `width`, was: {scratch.width} / {scratch.heads}"
    if scratch.family == "t5" and config.examples.kind == "all-positions":
        yield ALL_POSITIONS_REASON
    if scratch.family in ("llama", "qwen3") and scratch.width // scratch.heads % 2:
        yield (
            f"`model.scratch` must have an even width / heads for {scratch.family}, whose positions turn pairs of "
            f"dimensions, was: {scratch.width // scratch.heads}"
        )
    if model.dtype == "auto":
        yield "`model.dtype: auto` is the type a model was saved in, and `scratch` is not saved yet; write float32"
    if scratch.pretrain_epochs == 0 and model.adapter == "lora":
        yield (
            "`model.adapter: lora` freezes the base model, and with `model.scratch.pretrain_epochs: 0` that is random; "
            "use `adapter: none`, or pre-train"
        )
