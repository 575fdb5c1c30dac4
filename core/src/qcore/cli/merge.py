"""``qcore merge``: writes model + adapter as one checkpoint, and prints how it was verified."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import click

from ..io.stop_signals import importing
from .common import count, debug_option, emit, json_option


@click.command("merge")
@click.option("--model", required=True, help="The base: a folder or a hub id.")
@click.option(
    "--adapter",
    "adapters",
    required=True,
    multiple=True,
    metavar="NAME[=WEIGHT]",
    help="The adapter: a folder or a hub id. Several are added, each with its weight (1).",
)
@click.option("--output", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@click.option("--trust-base", is_flag=True, help="Accept an adapter without a base fingerprint.")
@click.option(
    "--trust-generation",
    is_flag=True,
    help="With --trust-base: accept an adapter that names a base of another generation.",
)
@click.option("--generation", default="", help="Take an unproven checkpoint for this generation.")
@click.option("--dequantize", is_flag=True, help="Write a quantized base in 16 bits, all of it.")
@click.option(
    "--requantize",
    is_flag=True,
    help="Round changed weights of a base in block FP8 to FP8 again, with new scales.",
)
@click.option(
    "--take-tokenizer",
    is_flag=True,
    help="Write the tokenizer and chat template that the adapter brings, not the base's.",
)
@click.option(
    "--allow-large-change",
    is_flag=True,
    help="Merge an adapter that changes a weight by more than 10 times its norm.",
)
@click.option("--no-proof", is_flag=True, help="Skip the comparison of logits.")
@json_option
@debug_option
def command(
    model: str,
    adapters: tuple[str, ...],
    output: Path,
    trust_base: bool,
    trust_generation: bool,
    generation: str,
    dequantize: bool,
    requantize: bool,
    take_tokenizer: bool,
    allow_large_change: bool,
    no_proof: bool,
    as_json: bool,
) -> None:
    """Write MODEL + ADAPTER to OUTPUT as a drop-in for MODEL, tensor by tensor."""
    with importing():
        from ..merging.merge import merge
        from ..merging.requantize import summary
    from .terminal import terminal_reporter
    from .weighted import weighted_adapters

    report = merge(
        model,
        weighted_adapters(adapters),
        output,
        trust_base=trust_base,
        trust_generation=trust_generation,
        generation=generation,
        prove=not no_proof,
        dequantize=dequantize,
        requantize=requantize,
        take_tokenizer=take_tokenizer,
        allow_large_change=allow_large_change,
        reporter=terminal_reporter(quiet=as_json),
    )
    if as_json:
        emit(report.as_json())
        return
    saved = f" and {report.replaced} saved weights" if report.replaced else ""
    click.echo(
        f"{report.output}: {report.changed} of {report.tensors} tensors changed "
        f"({count(report.parameters)} parameters) by {report.pairs} LoRA pairs{saved}, "
        f"largest change {report.largest_change:.3g}, {report.largest_ratio:.2g} of a weight's norm"
    )
    for part in report.adapters:
        click.echo(
            f"  {part.weight:g} x {part.adapter}: {part.pairs} pairs, norm of the deltas "
            f"{part.norm:.3g}"
        )
    if report.decoded:
        click.echo(f"the output is in 16 bits: {report.decoded} tensors of the base were quantized")
    if report.requantized:
        click.echo(summary(report.requantized))
    if report.unchanged:
        click.echo(
            f"note: {len(report.unchanged)} tensors round back to the base's, first "
            f"{report.unchanged[0]}: their part of the adapter is too small for the dtype"
        )
    if report.proof is not None:
        _print_proof(report.proof)


def _print_proof(proof: Mapping[str, float]) -> None:
    """Print the result of the comparison; an effect below float32 rounding is noted."""
    difference, effect, rerouted = proof["difference"], proof["effect"], int(proof["rerouted"])
    if "stand_ins" in proof:
        click.echo(
            f"note: {int(proof['stand_ins'])} packed weights, which are the base's, were replaced "
            "by random values in the comparison"
        )
    if rerouted:
        click.echo(
            f"proved: every layer of the unrounded merge computes base + adapter, whose effect on "
            f"logits is {effect:.3g}; rounding sent {rerouted} tokens to other experts, by which "
            f"logits differ by {difference:.1e}"
        )
    elif difference <= 0.1 * effect:
        click.echo(
            f"proved: logits of the unrounded merge are within {difference:.1e} of base + "
            f"adapter, whose effect is {effect:.3g}"
        )
    else:
        click.echo(
            f"note: the adapter's effect on logits ({effect:.1e}) is too small to tell from "
            f"rounding ({difference:.1e}); layers and tensors themselves were checked"
        )
