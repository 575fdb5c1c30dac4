"""How tokens are chosen: options of the user over generation_config.json, as transformers reads it.

This file decides which source wins and which values are valid. It imports no torch: `processors`
changes logits by these values, and `sampling` draws the token.

Order: an option of the user; the key of generation_config.json; greedy decoding. In the file,
``do_sample: true`` makes sampling the default, with the temperature 1.0 and the top_k 50 that
transformers uses for a file without these keys. Penalties also act on greedy decoding.
``max_new_tokens`` is not read: the option has a default of its own.

Codes: ``QC-GENERATE-003`` an option out of range, ``-007`` a value of the file that cannot be used,
``-008`` an option that only sampling uses, with greedy decoding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final, TypedDict, cast

from ..errors import InputError, UsageError

FILE: Final = "generation_config.json"
#: Values that act on sampling alone.
_WARPERS: Final = ("temperature", "top_k", "top_p", "min_p")
#: Allowed values: (lower bound, upper bound, whether the lower bound is allowed, in words).
_RANGES: Final[Mapping[str, tuple[float, float, bool, str]]] = {
    "temperature": (0.01, 100, True, "0 for greedy, or 0.01 to 100"),
    "top_k": (0, math.inf, True, "an integer from 0; 0 keeps all tokens"),
    "top_p": (0, 1, False, "above 0, at most 1; 1 keeps all tokens"),
    "min_p": (0, 1, True, "0 to 1; 0 keeps all tokens"),
    "repetition_penalty": (0, math.inf, False, "above 0; 1 changes nothing"),
    "presence_penalty": (-2, 2, True, "-2 to 2; 0 changes nothing"),
    "frequency_penalty": (-2, 2, True, "-2 to 2; 0 changes nothing"),
}
#: A usual value of each, for the fix of an error.
_EXAMPLES: Final = {
    "temperature": 0.7, "top_k": 50, "top_p": 0.95, "min_p": 0.05, "repetition_penalty": 1.1,
    "presence_penalty": 0.5, "frequency_penalty": 0.5,
}  # fmt: skip
#: Keys that change what transformers generates and that `generate` does not implement, with the
#: values that change nothing.
_UNSUPPORTED: Final[Mapping[str, tuple[Any, ...]]] = {
    "num_beams": (1,), "typical_p": (1, 1.0), "top_h": (), "epsilon_cutoff": (0, 0.0),
    "eta_cutoff": (0, 0.0), "no_repeat_ngram_size": (0,), "bad_words_ids": ([],),
    "sequence_bias": ({}, []), "min_length": (0,), "min_new_tokens": (0,),
    "suppress_tokens": ([],), "begin_suppress_tokens": ([],), "forced_bos_token_id": (),
    "forced_eos_token_id": (), "exponential_decay_length_penalty": (), "guidance_scale": (1, 1.0),
    "watermarking_config": (), "penalty_alpha": (0, 0.0), "dola_layers": (), "stop_strings": ([],),
    "max_time": (), "token_healing": (False,),
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the next token follows from logits; names are those of transformers and vLLM.

    Attributes:
        temperature: 0 is greedy decoding; the other values that sampling uses are then unused.
        top_k: tokens that may be drawn, the most likely ones; 0 keeps all.
        top_p: the smallest set of tokens whose probability reaches this may be drawn.
        min_p: least probability of a token, as a share of that of the most likely token.
        repetition_penalty: divides positive and multiplies negative logits of the tokens of the
            prompt and of the answer.
        presence_penalty: subtracted from the logits of tokens of the answer.
        frequency_penalty: subtracted once for each occurrence of the token in the answer.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0

    @property
    def penalizes(self) -> bool:
        """Whether a token's logit depends on the tokens before it."""
        penalties = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty)
        return penalties != (1.0, 0.0, 0.0)


class SamplingOptions(TypedDict, total=False):
    """Fields of `Sampling` as keyword arguments; ``None`` or absent: see `choose_sampling`."""

    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None


NAMES: Final = tuple(field.name for field in fields(Sampling))


