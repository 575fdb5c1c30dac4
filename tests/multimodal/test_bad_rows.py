"""Bad media through the command line: one line of row and part, and nothing read or written.

Every case is a data file of a good row and a bad one, given to ``qcore train`` with a tiny
checkpoint that sees. What the reader says of bytes is `test_bad_media`'s; here it is that it
reaches the user so, whole, before a weight is read.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
from support.bad_media_kit import (
    GOOD,
    PNG,
    QUESTION,
    Make,
    conversation,
    given,
    image,
    mp4,
    part,
    sixteen,
    stripe,
    train,
    untouched,
    url,
)
from support.cli_kit import Ended
from support.media_kit import animated, bare_png, picture, saved, sound
from support.tiers import fast

from qcore_multimodal.video_frames import Bounds

AT = "messages[0].content[1]"


def linked(target: str, name: str = "bad.png") -> Make:
    def make(folder: Path) -> dict[str, Any]:
        (folder.parent / "secret.png").write_bytes(PNG)
        (folder / name).symlink_to(target)
        return image(name)

    return make


def through_a_folder(folder: Path) -> dict[str, Any]:
    """A linked folder leads out, the name below it looks innocent."""
    outside = folder.parent / "outside"
    outside.mkdir()
    (outside / "a.png").write_bytes(PNG)
    (folder / "pics").symlink_to(outside, target_is_directory=True)
    return image("pics/a.png")


def a_folder(folder: Path) -> dict[str, Any]:
    (folder / "pics").mkdir()
    return image("pics")


def a_pipe(folder: Path) -> dict[str, Any]:
    os.mkfifo(folder / "bad.png")
    return image("bad.png")


def huge_file(folder: Path) -> dict[str, Any]:
    """Three gigabytes that take no room."""
    (folder / "bad.png").touch()
    os.truncate(folder / "bad.png", 3 << 30)
    return image("bad.png")


#: The part, the code, where, and what the line says: found and expected.
PARTS: dict[str, tuple[Make, str, str, tuple[str, ...]]] = {
    # Where the bytes lie.
    "a missing file": (
        given("gone.png"), "QC-MEDIA-002", AT, ("found 'gone.png': No such file", "relative")),
    "a missing folder": (
        given("pics/gone.png"), "QC-MEDIA-002", AT, ("'pics/gone.png'", "relative")),
    "a file taken for a folder": (
        given("good.png/a.png"), "QC-MEDIA-002", AT, ("'good.png/a.png'", "is not there")),
    "a name longer than names are": (
        given("a" * 300 + ".png"), "QC-MEDIA-002", AT, ("File name too long",)),
    "above the folder": (given("../secret.png"), "QC-MEDIA-004", AT, ("'../secret.png'",)),
    "above it, by a detour": (
        given("pics/../../secret.png"), "QC-MEDIA-004", AT, ("'pics/../../secret.png'",)),
    "a link out": (linked("../secret.png"), "QC-MEDIA-004", AT, ("'bad.png'", "links followed")),
    "an absolute link out": (linked("/etc/hostname"), "QC-MEDIA-004", AT, ("'bad.png'",)),
    "a folder that is a link out": (
        through_a_folder, "QC-MEDIA-004", AT, ("'pics/a.png'", "links followed")),
    "a link to nothing": (linked("gone.png"), "QC-MEDIA-002", AT, ("'bad.png'",)),
    "a link to itself": (linked("bad.png"), "QC-MEDIA-003", AT, ("leads back to itself",)),
    "an absolute path": (given("/etc/hostname"), "QC-MEDIA-001", AT, ("'/etc/hostname'",)),
    "a home folder": (given("~/a.png"), "QC-MEDIA-001", AT, ("'~/a.png'", "relative")),
    "an http address": (
        given("http://127.0.0.1:9/a.png"), "QC-MEDIA-001", AT, ("nothing is fetched",)),
    "an https address in capitals": (
        given("HTTPS://example.org/a.png"), "QC-MEDIA-001", AT, ("nothing is fetched",)),
    "a file address": (given("file:///etc/hostname"), "QC-MEDIA-001", AT, ("'file:///etc",)),
    "backslashes": (given("pics\\a.png"), "QC-MEDIA-001", AT, ("backslash",)),
    "a line end in the name": (given("a\nb.png"), "QC-MEDIA-001", AT, (r"'a\nb.png'",)),
    "an empty name": (given(""), "QC-DATA-006", AT, ("no path or data URL",)),
    "a folder": (a_folder, "QC-MEDIA-003", AT, ("'pics': a folder",)),
    "the folder itself": (given("."), "QC-MEDIA-003", AT, ("'.': a folder",)),
    "a pipe": (a_pipe, "QC-MEDIA-003", AT, ("named pipe",)),
    "three gigabytes": (huge_file, "QC-MEDIA-005", AT, ("3221225472 bytes", "2147483648")),
    "another sha256": (
        given("good.png", sha256="0" * 64), "QC-MEDIA-006", AT,
        (hashlib.sha256(PNG).hexdigest(), "0" * 64)),
    "a sha256 that is none": (
        given("good.png", sha256="abc"), "QC-DATA-006", f"{AT}.sha256", ("64 hexadecimal",)),
    "a sha256 that is a number": (
        given("good.png", sha256=7), "QC-DATA-006", f"{AT}.sha256", ("64 hexadecimal",)),
    "base64 that is broken": (
        given(url(PNG)[:-3] + "*=="), "QC-MEDIA-001", AT, ("does not decode",)),
    "base64 that is cut": (given(url(PNG)[:-5]), "QC-MEDIA-001", AT, ("does not decode",)),
    "a data address without base64": (
        given("data:image/png,abc"), "QC-MEDIA-001", AT, ("not in base64",)),
    "a data address of text": (
        given(url(b"hello", "text/plain")), "QC-VISION-027", AT, ("b'hello'", "PNG, JPEG")),
    "a data address of nothing": (
        given("data:image/png;base64,"), "QC-VISION-027", AT, ("no bytes",)),
    # What an image is.
    "an empty file": (part("image", b""), "QC-VISION-027", AT, ("no bytes", "PNG, JPEG")),
    "a text called png": (
        part("image", b"I am a picture\n"), "QC-VISION-027", AT, ("15 bytes", "PNG, JPEG")),
    "a truncated png": (part("image", stripe(PNG)), "QC-VISION-028", AT, ("decodes to its end",)),
    "a truncated jpeg": (
        part("image", stripe(saved(picture("RGB", 60, 50), "JPEG")), "bad.jpg"),
        "QC-VISION-028", AT, ("truncated",)),
    "a png of a header": (
        part("image", bare_png(64, 64, whole=False)), "QC-VISION-028", AT, ("damaged",)),
    "a video": (part("image", mp4()), "QC-VISION-027", AT, ("PNG, JPEG",)),
    "an animated gif": (
        part("image", animated(3), "bad.gif"), "QC-VISION-029", AT,
        ("GIF with 3 frames", '"video"')),
    "20,000 x 20,000": (
        part("image", bare_png(20_000, 20_000)), "QC-VISION-030", AT,
        ("found 'bad.png': 400000000 pixels", "89478485")),
    "a header of 2 billion": (
        part("image", bare_png(2**31 - 1, 2**31 - 1, whole=False)), "QC-VISION-030", AT,
        ("'bad.png': 4611686014132420609 pixels, expected at most 89478485",)),
    "201 times as wide as high": (
        part("image", saved(picture("RGB", 201, 1), "PNG")), "QC-VISION-031", AT, ("201 x 1",)),
    "16-bit greyscale": (part("image", sixteen(1)), "QC-VISION-032", AT, ("I;16", "8 bits")),
    # What a video is.
    "an empty video": (part("video", b""), "QC-VISION-034", AT, ("no bytes", "MP4")),
    "an image": (
        part("video", saved(picture("RGB", 60, 50), "JPEG")), "QC-VISION-034", AT, ("MP4",)),
    "a still png": (part("video", PNG), "QC-VISION-037", AT, (": 1, expected", '"image"')),
    "a playlist of addresses": (
        part("video", b"#EXTM3U\n#EXTINF:10,\nhttp://127.0.0.1:9/a.ts\n"), "QC-VISION-034", AT,
        ("MP4",)),
    "a truncated video": (part("video", stripe(mp4())), "QC-VISION-035", AT, ("damaged",)),
    "sound alone": (part("video", sound()), "QC-VISION-036", AT, (": audio, expected",)),
    "a video of one frame": (part("video", mp4(1)), "QC-VISION-037", AT, ("at least 2",)),
    # What a part asks for.
    "min_pixels as text": (
        given("good.png", min_pixels="1024"), "QC-VISION-025", f"{AT}.min_pixels", ("'1024'",)),
    "max_pixels beyond the processor's": (
        given("good.png", max_pixels=1 << 40), "QC-VISION-025", f"{AT}.max_pixels", ("65536",)),
    "min_pixels above max_pixels": (
        given("good.png", min_pixels=9000, max_pixels=8000), "QC-VISION-025", f"{AT}.min_pixels",
        ("9000", "8000")),
    "fps of an image": (given("good.png", fps=2), "QC-VISION-026", f"{AT}.fps", ("max_pixels",)),
    "fps of nothing": (
        part("video", animated(4), fps=0), "QC-VISION-025", f"{AT}.fps", ("above 0",)),
    "fps beyond every number": (
        part("video", animated(4), fps=10**400), "QC-VISION-025", f"{AT}.fps", ("up to 240",)),
    "fps below nothing": (
        part("video", animated(4), fps=-2.0), "QC-VISION-025", f"{AT}.fps", ("found -2.0",)),
    "fps as truth": (
        part("video", animated(4), fps=True), "QC-VISION-025", f"{AT}.fps", ("found True",)),
    "max_frames beyond every number": (
        part("video", animated(4), max_frames=10**400), "QC-VISION-025", f"{AT}.max_frames",
        ("2 to",)),
    "one frame at most": (
        part("video", animated(4), max_frames=1), "QC-VISION-025", f"{AT}.max_frames", ("2 to",)),
    # What a part is.
    "an unknown key": (given("good.png", quality="high"), "QC-DATA-006", f"{AT}.quality",
        ("max_pixels",)),
    "a key nearly known": (
        given("good.png", max_pixel=70000), "QC-DATA-006", f"{AT}.max_pixel",
        ('did you mean "max_pixels"',)),
    "two kinds": (
        given("good.png", video="a.mp4"), "QC-DATA-006", f"{AT}.video", ("a separate part",)),
    "an image without one": (given(None), "QC-DATA-006", AT, ("no path or data URL", '"image":')),
    "a list of images": (
        given(["good.png"]), "QC-DATA-006", f"{AT}.image", ("a list of 1", "for each file")),
    "a frame that is missing": (
        given(["good.png", "gone.png"], "video"), "QC-MEDIA-002", f"{AT}.video[1]", ("gone.png",)),
    "a frame that cannot be decoded": (
        given(["good.png", "rows.jsonl"], "video"), "QC-VISION-027", f"{AT}.video[1]",
        ("'rows.jsonl': ", "PNG, JPEG")),
    "an unknown kind": (
        lambda folder: {"type": "audio", "audio": "a.wav"}, "QC-DATA-009", AT,
        ("'audio'", "text or image or video")),
    "an address as OpenAI has it": (
        lambda folder: {"type": "image_url", "image_url": {"url": "https://x.org/a.png"}},
        "QC-MEDIA-001", AT, ("'https://x.org/a.png'", "download it first")),
    "a kind nearly known": (
        lambda folder: {"type": "imgae", "imgae": "good.png"}, "QC-DATA-009", AT, ('"image"',)),
    "a bare number": (lambda folder: 3, "QC-DATA-006", AT, ("is not a part",)),
    "no type": (lambda folder: {"picture": "good.png"}, "QC-DATA-006", AT, ("text part",)),
    "a placeholder in the text": (
        lambda folder: {"type": "text", "text": "<|image_pad|>"}, "QC-DATA-008",
        f"{AT}.text", ("'<|image_pad|>'", "plain text")),
    "the start of a medium in the text": (
        lambda folder: {"type": "text", "text": "see <|vision_start|>"}, "QC-DATA-008",
        f"{AT}.text", ("'<|vision_start|>'",)),
}  # fmt: skip


def one_line(ended: Ended, code: str, line: int, at: str, *says: str) -> str:
    told = ended.error(code)
    assert ended.code == 65
    assert f"rows.jsonl: line {line}, {at}: " in told, told
    for said in says:
        assert said in told, told
    assert "found " in told or "expected " in told or "Fix: " in told, told
    assert len(told) < 700
    return told


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("case", fast(PARTS, *[*PARTS][::20]))
def test_a_part(capsys: Any, seeing: Path, data: Path, case: str):
    make, code, at, says = PARTS[case]
    bad = conversation(QUESTION, make(data))
    (data / "rows.jsonl").touch()
    before = untouched(data)
    ended = train(capsys, seeing, data, GOOD, bad)
    one_line(ended, code, 2, at, *says)
    assert untouched(data) == before


#: What no file of a test is large enough for: the bound, a smaller one, and the line.
AMOUNTS: dict[str, tuple[str, int | Bounds, Make, str, tuple[str, ...]]] = {
    "bytes of a picture": (
        "images.MAX_BYTES", 500, given("good.png"), "QC-VISION-030",
        ("': more than 500, expected at most 500",)),
    "bytes of an animation": (
        "video_decoder.BOUNDS", Bounds(animated_bytes=500),
        part("video", animated(4)), "QC-VISION-030",
        ("': more than 500, expected at most 500",)),
    "frames of an animation": (
        "video_decoder.BOUNDS", Bounds(animated_frames=3),
        part("video", animated(4)), "QC-VISION-039",
        ("': 4, expected at most 3", "convert it to MP4")),
    "pixels of an animation": (
        "video_decoder.BOUNDS", Bounds(animated_pixels=4 * 40 * 30 - 1),
        part("video", animated(4)), "QC-VISION-030",
        ("': 4 frames of 40 x 30, expected at most 4799",)),
    "frames of a film": (
        "video_decoder.BOUNDS", Bounds(video_frames=11),
        part("video", mp4()), "QC-VISION-039",
        ("': 12, expected at most 11", "cut it")),
    "pixels of a film": (
        "video_decoder.BOUNDS", Bounds(video_pixels=12 * 64 * 48 - 1),
        part("video", mp4()), "QC-VISION-030",
        ("': 12 frames of 64 x 48, expected at most 36863",)),
}  # fmt: skip


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("number", "says"),
    [("1e400", "overflows a float"), ("NaN", "is not JSON"), ("-Infinity", "is not JSON")],
)
def test_a_rate_that_is_no_number(capsys: Any, seeing: Path, data: Path, number: str, says: str):
    """JSON's largest become infinite where Python reads them; its grammar knows no NaN."""
    bad = json.dumps(conversation(QUESTION, part("video", animated(4), fps=7.25)(data)))
    ended = train(capsys, seeing, data, GOOD, bad.replace("7.25", number))
    told = ended.error("QC-DATA-004")
    assert f"rows.jsonl: line 2: has a number that {says}" in told
    assert f"found {number}, expected a finite" in told


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("case", fast(AMOUNTS, *[*AMOUNTS][::3]))
def test_an_amount(
    capsys: Any, seeing: Path, data: Path, case: str, monkeypatch: pytest.MonkeyPatch
):
    bound, most, make, code, says = AMOUNTS[case]
    monkeypatch.setattr(f"qcore_multimodal.{bound}", most)
    bad = conversation(QUESTION, make(data))
    good = turns(("user", "a"), ("assistant", "b"))
    one_line(train(capsys, seeing, data, good, bad), code, 2, AT, *says)


