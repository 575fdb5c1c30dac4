"""`qcore verify --against stock`: the same files under stock transformers and PEFT, and under ours.

This file decides which models of a folder are compared and which stock class is judged. A base is
compared with itself; an adapter with PEFT's on the base, and without it; a merged checkpoint with
itself, and, where its base is named, with PEFT's adapter on that base. The effect of an adapter is
the difference of logits with and without it. The class is that which PEFT's Auto classes take for
the adapter's config, because users call them; ``--stock-class`` names another. `stock_compare`
decides how far numbers may differ, `stock_judge` which difference is a fault, `stock_model` how the
stock side is loaded.

Codes: see ``QC-STOCK-*`` in docs/errors.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapter.evidence import evidence_lines, read_for
from ..adapter.peft_names import CONFIG, Adapter
from ..adapter.weight_files import adapter_headers
from ..adapter.wrapped_names import plain_name
from ..checkpoint.checkpoint import read_json
from ..checkpoint.tokenizer_files import TOKENIZER, TOKENIZER_CONFIG, TokenizerFiles
from ..data.rendering.template_kwargs import recorded_variables
from ..errors import InputError, NumericError, QcoreError, UsageError
from ..io.artifact import MANIFEST, read_manifest, verify
from ..nn.load import DTYPES
from ..planning.host_memory import available
from ..plugins.resolve_model import Identified, identify
from ..reporting import Reporter
from .layer_stream import LayerStream
from .recorded_base import other_base
from .stock_class import require_interop
from .stock_compare import Pass, lockstep
from .stock_judge import Judge
from .stock_model import StockModel
from .stock_prompts import (
    Renderer,
    documents,
    random_prompts,
    read_prompts,
    template_problems,
)
from .stock_report import StockReport, prompt_result, versions

_ROOM = 0.7  #: share of the free memory that a whole stock model may take


def verify_against_stock(
    folder: str | Path,
    *,
    model: str | None = None,
    adapter: str | Path | None = None,
    prompts: Path | None = None,
    stock_class: str | None = None,
    generation: str = "",
    whole: bool | None = None,
    reporter: Reporter | None = None,
) -> StockReport:
    """Compare a folder under stock transformers and PEFT with the same folder under qcore.

    Args:
        folder: a model, a merged checkpoint or an adapter.
        model: the base: of an adapter required, of a merged checkpoint for its effect.
        adapter: of a merged checkpoint; ``None``: the one that its manifest records, if it exists.
        prompts: a file of prompts (`read_prompts`); ``None``: random tokens.
        stock_class: name of the class in transformers, or of an Auto class.
        generation: accepted only where evidence is missing, never against it.
        whole: hold the stock model in memory as a whole; ``None``: where it fits.
        reporter: receives progress; silent by default.

    Raises:
        UsageError: ``QC-STOCK-001`` a package is missing, ``-002`` no base for an adapter.
        InputError: ``QC-STOCK-003`` the file of prompts, ``-004`` stock does not load a folder.
        QcoreError: what reading the folders raises.
    """
    require_interop()
    path = Path(folder)
    job = _Job(path, model, adapter, stock_class, generation, whole, reporter or Reporter())
    return job.run(prompts)


class _Job:
    """One comparison; collects problems and notes."""

    def __init__(
        self,
        path: Path,
        model: str | None,
        adapter: str | Path | None,
        stock_class: str | None,
        generation: str,
        whole: bool | None,
        reporter: Reporter,
    ) -> None:
        self.path, self.reporter = path, reporter
        self.problems: list[QcoreError] = []
        self.notes: list[str] = []
        self.is_adapter = (path / CONFIG).is_file()
        self._check_manifest()
        if self.is_adapter and model is None:
            raise UsageError(
                "QC-STOCK-002",
                "is needed to verify an adapter against stock",
                field="--model",
                fix="name the base that the adapter was trained on",
            )
        named = None if model is None else identify(model, generation=generation)
        if named is not None and self.is_adapter:
            self.mine = named
        else:
            self.mine = _identify(path, generation, named)
        self.base = named if named is not None else self.mine
        self.meta = self._meta()
        self.merged = not self.is_adapter and bool(self.meta.get("merged"))
        self.adapter = self._adapter(adapter)
        self.class_name = stock_class or self._auto_class()
        for model_folder in (self.mine, self.base):
            _refuse_quantized(model_folder)
        self.whole = self._fits() if whole is None else whole

    @property
    def kind(self) -> str:
        """What the folder is."""
        return "adapter" if self.is_adapter else "merged" if self.merged else "base"

    def _check_manifest(self) -> None:
        if not (self.path / MANIFEST).is_file():
            return
        report = verify(self.path)
        if not report.ok:
            self.problems.append(
                InputError(
                    "QC-VERIFY-001",
                    "is not what its manifest says",
                    file=self.path,
                    found=report.problems[0],
                    fix="restore the folder, or make it again",
                )
            )

    def _meta(self) -> Mapping[str, Any]:
        if (self.path / MANIFEST).is_file():
            return read_manifest(self.path).meta
        return {}

    def _adapter(self, named: str | Path | None) -> Adapter | None:
        """The adapter that is verified, or that went into the merged checkpoint."""
        if self.is_adapter:
            return self._read(self.path)
        if named is None and self.merged:
            merges = self.meta["merged"]
            if len(merges) == 1 and Path(str(merges[0].get("adapter"))).is_dir():
                named = str(merges[0]["adapter"])
        if self.base is self.mine:
            if self.merged:
                self.notes.append("the effect of the merge is not compared: pass --model BASE")
            return None
        if named is None:
            self.notes.append("PEFT on the base is not compared: pass --adapter")
            return None
        return self._read(named)

    def _read(self, path: str | Path) -> Adapter:
        base = self.base
        # Nothing is written, so that no consent is needed: what it would be asked for is a note.
        read = read_for(base, path, trust_base=True, trust_generation=True)
        _refuse_parts(read)
        self.notes += evidence_lines(base, read)
        if others := sorted(read.parts - {read.trunk}):
            self.notes.append(
                f"prompts are text: pairs in part {', '.join(others)} are loaded and not computed"
            )
        return read

    def _auto_class(self) -> str | None:
        """The class that PEFT's Auto classes take; ``None``: that of config.json."""
        if self.adapter is None:
            return None
        config = read_json(self.adapter.path / CONFIG)
        task, mapping = config.get("task_type"), config.get("auto_mapping") or {}
        if task == "CAUSAL_LM":
            return "AutoModelForCausalLM"
        if task is None and isinstance(mapping.get("base_model_class"), str):
            name: str = mapping["base_model_class"]
            return name
        self.notes.append("PEFT's Auto classes do not load this adapter: the base's own class is")
        return None

    def _fits(self) -> bool:
        """Whether the stock model fits as a whole in the free memory, in float32."""
        room = available()
        needed = max(
            sum(_elements(header.shape) for header in model.checkpoint.headers.values()) * 4
            for model in (self.mine, self.base)
        )
        return room is not None and needed < room * _ROOM

    def run(self, file: Path | None) -> StockReport:
        renderer = self._renderer(self.mine)
        prompts = random_prompts(self.mine.checkpoint) if file is None else read_prompts(file)
        self._compare_templates(prompts, renderer)
        if self.adapter is not None:
            other = other_base(self.base, self.adapter, self.reporter)
            self.problems += [] if other is None else [other]
        docs = documents(prompts, renderer, self.notes)
        tokens = [ids for _, ids in docs]
        with self.reporter.progress("comparing with stock", 3, "passes") as advance:
            main, without, cls = self._passes(tokens, advance)
        results = [
            prompt_result(name, ids, main, without, number)
            for number, (name, ids) in enumerate(docs)
        ]
        judge = Judge(self.path)
        judge.layers(main, self.own, without)
        judge.prompts(main, without, results)
        self.problems += judge.problems
        self.notes += judge.notes
        worst = max((p for p in (main, without, self.own) if p), key=lambda p: p.worst)
        return StockReport(
            folder=self.path,
            kind=self.kind,
            stock_class=cls,
            packages=versions(),
            dtype="float32",
            whole=self.whole,
            prompts=tuple(results),
            layers={
                "count": len(self.streams),
                "worst": worst.worst,
                "at": worst.layer,
                "unstable_tokens": main.unstable,
            },
            notes=tuple(self.notes),
            # What was computed decides the exit status, before a file that changed.
            problems=tuple(sorted(self.problems, key=lambda p: not isinstance(p, NumericError))),
        )

    def _renderer(self, model: Identified) -> Renderer:
        meta, source = self.meta, self.path
        if self.adapter is not None and not self.is_adapter:
            meta, source = self.adapter.meta or self.meta, self.adapter.path
        return Renderer(model.checkpoint, recorded_variables(meta, source))

    def _compare_templates(self, prompts: Sequence[Any], renderer: Renderer) -> None:
        """Compare what both sides render; an adapter folder may bring a tokenizer of its own."""
        folder = self.mine.checkpoint.path
        if (
            self.is_adapter
            and {TOKENIZER, TOKENIZER_CONFIG} <= TokenizerFiles.of(self.path).sidecars
        ):
            folder = self.path
        base = None
        if self.base is not self.mine:
            base = Renderer(self.base.checkpoint, renderer.variables)
        self.problems += template_problems(prompts, renderer, folder, base)

    def _passes(self, docs: list[Tensor], advance: Any) -> tuple[Pass, Pass | None, str]:
        """The pass with the adapter (or of the folder alone), the one without, and the class."""
        self.own: Pass | None = None
        ours = LayerStream(self.mine, self.adapter if self.is_adapter else None)
        self.streams = ours.layers
        if not self.is_adapter:
            own = StockModel(
                self.mine.checkpoint, layers=ours.disk_names(), whole=self.whole,
                name=None if self.adapter is not None else self.class_name,
            )  # fmt: skip
            self._note_random(own)
            main, cls = lockstep(own, ours, docs), own.cls.__name__
            advance(1)
            if self.base is self.mine:
                return main, None, cls
            self.own = main
            del own
        base = LayerStream(self.base)
        stock = StockModel(
            self.base.checkpoint, layers=base.disk_names(), whole=self.whole,
            name=self.class_name, adapter=self.adapter.path if self.adapter else None,
        )  # fmt: skip
        self._note_random(stock)
        if self.adapter is not None:
            self._check_bound(stock)
            rounded = None if self.is_adapter else self._dtype()
            main = lockstep(stock, ours, docs, rounded=rounded)
            advance(1)
        if self.is_adapter:
            without = lockstep(stock, ours, docs, stock_adapted=False, ours_adapted=False)
        else:
            without = lockstep(stock, base, docs, stock_adapted=False)
        advance(1)
        return main, without, stock.cls.__name__

    def _note_random(self, stock: StockModel) -> None:
        if stock.random:
            note = (
                f"{stock.checkpoint.path} lacks {len(stock.random)} parameters of "
                f"{stock.cls.__name__}, first {stock.random[0]}: text does not run them, and with "
                "media transformers computes from random values"
            )
            self.notes += [note] if note not in self.notes else []

    def _dtype(self) -> torch.dtype:
        """The dtype of the merged weights."""
        assert self.adapter is not None
        name = min(self.adapter.changes)
        return DTYPES.get(self.mine.layout.located[name].dtype, torch.bfloat16)

    def _check_bound(self, stock: StockModel) -> None:
        """Find tensors of the adapter that stock PEFT gives to no module."""
        assert self.adapter is not None
        if self.adapter.layout != "peft":
            return
        names = {header.name for header in adapter_headers(self.adapter.path)}
        if loose := sorted(names - stock.bound()):
            classes = " or ".join(self.adapter.namespace.classes)
            self.problems.append(
                NumericError(
                    "QC-STOCK-007",
                    f"has tensors that stock PEFT binds to nothing under {stock.cls.__name__}, "
                    f"which {self.class_name or 'config.json'} stands for",
                    file=self.adapter.path,
                    field=loose[0],
                    found=f"{len(loose)} of {len(names)}",
                    expected="every tensor bound to a module",
                    fix=f"load the base as {classes} and pass --stock-class, or train with "
                    "--adapter-class",
                )
            )


