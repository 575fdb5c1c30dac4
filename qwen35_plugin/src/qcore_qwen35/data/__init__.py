"""Lists copied from published Qwen 3.5 files: template variables and special tokens.

They are data: some entries mean nothing to this plugin, such as the tokens of images and video.
"""

from __future__ import annotations

from importlib.resources import files


def published(name: str) -> tuple[str, ...]:
    """The entries of a list: ``template_inputs``, or ``special_tokens`` of the tokenizer."""
    text = files(__name__).joinpath(f"{name}.txt").read_text(encoding="utf-8")
    return tuple(text.split())
