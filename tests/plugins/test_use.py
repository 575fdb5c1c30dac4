"""Loading and asking: containment, attribution, and a verb that stops rather than degrades."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.plugin_kit import good, process

from qcore.api import hookspecs
from qcore.api.adapter_claims import AdapterClaim
from qcore.api.parameters import Part
from qcore.api.records import Architecture, ChatFormat, Claim, Generation, Modality
from qcore.errors import PluginError
from qcore.plugins.manager import _guarded, _yields
from qcore.plugins.record_check import callable_fields, problem
from qcore.testing import write_distribution

#: name -> (source, status after loading, what the reason must hold)
AT_LOAD: dict[str, tuple[str, str, str]] = {
    "import_error": (
        "import nowhere_to_be_found",
        "broken",
        "ModuleNotFoundError: No module named 'nowhere_to_be_found' (x_import_error.py:1)",
    ),
    "syntax_error": ("def f(:\n", "broken", "SyntaxError: invalid syntax"),
    "sys_exit": ("import sys\nsys.exit(0)\n", "broken", "SystemExit: 0 (x_sys_exit.py:2)"),
    "raises_base": (
        "class Odd(BaseException):\n    pass\nraise Odd('odd')\n",
        "broken",
        "Odd: odd (x_raises_base.py:3)",
    ),
    "unprintable": (
        "class Odd(Exception):\n    def __str__(self): raise SystemExit\nraise Odd\n",
        "broken",
        "Odd: (its message cannot be shown)",
    ),
    "wrapper": (
        good("x_wrapper")
        + "@hookimpl(wrapper=True)\ndef qcore_preflight(request):\n    yield\n    return []\n",
        "invalid",
        "hook 'qcore_preflight' is a wrapper",
    ),
    "old_wrapper": (
        good("x_old_wrapper") + "@hookimpl(hookwrapper=True)\ndef qcore_doctor():\n    yield\n",
        "invalid",
        "hook 'qcore_doctor' is a wrapper",
    ),
    "misspelt": (
        good("x_misspelt") + "@hookimpl\ndef qcore_detetc(checkpoint):\n    return []\n",
        "invalid",
        "hook 'qcore_detetc' is not known, did you mean 'qcore_detect'",
    ),
    "renamed": (
        good("x_renamed")
        + "@hookimpl\ndef qcore_key_mapping(architecture, config):\n    return []\n",
        "invalid",
        "hook 'qcore_key_mapping' is now called 'qcore_parameters'",
    ),
    "renamed_optional": (
        good("x_renamed_optional")
        + "@hookimpl(optionalhook=True)\ndef qcore_detect_merge(adapter):\n    return []\n",
        "invalid",
        "hook 'qcore_detect_merge' is now called 'qcore_adapter_layouts'",
    ),
    "undecorated": (
        good("x_undecorated") + "def qcore_preflight(request):\n    return []\n",
        "invalid",
        "function 'qcore_preflight' is not decorated with @hookimpl",
    ),
    "wrong_argument": (
        good("x_wrong_argument") + "@hookimpl\ndef qcore_preflight(requests):\n    return []\n",
        "invalid",
        "requests",
    ),
    "no_hook": ("VALUE = 1\n", "invalid", "implements no hook"),
    "describe_raises": (
        "from qcore import hookimpl\n@hookimpl\ndef qcore_describe():\n    yield 1 / 0\n",
        "broken",
        "ZeroDivisionError: division by zero (x_describe_raises.py:4)",
    ),
    "describe_wrong": (
        "from qcore import hookimpl\n@hookimpl\ndef qcore_describe():\n    yield 'text'\n",
        "invalid",
        "found yielded str, expected an iterable of Architecture or Generation or Modality",
    ),
    "describe_field": (
        "from qcore import hookimpl\nfrom qcore.api.records import Generation\n@hookimpl\n"
        "def qcore_describe():\n    yield Generation(name='1', architectures=('a', 2))\n",
        "invalid",
        "Generation whose architectures is tuple of str",
    ),
    "outside_index": (
        good("another_type"),
        "invalid",
        "architecture 'another_type' claims model type 'another_type', which the distribution "
        "does not name under qcore.model_types",
    ),
}


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, object]]:
    """All of `AT_LOAD` beside sound plugins: what a listing and what a verb sees of each."""
    folder = tmp_path_factory.mktemp("hostile")
    for name, (source, _, _) in AT_LOAD.items():
        kind = f"x_{name}"
        write_distribution(folder, f"d-{name}", module=kind, source=source, plugin=name,
                           model_types=(kind,))  # fmt: skip
    write_distribution(folder, "d-incompatible", module="x_inc", plugin="incompatible",
                       source=good("x_inc"), model_types=("x_inc",),
                       requires="qcore-framework>=9")  # fmt: skip
    for number in range(50 - len(AT_LOAD) - 1):
        kind = f"fine{number:02}"
        write_distribution(folder, f"d-{kind}", module=kind, source=good(kind), plugin=kind,
                           model_types=(kind,))  # fmt: skip
    names = [*AT_LOAD, "inc", "incompatible"]
    result: dict[str, dict[str, object]] = process(
        folder,
        f"""
        verbs = {{n: error_of(lambda: plugins.for_model_type("x_" + n)) for n in {names!r}}}
        fine = [[i.name for i, a in plugins.for_model_type("fine07").ask("qcore_describe")],
                [i.name for i in plugins.for_model_type("fine07").infos]]
        plugins.load_all()
        show({{"listed": statuses(), "verbs": verbs, "fine": fine,
               "order": [i.name for i in plugins.infos]}})
        """,
    )
    return result


@pytest.mark.parametrize("name", AT_LOAD)
def test_each_hostile_plugin_is_listed_with_its_cause(
    hostile: dict[str, dict[str, list[str]]], name: str
) -> None:
    status, reason, owner = hostile["listed"][name]
    assert status == AT_LOAD[name][1]
    assert AT_LOAD[name][2] in reason
    assert "\n" not in reason
    assert owner == f"d-{name}"


@pytest.mark.parametrize("name", [*AT_LOAD, "inc"])
def test_each_hostile_plugin_stops_the_verb_of_its_own_model_type(
    hostile: dict[str, dict[str, dict[str, str]]], name: str
) -> None:
    error = hostile["verbs"][name]
    plugin = "incompatible" if name == "inc" else name
    assert error["code"] == "QC-PLUGIN-001"
    assert error["exit"] == 69
    assert f"plugin '{plugin}' (d-{plugin} 1.0)" in error["message"]
    assert (AT_LOAD[name][2] if name != "inc" else "requires qcore-framework>=9") in error[
        "message"
    ]
    assert f"QCORE_DISABLE_PLUGINS={plugin}" in error["fix"]


def test_sound_plugins_among_hostile_ones_work(hostile: dict[str, dict[str, list[str]]]) -> None:
    fine = [name for name in hostile["listed"] if name.startswith("fine")]
    assert len(fine) == 49 - len(AT_LOAD)
    assert {hostile["listed"][name][0] for name in fine} == {"loaded"}
    assert hostile["fine"] == [["fine07", "fine07"], ["fine07"]]
    assert hostile["order"] == sorted(hostile["order"])


ASKED = good("toy") + "\nfrom qcore.api.records import Finding, Severity\n"
FINDING = "Finding(code='C', severity=Severity.NOTE, what='w')"

#: name -> (body of qcore_doctor, code, what the message must hold)
IN_ASK: dict[str, tuple[str, str, str]] = {
    "raises": ("raise ValueError('no')", "QC-PLUGIN-002", "ValueError: no (toy_mod.py:"),
    "late": (f"yield {FINDING}\n    raise KeyError('k')", "QC-PLUGIN-002", "KeyError: 'k'"),
    "exits": ("import sys; sys.exit(3)", "QC-PLUGIN-002", "SystemExit: 3"),
    "multiline": ("raise ValueError('a\\nb')", "QC-PLUGIN-002", "ValueError: a b"),
    "none": ("pass", "QC-PLUGIN-003", "returned None"),
    "number": ("return 3", "QC-PLUGIN-003", "returned int"),
    "text": ("return 'all well'", "QC-PLUGIN-003", "returned str"),
    "single": (f"return {FINDING}", "QC-PLUGIN-003", "returned Finding"),
    "kind": (
        "yield Evidence(field='f', value='v', supports=True)",
        "QC-PLUGIN-003",
        "yielded Evidence",
    ),
    "field": (
        "yield Finding(code=1, severity=Severity.NOTE, what='w')",
        "QC-PLUGIN-003",
        "yielded Finding whose code is int",
    ),
    "endless": (f"while True:\n        yield {FINDING}", "QC-PLUGIN-003", "more than 10000"),
}


@pytest.mark.parametrize("name", IN_ASK)
def test_a_plugin_that_fails_when_asked_stops_the_verb_by_name(tmp_path: Path, name: str) -> None:
    body, code, cause = IN_ASK[name]
    source = f"{ASKED}\n@hookimpl\ndef qcore_doctor():\n    {body}\n"
    write_distribution(tmp_path, "toy-dist", module="toy_mod", source=source, plugin="toy",
                       model_types=("toy",))  # fmt: skip
    write_distribution(tmp_path, "a", module="a_mod", plugin="a", model_types=("toy",),
                       source="from qcore import hookimpl\nfrom qcore.api.records import *\n"
                       f"@hookimpl\ndef qcore_doctor():\n    yield {FINDING}\n")  # fmt: skip
    error, surveyed = process(
        tmp_path,
        """
        scope = plugins.for_model_type("toy")
        show([error_of(lambda: scope.ask("qcore_doctor")),
              {i.name: str(a) for i, a in scope.survey("qcore_doctor")}])
        """,
    )
    assert (error["code"], error["exit"]) == (code, 69)
    assert "plugin 'toy' (toy-dist 1.0)" in error["message"]
    assert "qcore_doctor" in error["message"]
    assert cause in error["message"]
    assert "\n" not in error["message"]
    assert "Finding(code='C'" in surveyed["a"]  # a report goes on, the verb does not
    assert cause in surveyed["toy"]


def test_an_error_raised_on_purpose_passes_as_it_is(tmp_path: Path) -> None:
    source = (
        f"{ASKED}\nfrom qcore.errors import InputError\n@hookimpl\ndef qcore_doctor():\n"
        "    raise InputError('QC-TOY-001', 'bad layer', field='layer_types')\n    yield\n"
    )
    write_distribution(tmp_path, "toy", module="toy_mod", source=source, model_types=("toy",))
    error = process(
        tmp_path,
        "show(error_of(lambda: plugins.for_model_type('toy').ask('qcore_doctor')))",
    )
    assert (error["code"], error["exit"]) == ("QC-TOY-001", 65)


def test_a_callable_of_a_record_that_fails_names_its_plugin(tmp_path: Path) -> None:
    source = good("toy").replace("build=", "build=lambda context: 1 / 0 if context else ") + "\n"
    write_distribution(tmp_path, "toy-dist", module="toy_mod", source=source, plugin="toy",
                       model_types=("toy",))  # fmt: skip
    error = process(
        tmp_path,
        """
        build = plugins.for_model_type("toy").describe().architectures["toy"].record.build
        show(error_of(lambda: build("context")))
        """,
    )
    assert (error["code"], error["exit"]) == ("QC-PLUGIN-002", 69)
    assert "plugin 'toy' (toy-dist 1.0) failed in build of toy" in error["message"]
    assert "ZeroDivisionError" in error["message"]


EVERY_CALLABLE = """
from qcore import hookimpl
from qcore.api import Architecture, Modality