def turns(*said: tuple[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in said]}


LONG = [image("good.png")] * 3
ROWS: dict[str, tuple[dict[str, Any], str, str, tuple[str, ...], tuple[str, ...]]] = {
    "in a system turn": (
        turns(("system", [image("good.png")]), ("user", "a"), ("assistant", "b")),
        "QC-DATA-006", "messages[0].content[0]", ("put it into a user message",), ()),
    "alone in an assistant turn": (
        turns(("user", "a"), ("assistant", [image("good.png")])),
        "QC-DATA-010", "messages[1]", ("is empty",), ()),
    "missing, in an assistant turn": (
        turns(("user", "a"), ("assistant", [QUESTION, image("gone.png")])),
        "QC-MEDIA-002", "messages[1].content[1]", ("'gone.png'",), ()),
    "missing, in a later turn": (
        turns(("user", "a"), ("assistant", "b"), ("user", [image("good.png"), image("gone.png")]),
              ("assistant", "c")),
        "QC-MEDIA-002", "messages[2].content[1]", ("'gone.png'",), ()),
    "a placeholder in a plain turn": (
        turns(("user", "see <|image_pad|>"), ("assistant", "b")),
        "QC-DATA-008", "messages[0].content", ("'<|image_pad|>'",), ()),
    "a placeholder in the answer": (
        conversation(image("good.png"), answer="<|vision_end|>"),
        "QC-DATA-008", "messages[1].content", ("'<|vision_end|>'",), ()),
    "a placeholder in a tool's answer": (
        turns(("user", "a"), ("assistant", "b"), ("tool", "<|video_pad|>"), ("assistant", "c")),
        "QC-DATA-0", "messages[2]", (), ()),
    "fewer files beside the messages than marks": (
        turns(("user", "<image><image>a"), ("assistant", "b")) | {"images": ["good.png"]},
        "QC-DATA-025", "images", ("1", "2"), ()),
    "too many media for max_length": (
        conversation(QUESTION, *LONG), "QC-DATA-011", "",
        ("tokens, 12 of them media, expected at most 32", "set max_length=43"),
        ("--set", "max_length=32")),
}  # fmt: skip


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("case", fast(ROWS, *[*ROWS][::4]))
def test_a_row(capsys: Any, seeing: Path, data: Path, case: str):
    bad, code, at, says, flags = ROWS[case]
    (data / "rows.jsonl").touch()
    before = untouched(data)
    good = turns(("user", "a"), ("assistant", "b"))
    ended = train(capsys, seeing, data, good, bad, flags=flags)
    told = ended.error(code if len(code) > 10 else ended.err[6:17])
    assert told.startswith(f"error[{code}")
    assert ended.code == 65
    assert f"rows.jsonl: line 2{', ' if at else ': '}{at}" in told
    assert all(said in told for said in says), told
    assert untouched(data) == before


