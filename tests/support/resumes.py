"""Resumes several runs one after another in one process, so that a test pays for its start only once.

python -m tests.support.resumes CONFIG WORKDIR [WORKDIR ...] --steps=S --coordinator=HOST:PORT --processes=N --process=I
"""

import argparse
import contextlib
import itertools
import traceback
from pathlib import Path

from dpo_jax import config, train
from dpo_jax.runtime import hosts


def share_first(make):
    """Returns a function that calls `make` once, and returns its result at every call."""
    results = []

    def make_once(*args, **kwargs):
        if not results:
            results.append(make(*args, **kwargs))
        return results[0]

    return make_once


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("config", type=Path)
    parser.add_argument("workdirs", nargs="+", type=Path)
    parser.add_argument("--steps", type=int, required=True, help="updates of each run, after which it is asked to stop")
    parser.add_argument("--coordinator")
    parser.add_argument("--processes", type=int)
    parser.add_argument("--process", type=int)
    args = parser.parse_args()
    hosts.join(args.coordinator, args.processes, args.process)
    # All runs share one program, as they are alike: tracing it again takes longer than their few updates.
    train.make_update = share_first(train.make_update)
    try:
        chosen = config.from_json(args.config.read_text(), str(args.config))
        for workdir in args.workdirs:
            answers = itertools.chain([False] * args.steps, itertools.repeat(True))
            hosts.asked_to_stop = answers.__next__  # on all processes at one step, without a signal
            with contextlib.suppress(hosts.Stopped):
                train.run(chosen, workdir)
    except Exception as error:
        traceback.print_exc()
        hosts.leave(1, str(error))  # or the others would wait


if __name__ == "__main__":
    main()
