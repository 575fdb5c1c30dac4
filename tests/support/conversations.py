"""Generated conversations: single and multi turn, thinking, tool calls, several languages."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

_CITIES = (
    ("Oslo", "Norway", "snow"), ("Cairo", "Egypt", "sun"), ("Lima", "Peru", "fog"),
    ("Tokyo", "Japan", "rain"), ("Rome", "Italy", "sun"), ("Nairobi", "Kenya", "clouds"),
    ("Athens", "Greece", "wind"), ("Havana", "Cuba", "storm"), ("दिल्ली", "India", "haze"),
    ("القاهرة", "Egypt", "dust"), ("São Paulo", "Brazil", "drizzle"),
    ("Zürich", "Switzerland", "sleet"),
)  # fmt: skip
_TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}


def conversations(count: int = 240, seed: int = 0) -> list[dict[str, Any]]:
    """`count` rows in equal shares of the kinds below."""
    rng = random.Random(seed)
    kinds = (_plain, _system, _thinking, _multi, _tools, _sums)
    return [kinds[n % len(kinds)](rng) for n in range(count)]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Rows as JSON Lines."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


def _user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def _assistant(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def _plain(rng: random.Random) -> dict[str, Any]:
    city, country, _ = rng.choice(_CITIES)
    return {"messages": [_user(f"Where is {city}?"), _assistant(f"{city} is in {country}.")]}


def _system(rng: random.Random) -> dict[str, Any]:
    row = _plain(rng)
    row["messages"].insert(0, {"role": "system", "content": "Answer in one short sentence."})
    return row


def _thinking(rng: random.Random) -> dict[str, Any]:
    a, b = rng.randrange(2, 90), rng.randrange(2, 90)
    answer = _assistant(f"{a + b}", reasoning_content=f"{a} plus {b} makes {a + b}.")
    return {"messages": [_user(f"What is {a} + {b}?"), answer]}


def _multi(rng: random.Random) -> dict[str, Any]:
    messages = []
    for city, country, weather in rng.sample(_CITIES, rng.randrange(2, 5)):
        messages += [
            _user(f"And {city}?"),
            _assistant(f"{city} lies in {country}; there is {weather}.\n\n- {city}\n- {country}"),
        ]
    return {"messages": messages}


def _tools(rng: random.Random) -> dict[str, Any]:
    city, _, weather = rng.choice(_CITIES)
    arguments: Any = {"city": city, "days": rng.randrange(1, 5)}
    if rng.random() < 0.5:
        arguments = json.dumps(arguments, ensure_ascii=False)
    call = {"type": "function", "function": {"name": "get_weather", "arguments": arguments}}
    return {
        "tools": [_TOOL],
        "messages": [
            _user(f"What is the weather in {city}?"),
            _assistant("", reasoning_content="I need the tool.", tool_calls=[call]),
            {"role": "tool", "content": json.dumps({"weather": weather})},
            _assistant(f"There is {weather} in {city}.", reasoning_content="It came back."),
        ],
    }


def _sums(rng: random.Random) -> dict[str, Any]:
    numbers = [rng.randrange(1, 50) for _ in range(rng.randrange(3, 7))]
    code = f"```python\nprint(sum({numbers}))  # {sum(numbers)}\n```"
    return {"messages": [_user(f"Add {numbers} in Python."), _assistant(code)]}
