"""The checkpoint's processor files: which are read, and which settings are refused.

This file decides which files describe the processors (the combined file of transformers 5 takes
precedence over the files per kind, as in transformers), that the processors are of the supported
class, and that their settings are valid and match the tower. `processor` applies the settings. It
imports no torch.

- ``QC-VISION-020`` the checkpoint has no processor file.
- ``QC-VISION-021`` an unsupported processor class.
- ``QC-VISION-022`` an invalid setting.
- ``QC-VISION-023`` a setting that contradicts config.json.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, TypeGuard

from qcore.errors import InputError

from .table import SECTION

if TYPE_CHECKING:
    from qcore.api import CheckpointView

_BICUBIC: Final = 3
_COMBINED: Final = "processor_config.json"
_FILES: Final = {
    "image": ("preprocessor_config.json", "image_processor"),
    "video": ("video_preprocessor_config.json", "video_processor"),
}
_CLASSES: Final = {
    "image": {f"Qwen2VLImageProcessor{end}" for end in ("", "Fast", "Pil")},
    "video": {"Qwen3VLVideoProcessor"},
}
_FIX: Final = "use the processor files that came with the weights"


def load(checkpoint: CheckpointView, kind: str, make: Callable[..., Any]) -> Any:
    """The stock processor of a kind, with validated settings.

    Args:
        checkpoint: the checkpoint.
        kind: ``image`` or ``video``.
        make: transformers' class.

    Raises:
        InputError: ``QC-VISION-020`` to ``-023``; ``QC-CKPT-002`` a file that is not JSON.
    """
    name, content = _settings(checkpoint, kind)
    file = checkpoint.path / name
    class_name = content.pop(f"{kind}_processor_type", None)
    content.pop("processor_class", None)
    if class_name is not None and class_name not in _CLASSES[kind]:
        raise InputError(
            "QC-VISION-021",
            "unsupported processor class",
            file=file,
            field=f"{kind}_processor_type",
            found=repr(class_name),
            expected=" or ".join(sorted(_CLASSES[kind])),
            fix=_FIX,
        )
    try:
        stock = make(**content)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise InputError(
            "QC-VISION-022",
            "transformers refuses these settings",
            file=file,
            found=f"{type(error).__name__}: {str(error)[:200]}",
            fix=_FIX,
        ) from None
    for field, value, good, expected in _requirements(kind, stock):
        if not good:
            raise InputError(
                "QC-VISION-022", "is out of bounds", file=file, field=field, found=repr(value),
                expected=expected, fix=_FIX,
            )  # fmt: skip
    _check_config(checkpoint, file, stock)
    return stock


def _settings(checkpoint: CheckpointView, kind: str) -> tuple[str, dict[str, Any]]:
    """Name and content of the processor file; the combined file takes precedence."""
    name, key = _FILES[kind]
    if _COMBINED in checkpoint.sidecars:
        combined = checkpoint.read_json(_COMBINED).get(key)
        if combined is not None:
            if not isinstance(combined, dict):
                raise InputError(
                    "QC-VISION-022", "is not a JSON object", file=checkpoint.path / _COMBINED,
                    field=key, found=type(combined).__name__, fix=_FIX,
                )  # fmt: skip
            return _COMBINED, combined
    if name not in checkpoint.sidecars:
        raise InputError(
            "QC-VISION-020",
            f"has no {kind} processor file",
            file=checkpoint.path,
            expected=f"{name}, or {_COMBINED} with {key}",
            fix="copy the file from the original checkpoint",
        )
    return name, checkpoint.read_json(name)


def size_bounds(size: Any) -> tuple[int, int]:
    """Minimum and maximum pixels of a processor's ``size``; zeros if it is invalid."""
    numbers: dict[str, Any] = dict(size) if size is not None else {}
    least, most = numbers.get("shortest_edge"), numbers.get("longest_edge")
    return (int(least), int(most)) if _whole(least) and _whole(most) else (0, 0)


def _whole(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= 1 << 30


def _real(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30


def _requirements(kind: str, stock: Any) -> list[tuple[str, Any, bool, str]]:
    """For each setting: name, value, whether it is valid, and the expected value."""

    def three(value: Any) -> bool:
        return isinstance(value, list | tuple) and len(value) == 3 and all(map(_real, value))

    least, most = size_bounds(stock.size)
    size = {key: value for key, value in dict(stock.size or {}).items() if value is not None}
    mean, std = stock.image_mean, stock.image_std
    names = ["do_resize", "do_rescale", "do_normalize", "do_convert_rgb"]
    whole = ["patch_size", "merge_size", "temporal_patch_size"]
    video = []
    if kind == "video":
        names.append("do_sample_frames")
        whole += ["min_frames", "max_frames"]
        fps, count = stock.fps, stock.num_frames
        video += [
            ("fps", fps, _real(fps) and fps > 0, "a number above 0"),
            ("num_frames", count, count is None, "null, as frames are sampled by fps"),
        ]
    return [
        *video,
        *((name, getattr(stock, name), getattr(stock, name) is True, "true") for name in names),
        *((name, getattr(stock, name), _whole(getattr(stock, name)), "a number above 0")
          for name in whole),
        ("size", size, 0 < least <= most, "shortest_edge up to longest_edge, in pixels"),
        ("image_mean", mean, three(mean), "three numbers"),
        ("image_std", std, three(std) and min(map(abs, std)) > 0, "three numbers other than 0"),
        ("rescale_factor", stock.rescale_factor,
         _real(stock.rescale_factor) and stock.rescale_factor > 0, "a number above 0"),
        ("resample", stock.resample, stock.resample == _BICUBIC, f"{_BICUBIC} (bicubic)"),
    ]  # fmt: skip


def _check_config(checkpoint: CheckpointView, file: object, stock: Any) -> None:
    """Refuse settings that do not match the tower (``QC-VISION-023``)."""
    vision = checkpoint.config.get(SECTION) or {}
    for field, key in (
        ("patch_size", "patch_size"),
        ("temporal_patch_size", "temporal_patch_size"),
        ("merge_size", "spatial_merge_size"),
    ):
        expected = vision.get(key)
        if expected is not None and expected != getattr(stock, field):
            raise InputError(
                "QC-VISION-023",
                "differs from the vision tower's",
                file=file,
                field=field,
                found=getattr(stock, field),
                expected=f"{expected!r} ({SECTION}.{key} in config.json)",
                fix=_FIX,
            )
    channels = vision.get("in_channels", 3)
    if channels != 3:
        raise InputError(
            "QC-VISION-023",
            "differs from the processor's channels",
            file=checkpoint.path / "config.json",
            field=f"{SECTION}.in_channels",
            found=repr(channels),
            expected=3,
            fix=_FIX,
        )