@pytest.mark.usefixtures("no_weights")
def test_all_bad_rows_are_told(capsys: Any, seeing: Path, data: Path):
    """In the order of the file, whatever finds them: schema, disk, decoder or template."""
    (data / "cut.png").write_bytes(stripe(PNG))
    rows = [
        GOOD,
        conversation(QUESTION, image("gone.png")),
        conversation(QUESTION, {"type": "audio", "audio": "a.wav"}),
        GOOD,
        conversation(QUESTION, image("cut.png")),
        conversation(QUESTION, image("good.png", max_pixels=1)),
        conversation({"type": "text", "text": "a " * 700}, image("good.png")),
        conversation(QUESTION, image("good.png", sha256="1" * 64)),
    ]
    before = untouched(data)
    ended = train(capsys, seeing, data, *rows, flags=("--set", "max_length=512"))
    assert ended.code == 65
    told = ended.err.splitlines()
    codes = [line.split("]")[0].removeprefix("error[") for line in told]
    assert codes == [
        "QC-MEDIA-002", "QC-DATA-009", "QC-VISION-028", "QC-VISION-025", "QC-DATA-011",
        "QC-MEDIA-006",
    ]  # fmt: skip
    for line, number in zip(told, (2, 3, 5, 6, 7, 8), strict=True):
        assert f"rows.jsonl: line {number}" in line
    assert untouched(data) == sorted([*before, "data/rows.jsonl"])


