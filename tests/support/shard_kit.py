"""A sharded base beside the whole one: ranks as processes, and what the first of them compares.

Each rank is a fork of the test's process, connected by gloo: nothing is imported again. The first
one loads the base whole too and returns its figures.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
from support.e2e_kit import CPU, documents, ours, random_b, wanted
from torch import Tensor

from qcore.adapter.targets import targets
from qcore.api.blocks import Packed
from qcore.errors import QcoreError
from qcore.nn.load import load
from qcore.nn.model import Model
from qcore.nn.moe.experts import Experts
from qcore.nn.qlora.linear import Linear
from qcore.nn.qlora.lora_layer import Lora
from qcore.nn.recompute import POLICIES
from qcore.nn.sharding import base as sharded_base
from qcore.nn.sharding import codes
from qcore.nn.sharding.base import ShardedBase
from qcore.nn.sharding.load import load_shards, share_of_bytes
from qcore.parallel.agreement import together
from qcore.parallel.world import World
from qcore.plugins.resolve_model import identify

#: Sizes of which rows are whole blocks; rows do not divide by 3, nor by 2 in places.
SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 192, "head_dim": 16, "num_attention_heads": 4,
    "num_key_value_heads": 2, "linear_key_head_dim": 12, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_value_head_dim": 16,
}  # fmt: skip
MOE: dict[str, Any] = {
    "moe_intermediate_size": 64, "num_experts": 7, "shared_expert_intermediate_size": 64,
}  # fmt: skip


def run(
    function: Callable[..., dict[str, Any] | None], size: int, *args: Any, **options: Any
) -> dict[str, Any]:
    """Call ``function(world, ...)`` on each rank; returns what it returns on the first one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pipes, ranks = [os.pipe() for _ in range(size)], []
    for rank in range(size):
        child = os.fork()
        if child == 0:
            os.environ |= {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            }  # fmt: skip
            _rank(pipes[rank][1], function, *args, **options)
        ranks.append(child)
    texts = []
    for _, writer in pipes:
        os.close(writer)
    try:
        for reader, _ in pipes:
            assert select.select([reader], [], [], 100)[0], "a rank does not answer"
            with os.fdopen(reader, encoding="utf-8") as stream:
                texts.append(stream.read())
            assert texts[-1].startswith("{"), texts[-1]
    finally:
        for rank in ranks:
            os.kill(rank, signal.SIGKILL)
            os.waitpid(rank, 0)
    figures: dict[str, Any] = json.loads(texts[0])
    return figures


def _rank(writer: int, function: Callable[..., Any], *args: Any, **options: Any) -> NoReturn:
    """Run a rank to its end, in a process of its own."""
    text = ""
    try:
        sharded_base.LEAST = 1024
        codes.FLOATING = options.pop("floating", False) or codes.FLOATING
        with World.of_environment(CPU, timedelta(seconds=60)) as world:
            text = json.dumps(function(world, *args, **options) or {})
    except BaseException:  # noqa: BLE001, the parent shows it
        text = traceback.format_exc()
    finally:
        os.write(writer, text.encode()[-60_000:])
        os._exit(0)


def sharded(
    folder: Path, world: World, lora: Lora, groups: Sequence[str], *, quantize: bool
) -> tuple[Model, dict[str, str], int]:
    """A model of which this rank holds its rows, the digests of the base, and the bytes read."""
    found = identify(str(folder))
    chosen = targets(found.layout, groups, lora)
    architecture = found.decision.architecture
    model = Model(architecture, found.checkpoint.config, found.layout, torch.float32, chosen)
    base = ShardedBase(model, found.layout, world, CPU, quantize=quantize)
    model.sharded = base
    read = [0]
    digests = load_shards(
        base, model, found.layout, found.checkpoint, device=CPU, quantize=quantize,
        progress=lambda count: read.__setitem__(0, read[0] + count),
    )  # fmt: skip
    for name, module in sharded_base.gathered_layers(base, dict(model.adapters())):
        module.reset_lora(name, 42, CPU)
    return model, digests, read[0]


def pack() -> Packed:
    """Documents of uneven lengths."""
    docs = documents((33, 7, 20))
    return Packed.of(docs, wanted(docs))


