"""Readers of mutated files, and independent judges of what they accept.

This file decides when a mutation is taken silently. A reader may refuse with an error of qcore's,
or accept what has the same effect as before. What it accepts otherwise has to be what an
independent reader makes of the same bytes: safetensors, tokenizers, or the formula of LoRA in
NumPy. A folder with a manifest has no such leeway: it is refused, or has the same effect.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

_TEXTS: Final = ("What do bees make?", "<|im_start|>user\nHi<|im_end|>\n", "é 12 {}")


@dataclass(frozen=True, slots=True)
class Reader:
    """One kind of file with what reads it.

    Attributes:
        name: in results.
        folder: working folder.
        file: in it, the file that is mutated.
        form: of `mutators.mutate`.
        read: returns the effect of the folder; raises `QcoreError` where it refuses.
        judge: what an independent reader says of the same folder; ``None``: only the effect of
            the good file may be accepted.
    """

    name: str
    folder: Path
    file: str
    form: str
    read: Callable[[Path], Any]
    judge: Callable[[Path], Any] | None


def readers(inputs: Path, work: Path) -> list[Reader]:
    """All readers, each on a copy of a good folder.

    Args:
        inputs: of `suites.make_inputs`, with the trained adapters.
        work: gets the copies.
    """

    def copy(source: str, name: str) -> Path:
        return Path(shutil.copytree(inputs / source, work / name))

    dense, sharded = copy("dense", "model"), copy("sharded", "sharded")
    for folder in (dense, sharded):
        _prove_by_config(folder)
    foreign, trained = copy("foreign", "foreign"), copy("adapters/dense", "trained")
    merged = copy("adapters/merged", "merged")
    with_base = _adapter_reader(dense)
    weights, config = "adapter_model.safetensors", "adapter_config.json"
    return [
        Reader("header", copy("foreign", "header"), weights, "safetensors",
               lambda folder: _headers(folder / weights),
               lambda folder: _safetensors(folder / weights)),
        Reader("config.json", dense, "config.json", "json", _model, _model_as_json),
        Reader("index", sharded, "model.safetensors.index.json", "json", _tensors, None),
        Reader("shard", sharded, "model-00003-of-00003.safetensors", "safetensors", _tensors,
               _tensors_as_safetensors),
        Reader("adapter config", foreign, config, "json", with_base, _lora),
        Reader("adapter weights", foreign, weights, "safetensors", with_base, _lora),
        Reader("sealed adapter config", trained, config, "json", with_base, None),
        Reader("sealed adapter weights", trained, weights, "safetensors", with_base, None),
        Reader("adapter manifest", trained, "MANIFEST.json", "json", _verified, None),
        Reader("merged config", merged, "config.json", "json", _verified, None),
        Reader("merged weights", merged, "model.safetensors", "bytes", _verified, None),
        Reader("tokenizer.json", copy("dense", "tokens"), "tokenizer.json", "json", _tokens,
               _tokens_as_tokenizers),
    ]  # fmt: skip


def _prove_by_config(folder: Path) -> None:
    """Without a template the generation is proved by config.json, and no process renders."""
    (folder / "chat_template.jinja").unlink()
    path = folder / "config.json"
    config = json.loads(path.read_text("utf-8"))
    config["text_config"]["eos_token_id"] = 248044
    path.write_text(json.dumps(config, indent=1), "utf-8")


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


# -- safetensors


def _headers(path: Path) -> Any:
    from qcore.checkpoint.safetensors_header import read_headers

    data = path.read_bytes()
    return {
        header.name: (header.dtype, header.shape, _digest(data[header.start : header.end]))
        for header in read_headers(path)
    }


def _safetensors(path: Path) -> Any:
    """The same by the library of the format."""
    import safetensors

    return {
        name: (value["dtype"], tuple(value["shape"]), _digest(bytes(value["data"])))
        for name, value in safetensors.deserialize(path.read_bytes())
    }


# -- models


def _tensors(folder: Path) -> Any:
    """Where every tensor of a checkpoint is, by name."""
    from qcore import open_model

    checkpoint = open_model(folder).identified.checkpoint
    return {
        name: (header.dtype, header.shape, header.file, header.start, header.end)
        for name, header in sorted(checkpoint.headers.items())
    }


def _tensors_as_safetensors(folder: Path) -> Any:
    """The same places from the bytes, by the library; it must accept every shard."""
    found = {}
    for path in folder.glob("*.safetensors"):
        _safetensors(path)
        data = path.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:start])
        header.pop("__metadata__", None)
        for name, entry in header.items():
            first, last = entry["data_offsets"]
            place = (path.name, start + first, start + last)
            found[name] = (entry["dtype"], tuple(entry["shape"]), *place)
    return dict(sorted(found.items()))


def _model(folder: Path) -> Any:
    """The config and the names of all weights of a model that is accepted."""
    from qcore import open_model

    opened = open_model(folder).identified
    return _comparable(opened.checkpoint.config)


def _model_as_json(folder: Path) -> Any:
    return _comparable(json.loads((folder / "config.json").read_text("utf-8")))


def _comparable(value: Any) -> str:
    """As text, in which a NaN is equal to a NaN."""
    return repr(value)


# -- adapters


def _adapter_reader(model: Path) -> Callable[[Path], Any]:
    from qcore import open_adapter, open_model

    opened = open_model(model)

    def read(folder: Path) -> Any:
        adapter = open_adapter(folder, opened, trust_base=True)
        return {name: _Close(adapter[name].dense().numpy()) for name in sorted(adapter)}

    return read


class _Close:
    """A matrix that is equal to another one up to rounding."""

    def __init__(self, delta: Any) -> None:
        self._delta = np.asarray(delta, np.float64)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Close) or self._delta.shape != other._delta.shape:
            return False
        size = float(np.nanmax(np.abs(other._delta), initial=0.0))
        near = np.allclose(self._delta, other._delta, rtol=0, atol=1e-5 * size, equal_nan=True)
        return bool(near)

    def __repr__(self) -> str:
        return f"matrix {self._delta.shape} of norm {np.linalg.norm(self._delta):.6g}"

    __hash__ = None  # type: ignore[assignment]


def _lora(folder: Path) -> Any:
    """``scale B A`` of the one module that the foreign adapter has."""
    from safetensors.numpy import load

    config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    tensors = load((folder / "adapter_model.safetensors").read_bytes())
    if config.get("rank_pattern") or config.get("alpha_pattern") or config.get("use_dora"):
        raise ValueError("numbers of single modules: not written here")
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if config.get("use_rslora") else config["r"])
    found = {}
    for name, a in tensors.items():
        if name.endswith(".lora_A.weight"):
            b = tensors[name.replace("lora_A", "lora_B")]
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            product = b.astype(np.float32) @ a.astype(np.float32) * np.float32(scale)
            found[f"{module}.weight"] = _Close(product)
    return dict(sorted(found.items()))


def _verified(folder: Path) -> Any:
    """The parts of a folder that act, if `verify` accepts it."""
    from qcore.errors import InputError
    from qcore.io.artifact import verify

    report = verify(folder)
    if not report.ok:
        raise InputError("QC-VERIFY-001", report.problems[0])
    manifest = json.loads((folder / "MANIFEST.json").read_text("utf-8"))
    acts = {}
    for name in ("adapter_config.json", "config.json"):
        if (folder / name).exists():
            acts[name] = _effective(json.loads((folder / name).read_text("utf-8")))
    for path in folder.glob("*.safetensors"):
        acts[path.name] = _digest(path.read_bytes())
    return {"manifest": manifest["meta"], "acts": acts}


def _effective(config: Mapping[str, Any]) -> str:
    """Fields of a config without those that only describe."""
    from qcore.adapter.peft_config import DESCRIPTIVE

    return json.dumps({k: v for k, v in config.items() if k not in DESCRIPTIVE}, sort_keys=True)


# -- tokenizers


def _tokens(folder: Path) -> Any:
    from qcore.checkpoint.checkpoint import Checkpoint
    from qcore.checkpoint.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(Checkpoint.open_files(folder))
    return [tokenizer.encode(text, add_special_tokens=False).ids for text in _TEXTS]


def _tokens_as_tokenizers(folder: Path) -> Any:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str((folder / "tokenizer.json").read_text("utf-8"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return [tokenizer.encode(text, add_special_tokens=False).ids for text in _TEXTS]
