"""Decides which architecture and which generation a checkpoint is, from the claims of plugins.

This file decides two axes. The architecture follows from ``model_type`` alone. The generation
follows from evidence for a generation (this one and no other) and against it (cannot be this
one), which plugins give for their own generations. Core adds two observations against one that
only core can make, because they need the records of all generations: a template that another
generation lists by hash, and a template input that this one does not list. No evidence is
weighed and no plugin has priority.

What counts as evidence is left to the plugins.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..api.records import Architecture, Claim, Evidence, Generation, Modality
from ..errors import InputError, PluginError, QcoreError, UsageError
from ..io.entry_points import DISABLE, Status, normal
from .info import Described, Owned, PluginInfo

if TYPE_CHECKING:
    from ..checkpoint.checkpoint import Checkpoint
    from .manager import Plugins


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What a checkpoint is, and why.

    Attributes:
        architecture: what its ``model_type`` builds.
        architecture_plugin: who brought the architecture.
        generation: what the evidence says, or ``--generation`` where it says nothing.
        plugin: who brought the generation.
        supporting: the evidence for it; empty when forced.
        modalities: what installed plugins add for sections that config.json has.
        evidence: one line a reason, for people.
        forced: whether ``--generation`` decided.
    """

    architecture: Architecture
    architecture_plugin: PluginInfo
    generation: Generation
    plugin: PluginInfo
    supporting: tuple[Evidence, ...]
    modalities: tuple[Modality, ...]
    evidence: tuple[str, ...]
    forced: bool = False


@dataclass(frozen=True, slots=True)
class _Case:
    """One generation's claim with core's own evidence added."""

    generation: Owned[Generation]
    supporting: tuple[Evidence, ...]
    opposing: tuple[Evidence, ...]

    @property
    def name(self) -> str:
        return self.generation.record.name


def detect(
    checkpoint: Checkpoint,
    plugins: Plugins,
    generation: str | None = None,
    *,
    named_by: str = "named by --generation",
) -> Decision:
    """Decide architecture and generation of a checkpoint.

    Args:
        checkpoint: the model folder; config and template are looked at, no weight.
        plugins: the installed ones, or the scope of the model type; only plugins that index
            it are imported.
        generation: what the user named with ``--generation``; accepted only where the
            evidence leaves it open.
        named_by: who named `generation`, for the evidence.

    Raises:
        PluginError: ``QC-DETECT-001`` no architecture for the model type, ``-002`` two,
            ``-005`` signs of several generations, ``-006`` a generation whose plugin is not
            installed, ``-008`` a plugin claims what is not its own; and what
            `Plugins.for_model_type` and `Plugins.ask` raise.
        InputError: ``QC-DETECT-003`` unproven, ``-004`` contradicted.
        UsageError: ``QC-DETECT-007`` a generation that the evidence does not admit.
    """
    model_type = str(checkpoint.config["model_type"])
    scope = plugins.for_model_type(model_type)
    architecture = _architecture(checkpoint, model_type, plugins, scope)
    described = scope.describe()
    claims = scope.ask("qcore_detect", checkpoint=checkpoint)
    cases = _cases(checkpoint, architecture.record, described, claims)
    chosen, forced = _choose(checkpoint, cases, generation, plugins.installed.infos)
    return Decision(
        architecture=architecture.record,
        architecture_plugin=architecture.plugin,
        generation=chosen.generation.record,
        plugin=chosen.generation.plugin,
        supporting=chosen.supporting,
        modalities=_modalities(checkpoint.config, architecture.record, described),
        evidence=(
            f"architecture {architecture.record.name}: model_type {model_type}, "
            f"{architecture.plugin}",
            *_lines(chosen, cases, named_by if forced else ""),
        ),
        forced=forced,
    )


def _architecture(
    checkpoint: Checkpoint, model_type: str, plugins: Plugins, scope: Plugins
) -> Owned[Architecture]:
    found = [
        owned
        for owned in scope.records()
        if isinstance(owned.record, Architecture) and model_type in owned.record.model_types
    ]
    if len(found) == 1:
        return found[0]
    config = checkpoint.path / "config.json"
    if found:
        raise PluginError(
            "QC-DETECT-002",
            f"two architectures claim '{model_type}'",
            found=" and ".join(f"'{owned.record.name}' of {owned.plugin}" for owned in found),
            file=config,
            field="model_type",
            fix=f"uninstall one of them, or set {DISABLE} to its distribution",
        )
    served = plugins.installed.model_types
    off = [info for info in served.get(model_type, ()) if info.status is Status.DISABLED]
    others = [
        kind
        for kind, infos in served.items()
        if kind != model_type and any(info.usable for info in infos)
    ]
    raise PluginError(
        "QC-DETECT-001",
        "no installed plugin builds it",
        file=config,
        field="model_type",
        found=repr(model_type),
        expected=f"one of {', '.join(others)}" if others else "a plugin; none is installed",
        fix=f"take '{off[0].name}' out of {DISABLE}"
        if off
        else "install the plugin for this model; `qcore plugins list` shows what is there",
    )


