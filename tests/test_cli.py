"""The commands `flex-nano-vllm chat | serve | bench`."""

import json
import sys
from contextlib import contextmanager

import pytest
from rich.console import Console
from serving import MODEL, new_engine, serving
from typer.testing import CliRunner

from benchmarks import serving as bench
from flex_nano_vllm import cli

SUM, WORDS = "What is 17 plus 8?", "Reverse these words: lamp key drum boat."


def chat(text, *options):
    return CliRunner().invoke(cli.app, ["chat", "--max-seq-length", "256", *options], input=text)


def test_lines_of_piped_input_are_answered_one_after_another():
    result = chat(f"{SUM}\n\n/new\n{WORDS}\n/exit\n{SUM}\n")
    assert (result.exit_code, result.stdout) == (0, "25.\nboat drum key lamp.\n")


def test_a_turn_that_is_too_long_prints_the_reason_and_the_chat_continues():
    result = chat(f"{'long ' * 300}\n{SUM}\n")
    assert result.exit_code == 0
    error, answer = result.stdout.rsplit("\n", 2)[:2]
    assert "maximum context length is 256 tokens" in error.replace("\n", " ") and answer == "25."


def test_a_new_conversation_does_not_contain_the_previous_one(monkeypatch):
    conversations = []
    stream_chat = cli.Inference.stream_chat

    def noted(self, messages, params):
        conversations.append([message["content"] for message in messages])
        return stream_chat(self, messages, params)

    monkeypatch.setattr(cli.Inference, "stream_chat", noted)
    chat(f"{SUM}\n{SUM}\n/new\n{SUM}\n")
    assert conversations == [[SUM], [SUM, "25.", SUM], [SUM]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--temperature", "3"], "temperature must be a number in [0, 2]"),
        (["--model", "/no/such/folder"], "/no/such/folder"),
        (["--max-seq-length", "1"], "max_seq_length must be"),
    ],
)
def test_invalid_options_are_reported_without_a_traceback(options, message):
    result = CliRunner().invoke(cli.app, ["chat", *options], input="")
    assert result.exit_code == 1 and "Traceback" not in result.output
    assert message in str(result.exception) + result.output


def test_serve_has_the_servers_options(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["flex-nano-vllm", "serve", "--help"])
    monkeypatch.setattr(cli.app, "registered_commands", list(cli.app.registered_commands))
    with pytest.raises(SystemExit, match="0"):
        cli.main()
    shown = capsys.readouterr().out
    assert "--api-key" in shown and "--policy" in shown and "--drain-timeout" in shown


def test_serve_names_the_missing_extra(monkeypatch, capsys):
    for module in ("fastapi", "flex_nano_vllm.server"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(sys, "argv", ["flex-nano-vllm", "serve", "--port", "1"])
    monkeypatch.setattr(cli.app, "registered_commands", list(cli.app.registered_commands))
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code not in (0, None)
    assert "flex-nano-vllm[serve]" in str(exit_.value.code) + capsys.readouterr().err
    with pytest.raises(SystemExit, match="serve"):
        bench.main()


def test_bench_measures_the_engine_and_the_server_with_and_without_streams(monkeypatch):
    @contextmanager
    def local_server(*arguments):
        with serving(new_engine(max_seq_length=512)) as server:
            yield server.port

    monkeypatch.setattr(bench, "server", local_server)
    monkeypatch.setattr(bench, "PROMPT_LENS", (2, 5))
    monkeypatch.setattr(bench, "OUTPUT_LENS", (2, 4))
    monkeypatch.setattr(bench.Inference, "from_pretrained", lambda model, **options: new_engine())
    console = Console(record=True, width=120)
    results = bench.bench(MODEL, num_requests=5, num_clients=3, repeats=2, console=console)
    json.dumps(results)
    assert {name: len(runs) for name, runs in results["runs"].items()} == {
        "offline": 2,
        "server": 2,
        "server, streams": 2,
    }
    by_kind = [runs[0] for runs in results["runs"].values()]
    assert len({(run["num_requests"], run["prompt_tokens"], run["output_tokens"]) for run in by_kind}) == 1
    assert results["runs"]["server, streams"][0]["ttft_p50_ms"] > 0
    assert "of offline" in console.export_text()


def test_bench_raises_if_the_server_answers_with_an_error(monkeypatch):
    @contextmanager
    def local_server(*arguments):
        with serving(new_engine(max_seq_length=64)) as server:
            yield server.port

    monkeypatch.setattr(bench, "server", local_server)
    roomy = dict(max_seq_length=512, n_pages=129)
    monkeypatch.setattr(bench.Inference, "from_pretrained", lambda model, **options: new_engine(**roomy))
    with pytest.raises(RuntimeError, match=r"the server answered[\s\S]*400"):
        bench.bench(MODEL, num_requests=1, num_clients=1, repeats=1, console=Console(quiet=True))