def choose_sampling(
    config: Mapping[str, Any], options: SamplingOptions, folder: Path
) -> tuple[Sampling, list[str]]:
    """How tokens are chosen, and lines that state what the file decided.

    Args:
        config: the content of generation_config.json; empty without one.
        options: values of the user by name (`NAMES`); ``None`` where the user set none.
        folder: the model, for errors.

    Raises:
        TypeError: an option that `Sampling` does not have.
        UsageError: ``QC-GENERATE-003``, ``-008``.
        InputError: ``QC-GENERATE-007``.
    """
    by_name = cast(Mapping[str, float | None], options)
    if unknown := by_name.keys() - {*NAMES}:
        raise TypeError(f"unexpected keyword argument {min(unknown)!r}")
    asked = {name: _option(name, value) for name, value in by_name.items() if value is not None}
    there = {name: config[name] for name in NAMES if config.get(name) is not None}
    samples = _do_sample(config, folder)
    if samples:
        there = {"temperature": 1.0, "top_k": 50} | there
        if "temperature" not in asked:
            _of_file("temperature", there["temperature"], folder)  # 0 is not greedy there
    elif "temperature" not in asked:
        there.pop("temperature", None)  # greedy, as transformers without do_sample
    values: dict[str, float] = {"temperature": 0.0} | there | asked
    if values["temperature"] == 0:
        _refuse_unused(asked)
        values = {name: v for name, v in values.items() if name not in _WARPERS}
    taken = [name for name in NAMES if name in values and name not in asked and name in there]
    checked = {name: _of_file(name, values[name], folder) for name in taken}
    sampling = Sampling(**(values | checked))  # type: ignore[arg-type]
    return sampling, [*_lines(sampling, taken, samples and "temperature" not in asked),
                      *_ignored(config)]  # fmt: skip


def stop_ids(config: Mapping[str, Any], folder: Path) -> frozenset[int]:
    """The ids of ``eos_token_id``, at which transformers ends an answer.

    Raises:
        InputError: ``QC-GENERATE-007``.
    """
    value = config.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in ids):
        raise _wrong("eos_token_id", value, "a token id, or a list of token ids", folder)
    return frozenset(ids)


def _do_sample(config: Mapping[str, Any], folder: Path) -> bool:
    value = config.get("do_sample")
    if value is not None and not isinstance(value, bool):
        raise _wrong("do_sample", value, "true or false", folder)
    return value is True


def _option(name: str, value: float) -> float:
    if name == "temperature" and value == 0:
        return value
    if not _valid(name, value):
        what = "invalid temperature" if name == "temperature" else "invalid value"
        raise UsageError(
            "QC-GENERATE-003", what, field=_flag(name), found=value, expected=_RANGES[name][3],
            fix=f"pass {_flag(name)} {_EXAMPLES[name]}, or leave it out",
        )  # fmt: skip
    return value


def _of_file(name: str, value: Any, folder: Path) -> float:
    if not _valid(name, value):
        raise _wrong(name, value, _RANGES[name][3], folder)
    number: float = value
    return number


def _valid(name: str, value: Any) -> bool:
    low, high, closed, _ = _RANGES[name]
    kinds = int if name == "top_k" else int | float
    if isinstance(value, bool) or not isinstance(value, kinds) or not math.isfinite(value):
        return False
    return low < value <= high or (closed and value == low)


def _wrong(name: str, value: Any, expected: str, folder: Path) -> InputError:
    fix = f"correct {FILE}"
    if name in NAMES:
        fix = f"pass {_flag(name)}, or {fix}"
    return InputError(
        "QC-GENERATE-007", "cannot be used", file=folder / FILE, field=name, found=repr(value),
        expected=expected, fix=fix,
    )  # fmt: skip


def _refuse_unused(asked: Mapping[str, float]) -> None:
    """Refuse options of sampling with greedy decoding, which would ignore them."""
    for name in _WARPERS[1:]:
        if name in asked:
            raise UsageError(
                "QC-GENERATE-008",
                "has no effect on greedy decoding",
                field=_flag(name),
                found=asked[name],
                fix="pass --temperature, such as 1, or leave it out",
            )


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _lines(sampling: Sampling, taken: list[str], samples: bool) -> list[str]:
    """What was taken from the file, in one line."""
    if not taken:
        return []
    values = ", ".join(f"{name} {getattr(sampling, name):g}" for name in taken)
    if samples:
        return [f"sampling as {FILE} says: {values} (--temperature 0 for greedy decoding)"]
    return [f"from {FILE}: {values}"]


def _ignored(config: Mapping[str, Any]) -> list[str]:
    ignored = [
        name
        for name, neutral in _UNSUPPORTED.items()
        if (value := config.get(name)) is not None and value not in neutral
    ]
    if not ignored:
        return []
    return [f"warning: {FILE}: not supported here, and ignored: {', '.join(ignored)}"]
