"""What README.md says, held against the code."""

import ast
import contextlib
import io
import re
from pathlib import Path

from dpo_jax import cli, config
from dpo_jax.losses.registry import OPTIONS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_library_example_runs_and_learns():
    code = re.search(r"<!-- test:library -->\n```python\n(.*?)```", README, re.DOTALL)
    assert code
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(code[1], {})
    loss, accuracy = map(float, printed.getvalue().split())
    assert loss < 0.1 and accuracy == 1


def test_table_of_fields_is_that_of_the_configuration():
    # Name, default and comment of every field, in the order of config.py.
    source = (ROOT / "dpo_jax" / "config.py").read_text()
    classes = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}

    def rows(name, prefix=""):
        for field in classes[name].body:
            if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
                continue
            if isinstance(field.annotation, ast.Name) and field.annotation.id in classes:
                yield from rows(field.annotation.id, f"{field.target.id}.")
                continue
            comment = source.splitlines()[field.lineno - 1].split("  # ", 1)[1].replace("|", "/")
            value = ast.unparse(field.value) if field.value else ""
            words = {"''": "empty", "None": "unset", "True": "true", "False": "false"}
            yield f"| `{prefix}{field.target.id}` | {words.get(value, value.strip(chr(39)))} | {comment} |"
        if name == "Loss":
            for option in OPTIONS.values():
                yield f"| `{prefix}{option.name}` | {option.default} | {option.help.replace('|', '/')} |"

    expected = list(rows("Config"))
    assert len(expected) == len(config.flat(config.Config()))
    found = README.split("| field | default | meaning |\n|---|---|---|\n")[1].split("\n\n")[0].splitlines()
    assert found == expected


def test_commands_are_those_of_the_program():
    assert set(re.findall(r"^\| `dpo-jax (\w+)` \|", README, re.MULTILINE)) == set(cli.COMMANDS)


def test_continuous_integration_finds_its_two_commands():
    for name in ("quickstart", "test"):
        block = re.search(rf"<!-- ci:{name} -->\n```bash\n(.+?)\n```", README)
        assert block and block[1].startswith("pip install -e ")
