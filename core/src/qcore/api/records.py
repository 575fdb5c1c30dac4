"""Dataclasses that hooks yield: architecture, generation, claim, finding, chat format, kernel.

This file decides the vocabulary between core and plugins. It imports no torch: what needs
torch hangs on a record as a callable that imports inside (`Architecture.build`), so that
type checkers see it and discovery stays light.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from .views import CheckpointView, LayoutView, SettingsView

if TYPE_CHECKING:
    from torch import device as Device

    from .blocks import BuildContext, Tower, Trunk
    from .media import MediaReader


class Severity(str, Enum):
    """What a finding does: stop the verb, warn, or only be told."""

    ERROR = "error"
    WARNING = "warning"
    NOTE = "note"


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """Blocks and names: what one ``model_type`` builds.

    Attributes:
        name: as ``model_type`` names it, e.g. ``llama``.
        model_types: every ``model_type`` that config.json may carry for it.
        root: canonical prefix at which the trunk is mounted.
        build: ``(BuildContext) -> Trunk``; the import of torch happens inside.
        tiny: ``(folder) -> None`` writes a tiny checkpoint with its own tokenizer and
            template, for the demo and for conformance tests.
        media_plugin: distribution that reads media for it, which errors name where it is not
            installed; empty if the author knows none.
    """

    name: str
    model_types: tuple[str, ...]
    root: str
    build: Callable[[BuildContext], Trunk]
    tiny: Callable[[Path], None] | None = None
    media_plugin: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """What changes without a tensor changing: chat rules, defaults, preflight checks.

    Attributes:
        name: ``3.5``.
        architectures: names of the architectures it comes in.
        template_hashes: SHA-256 of its known chat templates, trailing newlines stripped.
        template_inputs: variables that its templates read; another one is evidence against it.
    """

    name: str
    architectures: tuple[str, ...]
    template_hashes: tuple[str, ...] = ()
    template_inputs: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Modality:
    """A tower for architectures it does not own.

    Attributes:
        name: of the modality, and of its part in the table.
        section: the config section that it claims.
        architectures: names of the architectures that it serves.
        root: canonical prefix at which the tower is mounted.
        kinds: types of content parts that its reader reads.
        build: ``(BuildContext) -> Tower``; the import of torch happens inside.
        reader: ``(CheckpointView, tell) -> MediaReader``, of the checkpoint's own processor files;
            ``tell`` takes a line that the user is to read.
    """

    name: str
    section: str
    architectures: tuple[str, ...]
    root: str
    kinds: tuple[str, ...]
    build: Callable[[BuildContext], Tower]
    reader: Callable[[CheckpointView, Callable[[str], None]], MediaReader]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """One observation for or against a generation.

    Attributes:
        field: where it was seen: ``chat template``, ``text_config.bos_token_id``.
        value: what was seen there.
        expected: what this generation would have there; for evidence against it.
        supports: True where only this generation has the value, False where this generation
            cannot have it. A value that several generations have is no evidence.
        pip: distribution of the plugin that fits the value, when this plugin knows one; for
            evidence against the generation.
    """

    field: str
    value: str
    expected: str | None = None
    supports: bool
    pip: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """One plugin's judgement of a checkpoint.

    Attributes:
        generation: name of a `Generation` that this plugin describes, for the architecture that
            the checkpoint's ``model_type`` names.
        evidence: for and against it, in the order in which it is reported.
    """

    generation: str
    evidence: tuple[Evidence, ...] = ()

    @property
    def supporting(self) -> tuple[Evidence, ...]:
        """The evidence for this generation alone."""
        return tuple(item for item in self.evidence if item.supports)

    @property
    def opposing(self) -> tuple[Evidence, ...]:
        """The evidence against it."""
        return tuple(item for item in self.evidence if not item.supports)


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Something that preflight or doctor has to say; `ERROR` stops the verb."""

    code: str
    severity: Severity
    what: str
    file: str | None = None
    field: str | None = None
    found: str | None = None
    expected: str | None = None
    fix: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PreflightRequest:
    """What a guard may look at. Nothing here has read a weight.

    Attributes:
        verb: ``train``, ``plan`` (of a training run), ``merge`` or ``generate``.
        checkpoint: the model folder.
        architecture: name that detection decided.
        generation: name that detection decided.
        layout: the table met with the headers.
        settings: the settings of a training run; ``None`` where the verb has none.
        template_kwargs: variables that the chat template is rendered with.
        token_ids: ids of the tokenizer by token, or empty where there is none.
    """

    verb: str
    checkpoint: CheckpointView
    architecture: str
    generation: str
    layout: LayoutView
    settings: SettingsView | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    token_ids: Mapping[str, int] = field(default_factory=dict)


