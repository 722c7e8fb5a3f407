"""Pictures of a run, from the CSV of its steps. Needs matplotlib: the `plot` extra."""

from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure


def plot_steps(csvs: list[str], path: str) -> None:
    """Tokens per second, running and waiting requests, use of the KV pool and step times over the seconds of each run,
    drawn over each other in one PNG; a run goes by the name of its file."""
    figure = Figure(figsize=(10, 10), layout="constrained")
    rate, queue, pool, duration = figure.subplots(4, 1, sharex=True)
    for csv in csvs:
        steps = pd.read_csv(csv)
        name = Path(csv).stem
        seconds = steps["time"] - steps["time"].iloc[0] + steps["duration"].iloc[0]
        tokens = steps["num_prefill_tokens"] + steps["num_decode_tokens"]
        window = max(1, len(steps) // 50)  # steps, so that a point is an average
        rate.plot(seconds, tokens.rolling(window).sum() / steps["duration"].rolling(window).sum(), label=name)
        (line,) = queue.plot(seconds, steps["num_running"], label=f"{name}: running")
        queue.plot(seconds, steps["num_waiting"], "--", color=line.get_color(), label=f"{name}: waiting")
        pool.plot(seconds, 100 * steps["kv_usage"], label=name)
        duration.plot(seconds, 1e3 * steps["duration"], ".", markersize=3, label=name)
    for axes, label in ((rate, "tokens/s"), (queue, "requests"), (pool, "KV pool, %"), (duration, "step, ms")):
        axes.set_ylabel(label)
        axes.legend()
        axes.grid(alpha=0.3)
    duration.set_xlabel("seconds")
    figure.savefig(path, dpi=100)
