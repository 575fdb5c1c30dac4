"""Bad checkpoints, settings and files that change, for runs with media; memory; ``generate``.

The rows themselves are `test_bad_rows`'. What is refused here is refused before a weight is read,
but for what only shows in the middle of a run.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support.bad_media_kit import (
    GOOD,
    PNG,
    QUESTION,
    conversation,
    image,
    stripe,
    train,
    untouched,
)
from support.cli_kit import Ended, apart, here
from support.e2e_kit import figure
from support.media_kit import animated, bare_png, picture, saved
from support.model_kit import edit_json
from support.tiers import fast

TEXT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
VIDEO = conversation(QUESTION, {"type": "video", "video": "a.gif"})


@pytest.fixture
def base(seeing: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint that sees, to break."""
    return Path(shutil.copytree(seeing, tmp_path / "base"))


@pytest.fixture(scope="session")
def blind(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same family's tiny checkpoint of text alone."""
    from qcore_qwen35.tiny import write

    folder = tmp_path_factory.mktemp("blind") / "base"
    write(folder)
    return folder


# -- the checkpoint


def edited(name: str, **values: Any) -> Callable[[Path, Path], object]:
    return lambda base, blind: edit_json(base / name, lambda c: c.update(values))


def written(name: str, text: str) -> Callable[[Path, Path], object]:
    return lambda base, blind: (base / name).write_text(text)


def unlinked(name: str) -> Callable[[Path, Path], object]:
    return lambda base, blind: (base / name).unlink()


IMAGES, VIDEOS = "preprocessor_config.json", "video_preprocessor_config.json"
CHECKPOINTS: dict[str, tuple[Callable[[Path, Path], object], str, tuple[str, ...]]] = {
    "no processor of images": (unlinked(IMAGES), "QC-VISION-020", ("image processor", IMAGES)),
    "no processor of videos": (unlinked(VIDEOS), "QC-VISION-020", ("video processor", VIDEOS)),
    "a processor that is no JSON": (written(IMAGES, "{"), "QC-CKPT-002", (IMAGES,)),
    "another's processor": (
        edited(IMAGES, image_processor_type="CLIPImageProcessor"), "QC-VISION-021",
        (IMAGES, "'CLIPImageProcessor'")),
    "a size that is none": (
        edited(IMAGES, size={"shortest_edge": 7}), "QC-VISION-022",
        ("size", "found {'shortest_edge': 7}")),
    "patches of another size": (
        edited(IMAGES, patch_size=14), "QC-VISION-023", ("patch_size", "found 14", "16")),
    "another token than the tokenizer's": (
        lambda base, blind: edit_json(
            base / "config.json", lambda c: c.update(image_token_id=c["image_token_id"] + 1)),
        "QC-VISION-053", ("config.json: image_token_id", "<|image_pad|>")),
    "no token where config.json names one": (
        edited("config.json", image_token_id=None), "QC-VISION-053",
        ("config.json: image_token_id", "found None", "<|image_pad|>")),
    "no token of videos": (
        edited("config.json", video_token_id=None), "QC-VISION-053",
        ("config.json: video_token_id", "found None", "<|video_pad|>")),
    "tokens of images and videos swapped": (
        lambda base, blind: edit_json(
            base / "config.json",
            lambda c: c.update(
                image_token_id=c["video_token_id"], video_token_id=c["image_token_id"])),
        "QC-VISION-053", ("config.json: image_token_id", "<|image_pad|>")),
    "a template that shows no media": (
        lambda base, blind: shutil.copy(blind / "chat_template.jinja", base), "QC-MASK-003",
        ("chat_template.jinja", "'image' is dropped")),
}  # fmt: skip


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("case", fast(CHECKPOINTS, *[*CHECKPOINTS][::4]))
def test_a_checkpoint(capsys: Any, base: Path, blind: Path, data: Path, case: str):
    change, code, says = CHECKPOINTS[case]
    change(base, blind)
    (data / "a.gif").write_bytes(animated(4))
    (data / "rows.jsonl").touch()
    before = untouched(data)
    ended = train(capsys, base, data, GOOD, VIDEO)
    told = ended.error(code)
    assert all(said in told for said in says), told
    assert ended.code == 65
    assert untouched(data) == before


@pytest.mark.parametrize("case", fast([c for c in CHECKPOINTS if "token" not in c]))
def test_rows_of_text_do_not_mind(capsys: Any, base: Path, blind: Path, data: Path, case: str):
    """What only media need is not asked for; nor where the plugin is not installed."""
    CHECKPOINTS[case][0](base, blind)
    ended = train(capsys, base, data, TEXT, flags=("--set", "max_steps=1"))
    assert ended.code == 0, ended.err
    assert "rows are text alone" in ended.err
    assert (data.parent / "out").is_dir()


@pytest.mark.usefixtures("no_weights")
def test_a_checkpoint_of_text(capsys: Any, blind: Path, data: Path):
    ended = train(capsys, blind, data, TEXT, GOOD)
    told = ended.error("QC-DATA-009")
    assert "line 2, messages[0].content[1]" in told
    assert "this is a text-only checkpoint" in told
    assert " Fix: " in told
    assert ended.code == 65


def test_without_the_plugin(seeing: Path, data: Path):
    """In a process that leaves it out, as one does where it is not installed."""
    (data / "rows.jsonl").write_text(json.dumps(GOOD) + "\n")
    before = untouched(data)
    ended = apart(
        "train", "--model", seeing, "--data", data / "rows.jsonl", "--output", data.parent / "out",
        "--device", "cpu", env={"QCORE_DISABLE_PLUGINS": "multimodal"},
    )  # fmt: skip
    told = ended.error("QC-DATA-009")
    assert "line 1, messages[0].content[1]" in told
    assert "no installed plugin reads what vision_config describes" in told
    assert untouched(data) == before


SETTINGS = {
    "a tower without media": (TEXT, "target_groups=[vision]", "QC-TRAIN-008", "image or video"),
    "a merger without media": (TEXT, "target_groups=[merger]", "QC-TRAIN-008", "found merger"),
    "an unknown group": (GOOD, "target_groups=[visoin]", "QC-LORA-001", "vision"),
    "an unknown group in 4 bit": (GOOD, "quantize_groups=[visoin]", "QC-LORA-004", "vision"),
    "a group in 4 bit of nothing": (TEXT, "quantize_groups=[norm]", "QC-LORA-004", "merger"),
}


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("case", SETTINGS)
def test_a_setting(capsys: Any, seeing: Path, data: Path, case: str):
    row, setting, code, says = SETTINGS[case]
    (data / "rows.jsonl").touch()
    before = untouched(data)
    ended = train(capsys, seeing, data, row, flags=("--set", setting))
    first = ended.err.splitlines()[-1]
    assert first.startswith(f"error[{code}]"), ended.err
    assert says in first
    assert ended.code == 2
    assert untouched(data) == before


# -- files that change


def drop_cache(data: Path) -> None:
    shutil.rmtree(data.parent / "cache" / "qcore" / "media")


def after_rows(monkeypatch: pytest.MonkeyPatch, change: Callable[[], object]) -> None:
    """Have something happen when the rows were checked and no weight was read."""
    import qcore.training.train

    real = qcore.training.train.load_base

    def load(*arguments: Any, **options: Any) -> Any:
        change()
        return real(*arguments, **options)

    monkeypatch.setattr(qcore.training.train, "load_base", load)


def failed(data: Path, ended: Ended, code: str, *says: str) -> None:
    last = ended.err.splitlines()[-1]
    assert last.startswith(f"error[{code}]"), ended.err
    assert all(said in last for said in says), last
    assert "Traceback" not in ended.err
    assert ended.code == 65
    assert not (data.parent / "out").exists()


@pytest.mark.parametrize("how", fast(["other bytes", "gone"]))
def test_a_file_that_changes_behind_the_check(
    capsys: Any, seeing: Path, data: Path, monkeypatch: pytest.MonkeyPatch, how: str
):
    """It matters where its values have left the cache, and not before."""
    path = data / "good.png"

    def change() -> None:
        drop_cache(data)
        if how == "gone":
            path.unlink()
        else:
            path.write_bytes(saved(picture("RGB", 60, 50, 1), "PNG"))

    after_rows(monkeypatch, change)
    ended = train(capsys, seeing, data, GOOD)
    failed(data, ended, "QC-VISION-042", "good.png")


@pytest.mark.parametrize("cut", fast([0, 1, 200], 200))
@pytest.mark.slow
def test_a_damaged_cache_is_made_anew(
    capsys: Any, seeing: Path, data: Path, monkeypatch: pytest.MonkeyPatch, cut: int
):
    """Whether a bit fell over or the end is gone; the loss is that of the whole one."""

    def damage() -> None:
        (entry,) = (data.parent / "cache" / "qcore" / "media").glob("*.media")
        content = bytearray(entry.read_bytes())
        content[-9] ^= 1
        entry.write_bytes(bytes(content[: len(content) - cut]))

    def run() -> float:
        assert (ended := train(capsys, seeing, data, GOOD)).code == 0, ended.err
        metrics = (data.parent / "out" / "metrics.jsonl").read_text().splitlines()
        shutil.rmtree(data.parent / "out")
        return float(json.loads(metrics[0])["loss"])

    whole = run()
    after_rows(monkeypatch, damage)
    assert run() == whole


# -- memory

_PEAK = """
import resource, sys
from qcore.cli.main import main
try:
    main()
finally:
    print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10, file=sys.stderr)
"""


def peak(seeing: Path, data: Path, *rows: Any, flags: tuple[str, ...] = ()) -> tuple[Ended, int]:
    """MiB that a process of its own held at most, with all of torch."""
    path = data / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    ended = apart(
        "train", "--model", seeing, "--data", path, "--output", data.parent / "out",
        "--device", "cpu", "--set", "max_steps=1", *flags,
        command=(sys.executable, "-c", _PEAK),
    )  # fmt: skip
    return ended, int(ended.err.splitlines()[-1].removeprefix("peak "))


@pytest.mark.slow
def test_memory_of_one_image(seeing: Path, data: Path):
    """20,000 x 20,000 costs nothing, the largest that is read some 0.6 GB over a small one."""
    (data / "bomb.png").write_bytes(bare_png(20_000, 20_000))
    Image.new("RGB", (9_400, 9_400)).save(data / "large.png", compress_level=1)
    ended, small = peak(seeing, data, GOOD)
    assert ended.code == 0, ended.err
    shutil.rmtree(data.parent / "out")
    ended, bomb = peak(seeing, data, GOOD, conversation(QUESTION, image("bomb.png")))
    assert ended.code == 65
    assert "error[QC-VISION-030]" in ended.err
    assert bomb < small + 50, (bomb, small)
    ended, large = peak(seeing, data, GOOD, conversation(QUESTION, image("large.png")))
    assert ended.code == 0, ended.err
    figure(f"peaks in MiB: small {small}, refused {bomb}, large {large}")
    assert large < small + 900, (large, small)


@pytest.mark.slow
def test_memory_of_200_images(seeing: Path, data: Path):
    """1.2 GB of pixels in all, of which one is held at a time."""
    rows = []
    for number in range(200):
        Image.new("RGB", (1_400, 1_400), (number, 0, 0)).save(data / f"{number}.png")
        rows.append(conversation(QUESTION, image(f"{number}.png")))
    ended, one = peak(seeing, data, rows[0])
    assert ended.code == 0, ended.err
    shutil.rmtree(data.parent / "out")
    ended, all_ = peak(seeing, data, *rows)
    assert ended.code == 0, ended.err
    figure(f"peaks in MiB: one {one}, 200 {all_}")
    assert all_ < one + 250, (all_, one)


# -- generate


def generate(capsys: Any, base: Path, *flags: object) -> Ended:
    return here(
        capsys, "generate", base, "--prompt", "what is it?", "--device", "cpu",
        "--max-new-tokens", "2", *flags,
    )  # fmt: skip


GENERATE: dict[str, tuple[tuple[str, ...], int, str, str]] = {
    "a missing file": (("--image", "gone.png"), 65, "QC-MEDIA-002", "gone.png: --image: is not"),
    "a folder": (("--image", "."), 65, "QC-MEDIA-003", "a folder"),
    "a truncated file": (("--image", "cut.png"), 65, "QC-VISION-028", "cut.png: --image"),
    "a text": (("--image", "a.txt"), 65, "QC-VISION-027", "a.txt: --image"),
    "a bomb": (("--image", "bomb.png"), 65, "QC-VISION-030", "found 400000000 pixels"),
    "animated": (("--image", "a.gif"), 65, "QC-VISION-029", "a still image"),
    "a still as a video": (("--video", "good.png"), 65, "QC-VISION-037", "good.png: --video"),
    "a good and a missing one": (
        ("--image", "good.png", "--image", "gone.png"), 65, "QC-MEDIA-002", "gone.png: --image"),
    "a placeholder in the system turn": (
        ("--image", "good.png", "--system", "<|image_pad|>"), 2, "QC-GENERATE-006",
        "--system: holds"),
    "a placeholder and no media": (
        ("--system", "<|video_pad|>"), 2, "QC-GENERATE-006", "--system: holds"),
    "a url": (("--image", "http://127.0.0.1:9/a.png"), 65, "QC-MEDIA-002", "nothing is fetched"),
    "a still as a video, and how": (("--video", "good.png"), 65, "QC-VISION-037", "use --image"),
    "a prompt twice": (("--prompt", "a"), 2, "QC-CLI-004", "--prompt: is given twice"),
}  # fmt: skip


@pytest.mark.parametrize("case", fast(GENERATE, *[*GENERATE][::4]))
def test_generate(
    capsys: Any, seeing: Path, data: Path, case: str, monkeypatch: pytest.MonkeyPatch
):
    flags, status, code, says = GENERATE[case]
    (data / "cut.png").write_bytes(stripe(PNG))
    (data / "a.txt").write_text("a")
    (data / "a.gif").write_bytes(animated(4))
    (data / "bomb.png").write_bytes(bare_png(20_000, 20_000))
    monkeypatch.chdir(data)
    ended = generate(capsys, seeing, *flags)
    last = ended.err.splitlines()[-1]
    assert last.startswith(f"error[{code}]"), ended.err
    assert says in last
    assert "data file" not in last
    assert ended.code == status
    assert ended.out == ""


@pytest.mark.usefixtures("no_weights")
def test_generate_with_a_checkpoint_of_text(capsys: Any, blind: Path, data: Path):
    ended = generate(capsys, blind, "--image", data / "good.png")
    assert "this is a text-only checkpoint" in ended.error("QC-GENERATE-005")
    assert ended.code == 2


def test_generate_with_several_images_and_links(capsys: Any, seeing: Path, data: Path):
    """A file that the user names may be a link to anywhere."""
    outside = data.parent / "outside.png"
    outside.write_bytes(PNG)
    (data / "link.png").symlink_to(outside)
    (data / "a.gif").write_bytes(animated(4))
    flags = ("--image", data / "good.png", "--image", data / "link.png", "--video", data / "a.gif")
    ended = generate(capsys, seeing, *flags, "--json")
    assert ended.code == 0, ended.err
    assert ended.json["prompt"].count("<|image_pad|>") == 8
    assert ended.json["prompt"].count("<|video_pad|>") == 2


def test_generate_with_an_adapter_of_text(capsys: Any, seeing: Path, data: Path):
    """The tower is the base's: that the adapter saw no image is no reason to refuse."""
    assert train(capsys, seeing, data, TEXT, flags=("--set", "max_steps=1")).code == 0
    adapter = data.parent / "out"
    ended = generate(capsys, seeing, "--adapter", adapter, "--image", data / "good.png")
    assert ended.code == 0, ended.err
    assert "Traceback" not in ended.err
