"""How stateful tests run: a fixed number of runs, or random runs for some minutes.

`pytest --stateful-minutes 10 TEST` draws a new seed for every batch of runs, and prints it where a run fails.
`pytest --stateful-seed SEED TEST` repeats the batch of that seed, and reduces a failure to few rules.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any, ClassVar

from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test

BATCH = 50
"""Runs of one seed."""


class CountingMachine(RuleBasedStateMachine):
    """A state machine that counts what has happened in all runs of this process."""

    totals: ClassVar[Counter[str]] = Counter()


@dataclass(frozen=True)
class Length:
    """How long a stateful test runs; with neither, its fixed number of runs.

    Attributes:
        minutes: random batches of runs, so long.
        seed: the batch of this seed, once.
    """

    minutes: float | None = None
    seed: int | None = None

    @classmethod
    def of(cls, config: Any) -> Length:
        """As pytest's options say."""
        return cls(config.getoption("stateful_minutes"), config.getoption("stateful_seed"))


def add_options(parser: Any) -> None:
    group = parser.getgroup("stateful tests")
    group.addoption(
        "--stateful-minutes", type=float, metavar="MINUTES", help="run each stateful test so long, with random seeds"
    )
    group.addoption("--stateful-seed", type=int, metavar="SEED", help="run each stateful test with this seed once")


def run_machine(machine: type[CountingMachine], length: Length, *, runs: int, rules: int) -> None:
    """Run a state machine: ``runs`` runs of up to ``rules`` rules each, or as ``length`` says."""
    quiet: dict[str, Any] = {"deadline": None, "suppress_health_check": list(HealthCheck)}
    if length == Length():
        fixed = settings(max_examples=runs, stateful_step_count=rules, derandomize=True, database=None, **quiet)
        run_state_machine_as_test(machine, settings=fixed)
        return
    # A failure is reduced to few rules where its seed is repeated: that takes minutes.
    phases = [Phase.generate] if length.seed is None else [Phase.generate, Phase.shrink]
    long = settings(
        max_examples=BATCH, stateful_step_count=2 * rules, derandomize=False, database=None, phases=phases, **quiet
    )
    end = time.monotonic() + 60 * (length.minutes or 0)
    while True:
        number = random.SystemRandom().getrandbits(32) if length.seed is None else length.seed
        try:
            run_state_machine_as_test(seed(number)(machine), settings=long)
        except BaseException:
            print(f"\nto repeat this: --stateful-seed {number}", flush=True)
            raise
        finally:
            print(f"\n{machine.__name__}: {dict(machine.totals)}", flush=True)
        if time.monotonic() >= end:
            return
