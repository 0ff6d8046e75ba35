"""The digest that decides what reruns."""

import shutil

import pytest

from scripts.common import code_digests


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A small project: a script that imports a helper, which imports another."""
    (tmp_path / "scripts" / "common").mkdir(parents=True)
    (tmp_path / "scripts" / "stage").mkdir()
    (tmp_path / "envs").mkdir()
    for name in ("light", "torch"):
        shutil.copy(code_digests.ROOT / "envs" / f"{name}.yaml", tmp_path / "envs")
    (tmp_path / "scripts" / "common" / "deep.py").write_text("VALUE = 1\n")
    (tmp_path / "scripts" / "common" / "helper.py").write_text(
        "from scripts.common.deep import VALUE\n"
    )
    (tmp_path / "scripts" / "stage" / "work.py").write_text(
        '"""What it does."""\n\n\ndef main():\n    from scripts.common import helper\n\n'
        "    return helper.VALUE  # why\n"
    )
    (tmp_path / "scripts" / "stage" / "other.py").write_text("import json\n")
    monkeypatch.setattr(code_digests, "ROOT", tmp_path)
    return tmp_path


def of(project, script="work"):
    for function in (
        code_digests._read,
        code_digests._module_files,
        code_digests._pins,
        code_digests.imported_modules,
        code_digests.module_digests,
    ):
        function.cache_clear()
    return code_digests.code_digest(project / "scripts" / "stage" / f"{script}.py")


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_comments_docstrings_layout_and_a_touch_do_not_count(project):
    before = of(project)
    script = project / "scripts" / "stage" / "work.py"
    edit(script, "What it does.", "What it does, in other words.")
    edit(script, "  # why", "")
    edit(script, "\n\n\ndef", "\n\n# A comment\n\n\ndef")
    assert of(project) == before
    before = of(project)
    (project / "scripts" / "stage" / "work.py").touch()
    assert of(project) == before


def test_a_c_source_counts_where_a_module_compiles_it(project):
    (project / "scripts" / "native").mkdir()
    (project / "scripts" / "native" / "replay.c").write_text("int value = 1;\n")
    (project / "scripts" / "native_library.py").write_text("SOURCES = 'native'\n")
    edit(
        project / "scripts" / "common" / "deep.py",
        "VALUE = 1",
        "from scripts import native_library\nVALUE = 1",
    )
    before, other = of(project), of(project, "other")
    edit(project / "scripts" / "native" / "replay.c", "1", "2")
    assert of(project) != before
    assert of(project, "other") == other


@pytest.mark.parametrize("module", ["common/deep.py", "common/helper.py"])
def test_a_changed_helper_counts_where_it_is_imported_and_nowhere_else(project, module):
    before, other = of(project), of(project, "other")
    path = project / "scripts" / module
    path.write_text(path.read_text() + "ANOTHER = 2\n")
    assert of(project) != before
    assert of(project, "other") == other


@pytest.mark.parametrize(
    "imports", ["from scripts.stage.parts import VALUE", "import scripts.stage.parts.one"]
)
@pytest.mark.parametrize("module", ["__init__", "one", "two"])
def test_a_changed_module_of_a_package_counts_where_the_package_is_imported(
    project, imports, module
):
    package = project / "scripts" / "stage" / "parts"
    package.mkdir()
    (package / "__init__.py").write_text(
        "from scripts.stage.parts import one, two\n\nVALUE = one.VALUE + two.VALUE\n"
    )
    for name in ("one", "two"):
        (package / f"{name}.py").write_text("VALUE = 1\n")
    (project / "scripts" / "stage" / "work.py").write_text(f"{imports}\n")
    before, other = of(project), of(project, "other")
    path = package / f"{module}.py"
    path.write_text(path.read_text() + "ANOTHER = 2\n")
    assert of(project) != before
    assert of(project, "other") == other


def test_a_changed_pin_counts_and_a_comment_beside_it_does_not(project):
    before = of(project)
    environment = project / "envs" / "light.yaml"
    environment.write_text("# a comment\n" + environment.read_text())
    assert of(project) == before
    edit(environment, "jinja2==", "jinja2==0.")
    assert of(project) != before


def test_the_environment_follows_from_the_imports(project):
    script = project / "scripts" / "stage" / "other.py"
    assert code_digests.environment_of(script) == "light"
    script.write_text("def main():\n    import torch\n")
    code_digests._read.cache_clear()
    code_digests.imported_modules.cache_clear()
    assert code_digests.environment_of(script) == "torch"


def test_digest_of_a_mapping_ignores_the_order_of_keys_but_not_the_keys():
    assert code_digests.digest({"rank": 8, "alpha": 16}) == code_digests.digest(
        {"alpha": 16, "rank": 8}
    )
    assert code_digests.digest({"rank": 8, "alpha": 16}) != code_digests.digest(
        {"rank": 16, "alpha": 8}
    )