def fails(*arguments):
    raise KeyError("weight")

@hookimpl
def qcore_describe():
    yield Architecture(name="toy", model_types=("toy",), root="m", build=fails, tiny=fails)
    yield Modality(name="sight", section="sight_config", architectures=("toy",), root="m.sight",
                   kinds=("it",), build=fails, reader=fails)
"""


def test_every_callable_of_every_record_is_contained(tmp_path: Path) -> None:
    write_distribution(tmp_path, "toy-dist", module="toy_mod", source=EVERY_CALLABLE, plugin="toy",
                       model_types=("toy",))  # fmt: skip
    errors = process(
        tmp_path,
        """
        from dataclasses import fields
        described = plugins.for_model_type("toy").describe()
        records = [owned.record for group in (described.architectures, described.modalities)
                   for owned in group.values()]
        def outcome(call):
            try:
                return error_of(lambda: call("context"))
            except Exception as error:
                return {"code": type(error).__name__, "message": "escaped"}
        show({f"{type(r).__name__}.{f.name}": outcome(getattr(r, f.name))
              for r in records for f in fields(r) if callable(getattr(r, f.name))})
        """,
    )
    assert set(errors) == {
        "Architecture.build", "Architecture.tiny", "Modality.build", "Modality.reader",
    }  # fmt: skip
    for field, error in errors.items():
        assert error["code"] == "QC-PLUGIN-002", (field, error)
        name = "sight" if field.startswith("Modality") else "toy"
        expected = f"plugin 'toy' (toy-dist 1.0) failed in {field.partition('.')[2]} of {name}"
        assert expected in error["message"]
        assert "KeyError: 'weight'" in error["message"]


def test_callables_are_known_by_the_type_of_their_field() -> None:
    """A record that gets another callable field has it contained without a change elsewhere."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Later:
        name: str
        plain: type[int] = int  # callable, and no function of the plugin's
        made: Callable[[], int]
        maybe: Callable[[], int] | None = None

    assert callable_fields(Later) == ("made", "maybe")
    assert callable_fields(Modality) == ("build", "reader")
    assert callable_fields(Architecture) == ("build", "tiny")
    assert callable_fields(Generation) == ()
    assert callable_fields(ChatFormat) == ("parse",)


