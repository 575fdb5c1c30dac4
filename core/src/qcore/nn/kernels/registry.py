"""Which backend computes each op of a run: judged, chosen, told.

This file decides that every op has a reference, that a backend is taken only where it passes
(`kernel_judge`), and that a backend asked for is taken or the run stops: nothing falls back from
a wish. Without a wish CPUs use references, and other devices the backend of highest priority
that passes; what was passed over is told.

Which backends there are is said by plugins (hook ``qcore_kernels``) and by `core_kernels`.
Nothing here imports torch; what a record's callables import is theirs.

Codes: ``QC-KERNEL-001`` no such op, ``-002`` no such backend, ``-006`` two of one name, ``-007`` an
op that the model does not use; of one that was asked for, those of `kernel_judge`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ...api.records import Kernel
from ...errors import PluginError, QcoreError, UsageError, raise_all
from ...plugins.info import Failure
from ...plugins.manager import Plugins, contained
from .builtin import core_kernels
from .judge import REFERENCE, SETTING, Line, Listed, State, judge, line_of, raised, reference

if TYPE_CHECKING:
    import torch

__all__ = [
    "REFERENCE",
    "Chosen",
    "Line",
    "Listed",
    "State",
    "Used",
    "check_names",
    "check_used",
    "choose",
    "installed",
    "survey",
    "surveyed",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Used:
    """What backends are chosen for (`qcore.nn.model.ops_of`).

    Attributes:
        ops: the ops that the model consists of.
        config: its config.json.
    """

    ops: Collection[str]
    config: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """The backends of one run on one device.

    Attributes:
        device: ``cuda`` or ``cpu``, as torch names its type.
        table: every backend that was looked at, references included.
        functions: what replaces a reference, by op.
    """

    device: str
    table: tuple[Line, ...]
    functions: Mapping[str, Callable[..., Any]]

    def get(self, op: str) -> Callable[..., Any] | None:
        """The function, or ``None``: the op's reference."""
        return self.functions.get(op)

    @property
    def backends(self) -> dict[str, str]:
        """Op to backend, references included, for records of the run."""
        return {line.op: line.backend for line in self.table if line.state is State.CHOSEN}

    def lines(self) -> list[str]:
        """What is used, on one line, then what a user may want to know was passed over."""
        taken = self.backends
        if not taken:
            return []
        if set(taken.values()) == {REFERENCE} and self.device == "cpu":
            return [f"kernels: references in torch for all {len(taken)} ops (cpu)"]
        told = ["kernels: " + ", ".join(f"{op}={name}" for op, name in taken.items())]
        for line in self.table:
            slower = taken[line.op] == REFERENCE and self.device != "cpu"
            if line.state is State.REFUSED and (line.alarming or slower):
                told.append(
                    f"kernel {line.op}={line.backend} is not used: {line.reason}; "
                    f"{taken[line.op]} computes it"
                )
        return told


def installed(plugins: Plugins) -> list[Listed]:
    """The backends of core and of `plugins`, in order of op, then highest priority.

    Raises:
        PluginError: ``QC-KERNEL-006``; ``QC-PLUGIN-002`` or ``-003`` of a plugin that fails.
    """
    brought = [(str(info), kernel) for info, kernel in plugins.ask("qcore_kernels")]
    found, problems = _listed(brought)
    raise_all(problems)
    return found


def surveyed(plugins: Plugins) -> tuple[list[Listed], list[QcoreError]]:
    """As `installed`, for reports that must go on: what can be listed, and what is wrong."""
    brought, problems = [], []
    for info, answers in plugins.survey("qcore_kernels"):
        if isinstance(answers, QcoreError):
            problems.append(answers)
        else:
            brought += [(str(info), kernel) for kernel in answers]
    found, twice = _listed(brought)
    return found, [*problems, *twice]


def _listed(brought: Iterable[tuple[str, Kernel]]) -> tuple[list[Listed], list[QcoreError]]:
    found: dict[tuple[str, str], Listed] = {}
    problems: list[QcoreError] = []
    for owner, kernel in (*(("qcore", own) for own in core_kernels()), *brought):
        name = (kernel.op, kernel.backend)
        if name in found or kernel.backend == REFERENCE:
            first = found[name].owner if name in found else "the reference"
            twice = PluginError(
                "QC-KERNEL-006",
                f"kernel {kernel.op}={kernel.backend} is brought twice",
                found=f"{first} and {owner}",
                fix="uninstall one of them, or report this to its author",
            )
            problems.append(twice)
            continue
        found[name] = Listed(owner=owner, kernel=kernel)

    def order(one: Listed) -> tuple[str, int, str]:
        return one.kernel.op, -one.kernel.priority, one.kernel.backend

    return sorted(found.values(), key=order), problems


