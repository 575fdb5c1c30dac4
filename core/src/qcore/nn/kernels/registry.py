"""Chooses the backend of each op of a run: by the user's setting, else by priority.

This file decides that every op has a reference in torch, that a backend is taken only if it
passes its checks (`judge`), and that a backend which the user asks for is taken or the run stops.
If the user asks for none, CPUs use references, and other devices use the backend of the highest
priority that passes; the run reports what it passed over.

Plugins (hook ``qcore_kernels``) and `builtin` provide ops and backends. Nothing here imports
torch; the callables of a record import what they need.

An op is named ``namespace::op``, the namespace being that of the plugin whose blocks ask for it;
core's ops have none. Settings may leave out the namespace if one op of the model has that name.

Codes: ``QC-KERNEL-001`` unknown op, ``-002`` unknown backend, ``-006`` a name that two plugins
provide, ``-007`` an op that the model does not use, ``-008`` a plugin's op without a namespace;
those of `judge` for a backend that the user asks for.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ...api.records import Kernel, Op
from ...errors import Failure, PluginError, QcoreError, UsageError, contained, raise_all
from ...plugins.manager import Plugins
from .builtin import core_kernels, core_ops
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
    "choose",
    "installed",
    "requested",
    "survey",
    "surveyed",
]

CORE = "qcore"  #: owner of core's ops


@dataclass(frozen=True, slots=True, kw_only=True)
class Used:
    """The model that backends are chosen for (`qcore.nn.model.ops_of`).

    Attributes:
        ops: full names of the ops that its blocks ask for.
        config: its config.json.
    """

    ops: Collection[str]
    config: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """The backends of one run on one device.

    Attributes:
        device: ``cuda`` or ``cpu``, as torch names its type.
        table: every backend that was considered, references included.
        functions: the function that replaces the reference, by op.
    """

    device: str
    table: tuple[Line, ...]
    functions: Mapping[str, Callable[..., Any]]

    def get(self, op: str) -> Callable[..., Any] | None:
        """The function that computes `op`, or ``None`` if its reference does."""
        return self.functions.get(op)

    @property
    def backends(self) -> dict[str, str]:
        """Op to backend, references included, for records of the run."""
        return {line.op: line.backend for line in self.table if line.state is State.CHOSEN}

    def lines(self) -> list[str]:
        """The chosen backends on one line, then a line for each that could have been faster."""
        backends = self.backends
        if not backends:
            return []
        if set(backends.values()) == {REFERENCE} and self.device == "cpu":
            return [f"kernels: references in torch for all {len(backends)} ops (cpu)"]
        report = ["kernels: " + ", ".join(f"{op}={name}" for op, name in backends.items())]
        for line in self.table:
            slower = backends[line.op] == REFERENCE and self.device != "cpu"
            if line.state is State.REFUSED and (line.alarming or slower):
                report.append(
                    f"kernel {line.op}={line.backend} is not used: {line.reason}; "
                    f"{backends[line.op]} computes it"
                )
        return report


def installed(plugins: Plugins) -> list[Listed]:
    """The backends of core and of `plugins`, in order of op, then highest priority.

    Raises:
        PluginError: ``QC-KERNEL-006`` or ``-008``; ``QC-PLUGIN-002`` or ``-003`` of a plugin that
            fails.
    """
    records = [(str(info), record) for info, record in plugins.ask("qcore_kernels")]
    backends, problems = _listed(records)
    raise_all(problems)
    return backends


def surveyed(plugins: Plugins) -> tuple[list[Listed], list[QcoreError]]:
    """As `installed`, for reports that must go on: what can be listed, and what is wrong."""
    records, problems = [], []
    for info, answers in plugins.survey("qcore_kernels"):
        if isinstance(answers, QcoreError):
            problems.append(answers)
        else:
            records += [(str(info), record) for record in answers]
    backends, more = _listed(records)
    return backends, [*problems, *more]


def _listed(
    records: Iterable[tuple[str, Op | Kernel]],
) -> tuple[list[Listed], list[QcoreError]]:
    own: list[tuple[str, Op | Kernel]] = [(CORE, op) for op in core_ops()]
    own += [(CORE, kernel) for kernel in core_kernels()]
    every = [*own, *records]
    ops, problems = _declared(every)
    backends: dict[tuple[str, str], Listed] = {}
    for owner, kernel in every:
        if not isinstance(kernel, Kernel):
            continue
        name = (kernel.op, kernel.backend)
        if name in backends or kernel.backend == REFERENCE:
            first = backends[name].owner if name in backends else "the reference"
            problems.append(_twice(f"kernel {kernel.op}={kernel.backend}", first, owner))
        elif problem := _lacks_namespace(kernel.op, owner, ops):
            problems.append(problem)
        else:
            op = ops[kernel.op][1] if kernel.op in ops else Op(name=kernel.op)
            backends[name] = Listed(owner=owner, kernel=kernel, op=op)

    def order(backend: Listed) -> tuple[str, int, str]:
        return backend.kernel.op, -backend.kernel.priority, backend.kernel.backend

    return sorted(backends.values(), key=order), problems


def _declared(
    records: Iterable[tuple[str, Op | Kernel]],
) -> tuple[dict[str, tuple[str, Op]], list[QcoreError]]:
    """Owner and record of each op that is declared, by full name."""
    ops: dict[str, tuple[str, Op]] = {}
    problems: list[QcoreError] = []
    for owner, op in records:
        if not isinstance(op, Op):
            continue
        if op.name in ops:
            problems.append(_twice(f"op {op.name}", ops[op.name][0], owner))
        elif problem := _lacks_namespace(op.name, owner, ops):
            problems.append(problem)
        else:
            ops[op.name] = owner, op
    return ops, problems


def _twice(what: str, first: str, second: str) -> PluginError:
    return PluginError(
        "QC-KERNEL-006",
        f"{what} is provided twice",
        found=f"{first} and {second}",
        fix="uninstall one of them, or ask its author for another name",
    )


def _lacks_namespace(op: str, owner: str, ops: Mapping[str, tuple[str, Op]]) -> PluginError | None:
    """The error of a plugin's op that another plugin's could be mistaken for."""
    namespace, separator, name = op.partition("::")
    if owner == CORE or (separator and namespace and name):
        return None
    if op in ops and ops[op][0] == CORE:
        return None  # another backend of an op of core
    return PluginError(
        "QC-KERNEL-008",
        f"{owner} names an op without a namespace",
        found=op,
        expected=f"namespace::{op.replace(':', '') or 'op'}",
        fix="update the plugin, or uninstall it",
    )


def requested(
    kernels: Sequence[Listed], wanted: Mapping[str, str], used: Collection[str]
) -> dict[str, str]:
    """The backends that a run's settings ask for, by the full name of their op.

    Args:
        kernels: as `installed` returns them.
        wanted: op to backend as the user wrote them; ``reference`` is a backend of every op.
        used: full names of the model's ops; a short name is looked up in these first.

    Raises:
        UsageError: ``QC-KERNEL-001`` for an unknown op or a short name of several ops, ``-002``
            for an unknown backend, ``-007`` for an op that the model does not use;
            ``QC-CONFIG-005`` for an op named twice.
    """
    written = _written(kernels, wanted, used)
    for op, name in written.items():
        if op not in used:
            raise UsageError(
                "QC-KERNEL-007",
                "is an op that this model does not use",
                field=f"{SETTING}.{name}",
                expected=f"one of {', '.join(sorted(used))}",
                fix="leave it out",
            )
    return {op: wanted[name] for op, name in written.items()}


def _written(
    kernels: Sequence[Listed], wanted: Mapping[str, str], used: Collection[str] | None
) -> dict[str, str]:
    """What the user wrote for each op, by the op's full name; backends must exist."""
    ops = list(dict.fromkeys(backend.kernel.op for backend in kernels))
    written: dict[str, str] = {}
    for name, choice in wanted.items():
        op = _full_name(name, ops, used)
        backends = [REFERENCE, *(b.kernel.backend for b in kernels if b.kernel.op == op)]
        if choice not in backends:
            raise _unknown("QC-KERNEL-002", name, "has no such backend", choice, backends)
        if op in written:
            raise UsageError(
                "QC-CONFIG-005",
                f"is given twice: it is the op '{op}'",
                field=f"{SETTING}.{name}",
                fix=f"leave out {written[op]} or {name}",
            )
        written[op] = name
    return written


