"""The house is in order: what is public is documented, imports run one way, files stay readable."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import attrs
import msgspec
import pytest

import eventbus
from eventbus import errors
from tests.pages import ROOT, Section, blocks_of, first_cells, page

PACKAGE = ROOT / "eventbus"
PROTOCOL = ["stores.base", "stores.commands", "stores.queries", "stores.records"]
PUBLIC_MODULES = ["errors", "hooks", *PROTOCOL, "stores.sqlite", "stores.sqlite_inspect", "testing.conformance"]
MOST_LINES = 500

# ------------------------------------------------------------------ the public names


def _api() -> dict[str, Section]:
    """The headings of the API page that name something: `Name`, or `Name.method`."""
    sections = page("docs/reference/api.md").sections()
    return {s.title.strip("`"): s for s in sections if re.fullmatch(r"`[\w.]+`", s.title)}


def test_the_public_names_are_sorted() -> None:
    """A name is found, and a merge goes well."""
    assert list(eventbus.__all__) == sorted(eventbus.__all__)


def test_every_public_name_is_documented_and_nothing_else_is() -> None:
    """The API page and the errors page together list exactly what `eventbus` exports."""
    listed = {name for name in _api() if "." not in name}
    raised = set(first_cells(page("docs/reference/errors.md").text))
    assert not listed & raised
    assert listed | raised == set(eventbus.__all__)


def test_every_error_is_exported() -> None:
    """Whatever can be raised can be caught by a name of `eventbus`."""
    tree = {name for name, it in vars(errors).items() if inspect.isclass(it) and issubclass(it, errors.EventBusError)}
    assert tree <= set(eventbus.__all__)


def _public_methods(cls: type) -> dict[str, Any]:
    methods = {name: each for name, each in vars(cls).items() if not name.startswith("_")}
    return {name: each for name, each in methods.items() if inspect.isfunction(each)}


def _members() -> dict[str, Callable[..., Any]]:
    """The methods of the public classes that users call, by the name that the API page gives them."""
    found: dict[str, Callable[..., Any]] = {}
    for name in eventbus.__all__:
        it = getattr(eventbus, name)
        if inspect.isclass(it) and not issubclass(it, Exception):
            found |= {f"{name}.{method}": function for method, function in _public_methods(it).items()}
    letters = type(eventbus.EventBus(None).dead_letters)
    return found | {f"EventBus.dead_letters.{method}": function for method, function in _public_methods(letters).items()}


def test_every_public_method_is_documented_and_nothing_else_is() -> None:
    """Each method of a public class has its heading on the API page."""
    assert {name for name in _api() if "." in name} == set(_members())


def _stub(section: Section) -> ast.stmt:
    block = next(block for block in blocks_of(section.text) if block.info.startswith("python"))
    return ast.parse(block.text).body[0]


def _source(thing: Any) -> ast.stmt:
    return ast.parse(textwrap.dedent(inspect.getsource(thing))).body[0]


def _signature(function: ast.stmt, *, of_types: bool = False) -> str:
    """A signature in one spelling, without self. `of_types`: what comes before the options of `subscribe` is left out."""
    assert isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)), ast.unparse(function)
    arguments = function.args
    places = [*arguments.posonlyargs, *arguments.args]
    if places and places[0].arg == "self":
        (arguments.posonlyargs or arguments.args).pop(0)
    returned = "" if function.returns is None else ast.unparse(function.returns)
    if of_types:
        arguments.posonlyargs, arguments.args, arguments.defaults, arguments.vararg, returned = [], [], [], None, ""
    kind = "async def" if isinstance(function, ast.AsyncFunctionDef) else "def"
    return _numbers(f"{kind} {function.name}({ast.unparse(arguments)}) -> {returned}")


def _numbers(text: str) -> str:
    return re.sub(r"(?<=\d)_(?=\d)", "", text)


@pytest.mark.parametrize("name", sorted(_members()))
def test_the_signature_on_the_api_page_is_that_of_the_code(name: str) -> None:
    """Names, order, defaults and types of the parameters, and what is returned."""
    of_types = name == "EventBus.subscribe"
    documented = _signature(_stub(_api()[name]), of_types=of_types)
    assert documented == _signature(_source(_members()[name]), of_types=of_types)


@pytest.mark.parametrize("name", ["event", "headers"])
def test_the_signature_of_a_public_function_on_the_api_page_is_that_of_the_code(name: str) -> None:
    """The overloads' common form for `event`."""
    function = inspect.unwrap(getattr(eventbus, name))
    assert _signature(_stub(_api()[name])) == _signature(_source(function))


def _attributes(cls: type) -> dict[str, str]:
    """What a record is made of, as its class writes it: types, and defaults where there are some."""
    if not attrs.has(cls):  # a Struct of msgspec
        return {name: type for name, type in cls.__annotations__.items() if not name.startswith("_")}
    found = {}
    for field in attrs.fields(cls):
        if not field.name.startswith("_"):
            default = "" if field.default is attrs.NOTHING else f" = {field.default!r}"
            found[field.name] = f"{field.type}{default}"
    return found


