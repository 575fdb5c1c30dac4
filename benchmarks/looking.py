"""Data to prove that image input has an effect: pictures, questions, blank twins, and scoring.

This file decides the pictures, the questions and how an answer is judged; what is trained on them
is `looking_run`'s. Every answer of a question is right equally often, so one who does not look is
right by chance and no more: ``1 / choices``. The twin of a picture is a blank of its size; sizes
are drawn apart from answers and tell nothing.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

PALETTE = {
    "red": (215, 40, 40), "green": (40, 190, 60), "blue": (45, 70, 220),
    "yellow": (235, 220, 50), "purple": (140, 50, 170), "orange": (245, 140, 30),
    "white": (245, 245, 245), "cyan": (40, 210, 220),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "cross", "ring", "star")
QUESTIONS = {"colour": "Which colour?", "shape": "Which shape?", "count": "How many?"}
NUMBERS = ("zero", "one", "two", "three", "four")
_BLANK = (128, 128, 128)
_GREY = (30, 90)  #: a background's lightness


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What there is to see.

    Attributes:
        colours: of `PALETTE`.
        shapes: of `SHAPES`.
        counts: how many of them a picture may hold, 1 to 4; asked for where there are several.
        sides: least and largest side of a picture in pixels.
        sizes: least and largest radius of a shape, as shares of its cell's half.
        noise: largest step of the background's noise around its grey.
    """

    colours: tuple[str, ...]
    shapes: tuple[str, ...]
    counts: tuple[int, ...] = (1,)
    sides: tuple[int, int]
    sizes: tuple[float, float] = (0.7, 0.95)
    noise: int = 16

    @property
    def choices(self) -> dict[str, int]:
        """Answers that each question can have, by the question's name."""
        found = {"colour": len(self.colours), "shape": len(self.shapes), "count": len(self.counts)}
        return {name: count for name, count in found.items() if count > 1}

    def scenes(self) -> Iterator[dict[str, Any]]:
        """Every combination once."""
        for colour, shape, count in product(self.colours, self.shapes, self.counts):
            yield {"colour": colour, "shape": shape, "count": count}


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A question of a picture.

    Attributes:
        picture: the file.
        about: ``colour``, ``shape`` or ``count``.
        answer: the one word that is right.
    """

    picture: Path
    about: str
    answer: str


def write(folder: Path, task: Task, each: int, *, seed: int) -> list[Asked]:
    """Pictures of every combination, their blank twins, and rows for both.

    ``folder/seen`` and ``folder/blank`` hold the same ``rows.jsonl`` beside their own ``pics``.

    Args:
        folder: made.
        task: what to draw.
        each: pictures of a combination.
        seed: of everything random; another one shares no picture with this.

    Returns:
        All questions of the pictures under ``seen``; `blanked` gives those of the twins.
    """
    dice = random.Random(seed)
    asked: list[Asked] = []
    rows: list[dict[str, Any]] = []
    for side in ("seen", "blank"):
        (folder / side / "pics").mkdir(parents=True)
    for number, scene in enumerate(scene for _ in range(each) for scene in task.scenes()):
        picture = draw(task, scene, dice)
        name = f"pics/{number}.png"
        picture.save(folder / "seen" / name)
        Image.new("RGB", picture.size, _BLANK).save(folder / "blank" / name)
        for about in task.choices:
            answer = NUMBERS[scene[about]] if about == "count" else scene[about]
            asked.append(Asked(picture=folder / "seen" / name, about=about, answer=answer))
            rows.append(_row(name, about, answer))
    text = "".join(json.dumps(row) + "\n" for row in rows)
    for side in ("seen", "blank"):
        (folder / side / "rows.jsonl").write_text(text, encoding="utf-8")
    return asked


def _row(name: str, about: str, answer: str) -> dict[str, Any]:
    question = [{"type": "image", "image": name}, {"type": "text", "text": QUESTIONS[about]}]
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }


def blanked(asked: Sequence[Asked]) -> list[Asked]:
    """The same questions, of blanks."""
    return [
        Asked(
            picture=one.picture.parents[2] / "blank" / "pics" / one.picture.name,
            about=one.about,
            answer=one.answer,
        )
        for one in asked
    ]


def draw(task: Task, scene: dict[str, Any], dice: random.Random) -> Image.Image:
    """One picture: shapes of one kind and colour, anywhere, on noise."""
    wide, high = dice.randint(*task.sides), dice.randint(*task.sides)
    picture = _background(wide, high, task.noise, dice)
    pen = ImageDraw.Draw(picture)
    tint = tuple(min(255, max(0, x + dice.randint(-10, 10))) for x in PALETTE[scene["colour"]])
    parts = 1 if max(task.counts) == 1 else 2  # cells along a side: shapes do not overlap
    cells = dice.sample([(i, j) for i in range(parts) for j in range(parts)], scene["count"])
    for column, row in cells:
        half = min(wide, high) / parts / 2
        radius = half * dice.uniform(*task.sizes)
        x = wide * column / parts + dice.uniform(radius, wide / parts - radius)
        y = high * row / parts + dice.uniform(radius, high / parts - radius)
        _shape(pen, scene["shape"], (x, y), radius, tint)
    return picture


def _background(wide: int, high: int, noise: int, dice: random.Random) -> Image.Image:
    """Dark grey, each number of each pixel moved by up to `noise`."""
    grey = dice.randint(*_GREY)
    moved = dice.randbytes(3 * wide * high)
    scale = bytes(min(255, max(0, grey + round((2 * x / 255 - 1) * noise))) for x in range(256))
    return Image.frombytes("RGB", (wide, high), moved.translate(scale))


def _shape(
    pen: ImageDraw.ImageDraw,
    shape: str,
    at: tuple[float, float],
    radius: float,
    tint: tuple[int, ...],
) -> None:
    """One shape in a circle of `radius`, its outline included."""
    x, y = at
    box = (x - radius, y - radius, x + radius, y + radius)
    if shape == "circle":
        pen.ellipse(box, fill=tint)
    elif shape == "ring":
        pen.ellipse(box, outline=tint, width=max(2, round(radius / 3)))
    elif shape == "cross":
        arm = radius / 4
        pen.rectangle((x - radius, y - arm, x + radius, y + arm), fill=tint)
        pen.rectangle((x - arm, y - radius, x + arm, y + radius), fill=tint)
    else:
        corners, inner = {"square": (4, 1.0), "triangle": (3, 1.0), "star": (5, 0.4)}[shape]
        start = math.pi / 4 if shape == "square" else -math.pi / 2
        points = []
        for n in range(2 * corners if inner < 1 else corners):
            step = math.pi / corners if inner < 1 else 2 * math.pi / corners
            far = radius * (inner if inner < 1 and n % 2 else 1.0)
            points.append(
                (x + far * math.cos(start + n * step), y + far * math.sin(start + n * step))
            )
        pen.polygon(points, fill=tint)


# -- judging


def bound(count: int, choices: int, sigmas: float = 3) -> float:
    """The share of right answers that guessing stays below: chance and some deviations."""
    chance = 1 / choices
    return chance + sigmas * math.sqrt(chance * (1 - chance) / count)


def accuracy(generator: Any, asked: Sequence[Asked]) -> dict[str, float]:
    """Share of right answers by question; an answer is right when it is the word, no more.

    Args:
        generator: a `qcore.inference.generate.Generator` made with ``media=True``.
        asked: the questions.
    """
    right: dict[str, list[bool]] = {}
    for one in asked:
        media = [("image", one.picture)]
        made = generator.prompt(QUESTIONS[one.about], media=media, max_new_tokens=8)
        right.setdefault(one.about, []).append(made.stopped and made.text.strip() == one.answer)
    return {about: sum(found) / len(found) for about, found in right.items()}
