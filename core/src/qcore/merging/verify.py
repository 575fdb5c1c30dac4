"""The proof of a merge: what ``W + scaling * B A`` computes against base + adapter.

This file decides what is compared, on random tokens through the plugin's own blocks in float32
with one layer in memory at a time. Each layer with the merged weights, not rounded, must give
what it gives with the adapter as training applies it, from the same input: through many layers
float32 alone would drift apart, and a router would send a token to another expert. Beside it the
merged model runs on its own outputs to the logits, which are reported, and the base, which tells
the adapter's effect. Where the adapter changes a tower, its layers go before the trunk's by the
same rule, on made-up media, and what they give takes the place of some tokens; else no tensor of
it is read. The sums are also met with the written files, which must hold them, rounded once; what
that rounding does to logits is expected and gates nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ..adapter.delta import WORKERS, Deltas, one_thread, single
from ..adapter.peft_names import Adapter, trunk_part
from ..api.blocks import Packed, Tower
from ..api.parameters import Kind, Region
from ..api.records import Modality
from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.layout import Located, faults, survey
from ..errors import NumericError, raise_all
from ..nn.load import DTYPES, as_bytes, place, read_exact, read_tensor, slabs
from ..nn.model import Model
from ..nn.moe.experts import Experts, Routing
from ..nn.qlora.lora_layer import Lora, LoraLayer
from ..plugins.resolve_model import Identified

_DOCUMENTS, _TOKENS = 8, 5  # longer than a convolution's kernel; time is the weights' more
_UNITS = 60  # of media, about: no power of two
#: Of what a layer adds, and of its output: float32, summed in another order.
_ADDED, _OUTPUT = 1e-5, 1e-6
#: Share of tokens that rounding may send to other experts in a layer; more is a fault.
_REROUTED = 0.1
_HEAD_ROWS = 8192
_CUT = 2**26  # bytes of a stack that one thread meets with the files at a time


def prove_merge(
    found: Identified,
    adapter: Adapter,
    deltas: Deltas,
    written: Path,
    progress: Callable[[int], None] | None = None,
) -> dict[str, float]:
    """Compare the unrounded merge with base + adapter on random tokens, and with the files.

    Args:
        found: the base.
        adapter: the adapter.
        deltas: its matrices, as the merge added them.
        written: the folder that holds the merged files.
        progress: called with the bytes read.

    Returns:
        ``layers``: the largest difference of a layer's output, as a share of what is allowed;
        ``difference`` and ``effect``: largest absolute differences of logits between the merge,
        or the base, and base + adapter; ``scale``: the largest absolute logit; ``rerouted``:
        tokens that picked other experts in a layer of the merge, by rounding; ``tower_effect``:
        as ``effect``, of a tower's outputs, where the adapter changes one.

    Raises:
        NumericError: ``QC-MERGE-005`` when a layer differs, or when the adapter has no effect;
            ``-007`` when a file holds another sum than the one that was proved, ``-004`` when a
            pair is in no layer.
    """
    streams = _Streams(found, adapter, deltas, written, progress or (lambda count: None))
    # On one core, beside the thread that reads: see `one_thread`.
    with torch.no_grad(), one_thread():
        result = streams.compare(*streams.run())
    if not max(result["effect"], result.get("tower_effect", 0.0)) > 0:
        raise NumericError(
            "QC-MERGE-005",
            "has no effect on the base's logits",
            file=adapter.path,
            found="0",
            expected="a difference",
            fix="train longer",
        )
    return result


class _Three(NamedTuple):
    """What a layer reads in each stream; the base's may be fewer rows."""

    base: Tensor
    adapted: Tensor
    merged: Tensor


def _tower_of(found: Identified, adapter: Adapter) -> Modality | None:
    """The modality whose tower the adapter changes."""
    return next((one for one in found.decision.modalities if one.name in adapter.parts), None)


