"""Settings: every YAML trap refused with file, key, found and expected; precedence; --set."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import sys
from pathlib import Path
from subprocess import run

import pytest
import yaml

from qcore.config import resolve
from qcore.config.frozen_map import Entries
from qcore.config.presets import Preset, Presets
from qcore.config.resolve import SPECS, Settings, load_settings, parse_sets
from qcore.config.spec import Origin, Spec, check, line_of
from qcore.errors import UsageError

# text of run.yaml -> setting and value that it must give
GOOD: list[tuple[str, str, object]] = [
    ("learning_rate: 2e-4", "learning_rate", 2e-4),
    ("learning_rate: 2E-4", "learning_rate", 2e-4),
    ("learning_rate: 2.0e-04", "learning_rate", 2e-4),
    ("learning_rate: .0002", "learning_rate", 2e-4),
    ("learning_rate: 1", "learning_rate", 1.0),
    ("learning_rate: 1.", "learning_rate", 1.0),
    ("learning_rate: +1e-5", "learning_rate", 1e-5),
    ("r: 8", "r", 8),
    ("r: +8", "r", 8),
    ("max_steps: -1", "max_steps", -1),
    ("max_steps: 20  # twenty", "max_steps", 20),
    ("seed: 0", "seed", 0),
    ("recompute: none", "recompute", "none"),
    ("gradient_checkpointing: false", "gradient_checkpointing", False),
    ("gradient_checkpointing: True", "gradient_checkpointing", True),
    ("gradient_checkpointing: FALSE", "gradient_checkpointing", False),
    ("dtype: fp32", "dtype", "fp32"),
    ('dtype: "fp32"', "dtype", "fp32"),
    ("dtype: 'bf16'", "dtype", "bf16"),
    ("quantization: none", "quantization", "none"),
    ("generation: 3.5", "generation", "3.5"),
    ("generation: 3.10", "generation", "3.10"),  # a YAML float would lose the zero
    ('adapter_class: ""', "adapter_class", ""),
    ("adapter_class: on", "adapter_class", "on"),  # a word, not a boolean
    ("target_groups: [attn, mlp]", "target_groups", ("attn", "mlp")),
    ("target_groups:\n  - attn\n  - 'mlp'", "target_groups", ("attn", "mlp")),
    ("target_groups: []", "target_groups", ()),
    ("target_groups: [on, 3]", "target_groups", ("on", "3")),
    ("group_r: {experts: 8, 'on': 4}", "group_r", Entries({"on": 4, "experts": 8})),
    ("group_r:\n  experts: 8\n  3: 4", "group_r", Entries({"experts": 8, "3": 4})),
    ("group_r: {}", "group_r", Entries()),
    ("group_lora_alpha: {experts: 16}", "group_lora_alpha", Entries({"experts": 16.0})),
    ("kernels: {acme::norm: fused}", "kernels", Entries({"acme::norm": "fused"})),
    ("kernels:\n  acme::norm: fused", "kernels", Entries({"acme::norm": "fused"})),
    ("kernels: {'acme::norm': fused}", "kernels", Entries({"acme::norm": "fused"})),
    ("router_aux_loss_coef: 1e-3", "router_aux_loss_coef", 1e-3),
    (
        "chat_template_kwargs: {a: false, b: TRUE, c: 1, d: -1.5e2, e: low, f: 'false', g: \"1\"}",
        "chat_template_kwargs",
        Entries({"a": False, "b": True, "c": 1, "d": -150.0, "e": "low", "f": "false", "g": "1"}),
    ),
    ("chat_template_kwargs: {a: ''}", "chat_template_kwargs", Entries({"a": ""})),
    ("", "r", 16),
    ("# nothing but a comment", "r", 16),
    ("---\nr: 4\n...", "r", 4),
    ("{r: 4}", "r", 4),
    ("'r': 4", "r", 4),
    ("\ufeffr: 4", "r", 4),
]

# text of run.yaml -> code, and words that the one line (with its fix) must hold
BAD: list[tuple[str, str, tuple[str, ...]]] = [
    ("learning_rat: 1e-4", "QC-CONFIG-001", ("learning_rat", "learning_rate?")),
    ("lr: 1e-4", "QC-CONFIG-001", ("lr", "learning_rate?")),
    ("max_seq_length: 4", "QC-CONFIG-001", ("max_length?",)),
    ("Learning-Rate: 1e-4", "QC-CONFIG-001", ("learning_rate?",)),
    ("xyzzy: 4", "QC-CONFIG-001", ("xyzzy", "docs/training.md")),
    ("<<: {r: 4}", "QC-CONFIG-001", ("<<",)),
    ("fp16: true", "QC-CONFIG-001", ("dtype?",)),
    ("r: 8\nr: 8", "QC-YAML-002", ("line 2", "r twice")),
    ("r: 8\n'r': 9", "QC-YAML-002", ("line 2", "r twice")),
    ("r: 8.0", "QC-CONFIG-002", ("found 8.0", "whole number from 1 to 4096", "rank")),
    ("r: 1e1", "QC-CONFIG-002", ("found 1e1",)),
    ("r: '8'", "QC-CONFIG-002", ('the text "8"', "remove the quotes")),
    ("r: eight", "QC-CONFIG-002", ("found eight",)),
    ("r: 010", "QC-CONFIG-002", ("found 010",)),  # eight in YAML 1.1, ten in 1.2
    ("r: 0x10", "QC-CONFIG-002", ("found 0x10",)),
    ("r: 0o10", "QC-CONFIG-002", ("found 0o10",)),
    ("r: 1_6", "QC-CONFIG-002", ("found 1_6",)),
    ("r: 1:30", "QC-CONFIG-002", ("found 1:30",)),  # ninety in YAML 1.1
    ("r: true", "QC-CONFIG-002", ("found true",)),
    ("r:", "QC-CONFIG-002", ("no value",)),
    ("r: null", "QC-CONFIG-002", ("no value",)),
    ("r: ~", "QC-CONFIG-002", ("no value",)),
    ("r: [8]", "QC-CONFIG-002", ("found a list",)),
    ("r: {a: 8}", "QC-CONFIG-002", ("found a mapping",)),
    ("r: 0", "QC-CONFIG-003", ("out of range", "found 0", "from 1 to 4096")),
    ("r: -8", "QC-CONFIG-003", ("found -8",)),
    ("r: 99999999999999999999999999", "QC-CONFIG-002", ("999",)),
    ("max_steps: 0", "QC-CONFIG-003", ("from 1 to 10000000, or -1",)),
    ("max_steps: -2", "QC-CONFIG-003", ("found -2",)),
    ("learning_rate: 0", "QC-CONFIG-003", ("above 0",)),
    ("learning_rate: -1e-4", "QC-CONFIG-003", ("above 0",)),
    ("learning_rate: .nan", "QC-CONFIG-003", ("not finite", ".nan")),
    ("learning_rate: NaN", "QC-CONFIG-003", ("not finite",)),
    ("learning_rate: .inf", "QC-CONFIG-003", ("not finite",)),
    ("learning_rate: -.INF", "QC-CONFIG-003", ("not finite",)),
    ("learning_rate: 1e999", "QC-CONFIG-003", ("out of range",)),
    ("learning_rate: '2e-4'", "QC-CONFIG-002", ('the text "2e-4"', "quotes")),
    ("learning_rate: 2e-4x", "QC-CONFIG-002", ("2e-4x",)),
    ("learning_rate: 1,5", "QC-CONFIG-002", ("1,5",)),
    ("learning_rate: e5", "QC-CONFIG-002", ("e5",)),
    ("learning_rate: .", "QC-CONFIG-002", ("found .",)),
    ("learning_rate: 2026-11-24", "QC-CONFIG-002", ("2026-11-24",)),
    ("warmup_ratio: 1", "QC-CONFIG-003", ("below 1",)),
    ("eval_fraction: 0.6", "QC-CONFIG-003", ("0.5",)),
    ("gradient_checkpointing: yes", "QC-CONFIG-002", ("found yes", "write true")),
    ("gradient_checkpointing: no", "QC-CONFIG-002", ("found no", "write false")),
    ("gradient_checkpointing: on", "QC-CONFIG-002", ("write true",)),
    ("gradient_checkpointing: Off", "QC-CONFIG-002", ("write false",)),
    ("gradient_checkpointing: n", "QC-CONFIG-002", ("write false",)),
    ("gradient_checkpointing: 1", "QC-CONFIG-002", ("true or false",)),
    ("gradient_checkpointing: 'true'", "QC-CONFIG-002", ("the text",)),
    ("dtype: fp16", "QC-CONFIG-004", ("fp16", "65504", "bf16")),
    ("dtype: float16", "QC-CONFIG-004", ("bf16",)),
    ("dtype: bfloat16", "QC-CONFIG-003", ("bf16?",)),
    ("dtype: 16", "QC-CONFIG-003", ("bf16 or fp32",)),
    ("dtype: null", "QC-CONFIG-002", ("no value",)),
    ("quantization: int8", "QC-CONFIG-003", ("nf4 or none",)),
    ("target_groups: attn", "QC-CONFIG-002", ("a list of names",)),
    ("target_groups: [attn, attn]", "QC-CONFIG-005", ("attn",)),
    ("target_groups: [attn, null]", "QC-CONFIG-002", ("no value",)),
    ("target_groups: [[attn]]", "QC-CONFIG-002", ("found a list",)),
    ("target_groups: ['.*']", "QC-CONFIG-002", ("'.*'",)),  # names, not patterns
    ("group_r: 8", "QC-CONFIG-002", ("a mapping of group to a whole number from 1 to 1024",)),
    ("group_r: [experts]", "QC-CONFIG-002", ("found a list",)),
    ("group_r:", "QC-CONFIG-002", ("no value",)),
    ("group_r: {experts: 0}", "QC-CONFIG-003", ("group_r.experts", "found 0")),
    ("group_r: {experts: 1025}", "QC-CONFIG-003", ("1024",)),
    ("group_r: {experts: 8.0}", "QC-CONFIG-002", ("found 8.0",)),
    ("group_r: {experts: true}", "QC-CONFIG-002", ("found true",)),
    ("group_r: {experts: {r: 8}}", "QC-CONFIG-002", ("group_r.experts", "found a mapping")),
    ("group_r: {experts: 8, experts: 9}", "QC-YAML-002", ("experts twice",)),
    ("group_r:\n  attn: 8\n  .*: 9", "QC-CONFIG-003", ("line 3", "not a valid group name")),
    ("group_lora_alpha: {experts: 0}", "QC-CONFIG-003", ("above 0",)),
    ("group_lora_alpha: {experts: .inf}", "QC-CONFIG-003", ("not finite",)),
    ("router_aux_loss_coef: 1.1", "QC-CONFIG-003", ("from 0 to 1",)),
    ("chat_template_kwargs: {a: no}", "QC-CONFIG-002", ("chat_template_kwargs.a", "write false")),
    ("chat_template_kwargs: {a: null}", "QC-CONFIG-002", ("no value",)),
    ("chat_template_kwargs: {a: 0x10}", "QC-CONFIG-002", ('write "0x10"',)),
    ("chat_template_kwargs: {a: 2026-11-24}", "QC-CONFIG-002", ("2026-11-24",)),
    ("chat_template_kwargs: {a: .nan}", "QC-CONFIG-002", (".nan",)),
    ("chat_template_kwargs: {a: 1e999}", "QC-CONFIG-003", ("inf",)),
    ("chat_template_kwargs: {a: [1]}", "QC-CONFIG-002", ("found a list",)),
    ("chat_template_kwargs: {a-b: 1}", "QC-CONFIG-003", ("not a valid variable name",)),
    ("adapter_class: ../../x y", "QC-CONFIG-003", ("not a valid name",)),
    (
        "recompute: full\ngradient_checkpointing: false",
        "QC-CONFIG-007",
        ("recompute", "gradient_checkpointing"),
    ),
    ("seed: &a 3\nr: *a", "QC-YAML-002", ("anchor &a",)),
    ("r: *a", "QC-YAML-002", ("alias *a",)),
    ("r: !!int '8'", "QC-YAML-002", ("tag",)),
    ("r: !!python/object/apply:os.system ['x']", "QC-YAML-002", ("tag",)),
    ("? [a]\n: 4", "QC-YAML-002", ("list or mapping as a key",)),
    ("r: 4\n---\nr: 5", "QC-YAML-002", ("second document",)),
    ("r: 4\n\tseed: 5", "QC-YAML-002", ("line 2",)),
    ("r: [4", "QC-YAML-002", ("line 1",)),
    ("r: '4", "QC-YAML-002", ("line 1",)),
    ("r: \x00", "QC-YAML-002", ()),
    ("r: " + "[" * 100_000, "QC-YAML-002", ("levels",)),
    ("- r", "QC-CONFIG-006", ("found a list", "key: value")),
    ("just text", "QC-CONFIG-006", ("just text",)),
]


@pytest.mark.parametrize(("text", "name", "value"), GOOD, ids=lambda v: str(v)[:40])
def test_yaml_gives(tmp_path: Path, text: str, name: str, value: object) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text, encoding="utf-8")
    settings, origins = load_settings(config_file=file, presets=Presets(entries=()))
    assert getattr(settings, name) == value
    assert type(getattr(settings, name)) is type(value)
    assert origins[name] == ("file" if name in text else "default")


@pytest.mark.parametrize(("text", "code", "words"), BAD, ids=lambda v: str(v)[:40])
def test_yaml_is_refused(tmp_path: Path, text: str, code: str, words: tuple[str, ...]) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError) as caught:
        load_settings(config_file=file, presets=Presets(entries=()))
    error = caught.value
    assert (error.code, error.exit_code) == (code, 2)
    if code != "QC-CONFIG-007":
        assert "run.yaml" in error.message
    assert "\n" not in error.message
    for word in words:
        assert word in f"{error.message} {error.fix}"


def test_there_are_sixty_cases() -> None:
    assert len(BAD) >= 60


@pytest.mark.parametrize(
    "make",
    [
        lambda p: None,
        lambda p: p.mkdir(),
        lambda p: p.write_bytes(b"r: \xff\xfe"),
        lambda p: p.write_bytes(b"#" * (1 << 20) + b"\n#"),
    ],
    ids=["missing", "folder", "not-utf8", "huge"],
)
def test_a_file_that_cannot_be_read(tmp_path: Path, make: object) -> None:
    file = tmp_path / "run.yaml"
    make(file)  # type: ignore[operator]
    with pytest.raises(UsageError, match=r"run\.yaml") as caught:
        load_settings(config_file=file)
    assert caught.value.code.startswith("QC-YAML-")
    assert caught.value.fix or caught.value.code != "QC-YAML-001"


def _presets(**settings: object) -> Presets:
    preset = Preset(
        id="p", aliases=("q",), description="d", settings=settings, base_model=None,
        origin="core", file=Path("p.yaml"),
    )  # fmt: skip
    return Presets(entries=(preset,))


def test_flag_over_file_over_preset_over_default(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("r: 32\nlora_alpha: 33\n")
    settings, origins = load_settings(
        preset="q",
        config_file=file,
        sets=["lora_alpha=44"],
        presets=_presets(r=2, lora_alpha=3, seed=4),
    )
    assert (settings.r, settings.lora_alpha, settings.seed, settings.max_length) == (
        32,
        44,
        4,
        2048,
    )
    assert [origins[n] for n in ("r", "lora_alpha", "seed", "max_length")] == [
        "file", "flag", "preset p", "default",
    ]  # fmt: skip
    assert set(origins) == set(SPECS)


def test_mappings_join_entry_by_entry(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("group_r: {attn: 8, mlp: 8}\ngroup_lora_alpha: {}\n")
    settings, origins = load_settings(
        preset="p",
        config_file=file,
        sets=["group_r.mlp=4", "group_r.experts=2"],
        presets=_presets(
            group_r=Entries({"gdn": 16, "attn": 16}),
            group_lora_alpha=Entries({"attn": 3.0}),
            chat_template_kwargs=Entries({"enable_thinking": False}),
        ),
    )
    assert settings.group_r == Entries({"gdn": 16, "attn": 8, "mlp": 4, "experts": 2})
    assert settings.group_lora_alpha == Entries(), "an empty mapping drops what was there"
    assert settings.chat_template_kwargs == Entries({"enable_thinking": False})
    assert origins["group_r"] == "preset p, file, flag"
    assert (origins["group_lora_alpha"], origins["chat_template_kwargs"]) == ("file", "preset p")


def test_a_mapping_in_code() -> None:
    settings = Settings(group_r={"attn": 8, "mlp": 4})  # type: ignore[arg-type]
    other = Settings(group_r={"mlp": 4, "attn": 8})  # type: ignore[arg-type]
    assert settings == other
    assert hash(settings) == hash(other)
    assert settings.group_r["attn"] == 8
    with pytest.raises(TypeError):
        settings.group_r["attn"] = 9  # type: ignore[index]
    true, one = (Settings(chat_template_kwargs={"a": value}) for value in (True, 1))  # type: ignore[arg-type]
    assert true != one, "a template keeps them apart"
    for copied in (copy.deepcopy(settings), pickle.loads(pickle.dumps(settings))):
        assert copied == settings
    for bad in ({"attn": 0}, {"attn": True}, {"": 8}, {8: 8}, {"attn": "8"}, [8], "attn"):
        with pytest.raises(UsageError):
            Settings(group_r=bad)  # type: ignore[arg-type]
    for text in ("\0", "\ud800", "x" * 5000):
        with pytest.raises(UsageError):
            Settings(chat_template_kwargs={"a": text})  # type: ignore[arg-type]


def test_a_flag_may_even_restore_the_default() -> None:
    settings, origins = load_settings(preset="p", sets=["r=16"], presets=_presets(r=2))
    assert (settings.r, origins["r"]) == (16, "flag")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("learning_rate=2e-4", 2e-4),
        ("learning_rate = 2e-4 ", 2e-4),
        ("generation=3.5", "3.5"),
        ("generation=", ""),
        ("adapter_class=no", "no"),
        ("target_groups=attn,mlp", ("attn", "mlp")),
        ("target_groups=[attn, mlp]", ("attn", "mlp")),
        ("target_groups=attn", ("attn",)),
        ("target_groups=", ()),
        ("gradient_checkpointing=false", False),
        ("chat_template_kwargs.enable_thinking=false", Entries({"enable_thinking": False})),
        ('chat_template_kwargs.style="false"', Entries({"style": "false"})),
        ("chat_template_kwargs.style=two words", Entries({"style": "two words"})),
        ("chat_template_kwargs={a: true, b: 3}", Entries({"a": True, "b": 3})),
        ("group_r.experts = 8", Entries({"experts": 8})),
        ("group_r=", Entries()),
        ("kernels.acme::norm=fused", Entries({"acme::norm": "fused"})),
        (
            "kernels={acme::norm: fused, norm: reference}",
            Entries({"acme::norm": "fused", "norm": "reference"}),
        ),
    ],
)
def test_set(text: str, value: object) -> None:
    assert list(parse_sets([text]).values()) == [value]


@pytest.mark.parametrize(
    ("sets", "code", "word"),
    [
        (["r=8", "r=8"], "QC-CONFIG-005", "twice"),
        (["r"], "QC-CONFIG-006", "key=value"),
        (["=8"], "QC-CONFIG-001", "names no setting"),
        (["=8"], "QC-CONFIG-001", "=8"),
        ([""], "QC-CONFIG-001", "names no setting"),
        (["max_steps=99999999999999999999"], "QC-CONFIG-003", "10000000"),
        (["r="], "QC-CONFIG-002", "no value"),
        (["r='8'"], "QC-CONFIG-002", "whole number"),
        (["rr=8"], "QC-CONFIG-001", "unknown setting"),
        (["learning_rate=nan"], "QC-CONFIG-003", "finite"),
        (["gradient_checkpointing=yes"], "QC-CONFIG-002", "true or false"),
        (["dtype=fp16"], "QC-CONFIG-004", "65504"),
        (["dtype="], "QC-CONFIG-003", "bf16 or fp32"),
        (["group_r.experts=8", "group_r.experts=8"], "QC-CONFIG-005", "twice"),
        (["group_r={experts: 8}", "group_r.attn=8"], "QC-CONFIG-005", "twice"),
        (["group_r.attn=8", "group_r={experts: 8}"], "QC-CONFIG-005", "twice"),
        (["group_r={experts: 8, experts: 9}"], "QC-YAML-002", "experts twice"),
        (["group_r=8"], "QC-CONFIG-002", "a mapping of group"),
        (["group_r.=8"], "QC-CONFIG-003", "not a valid group name"),
        (["group_r.experts"], "QC-CONFIG-006", "key=value"),
        (["r.experts=8"], "QC-CONFIG-001", "unknown setting"),
        (["chat_template_kwargs.a=yes"], "QC-CONFIG-002", "true or false"),
        (["chat_template_kwargs.a="], "QC-CONFIG-002", "no value"),
        (["chat_template_kwargs.a={b: 1}"], "QC-CONFIG-002", "a mapping"),
        (["chat_template_kwargs.a=99999999999999999"], "QC-CONFIG-003", "2**53"),
        (["target_groups=[attn"], "QC-YAML-002", "--set target_groups"),
        (["target_groups=attn,,mlp"], "QC-CONFIG-002", "no value"),
    ],
)
def test_set_is_refused(sets: list[str], code: str, word: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_sets(sets)
    assert caught.value.code == code
    assert "--set" in caught.value.message
    assert word in caught.value.message


def test_lines_of_settings_are_read_alike_by_us_and_by_yaml(tmp_path: Path) -> None:
    settings = Settings(
        learning_rate=1e-5, weight_decay=1e-20, target_groups=("on", "3"), generation="3.10",
        gradient_checkpointing=False, eval_fraction=0.1, eval_steps=3,
        group_r={"on": 8, "3": 4}, group_lora_alpha={"attn": 1e-5},
        chat_template_kwargs={"no": False, "b": "true", "c": "a: b # c", "d": "ü", "e": 1},
    )  # fmt: skip
    file = tmp_path / "run.yaml"
    text = "".join(f"{line_of(name, getattr(settings, name))}\n" for name in SPECS)
    file.write_text(text)
    assert load_settings(config_file=file)[0] == settings
    assert yaml.safe_load(text) == settings.to_dict()
    assert Settings.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings


def test_from_dict_refuses_what_is_not_ours() -> None:
    with pytest.raises(UsageError, match="rank"):
        Settings.from_dict({"rank": 4})
    for value in (True, "8", 8.0, None, [8], 10**400):
        with pytest.raises(UsageError):
            Settings.from_dict({"r": value})
    with pytest.raises(UsageError):
        Settings.from_dict({"learning_rate": 10**400})


def test_code_cannot_make_wrong_settings_either() -> None:
    with pytest.raises(UsageError, match="learning_rate"):
        Settings(learning_rate=float("nan"))
    with pytest.raises(UsageError, match="r: "):
        dataclasses.replace(Settings(), r=0)
    assert Settings(learning_rate=1).learning_rate == 1.0


# Scripts rely on these names.
FIXED_NAMES = """
    max_steps num_train_epochs max_length per_device_train_batch_size
    gradient_accumulation_steps learning_rate warmup_ratio weight_decay max_grad_norm r
    lora_alpha lora_dropout target_groups seed dtype quantization save_steps logging_steps
    eval_fraction