@pytest.mark.parametrize(
    ("parse", "wanted"), [(None, None), (print, None), (5, "ChatFormat whose parse is int")]
)
def test_a_protocol_with_call_is_a_function(parse: Any, wanted: str | None) -> None:
    given = ChatFormat(
        turn_start="<s>", role_end="\n", turn_end="</s>", assistant="bot", prompt_tails=(),
        control=(), roles=("user", "bot"), stop_tokens=("</s>",), parse=parse,
    )  # fmt: skip
    assert problem(given) == wanted


def test_a_parser_that_fails_names_its_plugin() -> None:
    def parse(text: str, tools: object = None, *, thinking: bool = False) -> dict[str, Any]:
        raise KeyError(text)

    given = ChatFormat(
        turn_start="<s>", role_end="\n", turn_end="</s>", assistant="bot", prompt_tails=(),
        control=(), roles=("user", "bot"), stop_tokens=("</s>",), parse=parse,
    )  # fmt: skip
    plugin: Any = SimpleNamespace(
        info="plugin 'toy'", name="toy", identity=SimpleNamespace(distribution="toy")
    )
    with pytest.raises(PluginError, match="failed in parse of ChatFormat") as caught:
        _guarded(plugin, given).parse("hi", thinking=True)
    assert caught.value.code == "QC-PLUGIN-002"


