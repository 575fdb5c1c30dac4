"""generation_config.json and options: the values that apply; logits, compared with transformers."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from support.e2e_kit import tiny_folder
from support.sinks import Heard
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from qcore.data.rendering.masking import highest_id
from qcore.errors import InputError, UsageError
from qcore.inference.generate import Generator
from qcore.inference.generation_config import NAMES, Sampling, choose_sampling, stop_ids
from qcore.inference.processors import Penalties, warp

HERE = Path("model")
CPU = torch.device("cpu")


def chosen(config: Mapping[str, Any], **options: Any) -> Sampling:
    return choose_sampling(config, options, HERE)[0]


# -- which values apply


@pytest.mark.parametrize(
    ("config", "options", "expected"),
    [
        ({}, {}, {}),
        ({"do_sample": False, "temperature": 0.6, "top_p": 0.9}, {}, {}),
        ({"temperature": 0.6, "top_p": 0.9}, {}, {}),
        # transformers' defaults where the file samples and lacks the key
        ({"do_sample": True}, {}, {"temperature": 1.0, "top_k": 50}),
        (
            {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.1},
            {},
            {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.1},
        ),
        ({"do_sample": True, "top_k": 0}, {}, {"temperature": 1.0}),
        ({"do_sample": True, "top_p": 0.9}, {"temperature": 0}, {}),
        (
            {"do_sample": True, "top_p": 0.9, "top_k": 7},
            {"temperature": 0.5, "top_p": 1.0},
            {"temperature": 0.5, "top_k": 7},
        ),
        ({}, {"temperature": 0.7}, {"temperature": 0.7}),
        ({"top_p": 0.8}, {"temperature": 0.7}, {"temperature": 0.7, "top_p": 0.8}),
        ({"repetition_penalty": 1.2}, {}, {"repetition_penalty": 1.2}),
        (
            {"repetition_penalty": 1.2},
            {"repetition_penalty": 1.0, "presence_penalty": 1.5},
            {"presence_penalty": 1.5},
        ),
    ],
)
def test_an_option_wins_over_the_file_and_the_file_over_greedy(
    config: dict[str, Any], options: dict[str, Any], expected: dict[str, Any]
) -> None:
    assert chosen(config, **options) == Sampling(**expected)


def test_what_the_file_decided_is_stated_in_one_line() -> None:
    config = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95}
    assert choose_sampling(config, {}, HERE)[1] == [
        "sampling as generation_config.json says: temperature 0.6, top_k 20, top_p 0.95 "
        "(--temperature 0 for greedy decoding)"
    ]
    assert choose_sampling(config, {"temperature": 1, "top_k": 5}, HERE)[1] == [
        "from generation_config.json: top_p 0.95"
    ]
    assert choose_sampling({"repetition_penalty": 1.1}, {}, HERE)[1] == [
        "from generation_config.json: repetition_penalty 1.1"
    ]
    assert choose_sampling({"eos_token_id": 3, "do_sample": False}, {}, HERE)[1] == []


def test_keys_that_are_not_supported_are_named() -> None:
    config = {"num_beams": 4, "typical_p": 1.0, "no_repeat_ngram_size": 3, "min_length": 0}
    (line,) = choose_sampling(config, {}, HERE)[1]
    assert line.startswith("warning: generation_config.json: not supported here")
    assert line.endswith("num_beams, no_repeat_ngram_size")


def test_every_key_of_transformers_that_changes_tokens_is_read_or_named() -> None:
    """A new key of GenerationConfig must be looked at; the golden list is transformers' own."""
    from qcore.inference.generation_config import _UNSUPPORTED, NAMES

    harmless = {
        # lengths, of which `generate` has its own option, and ends, which `stop_ids` reads
        "max_length", "max_new_tokens", "eos_token_id", "do_sample",
        "early_stopping", "length_penalty", "diversity_penalty", "num_beam_groups",
        # caches, outputs and speed
        "use_cache", "cache_implementation", "cache_config", "max_cache_len",
        "num_return_sequences", "output_attentions", "output_hidden_states", "output_scores",
        "output_logits",
        "return_dict_in_generate", "compile_config", "disable_compile", "prefill_chunk_size",
        # tokens and encoders
        "pad_token_id", "bos_token_id", "encoder_no_repeat_ngram_size", "decoder_start_token_id",
        "encoder_repetition_penalty", "low_memory", "force_words_ids", "constraints",
        "remove_invalid_values", "renormalize_logits", "transformers_version",
        # assistants
        "is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule",
        "assistant_confidence_threshold", "prompt_lookup_num_tokens", "max_matching_ngram_size",
        "assistant_early_exit", "assistant_lookbehind", "target_lookbehind", "use_mtp",
        "assistant_ensemble_weight", "continuous_batching_config", "speculation_type",
    }  # fmt: skip
    known = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    assert known - harmless - {*_UNSUPPORTED} <= {*NAMES}