def gradients(model: Model, policy: str) -> dict[str, Tensor]:
    """Of the loss and of an auxiliary one, and the loss itself."""
    for _, parameter in model.trainable():
        parameter.grad = None
    batch = pack()  # layers leave things in it
    loss = model.loss(batch, recompute=policy)
    aux = model.trunk.aux_loss(batch)
    (loss if aux is None else loss + aux).backward()
    found = {name: p.grad for name, p in model.trainable() if p.grad is not None}
    return found | {"loss": loss.detach()}


def worst(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """The largest norm of a difference over the norm of what is expected."""
    assert found.keys() == expected.keys()
    return max(
        float((found[name] - one).norm() / one.norm().clamp(min=1e-30))
        for name, one in expected.items()
    )


def bits(model: Model) -> Iterator[tuple[str, Tensor]]:
    """All that is held of each map, as bytes; of a sharded model each layer in its turn."""
    for name, module in sharded_base.gathered_layers(model.sharded, model.lora_layers):
        if isinstance(module, Linear) and module.nf4 is not None:
            state = module.nf4.state
            held = [module.nf4.packed, state.absmax, state.state2.absmax, state.state2.code,
                    state.code, state.offset.reshape(1)]  # fmt: skip
        elif isinstance(module, Experts) and module.nf4 is not None:
            held = list(module.nf4.codes(slice(0, module.shape[0])))
        else:
            held = [module.weight]
        flat = [part.detach().contiguous().view(-1).view(torch.uint8).clone() for part in held]
        yield name, torch.cat(flat)


def compare(
    world: World, folder: Path, groups: Sequence[str], *, quantize: bool, dora: bool = False
) -> dict[str, Any] | None:
    """Everything that a test asks of a sharded base, in one start of the ranks."""
    lora = Lora(r=4, lora_alpha=8.0, use_dora=dora)
    model, digests, read = sharded(folder, world, lora, groups, quantize=quantize)
    base = model.sharded
    assert base is not None
    random_b(model)
    mine = {policy: gradients(model, policy) for policy in POLICIES}
    here = dict(bits(model))
    with torch.no_grad():
        logits = model.eval().logits(pack())
    layout = identify(str(folder)).layout
    found: dict[str, Any] = {
        "held": world.gather(base.bytes_held),
        "read": world.gather(read),
        "share": world.gather(share_of_bytes(base, layout)),
    }
    if not world.first:
        return None
    whole = ours(folder, lora=lora, groups=groups, quantize=quantize)
    random_b(whole)
    expected = gradients(whole, "none")
    found["gradients"] = {policy: worst(of, expected) for policy, of in mine.items()}
    found["names"] = len(expected)
    there = dict(bits(whole))
    found["differ"] = [name for name, one in there.items() if not torch.equal(one, here[name])]
    maps = whole.lora_layers.items()
    found["whole"] = sum(map_.stored_bytes for name, map_ in maps if base.rows(name) is not None)
    with torch.no_grad():
        found["logits"] = worst({"": logits}, {"": whole.eval().logits(pack())})
    found["digests"] = digests == _digests(folder, quantize=quantize)
    return found


def idle(world: World, folder: Path, groups: Sequence[str]) -> dict[str, Any]:
    """The first rank has two packs, the others none of the second."""
    model, *_ = sharded(folder, world, Lora(r=4, lora_alpha=8.0), groups, quantize=True)
    assert model.sharded is not None
    gathers = model.sharded.gathers
    first, found = gradients(model, "full"), {}
    gathers.complete(1)
    if world.first:
        found["again"] = worst(gradients(model, "elementwise"), first)
    elif world.rank == 1:  # fails in its forward, behind one layer
        gathers.before(0)
    gathers.complete(1)
    with torch.no_grad():
        if world.first:
            model.logits(pack())
        gathers.complete(1, backward=False)
    return found | {"last": worst(gradients(model, "offload"), first)}


def damaged(world: World, folder: Path, groups: Sequence[str]) -> dict[str, Any]:
    """What each rank raises where one of them cannot load the base."""
    try:
        with together(world):
            sharded(folder, world, Lora(r=4, lora_alpha=8.0), groups, quantize=True)
    except QcoreError as error:
        return {"code": world.gather(error.code), "fields": world.gather(error.field)}
    return {}


def _digests(folder: Path, *, quantize: bool) -> dict[str, str]:
    found = identify(str(folder))
    model = Model(
        found.decision.architecture, found.checkpoint.config, found.layout, torch.float32, {}
    )
    return load(model, found.layout, found.checkpoint, device=CPU, quantize=quantize)
