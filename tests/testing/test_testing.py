"""`qcore.testing`: what it writes, read by others."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from safetensors import safe_open

import qcore.testing
from qcore.errors import InputError
from qcore.testing import (
    discover_plugins,
    fake_checkpoint,
    open_checkpoint,
    write_distribution,
    write_sparse_checkpoint,
)

MIB = 2**20
SHAPES = {"a": (1024, 3 * 1024), "b": (0, 5), "c": (7,), "d": ()}
DTYPES = {"a": "F32", "b": "BF16", "c": "F8_E4M3", "d": "I64"}


def test_public_names_are_sorted_and_documented() -> None:
    names = qcore.testing.__all__
    # As ruff sorts: classes first.
    assert sorted(names, key=lambda name: (not name[0].isupper(), name)) == names
    assert all(f"`{name}`" in (qcore.testing.__doc__ or "") for name in names)
    assert all(getattr(qcore.testing, name) is not None for name in names)


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_a_sparse_checkpoint_reads_as_zeros_and_takes_no_disk(tmp_path: Path, shards: int) -> None:
    folder = tmp_path / "a" / "model"
    config = {"model_type": "toy"}
    assert folder == write_sparse_checkpoint(
        folder, config, SHAPES, dtype=DTYPES.__getitem__, shards=shards
    )
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) == shards
    read = {}
    for file in files:
        with safe_open(file, "pt") as tensors:
            read |= {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    assert {name: tuple(tensor.shape) for name, tensor in read.items()} == SHAPES
    assert not any(tensor.float().any() for tensor in read.values())
    assert sum(file.stat().st_size for file in files) > 12 * MIB
    assert sum(file.stat().st_blocks * 512 for file in files) < MIB
    seen = open_checkpoint(folder)
    assert (seen.path, seen.config) == (folder, config)
    assert {name: header.dtype for name, header in seen.headers.items()} == DTYPES


def test_open_checkpoint_raises_as_core_does(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        open_checkpoint(tmp_path)
    assert caught.value.code == "QC-CKPT-001"


def test_a_fake_checkpoint_has_all_that_a_hook_may_read() -> None:
    config = {"model_type": "toy"}
    plain = fake_checkpoint(config)
    assert (plain.config, plain.template, plain.sidecars) == (config, None, ())
    assert (dict(plain.headers), plain.tokenizer_config, plain.generation_config) == ({}, {}, {})
    for call, code in (
        (lambda: plain.read_json("processor_config.json"), "QC-CKPT-006"),
        (plain.load_tokenizer, "QC-TOKENIZER-001"),
    ):
        with pytest.raises(InputError) as caught:
            call()
        assert caught.value.code == code
    template = fake_checkpoint(config, "{{ messages[0].content }}{{ mood }}").template
    assert template is not None
    assert template.switches() == {"mood"}
    assert template.render([{"role": "user", "content": "hi"}], mood="!") == "hi!"


@pytest.mark.parametrize(
    ("more", "status", "reason"),
    [
        ({}, "available", None),
        ({"requires": None}, "available", "does not say which"),
        ({"requires": "qcore-framework>=99"}, "incompatible", "requires qcore-framework>=99"),
        ({"entry_points": "[qcore.plugins]\nx = not a module\n"}, "invalid", "not a module"),
    ],
)
def test_a_written_distribution_is_discovered(
    tmp_path: Path, more: dict[str, str | None], status: str, reason: str | None
) -> None:
    write_distribution(tmp_path, "toy-dist", module="x", model_types=("toy",), **more)  # type: ignore[arg-type]
    plugins = discover_plugins(tmp_path)
    (info,) = plugins.infos
    assert (info.distribution, info.version, info.status.value) == ("toy-dist", "1.0", status)
    assert info.reason is None if reason is None else reason in (info.reason or "")
    assert [*plugins.model_types] == ([] if "entry_points" in more else ["toy"])


def test_no_other_plugin_is_seen(tmp_path: Path) -> None:
    assert discover_plugins().infos == []
    (info,) = discover_plugins(tmp_path, distributions=["qcore-qwen35"]).infos
    assert info.name == "qwen35"
    with pytest.raises(PackageNotFoundError):
        discover_plugins(distributions=["no-such-distribution"])
