"""The made-up bookshop: genres, series and authors, with titles that read like titles.

Words of one genre stay in that genre, volumes of one series share its name, and an author writes in
one sub-genre. So titles say about an item what its readers know, which is what makes item tokens
learned from text useful for predicting behaviour. Behaviour itself is in `synthetic`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from llm_itemtok.data.catalog import Catalog

GENRES: dict[str, tuple[tuple[str, str, str], str, str]] = {
    "Fantasy": (
        ("Epic Fantasy", "Urban Fantasy", "Fairy Tales"),
        "Ember Silver Thorned Whispering Runed Gilded Elder Hollow Moonlit Shadowed",
        "Crown Dragon Grimoire Sorcerer Throne Oathstone Wyrm Enchantress Spellbinder Griffin",
    ),
    "Science Fiction": (
        ("Space Opera", "Cyberpunk", "First Contact"),
        "Orbital Quantum Stellar Synthetic Radiant Drifting Binary Infinite Cryogenic Subspace",
        "Starship Colony Android Nebula Signal Singularity Outpost Wormhole Protocol Exile",
    ),
    "Mystery": (
        ("Cozy Mystery", "Detective Stories", "Historical Mystery"),
        "Missing Poisoned Crooked Silent Locked Forged Stolen Unsigned Midnight Borrowed",
        "Alibi Corpse Witness Inspector Ledger Fingerprint Motive Parlour Clue Confession",
    ),
    "Romance": (
        ("Contemporary Romance", "Regency Romance", "Small Town Romance"),
        "Tender Reckless Blushing Stolen-Hearted Devoted Sunlit Bridal Longing Beloved Honeyed",
        "Kiss Wedding Duke Bouquet Sweetheart Heartbeat Promise Serenade Bride Valentine",
    ),
    "Cooking": (
        ("Baking", "Weeknight Dinners", "World Kitchens"),
        "Rustic Slow-Roasted Everyday Buttery Smoky Seasonal Fermented One-Pot Golden-Crusted Homemade",
        "Sourdough Kitchen Pastry Skillet Supper Noodles Casserole Pantry Dumplings Stew",
    ),
    "History": (
        ("Ancient History", "Maritime History", "Modern History"),
        "Imperial Forgotten Besieged Republican Bronze-Age Colonial Victorian Medieval Divided Sunken",
        "Empire Fleet Revolution Dynasty Parliament Armada Citadel Treaty Expedition Frontier",
    ),
    "Gardening": (
        ("Vegetable Growing", "Houseplants", "Wild Gardens"),
        "Flowering Shaded Organic Raised-Bed Perennial Potted Pruned Evergreen Cottage Drought-Proof",
        "Orchard Tomatoes Roses Fern Compost Meadow Hedgerow Seedlings Succulents Greenhouse",
    ),
    "Travel": (
        ("Walking Guides", "Rail Journeys", "Island Stories"),
        "Winding Coastal Alpine Sleeper Unhurried Barefoot Northern Scenic Overnight Remote",
        "Footpath Railway Lighthouse Harbour Pilgrimage Timetable Ferry Passport Backpack Atlas",
    ),
}
"""Genre to its three sub-genres, its adjectives and its nouns. No word is in two genres."""

_PLACES = (
    "Varrow Hollin Marrick Aldermoor Ostrava Kestrel-Bay Lindow Tamsin Orrery Brackwater Sable-Point Quill "
    "Merrow Fenwick Calder Ironbridge Ashdown Novara Pellworm Rook-Hill Saltmarsh Thornbury Umber Wexcombe"
)
_FIRST = "Ada Bruno Clara Dmitri Elena Farid Greta Hugo Isla Jonas Keiko Lena Marco Nadia Owen Priya Rosa Sami"
_LAST = "Abbott Bergman Castellan Dray Eklund Farrow Grieve Holloway Iversen Jardine Kovac Lindqvist Marsh Okoro"
_CYCLES = "Saga Cycle Chronicles Sequence"
_SERIES_SHARE = 0.7
_SERIES_LENGTHS = (3, 7)
_AUTHORS = 2
_ITEMS_A_SUBGENRE = 12
_TRIES = 20


@dataclass(frozen=True)
class Structure:
    """What is planted in the catalogue; arrays over its N rows."""

    subgenres: np.ndarray
    """int64 [N] in `[0, 24)`; the genre is `subgenres // 3`."""
    series: np.ndarray
    """int64 [N], -1 for a book that stands alone; series are numbered from 0."""
    next_volume: np.ndarray
    """int64 [N], the row of the next volume, -1 for a last volume or a book that stands alone."""
    is_entry: np.ndarray
    """bool [N], stands alone or is a first volume."""


@dataclass(frozen=True)
class _Book:
    title: str
    author: str
    subgenre: int
    series: int
    volume: int


def _titles(adjectives: list[str], nouns: list[str], rng: np.random.Generator) -> Iterator[str]:
    """Distinct titles of one genre, without end; numbered when words run out."""
    used: dict[str, int] = {}
    misses = 0
    while True:
        adjective, place = rng.choice(adjectives), rng.choice(_PLACES.split()).replace("-", " ")
        noun, other = rng.choice(nouns, size=2, replace=False)
        patterns = (
            f"The {adjective} {noun}",
            f"{adjective} {noun} of {place}",
            f"The {noun} and the {other}",
            f"Beyond the {noun}",
            f"The {adjective} {noun} at {place}",
        )
        title = patterns[rng.integers(len(patterns))]
        if title in used and misses < _TRIES:
            misses += 1
            continue
        misses = 0
        used[title] = used.get(title, 0) + 1
        yield title if used[title] == 1 else f"{title}, Part {used[title]}"


def _books(num_items: int, rng: np.random.Generator) -> list[_Book]:
    books: list[_Book] = []
    num_series = 0
    names = [f"{first} {last}" for first in _FIRST.split() for last in _LAST.split()]
    authors = rng.permutation(names).tolist()
    of_genre = [_titles(adjectives.split(), nouns.split(), rng) for _, adjectives, nouns in GENRES.values()]
    order = np.arange(3 * len(GENRES)).reshape(-1, 3).T.ravel()  # small shops have one sub-genre of each genre first
    stocked = order[: max(num_items // _ITEMS_A_SUBGENRE, 2)]
    for subgenre, shelf in zip(stocked.tolist(), np.array_split(np.arange(num_items), len(stocked)), strict=True):
        titles = of_genre[subgenre // 3]
        own = authors[subgenre * _AUTHORS : (subgenre + 1) * _AUTHORS]
        left = len(shelf)
        while left:
            author = str(rng.choice(own))
            length = int(rng.integers(_SERIES_LENGTHS[0], _SERIES_LENGTHS[1] + 1))
            if length > left or rng.random() > _SERIES_SHARE:
                books.append(_Book(next(titles), author, subgenre, -1, 0))
                left -= 1
                continue
            name = f"{next(titles)} {rng.choice(_CYCLES.split())}".removeprefix("The ")
            books += [
                _Book(f"{next(titles)} ({name}, Book {volume})", author, subgenre, num_series, volume)
                for volume in range(1, length + 1)
            ]
            num_series += 1
            left -= length
    return books


def make_catalog(num_items: int, rng: np.random.Generator) -> tuple[Catalog, Structure]:
    """Write the books and shuffle them, so that neither ids nor row order say anything about them.

    Args:
        num_items: at least 2; from 288 on all sub-genres have books.
        rng: source of all choices.
    """
    books = _books(num_items, rng)
    books = [books[index] for index in rng.permutation(len(books))]
    subgenre_names = [name for names, _, _ in GENRES.values() for name in names]
    genre_names = list(GENRES)
    catalog = Catalog(
        item_ids=tuple(f"bk{row:05d}" for row in range(len(books))),
        titles=tuple(book.title for book in books),
        categories=tuple(("Books", genre_names[book.subgenre // 3], subgenre_names[book.subgenre]) for book in books),
        brands=tuple(book.author for book in books),
        descriptions=("",) * len(books),
    )
    place = {(book.series, book.volume): row for row, book in enumerate(books) if book.series >= 0}
    structure = Structure(
        subgenres=np.array([book.subgenre for book in books]),
        series=np.array([book.series for book in books]),
        next_volume=np.array([place.get((book.series, book.volume + 1), -1) for book in books]),
        is_entry=np.array([book.volume <= 1 for book in books]),
    )
    return catalog, structure
