"""The sections of a recipe: every setting with its meaning, its type and range, its default.

This page is the reference: the text under each field is its help (`itemtok explain`), its annotation is what is
checked (`strict.py` says how), its default what holds when it is not written. A section with a `kind` is a closed set,
one class a kind, so an option that does not apply to a kind cannot be written for it. A field that decides on another
(`Only`, `Unless`) stands before it.

Held is only what somebody gave, and defaults; what follows from them (capacities, steps, cache folders) is derived by
`pipeline`. Settings that contradict each other are `config.py`'s.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

from llm_itemtok.strict import PATH, Only, Unless, Within

Count = Annotated[int, Within(low=1)]
CountOrNone = Annotated[int, Within(low=0)]
Dropout = Annotated[float, Within(low=0, below=1)]
Positive = Annotated[float, Within(above=0)]
NotNegative = Annotated[float, Within(low=0)]
Levels = Annotated[int, Within(low=1, high=16)]
CodebookSize = Annotated[int, Within(low=2, high=65536)]
Collisions = Literal["extra-level", "sinkhorn", "reassign", "matching", "forbid"]


@dataclass(frozen=True, kw_only=True)
class Filter:
    """Which rows of the log count as interactions: by a column such as `rating` or `event`."""

    column: str
    """Column of the interactions file that decides."""
    min: float | None = None
    """Keep rows with at least this number."""
    max: float | None = None
    """Keep rows with at most this number."""
    keep: tuple[str | int | float, ...] | None = None
    """Keep rows with one of these values, such as [click, buy]."""


@dataclass(frozen=True, kw_only=True)
class Data:
    """Where items and interactions come from, and how they are split into training, validation and test."""

    source: Literal[
        "folder", "hub", "amazon-2014", "amazon-2018", "amazon-2023", "movielens", "recbole", "lcrec", "synthetic"
    ] = "folder"
    """Format of the input; `folder` is this project's own, `synthetic` is made on the spot and needs no file."""
    path: Annotated[str, PATH, Unless("source", ("synthetic",))] = ""
    """Folder (or Hub data set) to read; `${NAME}` stands for an environment variable."""
    split: Literal["leave-last-out", "temporal"] = "leave-last-out"
    """Last item of each user for test and the one before for validation, or two cuts in time for everybody."""
    k_core: CountOrNone = 0
    """Keep only users and items with at least this many interactions, repeated until nothing changes; 0 keeps all."""
    unknown_items: Annotated[Literal["error", "drop"], Unless("source", ("synthetic",))] = "error"
    """What to do with interactions whose item is not in the items file."""
    deduplicate: Literal["exact", "first", "last"] = "exact"
    """Drop exact duplicate rows only, or keep just the first or the last interaction of a user with an item."""
    columns: Annotated[Mapping[str, str], Unless("source", ("synthetic",))] = field(default_factory=dict)
    """Our column name → the name in the files, such as {user_id: customer}."""
    filter: Annotated[Filter | None, Unless("source", ("synthetic",))] = None
    """Which rows of the log count; null counts all."""
    validation_share: Annotated[float, Within(above=0, below=1), Only("split", ("temporal",))] = 0.1
    """Share of the interactions, in time order, between the two cuts."""
    test_share: Annotated[float, Within(above=0, below=1), Only("split", ("temporal",))] = 0.1
    """Share of the interactions, in time order, after the second cut."""
    items: Annotated[int, Within(low=20), Only("source", ("synthetic",))] = 400
    """Number of items to make."""
    users: Annotated[int, Within(low=10), Only("source", ("synthetic",))] = 600
    """Number of users to make."""


@dataclass(frozen=True, kw_only=True)
class TfidfSvdVectors:
    """Item vectors from the words of the item texts: TF-IDF, then SVD. Needs no model and no download."""

    kind: Literal["tfidf-svd"] = "tfidf-svd"
    """Word counts of the item texts, reduced."""
    dimensions: Count = 128
    """Length of a vector; fewer if the catalogue has fewer items or words."""
    max_features: Count = 50_000
    """How many words and word pairs to count, the most frequent ones."""


