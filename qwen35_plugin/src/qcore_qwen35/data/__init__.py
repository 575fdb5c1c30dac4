"""Names that published files of 3.5 hold, each list as it stands there.

They are data: some name what this plugin does not know, such as the tokens of a modality.
"""

from __future__ import annotations

from importlib.resources import files


def published(name: str) -> tuple[str, ...]:
    """The lines of one list: ``template_inputs``, or ``special_tokens`` of the tokenizer."""
    text = files(__name__).joinpath(f"{name}.txt").read_text(encoding="utf-8")
    return tuple(text.split())
