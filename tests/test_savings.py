"""The numbers in the measurements of sharing add up, for any measured times."""

import json

import pytest
from engines import byte_model
from rich.console import Console

from benchmarks.savings import PARTS, Sizes, report_savings
from benchmarks.workload import RunOptions
from flex_nano_vllm import Inference

SIZES = Sizes(
    num_requests=4,
    prefix_len=24,
    own_len=4,
    new_tokens=3,
    num_turns=3,
    turn_len=8,
    cascade_prefixes=(8, 16),
    cascade_batches=(2, 3),
    cascade_steps=2,
    context_len=64,
    num_contexts=2,
    repetitions=2,
    unshared_repetitions=2,
)


@pytest.fixture
def options():
    options = RunOptions(
        model="a model",
        num_requests=3,
        max_prompt_len=8,
        min_new_tokens=2,
        max_new_tokens=3,
        max_batch_size=2,
        max_seq_length=16,
        max_num_batched_tokens=8,
        page_size=4,
        compile=False,
    )
    options.fill_in("cpu")
    return options


def test_all_parts_are_measured_and_add_up(options, capsys, monkeypatch, tmp_path):
    built = []
    init = Inference.__init__

    def noted(self, *args, **kwargs):
        init(self, *args, **kwargs)
        built.append(self)

    monkeypatch.setattr(Inference, "__init__", noted)
    report_savings(byte_model(), options, SIZES, ["all"], Console())
    line = capsys.readouterr().out.splitlines()[-1]
    record = json.loads(line)
    assert set(PARTS) < set(record)
    assert sum(not engine.kv.prefix_caching for engine in built) == 3 * 2
    assert sum(engine.runner.layout.cascade is None for engine in built) >= 2 * 2
    assert [row["tokens of the prompt"] for row in record["conversation"]] == [4, 12, 20]
    assert [(row["decodes"], row["tokens in common"]) for row in record["cascade"]] == [
        (2, 8),
        (2, 16),
        (3, 8),
        (3, 16),
    ]
    assert not any(row["packed"] for row in record["cascade"]), "packing saves too little at these sizes"
    *curve, last, peak = record["long_contexts"]
    # With a window of 12, chunks of 8 tokens and pages of 4, a window layer has at most (11 + 8) / 4 + 1 pages.
    full, windowed = (sum(w is window for w in built[0].kv.geometry.layer_windows) for window in (None, 12))
    assert (full, windowed) == (1, 1)
    assert [row["tokens of the first"] for row in curve] == [8, 16, 24, 32, 40, 48, 56, 61]
    assert [row["if all layers were full"] for row in curve] == [2 * pages for pages in (2, 4, 6, 8, 10, 12, 14, 16)]
    assert [row["pages, all layers together"] for row in curve] == [4, 8, 11, 13, 15, 17, 19, 21]
    assert (last["requests"], last["tokens of the first"]) == (1, 63)
    assert peak["requests"] == 2 and peak["if all layers were full"] <= 2 * 2 * 16
    assert peak["saved"] == pytest.approx(1 - peak["pages, all layers together"] / peak["if all layers were full"])

    plots = pytest.importorskip("benchmarks.plots")
    (tmp_path / "run.json").write_text("a table\n" + line + "\n", encoding="utf-8")
    plots.plot_savings([str(tmp_path / "run.json")], str(tmp_path / "run.png"))
    assert (tmp_path / "run.png").stat().st_size > 10_000


def test_an_unknown_part_is_rejected(options):
    with pytest.raises(ValueError, match="unknown parts: cascades; choose from common_prefix, "):
        report_savings(byte_model(), options, SIZES, ["cascade", "cascades"], Console())