@dataclass(frozen=True, kw_only=True)
class SentenceTransformersVectors:
    """Item vectors from a sentence-transformers model, on the item texts."""

    kind: Literal["sentence-transformers"] = "sentence-transformers"
    """A model made for comparing texts; needs the extra `sentence-transformers`."""
    model: Annotated[str, PATH]
    """Hub id or folder of the model; `${NAME}` stands for an environment variable."""
    batch_size: Count = 64
    """Texts embedded at a time."""


@dataclass(frozen=True, kw_only=True)
class LlmVectors:
    """Item vectors from the language model of the recipe itself: last hidden states, averaged over the item text."""

    kind: Literal["llm"] = "llm"
    """The base model's own mean-pooled states."""
    batch_size: Count = 16
    """Texts embedded at a time."""


@dataclass(frozen=True, kw_only=True)
class FileVectors:
    """Item vectors made elsewhere."""

    kind: Literal["file"] = "file"
    """Read the vectors from a file."""
    path: Annotated[str, PATH]
    """`.npy` or `.safetensors` in items-file order, or `.parquet` with columns item_id and vector."""


@dataclass(frozen=True, kw_only=True)
class CollaborativeVectors:
    """Item vectors from the training sequences: what is bought together is near. Needs no text."""

    kind: Literal["collaborative"] = "collaborative"
    """Interactions instead of words; items that training does not have get zeros."""
    source: Literal["sasrec", "co-occurrence"] = "sasrec"
    """Item vectors of a SASRec, which takes minutes to train, or of which items stand near each other, in seconds."""
    dimensions: Count = 64
    """Length of a vector."""
    steps: Annotated[Count, Only("source", ("sasrec",))] = 30_000
    """Of training at most; it stops early by interactions held out inside training."""
    window: Annotated[Count, Only("source", ("co-occurrence",))] = 5
    """Steps of a sequence within which two items stand near each other."""
    shift: Annotated[float, Within(low=1), Only("source", ("co-occurrence",))] = 1.0
    """A pair counts as far as it is more frequent than this many times chance."""


VectorSource = TfidfSvdVectors | SentenceTransformersVectors | LlmVectors | FileVectors | CollaborativeVectors


@dataclass(frozen=True, kw_only=True)
class ConcatVectors:
    """Item vectors of several sources side by side, each centred and scaled to the same spread."""

    kind: Literal["concat"] = "concat"
    """Such as what an item says and who takes it."""
    parts: tuple[VectorSource, ...]
    """The sources, at least two, each with its kind, such as [{kind: tfidf-svd}, {kind: collaborative}]."""
    weights: tuple[Positive, ...] = ()
    """One a source; squared, its share in squared distances. Empty is 1 each."""
    components: CountOrNone = 0
    """Principal components to keep of the whole; 0 keeps all dimensions."""


@dataclass(frozen=True, kw_only=True)
class ResidualKMeansTokenizer:
    """Item tokens from k-means on what the levels above left over."""

    kind: Literal["residual-kmeans"] = "residual-kmeans"
    """Fast, seeded, no training."""
    levels: Levels = 3
    """Codewords an item's code has, before an extra level."""
    codebook_size: CodebookSize = 256
    """Codewords to choose from at each level."""
    collisions: Collisions = "extra-level"
    """Items with one code: count them in an extra level, spread them, move them one by one or at least cost, stop."""
    iterations: Count = 50
    """k-means steps a level at most."""
    components: CountOrNone = 0
    """Principal components to cluster: fewer collisions, looser neighbourhoods; 0 takes the vectors as they are."""
    balance: bool = False
    """Keep the clusters of a level at about equal size; best with some 32 `components`."""
    sample: CountOrNone = 0
    """Items, drawn with the seed, that the codebooks are fitted on, for large catalogues; 0 takes all."""


