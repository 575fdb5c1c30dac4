"""What preflight says of absent parts, and for which verbs guards hold."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.model_kit import as_text_class, small_config, small_shapes

import qcore.preflight.checks
from qcore.api.records import Finding, PreflightRequest, Severity
from qcore.config.settings import Settings
from qcore.errors import InputError
from qcore.plugins.resolve_model import Identified, identify
from qcore.preflight.checks import preflight
from qcore.preflight.context_length import beyond, positions
from qcore.testing import write_sparse_checkpoint


def found(folder: Path, **text: Any) -> Identified:
    """A text-only save: the tower and mtp are gone, what config.json says of mtp is not."""
    config = small_config(vision=False, **text)["text_config"]
    config |= {"architectures": ["Qwen3_5ForCausalLM"], "tie_word_embeddings": True}
    return identify(str(write_sparse_checkpoint(folder, config, as_text_class(small_shapes()))))


@pytest.mark.parametrize("claim", [1, 2])
def test_absent_prediction_layers_are_one_line_with_the_claim(tmp_path: Path, claim: int):
    lines = preflight(found(tmp_path, mtp_num_hidden_layers=claim), verb="merge")
    (line,) = [line for line in lines if "mtp" in line]
    assert line.startswith(f"warning: mtp: config.json claims it (mtp_num_hidden_layers {claim})")
    assert "speculative decoding" in line


def test_a_part_of_which_its_plugin_says_nothing_is_told_by_core(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model = found(tmp_path)
    monkeypatch.setattr("qcore_qwen35.guards._mtp", lambda request, text: iter(()))
    assert preflight(model, verb="merge") == (
        "mtp: config.json claims it, but the checkpoint has none of its tensors",
    )


def test_each_absent_part_has_its_own_line(tmp_path: Path):
    model = found(tmp_path)
    layout = replace(model.layout, absent=("mtp", "vision"))
    request = PreflightRequest(
        verb="train", checkpoint=model.checkpoint, architecture="a", generation="g", layout=layout
    )
    told = Finding(code="QC-X-001", severity=Severity.WARNING, what="gone", field="vision")
    absent = qcore.preflight.checks._absent
    assert [one.field for one in absent(request, [])] == ["mtp", "vision"]
    assert [one.field for one in absent(request, [told])] == ["mtp"]


@pytest.mark.parametrize("verb", ["merge", "generate", "train"])
def test_a_form_of_rope_that_is_not_computed_stops_every_verb(
    tmp_path: Path, verb: str, monkeypatch: pytest.MonkeyPatch
):
    """A merge is proved by logits; those of other rotary positions would prove another model."""
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4, "partial_rotary_factor": 0.25}
    model = found(tmp_path, rope_parameters=rope)
    for own in ("_core", "_text"):
        monkeypatch.setattr(qcore.preflight.checks, own, lambda *request: iter(()))
    with pytest.raises(InputError) as caught:
        preflight(model, verb=verb)
    assert caught.value.code == "QC-QWEN35-011"
    assert "'dynamic'" in caught.value.message


@pytest.mark.parametrize(
    ("text", "most"),
    [
        ({"max_position_embeddings": 4096}, 4096),
        ({}, None),
        ({"max_position_embeddings": True}, None),
        ({"max_position_embeddings": "many"}, None),
        (
            {
                "max_position_embeddings": 4096,
                "rope_parameters": {"factor": 4.0, "original_max_position_embeddings": 4096},
            },
            16384,
        ),
        (
            {
                "max_position_embeddings": 16384,
                "rope_parameters": {"factor": 2.0, "original_max_position_embeddings": 4096},
            },
            16384,
        ),
        ({"max_position_embeddings": 4096, "rope_parameters": {"factor": None}}, 4096),
    ],
    ids=str,
)
def test_the_positions_of_a_model(text: dict[str, Any], most: int | None):
    assert positions(text) == positions({"text_config": text}) == most
    if most is not None:
        assert beyond(text, most, "max_length") is None
        warning = beyond(text, most + 1, "max_length")
        assert warning is not None
        assert (warning.code, warning.severity) == ("QC-PRE-013", Severity.WARNING)


@pytest.mark.parametrize("verb", ["train", "plan"])
def test_a_row_longer_than_the_positions_is_a_warning_with_both_numbers(tmp_path: Path, verb: str):
    model = found(tmp_path, max_position_embeddings=4096)
    (model.checkpoint.path / "chat_template.jinja").touch()
    most = 4096
    settings = Settings(max_length=most + 1)
    findings = list(qcore.preflight.checks._core(model, request(model, verb, settings)))
    (line,) = [qcore.preflight.checks.line(one) for one in findings if one.field == "max_length"]
    assert line == (
        "warning: max_length: exceeds the context length of the model: "
        f"found {most + 1}, expected at most {most} (max_position_embeddings)"
    )
    shorter = qcore.preflight.checks._core(model, request(model, verb, Settings(max_length=most)))
    assert "max_length" not in [one.field for one in shorter]


def request(model: Identified, verb: str, settings: Settings) -> PreflightRequest:
    return PreflightRequest(
        verb=verb, checkpoint=model.checkpoint, architecture="a", generation="g",
        layout=model.layout, settings=settings,
    )  # fmt: skip
