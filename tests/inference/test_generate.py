"""Generation: the same tokens as a full forward, and a refusal where numbers are not finite."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.e2e_kit import tiny_folder
from support.sinks import Heard

from qcore.api.blocks import Packed
from qcore.errors import NumericError
from qcore.inference.generate import Generator
from qcore.inference.generation_config import Sampling


@pytest.fixture(scope="module")
def generator() -> Generator:
    return Generator(str(tiny_folder()), device="cpu", dtype="fp32")


def test_cached_decoding_gives_the_tokens_of_full_forwards(generator: Generator) -> None:
    ids = generator.tokenizer.encode("Name a city in Peru.", add_special_tokens=False).ids
    new, _ = generator.decode(list(ids), 8, Sampling(), 0)
    known = list(ids)
    for token in new:
        with torch.no_grad():
            logits = generator.model.logits(Packed.of([torch.tensor(known)]))
        assert int(logits[-1, : len(generator.tokenizer.get_vocab())].argmax()) == token
        known.append(token)


def test_tokens_are_drawn_in_inference_mode(
    generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What draws a token is no part of a graph, whoever called."""
    seen: list[bool] = []
    draw = torch.multinomial

    def watched(*args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append(torch.is_inference_mode_enabled())
        return draw(*args, **kwargs)

    monkeypatch.setattr(torch, "multinomial", watched)
    generator.prompt("Where is Oslo?", max_new_tokens=3, temperature=0.8)
    assert seen
    assert all(seen)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_numbers_that_are_not_finite_are_an_error(temperature: float, tmp_path: Path) -> None:
    broken = Generator(str(tiny_folder()), device="cpu", dtype="fp32")
    with torch.no_grad():
        broken.model.head.view(-1)[0] = float("nan")
    with pytest.raises(NumericError) as caught:
        broken.prompt("Hi", max_new_tokens=3, temperature=temperature)
    assert caught.value.code == "QC-GENERATE-002"


def test_more_tokens_than_positions_are_a_warning(
    generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard = Heard()
    monkeypatch.setattr(generator, "reporter", heard.reporter)
    monkeypatch.setattr(generator, "decode", lambda *arguments: ([], True))
    prompt = generator.prompt("Hi", max_new_tokens=1).prompt_tokens
    generator.prompt("Hi", max_new_tokens=4096 - prompt)
    assert heard.notes == []
    generator.prompt("Hi", max_new_tokens=4097 - prompt)
    (line,) = heard.notes
    assert line.startswith("warning: --max-new-tokens: exceeds the context length")
    assert f"found {prompt} tokens of the prompt + {4097 - prompt} new ones" in line
    assert "at most 4096 (max_position_embeddings)" in line
