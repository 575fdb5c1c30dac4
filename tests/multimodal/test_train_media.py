"""Training on rows with media: packs, labels, frozen and trained towers, resume, runs of text."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw
from support.cli_kit import apart
from support.e2e_kit import CPU, random_b
from support.run_kit import SHORT, raw, start, stop_at
from support.tiers import fast

from qcore.adapter.targets import targets
from qcore.config.settings import Settings
from qcore.data.dataset import Dataset, dataset
from qcore.errors import InputError, Interrupted, UsageError
from qcore.inference.generate import Generator
from qcore.nn.load import load
from qcore.nn.model import Model
from qcore.nn.qlora.lora_layer import Lora
from qcore.plugins.resolve_model import Identified, identify
from qcore.training.collate import Batches, pack
from qcore.training.step import Loop
from qcore_multimodal.tiny import add_tower
from qcore_multimodal.tower import Tower
from qcore_qwen35.tiny import write

TEXT = ("attn", "gdn", "mlp")
ALL = (*TEXT, "vision", "merger")
RUN = SHORT | {"quantization": "none", "max_steps": 6, "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "tiny"
    write(folder)
    add_tower(folder)
    return folder


def drawn(path: Path, seed: int, width: int, height: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(256, (height, width, 3), dtype=torch.uint8, generator=generator)
    image = Image.fromarray(noise.numpy())
    ImageDraw.Draw(image).ellipse((8, 8, 40, 40), fill=(255, seed * 40 % 256, 0))
    image.save(path)


def said(parts: Any, answer: str) -> dict[str, Any]:
    user = {"role": "user", "content": parts}
    return {"messages": [user, {"role": "assistant", "content": answer}]}


def part(kind: str, name: str) -> dict[str, str]:
    return {"type": kind, kind: name}


def words(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text alone, one picture, two of other sizes with text between, a film, text alone."""
    folder = tmp_path_factory.mktemp("rows")
    for number, size in enumerate(((64, 64), (96, 40), (33, 130))):
        drawn(folder / f"{number}.png", number, *size)
    frames = []
    for number in range(5):
        drawn(folder / "frame.png", 7 + number, 64, 64)
        frames.append(Image.open(folder / "frame.png").convert("P"))
    frames[0].save(folder / "film.gif", save_all=True, append_images=frames[1:], duration=500)
    made = [
        said("Who are you?", "I am Ada."),
        said([part("image", "0.png"), words("What is this?")], "A red circle."),
        said([part("image", "1.png"), words("and"), part("image", "2.png")], "Two of them."),
        said([words("Look:"), part("video", "film.gif"), words("What moves?")], "Nothing."),
        said("Good night", "Sleep well."),
    ]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return path


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


class Seeing:
    """A model with adapters in float32, its rows, and packs of them."""

    def __init__(self, base: Path, rows: Path, groups: Sequence[str] = ALL) -> None:
        found = identify(str(base))
        assert found.modality is not None
        self.found: Identified = found.using(found.modality)
        checkpoint, layout = found.checkpoint, self.found.layout
        self.reader = found.modality.reader(checkpoint, lambda line: None)
        self.data: Dataset = dataset(rows, checkpoint, found.chat_format(), 512, reader=self.reader)
        chosen = targets(layout, groups, Lora(r=4, lora_alpha=8))
        self.model = Model(
            found.decision.architecture, checkpoint.config, layout, torch.float32, chosen,
            modality=found.modality,
        )  # fmt: skip
        load(self.model, layout, checkpoint, device=CPU, quantize=False)
        for name, module in self.model.adapters():
            module.reset_lora(name, 1, CPU)
        random_b(self.model, size=0.1)

    def loss(self, numbers: Sequence[int], recompute: str = "none") -> torch.Tensor:
        batches = Batches(self.model, CPU, self.reader)
        batch = batches.of([self.data.train[number] for number in numbers])
        return self.model.loss(batch, recompute=recompute)

    def gradients(self) -> dict[str, torch.Tensor]:
        found = {}
        for name, parameter in self.model.trainable():
            if parameter.grad is not None:
                found[name] = parameter.grad
                parameter.grad = None
        return found

    def loop(self, **settings: Any) -> Loop:
        chosen = Settings(**(RUN | {"target_groups": ALL} | settings))
        return Loop(self.model, self.data, chosen, CPU, "none", reader=self.reader)


# -- packs


