"""Decoding by a captured graph on a card: the same logits, bit for bit, as the step it was made of.

Dense and sparse; 16-bit weights alone, LoRA on them, LoRA on 4 bit; over several spans, so that
graphs are captured on the way, and for a second document, which only replays.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qcore.adapter.targets import targets
from qcore.inference import decoder as decoding
from qcore.inference.decoder import Decoder, Way, way_of
from qcore.inference.generate import Generator
from qcore.inference.generation_config import Sampling
from qcore.nn.device import DTYPES
from qcore.nn.kernels.registry import choose, installed
from qcore.nn.load import load
from qcore.nn.model import Model, ops_of
from qcore.nn.qlora.lora_layer import Lora
from qcore.plugins.resolve_model import identify
from qcore_qwen35.ops.delta_inputs.reference import Heads
from qcore_qwen35.ops.delta_step import reference
from qcore_qwen35.ops.verify import verify
from qcore_qwen35.tiny import write as write_tiny

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
#: Head sizes of the published models, few of everything else.
WIDE: dict[str, Any] = {
    "hidden_size": 512, "intermediate_size": 1024, "head_dim": 256, "num_attention_heads": 4,
    "num_key_value_heads": 2, "linear_num_key_heads": 4, "linear_num_value_heads": 8,
    "linear_key_head_dim": 128, "linear_value_head_dim": 128,
}  # fmt: skip
SPARSE: dict[str, Any] = {
    "moe_intermediate_size": 128, "shared_expert_intermediate_size": 128, "num_experts": 16,
    "num_experts_per_tok": 4,
}  # fmt: skip
#: LoRA or not, 4 bit or not.
HELD_AS = {"16 bit": (False, False), "LoRA": (True, False), "4 bit and LoRA": (True, True)}


@pytest.fixture(autouse=True)
def _needs_cuda() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.fixture(scope="module", params=["dense", "moe"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wide") / "base"
    moe = request.param == "moe"
    text = {key: n for key, n in WIDE.items() if not (moe and key == "intermediate_size")}
    write_tiny(folder, moe=moe, **text, **(SPARSE if moe else {}))
    return folder


def _model(folder: Path, dtype: str, *, lora: bool = False, quantize: bool = False) -> Model:
    found = identify(str(folder))
    architecture, config = found.decision.architecture, found.checkpoint.config
    used = ops_of(architecture, config, found.layout)
    chosen = choose(installed(found.plugins), CUDA, {}, used)
    assert chosen.backends["qwen35::delta_step"] == "triton", chosen.lines()
    assert way_of(chosen) == (Way.CAPTURED, "")
    adapters = targets(found.layout, (), Lora(r=8, lora_alpha=16)) if lora else {}
    model = Model(architecture, config, found.layout, DTYPES[dtype], adapters, chosen)
    load(model, found.layout, found.checkpoint, device=CUDA, quantize=quantize)
    draw = torch.Generator().manual_seed(3)
    for name, module in model.adapters():
        module.reset_lora(name, 0, CUDA)
        assert module.lora_B is not None
        module.lora_B.data.copy_(0.05 * torch.randn(module.lora_B.shape, generator=draw))
    return model.eval()


def _prompt(length: int) -> Tensor:
    draw = torch.Generator().manual_seed(length)
    return torch.randint(0, 300, (length,), generator=draw).to(CUDA)


def _greedy(decoder: Decoder, ids: Tensor, count: int) -> tuple[list[int], Tensor]:
    logits = [decoder.start(ids, len(ids) + count).clone()]
    while len(logits) < count:
        logits.append(decoder.next(logits[-1].argmax().reshape(1)).clone())
    return [int(one.argmax()) for one in logits], torch.stack(logits)


def _following(decoder: Decoder, ids: Tensor, tokens: list[int]) -> Tensor:
    """Logits where the tokens are given."""
    given = torch.tensor(tokens, device=CUDA)
    logits = [decoder.start(ids, len(ids) + len(tokens) + 1).clone()]
    logits += [decoder.next(token[None]).clone() for token in given]
    return torch.stack(logits)


@pytest.mark.parametrize("case", HELD_AS)
def test_a_graph_replays_its_step_bit_for_bit(
    base: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "FIRST", 32)
    lora, quantize = HELD_AS[case]
    model = _model(base, "bf16", lora=lora, quantize=quantize)
    graph, step = (Decoder(model, CUDA, way) for way in (Way.CAPTURED, Way.HELD))
    for length, count in ((20, 60), (9, 30), (40, 30)):
        expected, wanted = _greedy(step, _prompt(length), count)
        found, logits = _greedy(graph, _prompt(length), count)
        assert bool(wanted.isfinite().all())
        assert found == expected
        assert torch.equal(logits, wanted)
    assert graph.way is Way.CAPTURED
    assert graph.captures == 3  # 32, 64 and 128 tokens, for all three documents


def test_in_float32_tokens_are_those_of_plain_steps(base: Path) -> None:
    model = _model(base, "fp32")
    graph, plain = (Decoder(model, CUDA, way) for way in (Way.CAPTURED, Way.PLAIN))
    expected, wanted = _greedy(plain, _prompt(37), 40)
    found, logits = _greedy(graph, _prompt(37), 40)
    assert found == expected
    assert float((logits - wanted).abs().max()) <= 1e-4 * float(wanted.abs().max())


def test_in_bfloat16_a_graph_errs_no_more_than_plain_steps(base: Path) -> None:
    """Both beside the same model in float32, on the tokens that it picks."""
    exact = Decoder(_model(base, "fp32"), CUDA, Way.PLAIN)
    tokens, _ = _greedy(exact, _prompt(37), 40)
    wanted = _following(exact, _prompt(37), tokens)
    model = _model(base, "bf16")
    errors = [
        float((_following(Decoder(model, CUDA, way), _prompt(37), tokens) - wanted).norm())
        / float(wanted.norm())
        for way in (Way.CAPTURED, Way.PLAIN)
    ]
    print(f"\n{base.parent.name}: captured {errors[0]:.4f}, plain {errors[1]:.4f}")
    assert errors[0] <= 1.2 * errors[1] + 1e-3


def test_another_adapter_is_another_graph(base: Path) -> None:
    model = _model(base, "bf16", lora=True)
    graph = Decoder(model, CUDA, Way.CAPTURED)
    _greedy(graph, _prompt(9), 6)
    for _, module in model.adapters():
        assert module.lora_B is not None
        module.set_lora(torch.zeros_like(module.lora_A), torch.zeros_like(module.lora_B))
    expected = _greedy(Decoder(model, CUDA, Way.HELD), _prompt(9), 6)[1]
    assert torch.equal(_greedy(graph, _prompt(9), 6)[1], expected)
    assert graph.captures == 2


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_generate_gives_the_tokens_of_the_step(base: Path, temperature: float) -> None:
    generator = Generator(str(base), device="cuda", dtype="bf16")
    assert generator.decoder.way is Way.CAPTURED
    ids = generator.tokenizer.encode("Name a city in Peru.", add_special_tokens=False).ids
    found = [
        generator.decode(list(ids), 24, Sampling(temperature=temperature), 5) for _ in range(2)
    ]
    generator.decoder = Decoder(generator.model, CUDA, Way.HELD)
    expected = generator.decode(list(ids), 24, Sampling(temperature=temperature), 5)
    assert found == [expected, expected]


def test_the_step_s_kernels() -> None:
    """As the registry judges them; states are advanced where they are, many times over."""
    from qcore_qwen35.ops.delta_step import triton

    verdict = verify("delta_step", CUDA)
    assert verdict.good, verdict.text
    heads, draw = Heads(16, 128, 32, 128), torch.Generator().manual_seed(0)
    channels = 2 * 16 * 128 + 32 * 128

    def rand(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw).to(CUDA)

    frozen = (0.5 * rand(channels, 1, 4), rand(32) - 1, rand(32))
    ours = [torch.zeros(4, channels, device=CUDA), torch.zeros(1, 32, 128, 128, device=CUDA)]
    theirs = [one.clone() for one in ours]
    at = [one.data_ptr() for one in ours]
    for _ in range(50):
        qkv, a, b = rand(1, channels + 64).split((channels, 32, 32), 1)
        found = triton.delta_step(qkv, a, b, *frozen, *ours, heads)
        expected = reference.delta_step(qkv, a, b, *frozen, *theirs, heads)
        assert float((found - expected).norm()) <= 1e-4 * float(expected.norm())
    for one, two in zip(ours, theirs, strict=True):
        assert float((one - two).norm()) <= 1e-4 * float(two.norm())
    assert [one.data_ptr() for one in ours] == at
