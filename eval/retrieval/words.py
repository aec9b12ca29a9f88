"""Common English words, from which keys, and sentences where there is no other text, are made."""

import random

_ADJECTIVES = """
    able amber ancient arctic autumn bitter blank blue bold brave brief bright broad broken calm careful cheap clean
    clever cold cool crisp curious damp dark deep distant double dry dusty eager early empty faint famous fast
    fierce final flat fresh gentle giant golden grand grateful green happy hidden hollow honest humble hungry icy
    idle jolly keen kind large late lazy light little lively lonely loud lucky modern narrow neat noble noisy odd
    old pale patient plain polite proud quick quiet rapid rare rough round royal rusty sharp short silent silver
    simple slow small smooth soft solid steep strange strong sudden sunny sweet tall thin tiny tired useful warm
    weary wild wise wooden young
"""
_NOUNS = """
    anchor apple arrow basket beach bell bird boat bottle branch bread bridge brush bucket butter button cabin
    camera candle canyon castle chair cherry circle city clock cloud coat coffee corner cotton cousin creek crown
    curtain desert door dragon drum engine farmer feather fence field flower forest fountain garden gate ghost glass
    glove guitar hammer harbor helmet hill horse hotel island jacket jungle kettle key kitchen ladder lake lamp leaf
    lemon letter library lion market meadow mirror moon mountain museum needle ocean orange oven owl palace paper
    parrot pencil piano pillow planet pocket pond potato rabbit river road rocket roof rope sailor shadow ship shoe
    spoon stone storm street table teacher temple tiger tower train tree tunnel valley village violin wagon wall
    watch whale window winter wolf
"""
ADJECTIVES, NOUNS = tuple(_ADJECTIVES.split()), tuple(_NOUNS.split())
VERBS = (
    "admired",
    "called",
    "carried",
    "counted",
    "crossed",
    "drew",
    "followed",
    "found",
    "kept",
    "left",
    "liked",
    "lost",
    "moved",
    "noticed",
    "passed",
    "saw",
)
TIMES = (
    "that morning",
    "after lunch",
    "in the evening",
    "last year",
    "before dawn",
    "once again",
    "for a while",
    "on the way home",
)


def sentence(rng: random.Random) -> str:
    """Return a sentence about two things."""
    first, second = (f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}" for _ in range(2))
    return f"The {first} {rng.choice(VERBS)} the {second} {rng.choice(TIMES)}."


def pairs_of_words(rng: random.Random, n: int) -> list[str]:
    """Return n different pairs of an adjective and a noun, such as "quiet river"."""
    numbers = rng.sample(range(len(ADJECTIVES) * len(NOUNS)), n)
    return [f"{ADJECTIVES[i // len(NOUNS)]} {NOUNS[i % len(NOUNS)]}" for i in numbers]
