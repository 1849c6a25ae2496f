"""The demo model's world: emoji as product photos on coloured backdrops, and their captions.

A scene is drawn from sprites (pictures with alpha) on the device that holds them, at twice its
size, then halved, so that turned and scaled edges are smooth. Every random number comes from the
generator given.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

SIZE = 128  # pixels a side of a scene; its latent is 16 x 16

# Code point of the emoji: how a caption calls it.
KINDS = {
    "1f34e": "a red apple", "1f34a": "a tangerine", "1f34b": "a lemon", "1f34c": "a banana",
    "1f349": "a watermelon", "1f347": "grapes", "1f353": "a strawberry", "1f352": "cherries",
    "1f351": "a peach", "1f34d": "a pineapple", "1f965": "a coconut", "1f951": "an avocado",
    "1f346": "an eggplant", "1f955": "a carrot", "1f33d": "an ear of corn", "1f966": "broccoli",
    "1f344": "a mushroom", "1f354": "a hamburger", "1f355": "a pizza", "1f35f": "french fries",
    "1f32d": "a hot dog", "1f32e": "a taco", "1f363": "sushi", "1f369": "a doughnut",
    "1f36a": "a cookie", "1f382": "a birthday cake", "1f9c1": "a cupcake", "1f366": "ice cream",
    "1f36d": "a lollipop", "2615": "a cup of coffee", "1f9c3": "a juice box", "1f436": "a dog",
    "1f431": "a cat", "1f42d": "a mouse", "1f439": "a hamster", "1f430": "a rabbit",
    "1f98a": "a fox", "1f43b": "a bear", "1f43c": "a panda", "1f428": "a koala",
    "1f42f": "a tiger", "1f981": "a lion", "1f42e": "a cow", "1f437": "a pig", "1f438": "a frog",
    "1f435": "a monkey", "1f414": "a chicken", "1f427": "a penguin", "1f426": "a bird",
    "1f424": "a chick", "1f989": "an owl", "1f434": "a horse", "1f984": "a unicorn",
    "1f41d": "a bee", "1f98b": "a butterfly", "1f40c": "a snail", "1f41e": "a ladybug",
    "1f422": "a turtle", "1f40d": "a snake", "1f996": "a dinosaur", "1f419": "an octopus",
    "1f980": "a crab", "1f420": "a fish", "1f42c": "a dolphin", "1f433": "a whale",
    "1f418": "an elephant", "1f42a": "a camel", "1f992": "a giraffe", "1f994": "a hedgehog",
    "1f332": "a tree", "1f335": "a cactus", "1f33b": "a sunflower", "1f337": "a tulip",
    "1f339": "a rose", "1f340": "a clover", "1f31e": "a sun", "1f319": "a moon", "2b50": "a star",
    "1f525": "a fire", "1f4a7": "a droplet", "1f308": "a rainbow", "26c4": "a snowman",
    "2601": "a cloud", "1f697": "a car", "1f695": "a taxi", "1f68c": "a bus",
    "1f692": "a fire engine", "1f69c": "a tractor", "1f6b2": "a bicycle", "1f6f5": "a scooter",
    "1f682": "a train", "1f681": "a helicopter", "2708": "an airplane", "1f680": "a rocket",
    "26f5": "a sailboat", "1f6f8": "a flying saucer", "1f388": "a balloon",
    "26bd": "a soccer ball", "1f3c0": "a basketball", "1f3be": "a tennis racket",
    "1f3b8": "a guitar", "1f3ba": "a trumpet", "1f3b9": "a piano", "1f941": "a drum",
    "1f3a7": "headphones", "1f4f7": "a camera", "1f4fa": "a television", "1f4bb": "a laptop",
    "1f4a1": "a light bulb", "1f511": "a key", "1f512": "a lock", "1f528": "a hammer",
    "2702": "scissors", "1f58d": "a crayon", "1f4da": "books", "1f381": "a gift",
    "1f451": "a crown", "1f48e": "a gem", "1f514": "a bell", "2602": "an umbrella",
    "1f392": "a backpack", "1f45f": "a sneaker", "1f452": "a sun hat", "1f453": "glasses",
    "231a": "a watch", "23f0": "an alarm clock", "1f9f8": "a teddy bear", "1f916": "a robot",
    "1f47b": "a ghost", "1f383": "a pumpkin", "1f3e0": "a house", "1f3f0": "a castle",
    "26fa": "a tent", "1f9ed": "a compass", "1f56f": "a candle", "1f3a9": "a top hat",
    "1f9e2": "a cap", "1f4e6": "a package", "1f6f9": "a skateboard", "1f3a8": "a palette",
    "1f52d": "a telescope", "1f9f2": "a magnet",
}  # fmt: skip
NAMES = tuple(KINDS.values())
# The small flow model learns only these, one in a picture: it sees too few pictures for all.
FEW = tuple(
    NAMES.index(name)
    for name in (
        "a banana", "a strawberry", "a hamburger", "a fox", "a panda", "a frog", "a cactus",
        "a car", "a rocket", "a balloon", "a robot", "a pumpkin",
    )
)  # fmt: skip
# Things of another kind, which the demo model never saw. A fine-tuned model draws them.
FACES = {
    "1f600": "a grinning face", "1f602": "a face with tears of joy", "1f607": "an angel face",
    "1f608": "a devil face", "1f609": "a winking face", "1f60d": "a face in love",
    "1f60e": "a cool face", "1f610": "a neutral face", "1f618": "a kissing face",
    "1f61c": "a cheeky face", "1f620": "an angry face", "1f622": "a crying face",
    "1f628": "a fearful face", "1f62d": "a sobbing face", "1f631": "a screaming face",
    "1f633": "a blushing face", "1f634": "a sleeping face", "1f637": "a masked face",
    "1f911": "a greedy face", "1f912": "a sick face", "1f913": "a nerdy face",
    "1f914": "a thinking face", "1f917": "a hugging face", "1f920": "a cowboy face",
    "1f921": "a clown face", "1f922": "a green face", "1f929": "a starry face",
    "1f92f": "an exploding face", "1f973": "a partying face", "1f975": "a hot face",
    "1f976": "a freezing face", "1f9d0": "a face with a monocle",
}  # fmt: skip
FACE_NAMES = tuple(FACES.values())

# What a caption may call a backdrop's colour, and the colour.
COLOURS = {
    "red": (0.90, 0.30, 0.30), "orange": (0.97, 0.62, 0.28), "yellow": (0.98, 0.84, 0.38),
    "green": (0.45, 0.74, 0.42), "teal": (0.25, 0.66, 0.66), "blue": (0.33, 0.53, 0.88),
    "purple": (0.60, 0.44, 0.82), "pink": (0.97, 0.67, 0.77), "brown": (0.58, 0.41, 0.30),
    "grey": (0.64, 0.66, 0.70), "white": (0.95, 0.95, 0.94), "black": (0.15, 0.16, 0.20),
}  # fmt: skip
# What a caption calls a backdrop; the first is a plain studio.
PATTERNS = ("background", "polka dots", "stripes", "rays", "checks")
TEMPLATES = ("a photo of {}", "a picture of {}", "{}")


@dataclass(frozen=True)
class Spec:
    """What a scene shows. Colour and pattern are drawn for each picture where they are None."""

    kinds: tuple[int, ...]  # one object, or two from left to right
    colour: int | None
    pattern: int | None
    caption: str


def spec(
    kinds: tuple[int, ...], colour: int | None, pattern: int | None, template: int,
    names: tuple[str, ...] = NAMES,
) -> Spec:  # fmt: skip
    """A scene and its caption. A pattern without a colour is not named either."""
    text = " and ".join(names[kind] for kind in kinds)
    if colour is not None:
        name = tuple(COLOURS)[colour]
        article = "an" if name == "orange" else "a"
        plain = not pattern
        text += f" on {article} {name} background" if plain else f" on {name} {PATTERNS[pattern]}"
        pattern = pattern or 0
    return Spec(kinds, colour, pattern if colour is not None else None,
                TEMPLATES[template].format(text))  # fmt: skip


def specs(
    count: int, generator: torch.Generator, pairs: float = 0.2, names: tuple[str, ...] = NAMES,
    among: Sequence[int] = (),
) -> list[Spec]:  # fmt: skip
    """Random scenes; `pairs` of them show two objects, and half name their backdrop. among: the
    kinds to show, as indices of names; by default all."""
    among = among or range(len(names))

    def integer(limit: int) -> int:
        return int(torch.randint(limit, (), generator=generator))

    def chance(share: float) -> bool:
        return float(torch.rand((), generator=generator)) < share

    made = []
    for _ in range(count):
        kinds = (among[integer(len(among))],)
        if chance(pairs):
            kinds += (among[integer(len(among))],)
        colour = integer(len(COLOURS)) if chance(0.5) else None
        pattern = 0 if chance(0.5) else 1 + integer(len(PATTERNS) - 1)
        made.append(spec(kinds, colour, pattern, integer(len(TEMPLATES)), names))
    return made


def backdrops(
    colour: torch.Tensor, pattern: torch.Tensor, side: int, generator: torch.Generator
) -> torch.Tensor:
    """Indices of colours [N] and patterns [N] -> pictures [N, 3, side, side] in 0..1.

    A plain studio has a wall, a slightly lighter floor below a soft horizon, and dark corners. A
    pattern is drawn on the wall in a second tone of the colour.
    """
    device, count = colour.device, len(colour)

    def rand(*shape: int) -> torch.Tensor:
        return torch.rand(count, *shape, generator=generator, device=device)

    palette = torch.tensor(tuple(COLOURS.values()), device=device)
    base = palette[colour] * (0.88 + 0.24 * rand(1)) + 0.05 * (rand(3) - 0.5)
    axis = (torch.arange(side, device=device) + 0.5) / side * 2 - 1
    y, x = axis.view(1, side, 1), axis.view(1, 1, side)
    # The second tone: towards white, or towards black on light colours.
    dark = (base.mean(1, keepdim=True) > 0.6).float()
    other = base + (0.16 + 0.14 * rand(1)) * ((1 - dark) * (1 - base) - 1.2 * dark * base)
    phase, period = rand(1, 1), 0.30 + 0.25 * rand(1, 1)
    cosine = torch.cos(math.pi * (rand(1, 1) - 0.5)), torch.sin(math.pi * (rand(1, 1) - 0.5))
    sharp = 0.25 * side  # how steep a figure's edge is

    def wave(u: torch.Tensor) -> torch.Tensor:
        return torch.sin(2 * math.pi * (u / period + phase))

    def edge(u: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(sharp * u)

    row = (y / period).floor()
    px = ((x / period + phase + 0.5 * (row % 2)) % 1 - 0.5) * period
    py = ((y / period) % 1 - 0.5) * period
    angle = torch.atan2(y - 0.1, x + 0 * y)
    figures = torch.stack(
        [
            torch.zeros(count, side, side, device=device),
            edge(0.27 * period - (px.square() + py.square()).sqrt()),
            edge(0.3 * period * wave(x * cosine[0] + y * cosine[1])),
            edge(0.08 * torch.sin(angle * (6 + (rand(1, 1) * 4).floor()) + 6 * phase)),
            edge(0.3 * period * torch.sin(math.pi * (x / period + phase))
                 * torch.sin(math.pi * y / period)),
        ], 1,
    )  # fmt: skip
    figure = figures.gather(1, pattern.view(-1, 1, 1, 1).expand(-1, 1, side, side))
    wall = base[:, :, None, None] + figure * (other - base)[:, :, None, None]
    horizon = 0.35 + 0.3 * rand(1, 1)
    plain = (pattern == 0).float().view(-1, 1, 1)
    floor = plain * torch.sigmoid((y - horizon) * 14)
    light = 1 + 0.10 * floor - 0.10 * plain * (y + 1) / 2
    corners = 1 - 0.13 * (x.square() + y.square()) / 2
    return (wall * (light * corners)[:, None]).clamp(0, 1)


def kinds_of(collection: str) -> dict[str, str]:
    """What a collection of sprites shows: code points and names."""
    return FACES if collection == "faces" else KINDS


def specs_of(collection: str, count: int, generator: torch.Generator) -> list[Spec]:
    """Random scenes of a collection."""
    if collection == "few":
        return specs(count, generator, pairs=0.0, among=FEW)
    return specs(count, generator, names=tuple(kinds_of(collection).values()))


def hand_of(collection: str) -> str:
    """Whose hand drew a collection of sprites; a key of HANDS."""
    return "3d" if collection in ("faces", "few") else collection


@dataclass
class Hand:
    """How the objects of a set of sprites are set into a scene."""

    shadow: float = 0.45  # how dark
    outline: float = 0.0  # a white border of a sticker, in parts of the picture's side
    drawn: bool = False  # white lines on blue paper in place of backdrop and colours


HANDS = {
    "3d": Hand(), "noto": Hand(), "sticker": Hand(shadow=0.25, outline=0.022),
    "blueprint": Hand(shadow=0.0, drawn=True),
}  # fmt: skip


def scenes(
    sprites: torch.Tensor, chosen: list[Spec], generator: torch.Generator, hand: Hand = HANDS["3d"]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sprites uint8 [kinds, 4, S, S] -> scenes [N, 3, SIZE, SIZE] in 0..1, colours, patterns [N].

    One object stands in the middle, two stand side by side; each is turned, scaled, shifted and at
    times mirrored, above a soft shadow.
    """
    device, count, side = sprites.device, len(chosen), 2 * SIZE

    def rand(*shape: int) -> torch.Tensor:
        return torch.rand(count, *shape, generator=generator, device=device)

    def indices(values: list[int | None], free: torch.Tensor) -> torch.Tensor:
        named = torch.tensor([-1 if v is None else v for v in values], device=device)
        return torch.where(named < 0, free, named)

    free_pattern = (rand() * 2 * (len(PATTERNS) - 1)).long() - (len(PATTERNS) - 2)
    colour = indices([s.colour for s in chosen], (rand() * len(COLOURS)).long())
    pattern = indices([s.pattern for s in chosen], free_pattern.clamp(min=0))
    picture = backdrops(colour, pattern, side, generator)
    if hand.drawn:
        picture = _paper(count, side, rand)
    pair = torch.tensor([float(len(s.kinds) > 1) for s in chosen], device=device)
    axis = (torch.arange(side, device=device) + 0.5) / side * 2 - 1
    y, x = axis.view(1, side, 1), axis.view(1, 1, side)
    for place in range(2):
        kind = torch.tensor([s.kinds[min(place, len(s.kinds) - 1)] for s in chosen], device=device)
        there = pair if place else torch.ones_like(pair)
        size = torch.where(pair > 0, 0.43 + 0.07 * rand(), 0.66 + 0.18 * rand())
        cx = pair * (0.48 * (2 * place - 1)) + (0.16 - 0.10 * pair) * (rand() - 0.5)
        cy = 0.06 + 0.16 * (rand() - 0.5)
        turn, mirror = 0.5 * (rand() - 0.5), torch.where(rand() < 0.5, -1.0, 1.0)
        cos, sin = turn.cos() / size, turn.sin() / size
        theta = torch.stack(
            [
                torch.stack([mirror * cos, mirror * sin, -mirror * (cos * cx + sin * cy)], 1),
                torch.stack([-sin, cos, sin * cx - cos * cy], 1),
            ], 1,
        )  # fmt: skip
        grid = F.affine_grid(theta, [count, 4, side, side], align_corners=False)
        sprite = sprites[kind].float() / 255
        sprite = torch.cat([sprite[:, :3] * sprite[:, 3:], sprite[:, 3:]], 1)
        layer = F.grid_sample(sprite, grid, align_corners=False) * there.view(-1, 1, 1, 1)
        ink, alpha = layer[:, :3], layer[:, 3:]
        if hand.drawn:
            picture = picture + (torch.tensor(0.97, device=device) - picture) * alpha
            continue
        if hand.shadow:
            low = (cy + 0.86 * size).view(-1, 1, 1)
            dx = (x - cx.view(-1, 1, 1)) / (0.72 * size).view(-1, 1, 1)
            dy = (y - low) / (0.13 * size).view(-1, 1, 1)
            dark = torch.exp(-2.2 * (dx.square() + dy.square()))
            picture = picture * (1 - hand.shadow * there.view(-1, 1, 1, 1) * dark[:, None])
        if hand.outline:
            width = int(hand.outline * side) * 2 + 1
            border = F.max_pool2d(alpha, width, 1, width // 2)
            border = F.avg_pool2d(border, 3, 1, 1)
            picture = picture * (1 - border) + border
        picture = picture * (1 - alpha) + ink
    return F.avg_pool2d(picture, 2).clamp(0, 1), colour, pattern


def _paper(count: int, side: int, rand) -> torch.Tensor:
    """Blue paper with a fine grid: [count, 3, side, side]."""
    tone = rand(1)
    blue = torch.tensor([0.09, 0.25, 0.58], device=tone.device) * (0.9 + 0.2 * tone)
    at = torch.arange(side, device=tone.device)
    line = (at % 32 < 2).float()
    grid = torch.maximum(line.view(-1, 1), line.view(1, -1))
    return blue[:, :, None, None] + 0.09 * grid
