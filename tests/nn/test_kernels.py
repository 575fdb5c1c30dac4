"""The registry of kernels: what is judged, verified, kept, chosen, refused and told."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.cli_kit import here
from support.plugin_kit import good
from torch import Tensor

from qcore.api.records import Kernel, KnownBad, Op, Verdict
from qcore.errors import NumericError, PluginError, QcoreError, UsageError
from qcore.nn.kernels import cache as kernel_cache
from qcore.nn.kernels import registry as kernels
from qcore.nn.kernels.compare import compare, relative_error, worst_verdict
from qcore.nn.kernels.registry import Chosen, Listed, State, Used, choose, survey
from qcore.plugins.manager import Plugins
from qcore.testing import discover_plugins, write_distribution

CPU = torch.device("cpu")
GPU = torch.device("cuda:0")  # named only: no test here touches a card
PASS = Verdict(output=1e-3, output_bound=4e-3, gradient=2e-3, gradient_bound=6e-3)
FAIL = replace(PASS, gradient=0.3)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A card that exists in name: everything but its memory is asked of it."""
    told = {"name": "NVIDIA H100 80GB HBM3", "capability": "9.0", "driver": "580.82.07"}
    monkeypatch.setattr(kernel_cache, "_card", lambda device: dict(told))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.random, "fork_rng", lambda cards: torch.enable_grad())
    return told


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    told = {"torch": "2.11.0", "triton": "3.6.0"}
    monkeypatch.setattr(kernel_cache, "version_of", told.get)
    return told


def double(x: Any) -> Any:
    return x + x


class Calls:
    """A backend that counts how often it is verified."""

    def __init__(self, verdict: Verdict | BaseException = PASS) -> None:
        self.verdict, self.verified = verdict, 0

    def verify(self, device: torch.device) -> Verdict:
        self.verified += 1
        if isinstance(self.verdict, BaseException):
            raise self.verdict
        return self.verdict


def listed(
    backend: str = "triton",
    *,
    op: str = "norm",
    verdict: Verdict | BaseException = PASS,
    calls: Calls | None = None,
    load: Callable[[], Any] = lambda: double,
    owner: str = "acme",
    reference_waits: bool = False,
    **more: Any,
) -> Listed:
    verify = (calls or Calls(verdict)).verify
    kernel = Kernel(op=op, backend=backend, load=load, verify=verify, **more)
    return Listed(owner=owner, kernel=kernel, op=Op(name=op, reference_waits=reference_waits))


def states(chosen: Chosen) -> dict[str, str]:
    return {line.backend: line.state.value for line in chosen.table}


# Choosing.


def test_cpus_use_the_reference_and_nothing_is_even_asked() -> None:
    def never(device: torch.device) -> str | None:
        raise AssertionError

    calls = Calls()
    chosen = choose([listed(calls=calls, refuse=never)], CPU, {})
    assert chosen.get("norm") is None
    assert (chosen.backends, calls.verified) == ({"norm": "reference"}, 0)
    assert chosen.lines() == ["kernels: references in torch for all 1 ops (cpu)"]


def test_without_kernels_there_is_nothing_to_say() -> None:
    assert choose([], CPU, {}).lines() == []
    assert choose([], CPU, {}).get("norm") is None


def test_the_highest_priority_that_passes_is_taken(card: Any, versions: Any) -> None:
    one, two = Calls(), Calls()
    found = [
        listed("fast", priority=20, calls=one),
        listed("slow", priority=10, calls=two),
        listed("asked", priority=0),
    ]
    chosen = choose(found, GPU, {})
    assert chosen.get("norm") is double
    assert states(chosen) == {
        "fast": "chosen", "slow": "available", "asked": "available", "reference": "available",
    }  # fmt: skip
    assert (one.verified, two.verified) == (1, 0), "what is not used costs nothing"
    assert chosen.lines() == ["kernels: norm=fast"]


