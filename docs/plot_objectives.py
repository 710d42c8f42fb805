"""Draws every loss and its slope into docs/objectives.svg; matplotlib comes with the `bench` extra.

    python -m docs.plot_objectives [--out=docs/objectives.svg]

Each panel is one loss with its defaults, for one pair: the loss against the margin, and the slope that training uses,
along the line on which the panel's pairs are. Inputs without gradient are constant for the slope, so it need not be
that of the drawn curve (beta_dpo). Where the slopes of the two answers differ, both are drawn too.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from dpo_jax.losses import LOSSES, f_scores, options_of
from dpo_jax.losses.modifiers import DIVERGENCES

OUT = Path(__file__).with_name("objectives.svg")
COLUMNS, POINTS = 4, 241
LOSS, SLOPE, CHOSEN, REJECTED = "#1f5fa8", "#d1491b", "#2e8b57", "#8a5fb0"
TOKENS = 20  # of each answer, where a loss asks for their number and reads sums
STYLE: Any = {
    "svg.hashsalt": "objectives",  # or each run gives other ids
    "path.simplify_threshold": 0.5,
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.linewidth": 0.6,
    "lines.linewidth": 1.6,
}


def apart(h: Array) -> Array:
    """Returns log-probs of a pair whose log-ratios are a = h/2 and b = -h/2, the reference 0."""
    return jnp.stack([h / 2, -h / 2])[None]


class Panel(NamedTuple):
    """A loss, and the line on which its pairs are."""

    loss: str
    note: str = ""  # what the panel shows besides the defaults
    reach: float = 20.0  # the margin goes from -reach to reach, in nats
    place: Callable[[Array], Array] = apart  # from a margin to log-probs of the policy [1, K]
    lengths: tuple[int, ...] = (1, 1)
    given: Mapping[str, Array | float] = MappingProxyType({})
    per_token: bool = False  # whether the margin is one of log-probs per token


def panel_of_likelihood(loss: str, note: str = "") -> Panel:
    """Returns a panel for a loss that reads the policy's own log-probs: -2 nats a token where the margin is 0."""
    return Panel(loss, note, place=lambda h: apart(h) - 2.0 * TOKENS, lengths=(TOKENS, TOKENS))


def three(h: Array) -> Array:
    """Returns log-probs of a ranking of three answers, the second halfway."""
    return jnp.stack([h / 2, jnp.zeros_like(h), -h / 2])[None]


_PANELS = (
    Panel("sigmoid"),
    Panel("sigmoid", "label_smoothing 0.1", given={"label_smoothing": 0.1}),
    Panel("robust", "label_smoothing 0.1"),
    Panel("exo_pair"),
    Panel("hinge"),
    Panel("discopop"),
    Panel("beta_dpo", "one pair, M = 0"),
    Panel("aot", "one pair"),
    Panel("aot_unpaired", "one pair"),
    Panel("plackett_luce", "three answers", place=three, lengths=(1, 1, 1)),
    Panel("tdpo1", "D_l - D_w = 5 nats", given={"sequence_kl": jnp.array([[0.0, 5.0]])}),
    Panel("tdpo2", "D_l - D_w = 5 nats", given={"sequence_kl": jnp.array([[0.0, 5.0]])}),
    Panel("ipo", reach=10.0, per_token=True),
    Panel("sigmoid_norm", reach=3.0, per_token=True),
    Panel("sppo_hard"),
    Panel("dpo_positive"),
    Panel("nca_pair"),
    Panel("bco_pair", "d = 0"),
    Panel("apo_zero"),
    Panel("apo_down"),
    Panel("kto", "z = 0", given={"kl": 0.0}),
    Panel("simpo", reach=3.0, per_token=True),
    panel_of_likelihood("cpo"),
    Panel("orpo", reach=3.0, place=lambda h: apart(h) - 2.0, per_token=True),
    panel_of_likelihood("sft"),
)
# A loss that has no panel above is drawn as it is by default.
PANELS = (*_PANELS, *(Panel(name) for name in LOSSES if name not in {panel.loss for panel in _PANELS}))


class Curves(NamedTuple):
    """A loss over margins, and its slopes."""

    margin: np.ndarray
    loss: np.ndarray
    slope: np.ndarray  # d loss / d margin
    pushes: np.ndarray  # [n, 2]: d loss / d log-prob of the first answer, and -d loss / d that of the last


def curves_of(panel: Panel) -> Curves:
    """Evaluates a panel, one pair at a time: a loss that reads the whole batch gets batches of one pair."""
    loss_fn, lengths = LOSSES[panel.loss], jnp.array([panel.lengths])

    def loss(policy: Array) -> Array:
        return loss_fn(policy, jnp.zeros_like(policy), lengths=lengths, **panel.given)[0]

    def one(h: Array) -> tuple[Array, Array, Array]:
        policy, direction = jax.jvp(panel.place, (h,), (jnp.ones_like(h),))
        grads = jax.grad(loss)(policy)
        return loss(policy), (grads * direction).sum(), jnp.stack([grads[0, 0], -grads[0, -1]])

    margin = jnp.linspace(-panel.reach, panel.reach, POINTS)
    return Curves(*map(np.asarray, (margin, *jax.jit(jax.vmap(one))(margin))))


