"""A mixture of experts through the verbs: stopped and resumed, generated from, verified."""

from __future__ import annotations

import gc
import json
import signal
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.e2e_kit import command, figure, ours, signalled
from support.moe_kit import rewrite, tensors_of
from support.run_kit import SHORT, raw, start, stop_at, words
from support.tiers import fast

from qcore.api.blocks import Packed
from qcore.errors import Interrupted
from qcore.inference.generate import Generator
from qcore.inference.generation_config import Sampling
from qcore.io.artifact import verify
from qcore.nn.qlora.lora_layer import Lora
from qcore.plugins.resolve_model import identify
from qcore_qwen35.tiny import write

pytestmark = pytest.mark.usefixtures("one_thread")
BASE: dict[str, Any] = SHORT | {"max_steps": 5, "learning_rate": 2e-2}
RECIPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "everything": {
        "dtype": "bf16", "router_aux_loss_coef": 0.01, "gradient_accumulation_steps": 2,
        "group_r": {"experts": 2}, "target_groups": ("attn", "gdn", "experts", "router"),
        "save_steps": 2, "eval_fraction": 0.25, "eval_steps": 2,
    },
    "16 bit": {"quantization": "none", "gradient_checkpointing": False},
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "tiny"
    write(folder, moe=True)
    return folder


def run(base: Path, rows: Path, out: Path, *, resume: bool = False, **settings: Any) -> None:
    start(base, rows, out, BASE | settings, resume=resume)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_stopped_at_step_3(
    base: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str
) -> None:
    options = RECIPES[recipe]
    run(base, rows, tmp_path / "whole", **options)
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        with pytest.raises(Interrupted):
            run(base, rows, tmp_path / "out", **options)
    assert verify(tmp_path / "out.run" / "checkpoint-3").ok
    run(base, rows, tmp_path / "out", resume=True, **options)
    assert raw(tmp_path / "out") == raw(tmp_path / "whole")
    assert verify(tmp_path / "out").ok


@pytest.mark.slow
def test_the_layout_of_the_base_does_not_change_a_run(
    base: Path, rows: Path, tmp_path: Path
) -> None:
    """Fused, per expert or mixed: the same adapter to the byte, and a stopped run goes on."""
    for layout in ("fused", "apart", "mixed"):
        other = rewrite(base, tmp_path / layout, layout)
        run(other, rows, tmp_path / f"{layout}-adapter", max_steps=2)
    assert raw(tmp_path / "fused-adapter") == raw(tmp_path / "apart-adapter")
    assert raw(tmp_path / "fused-adapter") == raw(tmp_path / "mixed-adapter")


@pytest.mark.parametrize("aux", fast([0.0, 0.1], 0.1))
@pytest.mark.parametrize("recompute", fast(["none", "elementwise", "full"], "elementwise"))
def test_a_step_leaves_nothing_behind(base: Path, recompute: str, aux: float) -> None:
    """What routers leave in a batch has a graph; a batch in that graph would never go."""
    model, gone = ours(base, lora=Lora(r=4, lora_alpha=8)).train(), []
    for number in range(2):
        ids = torch.randint(0, 300, (65,), generator=torch.Generator().manual_seed(number))
        batch = Packed.of([ids], [ids.roll(-1)])
        loss = model.loss(batch, recompute=recompute)
        balance = model.trunk.aux_loss(batch)
        assert balance is not None
        (loss + aux * balance).backward()
        gone.append(weakref.ref(batch.ids))
        del ids, batch, loss, balance
    gc.collect()
    assert [one() for one in gone] == [None, None]


@pytest.mark.slow
def test_the_load_balancing_coefficient_acts(base: Path, rows: Path, tmp_path: Path) -> None:
    for name, coefficient in (("off", 0.0), ("on", 0.1)):
        run(base, rows, tmp_path / name, max_steps=2, router_aux_loss_coef=coefficient)
    off, on = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("off", "on"))
    assert off.keys() == on.keys()
    assert any(not torch.equal(off[name], on[name]) for name in off)


