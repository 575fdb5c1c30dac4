"""Token ids of rows with media against transformers' processor, and what is refused of them.

The tokenizer, the processor files and the chat templates are the real ones.
"""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.e2e_kit import figure
from support.layouts import image, tensors, video
from tokenizers import Tokenizer
from transformers import (
    PreTrainedTokenizerFast,
    Qwen3_5Config,
    Qwen3_5Model,
    Qwen3VLProcessor,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor
from transformers.video_utils import VideoMetadata

from qcore.api.media import RowError
from qcore.api.records import Severity
from qcore.checkpoint.chat_template import Template
from qcore.data.rendering.pieces import normalized
from qcore_multimodal.media import ProcessedMedium
from qcore_multimodal.placeholders import CONTROL, END, IMAGE, START, VIDEO, expand, token_findings
from qcore_multimodal.positions import place

FOLDERS = {
    "3.5 think": "qwen3.5/Qwen3.5-9B",
    "3.5 no think": "qwen3.5/Qwen3.5-0.8B",
    "3.6": "qwen3.6/Qwen3.6-27B",
}
EACH = 34  #: samples per template: 102


class Processor(Qwen3VLProcessor):
    """Without the check of its parts' classes, which looks for torchvision."""

    def check_argument_for_proper_class(self, *_: Any) -> None:
        pass


def settings(path: Path) -> dict[str, Any]:
    read = json.loads(path.read_text(encoding="utf-8"))
    return {key: value for key, value in read.items() if not key.endswith(("_class", "_type"))}


@pytest.fixture(scope="module")
def processor(shared: Path) -> Processor:
    skus = shared / "skus"
    return Processor(
        Qwen2VLImageProcessorPil(**settings(skus / "processor/preprocessor_config.json")),
        PreTrainedTokenizerFast(tokenizer_file=str(skus / "tokenizer/tokenizer.json")),
        Qwen3VLVideoProcessor(**settings(skus / "processor/video_preprocessor_config.json")),
    )


@pytest.fixture(scope="module")
def tokenizer(shared: Path) -> Tokenizer:
    return Tokenizer.from_file(str(shared / "skus/tokenizer/tokenizer.json"))


@pytest.fixture(scope="module")
def templates(shared: Path) -> Iterator[dict[str, Template]]:
    found = {
        name: Template(
            (shared / "skus" / folder / "chat_template.jinja").read_text(encoding="utf-8"), folder
        )
        for name, folder in FOLDERS.items()
    }
    yield found
    for template in found.values():
        template.close()


# -- samples

WORDS = [
    "what", " is", " here?", "\n\n", "<1.5 seconds>", " naïve", " 図形", " 🟥", "é", " x=3;", "  ",
    " seconds>", " <", "|>", " 0.2",
]  # fmt: skip


@dataclass
class Sample:
    """A conversation and its media in order; every eighth has none."""

    choice: tuple[str, ...] = ("text", "image", "image", "video")
    messages: list[dict[str, Any]] = field(default_factory=list)
    images: list[Image.Image] = field(default_factory=list)
    videos: list[np.ndarray] = field(default_factory=list)
    metadata: list[VideoMetadata] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)

    @staticmethod
    def of(seed: int) -> Sample:
        made, draw = Sample(), random.Random(seed)
        if seed % 8 == 0:
            made.choice = ("text",)
        if draw.random() < 0.3:
            made.messages.append({"role": "system", "content": words(draw)})
        for turn in range(draw.randint(1, 3)):
            made.messages.append({"role": "user", "content": made.parts(draw, first=turn == 0)})
            if draw.random() < 0.3:
                call = {"function": {"name": "look", "arguments": {"at": 3}}}
                made.messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
                made.messages.append({"role": "tool", "content": made.parts(draw)})
            answer: dict[str, Any] = {"role": "assistant", "content": words(draw)}
            if draw.random() < 0.4:
                answer["reasoning_content"] = words(draw)
            made.messages.append(answer)
        return made

    def parts(self, draw: random.Random, first: bool = False) -> list[dict[str, Any]]:
        """A user's content: text and media in any order; text at least in the first turn."""
        found = [self.part(draw) for _ in range(draw.randint(0, 4))]
        if first or not found:
            text = {"type": "text", "text": f"Q{words(draw)}"}
            found.insert(draw.randint(0, len(found)), text)
        return found

    def part(self, draw: random.Random) -> dict[str, Any]:
        kind = draw.choice(self.choice)
        if kind == "text":
            return {"type": "text", "text": words(draw)}
        self.kinds.append(kind)
        if kind == "image":
            self.images.append(Image.new("RGB", (draw.randint(1, 24) * 17, draw.randint(3, 400))))
            return {"type": "image", "image": f"{len(self.kinds)}.png"}
        frames, every = draw.randint(1, 9), draw.randint(1, 40)
        size = (draw.randint(1, 4) * 32, draw.randint(1, 4) * 32)
        self.videos.append(np.zeros((frames, 3, *size), np.uint8))
        self.metadata.append(
            VideoMetadata(
                total_num_frames=frames * every,
                fps=draw.choice([1, 2, 23.976, 25.0, 29.97, 60.0]),
                frames_indices=[n * every for n in range(frames)],
            )
        )
        return {"type": "video", "video": f"{len(self.kinds)}.mp4"}

    def reference(self, processor: Processor, text: str) -> Any:
        """What the processor makes of the rendered text and the media."""
        video_settings = {
            "video_metadata": [VideoMetadata(**vars(one)) for one in self.metadata],
            "do_sample_frames": False,
            # Steps that need torchvision and change no grid.
            "do_resize": False, "do_normalize": False, "do_convert_rgb": False,
            "cap_pixels_per_frame": False,
        }  # fmt: skip
        videos = {"videos": self.videos, "videos_kwargs": video_settings} if self.videos else {}
        return processor(text=[text], images=self.images or None, **videos)

    def media(self, made: Any) -> list[ProcessedMedium]:
        """As a reader would give them: grids are the processor's, times are worked out here."""
        images = iter(made.get("image_grid_thw", ()))
        clips = iter(zip(made.get("video_grid_thw", ()), self.metadata, strict=True))
        found = []
        for kind in self.kinds:
            times: tuple[float, ...] = ()
            if kind == "image":
                grid = next(images)
            else:
                grid, about = next(clips)
                at = [n / about.fps for n in about.frames_indices]
                at += at[-1:] * (len(at) % 2)
                times = tuple((a + b) / 2 for a, b in zip(at[::2], at[1::2], strict=True))
            t, h, w = (int(number) for number in grid)
            found.append(
                ProcessedMedium(kind=kind, digest="", grid=(t, h, w), merge=2, timestamps=times)
            )
        return found


