"""``qcore generate``, with an option for each kind of media that an installed plugin reads.

The kinds are entry points (`KINDS`), so that ``--help`` imports no plugin: name -> module.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from ..errors import UsageError
from ..io.entry_points import KINDS, usable
from ..io.stop_signals import importing
from .common import debug_option, emit, json_option


class _WithMedia(click.Command):
    """The verb, whose options are those of its function and one for each kind of media."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        own = super().get_params(ctx)
        names = {option for parameter in own for option in parameter.opts}
        # Before --json, --debug and --help, which every verb ends with.
        return [*own[:-3], *(_option(kind) for kind in _kinds(names)), *own[-3:]]


def _media(prompt: str, others: Mapping[str, Any]) -> list[tuple[str, Path]]:
    """The files of media by kind; refuses a prompt that says nothing."""
    media = [
        (name.removeprefix("media_"), path)
        for name in sorted(others)
        if name.startswith("media_")
        for path in others[name]
    ]
    if not prompt.strip() and not media:
        raise UsageError(
            "QC-CLI-010",
            "is empty",
            field="--prompt",
            expected="a text",
            fix="write one; a shell variable that is not set leaves it empty",
        )
    return media


def _kinds(taken: set[str]) -> list[str]:
    kinds = {entry.name for entry in usable(KINDS, gated=False)}
    return sorted(
        name for name in kinds if re.fullmatch("[a-z][a-z0-9_]*", name) and f"--{name}" not in taken
    )


def _option(kind: str) -> click.Option:
    return click.Option(
        [f"--{kind}", f"media_{kind}"],
        multiple=True,
        type=click.Path(path_type=Path),
        help=f"A file of this kind ({kind}), before the prompt, in order of kinds; repeatable.",
    )


@click.command(
    "generate",
    cls=_WithMedia,
    epilog="Options of media come with the plugin that reads them; qcore plugins list shows those "
    "that are installed.",
)
@click.argument("model")
@click.option("--prompt", required=True, help="What the user says.")
@click.option("--system", default="", help="The system turn.")
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    metavar="NAME[=WEIGHT]",
    help="Adapter to apply: a folder or a hub id. Several are added, each with its weight (1).",
)
@click.option("--trust-base", is_flag=True, help="Accept an adapter without a base fingerprint.")
@click.option(
    "--trust-generation",
    is_flag=True,
    help="With --trust-base: accept an adapter that names a base of another generation.",
)
@click.option(
    "--take-tokenizer",
    is_flag=True,
    help="Use the tokenizer and chat template that the adapter brings, not the base's.",
)
@click.option("--max-new-tokens", type=click.IntRange(1, 131072), default=256, show_default=True)
@click.option(
    "--temperature",
    type=click.FloatRange(0, 100),
    help="0 is greedy. This and the next six: by default as generation_config.json says, else "
    "greedy.",
)
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), help="Nucleus sampling.")
@click.option("--top-k", type=click.IntRange(0), help="Tokens to draw from; 0: all.")
@click.option(
    "--min-p", type=click.FloatRange(0, 1), help="Least share of the top token's probability."
)
@click.option(
    "--repetition-penalty",
    type=click.FloatRange(0, min_open=True),
    help="Of tokens of prompt and answer; 1: none.",
)
@click.option(
    "--presence-penalty", type=click.FloatRange(-2, 2), help="Of tokens of the answer; 0: none."
)
@click.option(
    "--frequency-penalty",
    type=click.FloatRange(-2, 2),
    help="Of each occurrence in the answer; 0: none.",
)
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, help="Seed of the sampling.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto")
@click.option("--dtype", type=click.Choice(["bf16", "fp32"]), default="bf16", show_default=True)
@click.option(
    "--quantization", type=click.Choice(["none", "nf4"]), default="none", show_default=True
)
@click.option("--generation", default="", help="Take an unproven checkpoint for this generation.")
@click.option(
    "--chat-template-kwargs",
    multiple=True,
    metavar="NAME=VALUE",
    help="Variable of the chat template; may be repeated. Otherwise as the adapter was trained.",
)
@json_option
@debug_option
def command(
    model: str,
    prompt: str,
    system: str,
    adapters: tuple[str, ...],
    trust_base: bool,
    trust_generation: bool,
    take_tokenizer: bool,
    max_new_tokens: int,
    seed: int,
    device: str,
    dtype: str,
    quantization: str,
    generation: str,
    chat_template_kwargs: tuple[str, ...],
    as_json: bool,
    **others: Any,
) -> None:
    """Answer one prompt with MODEL, so that the effect of an adapter can be seen."""
    media = _media(prompt, others)
    # The options of sampling, named as `Sampling` names them.
    sampling = {name: value for name, value in others.items() if not name.startswith("media_")}
    from ..config.resolve import parse_entries
    from .terminal import terminal_reporter
    from .weighted import weighted_adapters

    variables = parse_entries(
        "chat_template_kwargs", chat_template_kwargs, flag="--chat-template-kwargs"
    )
    with importing():
        from ..inference.generate import generate

    answer = generate(
        model,
        prompt,
        adapter=weighted_adapters(adapters) or None,
        trust_base=trust_base,
        trust_generation=trust_generation,
        take_tokenizer=take_tokenizer,
        device=device,
        dtype=dtype,
        quantization=quantization,
        generation=generation,
        chat_template_kwargs=variables,
        media=media,
        system=system,
        max_new_tokens=max_new_tokens,
        seed=seed,
        reporter=terminal_reporter(quiet=as_json),
        **sampling,
    )
    if as_json:
        emit(answer.as_json())
    else:
        click.echo(answer.text)