@pytest.mark.usefixtures("no_weights")
def test_more_bad_rows_than_are_shown(capsys: Any, seeing: Path, data: Path):
    bad = [conversation(QUESTION, image(f"gone{n}.png")) for n in range(50)]
    ended = train(capsys, seeing, data, GOOD, *bad)
    told = ended.err.splitlines()
    assert len(told) == 21
    assert all(line.startswith("error[QC-MEDIA-002]") for line in told[:-1])
    assert told[-1].startswith("error[QC-DATA-014]")
    assert "50 rows are bad" in told[-1]


@pytest.mark.usefixtures("no_weights")
def test_a_file_that_may_not_be_read(
    capsys: Any, seeing: Path, data: Path, monkeypatch: pytest.MonkeyPatch
):
    """Told by a fault in ``open``: who runs the tests as root may read whatever there is."""
    real = os.open

    def refuse(path: Any, *arguments: Any, **more: Any) -> int:
        if str(path).endswith("bad.png"):
            raise PermissionError(13, "Permission denied")
        return real(path, *arguments, **more)

    bad = conversation(QUESTION, part("image", PNG)(data))
    monkeypatch.setattr(os, "open", refuse)
    one_line(train(capsys, seeing, data, GOOD, bad), "QC-MEDIA-002", 2, AT, "Permission denied")