def words(draw: random.Random) -> str:
    return "".join(draw.choice(WORDS) for _ in range(draw.randint(1, 12)))


# -- equal ids


@functools.cache
def whole_model() -> Any:
    with torch.device("meta"):
        return Qwen3_5Model(
            Qwen3_5Config(
                text_config={"num_hidden_layers": 1, "layer_types": ["full_attention"]},
                vision_config={"depth": 1},
            )
        )


@pytest.mark.parametrize("name", FOLDERS)
def test_ids_and_positions(
    name: str, processor: Processor, tokenizer: Tokenizer, templates: dict[str, Template]
) -> None:
    template = templates[name]
    tokens = {token: tokenizer.token_to_id(token) for token in CONTROL}
    counts = {"image": 0, "video": 0, "text alone": 0}
    for seed in range(EACH):
        sample = Sample.of(100 * list(FOLDERS).index(name) + seed)
        theirs = processor.apply_chat_template(
            sample.messages, chat_template=template.text, tokenize=False
        )
        made = sample.reference(processor, theirs)
        media = sample.media(made)
        text = expand(template.render(sample.messages), media)
        ids = tokenizer.encode(normalized(text, tokenizer), add_special_tokens=False).ids
        assert ids == list(made["input_ids"][0]), seed
        positions, _ = whole_model().get_rope_index(
            torch.tensor([ids]),
            torch.tensor(np.array(made["mm_token_type_ids"])),
            image_grid_thw=made.get("image_grid_thw"),
            video_grid_thw=made.get("video_grid_thw"),
        )
        assert torch.equal(tensors(place(ids, media, tokens).positions), positions[:, 0]), seed
        for kind in sample.kinds or ["text alone"]:
            counts[kind] += 1
    figure(f"{name}: {EACH} samples, {counts}")
    assert min(counts.values()) >= 2


def test_a_video_by_hand() -> None:
    text = f"a{START}{VIDEO}{END}b{START}{IMAGE}{END}"
    media = [video(5, 1, 2), image(2, 1)]
    assert expand(text, media) == (
        "a<|vision_start|>"
        "<0.2 seconds><|vision_start|><|video_pad|><|video_pad|><|vision_end|>"
        "<1.2 seconds><|vision_start|><|video_pad|><|video_pad|><|vision_end|>"
        "<2.0 seconds><|vision_start|><|video_pad|><|video_pad|><|vision_end|>"
        "<|vision_end|>b<|vision_start|><|image_pad|><|image_pad|><|vision_end|>"
    )


def test_text_alone_stays() -> None:
    text = "a\nb \\1 <|im_end|> <0.2 seconds>\n"
    assert expand(text, []) == text


def test_control_is_what_the_tokenizer_has(tokenizer: Tokenizer) -> None:
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    assert set(CONTROL) == {t for t in added if any(k in t for k in ("vision", "image", "video"))}


# -- what is refused

