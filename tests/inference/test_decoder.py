"""The step that a GPU captures equals what a layer does with any cache, token for token.

On the CPU it is computed and not captured; capturing is tested on a card (`tests/gpu`).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qcore.adapter.targets import targets
from qcore.api.blocks import Packed
from qcore.inference import decoder as decoding
from qcore.inference.decoder import Decoder, Way, span_of, way_of
from qcore.nn.attention.varlen import cached_attention, span_bias, step_attention
from qcore.nn.kernels.builtin import core_kernels, core_ops
from qcore.nn.kernels.registry import REFERENCE, Chosen, Line, Listed, State, Used, choose
from qcore.nn.load import load
from qcore.nn.model import Model
from qcore.nn.qlora.lora_layer import Lora
from qcore.plugins.resolve_model import identify
from qcore_qwen35.tiny import write

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["dense", "moe"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp(request.param) / "base"
    write(where, moe=request.param == "moe")
    return where


@pytest.fixture(params=["fp32", "4 bit and LoRA"])
def model(request: pytest.FixtureRequest, folder: Path) -> Model:
    found = identify(str(folder))
    adapted = request.param != "fp32"
    lora = targets(found.layout, (), Lora(r=4, lora_alpha=8)) if adapted else {}
    made = Model(
        found.decision.architecture, found.checkpoint.config, found.layout, torch.float32, lora
    )
    load(made, found.layout, found.checkpoint, device=CPU, quantize=adapted)
    draw = torch.Generator().manual_seed(3)
    for name, module in made.adapters():
        module.reset_lora(name, 0, CPU)
        assert module.lora_B is not None
        module.lora_B.data.copy_(0.1 * torch.randn(module.lora_B.shape, generator=draw))
    return made.eval()


def _greedy(decoder: Decoder, ids: Tensor, count: int) -> tuple[list[int], Tensor]:
    """New tokens, and the logits after each but the last ``[count, V]``."""
    logits = [decoder.start(ids, len(ids) + count).clone()]
    while len(logits) < count:
        logits.append(decoder.next(logits[-1].argmax().reshape(1)).clone())
    return [int(one.argmax()) for one in logits], torch.stack(logits)


def _prompt(length: int) -> Tensor:
    return torch.randint(0, 300, (length,), generator=torch.Generator().manual_seed(length))


def test_a_held_step_equals_a_plain_one(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over three spans, then again from a shorter prompt in the caches of before."""
    monkeypatch.setattr(decoding, "FIRST", 4)
    held, plain = Decoder(model, CPU, Way.HELD), Decoder(model, CPU, Way.PLAIN)
    for length, count in ((5, 14), (2, 9)):
        expected, wanted = _greedy(plain, _prompt(length), count)
        found, logits = _greedy(held, _prompt(length), count)
        assert found == expected
        assert float((logits - wanted).abs().max()) <= 1e-5
        assert held.done == length + count - 1
    assert held.way is Way.HELD


def test_a_held_step_equals_the_whole(model: Model) -> None:
    """As closely as any cache does: a document in one piece is summed in another order."""
    ids = _prompt(7)
    new, logits = _greedy(Decoder(model, CPU, Way.HELD), ids, 6)
    _, plain = _greedy(Decoder(model, CPU, Way.PLAIN), ids, 6)
    with torch.no_grad():
        whole = model.logits(Packed.of([torch.cat([ids, torch.tensor(new[:-1])])]))[6:]
    usual = float((plain - whole).abs().max())
    bound = max(2 * usual, 1e-5 * float(whole.abs().max()))
    assert bound <= 5e-5 * float(whole.abs().max())
    assert float((logits - whole).abs().max()) <= bound


def test_nothing_of_the_document_before_is_left(model: Model) -> None:
    """Not even what is not finite."""
    decoder = Decoder(model, CPU, Way.HELD)
    _, expected = _greedy(decoder, _prompt(9), 3)
    for cache in decoder._caches:
        for value in (getattr(cache, name, None) for name in ("k", "v", "conv", "state")):
            if value is not None:
                with torch.inference_mode():
                    value.fill_(float("nan"))
    _, again = _greedy(decoder, _prompt(9), 3)
    assert torch.equal(again, expected)


def test_tensors_of_a_held_step_stay(model: Model) -> None:
    """What a graph would write to: addresses are those of the first step."""
    decoder = Decoder(model, CPU, Way.HELD)
    decoder.start(_prompt(6), 20)

    def addresses() -> list[int]:
        found = [decoder._out.data_ptr(), decoder._token.data_ptr(), decoder._at.data_ptr()]
        for cache in decoder._caches:
            found += [
                getattr(cache, name).data_ptr()
                for name in ("k", "v", "conv", "state")
                if hasattr(cache, name)
            ]
        return found

    before = addresses()
    for token in (3, 1, 4):
        decoder.next(torch.tensor([token]))
    assert addresses() == before
    assert int(decoder._at) == decoder.done == 9


