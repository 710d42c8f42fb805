"""The command line: results on standard output, one line of error and status 2, nothing half-written."""

import importlib.machinery
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import dpo_jax
from dpo_jax import cli
from dpo_jax.config import Config, flat, to_json
from tests.support.fields_read import recorded as recorded_fields
from tests.support.runs import EVAL_PAIRS, make_config, make_inputs

RECIPE = """
from dpo_jax.config import base

def get_config(arg=""):
    config = base()
    config.data.max_length, config.data.max_prompt_length = 128, 64
    config.train.batch_pairs, config.train.steps = 8, 2
    config.optimizer.learning_rate = 1e-2
    return config
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = make_inputs(tmp_path_factory.mktemp("inputs"))
    (folder / "recipe.py").write_text(RECIPE)
    return folder


def arguments(inputs, *rest):
    data = (f"--config.data.{split}={inputs / split}.jsonl" for split in ("train", "eval"))
    return [f"--config={inputs / 'recipe.py'}", f"--config.model.path={inputs / 'model'}", *data, *rest]


def run(*argv):
    cli.main(["dpo-jax", *map(str, argv)])


def fails(capsys, *argv):
    with pytest.raises(SystemExit) as status:
        run(*argv)
    assert status.value.code == 2
    error = capsys.readouterr().err
    assert re.match(r"(dpo_jax .*\n)?error: ", error) and "Traceback" not in error
    return error


@pytest.fixture
def reads_what_it_shows(monkeypatch):
    """Runs a command and checks that it reads none of the fields that its help leaves out."""

    def run_recorded(name, *argv):
        with recorded_fields(monkeypatch) as read:
            run(name, *argv)
        unread = set(cli.COMMANDS[name].unread.split())
        assert read and not {each for each in read if {each, each.partition(".")[0]} & unread}

    return run_recorded


def test_train_evaluate_export_and_inspect_from_the_command_line(inputs, tmp_path, capsys, reads_what_it_shows):
    workdir = f"--workdir={tmp_path / 'run'}"
    reads_what_it_shows("inspect", *arguments(inputs, workdir, "--pairs=1"))
    shown = capsys.readouterr().out
    assert (
        "chosen, " in shown
        and "scored" in shown
        and "of them filled with tokens" in shown
        and not (tmp_path / "run").exists()
    )
    reads_what_it_shows("train", *arguments(inputs, workdir))
    capsys.readouterr()
    reads_what_it_shows("evaluate", workdir)
    assert json.loads(capsys.readouterr().out)["eval/pairs"] == EVAL_PAIRS
    reads_what_it_shows("export", workdir, f"--out={tmp_path / 'out'}")
    assert (tmp_path / "out" / "config.json").exists()


def test_evaluate_takes_any_model_without_a_run(inputs, capsys):
    importlib.import_module("dpo_jax.commands")  # or a line says that it is being loaded
    error = fails(capsys, "evaluate", f"--model={inputs / 'model'}")
    assert "config.data.eval: empty; expected pairs to evaluate on. Give them as --config.data.eval=FILE" in error
    assert "no such folder" in fails(capsys, "evaluate", "--model", "no/such", "--config.data.eval=x.jsonl")
    for flag, run_or_model in (("--reference=x", "--workdir=y"), ("--step=3", "--model=x")):
        argv = ["evaluate", flag, run_or_model, *arguments(inputs)]
        assert f"{flag.partition('=')[0]}: given" in fails(capsys, *argv)
    assert "--config: not given" in fails(capsys, "evaluate")


def test_data_that_make_an_epoch_by_their_weight_can_be_inspected(inputs, tmp_path, capsys):
    train = f"--config.data.train={inputs / 'train.jsonl'}*2"
    run("inspect", *arguments(inputs, train, "--config.train.batch_pairs=64", f"--workdir={tmp_path}"))
    assert "packing: 64 pairs per step" in capsys.readouterr().out


def test_inspect_of_supervised_fine_tuning_shows_and_counts_chosen_answers_alone(inputs, tmp_path, capsys):
    shown = []
    for loss in ("sft", "sigmoid"):
        run("inspect", *arguments(inputs, f"--config.loss.name={loss}", f"--workdir={tmp_path}"))
        shown.append(capsys.readouterr().out)
    padded = [int(re.findall(r"times the ([\d,]+) positions", text)[0].replace(",", "")) for text in shown]
    assert "rejected, " not in shown[0] and padded[0] < 0.6 * padded[1]


def inspected(inputs, tmp_path, capsys, rows, *options):
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    rest = (f"--config.data.train={data}", "--config.data.eval=", "--config.train.batch_pairs=2", "--pairs=2")
    run("inspect", *arguments(inputs, *rest, *options, f"--workdir={tmp_path}"))
    return capsys.readouterr().out


def test_inspect_escapes_what_terminals_act_on(inputs, tmp_path, capsys):
    rows = [{"prompt": "is ", "chosen": "\x1b[31mred\x9b", "rejected": "b\u202e", "\x1b[2J": 1}]
    shown = inspected(inputs, tmp_path, capsys, rows, "--config.train.batch_pairs=1")
    assert "\\x1b" in shown and "nothing reads: '\\x1b[2J'" in shown
    assert not {"\x1b", "\x9b", "\u202e"} & set(shown)


def test_inspect_shows_the_one_answer_of_an_unpaired_example(inputs, tmp_path, capsys):
    rows = [{"prompt": "a", "completion": each, "label": each == "b"} for each in ("b", "cd")]
    shown = inspected(inputs, tmp_path, capsys, rows, "--config.loss.name=apo_zero")
    first, second = (section.split("\n\n")[0] for section in shown.split("\n--- ")[1:])
    assert "chosen, 2 tokens, scored: " in first and "rejected, " not in first
    assert "rejected, 3 tokens, scored: " in second and "chosen, " not in second
    assert "chosen tokens: mean 2.0" in shown and "rejected tokens: mean 3.0" in shown


def test_inspect_shows_the_pairs_that_a_ranking_makes(inputs, tmp_path, capsys):
    rows = [{"prompt": "a", "responses": ["b", "c", "d"], "scores": [3, 1, 2]}]
    shown = inspected(inputs, tmp_path, capsys, rows, "--config.data.rankings=best")
    assert "2 pairs from 1 row" in shown and "read as ranked" in shown


def test_recipe_may_name_a_module_in_the_folder_it_is_called_from(inputs, tmp_path, monkeypatch):
    (tmp_path / "own_inputs.py").write_text("def make(workdir):\n    workdir.joinpath('made').mkdir(parents=True)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    run("inspect", *arguments(inputs, "--config.prepare=own_inputs:make", "--workdir=run"))
    assert (tmp_path / "run" / "made").exists()


def test_an_interrupt_before_there_is_a_state_ends_without_a_traceback(inputs, tmp_path, monkeypatch, capsys):
    (tmp_path / "interrupting.py").write_text("import signal\n\n\ndef make(_):\n    signal.raise_signal(2)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    with pytest.raises(SystemExit) as status:
        run("train", *arguments(inputs, "--config.prepare=interrupting:make", "--workdir=run"))
    error = capsys.readouterr().err
    assert status.value.code == 130 and "interrupted" in error and "Traceback" not in error


def test_the_folder_it_is_called_from_shadows_no_installed_module(tmp_path, monkeypatch):
    (tmp_path / "inspect.py").write_text("raise RuntimeError('the module of the standard library was meant')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", str(tmp_path), *sys.path])
    cli.find_modules_here()
    assert sys.path[-1] == "" and not {"", str(tmp_path)} & set(sys.path[:-1])
    spec = importlib.machinery.PathFinder.find_spec("inspect")
    assert spec is not None and spec.origin != str(tmp_path / "inspect.py")


@pytest.fixture
def recorded(inputs, tmp_path):
    """A config.json that names code."""

    def write(**fields):
        config = make_config(inputs, **{"data__eval": "", "train__steps": 1} | fields)
        (tmp_path / "config.json").write_text(to_json(config))
        return f"--config={tmp_path / 'config.json'}"

    return write


def test_code_that_a_config_json_names_is_not_called(recorded, tmp_path, capsys):
    keep = tmp_path / "run" / "keep"
    keep.mkdir(parents=True)
    named = recorded(prepare="shutil:rmtree", hooks="shutil:move")
    run("inspect", named, f"--workdir={tmp_path / 'run'}", "--pairs=0")
    error = capsys.readouterr().err
    assert keep.exists() and "shutil:rmtree, which config.json names, is not called" in error
    assert "shutil:move, which config.json names, is not called; give --config.hooks=shutil:move to" in error
    run("inspect", named, "--config.prepare=shutil:rmtree", f"--workdir={tmp_path / 'run'}", "--pairs=0")
    assert not keep.exists()  # named on the command line it is


def test_loss_of_ones_own_is_named_by_a_recipe_or_on_the_command_line(recorded, tmp_path, capsys):
    own = "tests.support.own_losses:margin"
    named = recorded(loss__name=own)
    error = fails(capsys, "inspect", named, f"--workdir={tmp_path / 'run'}", "--pairs=0")
    assert "names code, in a data file" in error and f"--config.loss.name={own}" in error
    run("inspect", named, f"--config.loss.name={own}", f"--workdir={tmp_path / 'run'}", "--pairs=0")


def test_plan_needs_no_model_path_where_it_has_an_architecture(tmp_path, capsys, reads_what_it_shows):
    recipe = tmp_path / "recipe.py"
    recipe.write_text("from dpo_jax.config import base\n\n\ndef get_config():\n    return base()\n")
    architecture = Path(__file__).parents[1] / "configs" / "architectures" / "pythia_2b8.json"
    argv = ["plan", f"--config={recipe}", f"--config.plan.architecture={architecture}", "--topology=h100:8"]
    reads_what_it_shows(*argv)
    assert capsys.readouterr().out.splitlines()[-1].startswith("fits:")
    error = fails(capsys, "train", *argv[1:3], f"--workdir={tmp_path / 'run'}")
    assert "config.model.path: empty" in error


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_of_a_command_lists_its_flags_and_fields_with_defaults(name, capsys, monkeypatch):
    width = 60 if name == "plan" else 100
    monkeypatch.setenv("COLUMNS", str(width))
    with pytest.raises(SystemExit) as status:
        run(name, "--config.loss.beta=1", "--help")
    shown = capsys.readouterr().out
    command, lines = cli.COMMANDS[name], shown.splitlines()
    assert status.value.code == 0 and lines[0].startswith(f"dpo-jax {name}: ") and max(map(len, lines)) < width
    unread = command.unread.split()
    values = {True: "true", False: "false"}
    for field, value in flat(Config()).items():
        listed = f"\n  {field}={values.get(value, value) if isinstance(value, bool) else value}" in shown
        assert listed == (field not in unread and field.partition(".")[0] not in unread), field
    assert all(f"\n  --{flag.name}" in shown for flag in command.flags)
    assert ("  --processes=N" in shown) == (not command.one_process)
    text = " ".join(shown.split())
    assert "temperature, > 0; unset: 0.1 (sigmoid_norm 5," in text and "docs/objectives.md says which loss" in text


def test_version_and_help_are_told_at_once(capsys):
    for argv, part in [
        (["--version"], f"dpo-jax {dpo_jax.__version__} (jax "),
        (["help", "export"], "dpo-jax export: "),
        (["--help", "export"], "dpo-jax export: "),
        (["help"], "COMMAND --help lists"),
    ]:
        with pytest.raises(SystemExit) as status:
            run(*argv)
        assert status.value.code == 0 and part in " ".join(capsys.readouterr().out.split())


def test_module_is_the_same_program():
    shown = subprocess.run([sys.executable, "-m", "dpo_jax", "--help"], capture_output=True, text=True, check=True)
    assert shown.stdout == cli.USAGE and all(f"  {name} " in cli.USAGE for name in cli.COMMANDS)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["tran"],
            "unknown command 'tran'; expected one of train, reference, evaluate, inspect, plan, export. Did you",
        ),
        (["train"], "--workdir: not given"),
        (["train", "--workdir=x"], "--config: not given"),
        (["train", "--config=no.py", "--workdir=x"], "no such file"),
        (["train", "--config=configs/hh.py", "--config.loss.bta=1", "--workdir=x"], "no field 'loss.bta'"),
        (["train", "--config=configs/hh.py", "--config.loss.beta=much", "--workdir=x"], "beta"),
        (["train", "--config=configs/hh.py", "--config.loss.beta=-1", "--workdir=x"], "config.loss.beta"),
        (["train", "configs/hh.py", "--workdir=x"], "unexpected 'configs/hh.py'"),
        (["evaluate", "--workdir=nowhere"], "no config.json"),
        (
            ["train", "--config=configs/hh.py", "--workdir=x", "--out=y"],
            "--out: no flag of this command, but of dpo-jax",
        ),
        (["export", "--config=configs/hh.py", "--workdir=x", "--pairs=1"], "--pairs: no flag of this command"),
        (["inspect", "--config=configs/hh.py", "--workdir=x", "--process=1"], "--process: no flag of this command"),
        (
            ["train", "--config=configs/hh.py", "--wrkdir=x"],
            "--wrkdir: no such flag",
        ),
    ],
)
def test_mistakes_are_one_line_and_status_two(capsys, monkeypatch, argv, message):
    monkeypatch.chdir(Path(__file__).parents[1])
    assert message in fails(capsys, *argv)
    assert not Path("x").exists() and not Path("nowhere").exists()


def test_bad_data_names_its_place_and_leaves_nothing(inputs, tmp_path, capsys):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": "a", "cho\n')
    argv = [*arguments(inputs), f"--config.data.train={tmp_path / 'bad.jsonl'}", f"--workdir={tmp_path / 'run'}"]
    error = fails(capsys, "train", *argv)
    assert "bad.jsonl:2" in error and not (tmp_path / "run").exists()