PIC, CLIP = image(2, 2), video(2, 1, 1)
BAD: dict[str, tuple[str, list[ProcessedMedium], str, str, str]] = {
    "dropped": (f"{IMAGE}", [PIC, PIC], "050", "1 of image and 0", "2 of image and 0 of video"),
    "printed twice": (f"{IMAGE} {IMAGE}", [PIC], "050", "2 of image", "1 of image"),
    "all dropped": ("text", [CLIP], "050", "0 of image and 0", "0 of image and 1 of video"),
    "of no medium": (f"text {VIDEO}", [], "050", "0 of image and 1", "0 of image and 0 of video"),
    "another order": (f"{IMAGE} {VIDEO}", [CLIP, PIC], "051", "image", "video"),
    "another kind": (f"{IMAGE} {IMAGE}", [PIC, CLIP], "051", "image", "video"),
}


@pytest.mark.parametrize("case", BAD)
def test_refused(case: str) -> None:
    text, media, code, found, expected = BAD[case]
    with pytest.raises(RowError) as caught:
        expand(text, media)
    error = caught.value.error(Path("rows.jsonl"), 7)
    assert error.code == f"QC-VISION-{code}"
    assert str(error.found).startswith(found)
    assert str(error.expected).startswith(expected)
    assert str(error).startswith("rows.jsonl: line 7: ")
    assert "\n" not in str(error)
    assert error.fix


def test_the_kind_that_differs_is_told_by_its_number() -> None:
    with pytest.raises(RowError, match="kind of placeholder for medium 2"):
        expand(f"{IMAGE} {IMAGE}", [PIC, CLIP])


@pytest.mark.parametrize("name", FOLDERS)
def test_a_medium_in_reasoning_that_the_template_drops(
    name: str, templates: dict[str, Template]
) -> None:
    thought = [
        {"type": "text", "text": "<think>\nlike "},
        {"type": "image", "image": "a.png"},
        {"type": "text", "text": "\n</think>\n\nyes"},
    ]
    messages = [
        {"role": "user", "content": "is it?"},
        {"role": "assistant", "content": thought},
        {"role": "user", "content": "sure?"},
        {"role": "assistant", "content": "yes"},
    ]
    with pytest.raises(RowError) as caught:
        expand(templates[name].render(messages), [PIC])
    assert caught.value.code == "QC-VISION-050"
    kept = templates[name].render(messages[:2])  # the last turn keeps its reasoning
    assert expand(kept, [PIC]).count(IMAGE) == PIC.tokens


def test_a_template_that_prints_a_medium_twice() -> None:
    twice = f"{{{{ '{START}{IMAGE}{END}' * 2 }}}}"
    with Template(twice, "twice") as template, pytest.raises(RowError) as caught:
        expand(template.render([{"role": "user", "content": "x"}]), [PIC])
    assert caught.value.found == "2 of image and 0 of video"


# -- config.json beside the tokenizer

IDS = {START: 5, END: 6, IMAGE: 7, VIDEO: 8}
NAMED = {"image_token_id": 7, "video_token_id": 8}


def test_real_configs_and_tokenizer_agree(shared: Path, tokenizer: Tokenizer) -> None:
    found = sorted((shared / "skus").glob("qwen3.*/*/config.json"))
    assert len(found) >= 8
    ids = tokenizer.get_vocab(with_added_tokens=True)
    for path in found:
        config = json.loads(path.read_text(encoding="utf-8"))
        assert not list(token_findings(config, ids)), path


def test_a_config_that_names_none_means_what_transformers_takes() -> None:
    usual = Qwen3_5Config()
    ids = IDS | {IMAGE: usual.image_token_id, VIDEO: usual.video_token_id}
    assert list(token_findings({}, ids)) == []
    first, second = token_findings({}, IDS)
    assert (first.field, second.field) == ("image_token_id", "video_token_id")
    assert first.found == "none, which means 248056"


@pytest.mark.parametrize(
    ("change", "fields"),
    [
        ({"image_token_id": 8}, ["image_token_id"]),
        ({"video_token_id": 7}, ["video_token_id"]),
        ({"image_token_id": 8, "video_token_id": 7}, ["image_token_id", "video_token_id"]),
        ({"image_token_id": None}, ["image_token_id"]),
        ({"image_token_id": "7"}, ["image_token_id"]),
    ],
)
def test_ids_that_differ(change: dict[str, Any], fields: list[str]) -> None:
    assert list(token_findings(NAMED, IDS)) == []
    found = list(token_findings(NAMED | change, IDS))
    assert [one.field for one in found] == fields
    assert {one.code for one in found} == {"QC-VISION-053"}
    assert {one.severity for one in found} == {Severity.ERROR}
    assert {one.file for one in found} == {"config.json"}
    assert found[0].found == repr(change[fields[0]])


@pytest.mark.parametrize("token", IDS)
def test_a_tokenizer_without_the_token(token: str) -> None:
    ids = {key: value for key, value in IDS.items() if key != token}
    (found,) = token_findings(NAMED, ids)
    assert (found.code, found.file, found.field) == ("QC-VISION-053", "tokenizer.json", repr(token))
