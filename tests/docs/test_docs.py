"""The documentation is true: generated pieces, hooks, codes, links, commands, transcripts."""

from __future__ import annotations

import ast
import importlib.util
import itertools
import re
import shlex
import shutil
from collections.abc import Iterator
from importlib.resources import as_file, files
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from plugin_kit import checkpoint, distribution, installed
from support.cli_kit import apart

from qcore import errors, hookspecs
from qcore.plugins import Plugins
from qcore.records import PreflightRequest
from qcore.settings import SPECS

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
SOURCES = [ROOT / "core/src/qcore", ROOT / "qwen35_plugin/src/qcore_qwen35"]
SOURCES += [ROOT / "qwen36_plugin/src/qcore_qwen36"]
PAGES = [*ROOT.glob("*.md"), *DOCS.glob("*.md"), ROOT / "core/README.md"]
PAGES += [ROOT / "qwen35_plugin/README.md", ROOT / "qwen36_plugin/README.md"]
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


def listed() -> dict[str, int]:
    """Code to the exit status under which docs/errors.md lists it."""
    found: dict[str, int] = {}
    status = 0
    for line in (DOCS / "errors.md").read_text(encoding="utf-8").splitlines():
        if heading := re.match(r"## Exit status (\d+):", line):
            status = int(heading[1])
        if entry := re.match(r"- `(QC-[A-Z0-9]+-\d{3})`: \S", line):
            assert entry[1] not in found, f"{entry[1]} stands twice"
            found[entry[1]] = status
    return found


def sources() -> Iterator[Path]:
    for folder in SOURCES:
        yield from sorted(folder.rglob("*.py"))


def test_every_code_is_listed_and_every_listed_code_exists() -> None:
    used = set()
    for path in sources():
        used |= set(re.findall(r"QC-[A-Z0-9]+-\d{3}", path.read_text(encoding="utf-8")))
    assert used == listed().keys()


def test_codes_stand_under_their_exit_status() -> None:
    """As far as a code stands beside the class that is raised with it."""
    statuses = {
        name: kind.exit_code
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, errors.QcoreError)
    }
    statuses |= {"Finding": 65, "BadRow": 65}
    where = listed()
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
    assert told == own | {0}


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
        distribution(
            tmp_path, "qcore-acme", module=name, source=source, plugin="acme", model_types=("acme",)
        )
        monkeypatch.syspath_prepend(str(tmp_path))
        plugins = installed(tmp_path).load_all()
        assert [(info.status.value, info.reason) for info in plugins.infos] == [("loaded", None)]
        return plugins

    return load


CONFIG: dict[str, Any] = {
    "model_type": "acme", "vocab_size": 40, "hidden_size": 12, "num_attention_heads": 3,
    "head_dim": 5, "num_hidden_layers": 2, "rope_theta": 10000, "max_position_embeddings": 128,
}  # fmt: skip


def test_hook_describe(example: Any) -> None:
    described = example("qcore_describe").describe()
    assert list(described.architectures) == ["acme"]
    assert described.generations["acme-1"].record.licence == "MIT"


def test_hook_detect(example: Any) -> None:
    plugins = example("qcore_detect")
    ((_, claim),) = plugins.ask("qcore_detect", checkpoint=checkpoint(CONFIG))
    assert (claim.signs[0].value, claim.bars) == ("10000", ())
    other = checkpoint({**CONFIG, "rope_theta": 500000})
    ((_, claim),) = plugins.ask("qcore_detect", checkpoint=other)
    assert (claim.signs, claim.bars[0].pip) == ((), "qcore-acme2")


def test_hook_key_mapping(example: Any) -> None:
    from qcore.table import Table

    plugins = example("qcore_key_mapping")
    answers = plugins.ask("qcore_key_mapping", architecture="acme", config=CONFIG)
    table = Table([part for _, part in answers])
    assert table["model.layers.1.attn.q_proj.weight"].shape == (15, 12)
    assert len(table) == 6
    assert plugins.ask("qcore_key_mapping", architecture="other", config={}) == []


def test_hook_preflight(example: Any) -> None:
    plugins = example("qcore_preflight")

    def ask(length: int) -> list[str]:
        request = PreflightRequest(
            verb="train", checkpoint=checkpoint(CONFIG), architecture="acme",
            generation="acme-1", layout=SimpleNamespace(), settings={"max_length": length},
        )  # type: ignore[arg-type]  # fmt: skip
        return [finding.code for _, finding in plugins.ask("qcore_preflight", request=request)]

    assert ask(129) == ["QC-ACME-010"]
    assert ask(128) == []


def test_hook_chat_format(example: Any) -> None:
    plugins = example("qcore_chat_format")
    given = {"checkpoint": checkpoint(CONFIG)}
    ((_, chat),) = plugins.ask("qcore_chat_format", generation="acme-1", **given)
    assert chat.turn_end == "<|end|>"
    assert plugins.ask("qcore_chat_format", generation="2", **given) == []


def test_hook_detect_merge(example: Any) -> None:
    plugins = example("qcore_detect_merge")
    adapter = {"layers.0.q.lora_down": (4, 12), "layers.0.q.lora_up": (15, 4)}
    given = {"checkpoint": checkpoint(CONFIG)}
    ((_, claim),) = plugins.ask("qcore_detect_merge", adapter=adapter, **given)
    assert claim.names["layers.0.q.lora_up"] == ("layers.0.q.weight", "B")
    assert plugins.ask("qcore_detect_merge", adapter={"x.lora_A": (4, 4)}, **given) == []


def test_hook_doctor(example: Any) -> None:
    ((_, finding),) = example("qcore_doctor").ask("qcore_doctor")
    assert (finding.code, finding.what) == ("QC-ACME-020", "not installed (optional)")


# Links, commands, words.


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.replace("`", "").lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_relative_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{name_of(page)}: {target}"
        assert there.is_relative_to(ROOT), f"{name_of(page)}: {target}"
        if anchor:
            assert anchor in anchors(there), f"{name_of(page)}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_make_targets_exist(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"(?:^|`|&& )make ([a-z-]+)", text, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_readme_has_the_two_commands() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "\nmake demo " in text
    assert "\nmake test " in text


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_pages_are_plain(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert text.isascii(), [c for c in text if not c.isascii()][:3]
    assert text.endswith("\n")
    assert max(len(line) for line in BLOCK.sub("", text).splitlines() if "|" not in line) <= 115


def commands(page: Path) -> Iterator[str]:
    """Every ``qcore ...`` line of a page's shell blocks."""
    for kind, body in BLOCK.findall(page.read_text(encoding="utf-8")):
        if kind in ("bash", "console check"):
            for line in body.splitlines():
                if line.removeprefix("$ ").startswith("qcore "):
                    yield line.removeprefix("$ ")


def test_commands_use_options_that_exist() -> None:
    import click

    from qcore.cli import cli

    root = click.Context(cli, info_name="qcore")
    checked = 0
    for page in PAGES:
        for line in commands(page):
            words = shlex.split(line, comments=True)[1:]
            command = cli.get_command(root, words[0])
            if isinstance(command, click.Group):
                command = command.get_command(root, words[1])
            assert command is not None, line
            known = {name for option in command.params for name in option.opts}
            used = {word for word in words if word.startswith("--")}
            assert used <= known, line
            for word, value in itertools.pairwise(words):
                if word == "--set":
                    assert value.partition("=")[0] in SPECS or "lr=" in value, line
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