@dataclass(frozen=True, kw_only=True)
class RqVaeTokenizer:
    """Item tokens from a residual-quantised autoencoder (TIGER, arXiv:2305.05065)."""

    kind: Literal["rqvae"] = "rqvae"
    """Learned codebooks in a learned space; slower than residual-kmeans."""
    levels: Levels = 3
    """Codewords an item's code has, before an extra level."""
    codebook_size: CodebookSize = 256
    """Codewords to choose from at each level."""
    collisions: Collisions = "extra-level"
    """Items with one code: count them in an extra level, spread them, move them one by one or at least cost, stop."""
    latent: Count = 32
    """Dimensions of the space that is quantised."""
    hidden: tuple[Count, ...] = (512, 256, 128)
    """Widths of the encoder's hidden layers; the decoder mirrors them."""
    epochs: Count = 500
    """Passes over the catalogue at most; training stops early when `stop` no longer falls."""
    stop: Literal["reconstruction", "loss"] = "reconstruction"
    """What ends training and chooses its best epoch: the error of rebuilt vectors, or, for older runs, the loss."""
    patience: Count = 50
    """Epochs without a fall of it by 0.1 % before training ends."""
    learning_rate: Positive = 1e-3
    """Of AdamW, constant."""
    batch_size: Count = 1024
    """Items a step."""
    commitment: NotNegative = 0.25
    """Weight of the term that keeps the encoder near its codewords."""
    revive: CountOrNone = 0
    """Steps after which codewords that nobody chose are moved to badly served items; 0 does so after each epoch."""
    estimator: Literal["straight-through", "rotation", "gumbel"] = "straight-through"
    """How gradients pass the choice of codewords; the others are for experiments (arXiv:2410.06424, 1611.01144)."""
    alignment: NotNegative = 0.0
    """Weight of the term that aligns codes with collaborative vectors (LETTER, arXiv:2405.07314); 0 leaves it out."""
    collaborative: Annotated[CollaborativeVectors, Unless("alignment", (0.0,))] = field(
        default_factory=CollaborativeVectors
    )
    """What `alignment` aligns with."""
    diversity: NotNegative = 0.0
    """Weight of the term that keeps groups of codewords apart (LETTER); 0 leaves it out."""


@dataclass(frozen=True, kw_only=True)
class ProductTokenizer:
    """Item tokens from k-means on groups of dimensions: levels are independent, and their order means nothing."""

    kind: Literal["product"] = "product"
    """Fast, seeded, no training; wants more levels than residual codes for as few collisions."""
    levels: Levels = 3
    """Codewords an item's code has, before an extra level."""
    codebook_size: CodebookSize = 256
    """Codewords to choose from at each level."""
    collisions: Collisions = "extra-level"
    """Items with one code: count them in an extra level, spread them, move them one by one or at least cost, stop."""
    iterations: Count = 50
    """k-means steps a level at most."""
    rotation: Literal["none", "pca", "opq"] = "pca"
    """How vectors are turned before they are cut: not at all, to share out the variance, or to rebuild them best."""
    components: Annotated[CountOrNone, Unless("rotation", ("none",))] = 0
    """Principal components to keep: fewer collisions, looser neighbourhoods; 0 keeps all dimensions."""


@dataclass(frozen=True, kw_only=True)
class HierarchicalTokenizer:
    """Item tokens from a tree of clusters (CID, arXiv:2305.06569): unique by construction, no quantizer."""

    kind: Literal["hierarchical"] = "hierarchical"
    """Clusters of clusters; at the last level the items of a leaf are numbered."""
    levels: Levels = 3
    """Codewords an item's code has, before an extra level."""
    codebook_size: CodebookSize = 256
    """Codewords to choose from at each level."""
    collisions: Collisions = "forbid"
    """Items with one code: count them in an extra level, spread them, move them one by one or at least cost, stop."""
    source: Literal["co-occurrence", "vectors"] = "co-occurrence"
    """What clusters are made from: items near each other in training sequences, or the item vectors."""
    window: Annotated[Count, Only("source", ("co-occurrence",))] = 5
    """Steps of a sequence within which two items stand near each other."""
    iterations: Count = 50
    """k-means steps a node at most."""


