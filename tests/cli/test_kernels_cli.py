"""``--kernels`` of train, ``qcore doctor --kernels``, and what stays light."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.cli_kit import here, modules_after
from support.plugin_kit import good

from qcore.config.frozen_map import Entries
from qcore.config.resolve import load_settings, parse_entries
from qcore.config.settings import Settings
from qcore.errors import UsageError
from qcore.plugins.manager import Plugins
from qcore.testing import discover_plugins, write_distribution

TRAIN = ("train", "--model", "x", "--data", "x", "--output", "x")


def test_the_flag_is_shorthand_for_entries_of_the_setting(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("kernels: {norm: triton, conv: triton}\n")
    settings, origins = load_settings(
        config_file=tmp_path / "run.yaml", sets=["kernels.norm=reference"]
    )
    assert settings.kernels == Entries({"norm": "reference", "conv": "triton"})
    assert origins["kernels"] == "file, flag"


def test_every_source_of_settings_takes_the_full_name_of_an_op(tmp_path: Path) -> None:
    wanted = Entries({"acme::norm": "fused"})
    (tmp_path / "run.yaml").write_text("kernels:\n  acme::norm: fused\n")
    assert load_settings(config_file=tmp_path / "run.yaml")[0].kernels == wanted
    assert load_settings(sets=["kernels.acme::norm=fused"])[0].kernels == wanted
    assert parse_entries("kernels", ["acme::norm=fused"], flag="--kernels") == wanted
    settings = Settings(kernels=Entries(wanted))
    assert settings.kernels == wanted
    assert Settings.from_dict({"kernels": {"acme::norm": "fused"}}) == settings


def test_the_flag_takes_the_full_name_of_an_op(capsys: pytest.CaptureFixture[str]) -> None:
    ended = here(capsys, *TRAIN, "--kernels", "acme::norm=fused")
    ended.error("QC-HUB-001")  # the flag is accepted; the model "x" is not


@pytest.mark.parametrize(
    "name", ["::norm", "acme::", "acme:norm", "acme:::norm", "a b::norm", "::"]
)
def test_a_malformed_name_of_an_op_is_a_usage_error(name: str) -> None:
    with pytest.raises(UsageError) as caught:
        Settings(kernels=Entries({name: "fused"}))
    assert caught.value.code == "QC-CONFIG-003"
    assert "NAMESPACE::NAME" in caught.value.message


@pytest.mark.parametrize(
    ("flags", "code"),
    [
        (("--kernels", "norm"), "QC-CONFIG-006"),
        (("--kernels", "=triton"), "QC-CONFIG-003"),
        (("--kernels", "norm=a b"), "QC-CONFIG-003"),
        (("--kernels", "norm=a", "--kernels", "norm=b"), "QC-CONFIG-005"),
        (("--kernels", "norm=a", "--set", "kernels.norm=b"), "QC-CONFIG-005"),
    ],
)
def test_a_malformed_flag_is_a_usage_error(
    capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], code: str
) -> None:
    ended = here(capsys, *TRAIN, *flags)
    ended.error(code)
    assert ended.code == 2


def test_help_of_doctor_imports_no_torch() -> None:
    for arguments in (("doctor", "--help"), ("train", "--help")):
        ended, modules = modules_after(*arguments)
        assert ended.code == 0
        assert "--kernels" in ended.out
        assert not {"torch", "triton", "qcore.nn.kernels.registry"} & modules


KERNELS = """
from qcore.api.records import Kernel, Verdict

def verdict(output, gradient=2e-3):
    return lambda device: Verdict(
        output=output, output_bound=4e-3, gradient=gradient, gradient_bound=6e-3
    )

@hookimpl
def qcore_kernels():
    yield Kernel(op="toy::cli_norm", backend="fine", load=lambda: abs, verify=verdict(1e-3))
    yield Kernel(op="toy::cli_norm", backend="far", load=lambda: abs, verify=verdict(1e-3),
                 refuse=lambda device: "needs a card")
    yield Kernel(op="toy::cli_norm", backend="gone", load=lambda: abs, verify=verdict(1e-3),
                 requires=("no-such-thing>=2",))
"""
WRONG = (
    KERNELS
    + """
    yield Kernel(op="toy::cli_norm", backend="wrong", load=lambda: abs, verify=verdict(1e-3, 0.5))
"""
)


def discovered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, name: str = "kernels_of_cli"
) -> None:
    write_distribution(
        tmp_path, "toy", module=name, source=good("toy") + source, model_types=("toy",)
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    plugins = discover_plugins(tmp_path)
    monkeypatch.setattr(Plugins, "discover", classmethod(lambda cls: plugins))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def rows_of(told: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["backend"]: row for row in told["kernels"] if row["op"] == "toy::cli_norm"}


def test_doctor_lists_kernels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    discovered(tmp_path, monkeypatch, KERNELS)
    told = here(capsys, "doctor", "--kernels", "--json").json
    assert (told["ok"], told["device"], told["problems"]) == (True, "cpu", [])
    rows = rows_of(told)
    assert {name: (row["state"], row["reason"]) for name, row in rows.items()} == {
        "fine": ("available", ""),
        "far": ("refused", "needs a card"),
        "gone": ("refused", "no-such-thing is not installed"),
        "reference": ("chosen", ""),
    }
    assert rows["fine"]["verdict"] == {
        "output": 1e-3, "output_bound": 4e-3, "gradient": 2e-3, "gradient_bound": 6e-3,
    }  # fmt: skip
    assert (rows["fine"]["owner"], rows["reference"]["owner"]) == (
        "plugin 'toy' (toy 1.0)",
        "qcore",
    )
    ended = here(capsys, "doctor", "--kernels")
    assert ended.code == 0
    (fine,) = [line for line in ended.out.splitlines() if " fine " in line]
    assert fine.split(None, 3) == [
        "toy::cli_norm", "fine", "available",
        "output 1.0e-03 (bound 4.0e-03), gradient 2.0e-03 (bound 6.0e-03)",
    ]  # fmt: skip


def test_doctor_fails_where_a_backend_computes_something_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    discovered(tmp_path, monkeypatch, WRONG, "wrong_kernels_of_cli")
    ended = here(capsys, "doctor", "--kernels", "--json")
    told = json.loads(ended.out)
    assert (ended.code, told["ok"]) == (76, False)
    assert [problem["code"] for problem in told["problems"]] == ["QC-KERNEL-004"]
    assert rows_of(told)["wrong"]["state"] == "refused"
    ended = here(capsys, "doctor", "--kernels")
    assert ended.code == 76
    assert "error[QC-KERNEL-004]" in ended.err
    assert " wrong " in ended.out
