"""docs/objectives.md, checked against the losses: sections, options with defaults, tables, sources, numbers, figure."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from docs import plot_objectives, tables
from dpo_jax import config
from dpo_jax.losses import LOSSES, REFERENCE_FREE, REGISTRY, make_loss, options_of
from dpo_jax.losses.objective import Objective
from dpo_jax.losses.registry import MODIFIERS, arguments, as_text
from dpo_jax.types import InputError

ROOT = Path(__file__).parents[1]
GUIDE = (ROOT / "docs" / "objectives.md").read_text()
SECTIONS = dict(re.findall(r"^### `(\w+)`\n(.*?)(?=^##)", GUIDE, re.MULTILINE | re.DOTALL))
FIELDS = {field.name for field in dataclasses.fields(config.Loss)} - {"name"}


def table_of_options():
    """(option, loss or what the table says instead) to its default, as text."""
    lines = GUIDE.split("| option | losses | default | range |\n|---|---|---|---|\n")[1].split("\n\n")[0].splitlines()
    found = {}
    for line in lines:
        option, losses, default, _ = (cell.strip() for cell in line.strip("|").split(" | "))
        for loss in re.findall(r"`(\w+)`", losses) if losses.startswith("`") else [losses]:
            found[option.strip("`"), loss] = default
    return found


def said_of(name):
    """A loss's section in one line."""
    return " ".join(SECTIONS[name].split())


def test_every_loss_has_a_section_with_its_formula_and_source():
    assert SECTIONS.keys() == LOSSES.keys()
    for name, text in SECTIONS.items():
        assert re.search(r"^    \S", text, re.MULTILINE), f"{name}: no formula"
        assert "arXiv:" in text or name == "sft", f"{name}: no source"
        assert "Watch" in text, f"{name}: nothing to watch"


@pytest.mark.parametrize("name", LOSSES)
def test_section_has_every_option_with_its_default(name):
    for option, default in options_of(LOSSES[name]).items():
        assert re.search(rf"`{option}` {re.escape(as_text(default))}(?![\w.]*\d)", said_of(name)), option
    assert ("Takes unpaired" in said_of(name) or "single answers" in said_of(name)) == (
        "unpaired" in REGISTRY[name].kinds and name != "sft"
    )


def test_table_has_every_option_of_every_loss_with_its_default():
    expected = {
        (option, name): as_text(default)
        for name, loss in LOSSES.items()
        for option, default in options_of(loss).items()
    }
    found = {key: default for key, default in table_of_options().items() if key[1] in LOSSES}
    own = {
        key: default for key, default in found.items() if key[0] not in MODIFIERS.keys() - {"nll_weight", "nll_average"}
    }
    kept = {("kl_tokens", name): "32" for name, loss in LOSSES.items() if "sequence_kl" in arguments(loss)}
    assert {key: value for key, value in own.items() if key[0] != "kl_tokens"} == expected
    assert {key: value for key, value in found.items() if key[0] == "kl_tokens"} == kept


def test_table_has_what_combines_with_which_losses():
    table = table_of_options()
    for option in ("divergence", "divergence_alpha", "ld_alpha", "wpo"):
        for name in LOSSES:
            beside = {"divergence": "alpha_divergence"} if option == "divergence_alpha" else {}
            value = {"divergence": "forward_kl", "wpo": True}.get(option, 0.3)
            try:
                make_loss(name, beside | {option: value})
            except InputError:
                assert (option, name) not in table
            else:
                assert (option, name) in table
    for option in MODIFIERS:
        shown = {default for (each, loss), default in table.items() if each == option and loss not in ("cpo", "orpo")}
        assert shown == {as_text(getattr(Objective, option))}


def test_all_fields_are_there():
    assert {option for option, _ in table_of_options()} == FIELDS
    reference = config.Reference()
    assert f"`reference.mixup_alpha` {as_text(reference.mixup_alpha)}" in " ".join(GUIDE.split())
    assert f"`reference.sync_steps` {as_text(reference.sync_steps)}" in " ".join(GUIDE.split())


@pytest.mark.parametrize("path", tables.PATHS, ids=lambda path: path.name)
def test_tables_are_those_of_the_registry(path):
    text = path.read_text()
    assert tables.with_tables(text) == text, "run python -m docs.tables"
    assert re.findall(r"^<!-- table: (\w+) -->$", text, re.MULTILINE)


def test_every_table_is_in_a_document():
    documents = "".join(path.read_text() for path in tables.PATHS)
    assert sorted(re.findall(r"<!-- table: (\w+) -->", documents)) == sorted(tables.TABLES)
    assert tables.with_tables("<!-- table: kinds -->\nold\n<!-- end -->\n").count("| unpaired |") == 1


