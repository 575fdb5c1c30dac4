"""What a plugin's layer raises while it runs is an error that names the plugin and the layer."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from support import wide_arch
from support.cli_kit import Ended, here
from support.run_kit import SHORT, start, words
from support.tiers import fast
from torch import Tensor

from qcore.errors import NumericError, PluginError
from qcore.nn.layer_errors import GuardedTrunk
from qcore.plugins.manager import Owner

LAYER = "model.layers.1"
_FORWARD = wide_arch.Layer.forward


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(wide_arch.install(tmp_path_factory.mktemp("site"))))
        yield wide_arch.checkpoint(tmp_path_factory.mktemp("wide"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    path.write_text(f"{json.dumps(row)}\n" * 4)
    return path


@pytest.fixture(scope="module")
def adapter(folder: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "out"
    start(folder, rows, out, SHORT | {"max_steps": 1})
    return out


def in_backward() -> bool:
    return bool(torch._C._current_graph_task_id() != -1)


#: When a layer fails: in which verb, on what.
WHEN: dict[str, Callable[[Tensor, Any], bool]] = {
    "plan": lambda x, cache: x.is_meta,
    "train": lambda x, cache: not x.is_meta and not in_backward(),
    "train none": lambda x, cache: not x.is_meta,
    "backward": lambda x, cache: not x.is_meta and in_backward(),
    "evaluation": lambda x, cache: not x.is_meta and not torch.is_grad_enabled(),
    "generate": lambda x, cache: cache is not None,
    "merge": lambda x, cache: not x.is_meta,
}


def break_layers(
    patch: pytest.MonkeyPatch, when: Callable[[Tensor, Any], bool], error: BaseException
) -> None:
    """The second layer raises."""

    def forward(self: Any, x: Tensor, batch: Any, cache: Any = None) -> Tensor:
        if self.number == 1 and when(x, cache):
            raise error
        return _FORWARD(self, x, batch, cache)

    patch.setattr(wide_arch.Layer, "forward", forward)


@pytest.fixture
def run(
    folder: Path, rows: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[[str], Ended]:
    def train(**settings: Any) -> Ended:
        return here(capsys, *words(folder, rows, tmp_path / "out", SHORT | settings))

    verbs: dict[str, Callable[[], Ended]] = {
        "plan": lambda: here(capsys, "plan", folder, "--max-length", 64),
        "train": lambda: train(max_steps=1, recompute="full"),
        "train none": lambda: train(max_steps=1, recompute="none"),
        "backward": lambda: train(max_steps=1, recompute="full"),
        "evaluation": lambda: train(max_steps=1, eval_fraction=0.25, recompute="elementwise"),
        "generate": lambda: here(
            capsys, "generate", folder, "--prompt", "a", "--device", "cpu", "--max-new-tokens", 2
        ),
        "merge": lambda: here(
            capsys,
            "merge",
            "--model",
            folder,
            "--adapter",
            adapter,
            "--output",
            tmp_path / "merged",
        ),
    }
    return lambda verb: verbs[verb]()


@pytest.mark.parametrize("verb", fast(WHEN, *[*WHEN][::3]))
def test_the_plugin_and_the_layer_are_named(
    run: Callable[[str], Ended], monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    break_layers(monkeypatch, WHEN[verb], KeyError("no such thing"))
    ended = run(verb)
    line = ended.err.splitlines()[-1]
    assert ended.code == 69, ended.err
    assert line.startswith("error[QC-PLUGIN-002] "), line
    assert "plugin 'wide' (qcore-wide 1.0)" in line
    assert LAYER in line
    assert "KeyError: 'no such thing' (test_layer_errors.py:" in line
    assert "Traceback" not in ended.err


@pytest.mark.parametrize("verb", ["train", "backward"])
def test_an_error_of_ours_passes_as_it_is(
    run: Callable[[str], Ended], monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    break_layers(monkeypatch, WHEN[verb], NumericError("QC-ACME-001", "is not finite"))
    assert "error[QC-ACME-001]" in run(verb).err


@pytest.mark.parametrize("verb", ["train", "backward"])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_memory_that_runs_out_is_not_the_plugin_s_fault(
    run: Callable[[str], Ended], monkeypatch: pytest.MonkeyPatch, verb: str, error: Exception
) -> None:
    break_layers(monkeypatch, WHEN[verb], error)
    assert "error[QC-PLAN-004]" in run(verb).err


@pytest.mark.parametrize("verb", ["train", "backward"])
def test_an_interrupt_passes(
    folder: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    break_layers(monkeypatch, WHEN[verb], KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        start(folder, rows, tmp_path / "out", SHORT | {"max_steps": 1, "recompute": "full"})


@pytest.mark.parametrize("method", ["embed", "final"])
@pytest.mark.parametrize("verb", fast(["plan", "train", "generate", "merge"], "train", "merge"))
def test_the_plugin_and_the_method_of_the_trunk_are_named(
    run: Callable[[str], Ended], monkeypatch: pytest.MonkeyPatch, verb: str, method: str
) -> None:
    whole = getattr(wide_arch.Trunk, method)

    def fail(self: Any, x: Any) -> Tensor:
        out: Tensor = whole(self, x)
        if out.is_meta == (verb == "plan"):
            raise KeyError("no such thing")
        return out

    monkeypatch.setattr(wide_arch.Trunk, method, fail)
    ended = run(verb)
    line = ended.err.splitlines()[-1]
    assert ended.code == 69, ended.err
    assert line.startswith("error[QC-PLUGIN-002] model: "), line
    assert f"plugin 'wide' (qcore-wide 1.0) failed in Trunk.{method}" in line
    assert "Traceback" not in ended.err


def test_memory_that_runs_out_in_the_trunk_is_not_the_plugin_s_fault(
    run: Callable[[str], Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = wide_arch.Trunk.final

    def fail(self: Any, x: Tensor) -> Tensor:
        if not x.is_meta:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(self, x)

    monkeypatch.setattr(wide_arch.Trunk, "final", fail)
    assert "error[QC-PLAN-004]" in run("train").err


def test_the_load_balance_loss_of_a_trunk_is_named() -> None:
    class Trunk(torch.nn.Module):
        def aux_loss(self, batch: Any) -> Any:
            raise KeyError("no such thing")

    trunk = GuardedTrunk(cast(Any, Trunk()), Owner("plugin 'wide'"), "model")
    with pytest.raises(PluginError, match=r"model: plugin 'wide' failed in Trunk\.aux_loss"):
        trunk.aux_loss(cast(Any, None))