#: Tokens by transformers' ``smart_resize`` with the tiny processor's limits: 60 x 50 becomes
#: 64 x 64, 200 x 1 becomes 480 x 32. A token is 32 x 32 pixels, in a video of two frames.
ACCEPTED: dict[str, tuple[Make, int]] = {
    "1 x 1": (part("image", saved(picture("RGB", 1, 1), "PNG")), 1),
    "200 x 1": (part("image", saved(picture("RGB", 200, 1), "PNG")), 15),
    "CMYK": (part("image", saved(picture("CMYK", 60, 50), "JPEG"), "a.jpg"), 4),
    "16 bits of each colour": (part("image", sixteen(3)), 4),
    "transparent": (part("image", saved(picture("RGBA", 60, 50), "PNG")), 4),
    "a palette": (part("image", saved(picture("P", 60, 50), "GIF"), "a.gif"), 4),
    "greyscale": (part("image", saved(picture("L", 60, 50), "PNG")), 4),
    "one bit": (part("image", bare_png(64, 64)), 4),
    "a jpeg called png": (part("image", saved(picture("RGB", 60, 50), "JPEG")), 4),
    "a sha256 in capitals": (
        given("good.png", sha256=hashlib.sha256(PNG).hexdigest().upper()), 4),
    "a data address": (given(url(PNG)), 4),
    "a data address of another type": (given(url(PNG, "text/plain")), 4),
    "keys that are null": (given("good.png", sha256=None, max_pixels=None, fps=None), 4),
    "a detour that stays inside": (given("pics/../good.png"), 4),
    "a link within the folder": (linked("good.png"), 4),
    "max_pixels": (given("good.png", max_pixels=1024), 1),
    "an animated gif as a video": (part("video", animated(4), "a.gif"), 2),
    "a video": (part("video", mp4()), 8),
}  # fmt: skip