@pytest.mark.slow
def test_every_verb_on_the_command_line(base: Path, rows: Path, tmp_path: Path) -> None:
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    sets = {**BASE, "group_r.experts": 2, "router_aux_loss_coef": 0.001}
    arguments = words(base, rows, adapter, sets)
    stopped = signalled(3, signal.SIGINT, *arguments)
    assert stopped.returncode == 75, stopped.stderr
    done = command(*arguments, "--resume")
    assert done.returncode == 0, done.stderr
    (line,) = [x for x in done.stderr.splitlines() if "held in 4 bit" in x]
    figure(line.strip())
    share = 100 * four_bit_share(base)
    assert f"{share:.1f} % of the loaded parameters are held in 4 bit" in line
    assert "Traceback" not in done.stderr
    told = command("verify", adapter)
    assert told.returncode == 0, told.stderr
    told = command("merge", "--model", base, "--adapter", adapter, "--output", merged)
    assert told.returncode == 0, told.stderr
    assert command("verify", merged).returncode == 0
    answers = []
    for more in ([base], [base, "--adapter", adapter], [merged]):
        told = command("generate", *more, "--prompt", "Name a city in Peru.",
                       "--max-new-tokens", "6", "--device", "cpu")  # fmt: skip
        assert told.returncode == 0, told.stderr
        answers.append(told.stdout)
    figure(f"base, adapter, merge say {answers}")
    told = command(*words(base, rows, tmp_path / "no", {"lora_dropout": 0.1}))
    assert told.returncode == 2, told.stderr
    last = told.stderr.strip().splitlines()
    assert sum("QC-LORA-003" in x for x in last) == 1
    figure(last[-1])


def four_bit_share(base: Path) -> float:
    """By hand: every linear map and stack of the trunk, less the gates, over all that is loaded."""
    loaded = {n: v.numel() for n, v in tensors_of(base).items() if not n.startswith("mtp.")}
    four = sum(
        numel
        for name, numel in loaded.items()
        if ".mlp.experts." in name
        or name.split(".")[-2] in (
            "q_proj", "k_proj", "v_proj", "o_proj", "in_proj_qkv", "in_proj_z", "out_proj",
            "gate_proj", "up_proj", "down_proj",
        )
    )  # fmt: skip
    return four / sum(loaded.values())


@pytest.mark.slow
def test_cached_decoding_with_an_expert_adapter(base: Path, rows: Path, tmp_path: Path) -> None:
    run(base, rows, tmp_path / "a", max_steps=3, learning_rate=5e-2)
    told = Generator(str(base), adapter=tmp_path / "a", device="cpu", dtype="fp32")
    plain = Generator(str(base), device="cpu", dtype="fp32")
    ids = told.tokenizer.encode("Name a city in Peru.", add_special_tokens=False).ids
    new, _ = told.decode(list(ids), 8, Sampling(), 0)
    known = list(ids)
    for token in new:
        with torch.no_grad():
            logits = told.model.logits(Packed.of([torch.tensor(known)]))
        assert int(logits[-1, : len(told.tokenizer.get_vocab())].argmax()) == token
        known.append(token)
    with torch.no_grad():
        both = [x.model.logits(Packed.of([torch.tensor(known)])) for x in (told, plain)]
    assert float((both[0] - both[1]).abs().max()) > 0.1


def test_the_manifest_says_how_experts_were_trained(base: Path, rows: Path, tmp_path: Path) -> None:
    run(base, rows, tmp_path / "a", max_steps=1)
    manifest = json.loads((tmp_path / "a" / "MANIFEST.json").read_text())
    lines = {line["group"]: line for line in manifest["meta"]["coverage"]}
    experts = lines["experts"]
    text = identify(str(base)).checkpoint.config["text_config"]
    e, h, i = (text[k] for k in ("num_experts", "hidden_size", "moe_intermediate_size"))
    assert experts["parameters"] == experts["four_bit"] == 4 * 3 * e * h * i
    assert (experts["modules"], experts["hit"]) == (8, 8)
    assert experts["trained"] == 4 * e * 4 * ((h + 2 * i) + (i + h))
    assert 4.1 < experts["bits"] < 4.8
    figure(f"experts: {experts}")
    router = lines["router"]
    assert (router["hit"], router["four_bit"]) == (0, 0)
