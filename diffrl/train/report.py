"""What a run says while it goes: the progress bar, the metric writers, and the alarm for numbers that are not finite.

Metrics stay on the device until the end of a logging window, and are then fetched in one transfer, one dispatch late:
the device always has the next dispatch to work on while the host reads.
"""

import sys
import time

import jax
import numpy as np
from tqdm import tqdm

# The two through which every divergence shows: a bad gradient spoils the parameters, a bad loss follows from them.
WATCHED = ("loss", "grad_norm")


class NotFinite(Exception):
    """A watched metric is NaN or infinite; the message names it and the first such step."""


class Report:
    """The report of one call of `fit`.

    Args:
        first, steps: updates done at the start, and in the end.
        inner: updates per dispatch; metrics are then [inner].
        writers: has `scalars(step, dict)`, or None.
        log_every: length of a window, in updates.
        batch_size: for samples per second; None leaves them out.
        progress: whether to show a bar, on the first process only.
    """

    def __init__(self, first, steps, inner, *, writers, log_every, batch_size, progress, desc):
        self._inner, self._every, self._batch, self._writers = inner, log_every, batch_size, writers
        self._waiting: list = []  # (step, metrics on the device)
        self._window: list = []  # metrics on the host
        self._clock = (first, 0.0)  # where the window began
        self._compiled = False
        self._bar = tqdm(
            total=steps,
            initial=first,
            desc=desc or None,
            unit="step",
            dynamic_ncols=True,
            mininterval=0.2 if sys.stderr.isatty() else 30.0,
            disable=not progress or jax.process_index() > 0,
        )
        self._bar.set_postfix_str("compiling the first step")

    def add(self, step, metrics):
        """Takes in the dispatch that ended at `step`; fetches if the one before it ended a window."""
        if not self._compiled:  # the first call returns when it is compiled; that is not training time
            self._compiled, self._clock = True, (step, time.perf_counter())
            self._bar.set_postfix_str("")
            self._bar.unpause()
        self._waiting.append((step, metrics))
        self._bar.update(self._inner)
        if len(self._waiting) > 1 and self._ends_window(self._waiting[-2][0]):
            self._fetch(len(self._waiting) - 1)

    def flush(self):
        """Fetches and checks all that is waiting; raises NotFinite."""
        self._fetch(len(self._waiting))

    def close(self, step=None):
        """Ends the bar; with `step`, the run is complete and an unfinished window is written too."""
        if step is not None and self._window:
            self._write(step)
        self._bar.close()

    def _ends_window(self, step):
        return step // self._every > (step - self._inner) // self._every

    def _fetch(self, count):
        ready, self._waiting = self._waiting[:count], self._waiting[count:]
        values = jax.device_get([metrics for _, metrics in ready])
        for (step, _), metrics in zip(ready, values, strict=True):
            self._check(step, metrics)
            self._window.append(metrics)
            if self._ends_window(step):
                self._write(step)

    def _check(self, step, metrics):
        # [inner, ...]: many runs in one program have a metric each.
        watched = {name: np.reshape(metrics[name], (self._inner, -1)) for name in WATCHED if name in metrics}
        for i in range(self._inner):
            for name, values in watched.items():
                bad = values[i][~np.isfinite(values[i])]
                if bad.size:
                    raise NotFinite(f"{name} is {bad[0]} at step {step - self._inner + 1 + i}")

    def _write(self, step):
        """Writes the means over the window that ends at `step`, and how fast it went."""
        window, self._window = self._window, []
        means = {name: float(np.mean([metrics[name] for metrics in window])) for name in window[0]}
        (since, then), now = self._clock, time.perf_counter()
        self._clock = (step, now)
        rates = {"steps_per_s": (step - since) / (now - then)} if step > since else {}
        if rates and self._batch:
            rates["samples_per_s"] = rates["steps_per_s"] * self._batch
        if self._writers is not None:
            self._writers.scalars(step, {**means, **rates})
        shown = {"loss": means.get("loss"), "samples/s": rates.get("samples_per_s")}
        self._bar.set_postfix({name: f"{value:.4g}" for name, value in shown.items() if value is not None})