def _is_record(thing: Any) -> bool:
    return attrs.has(thing) or (inspect.isclass(thing) and issubclass(thing, msgspec.Struct))


@pytest.mark.parametrize("name", [n for n in eventbus.__all__ if _is_record(getattr(eventbus, n))])
def test_the_fields_on_the_api_page_are_those_of_the_record(name: str) -> None:
    """All of them, in order, with types and defaults."""
    stub = _stub(_api()[name])
    assert isinstance(stub, ast.ClassDef)
    documented = {}
    for line in stub.body:
        if isinstance(line, ast.AnnAssign):
            default = "" if line.value is None else f" = {ast.unparse(line.value)}"
            documented[ast.unparse(line.target)] = f"{ast.unparse(line.annotation)}{default}"
    assert documented == _attributes(getattr(eventbus, name))
    assert list(documented) == list(_attributes(getattr(eventbus, name)))


def test_the_options_of_the_bus_on_the_api_page_are_those_of_the_code() -> None:
    """The constructor's signature."""
    stub = _stub(_api()["EventBus"])
    assert isinstance(stub, ast.ClassDef)
    assert _signature(stub.body[0]) == _signature(_source(eventbus.EventBus.__init__))


def _parameters(function: Callable[..., Any]) -> list[str]:
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.kind in kinds and p.name != "self"]


@pytest.mark.parametrize(
    ("title", "function"),
    [
        ("`EventBus(…)`", eventbus.EventBus.__init__),
        ("`bus.open(…)`", eventbus.EventBus.open),
        ("`bus.subscribe(…)`", eventbus.EventBus.subscribe),
        ("`bus.publish(…)`", eventbus.EventBus.publish),
        ("`RetryPolicy(…)`", eventbus.RetryPolicy),
    ],
)
def test_the_options_page_explains_every_option(title: str, function: Callable[..., Any]) -> None:
    """A row for each parameter, in order."""
    section = next(s for s in page("docs/reference/options.md").sections() if s.title == title)
    assert first_cells(section.text) == _parameters(function)


# ------------------------------------------------------------------ docstrings


def _own_docstring(thing: object) -> str:
    return (getattr(thing, "__dict__", {}).get("__doc__") or "") if inspect.isclass(thing) else (thing.__doc__ or "")


def _undocumented(name: str, thing: object) -> Iterator[str]:
    doc = _own_docstring(thing)
    if not doc.strip():
        yield name
    if inspect.isclass(thing):
        for member, each in vars(thing).items():
            function = each.fget if isinstance(each, property) else each
            described = re.search(rf"^ +.*\b{member}\b.*:", doc, re.MULTILINE) is not None  # among the class's attributes
            if not member.startswith("_") and inspect.isfunction(function) and not function.__doc__ and not described:
                yield f"{name}.{member}"


def test_every_public_name_has_a_docstring() -> None:
    """Every class, function, method and error that users meet says what it is."""
    things = {name: getattr(eventbus, name) for name in eventbus.__all__}
    things["DeadLetters"] = type(eventbus.EventBus(None).dead_letters)
    assert [missing for name, thing in things.items() for missing in _undocumented(name, thing)] == []


@pytest.mark.parametrize("name", PUBLIC_MODULES)
def test_every_name_of_a_public_module_has_a_docstring(name: str) -> None:
    """The modules that are not private are for those who write stores and hooks."""
    module = importlib.import_module(f"eventbus.{name}")
    things = {n: t for n, t in vars(module).items() if not n.startswith("_") and _is_from(module, t)}
    assert things
    assert [missing for each, thing in things.items() for missing in _undocumented(each, thing)] == []


def _is_from(module: ModuleType, thing: object) -> bool:
    return (inspect.isclass(thing) or inspect.isfunction(thing)) and thing.__module__ == module.__name__


# ------------------------------------------------------------------ the modules


@attrs.frozen
class Import:
    """An import of one module by another.

    Attributes:
        name: the module, or what follows from it where that is no module: `eventbus.errors`, `attrs`.
        names: what is taken from it.
        typing: only type checkers see it. lazy: it stands in a function.
    """

    name: str
    names: tuple[str, ...]
    typing: bool
    lazy: bool


def _module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {_module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def _imports_in(node: ast.AST, *, typing: bool, lazy: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ImportFrom):
            assert child.level == 0, "imports are absolute"
            modules = [a.name for a in child.names if f"{child.module}.{a.name}" in FILES]
            yield from (Import(f"{child.module}.{name}", (), typing, lazy) for name in modules)
            others = tuple(a.name for a in child.names if a.name not in modules)
            if others:
                yield Import(child.module or "", others, typing, lazy)
        elif isinstance(child, ast.Import):
            yield from (Import(a.name, (), typing, lazy) for a in child.names)
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            yield from _imports_in(child, typing=True, lazy=lazy)
        else:
            inside = lazy or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef))
            yield from _imports_in(child, typing=typing, lazy=inside)


