"""English words and sentences made of them: keys of needles, and filler that reads like prose where no text is at hand."""

from __future__ import annotations

import random

ADJECTIVES = (
    "able amber ancient arid bitter bland blunt bold brave brief bright brittle broad bronze calm careful cheap chilly clever cloudy cold common "
    "costly crimson crisp curious damp daring dark deep dense distant dry dull dusty eager early earnest easy elegant empty exact faint fair "
    "faithful famous fancy fast fatal feeble fierce final firm flat fluid foreign fragile frank fresh frozen gentle giant glad golden grand grave "
    "grim hasty heavy hidden hollow honest humble hungry icy idle ivory jolly keen kind large late lazy lean light lively lonely loud loyal lucky "
    "mellow merry mighty mild modest muddy narrow neat nervous nimble noble noisy odd opaque pale patient plain polite proud quick quiet rapid rare "
    "rigid ripe rough round royal rusty sacred sandy scarce secret sharp shy silent silver simple sincere slim slow smooth sober soft solar solid "
    "sour spare steady steep stern stiff strict strong subtle sudden sunny sweet swift tall tame tender thick thin tidy timid tiny tough vague vast "
    "velvet vivid warm weary wet wide wild windy wise witty wooden young"
).split()

NOUNS = (
    "acorn actor album anchor angle apple apron arrow artist atlas attic author badge baker ballad banjo banner barrel basin basket beacon beetle "
    "bell bench berry bishop blanket bottle boulder branch bridge bucket butter button cabin cactus camera candle canoe canvas captain carpet castle "
    "cellar chapel cherry circle clock cloud coast comet compass copper coral cottage cotton cousin cradle crater creek cricket crown crystal curtain "
    "dancer desert diary doctor dolphin donkey door dragon drum eagle editor engine envelope fabric falcon farmer feather fence ferry fiddle flag "
    "flute forest fossil fountain garden garlic ginger glacier glove goblet grape guitar hammer harbor harvest hawk helmet hermit horizon hotel "
    "island jacket jewel journal judge jungle kettle kitchen ladder lagoon lantern lawyer lemon letter library lizard locket magnet maple marble "
    "market meadow medal melon mirror monk mountain museum needle nephew notebook oak ocean olive orchard otter oyster paddle painter palace paper "
    "parrot pebble pencil pepper piano pigeon pillow pilot planet plaza poet pond prairie prince puzzle quarry rabbit raven ribbon river rocket saddle "
    "sailor salmon scarf school shadow shelter signal singer sister spider statue stove stream street summit table tailor teacher temple thistle "
    "ticket tiger tower train trumpet tunnel turtle umbrella uncle valley village violin walnut weaver whistle widow willow window winter wizard"
).split()

_VERBS = (
    "admires avoids builds carries considers describes discovers draws explains follows forgets imagines keeps misses notices owes paints "
    "praises remembers replaces studies surprises"
).split()
_PLACES = (
    "near the harbor",
    "in the old library",
    "behind the market",
    "on the way home",
    "under the bridge",
    "at the edge of town",
    "during the long winter",
    "after the harvest",
)
_OPENINGS = (
    "In most years,",
    "As a rule,",
    "Later on,",
    "It seems that",
    "People say that",
    "For a long time,",
    "Every now and then,",
    "Again,",
)


def key(rng: random.Random) -> str:
    """A two-word key such as ``silent-harbor``."""
    return f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"


def sentence(rng: random.Random) -> str:
    """A sentence of some ten to twenty words."""
    subject, thing, other = (f"the {rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}" for _ in range(3))
    clause = f"{subject} {rng.choice(_VERBS)} {thing} {rng.choice(_PLACES)}"
    if rng.random() < 0.5:
        clause += f", {rng.choice(('because', 'although', 'while', 'and'))} {other} {rng.choice(_VERBS)} it"
    text = f"{rng.choice(_OPENINGS)} {clause}" if rng.random() < 0.5 else clause
    return text[0].upper() + text[1:] + "."