@pytest.mark.parametrize("wanted", [{}, {"norm": "reference"}, {"norm": "slow"}])
def test_what_waits_for_the_device_is_told(card: Any, versions: Any, wanted: Any) -> None:
    found = [listed("fast", reference_waits=True), listed("slow", waits=True, reference_waits=True)]
    chosen = choose(found, GPU, wanted)
    said = {"fast": False, "slow": True, "reference": True}
    (taken,) = (line for line in chosen.table if line.state is State.CHOSEN)
    assert taken.waits == said[wanted.get("norm", "fast")]
    assert {line.backend: line.waits for line in survey(found, GPU)[0]} == said


@pytest.mark.parametrize("verdict", [FAIL, replace(PASS, output=math.nan), RuntimeError("boom")])
def test_one_that_fails_is_passed_over_and_told(card: Any, versions: Any, verdict: Any) -> None:
    chosen = choose([listed("fast", priority=20, verdict=verdict), listed("slow")], GPU, {})
    assert states(chosen)["fast"] == "refused"
    assert chosen.backends == {"norm": "slow"}
    first, second = chosen.lines()
    assert first == "kernels: norm=slow"
    assert second.startswith("kernel norm=fast is not used: ")
    assert second.endswith("; slow computes it")
    assert ("boom" if isinstance(verdict, RuntimeError) else "bound") in second


def test_one_that_refuses_is_told_only_where_a_reference_is_left(card: Any, versions: Any) -> None:
    def refuse(device: torch.device) -> str:
        return "needs another card"

    slow = listed("fast", refuse=refuse)
    assert choose([slow], GPU, {}).lines() == [
        "kernels: norm=reference",
        "kernel norm=fast is not used: needs another card; reference computes it",
    ]
    assert choose([slow, listed("other")], GPU, {}).lines() == ["kernels: norm=other"]


def test_a_backend_whose_load_raises_is_passed_over_or_an_error(card: Any, versions: Any) -> None:
    def load() -> Any:
        raise ImportError("no module named 'gone'")

    found = [listed("fast", priority=20, load=load), listed("slow")]
    assert choose(found, GPU, {}).backends == {"norm": "slow"}
    with pytest.raises(PluginError, match="gone") as caught:
        choose(found, GPU, {"norm": "fast"})
    assert (caught.value.code, caught.value.exit_code) == ("QC-KERNEL-005", 69)


# Wishes.


def test_what_is_asked_for_is_used_on_cpus_too() -> None:
    calls = Calls()
    chosen = choose([listed(calls=calls)], CPU, {"norm": "triton"})
    assert chosen.get("norm") is double
    assert (calls.verified, chosen.lines()) == (1, ["kernels: norm=triton"])


def test_the_reference_can_be_asked_for(card: Any, versions: Any) -> None:
    calls = Calls()
    chosen = choose([listed(calls=calls)], GPU, {"norm": "reference"})
    assert chosen.get("norm") is None
    assert (calls.verified, chosen.lines()) == (0, ["kernels: norm=reference"])


