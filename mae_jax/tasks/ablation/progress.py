"""How an ablation goes: a line for each run, the time that is left, and a bar on a terminal."""

import statistics
import sys
from collections import defaultdict

from tqdm import tqdm

from mae_jax.runtime.console import say
from mae_jax.runtime.errors import escaped
from mae_jax.tasks.ablation.execution import Outcome
from mae_jax.tasks.ablation.jobs import Run
from mae_jax.tasks.ablation.table import show, summarize_values


class Progress:
    """Lines for each run, and on a terminal a bar for the whole with the last line of the run under way."""

    def __init__(self, total: int, finished: int):
        self._seconds: dict[str, list[float]] = defaultdict(list)
        layout = "{l_bar}{bar}| {n_fmt}/{total_fmt} runs{postfix}"
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=total, initial=finished, bar_format=layout, dynamic_ncols=True)

    def watch(self, line: str) -> None:
        """Shows a line of the run under way."""
        if self._bar is not None and line.strip():
            self._bar.set_postfix_str(escaped(line.strip()))

    def note(self, one: Run, outcome: Outcome, left: list[Run], scores: tuple[str, ...]) -> None:
        """Tells how a run ended, and how long the rest will take if it takes as long as such runs did so far."""
        self._seconds[one.name].append(outcome.seconds)
        usual = statistics.fmean(value for values in self._seconds.values() for value in values)
        rest = sum(statistics.fmean(self._seconds.get(other.name) or [usual]) for other in left)
        found = [f"{name} {show(name, summarize_values([outcome.scores[name]]))}" for name in scores
                 if outcome.scores and name in outcome.scores]  # fmt: skip
        how = f"failed: {outcome.error}; see {one.folder}/log.txt" if outcome.error else ", ".join(found) or "done"
        self.ended(f"  {how}  ({tqdm.format_interval(outcome.seconds)}; {tqdm.format_interval(rest)} left)")

    def ended(self, text: str) -> None:
        say(text)
        if self._bar is not None:
            self._bar.set_postfix_str("", refresh=False)
            self._bar.update()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