@runtime_checkable
class ParseReply(Protocol):
    """The inverse of a chat template for one assistant turn; total, without loss of text."""

    def __call__(
        self,
        text: str,
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        thinking: bool = False,
    ) -> dict[str, Any]:
        """Parse what a model generated into a message.

        Args:
            text: the generated text, decoded with special tokens; the end-of-turn token may be
                absent where generation was cut.
            tools: function descriptions; argument values get the types of their schemas.
            thinking: whether the prompt opened a think block, so that `text` begins inside it.

        Returns:
            ``{"role": "assistant", "content": str}``, with ``reasoning_content`` and
            ``tool_calls`` where the text has them. Markup that is not complete stays in
            ``content`` as it is.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class DataFormat:
    """A shape of rows that users have, such as ShareGPT, and its conversion to ``messages``.

    Attributes:
        name: as ``--format`` and reports write it.
        matches: whether a row with these values has this shape; looks at keys and types of values
            only, and never raises.
        convert: the canonical row, ``{"messages": [...], "tools": [...]}`` and so on (see
            docs/data.md); raises `RowError` for a value that it cannot convert.
    """

    name: str
    matches: Callable[[Mapping[str, Any]], bool]
    convert: Callable[[Mapping[str, Any]], dict[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatFormat:
    """How a generation's rendered conversation reads: what is a turn, what is trained.

    Core scans the *rendered* text; a row whose own text holds a control string is refused,
    so a match is always the template's.

    Attributes:
        turn_start: opens a turn, followed by the role and ``role_end``.
        role_end: ends the role's name.
        turn_end: closes a turn; part of the supervised span.
        assistant: name of the role that is trained.
        prompt_tails: what inference puts after the assistant's header, longest first; never
            supervised when a turn begins with it.
        control: strings that a row's own text must not hold.
        roles: roles that a row may use.
        stop_tokens: tokens that end generation.
        parse_arguments: whether tool arguments given as a JSON string become a mapping.
        thinking_switch: variable of the template that turns thinking on and off, such as
            ``enable_thinking``; empty for a format without thinking.
        splits_content: whether the template moves a think block in ``content`` into the
            reasoning; ``None``: core renders a probe to find out.
        call_tags: what the template puts around a tool call; rows may write it as text, too.
        result_tags: the same around the result of a tool.
        parse: the inverse of the template, from the text that a model generated after the prompt
            to the message; ``None`` for a format without a parser.
    """

    turn_start: str
    role_end: str
    turn_end: str
    assistant: str
    prompt_tails: tuple[str, ...]
    control: tuple[str, ...]
    roles: tuple[str, ...]
    stop_tokens: tuple[str, ...]
    parse_arguments: bool = True
    thinking_switch: str = ""
    splits_content: bool | None = None
    call_tags: tuple[str, str] | None = None
    result_tags: tuple[str, str] | None = None
    parse: ParseReply | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """How far a backend is from the float32 reference, on one device.

    An error is relative: the norm of the difference over the norm of the reference. NaN is
    worse than any bound.

    Attributes:
        output: worst error of an output.
        output_bound: most that it may be.
        gradient: worst error of a gradient; 0 for an op that has none.
        gradient_bound: most that it may be.
    """

    output: float
    output_bound: float
    gradient: float = 0.0
    gradient_bound: float = 0.0

    @property
    def good(self) -> bool:
        """Whether both errors are within their bounds."""
        return self.output <= self.output_bound and self.gradient <= self.gradient_bound

    @property
    def text(self) -> str:
        """``output 1.2e-03 (bound 4.0e-03), gradient ...``."""
        text = f"output {self.output:.1e} (bound {self.output_bound:.1e})"
        if self.gradient_bound:
            text += f", gradient {self.gradient:.1e} (bound {self.gradient_bound:.1e})"
        return text


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownBad:
    """Versions of a package with which a backend is known to compute wrongly or to fail.

    Attributes:
        package: the distribution, e.g. ``triton``.
        versions: which of its versions, as pip writes it: ``>=3.4.0,<3.7.1``.
        reason: what goes wrong, in a clause.
        issue: where that is told upstream.
        capability: compute capability of the cards concerned, ``(9, 0)``; ``None``: all.
        unless: a distribution that avoids it when installed.
    """

    package: str
    versions: str
    reason: str
    issue: str
    capability: tuple[int, int] | None = None
    unless: str | None = None


def _runs_anywhere(device: Device) -> str | None:
    return None


def _computes_any(config: Mapping[str, Any]) -> str | None:
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Op:
    """An op that blocks ask for (`BuildContext.kernel`): what its reference in torch does.

    An op without this record has the defaults. Declare an op once, in the plugin whose blocks
    ask for it; other plugins may bring backends of it.

    Attributes:
        name: ``namespace::op``, as ops of torch.library are named: ``acme::rms_norm``. Take your
            plugin's name as the namespace. Ops of core have no namespace: ``cross_entropy``.
        reference_waits: whether the host waits for the device in the reference. A CUDA graph
            cannot capture that, so tokens are then decoded without one.
    """

    name: str
    reference_waits: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """One backend of an op. Every op also has a reference, which no record names.

    Core judges `requires` and `known_bad`, then asks `refuse` and `refuse_model`, then `verify`
    (once per card, versions and sources: passes are kept in the user's cache), and only then
    calls `load`.

    Attributes:
        op: full name of what is computed, e.g. ``acme::rms_norm`` (`Op.name`).
        backend: what computes it, e.g. ``triton``; not ``reference``.
        load: ``() -> function`` with exactly the signature of the op's reference; what it
            needs is imported inside.
        verify: ``(device) -> Verdict``; `qcore.ops.compare` makes one. The
            generators of random numbers are put back afterwards.
        refuse: ``(device) -> why it cannot run there``, or ``None``; must be quick.
        refuse_model: ``(config.json) -> why it cannot compute that model``, or ``None``; asked
            of models that use the op, and not where backends are listed without a model.
        priority: of the backends that can run, the highest is taken; 0 waits to be asked for.
        requires: what must be installed, as pip writes it: ``triton>=3.2``.
        depends_on: distributions that change what it computes where they are installed.
        known_bad: combinations in which it is refused without a try.
        plan: stands in for `load` where a step is planned: what it gives allocates the same
            results, saves the same tensors and allocates the same gradients and workspace for
            tensors on the meta device. ``None``: what `load` gives does, which holds wherever
            kernels are started by `qcore.ops.launch` and torch's ops have a meta form.
        waits: whether the host waits for the device in this backend. A CUDA graph cannot
            capture that, so tokens are then decoded without one.
    """

    op: str
    backend: str
    load: Callable[[], Callable[..., Any]]
    verify: Callable[[Device], Verdict]
    refuse: Callable[[Device], str | None] = _runs_anywhere
    refuse_model: Callable[[Mapping[str, Any]], str | None] = _computes_any
    priority: int = 10
    requires: tuple[str, ...] = ()
    depends_on: tuple[str, ...] = ()
    known_bad: tuple[KnownBad, ...] = ()
    plan: Callable[[], Callable[..., Any]] | None = None
    waits: bool = False
