"""One digest of a tensor, whatever its pieces on disk, the order and the size of what is read."""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.model_kit import write_json
from torch import Tensor

from qcore.api.parameters import (
    EXPERTS,
    Aim,
    Namespace,
    Part,
    Region,
    Row,
    Spelling,
    Table,
    at,
    cat,
    stack,
)
from qcore.api.parameters import Tensor as Entry
from qcore.checkpoint.checkpoint import Checkpoint
from qcore.checkpoint.layout import locate
from qcore.checkpoint.tensor_hash import TensorDigest, in_one_run, numel
from qcore.nn.load import hash_units, read_tensor

E, I, H = 4, 3, 5  # noqa: E741
GATE_UP, DOWN = "m.experts.gate_up", "m.experts.down"
APART = stack("expert", cat("m.experts.{expert}.gate", "m.experts.{expert}.up"))


def entry(name: str, dims: str, also: Spelling | None = None) -> Entry:
    part = Part(
        name="text", owner="d", dims={"e": E, "i": I, "h": H}, groups={"experts": Aim.ON},
        rows=(Row(name, dims, "experts", also=also),), axes={"expert": tuple(range(E))},
    )  # fmt: skip
    (tensor,) = Table([part])
    return tensor


def fused() -> Entry:
    return entry(GATE_UP, "e 2*i h", APART)


def bytes_of(value: Tensor) -> bytes:
    return value.contiguous().view(torch.uint8).numpy().tobytes()


def sha(value: Tensor) -> bytes:
    return hashlib.sha256(bytes_of(value)).digest()


def digest(tensor: Entry, value: Tensor, regions: Iterable[Region]) -> str | None:
    """The digest of a tensor of which these regions are read, in this order."""
    made = TensorDigest(tensor)
    for region in regions:
        for number, unit in hash_units(made, region, value[region].contiguous()):
            made.put(number, unit)
    return made.hex


def whole(shape: tuple[int, ...]) -> Region:
    return tuple(slice(0, n) for n in shape)


@pytest.fixture
def value() -> Tensor:
    return torch.randn(E, 2 * I, H, generator=torch.Generator().manual_seed(0)).bfloat16()


def by_hand(value: Tensor) -> str:
    """Of each expert the digest of its gate, then of its up; then the digest of all these."""
    units = [sha(part) for expert in value for part in (expert[:I], expert[I:])]
    return hashlib.sha256(b"".join(units)).hexdigest()


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 4), (7, 1, 4), ()], ids=str)
def test_a_tensor_that_is_never_cut_is_its_bytes(shape: tuple[int, ...]):
    tensor = entry("w", " ".join(map(str, shape)))
    value = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    made = TensorDigest(tensor)
    assert made.units == (whole(shape),)
    assert made.hex is None
    made.put(0, hashlib.sha256(bytes_of(value.reshape(-1))).digest())
    assert made.hex == hashlib.sha256(bytes_of(value.reshape(-1))).hexdigest()


def test_another_name_for_the_whole_changes_nothing():
    value = torch.randn(3, 5)
    for also in (None, at("other.w")):
        tensor = entry("w", "3 5", also)
        assert digest(tensor, value, [whole((3, 5))]) == sha(value).hex()


def cuts(*bounds: int) -> list[Region]:
    """Experts in slabs between these bounds."""
    return [
        (slice(a, b), slice(0, 2 * I), slice(0, H)) for a, b in itertools.pairwise((0, *bounds, E))
    ]


PIECES = [piece.region for piece in APART.pieces((E, 2 * I, H), {}, {"expert": tuple(range(E))})]


@pytest.mark.parametrize("bounds", [(), (1,), (3,), (1, 2), (2, 3), (1, 2, 3)], ids=str)
def test_slabs_of_any_size_give_one_digest(value: Tensor, bounds: tuple[int, ...]):
    assert digest(fused(), value, cuts(*bounds)) == by_hand(value)


@pytest.mark.parametrize("seed", range(5))
def test_pieces_in_any_order_give_the_same(value: Tensor, seed: int):
    regions = PIECES.copy()
    random.Random(seed).shuffle(regions)
    assert digest(fused(), value, regions) == by_hand(value)
    # Half of it fused, half of it apart: the first experts' pieces are those of PIECES.
    mixed = [*PIECES[:4], *cuts(2)[1:]]
    random.Random(seed).shuffle(mixed)
    assert digest(fused(), value, mixed) == by_hand(value)