def _full_name(written: str, ops: Sequence[str], used: Collection[str] | None) -> str:
    """The op that a user means: a full name, or the name of one op without its namespace."""
    if written in ops:
        return written
    matches = [op for op in ops if op.rpartition("::")[2] == written]
    matches = [op for op in matches if used is None or op in used] or matches
    if len(matches) > 1:
        raise UsageError(
            "QC-KERNEL-001",
            "is the name of several ops",
            field=f"{SETTING}.{written}",
            found=written,
            expected="one of " + ", ".join(matches),
            fix="write the full name",
        )
    if not matches:
        raise _unknown("QC-KERNEL-001", written, "is no op", written, ops)
    return matches[0]


def choose(
    kernels: Sequence[Listed],
    device: torch.device,
    wanted: Mapping[str, str],
    used: Used | None = None,
) -> Chosen:
    """Take one backend for each op.

    Args:
        kernels: as `installed` returns them.
        device: where the run computes.
        wanted: op to backend, as in `requested`.
        used: the model; backends of ops that it does not use are verified only if `wanted` names
            them. ``None``: all ops, of no model.

    Raises:
        UsageError: those of `requested` but ``-007``; ``QC-KERNEL-003`` for a backend that the
            user asks for.
        NumericError: ``QC-KERNEL-004``, likewise.
        PluginError: ``QC-KERNEL-005``, likewise.
    """
    written = _written(kernels, wanted, None if used is None else used.ops)
    asked = {op: wanted[name] for op, name in written.items()}
    table: list[Line] = []
    functions: dict[str, Callable[..., Any]] = {}
    for op in dict.fromkeys(backend.kernel.op for backend in kernels):
        mine = used is None or op in used.ops
        if not mine and op not in asked:
            continue
        backends = [backend for backend in kernels if backend.kernel.op == op]
        config = used.config if used is not None and mine else None
        lines, function = (
            _asked(backends, asked[op], device, config)
            if op in asked
            else _best(backends, device, config)
        )
        table += lines
        if function is not None:
            functions[op] = function
    return Chosen(device=device.type, table=tuple(table), functions=functions)


