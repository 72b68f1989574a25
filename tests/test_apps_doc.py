"""docs/apps.md says what the apps say of themselves, and they name each of their options."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOC = ROOT / "docs" / "apps.md"
APPS = {path.stem: path for path in sorted((ROOT / "apps").glob("*.py")) if path.read_text().startswith('"""NAME\n')}


@pytest.fixture(scope="module")
def writer() -> ModuleType:
    spec = importlib.util.spec_from_file_location("apps_doc", ROOT / "tools" / "apps_doc.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def options(path: Path) -> list[str]:
    """What its parser takes and its --help shows."""
    calls = [node for node in ast.walk(ast.parse(path.read_text()))
             if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".add_argument")]
    return [call.args[0].value for call in calls if "argparse.SUPPRESS" not in ast.unparse(call)]


def test_the_page_is_what_the_apps_say_now(writer):
    assert DOC.read_text() == writer.written(ROOT / "apps"), "python tools/apps_doc.py writes docs/apps.md anew"


def test_an_app_that_says_nothing_of_itself_is_refused(writer, tmp_path):
    (tmp_path / "silent.py").write_text('"""NAME\n    silent.py: nothing\n"""\n')
    with pytest.raises(ValueError, match=r"silent\.py doesn't begin with"):
        writer.written(tmp_path)


def test_lists_and_formulas_of_a_docstring_are_those_of_the_page(writer):
    assert writer._plain("a:\n  - b <- c\n    goes on\nd\n\n    x * y\n") == (
        "a:\n\n  - b \\<- c\n    goes on\n\nd\n\n    x * y")


@pytest.mark.parametrize("name", APPS)
def test_each_app_names_its_options(name):
    said = ast.get_docstring(ast.parse(APPS[name].read_text()))
    of_all = options(ROOT / "apps" / "common.py")
    assert [option for option in options(APPS[name]) if option not in of_all and option not in said] == []


def test_the_options_that_all_have_are_named_once():
    opening = DOC.read_text().partition("\n| app |")[0]
    assert [option for option in options(ROOT / "apps" / "common.py") if option != "--mode"
            and f"`{option}" not in opening] == []