@pytest.mark.parametrize(
    "numbers", fast([(1, 2), (0, 1, 2, 3, 4), (3, 0, 1), (4, 3)], (0, 1, 2, 3, 4)), ids=str
)
def test_a_pack_is_its_rows_alone(base: Path, rows: Path, numbers: tuple[int, ...]) -> None:
    seeing = Seeing(base, rows)
    together = seeing.loss(numbers)
    together.backward()
    packed = seeing.gradients()
    alone = torch.zeros(())
    for number in numbers:
        one = seeing.loss([number])
        one.backward()
        alone += one.detach()
    assert together.item() == pytest.approx(alone.item(), rel=2e-5)
    apart_ = seeing.gradients()
    assert packed.keys() == apart_.keys() == {name for name, _ in seeing.model.trainable()}
    for name, gradient in packed.items():
        scale = gradient.norm()
        assert scale > 0, name
        assert (apart_[name] - gradient).norm() <= 2e-4 * scale, name


def test_recompute_changes_nothing(base: Path, rows: Path) -> None:
    seeing = Seeing(base, rows)
    found = []
    for policy in ("none", "elementwise", "full"):
        loss = seeing.loss([0, 1, 2, 3], policy)
        loss.backward()
        found.append((loss.detach(), seeing.gradients()))
    for loss, gradients in found[1:]:
        assert torch.equal(loss, found[0][0])
        assert all(torch.equal(gradients[name], one) for name, one in found[0][1].items())


def test_nothing_of_media_is_trained(base: Path, rows: Path) -> None:
    seeing = Seeing(base, rows)
    tokenizer = seeing.found.checkpoint.path / "tokenizer.json"
    from tokenizers import Tokenizer

    ids = Tokenizer.from_file(str(tokenizer)).token_to_id
    media = {ids(token) for token in seeing.reader.control}
    for example in seeing.data.train:
        trained = [one for one in example.labels if one != -100]
        assert trained
        assert not media & set(trained)
        placed = example.placed
        assert (placed is None) is (not example.media)
        if placed is not None:
            assert all(example.labels[at] == -100 for at in placed.where)
            assert len(placed.where) == sum(medium.tokens for medium in example.media)
    assert seeing.data.summary()["media"] == {"image": 3, "video": 1}


def test_a_pack_of_text_has_one_axis(base: Path, rows: Path) -> None:
    data = Seeing(base, rows).data.train
    assert pack([data[0], data[4]]).positions.dim() == 1
    mixed = pack([data[0], data[1]])
    assert mixed.positions.shape == (3, len(data[0].ids) + len(data[1].ids))
    assert torch.equal(
        mixed.positions[:, : len(data[0].ids)], torch.arange(len(data[0].ids)).expand(3, -1)
    )


# -- towers


def test_a_trained_tower_that_sees_text_has_gradients_of_zero(base: Path, rows: Path) -> None:
    seeing = Seeing(base, rows)
    loop = seeing.loop(per_device_train_batch_size=1)
    loop._accumulate(replace(loop.shares.of(0), rows=[0], packs=[[0]], count=1, rounds=1))
    tower = {n: p for n, p in seeing.model.trainable() if n.startswith("model.visual.")}
    assert tower
    for name, parameter in tower.items():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name
    assert all(p.grad is not None and p.grad.isfinite().all() for p in loop.parameters)


