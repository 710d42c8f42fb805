"""Goes on with several runs one after another in one process, so that a test pays for its start only once.

python -m tests.support.resumes CONFIG WORKDIR [WORKDIR ...] --steps=S --coordinator=HOST:PORT --processes=N --process=I
"""

import argparse
import contextlib
import itertools
import traceback
from pathlib import Path

from dpo_jax import config, train
from dpo_jax.runtime import hosts


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("config", type=Path)
    parser.add_argument("workdirs", nargs="+", type=Path)
    parser.add_argument("--steps", type=int, required=True, help="of each, after which it is asked to stop")
    parser.add_argument("--coordinator")
    parser.add_argument("--processes", type=int)
    parser.add_argument("--process", type=int)
    args = parser.parse_args()
    hosts.join(args.coordinator, args.processes, args.process)
    make, made = train.make_update, []
    # One program for all runs, which are alike: to trace it again takes longer than what is asked here.
    train.make_update = lambda *given, **how: made[0] if made else made.append(make(*given, **how)) or made[0]
    try:
        chosen = config.from_json(args.config.read_text(), str(args.config))
        for workdir in args.workdirs:
            asked = itertools.chain([False] * args.steps, itertools.repeat(True))
            hosts.asked_to_stop = asked.__next__  # of all processes at one step, without a signal
            with contextlib.suppress(hosts.Stopped):
                train.run(chosen, workdir)
    except Exception as error:
        traceback.print_exc()
        hosts.leave(1, str(error))  # or the others would wait


if __name__ == "__main__":
    main()
