"""Runs one command with one fault, then again until it is finished, and says what happened.

This file decides the verdict of a disturbed run. Which faults are put where, `points` decides.
"""

from __future__ import annotations

import re
import shutil
import signal
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from qcore.io.artifact import verify
from torture.client import Client, Command, Ended
from torture.judge import Print, differences, fingerprint, uncleanness
from torture.shim import Call, Control, Fault
from torture.suites import Suite, adapter_commands, merge_command

_OUT: Final = "out"
_RUN: Final = "out.run"
_CHECKPOINT: Final = re.compile(r"\.run/checkpoint-\d+$")
_AGAIN: Final = 3  #: how often a command that was disturbed is started again


@dataclass(frozen=True, slots=True)
class Reference:
    """The undisturbed run of a suite.

    Attributes:
        before: folder with the state before; copied for each run.
        old: what stands under the output's name before.
        result: what stands there afterwards.
        calls: that changed files.
        seconds: it took.
        names: what the working folder holds in the end.
        digests: what stock transformers reads from the old and the new result of a peer.
    """

    before: Path
    old: Print
    result: Print
    calls: tuple[Call, ...]
    seconds: float
    names: tuple[str, ...]
    digests: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What happened at a point.

    Attributes:
        verdict: one of `judge.VERDICTS`; ``missed`` where the fault was never met.
        detail: what differs, in words.
        seconds: of the disturbed run and those after it.
        left: temporary names that the runs left, and an undisturbed run does not.
        count: how many cases the point stands for.
        also: outcomes of single cases among them that were not as they should be.
    """

    verdict: str
    detail: str = ""
    seconds: float = 0.0
    left: tuple[str, ...] = ()
    count: int = 1
    also: tuple[Outcome, ...] = ()


class Bench:
    """A scratch folder, a client, and the references of suites.

    Args:
        scratch: folder of working folders and states.
        inputs: as `suites.make_inputs` writes them.
        client: starts the commands.
    """

    def __init__(self, scratch: Path, inputs: Path, client: Client) -> None:
        self.scratch, self.inputs, self.client = scratch, inputs, client
        self.work = scratch / "work"
        self.control = Control(scratch / "control")
        self._references: dict[str, Reference] = {}
        self._cold: dict[str, float] = {}
        self._auto: bool | None = None

    def make_adapters(self) -> None:
        """Train the adapters that the merges read, and merge one of them, once."""
        if (self.inputs / "adapters").exists():
            return
        (self.inputs / "adapters").mkdir()
        for name, arguments in adapter_commands(self.inputs).items():
            self._fresh(None)
            self._must(Command(arguments=arguments, options={}, env={}))
            (self.work / _OUT).rename(self.inputs / "adapters" / name)
        self._fresh(None)
        self._must(Command(arguments=merge_command(self.inputs, "dense"), options={}, env={}))
        (self.work / _OUT).rename(self.inputs / "adapters" / "merged")

    # -- references

    def reference(self, suite: Suite) -> Reference:
        """The undisturbed run of a suite, made once; run twice, because it has to be repeatable.

        Raises:
            RuntimeError: it fails, or two runs differ.
        """
        if suite.name not in self._references:
            if not suite.resumes:
                self.make_adapters()
            before = self._before(suite)
            old = fingerprint(before / _OUT)
            self._fresh(before)
            command = self._command(suite, first=not suite.stopped_after)
            self._must(command)
            first = fingerprint(self.work / _OUT)
            self._fresh(before)
            self.control.arm(self.work, log=True)
            ended = self._must(command, armed=True)
            result = fingerprint(self.work / _OUT)
            if what := differences(first, result):
                raise RuntimeError(f"{suite.name}: two undisturbed runs differ in {what}")
            calls, names = tuple(self.control.calls()), self._names()
            folders = (before / _OUT, self.work / _OUT) if suite.older else ()
            digests = tuple(map(self._stock_digest, folders))
            self._references[suite.name] = Reference(
                before, old, result, calls, ended.seconds, names, digests
            )
        return self._references[suite.name]

    def _before(self, suite: Suite) -> Path:
        """The folder with the state before a suite."""
        folder = self.scratch / "before" / suite.name.replace("/", "-")
        shutil.rmtree(folder, ignore_errors=True)
        self._fresh(None)
        if suite.stopped_after:
            whole = self._command(suite, first=True)
            stop = (suite.stopped_after, signal.SIGTERM)
            ended = self._run(replace(whole, options={**whole.options, "stop": stop}))
            if ended.status != 75:
                raise RuntimeError(f"{suite.name}: stopping gave {ended.status}: {ended.err}")
        if suite.older:
            self._must(replace(self._command(suite), arguments=suite.older))
        folder.parent.mkdir(exist_ok=True)
        shutil.copytree(self.work, folder)
        return folder

    def _command(self, suite: Suite, *, first: bool = True) -> Command:
        arguments = [*suite.arguments]
        if suite.resumes and self._auto_resumes():
            arguments.append("--auto-resume")
        elif suite.resumes and not first:
            arguments.append("--resume")
        plan = {"plan": str(self.scratch / f"{suite.name.replace('/', '-')}.plan")}
        options: dict[str, Any] = plan if suite.resumes else {}
        return Command(program=suite.program, arguments=arguments, options=options, env=suite.env)

    def _auto_resumes(self) -> bool:
        """Whether training has one command for starting and going on."""
        if self._auto is None:
            ended = self._run(Command(arguments=["train", "--help"], options={}, env={}))
            self._auto = "--auto-resume" in ended.out
        return self._auto

    # -- disturbed runs

    def failing(self, suite: Suite, fault: Fault, at: int) -> Outcome:
        """Run a suite in which call number `at` meets a fault."""
        reference = self.reference(suite)
        self._fresh(reference.before)
        self.control.arm(self.work, fault, at, log=False)
        ended = self._run(self._command(suite, first=not suite.stopped_after), armed=True)
        if not self.control.counted()[1]:
            return Outcome(verdict="missed", seconds=ended.seconds)
        return self._judged(suite, reference, ended, at)

    def signalled(self, suite: Suite, number: int, share: float, *, cold: bool = False) -> Outcome:
        """Run a suite in which the process gets a signal after a share of its usual time.

        Args:
            suite: what is run.
            number: of the signal.
            share: from 0 to 1.
            cold: start a process that has imported nothing, so that imports are disturbed too.
        """
        reference = self.reference(suite)
        command = self._command(suite, first=not suite.stopped_after)
        usual = reference.seconds
        if cold:
            command = replace(command, options={"cold": True})
            usual = self._cold_seconds(suite, command, reference)
        self._fresh(reference.before)
        self.control.arm(self.work, log=False)
        ended = self._run(command, armed=True, signals=[(share * usual, number)])
        outcome = self._judged(suite, reference, ended, self.control.counted()[0])
        if outcome.verdict != "recovered":
            return outcome
        later = ended.seconds - share * usual
        return replace(outcome, detail=f"status {ended.status}, {later:.2f} s after the signal")

    def _cold_seconds(self, suite: Suite, command: Command, reference: Reference) -> float:
        """How long an undisturbed run takes that imports everything."""
        if suite.name not in self._cold:
            self._fresh(reference.before)
            self._cold[suite.name] = self._run(command).seconds
        return self._cold[suite.name]

    def stopped(self, suite: Suite, step: int, number: int) -> Outcome:
        """Run a training suite that a signal stops as a step begins."""
        reference = self.reference(suite)
        self._fresh(reference.before)
        command = self._command(suite)
        stop = {**command.options, "stop": (step, number)}
        ended = self._run(replace(command, options=stop))
        if ended.status not in (75, -signal.SIGKILL):
            return Outcome(verdict="unclean", detail=f"status {ended.status}: {ended.last_line}")
        return self._judged(suite, reference, ended, 0)

    def _judged(self, suite: Suite, reference: Reference, ended: Ended, at: int) -> Outcome:
        """The verdict on a disturbed run, after the runs that follow it."""
        seconds = ended.seconds
        verdict, detail = self._after_fault(suite, reference, ended, at)
        if verdict:
            return Outcome(verdict=verdict, detail=detail, seconds=seconds)
        for again in range(_AGAIN):
            if fingerprint(self.work / _OUT) and ended.status == 0:
                break
            ended = self._again(suite)
            seconds += ended.seconds
            if ended.hung:
                return Outcome(verdict="hung", detail=f"run {again + 2}", seconds=seconds)
            if ended.status:
                line = f"run {again + 2} ends with {ended.status}: {ended.last_line}"
                return Outcome(verdict="lost", detail=line, seconds=seconds)
        found = fingerprint(self.work / _OUT)
        if suite.peer:  # what a kill left beside the result is not held against it
            found = {name: found[name] for name in found.keys() & reference.result.keys()}
        if what := differences(found, reference.result):
            verdict = "silent" if found else "lost"
            return Outcome(verdict=verdict, detail=f"differs in {what}", seconds=seconds)
        left = tuple(name for name in self._names() if _is_leftover(name, reference.names))
        return Outcome(verdict="recovered", seconds=seconds, left=left)

    def _after_fault(
        self, suite: Suite, reference: Reference, ended: Ended, at: int
    ) -> tuple[str, str]:
        """The verdict on the state that a disturbed run left; empty where it may go on."""
        if ended.hung:
            return "hung", "the disturbed run"
        found = fingerprint(self.work / _OUT)
        if ended.status == 0 and (what := differences(found, reference.result)):
            return "silent", f"status 0, and the result differs in {what}"
        if found and found not in (reference.old, reference.result):
            what = differences(found, reference.result)
            if self._is_mixture(suite, reference):
                return "mixed", f"the output differs in {what}"
        if suite.peer:
            return "", ""
        if ended.status > 0 and (why := uncleanness(ended)):
            return "unclean", why
        if why := self._lost_progress(reference, at):
            return "lost", why
        return "", ""

    def _lost_progress(self, reference: Reference, at: int) -> str:
        """Says so where a checkpoint was published, and none is left; else empty."""
        if fingerprint(self.work / _OUT):
            return ""
        published = [path.name for path in (reference.before / _RUN).glob("checkpoint-*")]
        for call in reference.calls:
            # The rename, and the sync of its folder that makes it last.
            if call.name == "rename" and call.number + 1 < at and _CHECKPOINT.search(call.target):
                published.append(Path(call.target).name)
        if not published or any(
            verify(path).ok for path in (self.work / _RUN).glob("checkpoint-*")
        ):
            return ""
        return f"no checkpoint is left, though {published[-1]} was whole"

    def _stock_digest(self, folder: Path) -> str:
        """The digest of the tensors that stock transformers reads; empty where it refuses."""
        file = self.scratch / "digest"
        file.unlink(missing_ok=True)
        self._run(Command(
            program="peer-load", arguments=[str(folder), str(file)], options={}, env={}
        ))  # fmt: skip
        return file.read_text("utf-8") if file.exists() else ""

    def _is_mixture(self, suite: Suite, reference: Reference) -> bool:
        """Whether what stands under the output's name is taken for a result and is none."""
        if not suite.peer:
            return True  # any file under the name of an output is meant as a result
        if not suite.older:
            return False
        found = self._stock_digest(self.work / _OUT)
        return bool(found) and found not in reference.digests

    # -- small steps

    def _again(self, suite: Suite) -> Ended:
        """The command once more, as a script without hands would start it."""
        target = self.work / _OUT
        if suite.peer:
            return self._run(self._command(suite))
        if not suite.resumes or self._auto_resumes():
            if not suite.resumes and fingerprint(target) and verify(target).ok:
                return Ended(0, 0.0, "", "", False)
            return self._run(self._command(suite))
        if fingerprint(target) and verify(target).ok:
            return Ended(0, 0.0, "", "", False)
        ended = self._run(self._command(suite, first=False))
        if "QC-RESUME-001" in ended.err:
            ended = self._run(self._command(suite, first=True))
        return ended

    def _fresh(self, before: Path | None) -> None:
        """The working folder in the state before."""
        shutil.rmtree(self.work, ignore_errors=True)
        if before is None:
            self.work.mkdir(parents=True)
        else:
            shutil.copytree(before, self.work)

    def _names(self) -> tuple[str, ...]:
        """What the working folder holds, to a depth of two, less the counters of a cache."""
        paths = (*self.work.glob("*"), *self.work.glob("*/*"))
        return tuple(sorted(str(path.relative_to(self.work)) for path in paths))

    def _run(
        self, command: Command, *, armed: bool = False, signals: Sequence[tuple[float, int]] = ()
    ) -> Ended:
        control = self.control.path if armed else None
        return self.client.run(command, self.work, control=control, signals=signals)

    def _must(self, command: Command, *, armed: bool = False) -> Ended:
        """An undisturbed run, after which the server imports what it imported.

        Raises:
            RuntimeError: it fails.
        """
        control = self.control.path if armed else None
        ended = self.client.run(command, self.work, control=control, warm=True)
        if ended.status:
            shown = " ".join(command.arguments)
            raise RuntimeError(f"{shown}: status {ended.status}: {ended.err[-2000:]}")
        return ended


def _is_leftover(name: str, usual: tuple[str, ...]) -> bool:
    """Whether a name is that of a temporary file or folder, which no run should leave."""
    last = name.rpartition("/")[2]
    return name not in usual and (last.startswith(".") or last.endswith(".new"))
