"""Shared parts of the benchmarks: running a side in a fresh process, memory, page faults, tables, plots, models, pairs.

The module imports only the standard library and numpy. Functions import what else they need, so that a side can run in
the environment of another trainer.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib
import importlib.metadata
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import threading
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
WARM_UP = 2  # first steps of each run, left out of its speed: compilation, allocator, page cache
# With glibc's defaults, large temporaries are returned to the system each time, and page faults bring them back.
TUNED = {"MALLOC_MMAP_THRESHOLD_": str(2**33), "MALLOC_TRIM_THRESHOLD_": str(2**33)}
ALLOCATORS: dict[str, dict[str, str]] = {"default": {}, "tuned": TUNED}
SHAPES = {
    "llama": dict(
        model_type="llama",
        hidden_size=288,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=6,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    ),
    "pythia": dict(
        model_type="gpt_neox",
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=6,
        num_attention_heads=8,
        max_position_embeddings=2048,
        rotary_pct=0.25,
    ),
    "tiny": dict(
        model_type="llama",
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    ),
}


# --- sides in separate processes ----------------------------------------------------------------------------------


def in_fresh_process(
    function: str, work: Path, args: Mapping[str, Any], *, python: str = sys.executable, allocator: str = "default"
) -> dict[str, Any]:
    """Calls `function(work, args)` in a separate process, so that its memory and page faults are measured alone.

    Caches are in `work`, so that no compiled program, tokenized data or score of an earlier run is reused.

    Args:
      function: "module:function"; it receives `args` as a namespace and returns a dict that JSON can represent.
      work: a folder that does not exist yet.
      allocator: one of ALLOCATORS.
    Returns: the dict that the function returned, with "peak_bytes" of the whole process unless it contains that; or
      {"failed": reason} if the process failed.
    """
    work.mkdir(parents=True)
    (work / "args.json").write_text(json.dumps(dict(args)))
    env = {name: value for name, value in os.environ.items() if name not in TUNED} | ALLOCATORS[allocator]
    env |= {"DPO_JAX_CACHE": str(work / "cache"), "HF_DATASETS_CACHE": str(work / "datasets")}
    code = "from benchmarks.common import answer; answer()"
    print(f"{function.partition(':')[0]}: {work.name}", file=sys.stderr, flush=True)
    done = subprocess.run([python, "-c", code, function, str(work)], cwd=ROOT, env=env, stdout=sys.stderr)
    if done.returncode:
        return {"failed": f"exit status {done.returncode}"}
    return json.loads((work / "result.json").read_text())


def answer() -> None:
    """Runs in the process that `in_fresh_process` starts: calls the function and writes its result."""
    (module, _, name), work = sys.argv[1].partition(":"), Path(sys.argv[2])
    args = types.SimpleNamespace(**json.loads((work / "args.json").read_text()))
    found = getattr(importlib.import_module(module), name)(work, args)
    (work / "result.json").write_text(json.dumps({"peak_bytes": memory("VmHWM")} | found))


def memory(field: str) -> int:
    """Bytes of this process in a field of Linux's /proc/self/status: VmRSS, RssAnon, VmHWM (the peak of VmRSS).

    Unlike `ru_maxrss`, which a child process inherits from its parent, VmHWM starts anew in each process.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def reset_peak() -> None:
    """Returns freed memory to the system and resets VmHWM to the present resident memory."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def minor_faults() -> int:
    """Page faults of this process so far that needed no disk access, of all threads."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


class Sample(NamedTuple):
    """Measurements of this process at the moment when a file had `rows` rows."""

    rows: int
    minor_faults: int
    rss_bytes: int
    anonymous_bytes: int


@contextlib.contextmanager
def watch(path: Path, *, every_s: float = 0.01) -> Iterator[list[Sample]]:
    """Samples this process whenever the file `path` grows; yields a list that grows while the body runs."""
    found: list[Sample] = []
    ended = threading.Event()

    def look() -> None:
        size = 0
        while not ended.wait(every_s):
            now = path.stat().st_size if path.exists() else 0
            if now != size:
                size, rows = now, path.read_text().count("\n")
                found.append(Sample(rows, minor_faults(), memory("VmRSS"), memory("RssAnon")))

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        ended.set()
        thread.join()


def faults_per_step(samples: Sequence[Sample]) -> float | None:
    """Minor page faults per row after the warm-up; None if there are too few rows."""
    measured = [sample for sample in samples if sample.rows >= WARM_UP]
    if not measured or measured[-1].rows == measured[0].rows:
        return None
    return (measured[-1].minor_faults - measured[0].minor_faults) / (measured[-1].rows - measured[0].rows)


# --- summaries and plots -------------------------------------------------------------------------------------------