class _Streams:
    """The model on meta, of which one layer at a time is real."""

    def __init__(
        self,
        found: Identified,
        adapter: Adapter,
        deltas: Deltas,
        written: Path,
        progress: Callable[[int], None],
    ) -> None:
        self.adapter = adapter
        self.worst = 0.0  # of a layer's difference, as a share of what is allowed
        self.rerouted = 0
        self.proved: set[str] = set()
        self.written = Checkpoint.open(written)
        self.written_layout, problems = survey(found.layout.table, self.written)
        raise_all(faults(problems))
        modality = _tower_of(found, adapter)
        found = found.using_parts(adapter.parts)
        self.checkpoint = found.checkpoint
        self.layout = found.layout
        # An unloaded part may name tensors as the trunk does: a name alone selects none of them.
        self.loaded = {
            name: item
            for name, item in found.layout.located.items()
            if found.layout.loads(item.tensor.part)
        }
        self.tower_effect: float | None = None
        self.progress = progress
        self.deltas = deltas
        lora = {
            name: Lora(r=pair.r, lora_alpha=pair.scaling * pair.r)
            for name, pair in adapter.pairs.items()
        }
        architecture = found.decision.architecture
        config = found.checkpoint.config
        self.model = Model(
            architecture, config, found.layout, torch.float32, lora, modality=modality
        ).eval()
        self.modules = dict(self.model.named_modules())
        tower = self.model.tower
        self.trunk_layers = self._named_layers(self.model.trunk.layers)
        self.tower_layers = self._named_layers(tower.layers if tower is not None else ())

    def run(self) -> tuple[Tensor, Tensor, Tensor]:
        """What the head reads in the streams: base ``[T / N, H]``, adapted, merged ``[T, H]``."""
        tower, trunk, batch = self.model.tower, self.model.trunk, self._batch()
        one = Packed.of([batch.ids[:_TOKENS]])
        both = Packed.of(list(batch.ids.view(-1, _TOKENS)) * 2)
        base, adapted = trunk.embed(one), trunk.embed(batch)
        x = _Three(base, adapted, adapted)
        if tower is not None:
            x = _seen(x, self._through_tower(tower))

        def two(layer: nn.Module, adapted: Tensor, merged: Tensor) -> Sequence[Tensor]:
            return cast(Tensor, layer(torch.cat([adapted, merged]), both)).chunk(2)

        x = self._through(self.trunk_layers, x, one, batch, two)
        if self.proved != self.adapter.pairs.keys():
            raise NumericError(
                "QC-MERGE-004",
                "is in no layer, so that its effect is not proved",
                file=self.adapter.path,
                field=min(self.adapter.pairs.keys() - self.proved),
                fix="report this to the plugin's author",
            )
        self._place_rest()
        return trunk.final(x.base), trunk.final(x.adapted), trunk.final(x.merged)

    def _through_tower(self, tower: Tower) -> _Three:
        """The tower's outputs ``[n, H]`` in the streams, of one made-up medium."""
        self._place_rest()
        media = tower.sample(_UNITS, torch.device("cpu"), torch.Generator().manual_seed(1))

        def two(layer: nn.Module, adapted: Tensor, merged: Tensor) -> Sequence[Tensor]:
            return layer(adapted, media), layer(merged, media)

        x = tower.embed(media)
        out = self._through(self.tower_layers, _Three(x, x, x), media, media, two)
        self.tower_effect = float((out.adapted - out.base).abs().max())
        return out

    def _through(
        self,
        layers: Sequence[tuple[str, nn.Module]],
        x: _Three,
        one: Any,
        batch: Any,
        two: Callable[[nn.Module, Tensor, Tensor], Sequence[Tensor]],
    ) -> _Three:
        """The streams through layers, each compared.

        Args:
            layers: by the name of the module.
            x: what the first reads.
            one: what the base's stream is of.
            batch: what the others are of.
            two: a layer on both of them, ``(layer, adapted, merged)``.
        """
        base, adapted, merged = x
        for prefix, layer, values in self._layers(layers):
            with self._real(prefix, layer, values) as maps:
                guard = self.model.guard(layer)
                with _routes(layer) as picked, guard:
                    after = layer(adapted, batch)
                for module in maps.values():
                    module.lora = None
                with guard:
                    base = layer(base, one)
                for name, module in maps.items():
                    self._merge(name, module)
                # Merged weights on the adapted stream, to be compared, and on their own.
                with _routes(layer) as again, guard:
                    same, merged = two(layer, adapted, merged)
                self._check_layer(prefix, adapted, after, same, _moved(picked, again))
                adapted = after
        return _Three(base, adapted, merged)

    def _place_rest(self) -> None:
        """Read what is outside the layers, less the head."""
        prefixes = tuple(f"{prefix}." for prefix, _ in (*self.tower_layers, *self.trunk_layers))
        for name, parameter in self.model.named_parameters():
            rest = name != self.model.head_name and not name.startswith(prefixes)
            if parameter.is_meta and rest and name in self.loaded:
                self._place(name, read_tensor(self.checkpoint, self.loaded[name]))

    def _check_layer(
        self, prefix: str, x: Tensor, adapted: Tensor, merged: Tensor, moved: Tensor | None
    ) -> None:
        """One layer's outputs ``[T, H]`` from the same x; tokens that `moved` are only counted.

        A tower's last layer gives fewer rows than it reads: all of them are what it adds.
        """
        if not bool(adapted.isfinite().all()):
            raise NumericError(
                "QC-MERGE-003",
                "gives values that are not finite",
                file=self.adapter.path,
                field=prefix,
                fix="train again with a lower learning_rate",
            )
        off = (merged - adapted).abs().amax(1)
        if moved is not None and int(moved.sum()) <= len(x) * _REROUTED:
            self.rerouted += int(moved.sum())
            off = off.masked_fill(moved, 0)
        added = adapted - x if adapted.shape == x.shape else adapted
        allowed = _ADDED * float(added.abs().max()) + _OUTPUT * float(adapted.abs().max())
        worst = float(off.max())
        if not worst <= allowed:
            raise NumericError(
                "QC-MERGE-005",
                "computes other values than base + adapter",
                file=self.adapter.path,
                field=prefix,
                found=f"{worst:.2e}",
                expected=f"<= {allowed:.0e}",
                fix="report this: the adapter would not do in the merge what it did in training",
            )
        self.worst = max(self.worst, worst / allowed if allowed else 0.0)

    def _merge(self, name: str, module: LoraLayer) -> None:
        """Add the adapter to a weight by the merge's own arithmetic: a fault in it shows."""
        self.proved.add(name)
        item = self.layout.located[name]
        if isinstance(module, Experts):
            with ThreadPoolExecutor(WORKERS, initializer=single) as pool:
                for _ in pool.map(lambda rows: self._check_sum(item, rows), slabs(item, _CUT)):
                    pass
            module.read_from(lambda expert: self._sum(item, slice(expert, expert + 1))[0])
            return
        weight = module.weight
        assert weight is not None
        every = slice(0, len(weight))
        for view, total in self.deltas.add(name, weight.data, _rows_of(item, every)):
            view.copy_(total)
        self._check_written(item, every, weight)

    def _check_sum(self, item: Located, rows: slice) -> None:
        self._check_written(item, rows, self._sum(item, rows))

    def _sum(self, item: Located, rows: slice) -> Tensor:
        """Some experts of a stack, float32, with the adapter added.

        One at a time, as the logits see them: what is met with the files is what was proved,
        while the merge adds several in one go.
        """
        weight = read_tensor(self.checkpoint, item, rows).float()
        for expert, one in zip(range(rows.start, rows.stop), weight, strict=True):
            region = _rows_of(item, slice(expert, expert + 1))
            for view, total in self.deltas.add(item.tensor.name, one, region):
                view.copy_(total)
        return weight

    def _check_written(self, item: Located, rows: slice, weight: Tensor) -> None:
        """The files hold `weight`, which is ``tensor[rows]``, rounded once to their dtype."""
        there = self.written_layout.located[item.tensor.name]
        if not _is_rounded(read_tensor(self.written, there, rows), weight):
            header = there.places[0].header
            raise NumericError(
                "QC-MERGE-007",
                "does not hold the sum that was proved",
                file=self.written.path / header.file,
                field=item.tensor.name,
                fix="report this: the merge wrote another tensor than it computed",
            )

    def compare(self, base: Tensor, adapted: Tensor, merged: Tensor) -> dict[str, float]:
        """Stream the head a few rows at a time and keep the largest differences."""
        difference = effect = scale = 0.0
        for rows in _rows(self.checkpoint, self.layout.located[self.model.head_name]):
            both = torch.cat([adapted, merged, base]) @ rows.t()
            two, three, one = torch.split(both, [len(adapted), len(merged), len(base)])
            difference = max(difference, float((three - two).abs().max()))
            effect = max(effect, float((two[: len(one)] - one).abs().max()))
            scale = max(scale, float(two.abs().max()))
        return {
            "layers": self.worst,
            "difference": difference,
            "effect": effect,
            "scale": scale,
            "rerouted": float(self.rerouted),
            **({} if self.tower_effect is None else {"tower_effect": self.tower_effect}),
        }

    def _batch(self) -> Packed:
        """Random documents over a small vocabulary: only its rows of the embedding are read."""
        mine = trunk_part(self.layout.table)
        entry = next(e for e in self.layout.table if e.part is mine and e.row.group == "embed")
        count = min(_DOCUMENTS * _TOKENS, entry.shape[0])
        generator = torch.Generator().manual_seed(0)
        rows = torch.randint(entry.shape[0], (count,), generator=generator).tolist()
        weight = _gather(self.checkpoint, self.layout.located[entry.name], rows)
        parent, _, leaf = entry.name.rpartition(".")
        embed = nn.Parameter(weight, requires_grad=False)
        self.modules[parent]._parameters[leaf] = embed
        ids = torch.randint(count, (_DOCUMENTS, _TOKENS), generator=generator)
        return Packed.of(list(ids))

    def _named_layers(self, layers: Sequence[Any]) -> list[tuple[str, nn.Module]]:
        names = {id(module): name for name, module in self.modules.items()}
        return [(names[id(layer)], layer) for layer in layers]

    def _layers(
        self, layers: Sequence[tuple[str, nn.Module]]
    ) -> Iterator[tuple[str, nn.Module, dict[str, Tensor]]]:
        """Each layer and its tensors, float32; the next layer's are read meanwhile.

        Experts are not among them: each is read when a token is routed to it.
        """

        def read(prefix: str) -> dict[str, Tensor]:
            return {
                name: read_tensor(self.checkpoint, item).float()
                for name, item in self.loaded.items()
                if name.startswith(f"{prefix}.") and item.tensor.row.kind is not Kind.EXPERTS
            }

        with ThreadPoolExecutor(1, initializer=single) as pool:
            ahead = pool.submit(read, layers[0][0])
            for number, (prefix, layer) in enumerate(layers):
                values = ahead.result()
                if number + 1 < len(layers):
                    ahead = pool.submit(read, layers[number + 1][0])
                yield prefix, layer, values

    @contextmanager
    def _real(
        self, prefix: str, layer: nn.Module, values: dict[str, Tensor]
    ) -> Iterator[dict[str, LoraLayer]]:
        """A layer's weights and adapters, there for the block and given back after it.

        Yields:
            Its maps that carry LoRA, by canonical name of the weight.
        """
        for name in list(values):
            self._place(name, values.pop(name))
        mine = {n: m for n, m in self.model.lora_layers.items() if n.startswith(f"{prefix}.")}
        stacks = {name: module for name, module in mine.items() if isinstance(module, Experts)}
        for name, module in stacks.items():
            module.read_from(self._reader(self.layout.located[name]))
        adapted = {name: module for name, module in mine.items() if module.lora is not None}
        for name, holder in adapted.items():
            holder.set_lora(*self.deltas.sides(name))
        yield adapted
        for stack in stacks.values():
            stack.read_from(None)
        for part in layer.modules():
            for leaf, parameter in list(part._parameters.items()):
                if parameter is not None:
                    empty = torch.empty_like(parameter, device="meta")
                    part._parameters[leaf] = nn.Parameter(empty, requires_grad=False)

    def _reader(self, item: Located) -> Callable[[int], Tensor]:
        def read(expert: int) -> Tensor:
            return read_tensor(self.checkpoint, item, slice(expert, expert + 1))[0].float()

        return read

    def _place(self, name: str, value: Tensor) -> None:
        item = self.layout.located[name]
        place(self.model, self.modules, item, slice(0, len(value)), value, quantize=False)
        self.progress(sum(where.header.end - where.header.start for where in item.places))