def test_interrupt_at_import_is_not_swallowed(tmp_path: Path) -> None:
    write_distribution(tmp_path, "toy", module="toy_mod", source="raise KeyboardInterrupt",
                       model_types=("toy",))  # fmt: skip
    assert process(
        tmp_path,
        """
        try:
            plugins.load_all()
            show("swallowed")
        except KeyboardInterrupt:
            show("passed")
        """,
    ) == "passed"  # fmt: skip


def test_prints_of_a_plugin_do_not_reach_stdout(tmp_path: Path) -> None:
    source = f"print('at import')\n{ASKED}\n@hookimpl\ndef qcore_doctor():\n    print('late')\n"
    write_distribution(tmp_path, "toy", module="toy_mod", source=source + "    return []\n",
                       model_types=("toy",))  # fmt: skip
    assert process(tmp_path, "show(plugins.for_model_type('toy').ask('qcore_doctor'))") == []


def test_only_indexed_plugins_are_imported_and_answers_come_in_name_order(tmp_path: Path) -> None:
    for name in ("c", "a", "b"):
        write_distribution(tmp_path, f"dist-{name}", module=f"mod_{name}", plugin=name,
                           source=good(name), model_types=(name, "shared"))  # fmt: skip
    write_distribution(tmp_path, "far", module="mod_far", source=good("far"), model_types=("far",))
    found = process(
        tmp_path,
        """
        scope = plugins.for_model_type("shared")
        show([[i.name for i, _ in scope.ask("qcore_detect", checkpoint=None)],
              "mod_far" in sys.modules, statuses()["far"][0], statuses()["a"][0],
              [o.plugin.name for o in plugins.for_model_type("nothing").records()]])
        """,
    )
    assert found == [["a", "b", "c"], False, "available", "loaded", []]