def title_of(panel: Panel) -> str:
    """Returns the loss, its beta, and the panel's note."""
    beta = options_of(LOSSES[panel.loss]).get("beta")
    return (
        f"{panel.loss}" + (f", beta {beta:g}" if beta is not None else "") + (f"\n{panel.note}" if panel.note else "\n")
    )


def draw(pyplot: Any, out: Path) -> None:
    """Draws all panels, and the scores of the f-divergences, into the SVG file `out`."""
    rows = -(-(len(PANELS) + 2) // COLUMNS)
    size = (2.75 * COLUMNS, 2.05 * rows + 0.6)
    figure, axes = pyplot.subplots(rows, COLUMNS, figsize=size, layout="constrained")
    spots = list(axes.flat)
    for i, (panel, axis) in enumerate(zip(PANELS, spots, strict=False)):
        axis.set_gid(f"panel-{i}-{panel.loss}")
        draw_panel(panel, axis)
    draw_scores(*spots[len(PANELS) : len(PANELS) + 2])
    for axis in spots[len(PANELS) + 2 :]:
        axis.set_axis_off()
    lines = [
        pyplot.Line2D([], [], color=color, linestyle=style)
        for color, style in ((LOSS, "-"), (SLOPE, "-"), (CHOSEN, "--"), (REJECTED, ":"))
    ]
    labels = ["loss (left axis)", "d loss / dh (right axis)", "d loss / da", "-d loss / db"]
    figure.legend(lines, labels, loc="outside upper center", ncols=4, frameon=False)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, metadata={"Date": None})
    pyplot.close(figure)


def draw_panel(panel: Panel, axis: Any) -> None:
    """Draws a loss on the left axis and its slopes on the right one."""
    curves = curves_of(panel)
    axis.set_title(title_of(panel), linespacing=1.1)
    axis.set_xlabel("h per token, nats" if panel.per_token else "h, nats", labelpad=1)
    axis.axvline(0, color="0.85", linewidth=0.8, zorder=0)
    axis.plot(curves.margin, curves.loss, color=LOSS)
    right = axis.twinx()
    if not np.allclose(curves.pushes[:, 0], curves.pushes[:, 1], rtol=1e-3, atol=1e-6):
        right.plot(curves.margin, curves.pushes[:, 0], color=CHOSEN, linestyle="--", linewidth=1.1)
        right.plot(curves.margin, curves.pushes[:, 1], color=REJECTED, linestyle=":", linewidth=1.4)
    right.plot(curves.margin, curves.slope, color=SLOPE, linewidth=1.2)
    for side, color in ((axis, LOSS), (right, SLOPE)):
        side.tick_params(axis="y", colors=color, labelsize=7.5, length=2)
        side.locator_params(axis="y", nbins=4)
        side.ticklabel_format(axis="y", useOffset=False)
        side.spines[["top"]].set_visible(False)
    axis.tick_params(axis="x", labelsize=7.5, length=2)
    axis.locator_params(axis="x", nbins=5)
    axis.margins(x=0)


def draw_scores(scores: Any, slopes: Any) -> None:
    """Draws the f-divergences' scores of a log-ratio, and their slopes."""
    ratios = jnp.linspace(-4.0, 4.0, POINTS)
    for name, style in zip(DIVERGENCES, ("-", "--", "-.", ":"), strict=True):

        def score(x: Array, name: str = name) -> Array:
            return f_scores(x[None, None], divergence=name)[0, 0]

        scores.plot(ratios, jax.vmap(score)(ratios), linestyle=style, label=name.removesuffix("_divergence"))
        slopes.plot(ratios, jax.vmap(jax.grad(score))(ratios), linestyle=style, label=name)
    scores.set_title("scores of the divergences\n(alpha: 0.5)")
    slopes.set_title("their slopes\n")
    scores.set_ylim(-8, 4)
    slopes.set_ylim(0, 4)
    scores.legend(fontsize=7.5, frameon=False, loc="lower right", handlelength=1.8, labelspacing=0.2)
    for axis in (scores, slopes):
        axis.set_xlabel("log-ratio, nats", labelpad=1)
        axis.tick_params(labelsize=7.5, length=2)
        axis.axvline(0, color="0.85", linewidth=0.8, zorder=0)
        axis.margins(x=0)
        axis.spines[["top", "right"]].set_visible(False)


def main() -> None:
    """Draws the figure. Raises: SystemExit without matplotlib."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    out = parser.parse_args().out
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("matplotlib is not installed; it comes with the `bench` extra") from None
    matplotlib.use("agg")
    from matplotlib import pyplot

    with pyplot.rc_context(STYLE):
        draw(pyplot, out)


if __name__ == "__main__":
    main()
