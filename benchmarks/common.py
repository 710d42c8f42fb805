"""What the benchmarks share: sides in fresh processes, their memory and page faults, tables, plots, models and pairs.

It imports nothing but the standard library and numpy until a function needs more, so that a side can run in another
trainer's environment.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
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
WARM_UP = 2  # steps of each run left out of its speed: compilation, allocator, page cache
# With glibc's defaults, large temporaries go back to the system each time, and page faults bring them in again.
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


# --- sides in processes of their own ------------------------------------------------------------------------------


def in_fresh_process(
    function: str, work: Path, args: Mapping[str, Any], *, python: str = sys.executable, allocator: str = "default"
) -> dict[str, Any]:
    """Calls `function(work, args)` in a process of its own, so that its memory and page faults are its own.

    Caches lie in `work`, so that nothing is compiled, tokenized or scored by an earlier run.

    Args:
      function: "module:function"; it takes `args` as a namespace and returns a dict that JSON can hold.
      work: a folder that does not exist yet.
      allocator: one of ALLOCATORS.
    Returns: what the function returned, with "peak_bytes" of the whole process unless it says so itself; or
      {"failed": why} if the process did not end well.
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
    """The other end of `in_fresh_process`."""
    (module, _, name), work = sys.argv[1].partition(":"), Path(sys.argv[2])
    args = types.SimpleNamespace(**json.loads((work / "args.json").read_text()))
    found = getattr(importlib.import_module(module), name)(work, args)
    (work / "result.json").write_text(json.dumps({"peak_bytes": memory("VmHWM")} | found))


def memory(field: str) -> int:
    """Bytes of this process by a name of Linux's /proc/self/status: VmRSS, RssAnon, VmHWM (the most VmRSS was).

    The `ru_maxrss` of a child starts at what its parent held when it was started; this does not.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def reset_peak() -> None:
    """Gives freed memory back to the system, and has VmHWM start again at what is held now."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def minor_faults() -> int:
    """Page faults of this process so far that needed no disk, all threads together."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


class Sample(NamedTuple):
    """This process when a file had got `rows` rows."""

    rows: int
    minor_faults: int
    rss_bytes: int
    anonymous_bytes: int


@contextlib.contextmanager
def watch(path: Path, *, every_s: float = 0.01) -> Iterator[list[Sample]]:
    """Samples this process whenever the file `path` has got more rows; the list grows while the body runs."""
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
    """Minor page faults a row from the last of the warm-up on; None if too few rows were seen."""
    measured = [sample for sample in samples if sample.rows >= WARM_UP]
    if not measured or measured[-1].rows == measured[0].rows:
        return None
    return (measured[-1].minor_faults - measured[0].minor_faults) / (measured[-1].rows - measured[0].rows)


# --- what is made of the numbers ----------------------------------------------------------------------------------


def median_time(rounds: Sequence[Mapping[str, Any]]) -> float:
    """Median of the step times of all rounds, each without its warm-up."""
    return statistics.median(time for one in rounds for time in one["step_times_s"][WARM_UP:])


def median_of(rounds: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """Median of one number over rounds; None if no round has it."""
    values = [one[name] for one in rounds if one.get(name) is not None]
    return statistics.median(values) if values else None


def worked(rounds: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rounds that ended well."""
    return [one for one in rounds if "failed" not in one]


def ratio(one: float | None, other: float | None) -> float | None:
    """`one / other`, None where either is missing or the latter 0."""
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
    """A number with four significant digits or, if whole, all of them; text as it is."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def mib(value: float | None) -> float | None:
    """Bytes as MiB."""
    return None if value is None else value / 2**20


def write_results(out: Path, options: argparse.Namespace, found: Mapping[str, Any]) -> None:
    """Writes `out`/result.json: what was found, with what options, on which machine, with which packages."""
    machine = {"machine": platform.machine(), "system": platform.platform(), "cores": len(os.sched_getaffinity(0))}
    versions = {"python": platform.python_version()}
    for name in ("dpo-jax", "jax", "torch", "trl", "transformers", "google-tunix"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    about = {"options": vars(options), "machine": machine, "versions": versions}
    (out / "result.json").write_text(json.dumps(about | dict(found), indent=2) + "\n")


def plot_bars(out: Path, panels: Mapping[str, Mapping[str, float | None]]) -> None:
    """Draws a panel of bars for each title, with a bar for each label, into the PNG `out`."""
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
    """Draws a panel of lines for each title, with a line (xs, ys) for each label, into the PNG `out`."""
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
    """matplotlib's pyplot for files; None, and a line that says so, where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        print("no plot: matplotlib is not installed; it comes with the `bench` extra", file=sys.stderr)
        return None
    matplotlib.use("agg")
    return importlib.import_module("matplotlib.pyplot")


# --- what goes in -------------------------------------------------------------------------------------------------


def make_parser(doc: str | None, *, out: str, shape: str = "llama") -> argparse.ArgumentParser:
    """A parser with the options that every benchmark takes."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="preferences in any form that dpo_jax reads")
    parser.add_argument("--tokenizer", default="", help="folder of the tokenizer; needed without --model")
    parser.add_argument("--model", default="", help="checkpoint folder; empty: a random one of --shape")
    parser.add_argument("--shape", choices=SHAPES, default=shape)
    parser.add_argument("--out", default=out, help="folder of the results; must not exist")
    return parser


def prepare(args: argparse.Namespace, **fields: Any) -> Path:
    """Makes the output folder and, without --model, a random checkpoint in it; returns the folder.

    Args:
      fields: of the checkpoint's configuration, besides those of --shape.
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
    """A random checkpoint of a shape, written by transformers, with the tokenizer beside it."""
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
    """The pairs of a source in order, none of them cut; rows that cannot be used are left out."""
    from dpo_jax.data import formats, sources
    from dpo_jax.data.tokenize import encode, load_tokenizer
    from dpo_jax.types import InputError

    loaded = load_tokenizer(str(tokenizer))
    most = 10**6  # tokens, so that nothing is cut
    whole = functools.partial(encode, max_length=most, max_prompt_length=most - 1, truncate_prompt="keep_end")
    for row in sources.read(source, split="train")[0].rows:
        try:
            pairs = formats.render(row, format=formats.detect(row), tokenizer=loaded)
        except InputError:
            continue
        for pair, found in zip(pairs, whole(pairs, loaded, vocab_size=len(loaded)), strict=True):
            if not isinstance(found, InputError):
                yield Kept({"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}, found.encoded)


def select_pairs(
    source: str, tokenizer: Path, *, count: int, max_prompt: int = 10**6, max_answer: int = 10**6, max_length: int
) -> list[Kept]:
    """The first pairs of a source whose prompt, answers, and both together, have at most so many tokens."""
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
    """Writes `count` pairs of the source that need no cutting, as explicit text columns that every trainer reads.

    Where the source has fewer, they come again in the same order. Returns: how many of them are distinct.
    """
    kept = select_pairs(source, tokenizer, count=count, max_length=max_length)
    write_rows([kept[i % len(kept)].row for i in range(count)], out)
    return len(kept)


def base_config(args: Any, work: Path) -> Any:
    """The ConfigDict of a float32 run of dpo_jax on `args.pairs_file`, in file order, nothing of it cut."""
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
    """Trains with dpo_jax in `work`; returns losses, step times, positions and tokens of every step, page faults."""
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