def test_describe_gives_owners_of_the_scope_and_refuses_one_name_twice(tmp_path: Path) -> None:
    write_distribution(
        tmp_path, "one", module="mod_one", source=good("kind"), model_types=("kind",)
    )
    vision = (
        "from qcore import hookimpl\nfrom qcore.api.records import Modality\n@hookimpl\n"
        "def qcore_describe():\n"
        "    some = dict(root='m.tower', kinds=('it',), build=print, reader=print)\n"
        "    yield Modality(name='image', section='eyes_config', architectures=('kind',), **some)\n"
        "    yield Modality(name='audio', section='ears_config', architectures=('no',), **some)\n"
    )
    write_distribution(tmp_path, "eyes", module="mod_eyes", source=vision, model_types=("kind",))
    code = """
        d = plugins.for_model_type("kind").describe()
        show([{k: o.plugin.name for k, o in getattr(d, what).items()}
              for what in ("architectures", "generations", "modalities")])
    """
    assert process(tmp_path, code) == [{"kind": "one"}, {"1": "one"}, {"image": "eyes"}]
    clash = good("kind").replace('Architecture(name="kind"', 'Architecture(name="kind2"')
    write_distribution(tmp_path, "two", module="mod_two", source=clash, model_types=("kind",))
    error = process(tmp_path, "show(error_of(lambda: plugins.for_model_type('kind').describe()))")
    assert error["code"] == "QC-PLUGIN-004"
    assert "generation '1' is brought twice" in error["message"]
    assert "plugin 'one' (one 1.0) and plugin 'two' (two 1.0)" in error["message"]


def test_every_hook_says_what_it_yields() -> None:
    hooks = [name for name in vars(hookspecs) if name.startswith("qcore_")]
    yields = {hook: _yields(hook) for hook in hooks}
    assert all(isinstance(kind, type) for kinds in yields.values() for kind in kinds)
    assert yields["qcore_describe"] == (Architecture, Generation, Modality)
    assert yields["qcore_detect"] == (Claim,)
    assert yields["qcore_parameters"] == (Part,)
    assert yields["qcore_chat_format"] == (ChatFormat,)
    assert yields["qcore_adapter_layouts"] == (AdapterClaim,)