@pytest.mark.parametrize(
    ("config", "field"),
    [
        ({"do_sample": "yes"}, "do_sample"),
        ({"do_sample": True, "top_p": 2}, "top_p"),
        ({"do_sample": True, "top_k": 2.5}, "top_k"),
        ({"do_sample": True, "temperature": 0}, "temperature"),
        ({"do_sample": True, "min_p": True}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"repetition_penalty": "1.1"}, "repetition_penalty"),
    ],
)
def test_a_value_of_the_file_that_cannot_be_used(config: dict[str, Any], field: str) -> None:
    with pytest.raises(InputError) as caught:
        chosen(config)
    assert (caught.value.code, caught.value.field) == ("QC-GENERATE-007", field)
    if field != "do_sample":
        # What the fix proposes works.
        assert chosen(config, **{field: 1}) is not None


@pytest.mark.parametrize("value", [math.nan, math.inf, -3])
@pytest.mark.parametrize("name", NAMES)
def test_an_option_out_of_range_names_a_value_that_works(name: str, value: float) -> None:
    with pytest.raises(UsageError) as caught:
        chosen({}, **{"temperature": 1.0, name: value})
    assert (caught.value.code, caught.value.field) == (
        "QC-GENERATE-003", "--" + name.replace("_", "-"),
    )  # fmt: skip
    good = re.search(r"pass --[a-z-]+ ([0-9.]+)", str(caught.value.fix))
    assert good is not None
    number = float(good[1]) if "." in good[1] else int(good[1])
    assert getattr(chosen({}, **{"temperature": 1.0, name: number}), name) == number


@pytest.mark.parametrize("name", ["top_p", "top_k", "min_p"])
def test_an_option_of_sampling_with_greedy_decoding(name: str) -> None:
    with pytest.raises(UsageError) as caught:
        chosen({}, **{name: 1})
    assert caught.value.code == "QC-GENERATE-008"
    assert caught.value.field == "--" + name.replace("_", "-")
    assert chosen({}, temperature=1, **{name: 1}).temperature == 1


@pytest.mark.parametrize(
    ("value", "expected"), [(None, set()), (5, {5}), ([5, 7], {5, 7}), ([], set())]
)
def test_stop_ids(value: Any, expected: set[int]) -> None:
    assert stop_ids({"eos_token_id": value}, HERE) == expected


@pytest.mark.parametrize("value", ["</s>", [5, None], -1, True])
def test_stop_ids_that_are_not_ids(value: Any) -> None:
    with pytest.raises(InputError) as caught:
        stop_ids({"eos_token_id": value}, HERE)
    assert caught.value.code == "QC-GENERATE-007"


# -- logits, compared with transformers' processors


def logits_of(seed: int, size: int = 101) -> Tensor:
    """Random logits; every other seed has many equal ones."""
    values = torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 3
    return (values * 2).round() / 2 if seed % 2 else values


