"""A small grammar of film reviews whose true sentiment is known, so that a run can be judged without a judge.

It stands in for IMDb and its sentiment classifier in the controlled experiment of DPO (arXiv:2305.18290, Sec. 6.1).
A beginning is neutral, one fair coin decides the sentiment of the rest, and every other choice is free: a policy can
become entirely positive and still be as diverse as the positive half of the grammar.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterator, Mapping
from itertools import product

Slots = Mapping[str, tuple[str, ...]]

OPENINGS = (
    "We saw {title} on a rainy Sunday, and the {aspect}",
    "Last night we watched {title}, and the {aspect}",
    "My brother took me to {title}. The {aspect}",
    "In {title}, the {aspect}",
    "I went to {title} with my cousin, and the {aspect}",
    "{title} came out in June. The {aspect}",
    "This was my second visit to {title}. The {aspect}",
    "Most people know {title} as a book. On screen, the {aspect}",
    "Our town showed {title} on Friday, and the {aspect}",
    "We had an hour or two, so we saw {title}. The {aspect}",
)
TITLES = (
    "The Silent River",
    "Paper Lanterns",
    "A House by the Sea",
    "The Last Train North",
    "Winter Harbor",
    "Blue Mountain",
    "The Clock Maker",
    "Letters from Oslo",
    "The Night Bus",
    "The Glass Garden",
    "Seven Bridges",
    "Salt and Smoke",
)
# Singular throughout, as the predicates are; and never tied to one part of the film, as predicates may name a scene.
ASPECTS = (
    "acting",
    "story",
    "music",
    "script",
    "dialogue",
    "editing",
    "pacing",
    "camera work",
    "cast",
    "plot",
    "lighting",
    "directing",
)

# Words carry sentiment if and only if they stand in one of the next two tables. No adjective or noun begins with a
# vowel, as they follow "a"; every word of `touched` is also a participle, as it follows "came home".
POSITIVE: Slots = {
    "adjective": (
        *("superb", "wonderful", "brilliant", "delightful", "splendid", "marvelous", "graceful", "clever", "charming"),
        *("fresh", "memorable", "magnificent", "lovely", "sublime", "perfect", "beautiful", "stunning", "gorgeous"),
    ),
    "noun": (
        *("triumph", "delight", "joy", "marvel", "treat", "pleasure", "masterpiece", "gem", "wonder", "treasure"),
        *("jewel", "success", "revelation"),
    ),
    "quality": ("charm", "grace", "warmth", "wit", "beauty", "tenderness", "magic", "passion", "imagination"),
    "touched": (
        *("delighted", "charmed", "thrilled", "amused", "dazzled", "enchanted", "captivated", "impressed", "touched"),
        *("enthralled", "inspired", "uplifted", "fascinated"),
    ),
    "judged": ("loved", "adored", "enjoyed", "admired", "praised", "applauded", "treasured", "savored", "cherished"),
    "fared": ("shone", "soared", "sparkled", "glowed", "triumphed", "excelled", "flourished", "blossomed"),
    "manner": ("beautifully", "superbly", "gracefully", "brilliantly", "wonderfully", "cleverly", "perfectly"),
}
NEGATIVE: Slots = {
    "adjective": (
        *("dreadful", "dull", "clumsy", "terrible", "stale", "tedious", "lifeless", "bland", "hollow", "weak"),
        *("sloppy", "lazy", "forgettable", "dismal", "feeble", "horrible", "tiresome", "shoddy"),
    ),
    "noun": (
        *("mess", "bore", "chore", "mistake", "disaster", "flop", "failure", "letdown", "disgrace", "nightmare"),
        *("blunder", "muddle", "headache"),
    ),
    "quality": ("confusion", "nonsense", "clumsiness", "silliness", "laziness", "boredom", "gloom", "fuss", "clutter"),
    "touched": (
        *("bored", "annoyed", "disappointed", "irritated", "exhausted", "insulted", "frustrated", "baffled", "wearied"),
        *("embarrassed", "depressed", "angered", "disgusted"),
    ),
    "judged": ("hated", "disliked", "loathed", "detested", "resented", "despised", "mocked", "endured", "criticized"),
    "fared": ("dragged", "stumbled", "failed", "sagged", "flopped", "faltered", "collapsed", "fizzled"),
    "manner": ("badly", "clumsily", "poorly", "terribly", "carelessly", "dreadfully", "horribly"),
}
POSITIVE_WORDS = frozenset(word for words in POSITIVE.values() for word in words)
NEGATIVE_WORDS = frozenset(word for words in NEGATIVE.values() for word in words)

_PEOPLE = (
    *("my sister", "my uncle", "the children", "our neighbors", "everyone in our row", "half the room"),
    *("the woman beside me", "my old teacher", "two friends of mine", "the students behind us"),
)
NEUTRAL: Slots = {
    "continuation": (
        "{predicate}.",
        "{predicate}, and {clause}.",
        "{predicate}, while {clause}.",
        "{predicate}. {clause}.",
        "{predicate}. {aside}, and {clause}.",
        "{predicate}. {clause}. {verdict}.",
        "{predicate}, and {clause}. {clause}.",
        "{predicate}. {clause}, and {clause}.",
        "{predicate}. {clause}, while {clause}.",
    ),
    "predicate": (
        "was {adjective} {when}",
        "was {adjective} and {adjective} {when}",
        "was a {adjective} piece of work {when}",
        "was a {noun} {when}",
        "was a {noun} for {whom}",
        "was full of {quality} {when}",
        "{fared} {when}",
        "{fared} in {scene}",
        "{touched} {whom} {when}",
        "{touched} {whom} in {scene}",
        "turned {scene} into a {noun}",
        "brought {quality} to {scene}",
    ),
    "clause": (
        "{scene} was {adjective}",
        "{scene} was {adjective} and {adjective}",
        "{scene} was a {noun} for {whom}",
        "{scene} {touched} {whom}",
        "{scene} {fared}",
        "{maker} handled {scene} {manner}",
        "{maker} filled {scene} with {quality}",
        "{who} {judged} {scene}",
        "{who} {judged} every minute of it",
        "{who} came home {touched}",
        "{who} called it a {noun} {later}",
        "{later} {who} called it {adjective}",
    ),
    "verdict": ("what a {noun}", "what a {adjective} film"),
    "aside": (
        "we sat near the back",
        "we sat in the front row",
        "we took the early show",
        "we had the late show",
        "it ran for two hours",
        "there were forty of us",
    ),
    "scene": ("the {event} {place}", "the {order} scene {place}", "the {order} {event}"),
    "event": ("chase", "dinner", "wedding", "parade", "dance", "speech", "race", "meeting", "farewell", "picnic"),
    "place": (
        *("by the lake", "in the rain", "at the station", "under the bridge", "at night", "in the snow"),
        *("on the beach", "near the harbor", "at dawn", "in the square"),
    ),
    "order": ("opening", "second", "long", "short", "final"),
    "when": (
        *("in the first half", "in the second half", "near the end", "from the first minute", "all the way through"),
        *("in every scene", "to the last minute"),
    ),
    "later": (
        *("on the way home", "over coffee", "at the bus stop", "the next morning", "in the car", "after the credits"),
        "that evening",
    ),
    "maker": ("the director", "the lead actor", "the young crew", "the writer", "the whole team"),
    "who": ("we", "I", *_PEOPLE),
    "whom": ("us", "me", *_PEOPLE),
}


def beginnings() -> list[str]:
    """All beginnings of reviews: a film and an aspect of it, of which nothing has been said yet.

    Returns:
        Neutral texts to prompt a model with. They do not end in a space; what follows starts with one.
    """
    return [opening.format(title=title, aspect=aspect) for opening, title, aspect in product(OPENINGS, TITLES, ASPECTS)]


def is_held_out(beginning: str) -> bool:
    """Whether a beginning is kept from training; about a fifth are, the same ones on every machine."""
    digest = hashlib.blake2b(beginning.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % 5 == 0


def review(beginning: str, rng: random.Random) -> str:
    """Complete a review; a fair coin decides whether it is positive or negative throughout.

    Args:
        beginning: One of :func:`beginnings`.
        rng: Source of the coin and of every other choice.

    Returns:
        The beginning, a space, and one to three clauses that end in a full stop.
    """
    sentiment_slots = POSITIVE if rng.random() < 0.5 else NEGATIVE
    continuation = _expand("{continuation}", {**NEUTRAL, **sentiment_slots}, rng, set())
    sentences = continuation.split(". ")
    return f"{beginning} " + ". ".join([sentences[0], *(text[0].upper() + text[1:] for text in sentences[1:])])


def _expand(template: str, slots: Slots, rng: random.Random, used: set[str]) -> str:
    """Fill the slots of a template, left to right, with nothing that the review has used before if that is possible."""

    def fill(slot: re.Match[str]) -> str:
        options = slots[slot[1]]
        choice = rng.choice([option for option in options if option not in used] or options)
        used.add(choice)
        return _expand(choice, slots, rng, used)

    return re.sub(r"\{(\w+)\}", fill, template)


def sentiment(text: str) -> float:
    r"""Ground-truth sentiment, the reward of the experiment.

    .. math:: (p - n) / (p + n)

    Args:
        text: A review or part of one; beginnings are neutral, so with or without makes no difference.

    Returns:
        A score in [-1, 1] from the numbers :math:`p` and :math:`n` of words in the text that are positive and
        negative, repetitions included; 0 if there are none. Only whole words count, in either case of letters.
    """
    words = re.findall(r"\w+", text.lower())
    positive = sum(word in POSITIVE_WORDS for word in words)
    negative = sum(word in NEGATIVE_WORDS for word in words)
    return (positive - negative) / max(positive + negative, 1)


def corpus(num_reviews: int, seed: int) -> Iterator[str]:
    """Draw reviews whose beginnings are not held out.

    Args:
        num_reviews: How many to draw.
        seed: The same seed draws the same reviews.

    Yields:
        One review after another.
    """
    rng = random.Random(seed)
    kept = [beginning for beginning in beginnings() if not is_held_out(beginning)]
    for _ in range(num_reviews):
        yield review(rng.choice(kept), rng)
