"""Plots of measurements that are read from files. Needs matplotlib: the `plot` extra."""

import json
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure


def plot_steps(csvs: list[str], path: str) -> None:
    """Plot tokens per second, running and waiting requests, use of the KV pool, and step times over the time of a run.

    All runs are drawn into the same axes of one PNG. The name of a file is the label of its run.
    """
    figure = Figure(figsize=(10, 10), layout="constrained")
    rate, queue, pool, duration = figure.subplots(4, 1, sharex=True)
    for csv in csvs:
        steps = pd.read_csv(csv)
        name = Path(csv).stem
        seconds = steps["time"] - steps["time"].iloc[0] + steps["duration"].iloc[0]
        tokens = steps["num_prefill_tokens"] + steps["num_decode_tokens"]
        window = max(1, len(steps) // 50)  # steps that a point averages over
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


def plot_savings(paths: list[str], path: str) -> None:
    """Plot the measurements of `savings.py` into one PNG, from the JSON line at the end of each file.

    The plots show the gain of cascade attention over the length of the common prefix, the time to first token over a
    conversation, and KV memory over the length of a request.
    """
    figure = Figure(figsize=(15, 4.5), layout="constrained")
    gain, ttft, memory = figure.subplots(1, 3)
    for file in paths:
        record = json.loads(Path(file).read_text(encoding="utf-8").splitlines()[-1])
        name = f"{record['model']} {record['dtype']}"
        cells = pd.DataFrame(record.get("cascade", []))
        for batch_size, row in cells.groupby("decodes") if len(cells) else ():
            (line,) = gain.plot(row["tokens in common"], row["ratio"], "-", label=f"{name}, {batch_size} decodes")
            packed = row[row["packed"]]
            gain.plot(packed["tokens in common"], packed["ratio"], "o", color=line.get_color())
        for axes, part, columns in (
            (ttft, "conversation", ("tokens of the prompt", "time to first token, ms", "with prefix caching")),
            (memory, "long_contexts", ("tokens of the first", "if all were full", "MB")),
        ):
            if part in record:
                rows = pd.DataFrame(record[part])
                rows = rows[rows["requests"] == 1] if "requests" in rows else rows
                x, before, after = columns
                (line,) = axes.plot(rows[x], rows[before], "--", label=f"{name}, without")
                axes.plot(rows[x], rows[after], "-", color=line.get_color(), label=name)
    gain.axhline(1, color="gray", linewidth=0.8)
    for axes, title, x, y in (
        (gain, "cascade attention (dots: packed)", "tokens in common", "decode step, without / with"),
        (ttft, "conversation, with and without prefix caching", "tokens of the prompt", "time to first token, ms"),
        (memory, "one request, with and without release of pages", "tokens", "KV, MB"),
    ):
        axes.set(title=title, xlabel=x, ylabel=y)
        axes.legend()
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=100)