def accepted(data: Path) -> list[dict[str, Any]]:
    """A row of each, whose files lie in a folder of their own."""
    rows = []
    for name, (make, _) in ACCEPTED.items():
        folder = data / name.replace(" ", "-")
        folder.mkdir()
        (folder / "pics").mkdir()
        (folder / "good.png").write_bytes(PNG)
        made = make(folder)
        if not made[made["type"]].startswith("data:"):
            made[made["type"]] = f"{folder.name}/{made[made['type']]}"
        rows.append(conversation(QUESTION, made))
    return rows


def test_what_is_read(capsys: Any, seeing: Path, data: Path):
    """In one run, whose manifest counts every medium and token."""
    rows = accepted(data)
    ended = train(capsys, seeing, data, *rows, flags=("--set", "max_steps=1"))
    assert ended.code == 0, ended.err
    manifest = json.loads((data.parent / "out" / "MANIFEST.json").read_text())
    told = manifest["meta"]["data"]
    assert told["media"] == {"image": len(ACCEPTED) - 2, "video": 2}
    assert told["media_rows"] == len(ACCEPTED)
    assert told["media_tokens"] == sum(tokens for _, tokens in ACCEPTED.values())


def test_each_accepted_medium_has_its_tokens(capsys: Any, seeing: Path, data: Path):
    """The line of a row that is too long says how many are its media's."""
    rows = accepted(data)
    told = train(capsys, seeing, data, *rows, flags=("--set", "max_length=8")).err.splitlines()
    assert len(told) == len(ACCEPTED)
    for line, (name, (_, tokens)) in zip(told, ACCEPTED.items(), strict=True):
        assert line.startswith("error[QC-DATA-011]"), line
        assert f" tokens, {tokens} of them media" in line, (name, line)
