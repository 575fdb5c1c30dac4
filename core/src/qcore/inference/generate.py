"""`qcore generate`: one prompt through the checkpoint's own template and the plugin's own blocks.

This file decides how a model is loaded for decoding and how a prompt is rendered. An adapter is
applied as training applied it, on the base that it was trained on. It is meant for seeing the
effect of an adapter, not for serving. The decoding loop is in `sampling`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Unpack

from ..adapter.delta import Deltas
from ..adapter.evidence import brings_template
from ..adapter.peft_names import Adapter
from ..api.media import MediaReader, Medium
from ..checkpoint.fingerprint import fingerprints
from ..checkpoint.tokenizer import load_tokenizer
from ..config.frozen_map import Entries, Plain
from ..data.rendering.masking import highest_id
from ..data.rendering.template_kwargs import special_tokens
from ..errors import InputError, UsageError
from ..nn.device import DTYPES, pick_device
from ..nn.kernels.registry import Chosen, choose, installed
from ..nn.load import load
from ..nn.model import Model, ops_of
from ..nn.qlora.lora_layer import Lora
from ..plugins.resolve_model import identify
from ..preflight.checks import line, preflight
from ..preflight.context_length import beyond
from ..preflight.four_bit import refuse_rounding
from ..preflight.modality import reader_of, unread
from ..preflight.tokenizer_findings import normalize_of
from ..reporting import Finished, Reporter, RunStarted
from .applied_adapters import apply_adapters
from .chat_variables import recorded_chat
from .decoder import Decoder, way_of
from .generation_config import Sampling, SamplingOptions, choose_sampling, stop_ids
from .prompt_media import PromptMedia
from .prompt_text import check_prompt
from .sampling import decode

__all__ = ["Generated", "Generator", "generate"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Generated:
    """The result of `generate`.

    Attributes:
        text: the new text, special tokens skipped.
        prompt: the rendered prompt.
        prompt_tokens: tokens of the prompt.
        tokens: new tokens, the stop token included.
        stopped: whether a stop token ended it.
    """

    text: str
    prompt: str
    prompt_tokens: int
    tokens: int
    stopped: bool

    def as_json(self) -> dict[str, Any]:
        """The payload of ``qcore generate --json``."""
        return asdict(self)


def generate(
    model: str,
    prompt: str,
    *,
    adapter: str | Path | Mapping[str, float] | None = None,
    trust_base: bool = False,
    trust_generation: bool = False,
    take_tokenizer: bool = False,
    media: Sequence[tuple[str, Path]] = (),
    system: str = "",
    max_new_tokens: int = 256,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "bf16",
    quantization: str = "none",
    generation: str = "",
    chat_template_kwargs: Mapping[str, Plain] | None = None,
    reporter: Reporter | None = None,
    **sampling: Unpack[SamplingOptions],
) -> Generated:
    """Load a model and answer one prompt; a `Generator` answers several.

    Args:
        model: a folder or a hub id.
        prompt: what the user says.
        adapter: an adapter folder to apply, or its hub id; several of them with the weight of each.
        trust_base: accept an adapter without a fingerprint of its base.
        trust_generation: accept such an adapter if it names a base of another generation.
        take_tokenizer: use the tokenizer and template that the adapter brings, not the base's.
        media: kind and file of each medium that comes before the prompt.
        system: the system turn, none when empty.
        max_new_tokens: the most tokens to add.
        seed: of the sampling.
        device: ``auto``, ``cpu`` or ``cuda``.
        dtype: ``bf16`` or ``fp32``.
        quantization: ``none`` or ``nf4``.
        generation: accepted only where evidence is missing, never against it.
        chat_template_kwargs: variables of the chat template, over those of the adapter.
        reporter: receives events; silent by default.
        sampling: as for `Generator.prompt`.

    Raises:
        QcoreError: see docs/errors.md.
    """
    (reporter := reporter or Reporter()).emit(RunStarted(verb="generate", model=model))
    generator = Generator(
        model, adapter=adapter, trust_base=trust_base, trust_generation=trust_generation,
        take_tokenizer=take_tokenizer, device=device, dtype=dtype, quantization=quantization,
        generation=generation, chat_template_kwargs=chat_template_kwargs, media=bool(media),
        reporter=reporter,
    )  # fmt: skip
    turn: Any = {"media": media, "system": system, "max_new_tokens": max_new_tokens, "seed": seed}
    answer = generator.prompt(prompt, **turn, **sampling)
    reporter.emit(Finished(verb="generate", output=None, result=answer.as_json()))
    return answer


class Generator:
    """A model loaded for decoding. Loading is the slow part; `prompt` may be called often.

    Prompts are rendered with the template variables that the manifest of the adapter or of the
    merged checkpoint records; ``chat_template_kwargs`` overrides them one by one. ``media=True``
    loads the tower.

    Raises:
        InputError: ``QC-GENERATE-001`` when the adapter was trained on another base.
        UsageError: ``QC-CONFIG-008``, ``-009`` a variable that cannot be set; ``QC-MERGE-010``,
            ``-013`` `take_tokenizer` without an adapter that brings one, or with several.
    """

    def __init__(
        self,
        model: str,
        *,
        adapter: str | Path | Mapping[str, float] | None = None,
        trust_base: bool = False,
        trust_generation: bool = False,
        take_tokenizer: bool = False,
        device: str = "auto",
        dtype: str = "bf16",
        quantization: str = "none",
        generation: str = "",
        chat_template_kwargs: Mapping[str, Plain] | None = None,
        media: bool = False,
        reporter: Reporter | None = None,
    ) -> None:
        self.reporter = reporter or Reporter()
        self.device = pick_device(device)
        self.base = identify(model, generation=generation)
        self.reader = self._media_reader(required=media)
        applied = apply_adapters(
            self.base, adapter, trust_base=trust_base, trust_generation=trust_generation,
            take_tokenizer=take_tokenizer,
        )  # fmt: skip
        self.base, self.adapter = applied.base, applied.adapter
        self.reporter.lines(applied.lines)
        self._reads_media = media
        if media and (modality := self.base.modality) is not None:
            self.base = self.base.using(modality)
        self.chat = self.base.chat_format()
        self.tokenizer = load_tokenizer(self.base.checkpoint)
        self.variables = self._template_variables(chat_template_kwargs or {})
        lines = preflight(
            self.base, verb="generate", template_kwargs=self.variables,
            token_ids=self.tokenizer.get_vocab(), normalize=normalize_of(self.tokenizer),
        )  # fmt: skip
        self.reporter.lines(lines)
        if quantization == "nf4":
            refuse_rounding(self.base, fix="leave out --quantization, which decodes them")
        kernels = self._kernels()
        self.model = self._load(dtype, quantization, kernels)
        way, reason = way_of(kernels)
        if reason:
            self.reporter.note(f"tokens are computed without a captured graph: {reason}")
        self.decoder = Decoder(self.model, self.device, way)

    def _media_reader(self, *, required: bool) -> MediaReader | None:
        reader = reader_of(self.base, self.reporter)
        if reader is None and required:
            raise UsageError(
                "QC-GENERATE-005",
                "cannot read media",
                file=self.base.checkpoint.path,
                found=unread(self.base),
                fix="leave the files out, or install the plugin that reads them",
            )
        return reader

    def _template_variables(self, overrides: Mapping[str, Plain]) -> Entries[Plain]:
        """The variables that training recorded, under those of the user."""
        record = recorded_chat(self.base.checkpoint, self.adapter)
        variables, notes = record.variables(self.base.checkpoint.template, overrides)
        self.reporter.lines(notes)
        compared = self.adapter is not None and brings_template(self.adapter)
        if not compared and (warning := record.warning(self.base.checkpoint.template)):
            self.reporter.warning(warning)
        return variables

    def _kernels(self) -> Chosen:
        base = self.base
        used = ops_of(
            base.decision.architecture, base.checkpoint.config, base.layout, base.modality
        )
        kernels = choose(installed(base.plugins), self.device, {}, used)
        if self.device.type != "cpu":
            self.reporter.lines(kernels.lines())
        return kernels

    def _load(self, dtype: str, quantization: str, kernels: Chosen) -> Model:
        """The model on the device, with the adapter on it."""
        base, checkpoint = self.base, self.base.checkpoint
        pairs = self.adapter.lora if self.adapter else {}
        deltas = Deltas(self.adapter) if self.adapter else None
        lora = {
            name: Lora(r=pair.r, lora_alpha=pair.scaling * pair.r) for name, pair in pairs.items()
        }
        model = Model(
            base.decision.architecture, checkpoint.config, base.layout, DTYPES[dtype], lora,
            kernels, modality=base.modality,
        ).eval()  # fmt: skip
        size = checkpoint.total_bytes
        with self.reporter.progress("loading the model", size, "bytes") as advance:
            digests = load(
                model, base.layout, checkpoint, device=self.device,
                quantize=quantization == "nf4", progress=advance,
                change=None if deltas is None else partial(deltas.folded_into, dtype=model.dtype),
            )  # fmt: skip
        if self.adapter is not None and deltas is not None:
            self._check_base(self.adapter, fingerprints(base.layout, digests))
            for name, module in model.adapters():
                a, b = deltas.sides(name)
                module.set_lora(a.to(self.device), b.to(self.device))
        return model

    def _check_base(self, adapter: Adapter, present: Mapping[str, str]) -> None:
        """Compare the fingerprints of the loaded parts with those that training recorded."""
        for part, recorded in adapter.binding(self.base.layout).items():
            if present.get(part) != recorded:
                raise InputError(
                    "QC-GENERATE-001",
                    "is not the base that the adapter was trained on",
                    file=self.base.checkpoint.path,
                    field=f"part '{part}'",
                    found=str(present.get(part))[:12],
                    expected=recorded[:12],
                    fix=f"name {adapter.meta.get('model', {}).get('source', 'its base')}",
                )

    def prompt(
        self,
        text: str,
        *,
        media: Sequence[tuple[str, Path]] = (),
        system: str = "",
        max_new_tokens: int = 256,
        seed: int = 0,
        **sampling: Unpack[SamplingOptions],
    ) -> Generated:
        """Answer one user turn.

        Args:
            text: what the user says.
            media: kind and file of each medium that comes before the text; for a Generator made
                with ``media=True``.
            system: the system turn, none when empty.
            max_new_tokens: the most tokens to add.
            seed: of the sampling.
            sampling: fields of `Sampling` by name, such as ``temperature``; ``None`` or absent:
                as generation_config.json says, else greedy and without penalties.

        Raises:
            ValueError: media for a Generator that was not made for them.
            QcoreError: see docs/errors.md.
        """
        config, folder = self.base.checkpoint.generation_config, self.base.checkpoint.path
        chosen, lines = choose_sampling(config, sampling, folder)
        if media and not self._reads_media:
            raise ValueError("media need a Generator that was made with media=True")
        if self._prompt_media is not None:
            self._prompt_media.check_text({"--prompt": text, "--system": system})
        check_prompt(
            self.base.chat_format(), self.tokenizer, {"--prompt": text, "--system": system}
        )
        self.reporter.lines(lines)
        rendered, inputs = self._render(text, media, system)
        ids: list[int] = self.tokenizer.encode(rendered, add_special_tokens=False).ids
        self._warn_of_length(len(ids), max_new_tokens)
        new, stopped = self.decode(ids, max_new_tokens, chosen, seed, inputs)
        return Generated(
            text=self.tokenizer.decode(new, skip_special_tokens=True),
            prompt=rendered,
            prompt_tokens=len(ids),
            tokens=len(new),
            stopped=stopped,
        )

    @property
    def _prompt_media(self) -> PromptMedia | None:
        if self.reader is None:
            return None
        return PromptMedia(self.reader, self.base.checkpoint.path)

    def _render(
        self, text: str, media: Sequence[tuple[str, Path]], system: str
    ) -> tuple[str, list[Medium]]:
        """The rendered prompt, and its media as the tower reads them."""
        template = self.base.checkpoint.template
        assert template is not None  # preflight refuses a checkpoint without one
        messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
        parts = [{"type": kind, kind: kind} for kind, _ in media]
        content = [*parts, {"type": "text", "text": text}] if parts else text
        messages.append({"role": "user", "content": content})
        variables: dict[str, Any] = {
            **special_tokens(self.base.checkpoint.tokenizer_config),
            **self.variables,
        }
        rendered = template.render(messages, add_generation_prompt=True, **variables)
        if not media:
            return rendered, []
        assert self._prompt_media is not None
        inputs = self._prompt_media.read(media)
        self._note_new_kinds([kind for kind, _ in media])
        return self._prompt_media.expand(rendered, inputs), inputs

    def _note_new_kinds(self, kinds: Sequence[str]) -> None:
        """Note what is unlike the adapter's training, as far as its manifest says."""
        adapter = self.adapter
        if adapter is None or "modalities" not in adapter.meta:
            return
        known = {kind for part in adapter.modalities.values() for kind in part.get("kinds", ())}
        if fresh := sorted({*kinds} - known):
            trained = f"text and {', '.join(sorted(known))}" if known else "text alone"
            new = ", ".join(fresh)
            self.reporter.note(f"the adapter was trained on {trained}: {new} is new to it")
        for kind in dict.fromkeys(kinds):
            if own := ", ".join(adapter.keys_of(kind)):
                self.reporter.note(
                    f"the adapter was trained on media of kind {kind} with {own} of their own; "
                    "here they are read by the processor's defaults"
                )

    def _warn_of_length(self, prompt: int, new: int) -> None:
        words = f"{prompt} tokens of the prompt + {new} new ones"
        config = self.base.checkpoint.config
        if (finding := beyond(config, prompt + new, "--max-new-tokens", words)) is not None:
            self.reporter.lines([line(finding)])

    def decode(
        self,
        ids: list[int],
        max_new_tokens: int,
        sampling: Sampling,
        seed: int,
        media: Sequence[Medium] = (),
    ) -> tuple[list[int], bool]:
        """Continue the token ids of a prompt; see `sampling.decode`."""
        positions = inputs = None
        if media:
            assert self._prompt_media is not None
            positions, inputs = self._prompt_media.place(ids, media, self.device)
        return decode(
            self.decoder,
            ids,
            max_new_tokens,
            positions=positions,
            media=inputs,
            known=highest_id(self.tokenizer) + 1,
            stop=self._stop_ids(),
            sampling=sampling,
            seed=seed,
            source=self.base.checkpoint.path,
        )

    def _stop_ids(self) -> set[int | None]:
        """The stop tokens of the generation, and those of generation_config.json."""
        checkpoint = self.base.checkpoint
        named = {self.tokenizer.token_to_id(token) for token in self.chat.stop_tokens}
        return named | stop_ids(checkpoint.generation_config, checkpoint.path)