def test_until_all_is_read_there_is_none(value: Tensor):
    made = TensorDigest(fused())
    for region in PIECES:
        assert made.hex is None
        for number, unit in hash_units(made, region, value[region].contiguous()):
            made.put(number, unit)
    assert made.hex == by_hand(value)


def test_one_bit_of_one_expert_changes_it(value: Tensor):
    expected = by_hand(value)
    for place in range(0, value.numel(), 7):
        changed = value.clone()
        changed.view(torch.int16).view(-1)[place] ^= 1
        for regions in (cuts(), cuts(1, 2, 3), PIECES):
            found = digest(fused(), changed, regions)
            assert found == by_hand(changed)
            assert found != expected


def test_experts_in_another_order_are_another_tensor(value: Tensor):
    assert digest(fused(), value.flip(0), cuts()) != by_hand(value)
    swapped = torch.cat([value[:, I:], value[:, :I]], 1)
    assert digest(fused(), swapped, cuts()) != by_hand(value)


def test_a_region_within_a_unit_is_none(value: Tensor):
    """What is smaller than a unit cannot be hashed for it, and must not be taken for it."""
    made = TensorDigest(fused())
    assert made.inside((slice(0, 1), slice(0, I), slice(0, 2))) == []
    assert made.inside((slice(0, 1), slice(0, I - 1), slice(0, H))) == []
    ((number, where),) = made.inside((slice(2, 3), slice(I, 2 * I), slice(0, H)))
    assert (number, where) == (5, (slice(0, 1), slice(0, I), slice(0, H)))


def test_units_that_lie_in_one_run():
    """Whether bytes of a file are those of a unit, against the addresses that torch tells."""
    shape = (3, 4, 5)
    address = torch.arange(60).view(shape)
    spans = [list(itertools.combinations(range(n + 1), 2)) for n in shape]
    for bounds in itertools.product(*spans):
        region = tuple(slice(a, b) for a, b in bounds)
        found = address[region].flatten()
        one = bool((found.diff() == 1).all())
        assert in_one_run(region, shape) == one, region
        assert numel(region) == len(found)


# -- the three layouts on disk


def text_part() -> Part:
    return Part(
        name="text", owner="d", dims={"e": E, "i": I, "h": H}, groups={"experts": Aim.ON},
        axes={"expert": tuple(range(E))},
        namespaces=(Namespace(name="text", classes=("X",)),),
        rows=(
            Row(GATE_UP, "e 2*i h", "experts", kind=EXPERTS, also=APART),
            Row(DOWN, "e h i", "experts", kind=EXPERTS,
                also=stack("expert", "m.experts.{expert}.down")),
        ),
    )  # fmt: skip


def test_fused_and_apart_on_disk_are_one_base(tmp_path: Path, value: Tensor):
    down = torch.randn(E, H, I, generator=torch.Generator().manual_seed(3)).bfloat16()
    apart = {f"m.experts.{e}.gate": value[e, :I].contiguous() for e in range(E)}
    apart |= {f"m.experts.{e}.up": value[e, I:].contiguous() for e in range(E)}
    downs = {f"m.experts.{e}.down": down[e].contiguous() for e in range(E)}
    layouts = {
        "fused": {GATE_UP: value, DOWN: down},
        "apart": apart | downs,
        "mixed": {GATE_UP: value} | downs,
    }
    found = {}
    for name, tensors in layouts.items():
        folder = tmp_path / name
        folder.mkdir()
        write_json(folder / "config.json", {"model_type": "m"})
        save_file(tensors, folder / "model.safetensors")
        checkpoint = Checkpoint.open(folder)
        layout = locate(Table([text_part()]), checkpoint)
        assert torch.equal(read_tensor(checkpoint, layout.located[GATE_UP]), value)
        found[name] = {
            key: digest(item.tensor, read_tensor(checkpoint, item), [whole(item.tensor.shape)])
            for key, item in layout.located.items()
        }
        for a, b in itertools.combinations(range(E + 1), 2):
            slab = read_tensor(checkpoint, layout.located[GATE_UP], slice(a, b))
            assert torch.equal(slab, value[a:b])
    downs_by_hand = hashlib.sha256(b"".join(sha(one) for one in down)).hexdigest()
    expected = {GATE_UP: by_hand(value), DOWN: downs_by_hand}
    assert found == dict.fromkeys(layouts, expected)