@functools.cache
def _imports(module: str) -> tuple[Import, ...]:
    return tuple(_imports_in(ast.parse(FILES[module].read_text(encoding="utf-8")), typing=False, lazy=False))


def _ours(module: str, *, at_run_time: bool = True) -> set[str]:
    """The modules of eventbus that this one imports; lazy imports are run-time imports, too."""
    return {each.name for each in _imports(module) if each.name in FILES and not (at_run_time and each.typing)}


def test_no_module_imports_itself_by_way_of_others() -> None:
    """At run time there is no cycle, not even a lazy one."""
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " → ".join([*way[way.index(module) :], module])
        if module not in done:
            for each in sorted(_ours(module)):
                visit(each, (*way, module))
            done.add(module)

    for module in FILES:
        visit(module, ())


def test_the_words_of_the_house_stand_lowest() -> None:
    """Errors, records, hooks, time and the Store protocol need nothing else of eventbus."""
    protocol = {f"eventbus.{module}" for module in PROTOCOL}
    for module in ("errors", "_model", "hooks", "_clock"):
        assert _ours(f"eventbus.{module}") == set(), module
    for module in protocol:
        assert _ours(module) <= protocol, module


def test_nothing_below_imports_the_bus() -> None:
    """Not for types either: a delivery holds a narrow protocol."""
    users = {module for module in FILES if "eventbus._bus" in _ours(module, at_run_time=False)}
    assert users == {"eventbus"}


def test_nothing_in_the_library_imports_the_package_itself() -> None:
    """Only commands, which are programs like those of users, import from `eventbus` as users do."""
    users = {module for module in FILES if "eventbus" in _ours(module, at_run_time=False)}
    assert {module for module in users if not module.startswith("eventbus.cli")} == set()


def test_a_store_knows_nothing_of_the_bus() -> None:
    """Stores are built on the protocol and the errors alone, so that others can be written."""
    for module in FILES:
        if module.startswith("eventbus.stores"):
            strangers = {m for m in _ours(module) if not m.startswith("eventbus.stores") and m != "eventbus.errors"}
            assert strangers == set(), module


def test_the_bus_knows_no_store() -> None:
    """The parts between the bus and the store know the protocol; one place turns a path into a SQLite store, and one command looks
    at its file."""
    stores = {module for module in FILES if module.startswith("eventbus.stores.")} - {f"eventbus.{m}" for m in PROTOCOL}
    users = {module for module in FILES if not module.startswith("eventbus.stores") and stores & _ours(module, at_run_time=False)}
    assert {user for user in users if not user.startswith("eventbus.cli.doctor")} <= {"eventbus._options"}


def test_nothing_imports_commands_tests_or_integrations() -> None:
    """They hang on the library, never the other way round."""
    hanging = ("eventbus.cli", "eventbus.testing", "eventbus.integrations", "eventbus.pytest_plugin")
    for module in FILES:
        if not module.startswith((*hanging, "eventbus.__main__")):
            assert [m for m in _ours(module, at_run_time=False) if m.startswith(hanging)] == [], module


def test_private_names_stay_in_their_module() -> None:
    """An underscore means private: no module takes such a name from another."""
    taken = [
        f"{module}: {each.name}.{name}"
        for module in FILES
        for each in _imports(module)
        if each.name.startswith("eventbus")
        for name in each.names
        if name.startswith("_")
    ]
    assert taken == []


def test_private_modules_stay_in_their_folder() -> None:
    """What begins with an underscore inside a package of ours is imported by that package alone."""
    for module in FILES:
        for other in _ours(module, at_run_time=False):
            folder, _, name = other.rpartition(".")
            if name.startswith("_"):
                assert module == folder or module.startswith(f"{folder}."), f"{module} imports {other}"


def test_examples_and_documentation_use_public_names_only() -> None:
    """What a reader copies keeps working."""
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "examples").rglob("*.py")]
    texts += [path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]]
    assert [found for text in texts for found in re.findall(r"^ *(?:from|import) eventbus\S*\._\w+", text, re.MULTILINE)] == []


LAZY = ["sqlite_utils", "trio", "pydantic", "pytest", "hypothesis"]


def test_importing_eventbus_imports_nothing_that_is_optional_or_slow() -> None:
    """Not sqlite-utils (0.2 s), not trio, not pydantic, nothing of an extra."""
    program = f"import sys, eventbus; print([m for m in {LAZY!r} if m in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=50, check=True)
    assert ran.stdout == "[]\n"


@pytest.mark.parametrize("module", FILES)
def test_a_file_can_be_read_in_one_go(module: str) -> None:
    """No file of the package is longer than 500 lines."""
    lines = FILES[module].read_text(encoding="utf-8").count("\n")
    assert lines <= MOST_LINES


@pytest.mark.parametrize("module", [m for m, path in FILES.items() if path.stat().st_size])
def test_a_file_says_what_it_is(module: str) -> None:
    """Open any file: its first lines say where it stands."""
    docstring = ast.get_docstring(ast.parse(FILES[module].read_text(encoding="utf-8")))
    assert docstring