def choose(
    kernels: Sequence[Listed],
    device: torch.device,
    wanted: Mapping[str, str],
    used: Used | None = None,
) -> Chosen:
    """Take one backend for each op.

    Args:
        kernels: what `installed` gave.
        device: where the run computes.
        wanted: op to backend; ``reference`` is one of every op.
        used: what the run consists of; a backend of no other op is verified unless it is
            asked for. ``None``: all ops, of no model.

    Raises:
        UsageError: ``QC-KERNEL-001`` to ``-003``, of a backend that was asked for.
        NumericError: ``QC-KERNEL-004``, likewise.
        PluginError: ``QC-KERNEL-005``, likewise.
    """
    check_names(kernels, wanted)
    ops = list(dict.fromkeys(one.kernel.op for one in kernels))
    table: list[Line] = []
    functions: dict[str, Callable[..., Any]] = {}
    for op in ops:
        mine = used is None or op in used.ops
        if not mine and op not in wanted:
            continue
        backends = [one for one in kernels if one.kernel.op == op]
        config = used.config if used is not None and mine else None
        lines, function = (
            _asked(backends, wanted[op], device, config)
            if op in wanted
            else _best(backends, device, config)
        )
        table += lines
        if function is not None:
            functions[op] = function
    return Chosen(device=device.type, table=tuple(table), functions=functions)


def check_names(kernels: Sequence[Listed], wanted: Mapping[str, str]) -> None:
    """Refuse an op, or a backend of one, that nobody brought; whether it runs is not asked.

    Raises:
        UsageError: ``QC-KERNEL-001`` or ``-002``.
    """
    ops = list(dict.fromkeys(one.kernel.op for one in kernels))
    for op, name in wanted.items():
        if op not in ops:
            raise _unknown("QC-KERNEL-001", op, "is no op", op, ops)
        names = [REFERENCE, *(one.kernel.backend for one in kernels if one.kernel.op == op)]
        if name not in names:
            raise _unknown("QC-KERNEL-002", op, "has no such backend", name, names)


def check_used(wanted: Iterable[str], used: Collection[str]) -> None:
    """Refuse a backend of an op that the model does not have: it would have no effect.

    Args:
        wanted: ops that the settings name; `check_names` has accepted them.
        used: ops of the model (`model.ops_of`).

    Raises:
        UsageError: ``QC-KERNEL-007``.
    """
    for op in wanted:
        if op not in used:
            raise UsageError(
                "QC-KERNEL-007",
                "is an op that this model does not use",
                field=f"kernels.{op}",
                expected=f"one of {', '.join(sorted(used))}",
                fix="leave it out",
            )


_Config = Mapping[str, Any] | None
_Taken = tuple[list[Line], Callable[..., Any] | None]


def _asked(backends: Sequence[Listed], name: str, device: torch.device, config: _Config) -> _Taken:
    """The backend that the user named, or the error that it is."""
    if name == REFERENCE:
        return [reference(backends, State.CHOSEN, "asked for")], None
    one = next(one for one in backends if one.kernel.backend == name)
    line, problem = judge(one, device, config, fresh=False)
    if problem is not None:
        raise problem
    function = contained(one.kernel.load)
    if isinstance(function, Failure):
        raise raised(one, function)
    line = replace(line, state=State.CHOSEN, reason="asked for")
    return [line, reference(backends, State.AVAILABLE)], function


def _best(backends: Sequence[Listed], device: torch.device, config: _Config) -> _Taken:
    """The first that passes; the reference where none does, and on CPUs."""
    if device.type == "cpu":
        return [reference(backends, State.CHOSEN, "on cpu unless asked for")], None
    lines: list[Line] = []
    chosen: Callable[..., Any] | None = None
    for one in backends:
        if chosen is not None or one.kernel.priority <= 0:
            lines.append(line_of(one, State.AVAILABLE, "not looked at"))
            continue
        line, problem = judge(one, device, config, fresh=False)
        if problem is None:
            function = contained(one.kernel.load)
            if not isinstance(function, Failure):
                chosen = function
                line = replace(line, state=State.CHOSEN)
            else:
                line = replace(line, state=State.REFUSED, reason=str(function), alarming=True)
        lines.append(line)
    state = State.AVAILABLE if chosen is not None else State.CHOSEN
    return [*lines, reference(backends, state)], chosen


def survey(kernels: Sequence[Listed], device: torch.device) -> tuple[list[Line], list[QcoreError]]:
    """Every backend verified anew, which a run without wishes takes, and what is wrong.

    Raises nothing. Wrong is a backend that runs here and computes something else, or raises.
    """
    lines: list[Line] = []
    problems: list[QcoreError] = []
    for op in dict.fromkeys(one.kernel.op for one in kernels):
        backends = [one for one in kernels if one.kernel.op == op]
        found: list[Line] = []
        taken = device.type == "cpu"
        for one in backends:
            line, problem = judge(one, device, None, fresh=True)
            if problem is not None and line.alarming:
                problems.append(problem)
            if problem is None and not taken and one.kernel.priority > 0:
                taken, line = True, replace(line, state=State.CHOSEN)
            found.append(line)
        free = all(line.state is not State.CHOSEN for line in found)
        state = State.CHOSEN if free else State.AVAILABLE
        lines += [*found, reference(backends, state)]
    return lines, problems


def _unknown(code: str, op: str, what: str, name: str, known: Sequence[str]) -> UsageError:
    near = difflib.get_close_matches(name, known, 1)
    return UsageError(
        code,
        what,
        field=f"{SETTING}.{op}",
        found=name,
        expected="one of " + ", ".join(known) if known else "none: no kernel is installed",
        fix=f"did you mean {near[0]}?" if near else "qcore doctor --kernels lists them",
    )