def _cases(
    checkpoint: Checkpoint,
    architecture: Architecture,
    described: Described,
    claims: Iterable[tuple[PluginInfo, Claim]],
) -> list[_Case]:
    cases: dict[str, _Case] = {}
    generations = {
        name: owned
        for name, owned in described.generations.items()
        if architecture.name in owned.record.architectures
    }
    for info, claim in claims:
        owned = generations.get(claim.generation)
        fault = None
        if owned is None or owned.plugin.name != info.name:
            fault = f"generation '{claim.generation}', which it does not describe for this"
        elif claim.generation in cases:
            fault = f"generation '{claim.generation}' twice"
        if fault is not None or owned is None:
            raise PluginError(
                "QC-DETECT-008",
                f"{info} claims {fault}",
                file=checkpoint.source,
                fix=f"update or uninstall {info.distribution}, or leave it out with "
                f"{DISABLE}={info.name}",
            )
        opposing = (*claim.opposing, *_opposing(checkpoint, owned.record, generations))
        cases[claim.generation] = _Case(owned, claim.supporting, opposing)
    return [cases[name] for name in sorted(cases)]


def _opposing(
    checkpoint: Checkpoint, generation: Generation, all_: Mapping[str, Owned[Generation]]
) -> list[Evidence]:
    """Core's evidence against a generation: it needs the records of all generations."""
    template = checkpoint.template
    if template is None or template.sha256 in generation.template_hashes:
        return []
    opposing = [
        Evidence(
            supports=False,
            field="chat template",
            value=f"sha256 {template.sha256[:12]}, the one of {other.record.name}",
            expected=f"a template of {generation.name}",
        )
        for other in all_.values()
        if template.sha256 in other.record.template_hashes
    ]
    # An empty list says nothing: a generation that states no inputs excludes none.
    if generation.template_inputs:
        unknown = template.switches() - set(generation.template_inputs)
        if unknown:
            opposing.append(
                Evidence(
                    supports=False,
                    field="chat template",
                    value=f"reads {', '.join(sorted(unknown))}",
                    expected=f"only variables that {generation.name} has",
                )
            )
    return opposing


def _choose(
    checkpoint: Checkpoint, cases: list[_Case], named: str | None, infos: list[PluginInfo]
) -> tuple[_Case, bool]:
    """The table of outcomes; the flag tells whether ``--generation`` decided."""
    if cases and named is not None and named not in [case.name for case in cases]:
        raise UsageError(
            "QC-DETECT-007",
            "names no generation that an installed plugin claims for this checkpoint",
            field="--generation",
            found=repr(named),
            expected=" or ".join(case.name for case in cases),
            fix="leave --generation out, or install the plugin that brings it",
        )
    open_ = [case for case in cases if not case.opposing]
    proven = [case for case in open_ if case.supporting]
    if len(proven) == 1:
        if named not in (None, proven[0].name):
            raise UsageError(
                "QC-DETECT-007",
                "contradicts the evidence",
                field="--generation",
                found=repr(named),
                expected=f"{proven[0].name}, because {_line(proven[0].supporting[0])}",
                fix="leave --generation out",
            )
        return proven[0], False
    if proven:
        raise PluginError(
            "QC-DETECT-005",
            "has signs of several generations",
            file=checkpoint.source,
            found="; ".join(
                f"{case.name} ({case.generation.plugin.name}): {_line(case.supporting[0])}"
                for case in proven
            ),
            expected="signs of one",
            fix=f"set {DISABLE} to the plugin that is wrong, and report it to its authors",
        )
    if open_:
        for case in open_:
            if case.name == named:
                return case, True
        names = [case.name for case in open_]
        barred = [
            f"; {case.name} is barred: {_line(case.opposing[0])}" for case in cases if case.opposing
        ]
        raise InputError(
            "QC-DETECT-003",
            f"its generation is not proven{''.join(barred)}",
            file=checkpoint.source,
            found=f"nothing that tells {' or '.join(names)} from others",
            expected="a known chat template or config.json as published",
            fix=f"if you know what it is, add --generation {' or --generation '.join(names)}",
        )
    raise _contradicted(checkpoint, cases, infos)


def _contradicted(
    checkpoint: Checkpoint, cases: list[_Case], infos: list[PluginInfo]
) -> QcoreError:
    """All are excluded: a plugin is missing where evidence names it, else the files disagree."""
    known = {normal(info.distribution): info for info in infos}
    for item in (item for case in cases for item in case.opposing if item.pip):
        info = known.get(normal(item.pip or ""))
        if info is None or info.status is Status.DISABLED:
            install = f"pip install {item.pip}"
            return PluginError(
                "QC-DETECT-006",
                f"needs {item.pip}, which is {'disabled' if info else 'not installed'}",
                file=checkpoint.source,
                found="; ".join(_barred(cases)),
                fix=f"take '{info.name}' out of {DISABLE}" if info else install,
            )
    what = "fits no installed generation" if cases else "no installed plugin knows its generation"
    return InputError(
        "QC-DETECT-004",
        what,
        file=checkpoint.source,
        found="; ".join(_barred(cases)) or None,
        fix="restore the config.json and chat template that came with the weights, or install "
        "the plugin of their generation",
    )


def _barred(cases: Sequence[_Case]) -> list[str]:
    return [f"not {case.name}: {_line(case.opposing[0])}" for case in cases if case.opposing]


def _line(item: Evidence) -> str:
    expected = "" if item.supports or item.expected is None else f", expected {item.expected}"
    return f"{item.field}: {item.value}{expected}"


def _lines(chosen: _Case, cases: list[_Case], named_by: str) -> list[str]:
    name = f"generation {chosen.name}"
    lines = [f"{name}: {_line(item)}" for item in chosen.supporting]
    if named_by:
        lines.append(f"{name}: {named_by}; nothing proves or bars it")
    return lines + _barred(cases)


def _modalities(
    config: Mapping[str, object], architecture: Architecture, described: Described
) -> tuple[Modality, ...]:
    return tuple(
        owned.record
        for owned in described.modalities.values()
        if architecture.name in owned.record.architectures
        and config.get(owned.record.section) is not None
    )