def _seen(x: _Three, media: _Three) -> _Three:
    """Embeddings of tokens, with a tower's outputs in place of the first document's, but the last.

    So its effect is on logits too, as of media in a row.
    """

    def put(tokens: Tensor, outputs: Tensor) -> Tensor:
        count = min(len(outputs), _TOKENS - 1)
        return torch.cat([outputs[:count], tokens[count:]])

    return _Three(*(put(tokens, outputs) for tokens, outputs in zip(x, media, strict=True)))


@contextmanager
def _routes(layer: nn.Module) -> Iterator[list[Tensor]]:
    """The experts ``[T, k]`` of each token, of every stack of experts that the layer runs."""
    picked: list[Tensor] = []

    def seen(module: nn.Module, inputs: tuple[Tensor, Routing]) -> None:
        picked.append(inputs[1].chosen.sort(1).values)

    hooks = [m.register_forward_pre_hook(seen) for m in layer.modules() if isinstance(m, Experts)]
    yield picked
    for hook in hooks:
        hook.remove()


def _moved(one: list[Tensor], two: list[Tensor]) -> Tensor | None:
    """Tokens ``[T]`` whose experts differ; the second's first half are the first's tokens."""
    if not one:
        return None
    unlike = [(a != b[: len(a)]).any(1) for a, b in zip(one, two, strict=True)]
    return torch.stack(unlike).any(0)


