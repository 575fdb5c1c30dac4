"""The settings of a run: names, types, defaults, ranges and help.

This file decides which settings exist. It leaves to `qcore.config.spec` how a value is
checked, to `qcore.config.resolve` where values come from, and to the verb that reads a setting
what it does.

Codes: those of `qcore.config.spec`; ``QC-CONFIG-001`` unknown key, ``-007`` settings that
contradict each other.
`qcore.data.rendering.template_kwargs` checks that a template reads what ``chat_template_kwargs``
sets, `qcore.nn.kernels.registry` which backends ``kernels`` may name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from ..errors import UsageError, nearest
from .frozen_map import Entries, Plain
from .spec import Origin, RefusedWords, Spec, Value, check, plain


def _s(default: Value, help: str, **limits: Any) -> Any:  # `help` as in click and argparse
    """A dataclass field that carries its `Spec`."""
    return field(default=default, metadata={"help": help, **limits})


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Every setting of a run, under the names of transformers, peft and trl.

    A value of the wrong type or out of range raises `UsageError`, whatever its source.
    """

    max_steps: int = _s(
        -1, "optimizer steps; -1: use num_train_epochs", low=1, high=10_000_000, also=(-1,)
    )
    num_train_epochs: float = _s(
        1.0, "passes over the data, if max_steps is -1", above=0, high=10000
    )
    max_length: int = _s(
        2048, "maximum tokens of a sample; long_rows decides on longer ones", low=2, high=1 << 20
    )
    long_rows: str = _s(
        "refuse",
        "rows longer than max_length: refuse (an error), drop, truncate_turns (cut after the last "
        "trained turn that fits) or truncate_tokens (cut at max_length)",
        choices=("refuse", "drop", "truncate_turns", "truncate_tokens"),
    )
    bad_rows: str = _s(
        "refuse",
        "rows that cannot be trained: refuse (an error) or skip, up to bad_rows_limit",
        choices=("refuse", "skip"),
    )
    bad_rows_limit: float = _s(
        0.1, "largest fraction of a source's rows that bad_rows: skip may leave out", low=0, high=1
    )
    refuse_findings: tuple[str, ...] = _s(
        (),
        "warnings on a row that refuse it instead: QC-DATA-052 a turn without prompt or answer, "
        "-056 an empty user turn, -057 a call of an undeclared function, -058 an argument of "
        "another type than its schema",
        choices=("QC-DATA-052", "QC-DATA-056", "QC-DATA-057", "QC-DATA-058"),
    )
    turns: str = _s(
        "all",
        "assistant turns to train: all or the last one; a train mark in a row goes before it",
        choices=("all", "last"),
    )
    reasoning: str = _s(
        "train",
        "reasoning of assistant turns: train, mask (context without a loss) or drop (remove it)",
        choices=("train", "mask", "drop"),
    )
    history: str = _s(
        "as_served",
        "context of a turn: as_served (as the template renders it at serving, which may take "
        "several samples a row) or as_rendered (one rendering of the row)",
        choices=("as_served", "as_rendered"),
    )
    dataset_num_proc: int = _s(
        -1,
        "processes that render and tokenize rows; -1: one for each core, or this process alone if "
        "there are few rows; 0 or 1: this process alone",
        low=0,
        high=1024,
        also=(-1,),
    )
    per_device_train_batch_size: int = _s(1, "rows packed into one micro-step", low=1, high=65536)
    gradient_accumulation_steps: int = _s(8, "micro-steps per optimizer step", low=1, high=65536)
    tokens_per_step: int = _s(
        0,
        "tokens of an optimizer step, on average; 0: gradient_accumulation_steps micro-steps, "
        "which has no effect otherwise",
        low=0, high=1 << 30,
    )  # fmt: skip
    scale_batch: bool = _s(
        False,
        "with several ranks, multiply the rows of an optimizer step by their number; false: the "
        "ranks share the rows",
    )
    learning_rate: float = _s(2e-4, "peak learning rate of AdamW", above=0, high=1)
    warmup_ratio: float = _s(0.03, "fraction of the steps used for warmup", low=0, below=1)
    weight_decay: float = _s(0.0, "decoupled weight decay of AdamW", low=0, high=1)
    max_grad_norm: float = _s(1.0, "maximum gradient norm; 0: no clipping", low=0, high=1e6)
    r: int = _s(16, "rank of the LoRA matrices", low=1, high=4096)
    lora_alpha: int = _s(32, "numerator of the LoRA scaling, lora_alpha / r", low=1, high=65536)
    use_rslora: bool = _s(False, "rank-stabilized LoRA: the scaling is lora_alpha / sqrt(r)")
    use_dora: bool = _s(
        False, "DoRA: also train the norm of each row of base + LoRA; not for experts and routers"
    )
    lora_dropout: float = _s(0.0, "dropout on the input of LoRA A", low=0, below=1)
    target_groups: tuple[str, ...] = _s(
        (), "LoRA groups to train; empty: the default groups of the architecture"
    )
    trainable_token_indices: tuple[int, ...] = _s(
        (),
        "ids of tokens whose rows of the embedding are trained, also in a head that is tied to it",
        items=int, low=0, high=2**31 - 1,
    )  # fmt: skip
    trainable_head_token_indices: tuple[int, ...] = _s(
        (),
        "the same for a head that is not tied to the embedding",
        items=int, low=0, high=2**31 - 1,
    )  # fmt: skip
    seed: int = _s(42, "seed for initialization, row order and dropout", low=0, high=2**32 - 1)
    dtype: str = _s(
        "bf16",
        "compute dtype",
        choices=("bf16", "fp32"),
        refused=RefusedWords(
            words=("fp16", "float16", "half"),
            what="fp16 overflows at 65504, which the recurrent state of linear attention exceeds",
            fix="dtype: bf16",
        ),
    )
    quantize_groups: tuple[str, ...] = _s(
        (),
        "additional LoRA groups to store in 4 bit, besides those that always are",
    )
    quantization: str = _s("nf4", "storage format of frozen weights", choices=("nf4", "none"))
    save_steps: int = _s(100, "optimizer steps between checkpoints; 0: none", low=0, high=10**9)
    save_total_limit: int = _s(2, "number of checkpoints to keep", low=1, high=10000)
    on_spike: str = _s(
        "warn",
        "a step whose loss or gradient norm is far above the steps before it: warn, stop before "
        "its update, or rollback (return to the last checkpoint of save_steps and go on with the "
        "next step's rows)",
        choices=("warn", "stop", "rollback"),
    )
    publish_without_gain: bool = _s(
        False,
        "publish an adapter whose run ended above its first loss or at ln(vocabulary), or that "
        "is too small to change a weight",
    )
    grace_seconds: float = _s(
        30.0,
        "seconds in which a run that a signal stops may end: a step that would take longer is "
        "abandoned for the checkpoint before it",
        low=1, high=86400,
    )  # fmt: skip
    rank_timeout: float = _s(
        600.0,
        "seconds for which the ranks of a run on several GPUs wait for one that does not arrive; "
        "then the run ends and names it",
        low=1, high=86400,
    )  # fmt: skip
    logging_steps: int = _s(1, "optimizer steps between log entries", low=1, high=10**9)
    eval_fraction: float = _s(0.0, "fraction of the rows held out for evaluation", low=0, high=0.5)
    eval_steps: int = _s(
        0, "optimizer steps between evaluations; 0: once an epoch and at the end", low=0, high=10**9
    )
    load_best_at_end: bool = _s(
        False, "publish the checkpoint with the lowest eval_loss, not the last step"
    )
    join_micro_batches: bool = _s(
        True, "on a GPU, run short micro-batches of one step together if that is faster"
    )
    gradient_checkpointing: bool = _s(True, "activation checkpointing; false: none")
    recompute: str = _s(
        "auto",
        "activation checkpointing policy: none, elementwise (recompute elementwise ops), full "
        "(recompute whole layers) or offload (full, with layer inputs in host memory); auto: the "
        "fastest that fits on the GPU, full on the CPU",
        choices=("auto", "none", "elementwise", "full", "offload"),
    )
    shard_base: str = _s(
        "auto",
        "with several ranks, shard the frozen weights of all layers over them: always or never "
        "(each rank holds all of them); auto: only if they do not fit on each GPU",
        choices=("auto", "always", "never"),
    )
    media_cache_gb: float = _s(
        4.0,
        "host memory in GB for cached outputs of a frozen tower; 0: recompute them in every step",
        low=0,
        high=1e6,
    )
    adapter_class: str = _s(
        "", "model class that names the adapter's tensors; empty: as in config.json"
    )
    generation: str = _s("", "generation, if detection cannot decide; empty: as detected")
    loss_chunk_size: int = _s(
        0,
        "supervised positions per chunk of the loss; 0: sized by a fixed memory budget",
        low=0,
        high=1 << 20,
    )
    router_aux_loss_coef: float = _s(
        0.0,
        "weight of the router load-balancing loss in a mixture of experts; 0: off",
        low=0,
        high=1,
    )
    group_r: Entries[int] = _s(  # noqa: RUF009
        Entries(), "rank by LoRA group, overriding r", each=int, key="group", low=1, high=1024
    )
    group_lora_alpha: Entries[float] = _s(  # noqa: RUF009
        Entries(),
        "lora_alpha by LoRA group, overriding lora_alpha",
        each=float,
        key="group",
        above=0,
        high=65536,
    )
    rank_pattern: Entries[int] = _s(  # noqa: RUF009
        Entries(),
        "rank by module, overriding r and group_r; a key is a name or an expression that matches "
        "the end of a module's name, as in PEFT, and the first key that matches counts",
        each=int, key="module", low=1, high=4096,
    )  # fmt: skip
    alpha_pattern: Entries[float] = _s(  # noqa: RUF009
        Entries(),
        "lora_alpha by module, overriding lora_alpha and group_lora_alpha; keys as in rank_pattern",
        each=float, key="module", above=0, high=65536,
    )  # fmt: skip
    chat_template_kwargs: Entries[Plain] = _s(  # noqa: RUF009
        Entries(),
        "variables passed to the checkpoint's chat template",
        each=object,
        key="variable",
    )
    kernels: Entries[str] = _s(  # noqa: RUF009
        Entries(),
        "backend by op, overriding the best verified one; every op has reference",
        each=str,
        key="op",
    )

    def __post_init__(self) -> None:
        for name, spec in SPECS.items():
            value = check(spec, getattr(self, name), Origin(field=name))
            object.__setattr__(self, name, value)
        if self.recompute not in ("auto", "none") and not self.gradient_checkpointing:
            raise UsageError(
                "QC-CONFIG-007",
                "contradicts gradient_checkpointing, which disables activation checkpointing",
                field="recompute",
                found=f"{self.recompute} with gradient_checkpointing false",
                fix="remove one of the two",
            )
        if self.on_spike == "rollback" and not self.save_steps:
            raise UsageError(
                "QC-CONFIG-007",
                "needs checkpoints to return to, and save_steps=0 writes none",
                field="on_spike",
                found="rollback with save_steps 0",
                fix="set save_steps, or on_spike=stop",
            )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, source: object | None = None) -> Settings:
        """Build settings from the output of `to_dict`, for example in a manifest.

        Raises:
            UsageError: an unknown key, or a value that is not allowed.
        """
        values: dict[str, Value] = {}
        for key, value in data.items():
            origin = Origin(file=source, field=key)
            values[key] = check(spec_of(key, origin), value, origin)
        return cls(**values)  # type: ignore[arg-type]  # each is checked against its own field

    def to_dict(self) -> dict[str, Any]:
        """Every setting by name, as JSON has it."""
        return {name: plain(getattr(self, name)) for name in SPECS}