WISHES: dict[str, tuple[dict[str, str], dict[str, Any], type[QcoreError], str, int, str]] = {
    "no such op": ({"nrom": "triton"}, {}, UsageError, "QC-KERNEL-001", 2, "norm"),
    "no such backend": ({"norm": "tirton"}, {}, UsageError, "QC-KERNEL-002", 2, "triton"),
    "not installed": (
        {"norm": "triton"}, {"requires": ("no-such-thing>=2",)},
        UsageError, "QC-KERNEL-003", 2, "no-such-thing is not installed",
    ),
    "too old": (
        {"norm": "triton"}, {"requires": ("torch>=99",)}, UsageError, "QC-KERNEL-003", 2, ">=99",
    ),
    "refuses": (
        {"norm": "triton"}, {"refuse": lambda device: f"not on {device.type}"},
        UsageError, "QC-KERNEL-003", 2, "not on cpu",
    ),
    "refuse raises": (
        {"norm": "triton"}, {"refuse": lambda device: 1 / 0}, PluginError, "QC-KERNEL-005", 69,
        "ZeroDivisionError",
    ),
    "wrong": ({"norm": "triton"}, {"verdict": FAIL}, NumericError, "QC-KERNEL-004", 76, "3.0e-01"),
    "NaN": (
        {"norm": "triton"}, {"verdict": replace(PASS, output=math.nan)},
        NumericError, "QC-KERNEL-004", 76, "nan",
    ),
    "raises": (
        {"norm": "triton"}, {"verdict": SystemExit(3)}, PluginError, "QC-KERNEL-005", 69, "acme",
    ),
    "known to be bad": (
        {"norm": "triton"},
        {"known_bad": (KnownBad(package="torch", versions=">=1", reason="bad", issue="http://i"),)},
        UsageError, "QC-KERNEL-003", 2, "http://i",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WISHES)
def test_a_wish_that_cannot_be_met_is_an_error(case: str) -> None:
    wanted, more, kind, code, status, text = WISHES[case]
    good_one = listed("other", priority=99)
    with pytest.raises(kind) as caught:
        choose([good_one, listed(**more)], CPU, wanted)
    error = caught.value
    assert (error.code, error.exit_code) == (code, status)
    assert text in f"{error.message} {error.fix}"
    assert error.field is not None
    assert error.field.startswith("kernels.")
    assert error.fix


def test_a_model_that_a_backend_cannot_compute(card: Any, versions: Any) -> None:
    calls = Calls()

    def narrow(config: Any) -> str | None:
        return f"no heads of {config['head']}" if config["head"] > 64 else None

    found = [listed("fast", priority=20, calls=calls, refuse_model=narrow), listed("slow")]

    def chosen(head: int, ops: Any = ("norm",), **wanted: str) -> Chosen:
        return choose(found, GPU, wanted, Used(ops=ops, config={"head": head}))

    assert chosen(64).backends == {"norm": "fast"}
    assert chosen(96).backends == {"norm": "slow"}
    assert calls.verified == 1, "what is refused is not verified"
    (line,) = (line for line in chosen(96).table if line.backend == "fast")
    assert (line.state, line.reason) == (State.REFUSED, "no heads of 96")
    with pytest.raises(UsageError, match="cannot run here: no heads of 96") as caught:
        chosen(96, norm="fast")
    assert caught.value.code == "QC-KERNEL-003"
    assert chosen(96, ops=(), norm="fast").backends == {"norm": "fast"}, "an op of no layer"


def test_a_missing_package_comes_with_its_pip_line() -> None:
    with pytest.raises(UsageError) as caught:
        choose([listed(requires=("no-such-thing>=2",))], CPU, {"norm": "triton"})
    assert caught.value.fix == "pip install 'no-such-thing>=2'"


# Known to be bad.

BAD = KnownBad(
    package="triton",
    versions=">=3.4.0,<3.7.1",
    capability=(9, 0),
    reason="miscompiled",
    issue="https://example.com/1",
    unless="tilelang",
)


@pytest.mark.parametrize(
    ("triton", "capability", "more", "expected"),
    [
        ("3.6.0", (9, 0), {}, "reference"),
        ("3.4.0", (9, 0), {}, "reference"),
        ("3.7.1", (9, 0), {}, "triton"),
        ("3.3.1", (9, 0), {}, "triton"),
        ("3.6.0", (10, 0), {}, "triton"),
        ("3.6.0", (9, 0), {"tilelang": "0.1.9"}, "triton"),
        (None, (9, 0), {}, "triton"),
    ],
)
def test_known_bad_combinations(
    card: Any,
    versions: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    triton: str | None,
    capability: tuple[int, int],
    more: dict[str, str],
    expected: str,
) -> None:
    versions |= {"triton": triton, **more}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    calls = Calls()
    chosen = choose([listed(calls=calls, known_bad=(BAD,))], GPU, {})
    assert chosen.backends == {"norm": expected}
    assert calls.verified == (expected == "triton"), "what is known to be bad is not tried"
    if expected == "reference":
        assert "miscompiled (https://example.com/1)" in chosen.lines()[1]


# The cache.


def count(cache: Path) -> int:
    return len([*cache.rglob("*.json")])


def test_a_pass_is_kept_and_a_failure_is_not(card: Any, versions: Any, cache: Path) -> None:
    calls = Calls()
    for _ in range(3):
        chosen = choose([listed(calls=calls)], GPU, {})
        assert chosen.table[0].verdict == PASS
    assert (calls.verified, count(cache)) == (1, 1)
    wrong = Calls(FAIL)
    for _ in range(2):
        choose([listed("other", calls=wrong)], GPU, {})
    assert (wrong.verified, count(cache)) == (2, 1)
    assert [path for path in cache.rglob("*") if path.suffix == ".tmp"] == []


CHANGES: dict[str, Callable[[Any], None]] = {
    "driver": lambda s: s.card.update(driver="590.1"),
    "card": lambda s: s.card.update(name="NVIDIA H200"),
    "torch": lambda s: s.versions.update(torch="2.12.0"),
    "triton": lambda s: s.versions.update(triton="3.7.1"),
    "a requirement": lambda s: s.versions.update(acme="2.1"),
    "sources": lambda s: s.patch.setattr(kernel_cache, "package_digest", lambda package: "other"),
    "environment": lambda s: s.patch.setenv("TRITON_DEFAULT_FP_FUSION", "0"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_verdict_holds_for_one_situation_only(
    card: Any, versions: Any, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    versions["acme"] = "2.0"
    calls = Calls()
    found = [listed(calls=calls, requires=("acme>=2",))]
    choose(found, GPU, {})
    choose(found, GPU, {})
    assert calls.verified == 1
    CHANGES[change](SimpleNamespace(card=card, versions=versions, patch=monkeypatch))
    choose(found, GPU, {})
    assert calls.verified == 2


def damage(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    kept = json.loads(path.read_text())
    change(kept)
    path.write_text(json.dumps(kept))


@pytest.mark.parametrize(
    "change",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"\xff\xfe"),
        lambda path: path.write_text("[1]"),
        lambda path: path.write_text("[" * 100_000),
        lambda path: damage(path, lambda kept: kept["key"].update(op="another")),
        lambda path: damage(path, lambda kept: kept["verdict"].pop("gradient_bound")),
        lambda path: damage(path, lambda kept: kept["verdict"].update(output="x")),
        lambda path: damage(path, lambda kept: kept["verdict"].update(output=math.nan)),
        lambda path: damage(path, lambda kept: kept["verdict"].update(output=10**400)),
        lambda path: damage(path, lambda kept: kept["verdict"].update(gradient=1.0)),
        lambda path: (path.unlink(), path.mkdir()),
    ],
)
def test_a_damaged_verdict_is_none(
    card: Any, versions: Any, cache: Path, change: Callable[[Path], Any]
) -> None:
    calls = Calls()
    choose([listed(calls=calls)], GPU, {})
    (path,) = cache.rglob("*.json")
    change(path)
    assert choose([listed(calls=calls)], GPU, {}).backends == {"norm": "triton"}
    assert calls.verified == 2


def test_a_cache_that_cannot_be_written_is_no_error(
    card: Any, versions: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    calls = Calls()
    for place in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/none")):
        monkeypatch.setenv("XDG_CACHE_HOME", str(place))
        assert choose([listed(calls=calls)], GPU, {}).backends == {"norm": "triton"}
    assert calls.verified == 3
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert kernel_cache.folder() == tmp_path / ".cache/qcore/kernels"


def test_what_cannot_be_identified_is_not_kept(
    card: Any, versions: Any, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_cache, "_card", lambda device: None)
    calls = Calls()
    for _ in range(2):
        choose([listed(calls=calls)], GPU, {})
    assert (calls.verified, count(cache)) == (2, 0)


def test_many_writers_leave_one_whole_file(card: Any, versions: Any, cache: Path) -> None:
    key = kernel_cache.key(listed().kernel, "acme", GPU)
    assert key is not None
    threads = [threading.Thread(target=kernel_cache.put, args=(key, PASS)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert kernel_cache.get(key) == PASS
    assert len([path for path in cache.rglob("*") if path.is_file()]) == 1


def test_the_digest_is_of_every_source_of_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "acme_ops"
    (package / "inner").mkdir(parents=True)
    (package / "__init__.py").write_text("def load(): pass\n")
    (package / "inner" / "deep.py").write_text("x = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import importlib

    module = importlib.import_module("acme_ops")
    assert kernel_cache._package(module.load) == "acme_ops"
    before = kernel_cache.package_digest("acme_ops")
    kernel_cache.package_digest.cache_clear()
    (package / "inner" / "deep.py").write_text("x = 2\n")
    assert before != kernel_cache.package_digest("acme_ops") is not None
    assert kernel_cache.package_digest("no_such_package") is None


def test_cpus_have_no_card_and_keep_nothing() -> None:
    assert kernel_cache._card(CPU) is None
    assert kernel_cache.key(listed().kernel, "acme", CPU) is None


def test_verification_leaves_random_numbers_as_they_were() -> None:
    def verify(device: torch.device) -> Verdict:
        torch.manual_seed(7)
        torch.randn(3)
        assert torch.is_grad_enabled()
        return PASS

    kernel = Kernel(op="norm", backend="triton", load=lambda: double, verify=verify)
    torch.manual_seed(1)
    expected = torch.randn(4)
    torch.manual_seed(1)
    with torch.no_grad():
        choose([Listed(owner="acme", kernel=kernel, op=Op(name="norm"))], CPU, {"norm": "triton"})
    assert torch.equal(torch.randn(4), expected)


# Reports.


def test_survey_verifies_all_anew_and_raises_nothing(card: Any, versions: Any) -> None:
    calls = Calls()
    found = [
        listed("broken", priority=30, verdict=RuntimeError("boom")),
        listed("wrong", priority=20, verdict=FAIL),
        listed("fine", calls=calls),
        listed("absent", op="conv", requires=("no-such-thing",)),
    ]
    for _ in range(2):
        lines, problems = survey(found, GPU)
    assert [(line.op, line.backend, line.state) for line in lines] == [
        ("norm", "broken", State.REFUSED),
        ("norm", "wrong", State.REFUSED),
        ("norm", "fine", State.CHOSEN),
        ("norm", "reference", State.AVAILABLE),
        ("conv", "absent", State.REFUSED),
        ("conv", "reference", State.CHOSEN),
    ]
    assert calls.verified == 2
    assert [problem.code for problem in problems] == ["QC-KERNEL-005", "QC-KERNEL-004"]


KERNELS = """
@hookimpl
def qcore_kernels():
    from qcore.api.records import Kernel
    yield Kernel(op="{op}", backend="{backend}", load=lambda: None, verify=lambda device: None)
"""
OP = """
    from qcore.api.records import Op
    yield Op(name="{op}", reference_waits=True)
"""


def plugins_of(tmp_path: Path, patch: pytest.MonkeyPatch, **sources: str) -> Any:
    for name, source in sources.items():
        write_distribution(
            tmp_path, name, module=f"kernels_{name}_{tmp_path.name.replace('-', '_')}",
            source=source, model_types=(name,),
        )  # fmt: skip
    patch.syspath_prepend(str(tmp_path))
    return discover_plugins(tmp_path).load_all()


def test_plugins_bring_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = good("one") + KERNELS.format(op="one::norm", backend="triton")
    plugins = plugins_of(tmp_path, monkeypatch, one=source)
    found = [entry for entry in kernels.installed(plugins) if entry.owner != "qcore"]
    assert [(entry.owner, entry.kernel.op) for entry in found] == [
        ("plugin 'one' (one 1.0)", "one::norm")
    ]
    with pytest.raises(PluginError) as caught:
        choose(found, CPU, {"norm": "triton"})
    assert (caught.value.code, "NoneType" in caught.value.message) == ("QC-KERNEL-005", True)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_two_of_one_name_are_an_error_that_a_report_survives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    source = KERNELS.format(op="one::norm", backend=backend)
    more = {"one": good("one") + source, "two": good("two") + source}
    plugins = plugins_of(tmp_path, monkeypatch, **more)
    with pytest.raises(QcoreError) as caught:
        kernels.installed(plugins)
    assert (caught.value.code, caught.value.exit_code) == ("QC-KERNEL-006", 69)
    _, problems = kernels.surveyed(plugins)
    assert {problem.code for problem in problems} == {"QC-KERNEL-006"}


def test_two_plugins_may_name_an_op_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sources = {
        name: good(name) + KERNELS.format(op=f"{name}::norm", backend="triton")
        for name in ("one", "two")
    }
    plugins = plugins_of(tmp_path, monkeypatch, **sources)
    found = [entry for entry in kernels.installed(plugins) if entry.owner != "qcore"]
    assert [entry.kernel.op for entry in found] == ["one::norm", "two::norm"]
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(Plugins, "discover", classmethod(lambda cls: plugins))
    report = here(capsys, "doctor", "--kernels", "--json").json
    states = {(row["op"], row["backend"]) for row in report["kernels"]}
    assert {("one::norm", "triton"), ("two::norm", "triton")} <= states
    assert "QC-KERNEL-006" not in [problem["code"] for problem in report["problems"]]


@pytest.mark.parametrize(
    ("wanted", "used", "expected"),
    [
        ({"one::norm": "triton"}, ["one::norm"], {"one::norm": "triton"}),
        ({"norm": "triton"}, ["one::norm"], {"one::norm": "triton"}),
        ({"norm": "reference"}, ["two::norm", "conv"], {"two::norm": "reference"}),
        ({"conv": "triton"}, ["conv", "one::conv"], {"conv": "triton"}),
        ({"norm": "triton"}, ["one::norm", "two::norm"], ("QC-KERNEL-001", "two::norm")),
        ({"norm": "triton"}, ["conv"], ("QC-KERNEL-001", "two::norm")),
        ({"nrom": "triton"}, ["one::norm"], ("QC-KERNEL-001", "did you mean two::norm")),
        ({"three::norm": "triton"}, ["one::norm"], ("QC-KERNEL-001", "one::norm")),
        ({"norm": "tirton"}, ["one::norm"], ("QC-KERNEL-002", "did you mean triton")),
        ({"one::conv": "triton"}, ["conv"], ("QC-KERNEL-007", "one of conv")),
        ({"norm": "triton", "one::norm": "triton"}, ["one::norm"], ("QC-CONFIG-005", "one::norm")),
    ],
)
def test_full_names_and_short_ones(wanted: Any, used: Any, expected: Any) -> None:
    found = [listed(op=op) for op in ("conv", "one::conv", "one::norm", "two::norm")]
    if isinstance(expected, dict):
        assert kernels.requested(found, wanted, used) == expected
        chosen = choose(found, CPU, wanted, Used(ops=used, config={})).backends
        assert chosen.items() >= expected.items()
        return
    code, text = expected
    with pytest.raises(UsageError) as caught:
        kernels.requested(found, wanted, used)
    assert caught.value.code == code
    assert text in f"{caught.value.message} {caught.value.fix}"


@pytest.mark.parametrize("op", ["norm", "::norm", "one::"])
def test_a_plugin_s_op_has_a_namespace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, op: str
) -> None:
    source = good("one") + KERNELS.format(op=op, backend="triton")
    plugins = plugins_of(tmp_path, monkeypatch, one=source)
    with pytest.raises(PluginError, match="namespace") as caught:
        kernels.installed(plugins)
    assert caught.value.code == "QC-KERNEL-008"
    assert "plugin 'one'" in caught.value.message


def test_a_plugin_may_have_a_backend_of_an_op_of_core(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = good("one") + KERNELS.format(op="experts", backend="fast")
    found = kernels.installed(plugins_of(tmp_path, monkeypatch, one=source))
    (fast,) = (entry for entry in found if entry.kernel.backend == "fast")
    assert fast.op.reference_waits, "as core declares it"


def test_an_op_is_declared_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = KERNELS.format(op="one::norm", backend="{0}") + OP.format(op="one::norm")
    plugins = plugins_of(tmp_path, monkeypatch, one=good("one") + source.format("triton"))
    (entry,) = (entry for entry in kernels.installed(plugins) if entry.owner != "qcore")
    assert entry.op == Op(name="one::norm", reference_waits=True)
    more = {"one": good("one") + source.format("triton"), "two": good("two") + source.format("b")}
    (folder := tmp_path / "more").mkdir()
    with pytest.raises(PluginError, match="op one::norm is provided twice"):
        kernels.installed(plugins_of(folder, monkeypatch, **more))


def test_a_plugin_that_fails_in_the_hook_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = good("one") + "\n@hookimpl\ndef qcore_kernels():\n    raise KeyError('x')\n"
    plugins = plugins_of(tmp_path, monkeypatch, one=source)
    with pytest.raises(PluginError, match="one"):
        kernels.installed(plugins)
    found, (problem,) = kernels.surveyed(plugins)
    assert problem.code == "QC-PLUGIN-002"
    assert all(entry.owner == "qcore" for entry in found)


def test_importing_the_registry_imports_no_torch() -> None:
    code = (
        "import sys, qcore.nn.kernels.registry, qcore.nn.kernels.builtin as own;"
        "list(own.core_kernels());"
        "print([n for n in ('torch', 'triton', 'bitsandbytes') if n in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ
    )
    assert done.stdout.strip() == "[]"


# The measure.


def scale(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return x * weight, (x.float() ** 2).sum()


def inputs(dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(37, 5, generator=generator).to(dtype)
    return x, torch.randn(5, generator=generator).to(dtype)


BOUNDS = {"output": 8e-3, "gradient": 2e-2}


def test_the_reference_passes_against_itself() -> None:
    verdict = compare(scale, scale, inputs(), **BOUNDS)
    assert verdict.good
    assert 1e-4 < verdict.output < 8e-3, "bf16 against float32 is not zero"
    exact = compare(scale, scale, inputs(torch.float32), output=0.0, gradient=0.0)
    assert (exact.output, exact.gradient, exact.good) == (0.0, 0.0, True)


class WrongBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return dy * weight, (dy * x).sum(0) * 1.1


def test_wrong_outputs_gradients_shapes_and_nan_are_seen() -> None:
    x, weight = inputs()

    def reference(x: Tensor, weight: Tensor) -> Tensor:
        return x * weight

    def judge(function: Any) -> Verdict:
        return compare(function, reference, (x, weight), **BOUNDS)

    assert judge(reference).good
    wrong = judge(WrongBackward.apply)
    assert (wrong.good, wrong.output <= 8e-3) == (False, True)
    assert 0.09 < wrong.gradient < 0.11
    assert math.isnan(judge(lambda x, w: x * w * math.nan).output)
    assert judge(lambda x, w: (x * w)[:-1]).output == math.inf
    assert not judge(lambda x, w: (x * w).detach() + 0 * w.sum()).good
    assert not judge(lambda x, w: x * w * 1.02).good


def test_worst_keeps_what_is_worst() -> None:
    both = worst_verdict(PASS, FAIL)
    assert (both.output, both.gradient, both.good) == (1e-3, 0.3, False)
    assert math.isnan(worst_verdict(PASS, replace(PASS, output=math.nan), FAIL).output)
    assert worst_verdict(PASS, PASS) == PASS


def test_relative_error_by_hand() -> None:
    got, expected = torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0])
    assert relative_error(got, expected) == pytest.approx(0.1)
    assert relative_error(torch.ones(2), torch.zeros(2)) == pytest.approx(2**0.5)
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0
