"""Names that papers and other libraries use for losses that have another name here, or are set by other fields."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping

# Fields of the command line, separated by spaces; they begin with the loss's name.
SETTINGS: Mapping[str, str] = {
    name: settings
    for names, settings in (
        ("dpo dpo_loss vanilla_dpo logistic log_sigmoid bradley_terry bt", "loss.name=sigmoid"),
        ("cdpo conservative_dpo", "loss.name=sigmoid loss.label_smoothing=0.1"),
        ("rdpo robust_dpo", "loss.name=robust"),
        ("slic slic_hf", "loss.name=hinge"),
        ("ln_dpo lndpo dpo_norm length_normalized_dpo", "loss.name=sigmoid_norm"),
        ("exo", "loss.name=exo_pair"),
        ("nca", "loss.name=nca_pair"),
        ("bco", "loss.name=bco_pair"),
        ("sppo", "loss.name=sppo_hard"),
        ("apo", "loss.name=apo_zero"),
        ("kto_pair", "loss.name=kto"),
        ("dpop dpo_p smaug", "loss.name=dpo_positive"),
        ("tdpo", "loss.name=tdpo2"),
        ("aot_pair", "loss.name=aot"),
        ("aot_pair_unpaired", "loss.name=aot_unpaired"),
        ("lrml", "loss.name=discopop"),
        ("pl pl_dpo listwise_dpo", "loss.name=plackett_luce"),
        ("nll cross_entropy ce", "loss.name=sft"),
        ("cpo_simpo", "loss.name=simpo,sft"),
        ("mpo", "loss.name=sigmoid*0.8,bco_pair*0.2,sft"),
        ("rpo dpo_nll irpo iterative_rpo", "loss.name=sigmoid loss.nll_weight=1"),
        ("ld_dpo lddpo", "loss.name=sigmoid loss.ld_alpha=0.5"),
        ("wpo", "loss.name=sigmoid loss.wpo=true"),
        ("f_dpo fdpo", "loss.name=sigmoid loss.divergence=js_divergence"),
        ("tr_dpo trdpo", "loss.name=sigmoid reference.sync_steps=512 reference.mixup_alpha=0.6"),
    )
    for name in names.split()
}
REASONS: Mapping[str, str] = {  # of methods that no loss here stands for
    "odpo": "It is sigmoid on data with a column margin: --config.loss.name=sigmoid.",
    "cal_dpo": "",
    "r_dpo": "",
    "alphapo": "",
    "online_dpo": "It writes answers while it trains, and pairs are fixed here.",
    "xpo": "It writes answers while it trains, and pairs are fixed here.",
    "nash_md": "It writes answers while it trains, and pairs are fixed here.",
    "ppo": "It writes answers while it trains, and pairs are fixed here.",
    "grpo": "It writes answers while it trains, and pairs are fixed here.",
}
OWN = "A function of your own is named as module:function, see examples/own_loss.py."


def remedy(name: str, losses: Iterable[str]) -> str:
    """Returns what to give in place of a name that is none of `losses`.

    >>> remedy("DPO", ["sigmoid", "ipo"])
    'Its name here is sigmoid: --config.loss.name=sigmoid on the command line.'
    """
    losses, plain = list(losses), re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
    settings = SETTINGS.get(plain, f"loss.name={plain}" if plain in losses else "").split()
    if settings:
        typed = " ".join(f"--config.{each}" for each in settings)
        return f"Its name here is {settings[0].partition('=')[2]}: {typed} on the command line."
    if plain in REASONS:
        return REASONS[plain] or OWN
    close = difflib.get_close_matches(plain, losses, n=2, cutoff=0.7)
    return f"Did you mean {' or '.join(close)}?" if close else OWN
