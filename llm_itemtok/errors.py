"""The errors a user can cause, and nothing else.

Each message says what must hold, what was found and what to do about it. The command line
turns any of them into exit status 2 and the message; our own broken invariants stay
`AssertionError` and keep their traceback.
"""


class ItemTokError(ValueError):
    """Something the user gave is wrong; the message says how to put it right."""


class RecipeError(ItemTokError):
    """A recipe cannot be read, has a setting that does not exist, or settings that contradict each other."""


class DataError(ItemTokError):
    """An input file, or what it holds, is not what the data folder promises."""


class CollisionError(ItemTokError):
    """Items share a code and the recipe forbids it, or no free code is left to tell them apart."""


class ArtifactError(ItemTokError):
    """A file of a run folder or a bundle is missing, broken or of another format version."""


class UnsupportedModelError(ItemTokError):
    """The language model is of a family, or has a feature, that is not known to work here."""


class TrainingError(ItemTokError):
    """Training cannot go on with these settings here: the loss is no number any more, or memory or disk is full."""


class HubError(ItemTokError):
    """A model cannot be pushed to a Hub repository."""
