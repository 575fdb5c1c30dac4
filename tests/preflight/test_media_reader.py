"""What a plugin's media reader raises is an error that names the plugin and the method."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support import toy_tower

from qcore.api.media import MediaReader, Payload, Placed, RowError
from qcore.errors import InputError, PluginError
from qcore.plugins.resolve_model import Identified, identify
from qcore.preflight.media_reader import ContainedReader
from qcore.preflight.modality import reader_of
from qcore.reporting import Reporter
from qcore_qwen35.tiny import write

CALLS: dict[str, Callable[[MediaReader], object]] = {
    "read": lambda reader: reader.read(Payload(kind="toy", sha256="0", options={})),
    "expand": lambda reader: reader.expand("text", ()),
    "place": lambda reader: reader.place([1, 2], ()),
    "batch": lambda reader: reader.batch((), torch.arange(0)),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Identified]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(toy_tower.install(tmp_path_factory.mktemp("site"))))
        write(path := tmp_path_factory.mktemp("toy"))
        toy_tower.add(path)
        yield identify(str(path))


class Reader:
    """A reader each of whose methods raises `error`."""

    kinds, keys, control = ("toy",), ("size",), ("<toy>",)

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error

    def _fail(self, *arguments: Any) -> Any:
        if self.error is not None:
            raise self.error
        return Placed(where=arguments[0], positions=())

    read = expand = place = batch = _fail


@pytest.fixture
def reader(model: Identified, monkeypatch: pytest.MonkeyPatch) -> Callable[..., MediaReader]:
    def make(broken: object) -> MediaReader:
        monkeypatch.setattr(toy_tower, "Reader", lambda: broken)
        made = reader_of(model, Reporter())
        assert made is not None
        return made

    return make


@pytest.mark.parametrize("method", CALLS)
@pytest.mark.parametrize("error", [KeyError("no such thing"), SystemExit(3)])
def test_the_plugin_and_the_method_are_named(
    reader: Callable[..., MediaReader], method: str, error: BaseException
) -> None:
    with pytest.raises(PluginError) as caught:
        CALLS[method](reader(Reader(error)))
    assert caught.value.code == "QC-PLUGIN-002"
    assert "plugin 'toy'" in caught.value.what
    assert f"MediaReader.{method}" in caught.value.what
    assert f"{type(error).__name__}: {error} (test_media_reader.py:" in caught.value.message
    assert "QCORE_DISABLE_PLUGINS=toy" in str(caught.value.fix)
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("method", CALLS)
@pytest.mark.parametrize(
    "error",
    [RowError("T-1", "is bad"), InputError("T-2", "is bad"), MemoryError(), KeyboardInterrupt()],
)
def test_a_bad_row_an_error_of_qcore_memory_and_an_interrupt_pass(
    reader: Callable[..., MediaReader], method: str, error: BaseException
) -> None:
    with pytest.raises(type(error)) as caught:
        CALLS[method](reader(Reader(error)))
    assert caught.value is error


def test_what_a_reader_returns_passes(reader: Callable[..., MediaReader]) -> None:
    made = reader(Reader())
    assert (made.kinds, made.keys, made.control) == (("toy",), ("size",), ("<toy>",))
    assert made.place([1, 2], ()) == Placed(where=[1, 2], positions=())  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["kinds", "keys", "control"])
def test_an_attribute_that_raises_is_named(reader: Callable[..., MediaReader], name: str) -> None:
    class Broken(Reader):
        pass

    def fail(self: object) -> Any:
        raise KeyError("no such thing")

    setattr(Broken, name, property(fail))
    with pytest.raises(PluginError, match=f"MediaReader.{name}"):
        reader(Broken())


def test_a_reader_without_measuring_reads_as_for_a_run(
    reader: Callable[..., ContainedReader],
) -> None:
    made = reader(Reader())
    assert made.measuring(160) is made


def test_a_fault_in_measuring_is_the_plugins(reader: Callable[..., ContainedReader]) -> None:
    class Broken(Reader):
        def measuring(self, size: int) -> MediaReader:
            raise KeyError("no such thing")

    with pytest.raises(PluginError) as caught:
        reader(Broken()).measuring(160)
    assert "MediaReader.measuring" in caught.value.what
