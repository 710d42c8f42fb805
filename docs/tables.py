"""Writes tables of docs/ that follow from `dpo_jax.losses.registry` and `dpo_jax.fields.trl`.

    python -m docs.tables

A table stands between the lines `<!-- table: NAME -->` and `<!-- end -->`. tests/test_objectives_guide.py fails while
one is out of date.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from dpo_jax.fields import trl
from dpo_jax.losses.registry import MODIFIERS, OPTIONS, REGISTRY, Entry, arguments, as_text

ROOT = Path(__file__).parents[1]
INPUTS = {  # what a loss may read besides log-probs, in words
    "present": "the whole batch",
    "baseline": "a running mean",
    "margin": "margins",
    "kl": "other prompts' answers",
    "sequence_kl": "divergences along answers",
}


def in_code(names: Iterable[str], separator: str = ", ") -> str:
    """Returns the names in backticks."""
    return separator.join(f"`{name}`" for name in names)


def names_where(condition: Callable[[Entry], object]) -> list[str]:
    """Returns the names of the losses for which the condition holds."""
    return [name for name, entry in REGISTRY.items() if condition(entry)]


def summary() -> Iterator[tuple[str, ...]]:
    """Yields losses by data, and those without a reference."""
    yield "losses", "`loss.name`"
    pairs = names_where(lambda each: each.reads_reference and each.kinds == {"paired"})
    yield "of pairs", in_code(pairs, " ")
    yield (
        "of pairs, or of answers that are labeled good or bad",
        in_code(names_where(lambda each: each.reads_reference and "unpaired" in each.kinds), " "),
    )
    yield "of whole rankings", in_code(names_where(lambda each: each.reads_reference and "ranked" in each.kinds), " ")
    yield "without a reference", in_code(names_where(lambda each: not each.reads_reference), " ")
    yield "several at once", '`"sigmoid*0.8,bco_pair*0.2,sft"`'
    yield "your own", '`"package.module:function"`, as [examples/own_loss.py](../examples/own_loss.py)'


def overview() -> Iterator[tuple[str, ...]]:
    """Yields every loss with its title, paper, data, inputs, and the options that combine with it."""
    yield "loss", "title", "paper", "data", "reads", "combines with"
    for name, entry in REGISTRY.items():
        reads = ["the reference"] if entry.reads_reference else []
        reads += [words for each, words in INPUTS.items() if each in arguments(entry.function)]
        reads += ["chosen answers only"] if entry.answers_read == "chosen" else []
        combines = [each for each, modifier in MODIFIERS.items() if modifier.combines and modifier.combines(entry)]
        yield (
            f"[`{name}`](#{name})",
            entry.title,
            f"[{entry.paper}](https://arxiv.org/abs/{entry.paper})" if entry.paper else "",
            ", ".join(kind for kind in ("paired", "unpaired", "ranked") if kind in entry.kinds),
            ", ".join(reads) or "log-probs only",
            in_code(each for each in combines if each != "divergence_alpha"),
        )


def kinds() -> Iterator[tuple[str, ...]]:
    """Yields the kinds of data, their columns, and the losses that take them."""
    ranked, unpaired = (names_where(lambda each, kind=kind: kind in each.kinds) for kind in ("ranked", "unpaired"))
    yield "kind", "columns", "losses"
    yield "pairs", "`prompt`, `chosen`, `rejected`", "all"
    yield (
        "rankings",
        "`prompt`, `responses`, and `scores` (higher is better) or `ranks` (1 is best)",
        f"{in_code(ranked)} and their sums take them whole; others take the pairs in them",
    )
    yield "unpaired", "`prompt`, `completion`, `label` (true: desirable)", f"{in_code(unpaired)} and their sums"


def options() -> Iterator[tuple[str, ...]]:
    """Yields every option by losses, default and range."""
    yield "option", "losses", "default", "range"
    for name, option in OPTIONS.items():
        rows: dict[tuple[str, str], list[str]] = {}
        for loss, entry in REGISTRY.items():
            if name in entry.options:
                valid = "true, false" if option.type is bool else str(entry.range_of(name))
                rows.setdefault((as_text(entry.options[name]), valid), []).append(loss)
        for (default, valid), losses in rows.items():
            yield f"`{name}`", in_code(losses), default, valid.replace(" | ", ", ")
        if (modifier := option.modifier) is not None:
            combines = modifier.combines or (lambda entry, reads=modifier.reads: reads in arguments(entry.function))
            losses = in_code(names_where(combines)) if modifier.combines or modifier.reads else "any other"
            beside = f", beside `{modifier.beside[0]}`" if modifier.beside and losses == "any other" else ""
            valid = "true, false" if option.type is bool else str(option.valid).replace(" | ", ", ")
            yield f"`{name}`", losses + beside, as_text(modifier.unset), valid


def costs() -> Iterator[tuple[str, ...]]:
    """Yields what an objective computes besides the update's own forward and backward pass."""

    def reads(name: str) -> str:
        return in_code(names_where(lambda each: name in arguments(each.function)))

    batch, free = names_where(lambda each: each.reads_batch), names_where(lambda each: not each.reads_reference)
    yield "objective", "cost"
    yield (
        in_code(batch),
        "with several microbatches, one pass without gradient, because the losses need the log-probs of the whole "
        "batch; with one microbatch, none",
    )
    yield reads("kl"), "one forward pass of the other prompts' answers"
    yield (
        "`reference.sync_steps`",
        "one forward pass of each pair under the new reference, and of the evaluation set at every sync",
    )
    yield f"{reads('sequence_kl')}, `ld_alpha`, `wpo`", "no further pass; all but `wpo` need a larger store"
    ranked = names_where(lambda each: "ranked" in each.kinds and each.answers_read == "all")
    yield in_code(ranked), "no pass beyond its answers, which are laid out in twos, each two with its own prompt"
    yield in_code(free), "less: no reference pass"