def reference(sampling: Sampling, prompt: list[int], logits: Tensor) -> Tensor:
    """transformers' list, in the order of its ``_get_logits_processor``."""
    processors = LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(float(sampling.repetition_penalty)))
    processors.append(TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.top_k:
        processors.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        processors.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        processors.append(MinPLogitsWarper(sampling.min_p))
    out: Tensor = processors(torch.tensor([prompt]), logits[None].clone())[0]
    return out


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": 0.6},
        {"top_k": 1},
        {"top_k": 20},
        {"top_k": 500},
        {"top_p": 0.9},
        {"top_p": 1e-6},
        {"min_p": 0.05},
        {"min_p": 1.0},
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 0.7},
        {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.02, "repetition_penalty": 1.1},
    ],
    ids=str,
)
def test_logits_are_those_of_transformers(values: dict[str, Any]) -> None:
    sampling = Sampling(**({"temperature": 1.0} | values))
    for seed in range(8):
        logits, prompt = logits_of(seed), [3, 3, 50, 100, 7]
        ours = logits
        if sampling.penalizes:
            penalties = Penalties(sampling, prompt[:-2], len(logits), CPU)
            for token in prompt[-2:]:
                penalties.add(torch.tensor([token]))
            ours = penalties(logits)
        assert torch.equal(warp(ours, sampling), reference(sampling, prompt, logits)), seed


def test_presence_and_frequency_penalties_count_the_answer_alone() -> None:
    """By the formula of the OpenAI API: ``logit - count * frequency - (count > 0) * presence``."""
    sampling = Sampling(presence_penalty=1.5, frequency_penalty=0.25)
    logits, answer = logits_of(0), [4, 9, 4, 4]
    penalties = Penalties(sampling, [9, 11], len(logits), CPU)
    for token in answer:
        penalties.add(torch.tensor([token]))
    expected = [
        float(value) - answer.count(n) * 0.25 - (1.5 if n in answer else 0)
        for n, value in enumerate(logits)
    ]
    assert torch.allclose(penalties(logits), torch.tensor(expected))


# -- whole answers


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shutil.copytree(tiny_folder(), tmp_path_factory.mktemp("model") / "m")


def generator_of(folder: Path, heard: Heard | None = None, **config: Any) -> Generator:
    (folder / "generation_config.json").write_text(json.dumps(config))
    reporter = None if heard is None else heard.reporter
    return Generator(str(folder), device="cpu", dtype="fp32", reporter=reporter)


def test_the_folder_decides_and_a_seed_reproduces(folder: Path) -> None:
    heard = Heard()
    made = generator_of(folder, heard, do_sample=True, temperature=5.0, top_k=0)
    answers = [made.prompt("Hi", max_new_tokens=6, seed=seed).text for seed in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2]
    assert sum("sampling as generation_config.json says" in line for line in heard.notes) == 3
    greedy = made.prompt("Hi", max_new_tokens=6, temperature=0).text
    assert greedy == made.prompt("Hi", max_new_tokens=6, temperature=0, seed=9).text
    # The most likely token alone: greedy, whatever the seed.
    assert made.prompt("Hi", max_new_tokens=6, top_k=1, seed=5).text == greedy


def test_an_answer_ends_at_the_eos_of_the_file(folder: Path) -> None:
    plain = generator_of(folder)
    ids = plain.tokenizer.encode("Name a city in Peru.", add_special_tokens=False).ids
    new, _ = plain.decode(list(ids), 6, Sampling(), 0)
    ended = generator_of(folder, eos_token_id=[new[2], 0]).decode(list(ids), 6, Sampling(), 0)
    assert ended == (new[: new.index(new[2]) + 1], True)


def test_a_repetition_penalty_acts_on_greedy_decoding_as_in_transformers(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    made = generator_of(folder)
    ids = made.tokenizer.encode("Name a city in Peru.", add_special_tokens=False).ids
    new, _ = made.decode(list(ids), 16, Sampling(repetition_penalty=0.1), 0)
    stock = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    out = stock.generate(
        input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), do_sample=False,
        max_new_tokens=16, repetition_penalty=0.1,
        suppress_tokens=[*range(highest_id(made.tokenizer) + 1, stock.config.vocab_size)],
    )  # fmt: skip
    assert out[0, len(ids) :].tolist()[: len(new)] == new
    assert new != made.decode(list(ids), 16, Sampling(), 0)[0]


def test_an_unknown_option_of_prompt_is_an_error(folder: Path) -> None:
    with pytest.raises(TypeError, match="top_q"):
        generator_of(folder).prompt("Hi", top_q=0.5)
