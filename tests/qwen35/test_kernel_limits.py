"""Sizes that the Triton kernels have no code for: known before a run, and of one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.cli_kit import here

from qcore.api.records import Verdict
from qcore.nn.kernels import cache as kernel_cache
from qcore.nn.kernels import judge as kernel_judge
from qcore.nn.kernels.registry import choose, installed
from qcore.nn.model import ops_of
from qcore.plugins.resolve_model import identify
from qcore_qwen35.kernels import kernels
from qcore_qwen35.tiny import tiny_config, write

#: Sizes -> the ops that have no kernel for them, and what is said.
CASES: list[tuple[dict[str, int], dict[str, str]]] = [
    ({}, {}),
    (
        {"linear_key_head_dim": 24},
        {
            "qwen35::delta_rule": "heads of size 24, only 16",
            "qwen35::delta_step": "heads of size 24, only powers",
        },
    ),
    ({"linear_value_head_dim": 256}, {"qwen35::delta_rule": "heads of size 256"}),
    ({"linear_conv_kernel_dim": 3}, {"qwen35::delta_inputs": "3 taps, only for 4"}),
]


@pytest.mark.parametrize(("sizes", "refused"), CASES, ids=str)
@pytest.mark.parametrize("nested", [True, False])
def test_records_say_what_they_cannot_compute(
    sizes: dict[str, int], refused: dict[str, str], nested: bool
) -> None:
    config = tiny_config(vocab_size=320, **sizes)
    given = config if nested else config["text_config"]
    said = {one.op: reason for one in kernels() if (reason := one.refuse_model(given)) is not None}
    assert said.keys() == refused.keys()
    for op, text in refused.items():
        assert text in said[op]


def test_a_run_takes_the_reference_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a card that exists in name, where nothing else is refused or measured."""
    write(tmp_path / "base", linear_key_head_dim=24)
    found = identify(str(tmp_path / "base"))
    used = ops_of(found.decision.architecture, found.checkpoint.config, found.layout)
    passes = Verdict(output=0.0, output_bound=1.0)
    monkeypatch.setattr(kernel_judge, "_verified", lambda *args, **more: passes)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(kernel_cache, "version_of", {"triton": "3.6.0"}.get)
    chosen = choose(installed(found.plugins), torch.device("cuda"), {}, used)
    assert (
        chosen.backends["qwen35::delta_rule"]
        == chosen.backends["qwen35::delta_step"]
        == "reference"
    )
    assert chosen.backends["qwen35::delta_inputs"] == "triton"
    (told,) = (
        line for line in chosen.lines() if line.startswith("kernel qwen35::delta_rule=triton")
    )
    assert told.endswith("128; reference computes it")


@pytest.mark.slow
def test_a_plan_takes_what_a_run_would(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Of a card that is not at hand no backend is verified, but each is asked for the model."""
    pytest.importorskip("triton")
    write(tmp_path / "base", linear_key_head_dim=24)
    given = ("plan", tmp_path / "base", "--max-length", 64, "--gpu", "H200")
    ended = here(capsys, *given, "--json")
    assert ended.code == 0
    assert json.loads(ended.out)["plans"][0]["backends"]["qwen35::delta_rule"] == "reference"
    ended = here(capsys, *given, "--set", "kernels.delta_rule=triton")
    assert ended.code == 2
    line = ended.error("QC-KERNEL-003")
    assert "kernels.qwen35::delta_rule" in line
    assert "no kernel for heads of size 24" in line
    assert "ask for qwen35::delta_rule=reference" in line