def in_trl(section: str) -> Iterator[tuple[str, ...]]:
    """Yields the options of TRL in a section, what stands for them here, and what differs."""
    yield "TRL", "here", "notes"
    for name, (ours, note) in trl.SECTIONS[section].items():
        yield f"`{name}`", in_code(ours.split()) or "-", marked(note)


def marked(text: str) -> str:
    """Returns a text with its names of fields, files and options in backticks."""
    return re.sub(r"(?<!\S)(?=[^ ]*[a-z])\w+[*_./=:][^ ]*\w(?![\w/])|(?<!\S)[\w/]+/(?!\w)", r"`\g<0>`", text)


TABLES: dict[str, Callable[[], Iterator[tuple[str, ...]]]] = {
    "summary": summary,
    "overview": overview,
    "kinds": kinds,
    "costs": costs,
    "options": options,
    **{f"trl_{section}": functools.partial(in_trl, section) for section in trl.SECTIONS},
}
PATHS = (ROOT / "docs" / "objectives.md", ROOT / "docs" / "from_trl.md")


def with_tables(text: str) -> str:
    """Returns a document with its tables as they should be."""

    def table(match: re.Match[str]) -> str:
        header, *rows = TABLES[match[1]]()
        lines = [header, ("---",) * len(header), *rows]
        body = [f"|{'|'.join(line)}|" if line[0] == "---" else f"| {' | '.join(line)} |" for line in lines]
        return "\n".join([f"<!-- table: {match[1]} -->", *body, "", "<!-- end -->"])

    return re.sub(r"<!-- table: (\w+) -->\n.*?<!-- end -->", table, text, flags=re.DOTALL)


def main() -> None:
    """Writes the tables."""
    for path in PATHS:
        path.write_text(with_tables(path.read_text()))


if __name__ == "__main__":
    main()
