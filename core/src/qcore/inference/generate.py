"""Generate: a prompt through the checkpoint's own template and the plugin's own blocks.

This file decides the decoding loop: one prefill, then one token at a time, greedy or sampled,
until a stop token; how a token is computed is `decoding`'s. An adapter is applied as training
applied it, on the base that it is bound to. It is meant for seeing an effect, not for serving.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..adapter.delta import Deltas
from ..adapter.peft_names import Adapter
from ..adapter.reader import read_adapter
from ..api.blocks import Media
from ..api.media import MediaReader, Medium, Placed, RowError
from ..checkpoint.fingerprint import fingerprints
from ..checkpoint.tokenizer import load_tokenizer
from ..config.frozen_map import Entries, Plain
from ..data.masking import highest_id
from ..data.media_files import Finder, Reference
from ..data.template_kwargs import check_variables, recorded_variables, special_tokens
from ..errors import InputError, NumericError, UsageError
from ..nn.device import DTYPES, pick_device
from ..nn.kernels.registry import choose, installed
from ..nn.load import load
from ..nn.model import Model, ops_of
from ..nn.qlora.lora_layer import Lora
from ..plugins.resolve_model import Identified, identify
from ..preflight.checks import line, preflight
from ..preflight.context_length import beyond
from ..preflight.modality import reader_of, unread
from ..reporting import Reporter
from .decoder import Decoder, way_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Generated:
    """What came out.

    Attributes:
        text: the new text, special tokens skipped.
        prompt: the rendered prompt.
        prompt_tokens: its length.
        tokens: new tokens, the stop token included.
        stopped: whether a stop token ended it.
    """

    text: str
    prompt: str
    prompt_tokens: int
    tokens: int
    stopped: bool


class Generator:
    """A model loaded for decoding. Loading is the slow part; `prompt` may be called often.

    Prompts are rendered with the template variables that the adapter was trained with;
    ``chat_template_kwargs`` overrides them one by one.

    Raises:
        InputError: ``QC-GENERATE-001`` when the adapter was trained on another base.
        UsageError: ``QC-CONFIG-008``, ``-009`` a variable that cannot be set.
    """

    def __init__(
        self,
        model: str,
        *,
        adapter: str | Path | None = None,
        trust_base: bool = False,
        device: str = "auto",
        dtype: str = "bf16",
        quantization: str = "none",
        generation: str = "",
        chat_template_kwargs: Mapping[str, Plain] | None = None,
        media: bool = False,
        reporter: Reporter | None = None,
    ) -> None:
        tell = self.reporter = reporter or Reporter()
        self.device = pick_device(device)
        self.found: Identified = identify(model, generation=generation)
        self.reader = self._media_reader() if media else reader_of(self.found, tell)
        self._sees = media
        self._told: Adapter | None = None
        self.chat = self.found.chat_format()
        self.tokenizer = load_tokenizer(self.found.checkpoint)
        ids = self.tokenizer.get_vocab()
        told = self._read(adapter, trust_base) if adapter else None
        if told is not None:
            self.found = self.found.using_parts(told.parts)
        if media and (modality := self.found.modality) is not None:
            self.found = self.found.using(modality)
            self._told = told
        self.variables = self._variables(told, chat_template_kwargs or {}, tell)
        lines = preflight(
            self.found, verb="generate", template_kwargs=self.variables, token_ids=ids
        )
        tell.lines(lines)
        lora = {
            name: Lora(r=pair.r, lora_alpha=pair.scaling * pair.r)
            for name, pair in (told.pairs.items() if told else ())
        }
        checkpoint, layout = self.found.checkpoint, self.found.layout
        architecture = self.found.decision.architecture
        used = ops_of(architecture, checkpoint.config, layout, self.found.modality)
        kernels = choose(installed(self.found.plugins), self.device, {}, used)
        for text in kernels.lines() if self.device.type != "cpu" else ():
            tell.note(text)
        net = Model(
            architecture, checkpoint.config, layout, DTYPES[dtype], lora, kernels,
            modality=self.found.modality,
        )  # fmt: skip
        self.model = net.eval()
        quantize = quantization == "nf4"
        with tell.progress("loading the model", checkpoint.total_bytes, "bytes") as advance:
            digests = load(
                self.model,
                layout,
                checkpoint,
                device=self.device,
                quantize=quantize,
                progress=advance,
            )
        if told is not None:
            self._apply(told, fingerprints(layout, digests))
        way, reason = way_of(kernels)
        if reason:
            tell.note(f"tokens are computed without a captured graph: {reason}")
        self.decoder = Decoder(self.model, self.device, way)

    def _media_reader(self) -> MediaReader:
        reader = reader_of(self.found, self.reporter)
        if reader is None:
            raise UsageError(
                "QC-GENERATE-005",
                "cannot read media",
                file=self.found.checkpoint.path,
                found=unread(self.found),
                fix="leave the files out, or install the plugin that reads them",
            )
        return reader

    def _tell_of_kinds(self, media: Sequence[tuple[str, Path]]) -> None:
        """Media are computed with any adapter; what is unlike its training is said, where known."""
        if self._told is None or "modalities" not in self._told.meta:
            return
        seen = {kind for one in self._told.modalities.values() for kind in one.get("kinds", ())}
        if fresh := sorted({kind for kind, _ in media} - seen):
            trained = f"text and {', '.join(sorted(seen))}" if seen else "text alone"
            new = ", ".join(fresh)
            self.reporter.note(f"the adapter was trained on {trained}: {new} is new to it")
        for kind in dict.fromkeys(kind for kind, _ in media):
            if own := ", ".join(self._told.keys_of(kind)):
                self.reporter.note(
                    f"the adapter was trained on media of kind {kind} with {own} of their own; "
                    "here they are read by the processor's defaults"
                )

    def _variables(
        self, adapter: Adapter | None, given: Mapping[str, Plain], tell: Reporter
    ) -> Entries[Plain]:
        """Template variables: those that the adapter was trained with, under those given."""
        template = self.found.checkpoint.template
        recorded = Entries() if adapter is None else recorded_variables(adapter.meta, adapter.path)
        if template is not None:
            check_variables(template, given)
            try:
                check_variables(template, recorded)
            except UsageError as error:
                raise InputError(
                    "QC-GENERATE-004",
                    "was trained with a variable that this chat template does not read",
                    file=None if adapter is None else adapter.path,
                    field=error.field,
                    expected=error.expected,
                    fix="name the base that it was trained on",
                ) from None
        variables = Entries({**recorded, **given})
        if variables:
            source = "--chat-template-kwargs" if given else "as the adapter was trained"
            if given and recorded:
                source += ", over what the adapter was trained with"
            tell.note(f"the chat template is rendered with {variables} ({source})")
        return variables

    def _read(self, adapter: str | Path, trust_base: bool) -> Adapter:
        claims = self.found.adapter_claims
        return read_adapter(adapter, self.found.layout, trust_base=trust_base, claims=claims)

    def _apply(self, adapter: Adapter, now: dict[str, str]) -> None:
        for part, recorded in adapter.binding(self.found.layout).items():
            if now.get(part) != recorded:
                raise InputError(
                    "QC-GENERATE-001",
                    "is not the base that the adapter was trained on",
                    file=self.found.checkpoint.path,
                    field=f"part '{part}'",
                    found=str(now.get(part))[:12],
                    expected=recorded[:12],
                    fix=f"name {adapter.meta.get('model', {}).get('source', 'its base')}",
                )
        deltas = Deltas(adapter)
        for name, module in self.model.adapters():
            a, b = deltas.sides(name)
            module.set_lora(a.to(self.device), b.to(self.device))

    def prompt(
        self,
        text: str,
        *,
        media: Sequence[tuple[str, Path]] = (),
        system: str = "",
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> Generated:
        """Answer one user turn.

        Raises:
            ValueError: media for a Generator that was not made for them.
            QcoreError: see docs/errors.md.

        Args:
            text: what the user says.
            media: kind and file of each part that comes before the text; for a Generator made
                with ``media=True``.
            system: the system turn, none when empty.
            max_new_tokens: when to stop at the latest.
            temperature: 0 is greedy.
            seed: of the sampling.
        """
        if temperature and not 0.01 <= temperature <= 100:
            raise UsageError(
                "QC-GENERATE-003",
                "is no temperature",
                field="--temperature",
                found=temperature,
                expected="0 for greedy, or 0.01 to 100",
            )
        if media and not self._sees:
            raise ValueError("media need a Generator that was made with media=True")
        self._check_text({"--prompt": text, "--system": system})
        template = self.found.checkpoint.template
        assert template is not None  # preflight refused it otherwise
        messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
        parts = [{"type": kind, kind: kind} for kind, _ in media]
        whole = [*parts, {"type": "text", "text": text}] if parts else text
        messages.append({"role": "user", "content": whole})
        given: dict[str, Any] = {
            **special_tokens(self.found.checkpoint.tokenizer_config),
            **self.variables,
        }
        rendered = template.render(messages, add_generation_prompt=True, **given)
        seen = self._look(media)
        self._tell_of_kinds(media)
        if self.reader is not None and seen:
            rendered = self._expanded(rendered, seen)
        ids: list[int] = self.tokenizer.encode(rendered, add_special_tokens=False).ids
        self._warn(len(ids), max_new_tokens)
        new, stopped = self.decode(ids, max_new_tokens, temperature, seed, seen)
        return Generated(
            text=self.tokenizer.decode(new, skip_special_tokens=True),
            prompt=rendered,
            prompt_tokens=len(ids),
            tokens=len(new),
            stopped=stopped,
        )

    def _check_text(self, said: Mapping[str, str]) -> None:
        """Refuse what would stand for media that there are not."""
        control = () if self.reader is None else self.reader.control
        for field, text in said.items():
            for token in control:
                if token in text:
                    raise UsageError(
                        "QC-GENERATE-006",
                        "holds text that stands for media",
                        field=field,
                        found=repr(token),
                        expected="plain text: the chat template writes it",
                        fix="leave it out",
                    )

    def _expanded(self, rendered: str, media: Sequence[Medium]) -> str:
        assert self.reader is not None
        try:
            return self.reader.expand(rendered, media)
        except RowError as bad:
            raise InputError(
                bad.code, bad.what, file=self.found.checkpoint.path, found=bad.found,
                expected=bad.expected, fix="use the chat template that came with the weights",
            ) from None  # fmt: skip

    def _warn(self, prompt: int, new: int) -> None:
        words = f"{prompt} tokens of the prompt + {new} new ones"
        config = self.found.checkpoint.config
        if (finding := beyond(config, prompt + new, "--max-new-tokens", words)) is not None:
            self.reporter.lines([line(finding)])

    def _look(self, media: Sequence[tuple[str, Path]]) -> list[Medium]:
        """Files as the tower will see them."""
        found = []
        for kind, path in media:
            assert self.reader is not None
            try:
                # Whoever runs this names the file: a link may lead where it likes.
                real = Path(os.path.realpath(path))
                part = Reference(kind=kind, at=f"--{kind}", given=f"./{real.name}", options={})
                payload = Finder(real.parent).payload(part)
                found.append(self.reader.read(payload))
            except RowError as bad:
                raise _of_file(bad, kind, path) from None
        return found

    def _placed(self, ids: list[int], media: Sequence[Medium]) -> Placed:
        assert self.reader is not None
        try:
            return self.reader.place(ids, media)
        except RowError as bad:
            raise InputError(
                bad.code, bad.what, file=self.found.checkpoint.path, found=bad.found,
                expected=bad.expected, fix=bad.fix,
            ) from None  # fmt: skip

    def decode(
        self,
        ids: list[int],
        max_new_tokens: int,
        temperature: float,
        seed: int,
        media: Sequence[Medium] = (),
    ) -> tuple[list[int], bool]:
        """Token ids of a prompt -> new ids, and whether a stop token came."""
        positions = seen = None
        if media:
            assert self.reader is not None
            placed = self._placed(ids, media)
            positions = torch.tensor([list(axis) for axis in placed.positions]).to(self.device)
            where = torch.tensor(placed.where, dtype=torch.int64)
            seen = self.reader.batch(media, where).to(self.device)
        return decode(
            self.decoder,
            ids,
            max_new_tokens,
            positions=positions,
            media=seen,
            known=highest_id(self.tokenizer) + 1,
            stop={self.tokenizer.token_to_id(token) for token in self.chat.stop_tokens},
            temperature=temperature,
            seed=seed,
            source=self.found.checkpoint.path,
        )


def _of_file(bad: RowError, kind: str, path: Path) -> InputError:
    """What is wrong with a file that an option names: no row's path, and no row's fix."""
    missing = bad.code == "QC-MEDIA-002" and not os.path.lexists(path)
    remote = ":/" in str(path)  # as a path spells "://"
    return InputError(
        bad.code,
        "is no file, and nothing is fetched" if missing and remote else bad.what,
        file=path,
        field=f"--{kind}",
        found=None if missing else bad.found,
        expected="a file" if missing else bad.expected,
        # A row names the kind in its part; here the option does.
        fix=re.sub(r'\{"type": "(\w+)"\}', r"--\1", bad.fix) if bad.fix else None,
    )


@torch.inference_mode()
def decode(
    decoder: Decoder,
    ids: list[int],
    max_new_tokens: int,
    *,
    known: int,
    positions: Tensor | None = None,
    media: Media | None = None,
    stop: Collection[int | None] = (),
    temperature: float = 0.0,
    seed: int = 0,
    source: object | None = None,
) -> tuple[list[int], bool]:
    """Token ids of a prompt -> new ids, and whether a stop token came.

    Args:
        decoder: of the model.
        ids: the prompt.
        max_new_tokens: when to stop at the latest.
        known: ids from this on are padding of the embedding: never sampled.
        positions: of the prompt, as `Decoder.start`.
        media: what a tower reads of the prompt.
        stop: ids that end it; ``None``, of a token that there is not, is none.
        temperature: 0 is greedy.
        seed: of the sampling.
        source: the model, for an error.

    Raises:
        NumericError: ``QC-GENERATE-002`` for logits that are no numbers.
    """
    sampler = torch.Generator(decoder.device).manual_seed(seed)
    new: list[int] = []
    fresh = torch.tensor(ids, device=decoder.device)
    while len(new) < max_new_tokens:
        if new:
            logits = decoder.next(fresh)[:known]
        else:
            room = len(ids) + max_new_tokens
            logits = decoder.start(fresh, room, positions, media)[:known]
        finite = logits.isfinite().all()
        if temperature > 0:
            # Without numbers there is nothing to draw from, which would stop the device.
            scores = torch.where(finite, logits, 0.0)
            fresh = torch.multinomial(F.softmax(scores / temperature, -1), 1, generator=sampler)
        else:
            fresh = logits.argmax().reshape(1)
        # The one time in a token that the host waits for the device.
        token, good = torch.stack((fresh[0], finite.long())).tolist()
        if not good:
            raise NumericError(
                "QC-GENERATE-002",
                f"the logits are not finite after {decoder.done} tokens",
                file=source,
                fix="look at the adapter, or at the base with qcore inspect",
            )
        new.append(token)
        if token in stop:
            return new, True
    return new, False