@pytest.fixture
def embeds(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether autograd was on, of each time that a tower computed."""
    seen: list[bool] = []
    real = Tower.embed

    def embed(self: Tower, media: Any) -> torch.Tensor:
        seen.append(torch.is_grad_enabled())
        return real(self, media)

    monkeypatch.setattr(Tower, "embed", embed)
    return seen


def test_a_frozen_tower_computes_each_medium_once(
    base: Path, rows: Path, embeds: list[bool]
) -> None:
    losses = []
    for gigabytes in (4.0, 0.0):
        embeds.clear()
        seeing = Seeing(base, rows, TEXT)
        assert not seeing.model.trains_tower
        options = {"target_groups": TEXT, "media_cache_gb": gigabytes}
        loop = seeing.loop(per_device_train_batch_size=5, **options)
        losses.append([loop.step(step)["loss"] for step in range(3)])
        assert embeds == [False] * (4 if gigabytes else 3), "four media, or three steps"
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_cache_that_is_full_forgets_what_was_used_longest_ago(
    base: Path, rows: Path, embeds: list[bool]
) -> None:
    seeing = Seeing(base, rows, TEXT)
    row = seeing.data.train[2]
    one, two = (4 * 128 * medium.tokens for medium in row.media)
    batches = Batches(seeing.model, CPU, seeing.reader, keep=max(one, two))
    first = batches.of([row])
    again = batches.of([row])
    assert len(embeds) == 4, "only one of the two fits"
    assert first.media is not None
    assert again.media is not None
    assert torch.equal(first.media.features, again.media.features)


def test_a_trained_tower_is_not_cached(base: Path, rows: Path, embeds: list[bool]) -> None:
    loop = Seeing(base, rows).loop(per_device_train_batch_size=5)
    for step in range(2):
        loop.step(step)
    assert embeds == [True, True]


# -- the verb


@pytest.mark.slow
@pytest.mark.parametrize("groups", [TEXT, ALL], ids=["frozen", "trained"])
def test_a_stopped_run_goes_on_bit_for_bit(
    base: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, groups: Sequence[str]
) -> None:
    options = RUN | {"target_groups": groups, "eval_fraction": 0.2}
    go: Callable[..., Any] = partial(start, base, rows)
    go(tmp_path / "whole", options)
    stop_at(monkeypatch, 3)
    with pytest.raises(Interrupted):
        go(tmp_path / "out", options)
    stop_at(monkeypatch, 99)
    go(tmp_path / "out", options, resume=True)
    assert raw(tmp_path / "out") == raw(tmp_path / "whole")


@pytest.mark.slow
def test_how_much_is_kept_may_change_but_not_whether(
    base: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outputs that are kept are of one medium alone, else of a pack: other sums."""
    start(base, rows, tmp_path / "whole", RUN)
    stop_at(monkeypatch, 3)
    with pytest.raises(Interrupted):
        start(base, rows, tmp_path / "out", RUN)
    stop_at(monkeypatch, 99)
    for nothing in (0.0, 1e-10):
        with pytest.raises(InputError, match=r"settings\.media_cache_gb") as caught:
            start(base, rows, tmp_path / "out", RUN | {"media_cache_gb": nothing}, resume=True)
        assert caught.value.code == "QC-RESUME-002"
    start(base, rows, tmp_path / "out", RUN | {"media_cache_gb": 1e-5}, resume=True)
    assert raw(tmp_path / "out") == raw(tmp_path / "whole")


@pytest.mark.slow
def test_other_pictures_are_another_run(
    base: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    mine = tmp_path / "rows"
    shutil.copytree(rows.parent, mine)
    stop_at(monkeypatch, 3)
    with pytest.raises(Interrupted):
        start(base, mine / "rows.jsonl", tmp_path / "out", RUN)
    stop_at(monkeypatch, 99)
    drawn(mine / "0.png", 99, 64, 64)
    with pytest.raises(InputError) as caught:
        start(base, mine / "rows.jsonl", tmp_path / "out", RUN, resume=True)
    assert caught.value.code == "QC-RESUME-002"
    assert caught.value.field == "row 2, medium 1"
    assert caught.value.file == str(mine / "rows.jsonl")
    (tmp_path / "out.run" / "media.txt").write_text("2 1")  # damaged, or of another hand
    with pytest.raises(InputError) as caught:
        start(base, mine / "rows.jsonl", tmp_path / "out", RUN, resume=True)
    assert caught.value.field == "row 2, medium 1"
    (tmp_path / "out.run" / "media.txt").unlink()
    with pytest.raises(InputError) as caught:
        start(base, mine / "rows.jsonl", tmp_path / "out", RUN, resume=True)
    assert caught.value.field == "media"


@pytest.fixture(scope="module")
def text_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "rows.jsonl"
    made = [said("Who are you?", "I am Ada."), said("Your name?", "Ada.")]
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return path


def run(base: Path, rows: Path, out: Path, *more: str, without: bool = False) -> Any:
    sets = [f"{key}={value}" for key, value in (RUN | {"max_steps": 2}).items()]
    flags = [word for one in (*sets, *more) for word in ("--set", one)]
    env = {"QCORE_DISABLE_PLUGINS": "multimodal"} if without else {}
    return apart("train", "--model", base, "--data", rows, "--output", out, *flags, env=env)


@pytest.mark.slow
def test_a_run_of_text_is_the_same_without_the_plugin(
    base: Path, text_rows: Path, tmp_path: Path
) -> None:
    with_, without = tmp_path / "with", tmp_path / "without"
    ended = run(base, text_rows, with_)
    assert ended.code == 0, ended.err
    assert "rows are text alone: 33 tensors of part 'vision' are not loaded" in ended.err
    other = run(base, text_rows, without, without=True)
    assert other.code == 0, other.err
    assert "33 tensors belong to no installed plugin and are kept unchanged" in other.err
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (with_ / name).read_bytes() == (without / name).read_bytes()


def test_rows_with_media_without_the_plugin_are_refused(
    base: Path, rows: Path, tmp_path: Path
) -> None:
    ended = run(base, rows, tmp_path / "out", without=True)
    assert ended.code == 65
    assert "QC-DATA-009" in ended.err
    assert "no installed plugin reads what vision_config describes" in ended.err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_group_of_the_tower_without_the_plugin(
    base: Path, text_rows: Path, tmp_path: Path
) -> None:
    ended = run(base, text_rows, tmp_path / "out", "target_groups=[vision]", without=True)
    assert "QC-LORA-001" in ended.err
    assert "or install the plugin that owns model.visual" in ended.err


def test_rows_with_media_for_a_model_of_text_are_refused(rows: Path, tmp_path: Path) -> None:
    write(tmp_path / "text")
    with pytest.raises(InputError, match="this is a text-only checkpoint") as caught:
        start(tmp_path / "text", rows, tmp_path / "out", RUN)
    assert "QC-DATA-009" in str(caught.value) or caught.value.code == "QC-DATA-009"


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("groups", [("merger",), ("vision", "merger")], ids=len)
@pytest.mark.slow
def test_a_tower_alone_is_trained_on_mixed_rows(
    base: Path, rows: Path, tmp_path: Path, groups: tuple[str, ...], recompute: str
) -> None:
    """Rows of text have no part in it: a step of them alone, and one beside a picture."""
    options = RUN | {"target_groups": groups, "per_device_train_batch_size": 1, "max_steps": 5}
    options |= {"gradient_checkpointing": recompute == "full", "recompute": recompute}
    start(base, rows, tmp_path / "each", options)
    steps = [json.loads(line) for line in (tmp_path / "each" / "metrics.jsonl").open()]
    assert sorted(step["grad_norm"] > 0 for step in steps) == [False, False, True, True, True]
    # All rows in one step: as micro-batches of one, and as one pack.
    once = options | {"max_steps": 1, "learning_rate": 1e-2, "warmup_ratio": 0.0}
    start(base, rows, tmp_path / "apart", once | {"gradient_accumulation_steps": 5})
    start(base, rows, tmp_path / "packed", once | {"per_device_train_batch_size": 5})
    norms = [
        json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[0])["grad_norm"]
        for name in ("apart", "packed")
    ]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    assert norms[0] > 0


def test_a_towers_group_without_media_is_refused(
    base: Path, text_rows: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError) as caught:
        start(base, text_rows, tmp_path / "out", RUN | {"target_groups": ("attn", "vision")})
    assert caught.value.code == "QC-TRAIN-008"
    assert caught.value.found == "vision"


@pytest.mark.slow
def test_a_towers_group_that_no_step_reaches_is_refused(
    base: Path, rows: Path, text_rows: Path, tmp_path: Path
) -> None:
    """The only row with media is held out, or its turn never comes."""
    drawn(tmp_path / "0.png", 0, 64, 64)
    seen = json.dumps(said([part("image", "0.png"), words("What?")], "A circle."))
    path = tmp_path / "rows.jsonl"
    path.write_text(text_rows.read_text() * 4 + seen + "\n")
    ends = set()
    for seed in range(8):
        options = RUN | {"max_steps": 1, "target_groups": ALL, "seed": seed}
        try:
            start(base, path, tmp_path / f"out{seed}", options)
            ends.add("trained")
        except UsageError as error:
            ends.add(error.code)
            assert not (tmp_path / f"out{seed}").exists()
    assert ends == {"trained", "QC-TRAIN-008"}


def test_a_tower_that_is_not_loaded_is_not_put_in_4_bit(
    base: Path, text_rows: Path, tmp_path: Path
) -> None:
    options = RUN | {"quantization": "nf4", "quantize_groups": ("vision",)}
    with pytest.raises(UsageError) as caught:
        start(base, text_rows, tmp_path / "out", options)
    assert caught.value.code == "QC-LORA-004"


@pytest.mark.slow
def test_a_run_of_text_imports_neither_pillow_nor_transformers(
    base: Path, text_rows: Path, tmp_path: Path
) -> None:
    code = (
        "import sys\nsys.modules['PIL'] = sys.modules['transformers'] = None\n"
        "from qcore.config.settings import Settings\nfrom qcore.training.train import train\n"
        f"train({str(base)!r}, {str(text_rows)!r}, {str(tmp_path / 'out')!r},"
        " Settings(max_steps=1, dtype='fp32', quantization='none'), device='cpu')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_tower_in_4_bit_when_asked(base: Path, rows: Path, tmp_path: Path) -> None:
    options = RUN | {"quantization": "nf4", "quantize_groups": ("vision", "merger")}
    report = start(base, rows, tmp_path / "out", options | {"target_groups": ALL})
    lines = {line.group: line for line in report.coverage}
    assert lines["vision"].four_bit == lines["vision"].parameters
    assert lines["merger"].four_bit == lines["merger"].parameters
    plain = start(base, rows, tmp_path / "plain", options | {"quantize_groups": ()})
    assert {line.group: line.four_bit for line in plain.coverage}["vision"] == 0


@pytest.mark.parametrize(
    ("groups", "quantization", "says"),
    [(("eyes",), "nf4", "vision or merger"), (("vision",), "none", "quantization=nf4")],
)
def test_groups_that_cannot_be_in_4_bit(
    base: Path, rows: Path, tmp_path: Path, groups: Any, quantization: str, says: str
) -> None:
    options = RUN | {"quantization": quantization, "quantize_groups": groups}
    with pytest.raises(UsageError) as caught:
        start(base, rows, tmp_path / "out", options)
    assert caught.value.code == "QC-LORA-004"
    assert says in str(caught.value.expected)


# -- generate


def test_generate_is_the_stock_class(base: Path, rows: Path) -> None:
    """Greedy tokens with pictures and a film: positions go on from where the media end."""
    from transformers import Qwen3_5ForConditionalGeneration

    made = Generator(str(base), device="cpu", dtype="fp32", media=True)
    stock = Qwen3_5ForConditionalGeneration.from_pretrained(base, dtype=torch.float32).eval()
    folder = rows.parent
    asked: list[list[tuple[str, Path]]] = [
        [("image", folder / "1.png"), ("image", folder / "2.png")],
        [("video", folder / "film.gif")],
        [],
    ]
    for media in asked:
        reading = made._prompt_media
        seen = reading.read(media) if reading is not None else []
        answer = made.prompt("What is this?", media=media, max_new_tokens=12)
        text = answer.prompt
        ids = torch.tensor([made.tokenizer.encode(text, add_special_tokens=False).ids])
        given: dict[str, Any] = {"input_ids": ids}
        if media:
            kind = media[0][0]
            pixels = made.reader.batch(seen, torch.zeros(0)).pixel_values()  # type: ignore[union-attr]
            grids = torch.tensor([list(one.grid) for one in seen])  # type: ignore[attr-defined]
            pad = made.tokenizer.token_to_id(f"<|{kind}_pad|>")
            given["mm_token_type_ids"] = (ids == pad).int() * (1 if kind == "image" else 2)
            values = "pixel_values" if kind == "image" else "pixel_values_videos"
            given |= {values: pixels, f"{kind}_grid_thw": grids}
        with torch.no_grad():
            out = stock.generate(**given, max_new_tokens=12, do_sample=False)
        new = out[0, ids.shape[1] :].tolist()
        assert made.tokenizer.decode(new, skip_special_tokens=True) == answer.text
        assert answer.prompt_tokens == ids.shape[1]


@pytest.mark.slow
def test_an_adapter_of_text_is_told_that_media_are_new(
    base: Path, text_rows: Path, rows: Path, tmp_path: Path
) -> None:
    start(base, text_rows, tmp_path / "out", RUN | {"max_steps": 1})
    ended = apart(
        "generate", base, "--adapter", tmp_path / "out", "--image", rows.parent / "0.png",
        "--prompt", "What?", "--max-new-tokens", "1", "--dtype", "fp32",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    assert "trained on text alone: image is new to it" in ended.err
    assert "of their own" not in ended.err


@pytest.mark.slow
def test_an_adapter_is_told_that_its_media_were_of_other_sizes(base: Path, tmp_path: Path) -> None:
    drawn(tmp_path / "0.png", 0, 96, 96)
    small = part("image", "0.png") | {"max_pixels": 2048}
    made = [said([small, words("What?")], "A circle."), said([words("Who?")], "Ada.")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    start(base, tmp_path / "rows.jsonl", tmp_path / "out", RUN | {"max_steps": 1})
    ended = apart(
        "generate", base, "--adapter", tmp_path / "out", "--prompt", "What?", "--image",
        tmp_path / "0.png", "--max-new-tokens", "1",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    assert "trained on media of kind image with max_pixels of their own" in ended.err