SPECS: Mapping[str, Spec] = {
    f.name: Spec(name=f.name, type=type(f.default), default=f.default, **f.metadata)  # type: ignore[arg-type]
    for f in fields(Settings)
}


def in_bytes(gigabytes: float) -> int:
    """Convert a setting in GB to whole bytes."""
    return int(gigabytes * 1e9)


# Names of settings in other tools that are spelled too differently for a suggestion.
_OTHER_WORDS = {
    "lr": "learning_rate",
    "num_proc": "dataset_num_proc",
    "preprocessing_num_workers": "dataset_num_proc",
    "data_workers": "dataset_num_proc",
    "epochs": "num_train_epochs",
    "steps": "max_steps",
    "seq_len": "max_length",
    "max_seq_length": "max_length",
    "sequence_len": "max_length",
    "cutoff_len": "max_length",
    "batch_size": "per_device_train_batch_size",
    "micro_batch_size": "per_device_train_batch_size",
    "grad_accum": "gradient_accumulation_steps",
    "rank": "r",
    "lora_r": "r",
    "lora_rank": "r",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "rslora": "use_rslora",
    "dora": "use_dora",
    "target_modules": "target_groups",
    "load_in_4bit": "quantization",
    "bf16": "dtype",
    "fp16": "dtype",
    "precision": "dtype",
    "warmup_steps": "warmup_ratio",
    "val_set_size": "eval_fraction",
    "load_best_model_at_end": "load_best_at_end",
    "clip_grad": "max_grad_norm",
}


def meant(key: str, *, near: bool) -> str | None:
    """The setting that a key means, also by its name in another tool or, if `near`, with a typo."""
    if key in SPECS:
        return key
    return _OTHER_WORDS.get(key) or (nearest(key.lower(), SPECS, cutoff=0.75) if near else None)


def spec_of(key: str, origin: Origin) -> Spec:
    """Look up the spec of a setting.

    Raises:
        UsageError: ``QC-CONFIG-001``, with the nearest key.
    """
    if key in SPECS:
        return SPECS[key]
    guess = _OTHER_WORDS.get(key) or nearest(key.replace("-", "_").lower(), SPECS)
    fix = f"did you mean {guess}? ({SPECS[guess].help})" if guess else "docs/training.md lists them"
    raise origin.error("QC-CONFIG-001", "unknown setting", fix=fix)
