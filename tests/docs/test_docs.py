"""The documentation is true: generated pieces, hooks, codes, links, commands, transcripts."""

from __future__ import annotations

import ast
import importlib.util
import itertools
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.resources import as_file, files
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.cli_kit import apart
from support.error_list import listed_codes

import qcore.api
from qcore import errors
from qcore.api import hookspecs
from qcore.api.records import PreflightRequest
from qcore.cli.output import SIGPIPE_STATUS
from qcore.config.settings import SPECS, Settings
from qcore.plugins.manager import Plugins
from qcore.testing import discover_plugins, fake_checkpoint, write_distribution

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
SOURCES = [ROOT / "core/src/qcore", ROOT / "qwen35_plugin/src/qcore_qwen35"]
SOURCES += [ROOT / "qwen36_plugin/src/qcore_qwen36"]
SOURCES += [ROOT / "multimodal_plugin/src/qcore_multimodal"]
PAGES = [*ROOT.glob("*.md"), *DOCS.glob("*.md"), ROOT / "core/README.md"]
PAGES += [ROOT / "qwen35_plugin/README.md", ROOT / "qwen36_plugin/README.md"]
PAGES += [ROOT / "multimodal_plugin/README.md"]
BLOCK = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def prose(page: Path) -> str:
    """A page less its code blocks, whose brackets are no links."""
    return BLOCK.sub("", page.read_text(encoding="utf-8"))


# What is generated.


def generator() -> Any:
    spec = importlib.util.spec_from_file_location("docs_generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", ["training.md", "cli.md"])
def test_generated_pieces_are_fresh(page: str) -> None:
    text = (DOCS / page).read_text(encoding="utf-8")
    assert generator().derived(text) == text, "run: make docs"


def test_every_piece_stands_somewhere() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in DOCS.glob("*.md"))
    made = generator()
    for name, piece in made.PIECES.items():
        assert f"<!-- generated: {name} -->\n{piece()}<!-- end -->" in text, name


def test_a_stale_piece_is_seen() -> None:
    text = (DOCS / "training.md").read_text(encoding="utf-8")
    stale = text.replace("| `seed` | `42` |", "| `seed` | `43` |")
    assert stale != text
    assert generator().derived(stale) == text


def test_every_setting_is_read() -> None:
    read = set()
    for path in (ROOT / "core/src/qcore").rglob("*.py"):
        if path.name != "settings.py":
            tree = ast.parse(path.read_text(encoding="utf-8"))
            read |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert [name for name in SPECS if name not in read] == []


# Error codes.


def sources() -> Iterator[Path]:
    for folder in SOURCES:
        yield from sorted(folder.rglob("*.py"))


def test_every_code_is_listed_and_every_listed_code_exists() -> None:
    used = set()
    for path in sources():
        used |= set(re.findall(r"QC-[A-Z0-9]+-\d{3}", path.read_text(encoding="utf-8")))
    assert used == listed_codes().keys()


def test_codes_stand_under_their_exit_status() -> None:
    """As far as a code stands beside the class that is raised with it."""
    statuses = {
        name: kind.exit_code
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, errors.QcoreError)
    }
    statuses |= {"Finding": 65, "RowError": 65}
    where = listed_codes()
    seen = set()
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
                continue
            given = [*node.args[:1], *(word.value for word in node.keywords if word.arg == "code")]
            for value in given:
                code = str(value.value) if isinstance(value, ast.Constant) else ""
                if code in where and node.func.id in statuses:
                    seen.add(code)
                    assert where[code] == statuses[node.func.id], code
    assert len(seen) > 0.6 * len(where)


def test_exit_statuses_are_listed() -> None:
    text = (DOCS / "cli.md").read_text(encoding="utf-8")
    told = set(map(int, re.findall(r"^\| (\d+) \|", text, re.MULTILINE)))
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    own = {kind.exit_code for kind in kinds if issubclass(kind, errors.QcoreError)}
    assert told == own | {0, SIGPIPE_STATUS}


# Hooks: a docstring, a heading with the signature, an example that runs, a test by name.