def _identify(path: Path, generation: str, base: Identified | None) -> Identified:
    """Identify a folder; without evidence, as with a changed template, like its base."""
    try:
        return identify(str(path), generation=generation)
    except InputError:
        if base is None or generation:
            raise
    return identify(str(path), generation=base.decision.generation.name)


def _refuse_parts(adapter: Adapter) -> None:
    """Refuse a layout that stock PEFT does not load."""
    headers = (header for change in adapter.changes.values() for header in change.headers)
    for name in (header.name for header in headers):
        if plain_name(name) != name:
            raise InputError(
                "QC-STOCK-004",
                "has names with words of wrappers, which stock PEFT does not load",
                file=adapter.path,
                field=name,
                expected=plain_name(name),
                fix=f"write it with plain names: qcore adapter combine {adapter.path} --output DIR",
            )
    for pair in adapter.pairs.values():
        if not pair.is_peft:
            raise InputError(
                "QC-STOCK-004",
                "has modules that are parts of a weight, which stock PEFT does not load",
                file=adapter.path,
                field=pair.pieces[0].a.name,
                found=f"{len(pair.pieces)} modules of {pair.tensor.name}",
                expected="PEFT's layout",
                fix=f"write it so: qcore adapter combine {adapter.path} --output DIR",
            )


def _refuse_quantized(model: Identified) -> None:
    if model.quantization is not None:
        raise InputError(
            "QC-STOCK-004",
            "is quantized, so that stock transformers computes from other values",
            file=model.checkpoint.path,
            found=model.quantization.line(),
            fix="verify the checkpoint that qcore merge --dequantize writes",
        )


def _elements(shape: Sequence[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