def test_every_source_is_named():
    text = "".join(path.read_text() for path in (ROOT / "dpo_jax" / "losses").glob("*.py"))
    cited = set(re.findall(r"\b(\d{4}\.\d{5})\b", text))
    assert cited and not {paper for paper in cited if f"arXiv:{paper}" not in GUIDE}


@pytest.mark.parametrize("name", sorted(LOSSES.keys() - REFERENCE_FREE))
def test_loss_starts_where_the_guide_says(name):
    said = re.search(r"^Starts at ([\d.]*\d)", SECTIONS[name], re.MULTILINE)
    assert said
    objective, logps = make_loss(name, {}), jnp.array([[-20.0, -30.0]])
    known = {"present": jnp.ones(1, bool), "kl": 0.0, "running": objective.start(), "sequence_kl": jnp.zeros((1, 2))}
    given = {need: known[need] for need in objective.needs}
    found = objective(logps, logps, lengths=jnp.array([[4, 6]]), **given)[0]
    assert float(found) == pytest.approx(float(said[1]), rel=1e-4)


def test_kinds_of_data_are_those_that_losses_take():
    rows = GUIDE.split("| kind | columns | losses |")[1].split("\n\n")[0].splitlines()
    losses = {cells[1].strip(): set(re.findall(r"`(\w+)`", cells[3])) for row in rows if (cells := row.split("|"))[3:]}
    for kind, name in (("ranked", "rankings"), ("unpaired", "unpaired")):
        assert losses[name] == {loss for loss in LOSSES if kind in make_loss(loss, {}).kinds}


def test_losses_that_see_the_whole_batch_are_those_that_cost_a_pass():
    row = next(line for line in GUIDE.splitlines() if "several microbatches" in line)
    seeing = {name for name in LOSSES if make_loss(name, {}).needs & {"present", "running"}}
    assert set(re.findall(r"`(\w+)`", row)) == seeing


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!https:)([^)#]+)\)", GUIDE):
        assert (ROOT / "docs" / target).exists(), target
    headings = re.findall(r"^#+ (.*)$", GUIDE, re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}
    assert {anchor for anchor in re.findall(r"\]\(#([^)]+)\)", GUIDE)} <= anchors


# --- the figure ------------------------------------------------------------------------------------------------------


def drawn(path):
    return set(re.findall(r'<g id="panel-\d+-(\w+)">', path.read_text()))


def test_figure_is_there_with_every_loss():
    assert "(objectives.svg)" in GUIDE
    assert drawn(plot_objectives.OUT) == LOSSES.keys()
    assert "dc:date" not in plot_objectives.OUT.read_text()


# Losses whose slope jumps, and beta_dpo, whose beta follows the margin and is held.
KINKED = {"hinge", "dpo_positive", "beta_dpo"}


def test_slopes_of_the_figure_are_those_of_its_curves():
    for panel in plot_objectives.PANELS:
        if panel.loss in KINKED:
            continue
        margin, loss, slope, _ = (np.asarray(each, np.float64) for each in plot_objectives.curves_of(panel))
        span = np.abs(slope).max()
        found = (loss[2:] - loss[:-2]) / (margin[2:] - margin[:-2])
        np.testing.assert_allclose(found, slope[1:-1], atol=0.05 * span, err_msg=panel.loss)


def test_figure_is_drawn_the_same_each_time(tmp_path, monkeypatch):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    from matplotlib import pyplot

    few = tuple(panel for panel in plot_objectives.PANELS if panel.loss in ("sigmoid", "kto"))
    monkeypatch.setattr(plot_objectives, "PANELS", few)
    for name in ("a.svg", "b.svg"):
        with pyplot.rc_context(plot_objectives.STYLE):
            plot_objectives.draw(pyplot, tmp_path / name)
        jax.clear_caches()
    assert drawn(tmp_path / "a.svg") == {"sigmoid", "kto"}
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_every_loss_has_a_panel():
    assert {panel.loss for panel in plot_objectives.PANELS} == LOSSES.keys()


@pytest.mark.slow
def test_script_draws_the_figure(tmp_path):
    pytest.importorskip("matplotlib")
    command = [sys.executable, "-m", "docs.plot_objectives", f"--out={tmp_path}/figure.svg"]
    subprocess.run(command, cwd=ROOT, check=True)
    assert drawn(tmp_path / "figure.svg") == LOSSES.keys()