@dataclass(frozen=True, kw_only=True)
class RandomTokenizer:
    """Item tokens that mean nothing: the control."""

    kind: Literal["random"] = "random"
    """Uniform codes, seeded."""
    levels: Levels = 3
    """Codewords an item's code has, before an extra level."""
    codebook_size: CodebookSize = 256
    """Codewords to choose from at each level."""
    collisions: Collisions = "extra-level"
    """Items with one code: count them in an extra level, spread them, move them one by one or at least cost, stop."""


@dataclass(frozen=True, kw_only=True)
class FileTokenizer:
    """Item tokens made elsewhere."""

    kind: Literal["file"] = "file"
    """Read the codes from a file."""
    path: Annotated[str, PATH]
    """`*.index.json` (LC-Rec, LETTER), `*.json` (a FlashRec catalogue), `*.csv` (item_id, levels), or our own codes."""
    sizes: tuple[Count, ...] = ()
    """Codewords that each level has room for; empty takes the largest in use, or what our own file says."""
    unknown_items: Literal["error", "drop"] = "error"
    """What to do with items of the file that are not in the catalogue."""
    collisions: Collisions = "forbid"
    """Items with one code: count them in an extra level, spread them, move them one by one or at least cost, stop."""


@dataclass(frozen=True, kw_only=True)
class NumericTokenizer:
    """The item's number in existing tokens (arXiv:2305.06569, 2203.13366); `vocab` and `vectors` are not read."""

    kind: Literal["numeric"] = "numeric"
    """No item tokens and no new rows; needs `objective.normaliser: vocab`."""
    order: Literal["random", "sequential"] = "random"
    """Numbers dealt at random, which tell nothing, or in the order in which training sequences have the items."""


@dataclass(frozen=True, kw_only=True)
class TitleTokenizer:
    """The item's title in existing tokens (arXiv:2305.06569); `vocab` and `vectors` are not read."""

    kind: Literal["title"] = "title"
    """No item tokens and no new rows; needs `objective.normaliser: vocab`. Equal titles get a number behind them."""
    max_tokens: Annotated[int, Within(low=1, high=48)] = 8
    """Tokens of a title that are kept; the end token, and a number that tells equal titles apart, come on top."""


FittedTokenizer = ResidualKMeansTokenizer | RqVaeTokenizer | ProductTokenizer | HierarchicalTokenizer
CodeTokenizer = FittedTokenizer | RandomTokenizer | FileTokenizer
TextTokenizer = NumericTokenizer | TitleTokenizer
Tokenizer = CodeTokenizer | TextTokenizer


@dataclass(frozen=True, kw_only=True)
class Vocab:
    """How item tokens enter the language model's vocabulary."""

    init: Literal["text-mean", "codebook", "normal", "base"] = "text-mean"
    """First rows: mean embedding of the item texts under a codeword, projected codebooks, noise; or the base's own."""


@dataclass(frozen=True, kw_only=True)
class Examples:
    """How interaction sequences become training examples."""

    kind: Literal["all-positions", "windows", "last"] = "all-positions"
    """A loss at every item of a row (decoder-only models), one row for every target, or only each user's last one."""
    history_length: Count = 20
    """Items that a target sees at most, in training and in evaluation."""
    tasks: Mapping[Literal["next-item", "title-to-item", "item-to-title"], NotNegative] = field(
        default_factory=lambda: {"next-item": 1.0, "title-to-item": 0.0, "item-to-title": 0.0}
    )
    """Task → weight in the loss; 0 leaves it out."""


@dataclass(frozen=True, kw_only=True)
class TokensScoring:
    """Next items are scored by a row of item tokens, as long as their codes."""

    kind: Literal["tokens"] = "tokens"
    """By the probabilities of its item tokens, one position each."""
    item_embedding: CountOrNone = 0
    """Dimensions of an embedding of each item's own, carried by its last token in what is read; 0 leaves it out."""