_Config = Mapping[str, Any] | None
_Taken = tuple[list[Line], Callable[..., Any] | None]


def _asked(backends: Sequence[Listed], name: str, device: torch.device, config: _Config) -> _Taken:
    """The backend that the user named; raises if it cannot be used."""
    if name == REFERENCE:
        return [reference(backends, State.CHOSEN, "asked for")], None
    backend = next(backend for backend in backends if backend.kernel.backend == name)
    line, problem = judge(backend, device, config, fresh=False)
    if problem is not None:
        raise problem
    function = contained(backend.kernel.load)
    if isinstance(function, Failure):
        raise raised(backend, function)
    line = replace(line, state=State.CHOSEN, reason="asked for")
    return [line, reference(backends, State.AVAILABLE)], function


def _best(backends: Sequence[Listed], device: torch.device, config: _Config) -> _Taken:
    """The first backend that passes; the reference where none does, and on CPUs."""
    if device.type == "cpu":
        return [reference(backends, State.CHOSEN, "on cpu unless asked for")], None
    lines: list[Line] = []
    chosen: Callable[..., Any] | None = None
    for backend in backends:
        if chosen is not None or backend.kernel.priority <= 0:
            lines.append(line_of(backend, State.AVAILABLE, "not looked at"))
            continue
        line, problem = judge(backend, device, config, fresh=False)
        if problem is None:
            function = contained(backend.kernel.load)
            if not isinstance(function, Failure):
                chosen = function
                line = replace(line, state=State.CHOSEN)
            else:
                line = replace(line, state=State.REFUSED, reason=str(function), alarming=True)
        lines.append(line)
    state = State.AVAILABLE if chosen is not None else State.CHOSEN
    return [*lines, reference(backends, state)], chosen


def survey(kernels: Sequence[Listed], device: torch.device) -> tuple[list[Line], list[QcoreError]]:
    """Verify every backend anew, for a report; raises nothing.

    Returns:
        A line for each backend, marking those that a run takes by default, and the errors of
        backends that run on this device but disagree with the reference, or raise.
    """
    lines: list[Line] = []
    problems: list[QcoreError] = []
    for op in dict.fromkeys(backend.kernel.op for backend in kernels):
        backends = [backend for backend in kernels if backend.kernel.op == op]
        of_op: list[Line] = []
        taken = device.type == "cpu"
        for backend in backends:
            line, problem = judge(backend, device, None, fresh=True)
            if problem is not None and line.alarming:
                problems.append(problem)
            if problem is None and not taken and backend.kernel.priority > 0:
                taken, line = True, replace(line, state=State.CHOSEN)
            of_op.append(line)
        free = all(line.state is not State.CHOSEN for line in of_op)
        state = State.CHOSEN if free else State.AVAILABLE
        lines += [*of_op, reference(backends, state)]
    return lines, problems


def _unknown(code: str, op: str, what: str, name: str, known: Sequence[str]) -> UsageError:
    short = {option.rpartition("::")[2]: option for option in known}
    near = difflib.get_close_matches(name, {**short, **dict.fromkeys(known)}, 1)
    hint = short.get(near[0], near[0]) if near else ""
    return UsageError(
        code,
        what,
        field=f"{SETTING}.{op}",
        found=name,
        expected="one of " + ", ".join(known) if known else "none: no kernel is installed",
        fix=f"did you mean {hint}?" if hint else "qcore doctor --kernels lists them",
    )