def median_time(rounds: Sequence[Mapping[str, Any]]) -> float:
    """Median of the step times of all rounds, each without its warm-up."""
    return statistics.median(time for one in rounds for time in one["step_times_s"][WARM_UP:])


def median_of(rounds: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """Median of one number over rounds; None if no round has it."""
    values = [one[name] for one in rounds if one.get(name) is not None]
    return statistics.median(values) if values else None


def worked(rounds: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rounds that did not fail."""
    return [one for one in rounds if "failed" not in one]


def ratio(one: float | None, other: float | None) -> float | None:
    """`one / other`; None if either is missing or `other` is 0."""
    return None if one is None or not other else one / other


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Aligned text of rows that have the same columns; the first column is left-aligned, None is shown as a dash."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names] + [[shown(row.get(name)) for name in names] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for first, *others in cells:
        padded = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *padded]).rstrip())
    return "\n".join(lines)


def shown(value: Any) -> str:
    """Text of a value: four significant digits of a float, all digits of an integer."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def mib(value: float | None) -> float | None:
    """Bytes as MiB."""
    return None if value is None else value / 2**20


def write_results(out: Path, options: argparse.Namespace, found: Mapping[str, Any]) -> None:
    """Writes `out`/result.json: results, options, machine and versions of packages."""
    machine = {"machine": platform.machine(), "system": platform.platform(), "cores": len(os.sched_getaffinity(0))}
    versions = {"python": platform.python_version()}
    for name in ("dpo-jax", "jax", "torch", "trl", "transformers", "google-tunix"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    about = {"options": vars(options), "machine": machine, "versions": versions}
    (out / "result.json").write_text(json.dumps(about | dict(found), indent=2) + "\n")


def plot_bars(out: Path, panels: Mapping[str, Mapping[str, float | None]]) -> None:
    """Draws one panel of bars for each title, with one bar for each label, into the PNG file `out`."""
    pyplot = load_pyplot()
    if pyplot is None:
        return
    tallest = max(map(len, panels.values()))
    size = (4.2 * len(panels), 1.2 + 0.4 * tallest)
    figure, axes = pyplot.subplots(1, len(panels), figsize=size, squeeze=False, layout="constrained")
    for axis, (title, bars) in zip(axes[0], panels.items(), strict=True):
        values = [value or 0.0 for value in bars.values()]
        drawn = axis.barh(list(bars), values)
        axis.bar_label(drawn, labels=[shown(value) for value in bars.values()], padding=3, fontsize=8)
        axis.set_title(title, fontsize=10)
        axis.invert_yaxis()
        axis.margins(x=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, dpi=150)
    pyplot.close(figure)


def plot_lines(out: Path, panels: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]], x: str) -> None:
    """Draws one panel for each title, with one line (xs, ys) for each label, into the PNG file `out`."""
    pyplot = load_pyplot()
    if pyplot is None:
        return
    size = (4.2 * len(panels), 3.4)
    figure, axes = pyplot.subplots(1, len(panels), figsize=size, squeeze=False, layout="constrained")
    for axis, (title, lines) in zip(axes[0], panels.items(), strict=True):
        for label, (xs, ys) in lines.items():
            axis.plot(xs, ys, marker=".", label=label)
        axis.set(title=title, xlabel=x)
        axis.set_ylim(bottom=0)
        axis.legend(fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, dpi=150)
    pyplot.close(figure)


def load_pyplot() -> Any:
    """Returns matplotlib's pyplot with a backend for files; None, with a printed line, if it is not installed."""
    try:
        import matplotlib
    except ImportError:
        print("no plot: matplotlib is not installed; it comes with the `bench` extra", file=sys.stderr)
        return None
    matplotlib.use("agg")
    return importlib.import_module("matplotlib.pyplot")


# --- inputs -------------------------------------------------------------------------------------------------------


def make_parser(doc: str | None, *, out: str, shape: str = "llama") -> argparse.ArgumentParser:
    """Returns a parser with the options that all benchmarks share."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="preferences in any form that dpo_jax reads")
    parser.add_argument("--tokenizer", default="", help="folder of the tokenizer; required without --model")
    parser.add_argument("--model", default="", help="checkpoint folder; empty: a random checkpoint of --shape")
    parser.add_argument("--shape", choices=SHAPES, default=shape)
    parser.add_argument("--out", default=out, help="folder of the results; must not exist")
    return parser


def prepare(args: argparse.Namespace, **fields: Any) -> Path:
    """Creates the output folder and, without --model, a random checkpoint in it; returns the folder.

    Args:
      fields: fields of the checkpoint's config.json in addition to those of --shape.
    """
    if not args.model and not args.tokenizer:
        sys.exit("--tokenizer is needed to make a checkpoint; or give one as --model")
    out = Path(args.out).absolute()
    if out.exists():
        sys.exit(f"--out={args.out}: exists already; name another folder")
    out.mkdir(parents=True)
    if not args.model:
        make_model(out / "model", SHAPES[args.shape] | fields, Path(args.tokenizer))
    args.model = str(Path(args.model).absolute() if args.model else out / "model")
    return out


def make_model(folder: Path, shape: dict[str, Any], tokenizer: Path) -> None:
    """Writes a random checkpoint with transformers, and the tokenizer into the same folder."""
    import torch
    import transformers

    torch.manual_seed(0)
    saved = transformers.AutoTokenizer.from_pretrained(tokenizer)
    vocabulary = -(-len(saved) // 128) * 128
    config = transformers.AutoConfig.for_model(
        **shape, vocab_size=vocabulary, bos_token_id=saved.eos_token_id, eos_token_id=saved.eos_token_id
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    saved.save_pretrained(folder)


class Kept(NamedTuple):
    """A pair as text columns and as token ids."""

    row: dict[str, str]
    ids: Any  # dpo_jax.types.Encoded


def read_pairs(source: str, tokenizer: Path) -> Iterator[Kept]:
    """Yields the pairs of a source in order and without truncation; skips rows that cannot be used."""
    from dpo_jax.data import formats, sources
    from dpo_jax.data.tokenize import Outcome, TokenizationRules, encode, load_tokenizer
    from dpo_jax.types import InputError

    loaded = load_tokenizer(str(tokenizer))
    most = 10**6  # tokens, so that nothing is truncated
    rules = TokenizationRules(len(loaded), most, most - 1, "keep_end")
    for row in sources.read(source, split="train")[0].rows:
        try:
            pairs = formats.render(row, format=formats.detect(row), tokenizer=loaded)
        except InputError:
            continue
        for pair, found in zip(pairs, encode(pairs, loaded, rules), strict=True):
            if isinstance(found, Outcome):
                yield Kept({"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}, found.encoded)


def select_pairs(
    source: str, tokenizer: Path, *, count: int, max_prompt: int = 10**6, max_answer: int = 10**6, max_length: int
) -> list[Kept]:
    """Returns the first pairs of a source with prompts, answers and sequences of at most these numbers of tokens."""
    kept: list[Kept] = []
    for pair in read_pairs(source, tokenizer):
        prompt, *answers = map(len, pair.ids)
        if prompt <= max_prompt and max(answers) <= max_answer and prompt + max(answers) <= max_length:
            kept.append(pair)
        if len(kept) == count:
            break
    if not kept:
        sys.exit(f"{source}: no pair of at most {max_length} tokens")
    return kept


def write_rows(rows: Sequence[Mapping[str, Any]], out: Path) -> None:
    """Writes rows as JSON lines."""
    out.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_pairs(source: str, out: Path, tokenizer: Path, *, count: int, max_length: int) -> int:
    """Writes `count` pairs of the source that need no truncation, as text columns that every trainer reads.

    If the source has fewer, they are repeated in the same order. Returns: the number of distinct pairs.
    """
    kept = select_pairs(source, tokenizer, count=count, max_length=max_length)
    write_rows([kept[i % len(kept)].row for i in range(count)], out)
    return len(kept)


def base_config(args: Any, work: Path) -> Any:
    """ConfigDict of a float32 run of dpo_jax on `args.pairs_file`, in file order and without truncation."""
    from dpo_jax.config import base

    chosen = base()
    chosen.model.path = args.model
    chosen.model.dtype = "float32"
    chosen.data.train = args.pairs_file
    chosen.data.format = "plain"
    chosen.data.shuffle = False
    chosen.data.max_length = args.max_length
    chosen.data.max_prompt_length = args.max_length - 1
    chosen.data.cache_dir = str(work / "cache")
    chosen.train.batch_pairs, chosen.train.steps = args.pairs, args.steps
    chosen.optimizer.learning_rate = args.learning_rate
    return chosen


def train_ours(work: Path, chosen: Any) -> dict[str, Any]:
    """Trains with dpo_jax in `work`; returns losses, step times, positions and tokens per step, and page faults."""
    from dpo_jax import train
    from dpo_jax.config import freeze

    with watch(work / "run" / "metrics.jsonl") as samples:
        train.run(freeze(chosen), work / "run")
    rows = [json.loads(line) for line in (work / "run" / "metrics.jsonl").read_text().splitlines()]
    return {
        "losses": [row["loss"] for row in rows],
        "step_times_s": [row["step_time_s"] for row in rows],
        "positions": [row["positions_computed"] for row in rows],
        "reference_positions": [0 for _ in rows],
        "tokens": [row["tokens_real"] for row in rows],
        "faults_per_step": faults_per_step(samples),
    }
