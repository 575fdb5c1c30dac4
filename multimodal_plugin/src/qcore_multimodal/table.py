"""Parameter table (tensor names and shapes) of the vision tower, for dense and MoE text models.

This file decides which tensors a tower has, their LoRA groups, and that none is stored in 4 bit by
default: a tower is a twentieth of a model or less, and its quantization error reaches every token
of an image. LoRA applies to a group only if it is requested. Names and layouts are those on the
hub; the text class has no tower, so there is one namespace.

The dimensions have names of their own, except the merger's output, which is the text model's
``hidden``: core then reports two config sections that contradict each other.

Codes: ``QC-VISION-001`` a size that is missing or not a positive integer; ``QC-VISION-010`` a tower
with other tensors. `guards` checks what the shapes do not show.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from qcore.api import LINEAR, Aim, Namespace, Part, Row
from qcore.errors import InputError

NAME = "vision"
ROOT = "model.visual"
SECTION = "vision_config"
#: Default base of the rotary frequencies; published config.json files omit it.
THETA = 10000.0
#: Far above any real tower: a table lists every tensor, so an absurd depth would exhaust memory.
_MAX_BLOCKS = 1000

#: Keys whose other values mean a different tower; sections on the hub may omit both.
_REQUIRED: dict[str, tuple[Any, ...]] = {
    "model_type": (None, "qwen3_5", "qwen3_5_moe", "qwen3_5_vision", "qwen3_5_moe_vision"),
    "deepstack_visual_indexes": (None, []),
}

#: LoRA groups: the four linear layers of every block, and the two of the merger.
GROUPS: dict[str, Aim] = {"vision": Aim.ASKED, "merger": Aim.ASKED}
#: Dimension name in the rows -> key of ``vision_config``.
_SIZES = {
    "hidden": "out_hidden_size",
    "vision_hidden": "hidden_size",
    "vision_ffn": "intermediate_size",
    "vision_positions": "num_position_embeddings",
    "channels": "in_channels",
    "frames": "temporal_patch_size",
    "patch": "patch_size",
    "merge": "spatial_merge_size",
}


def vision_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The tower's section of config.json.

    Raises:
        InputError: ``QC-VISION-001`` the section is not a mapping.
    """
    section = config.get(SECTION)
    if not isinstance(section, Mapping):
        raise _config_error(None, repr(section), "a mapping")
    return section


def parts(config: Mapping[str, Any]) -> Iterator[Part]:
    """Yield the part of the vision tower.

    Args:
        config: config.json, with a ``vision_config``.

    Raises:
        InputError: ``QC-VISION-001``, ``QC-VISION-010``.
    """
    vision = vision_config(config)
    for key, allowed in _REQUIRED.items():
        if (value := vision.get(key)) not in allowed:
            raise _config_error(key, repr(value), " or ".join(map(repr, allowed)), "QC-VISION-010")
    yield Part(
        name=NAME,
        rows=tuple(_rows()),
        dims={name: _size(vision, key) for name, key in _SIZES.items()},
        axes={"block": tuple(range(_size(vision, "depth", _MAX_BLOCKS)))},
        namespaces=(
            Namespace(
                name="vl",
                classes=(
                    "Qwen3_5ForConditionalGeneration",
                    "Qwen3_5MoeForConditionalGeneration",
                ),
            ),
        ),
        groups=GROUPS,
        section=SECTION,
        optional=True,
    )


def _rows() -> Iterator[Row]:
    wide = "vision_hidden"
    yield Row(f"{ROOT}.patch_embed.proj.weight", f"{wide} channels frames patch patch", "patches")
    yield Row(f"{ROOT}.patch_embed.proj.bias", wide, "patches")
    yield Row(f"{ROOT}.pos_embed.weight", f"vision_positions {wide}", "patches")
    block = f"{ROOT}.blocks.{{block}}"
    yield from _norm(f"{block}.norm1")
    yield from _linear(f"{block}.attn.qkv", f"3*{wide}", wide, "vision")
    yield from _linear(f"{block}.attn.proj", wide, wide, "vision")
    yield from _norm(f"{block}.norm2")
    yield from _linear(f"{block}.mlp.linear_fc1", "vision_ffn", wide, "vision")
    yield from _linear(f"{block}.mlp.linear_fc2", wide, "vision_ffn", "vision")
    merged = f"merge*merge*{wide}"
    yield from _norm(f"{ROOT}.merger.norm")
    yield from _linear(f"{ROOT}.merger.linear_fc1", merged, merged, "merger")
    yield from _linear(f"{ROOT}.merger.linear_fc2", "hidden", merged, "merger")


def _norm(name: str) -> Iterator[Row]:
    yield Row(f"{name}.weight", "vision_hidden", "vision_norm")
    yield Row(f"{name}.bias", "vision_hidden", "vision_norm")


def _linear(name: str, out: str, into: str, group: str) -> Iterator[Row]:
    yield Row(f"{name}.weight", f"{out} {into}", group, kind=LINEAR)
    yield Row(f"{name}.bias", out, "vision_bias")


def _size(vision: Mapping[str, Any], key: str, most: int | None = None) -> int:
    value = vision.get(key)
    if type(value) is not int or not 0 < value <= (most or 2**31 - 1):
        expected = f"a whole number from 1 to {most}" if most else "a positive integer"
        raise _config_error(key, repr(value), expected)
    return value


def _config_error(
    key: str | None, value: str, expected: str, code: str = "QC-VISION-001"
) -> InputError:
    return InputError(
        code,
        "does not describe a Qwen 3.5 vision tower",
        file="config.json",
        field=SECTION if key is None else f"{SECTION}.{key}",
        found=value,
        expected=expected,
        fix="use the config.json that came with the weights",
    )