@pytest.mark.parametrize("way", [Way.PLAIN, Way.HELD])
def test_a_document_without_room_says_so(
    model: Model, way: Way, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "FIRST", 4)
    decoder = Decoder(model, CPU, way)
    decoder.start(_prompt(3), 4)
    decoder.next(torch.tensor([1]))
    with pytest.raises(ValueError, match="4 tokens cannot hold 5"):
        decoder.next(torch.tensor([1]))


def test_an_adapter_that_changed_is_noticed(model: Model) -> None:
    decoder = Decoder(model, CPU, Way.HELD)
    decoder._captured_of = decoder._holds()
    decoder.start(_prompt(3), 9)
    decoder.next(torch.tensor([1]))
    assert decoder._unchanged()
    for _, module in model.adapters():
        assert module.lora_A is not None
        module.lora_A.data = module.lora_A.data.clone()
        assert not decoder._unchanged()
        decoder._captured_of = decoder._holds()
        module.lora = None
        assert not decoder._unchanged()
        return
    model.head.data = model.head.data.clone()
    assert not decoder._unchanged()


def test_a_cache_that_cannot_be_held_is_used_as_it_is(model: Model) -> None:
    class Opaque:
        def __init__(self, cache: object) -> None:
            self.cache = cache

    class Wrapped(torch.nn.Module):
        def __init__(self, layer: torch.nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor, batch: Packed, cache: Opaque) -> Tensor:
            out: Tensor = self.layer(x, batch, cache.cache)
            return out

        def new_cache(self, tokens: int, device: torch.device) -> Opaque:
            return Opaque(self.layer.new_cache(tokens, device))  # type: ignore[operator]

    expected, _ = _greedy(Decoder(model, CPU, Way.PLAIN), _prompt(5), 4)
    layers = model.trunk.layers
    layers[0] = Wrapped(layers[0])  # type: ignore[index]
    decoder = Decoder(model, CPU, Way.CAPTURED)
    found, _ = _greedy(decoder, _prompt(5), 4)
    assert decoder.way is Way.PLAIN
    assert found == expected


def test_graphs_are_for_gpus_whose_ops_do_not_wait() -> None:
    def way(device: str, *lines: Line) -> tuple[Way, str]:
        return way_of(Chosen(device=device, table=lines, functions={}))

    fine = Line(op="rms_norm", backend=REFERENCE, state=State.CHOSEN)
    slow = Line(op="experts", backend=REFERENCE, state=State.CHOSEN, waits=True)
    other = replace(slow, backend="theirs")
    unused = replace(slow, state=State.AVAILABLE)
    assert way("cpu", slow) == (Way.PLAIN, "")
    assert way("cuda", fine, unused) == (Way.CAPTURED, "")
    assert way("cuda", fine, slow) == (
        Way.PLAIN,
        "experts is computed by its reference, which waits for the device",
    )
    assert way("cuda", other)[1].startswith("experts is computed by theirs, which waits")


@pytest.mark.parametrize("op", ["experts", "nf4_dequantize"])
def test_references_of_core_that_wait_say_so(op: str) -> None:
    ops = {op.name: op for op in core_ops()}
    backends = [Listed(owner="qcore", kernel=one, op=ops[one.op]) for one in core_kernels()]
    chosen = choose(backends, CPU, {}, Used(ops={op}, config={}))
    (line,) = chosen.table
    assert (line.backend, line.waits) == (REFERENCE, True)


@pytest.mark.parametrize("length", [1, 2, 9, 16])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (8, 1)], ids=str)
def test_attention_of_a_room_is_that_of_what_is_filled(length: int, heads: tuple[int, int]) -> None:
    draw = torch.Generator().manual_seed(length)
    q = torch.randn(1, heads[0], 8, generator=draw)
    k, v = (torch.randn(16, heads[1], 8, generator=draw) for _ in range(2))
    expected = cached_attention(q, k[:length], v[:length], 0.3)
    found = step_attention(q, k, v, span_bias(torch.tensor([length - 1]), 16), 0.3)
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= 1e-6


def test_spans_are_powers_of_two() -> None:
    assert [span_of(n) for n in (1, 256, 257, 512, 513)] == [256, 256, 512, 512, 1024]