def _rows_of(item: Located, rows: slice) -> Region:
    """The region ``tensor[rows]`` of a tensor."""
    return (rows, *(slice(0, n) for n in item.tensor.shape[1:]))


def _is_rounded(value: Tensor, wanted: Tensor) -> bool:
    """Whether `value` is float32 `wanted` in its own dtype."""
    if value.dtype != torch.float64:
        return torch.equal(value, wanted.to(value.dtype))
    # The sum was float64 there and is float32 here.
    return torch.allclose(value.float(), wanted, rtol=1e-6, atol=1e-9)


def _gather(checkpoint: Checkpoint, item: Located, rows: list[int]) -> Tensor:
    """Some rows of a matrix on disk, float32, without reading the rest."""
    if len(item.places) != 1 or item.places[0].scale is not None:
        return read_tensor(checkpoint, item)[rows].float()
    header = item.places[0].header
    picked = torch.empty(len(rows), header.shape[1], dtype=DTYPES[header.dtype])
    stride = picked.stride(0) * picked.element_size()
    with checkpoint.file(header.file).open("rb") as file:
        for slot, row in enumerate(rows):
            file.seek(header.start + row * stride)
            read_exact(file, as_bytes(picked[slot]), header)
    return picked.float()


def _rows(checkpoint: Checkpoint, item: Located) -> Iterator[Tensor]:
    """A matrix on disk as float32 blocks of rows."""
    total = item.tensor.shape[0]
    for at in range(0, total, _HEAD_ROWS):
        yield read_tensor(checkpoint, item, slice(at, min(at + _HEAD_ROWS, total))).float()
