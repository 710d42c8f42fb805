"""README.md and the pages of docs/ agree with the code."""

import ast
import contextlib
import io
import re
from pathlib import Path

import pytest

from docs import draw_pipeline, make_configuration
from dpo_jax import cli, config
from dpo_jax.losses.registry import COLUMNS, OPTIONS
from dpo_jax.types import Batch
from tests.support.runs import make_inputs

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [
    "README.md",
    *(f"docs/{each}.md" for each in ("architecture", "performance", "scaling", "hosts", "adapters", "from_trl")),
]
FIELDS = config.flat(config.Config())
NOT_FIELDS = {"data.batches", "per_device_train_batch_size"}  # a module, and an option of TRL
MADE_BY_RUNS = {"reference/", "checkpoints/", "export/", "sft/"}  # folders of a working folder


def test_a_newcomer_can_read_it_all():
    assert len(README.splitlines()) <= 180
    drawn = (ROOT / "docs" / "pipeline.svg").read_text()
    assert drawn == draw_pipeline.render(), "stale: run python -m docs.draw_pipeline"
    assert "](docs/pipeline.svg)" in README and README.count("![") == 1


def test_library_example_runs_and_learns():
    code = re.search(r"<!-- test:library -->\n```python\n(.*?)```", README, re.DOTALL)
    assert code
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(code[1], {})
    loss, accuracy = map(float, printed.getvalue().split())
    assert loss < 0.1 and accuracy == 1


@pytest.mark.slow
def test_blocks_of_the_python_page_run(tmp_path):
    page = (ROOT / "docs" / "python.md").read_text()
    names = {"model_folder": make_inputs(tmp_path) / "model"}
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", page, re.DOTALL)):
        exec(compile(code, f"docs/python.md, block {number}", "exec"), names)


def test_python_page_names_every_input_of_a_step():
    page = (ROOT / "docs" / "python.md").read_text()
    fields = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", page, re.MULTILINE)
    assert set(re.findall(r"\w+", " ".join(fields))) == set(Batch._fields)
    assert all(f"`{name}`" in page for name in COLUMNS) and "`losses.GIVEN`" in page


def test_reference_of_fields_is_that_of_the_configuration():
    # Default and comment of every field, read from the text of config.py without the generator.
    text = (ROOT / "docs" / "configuration.md").read_text()
    assert text == make_configuration.render(), "stale: run python -m docs.make_configuration"
    rows = {row[1]: row[0] for row in re.finditer(r"^\| `([a-z_0-9.]+)` \|.*$", text, re.MULTILINE)}
    assert list(rows) == [name for name in documented_order() if name in rows] and set(rows) == set(FIELDS)
    source = (ROOT / "dpo_jax" / "config.py").read_text()
    sections = {type(value).__name__: name for name, value in vars(config.Config()).items()}
    for node in ast.parse(source).body:
        if not isinstance(node, ast.ClassDef) or node.name not in (*sections, "Config"):
            continue
        for field in node.body:
            if isinstance(field, ast.AnnAssign) and ast.unparse(field.annotation) not in sections:
                prefix = "" if node.name == "Config" else f"{sections[node.name]}."
                comment = source.splitlines()[field.lineno - 1].split("  # ", 1)[1]
                assert rows[f"{prefix}{ast.unparse(field.target)}"].endswith(f" | {comment.replace(' | ', ' / ')} |")
    for name, option in OPTIONS.items():
        assert rows[f"loss.{name}"].endswith(f" | {option.help.replace(' | ', ' / ')} |")


def documented_order():
    """Fields outside of sections first, then section by section in the order of config.py."""
    return sorted(FIELDS, key=lambda name: "." in name)


@pytest.mark.parametrize("page", PAGES)
def test_fields_that_a_page_names_exist(page):
    text = (ROOT / page).read_text()
    named = re.findall(r"--config\.([a-z_0-9.]+)=", text)
    sections = {name.partition(".")[0] for name in FIELDS if "." in name}
    dotted = re.findall(r"`([a-z_]+\.[a-z_0-9]+)(?:=[^`]*)?`", text)
    files = (".py", ".md", ".jsonl")
    named += [name for name in dotted if name.partition(".")[0] in sections and not name.endswith(files)]
    assert named and set(named) <= {*FIELDS, *NOT_FIELDS}


def test_remedies_of_errors_name_fields_as_they_are_typed():
    fields, found = "|".join(re.escape(name) for name in FIELDS if "." in name), []
    for path in sorted((ROOT / "dpo_jax").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            named = node.arg if isinstance(node, ast.keyword) else ""
            named = ast.unparse(node.targets[0]) if isinstance(node, ast.Assign) else named
            for part in ast.walk(node) if named == "remedy" else ():
                if isinstance(part, ast.Constant) and isinstance(part.value, str):
                    text = part.value.replace("--config.", "--")
                    names = re.findall(rf"(?<![-\w/.])(?:config\.)?(?:{fields})\b", text)
                    found += [f"{path.name}:{part.lineno}: {name}" for name in names]
    assert found == []


def test_short_list_of_fields_has_their_defaults():
    table = README.split("### Fields\n")[1].split("\n#")[0]
    rows = re.findall(r"^\| `([a-z_]+\.[a-z_]+)` \| ([^|]+) \|", table, re.MULTILINE)
    written = {None: "*unset*", "": "*empty*"}
    assert 8 <= len(rows) <= 15
    assert rows == [(name, written.get(FIELDS[name], f"`{FIELDS[name]}`")) for name, _ in rows]


@pytest.mark.parametrize("page", ["README.md", "CHANGELOG.md", *sorted(p.name for p in (ROOT / "docs").glob("*.md"))])
def test_links_of_a_page_lead_somewhere(page):
    path = ROOT / page if (ROOT / page).exists() else ROOT / "docs" / page
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        file, _, anchor = target.partition("#")
        if "://" in file:
            continue
        linked = (path.parent / file) if file else path
        assert linked.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.+)$", linked.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^a-z0-9 _-]", "", title.lower()).replace(" ", "-") for title in titles}, target


@pytest.mark.parametrize("page", PAGES)
def test_modules_that_a_page_names_exist(page):
    text = (ROOT / page).read_text()
    for name in re.findall(r"`((?:[a-z_]+/)+(?:[a-z_0-9]+\.(?:py|md|sh))?)`", text):
        assert any((ROOT / folder / name).exists() for folder in (".", "dpo_jax")) or name in MADE_BY_RUNS, name


def test_commands_are_those_of_the_program():
    assert set(re.findall(r"^\| `dpo-jax (\w+)` \|", README, re.MULTILINE)) == set(cli.COMMANDS)


def test_continuous_integration_finds_its_two_commands():
    for name in ("quickstart", "test"):
        block = re.search(rf"<!-- ci:{name} -->\n```bash\n(.+?)\n```", README)
        assert block and block[1].startswith("pip install -e ")