@dataclass(frozen=True, kw_only=True)
class RecursiveScoring:
    """One vector an item goes in, and a recursive network yields its tokens (IntRR, arXiv:2602.20704)."""

    kind: Literal["recursive"] = "recursive"
    """By a network that goes through the levels; the model runs once, over one position an item."""
    guidance: Literal["uid", "vectors", "both"] = "uid"
    """What an item's vector is made by: an embedding of its own, its item vector, or both, which knows new items."""
    embedding: Annotated[Count, Unless("guidance", ("vectors",))] = 512
    """Dimensions of an item's own embedding."""
    hidden: Count = 512
    """Width of the inner layer of the network, one a level."""
    mixing: Literal["hard", "soft"] = "hard"
    """An item's vector sums its best codewords (gradients pass to all), or means of all by their probability."""
    alignment: NotNegative = 0.1
    """Weight of the loss that ties an item's vector to its code; 0, the released setting, leaves it out."""


Scoring = TokensScoring | RecursiveScoring


@dataclass(frozen=True, kw_only=True)
class NoRescoring:
    """Items are found and scored by the language model alone."""

    kind: Literal["none"] = "none"
    """No other model is asked."""


@dataclass(frozen=True, kw_only=True)
class SasrecRescoring:
    """A dense model of the log, a vector an item, is trained too; what either finds is scored by both."""

    kind: Literal["sasrec"] = "sasrec"
    """A small transformer over item ids (SASRec), in the bundle beside the language model."""
    shares: tuple[Annotated[float, Within(above=0, below=1)], ...] = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
    """Of it in the score, to choose from by NDCG@10 on validation; one entry sets it."""
    width: Annotated[int, Within(low=2)] = 64
    """Dimensions of an item's vector and of every layer, even."""
    dropout: Dropout = 0.5
    """While it is trained."""
    steps: Count = 30_000
    """Of its training at most; validation ends it before, as a rule."""


Rescoring = NoRescoring | SasrecRescoring


@dataclass(frozen=True, kw_only=True)
class ItemOrderSegments:
    """Users by the direction of their last step in an order of the items: `NAME up`, `NAME down`, `NAME same`."""

    kind: Literal["item-order"]
    """Compares the test target with the last item of the history."""
    column: str
    """Column of the items file that orders the items: as numbers if all its values are numbers, else as text."""


@dataclass(frozen=True, kw_only=True)
class UserColumnSegments:
    """Users by what the log says about them, such as a country or a cohort: `NAME: VALUE` for each value."""

    kind: Literal["user-column"]
    """Takes the value of the user's newest interaction before the target."""
    column: str
    """Column of the interactions file; its ten most frequent values are told apart."""


Segments = ItemOrderSegments | UserColumnSegments


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Validation while training, and the test at the end."""

    beam: Annotated[int, Within(low=20)] = 20
    """Codes kept at each level; the metrics reach to rank 20."""
    k: Count = 10
    """Recommendations shown in predictions and report; at most `beam`."""
    mask_seen: bool = False
    """Leave out items of the user's own history, the target excepted: a rule of the protocol, for baselines, too."""
    repeats: Literal["keep", "drop", "choose"] = "keep"
    """Items of the history: `keep` them among the answers, `drop` them (a target among them is missed), or let
    validation `choose`, after training."""
    baselines: tuple[Literal["popularity", "markov", "item-knn", "sasrec"], ...] = ("popularity", "markov", "item-knn")
    """Fitted and tested on the same split; `sasrec` is trained, which takes minutes where the log is large."""
    validation_users: CountOrNone = 0
    """Validate on this many users, drawn with the seed; 0 is all."""
    patience: CountOrNone = 0
    """Validations without a better NDCG@10 before training stops; 0 never stops early."""
    every: Positive = 1.0
    """Epochs between validations."""
    batch_size: Count = 64
    """Users evaluated at a time."""
    decode_normaliser: Literal["same", "level", "items", "vocab", "children"] = "same"
    """Softmax while decoding: as in training, one of the others, or over the trie's children."""
    segments: Mapping[str, Segments] = field(default_factory=dict)
    """Name → rule that makes further segments of the test users, such as {x: {kind: user-column, column: country}}."""