"""


def test_the_names_that_people_rely_on() -> None:
    assert set(FIXED_NAMES.split()) <= set(SPECS)
    for spec in SPECS.values():
        assert spec.help
        assert "\n" not in spec.help
        assert spec.expected


def test_importing_config_stays_light() -> None:
    code = (
        "import sys, qcore.config.resolve, qcore.io.artifact, qcore.checkpoint.hub; "
        "bad = {'torch', 'yaml', 'transformers', 'huggingface_hub', 'peft'} & set(sys.modules); "
        "assert not bad, bad"
    )
    assert run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_room_has_no_import_circle() -> None:
    """spec < settings < convert < presets < resolve: each imports only those before it."""
    order = ("spec", "settings", "convert", "presets", "resolve")
    folder = Path(resolve.__file__).parent
    for index, name in enumerate(order):
        text = (folder / f"{name}.py").read_text(encoding="utf-8")
        assert not [later for later in order[index:] if f"from .{later} import" in text], name


def test_no_setting_is_special_by_its_name() -> None:
    spec = Spec(name="dtype", type=str, default="half", help="", choices=("half", "fp16"))
    assert check(spec, "fp16", Origin(field="dtype")) == "fp16"


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("turns", ("first", "", "1", "null")),
        ("reasoning", ("keep", "")),
        ("history", ("full", "yes")),
        ("long_rows", ("skip", "2")),
        ("bad_rows", ("drop", "ignore")),
        ("bad_rows_limit", ("2", "-0.1", "ten", "10%", "nan", "")),
        ("max_length", ("1", "-5", "2k", "2.5", "9999999999", "true")),
        ("eval_fraction", ("0.9", "half")),
        ("eval_steps", ("-1", "1.5")),
        ("load_best_at_end", ("1", "maybe", "")),
        ("seed", ("-1", "x")),
    ],
)
def test_a_wrong_value_of_a_data_setting_has_a_fix_that_works(
    tmp_path: Path, name: str, wrong: tuple[str, ...]
) -> None:
    file = tmp_path / "run.yaml"
    for value in wrong:
        file.write_text(f"{name}: {value}\n", encoding="utf-8")
        for given in ({"sets": (f"{name}={value}",)}, {"config_file": file}):
            with pytest.raises(UsageError) as caught:
                load_settings(**given)
            error = caught.value
            assert "\n" not in str(error)
            assert error.fix is not None
            assert error.fix.startswith("write ")
            words = error.fix.removeprefix("write ")
            choices = words.split(" or ") if SPECS[name].choices else [words.split()[-1]]
            for choice in choices:
                load_settings(sets=(f"{name}={choice}",))


@pytest.mark.parametrize("spec", SPECS.values(), ids=lambda spec: spec.name)
def test_every_setting_has_advice(spec: Spec) -> None:
    for each in (spec, spec.entry) if spec.each is not None else (spec,):
        assert each.advice.startswith("write ")
        assert "None" not in each.advice