def hook_sections() -> dict[str, tuple[str, str]]:
    """Hook to its heading and its text."""
    text = (DOCS / "hooks.md").read_text(encoding="utf-8")
    found = {}
    for section in text.split("\n## ")[1:]:
        heading, _, body = section.partition("\n")
        found[heading.partition("(")[0]] = (heading, body)
    return found


def specs() -> dict[str, ast.FunctionDef]:
    tree = ast.parse(Path(hookspecs.__file__).read_text(encoding="utf-8"))
    return {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_hooks_are_documented_whole() -> None:
    sections = hook_sections()
    assert list(sections) == list(specs())
    for name, node in specs().items():
        assert ast.get_docstring(node), name
        assert node.returns is not None
        signature = f"{name}({ast.unparse(node.args)}) -> {ast.unparse(node.returns)}"
        heading, body = sections[name]
        assert heading == signature
        assert [kind for kind, _ in BLOCK.findall(body)] == ["python"], name
        assert len(body.partition("```")[0].split()) > 20, f"{name} has no paragraph"
        assert f"test_hook_{name.removeprefix('qcore_')}" in globals(), name


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Loads the example of a hook as an installed plugin."""

    def load(hook: str) -> Plugins:
        ((_, source),) = BLOCK.findall(hook_sections()[hook][1])
        name = f"docs_example_{hook}"
        write_distribution(
            tmp_path, "qcore-acme", module=name, source=source, plugin="acme", model_types=("acme",)
        )
        monkeypatch.syspath_prepend(str(tmp_path))
        plugins = discover_plugins(tmp_path).load_all()
        assert [(info.status.value, info.reason) for info in plugins.infos] == [("loaded", None)]
        return plugins

    return load


CONFIG: dict[str, Any] = {
    "model_type": "acme", "vocab_size": 40, "hidden_size": 12, "num_attention_heads": 3,
    "head_dim": 5, "num_hidden_layers": 2, "rope_theta": 10000, "sliding_window": 128,
}  # fmt: skip


def test_hook_describe(example: Any) -> None:
    described = example("qcore_describe").describe()
    assert list(described.architectures) == ["acme"]
    assert list(described.generations) == ["acme-1"]


def test_hook_detect(example: Any) -> None:
    plugins = example("qcore_detect")
    ((_, claim),) = plugins.ask("qcore_detect", checkpoint=fake_checkpoint(CONFIG))
    assert (claim.supporting[0].value, claim.opposing) == ("10000", ())
    other = fake_checkpoint({**CONFIG, "rope_theta": 500000})
    ((_, claim),) = plugins.ask("qcore_detect", checkpoint=other)
    assert (claim.supporting, claim.opposing[0].pip) == ((), "qcore-acme2")


def test_hook_parameters(example: Any) -> None:
    from qcore.api.parameters import Table

    plugins = example("qcore_parameters")
    answers = plugins.ask("qcore_parameters", architecture="acme", config=CONFIG)
    table = Table([part for _, part in answers])
    assert table["model.layers.1.attn.q_proj.weight"].shape == (15, 12)
    assert len(table) == 6
    assert plugins.ask("qcore_parameters", architecture="other", config={}) == []


def test_hook_preflight(example: Any) -> None:
    plugins = example("qcore_preflight")

    def ask(length: int) -> list[str]:
        request = PreflightRequest(
            verb="train", checkpoint=fake_checkpoint(CONFIG), architecture="acme",
            generation="acme-1", layout=SimpleNamespace(), settings=Settings(max_length=length),
        )  # type: ignore[arg-type]  # fmt: skip
        return [finding.code for _, finding in plugins.ask("qcore_preflight", request=request)]

    assert ask(129) == ["QC-ACME-010"]
    assert ask(128) == []


def test_hook_chat_format(example: Any) -> None:
    plugins = example("qcore_chat_format")
    given = {"checkpoint": fake_checkpoint(CONFIG)}
    ((_, chat),) = plugins.ask("qcore_chat_format", generation="acme-1", **given)
    assert chat.turn_end == "<|end|>"
    assert plugins.ask("qcore_chat_format", generation="2", **given) == []


def test_hook_adapter_layouts(example: Any) -> None:
    plugins = example("qcore_adapter_layouts")
    adapter = {"layers.0.q.lora_down": (4, 12), "layers.0.q.lora_up": (15, 4)}
    given = {"checkpoint": fake_checkpoint(CONFIG)}
    ((_, claim),) = plugins.ask("qcore_adapter_layouts", adapter=adapter, **given)
    assert claim.names["layers.0.q.lora_up"] == ("layers.0.q.weight", "B")
    assert plugins.ask("qcore_adapter_layouts", adapter={"x.lora_A": (4, 4)}, **given) == []


def test_hook_kernels(example: Any) -> None:
    (_, op), (_, kernel) = example("qcore_kernels").ask("qcore_kernels")
    assert (op.name, op.reference_waits) == ("acme::norm", False)
    assert (kernel.op, kernel.backend, kernel.priority) == ("acme::norm", "fast", 10)
    assert kernel.known_bad[0].capability == (9, 0)
    assert kernel.refuse(SimpleNamespace(type="cpu")) == "needs a CUDA device"


def test_hook_doctor(example: Any) -> None:
    ((_, finding),) = example("qcore_doctor").ask("qcore_doctor")
    assert (finding.code, finding.what) == ("QC-ACME-020", "not installed (optional)")


# The architecture of writing-a-plugin.md is a whole one.

ACME: dict[str, Any] = {
    "model_type": "acme", "architectures": ["AcmeForCausalLM"], "acme_version": 1,
    "vocab_size": 30, "hidden_size": 8, "moe_intermediate_size": 6, "num_experts": 5,
    "num_experts_per_tok": 2, "num_hidden_layers": 2, "tie_word_embeddings": False,
}  # fmt: skip


FILE = re.compile(r"^`([\w./-]+)`:\n\n```\w+\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def walk_files() -> dict[str, str]:
    """The files that writing-a-plugin.md builds, by path."""
    return dict(FILE.findall((DOCS / "writing-a-plugin.md").read_text(encoding="utf-8")))


def install_acme(folder: Path) -> None:
    """Install the example as pip would."""
    made = walk_files()
    project = tomllib.loads(made["pyproject.toml"])["project"]
    groups = project["entry-points"].items()
    write_distribution(
        folder, project["name"], module="qcore_acme.plugin", version=project["version"],
        requires=project["dependencies"][0],
        entry_points="".join(
            f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in points.items())
            for group, points in groups
        ),
    )  # fmt: skip
    for name, text in made.items():
        if name.startswith("src/"):
            path = folder / name.removeprefix("src/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")


@pytest.fixture
def acme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Plugins]:
    """The example, installed, in this process and in processes of its own."""
    folder = tmp_path / "site"
    install_acme(folder)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", str(folder))
    yield discover_plugins(folder)
    for name in [name for name in sys.modules if name.partition(".")[0] == "qcore_acme"]:
        del sys.modules[name]


def test_the_files_of_the_example_are_those_of_its_layout() -> None:
    text = (DOCS / "writing-a-plugin.md").read_text(encoding="utf-8")
    layout = text.partition("```text\n")[2].partition("```")[0]
    made = walk_files()
    for name in made:
        path = Path(name)
        assert path.name in layout or f"{path.parent.name}/" in layout, name
    assert set(re.findall(r"\w+\.(?:py|toml)", layout)) <= {Path(name).name for name in made}


def acme_tensors() -> dict[str, Any]:
    """Random weights by the names of the example; experts of layer 0 fused, of 1 apart."""
    import torch

    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) / shape[-1] ** 0.5

    found = {"model.embed_tokens.weight": random(30, 8), "lm_head.weight": random(30, 8)}
    found["model.norm.weight"] = 1 + random(8)
    for layer in ("model.layers.0", "model.layers.1"):
        found |= {
            f"{layer}.mix_proj.weight": random(8, 8),
            f"{layer}.norm.weight": 1 + random(8),
            f"{layer}.router.weight": 3 * random(5, 8),
            f"{layer}.experts.up_proj": random(5, 6, 8),
            f"{layer}.experts.down_proj": random(5, 8, 6),
        }
    return found


def acme_by_hand(w: dict[str, Any], ids: Any, lengths: list[int]) -> tuple[Any, Any]:
    """Logits and load-balancing loss of the example, token by token."""
    import torch

    norm = torch.nn.functional.rms_norm
    rows = list(w["model.embed_tokens.weight"][ids])
    starts = [sum(lengths[:n]) for n in range(len(lengths))]
    balance = 0.0
    for layer in ("model.layers.0", "model.layers.1"):
        up, down = w[f"{layer}.experts.up_proj"], w[f"{layer}.experts.down_proj"]
        mixed, hits, mean = [], torch.zeros(5), torch.zeros(5)
        for t, row in enumerate(rows):
            before = torch.zeros(8) if t in starts else rows[t - 1]
            row = row + w[f"{layer}.mix_proj.weight"] @ before
            x = norm(row, (8,), w[f"{layer}.norm.weight"], 1e-6)
            shares = (w[f"{layer}.router.weight"] @ x).softmax(0)
            for e in shares.argsort(descending=True)[:2].tolist():
                row = row + shares[e] * (down[e] @ torch.nn.functional.silu(up[e] @ x))
                hits[e] += 1 / len(ids)
            mean += shares / len(ids)
            mixed.append(row)
        rows = mixed
        balance = balance + 5 * (hits * mean).sum() / 2
    final = norm(torch.stack(rows), (8,), w["model.norm.weight"], 1e-6)
    return final @ w["lm_head.weight"].T, balance


def test_the_whole_architecture_is_one(acme: Plugins, tmp_path: Path) -> None:
    import json

    import torch
    from safetensors.torch import save_file

    from qcore.adapter.peft_names import stems
    from qcore.adapter.targets import coverage, targets
    from qcore.adapter.written_config import choose_class, peft_config
    from qcore.api.blocks import Packed
    from qcore.api.parameters import Table
    from qcore.checkpoint.checkpoint import Checkpoint
    from qcore.checkpoint.layout import locate
    from qcore.nn.load import load
    from qcore.nn.model import Model
    from qcore.nn.qlora.lora_layer import Lora
    from qcore.plugins.detect import detect

    weights = acme_tensors()
    disk = {name: value for name, value in weights.items() if "layers.1.experts" not in name}
    for name in ("up_proj", "down_proj"):
        for e, value in enumerate(weights[f"model.layers.1.experts.{name}"]):
            disk[f"model.layers.1.experts.{e}.{name}.weight"] = value.contiguous()
    save_file(disk, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(ACME))
    checkpoint = Checkpoint.open(tmp_path)
    decision = detect(checkpoint, acme)
    assert (decision.architecture.name, decision.generation.name) == ("acme", "acme-1")
    given = {"architecture": "acme", "config": ACME}
    table = Table([part for _, part in acme.ask("qcore_parameters", **given)])
    layout = locate(table, checkpoint)

    lora = Lora(r=2, lora_alpha=4)
    assert {table[n].row.group for n in targets(layout, [], lora)} == {"mix", "experts"}
    chosen = targets(layout, ["mix", "experts", "router"], lora)
    model = Model(decision.architecture, ACME, layout, torch.float32, chosen)
    load(model, layout, checkpoint, device=torch.device("cpu"), quantize=False)
    for name, module in model.adapters():
        module.reset_lora(name, 0, torch.device("cpu"))
    assert {line.group: line.hit for line in coverage(model, layout)} == {
        "embed": 0, "mix": 2, "norm": 0, "router": 2, "experts": 4, "head": 0,
    }  # fmt: skip

    lengths = [1, 4, 3]
    ids = torch.randint(30, (8,), generator=torch.Generator().manual_seed(1))
    batch = Packed.of(ids.split(lengths), ids.split(lengths))
    logits, balance = acme_by_hand(weights, ids, lengths)
    assert torch.allclose(model.logits(batch), logits, atol=1e-5)
    aux = model.trunk.aux_loss(batch)
    assert aux is not None
    assert torch.allclose(aux, balance, atol=1e-5)

    grads = []
    for again in (False, True):
        batch = Packed.of(ids.split(lengths), ids.split(lengths))
        model.zero_grad()
        loss = model.loss(batch, recompute="full" if again else "none")
        (loss + model.trunk.aux_loss(batch)).backward()
        grads.append([p.grad.clone() for _, p in model.trainable() if p.grad is not None])
    assert len(grads[0]) == 2 * len(chosen)
    for one, two in zip(*grads, strict=True):
        assert torch.equal(one, two)
    assert any(bool(grad.any()) for grad in grads[0])

    # Cached equals whole.
    caches = [layer.new_cache(3, torch.device("cpu")) for layer in model.trunk.layers]
    for token, expected in zip(ids[5:], logits[5:], strict=True):
        step = Packed.of([token[None]])
        x = model.trunk.embed(step)
        for layer, cache in zip(model.trunk.layers, caches, strict=True):
            x = layer(x, step, cache)
        assert torch.allclose(model.trunk.final(x) @ model.head.T, expected, atol=1e-5)

    namespace = choose_class(layout, "text", ACME["architectures"], "")
    assert stems((table[name] for name in chosen), namespace) | {} == {
        f"model.layers.{n}.{weight}": f"base_model.model.model.layers.{n}.{stem}"
        for n in range(2)
        for weight, stem in {
            "mix_proj.weight": "mix_proj", "router.weight": "router",
            "experts.up_proj": "experts.base_layer", "experts.down_proj": "experts",
        }.items()
    }  # fmt: skip
    told = peft_config(
        chosen, layout, r=2, lora_alpha=4, lora_dropout=0, base="b", revision=None,
        namespace=namespace,
    )  # fmt: skip
    layers = [f"model.layers.{n}" for n in range(2)]
    assert told["target_modules"] == [f"{layer}.mix_proj" for layer in layers]
    names = ("experts.down_proj", "experts.up_proj", "router.weight")
    assert told["target_parameters"] == [f"{layer}.{name}" for layer in layers for name in names]


@pytest.mark.usefixtures("acme")
def test_the_tests_of_the_example_pass(tmp_path: Path) -> None:
    file = tmp_path / "test_acme.py"
    file.write_text(walk_files()["tests/test_acme.py"], encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file.name]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert re.search(r"^8 passed", done.stdout, re.MULTILINE), done.stdout


@pytest.mark.slow
@pytest.mark.usefixtures("acme")
def test_the_example_trains_and_merges(tmp_path: Path) -> None:
    chosen = ("--architecture", "acme", "--output", tmp_path / "demo")
    done = apart("demo", *chosen, "--json", timeout=600)
    assert done.code == 0, done.err
    told = done.json
    assert told["last_loss"] < told["first_loss"] / 2
    assert told["after"] != told["before"]
    seen = apart("inspect", "demo/base", cwd=tmp_path)
    assert f"```text\n{seen.out}```" in (DOCS / "writing-a-plugin.md").read_text(encoding="utf-8")
    kernels = apart("doctor", "--kernels", "--json").json["kernels"]
    (fused,) = [line for line in kernels if line["backend"] == "fused" and line["owner"] != "qcore"]
    assert (fused["op"], fused["state"]) == ("acme::norm", "available")
    assert apart("presets", "show", "acme-2b").code == 0
    assert apart("skus", "show", "acme/Acme-2B").code == 0


# Links, commands, words.


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.replace("`", "").lower()).replace(" ", "-") for h in headings}


def leads_nowhere(page: Path, target: str) -> bool:
    """Whether a relative link of a page has no file, or no heading, inside the repository."""
    path, _, anchor = target.partition("#")
    there = (page.parent / path).resolve() if path else page
    if not there.exists() or not there.is_relative_to(ROOT):
        return True
    return bool(anchor) and anchor not in anchors(there)


def test_relative_links_lead_somewhere() -> None:
    links = [
        (page, target)
        for page in PAGES
        for target in re.findall(r"\]\(([^)\s]+)\)", prose(page))
        if not re.match(r"[a-z]+:", target)
    ]
    assert links
    assert [(name_of(page), target) for page, target in links if leads_nowhere(page, target)] == []
    assert leads_nowhere(PAGES[0], "no-such-page.md")
    assert leads_nowhere(PAGES[0], "#no-such-heading")


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    named = [
        (name_of(page), target)
        for page in PAGES
        for target in re.findall(
            r"(?:^|`|&& )make ([a-z-]+)", page.read_text(encoding="utf-8"), re.MULTILINE
        )
    ]
    assert named
    assert [(page, target) for page, target in named if target not in targets] == []


def test_readme_has_the_two_commands() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "\nmake demo " in text
    assert "\nmake test " in text


def test_pages_are_plain() -> None:
    for page in PAGES:
        text, name = page.read_text(encoding="utf-8"), name_of(page)
        assert text.isascii(), (name, [c for c in text if not c.isascii()][:3])
        assert text.endswith("\n"), name
        # A table and the signature of a hook cannot be wrapped.
        free = [line for line in BLOCK.sub("", text).splitlines() if "|" not in line]
        assert max(len(line) for line in free if not line.startswith("## qcore_")) <= 115, name


def commands(page: Path) -> Iterator[str]:
    """Every ``qcore ...`` line of a page's shell blocks."""
    for kind, body in BLOCK.findall(page.read_text(encoding="utf-8")):
        if kind in ("bash", "console check"):
            for line in body.splitlines():
                if line.removeprefix("$ ").startswith("qcore "):
                    yield line.removeprefix("$ ")


def test_commands_use_options_that_exist() -> None:
    import click

    from qcore.cli.main import cli

    root = click.Context(cli, info_name="qcore")
    checked = 0
    for page in PAGES:
        for line in commands(page):
            words = shlex.split(line, comments=True)[1:]
            command = cli.get_command(root, words[0])
            if isinstance(command, click.Group):
                command = command.get_command(root, words[1])
            assert command is not None, line
            known = {name for option in command.get_params(root) for name in option.opts}
            used = {word for word in words if word.startswith("--")}
            assert used <= known, line
            for word, value in itertools.pairwise(words):
                if word == "--set":
                    name = value.partition("=")[0].partition(".")[0]
                    assert name in SPECS or "lr=" in value, line
            checked += 1
    assert checked >= 10


def test_json_examples_are_json_or_say_what_they_leave_out() -> None:
    import json

    for page in PAGES:
        for kind, body in BLOCK.findall(page.read_text(encoding="utf-8")):
            if kind == "json":
                for line in body.splitlines():
                    json.loads(line.replace("[...]", "[]"))


# Transcripts: those marked ``console check`` are run.


def transcripts() -> list[Any]:
    return [
        pytest.param(body, id=body.splitlines()[0].removeprefix("$ "))
        for page in PAGES
        for kind, body in BLOCK.findall(page.read_text(encoding="utf-8"))
        if kind == "console check"
    ]


@pytest.fixture(scope="session")
def demo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``qcore demo --output`` has in its folder before it trains."""
    from qcore_qwen35.tiny import write

    folder = tmp_path_factory.mktemp("demo")
    write(folder / "base")
    with as_file(files("qcore.data").joinpath("demo.jsonl")) as rows:
        shutil.copyfile(rows, folder / "data.jsonl")
    return folder


@pytest.mark.parametrize("text", transcripts())
def test_transcripts_are_real(demo_folder: Path, text: str) -> None:
    first, _, expected = text.partition("\n")
    words = shlex.split(first.removeprefix("$ "))
    assert words[0] == "qcore"
    done = apart(*words[1:], cwd=demo_folder)
    assert done.out + done.err == expected


def test_the_changelog_names_modules_that_exist() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    moved = re.findall(r"^\| `(qcore\.[\w.]+)` \| `(qcore\.[\w.]+)` \|$", text, re.MULTILINE)
    assert len(moved) > 100
    for _, name in moved:
        path = ROOT / "core/src" / name.replace(".", "/")
        in_api = name.startswith("qcore.api.") and name.rpartition(".")[2] in qcore.api.__all__
        assert in_api or path.is_dir() or path.with_suffix(".py").exists(), name
