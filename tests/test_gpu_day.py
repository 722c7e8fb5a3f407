"""The day on a GPU resumes, keeps to its time, and calls programs with options that they have. No GPU is needed."""

import fcntl
import json
from dataclasses import replace

import pytest
import typer
from rich.console import Console
from transformers import HfArgumentParser

import benchmark
import benchmark_vllm
from benchmarks import gpu_day, switches
from benchmarks.gpu_day import PARTS, Day, Part, run_parts

# Each one notes that it ran.
NOTE = """
import json, pathlib, sys
notes = pathlib.Path(sys.argv[1])
notes.open("a").write(pathlib.Path(sys.argv[0]).stem + " ")
"""
PROGRAMS = {
    "succeeding": NOTE + """print('first\\n{"results": {"output_tokens_per_s": 1234.5}}\\nlast')""",
    "failing_once": NOTE + "sys.exit(3 if notes.read_text().count('failing_once') < 2 else 0)",
    "never_ends": """
import fcntl, signal, subprocess, sys
lock = open(sys.argv[1], "a")
fcntl.flock(lock, fcntl.LOCK_EX)
subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"], pass_fds=[lock.fileno()])
print("the last words", flush=True)
signal.pause()
""",
}


@pytest.fixture
def day(tmp_path, monkeypatch):
    """A day on a GPU called "a GPU", with PROGRAMS as modules."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, text in PROGRAMS.items():
        (programs / f"{name}.py").write_text(text, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(programs))
    monkeypatch.setattr(gpu_day, "device_name", lambda device: "a GPU")
    (tmp_path / "output").mkdir()
    return Day(tmp_path / "output", "gemma-2-2b", gpu_day.sys.executable, None)


def parts(*names: str) -> list[Part]:
    return [Part(name, 1, name + " {output}/notes") for name in names]


def notes(day: Day) -> list[str]:
    return (day.output / "notes").read_text(encoding="utf-8").split()


def test_a_second_run_repeats_only_what_failed(day):
    both, console = parts("failing_once", "succeeding"), Console(quiet=True)
    assert run_parts(day, both, 5, console) == 1
    assert day.record("failing_once")["exit_status"] == 3 and day.record("succeeding")["status"] == "done"
    assert run_parts(day, both, 5, console) == 0
    assert run_parts(day, both, 5, console) == 0
    assert notes(day) == ["failing_once", "succeeding", "failing_once"]
    assert not list(day.output.glob("*.partial"))


def test_a_record_has_the_result_the_command_and_the_last_lines(day):
    run_parts(day, parts("succeeding"), 5, Console(quiet=True))
    record = json.loads((day.output / "succeeding.json").read_text(encoding="utf-8"))
    assert record["result"] == {"results": {"output_tokens_per_s": 1234.5}}
    assert record["command"][1:] == ["-m", "succeeding", f"{day.output}/notes"]
    assert (record["device"], record["last_lines"][0], record["last_lines"][-1]) == ("a GPU", "first", "last")
    assert set(record["versions"]) == {"flex-nano-vllm", "torch", "transformers"} and record["seconds"] > 0


def test_a_result_of_another_device_or_command_is_not_reused(day):
    (part,) = parts("succeeding")
    run_parts(day, [part], 5, Console(quiet=True))
    assert day.is_done(part)
    assert not replace(day, pretend="RTX 3090").is_done(part)
    assert not day.is_done(replace(part, arguments=part.arguments + " more"))


def test_a_part_that_may_not_fit_into_the_time_left_does_not_start(day):
    long, short = replace(parts("failing_once")[0], minutes=9), parts("succeeding")[0]
    console = Console(record=True, quiet=True, width=200)
    assert run_parts(day, [long, short], 5, console) == 0
    assert len(notes(day)) == 1 and day.record("failing_once") == {} and day.is_done(short)


def test_a_part_out_of_time_is_killed_with_its_processes_and_is_unfinished(day):
    part = Part("never_ends", 0, "never_ends {output}/lock")
    assert run_parts(day, [part], 1 / 30, Console(quiet=True)) == 0
    with (day.output / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # waits forever if a process of the part is alive
    assert day.record("never_ends")["status"] == "out of time" and not day.is_done(part)


def test_a_share_of_a_pool_needs_the_part_that_had_the_pool(day):
    part = next(part for part in PARTS if part.name == "workload-90")
    assert day.obstacle(part) == "needs the result of workload"
    record = {"result": {"settings": {"n_pages": 2049}}}
    (day.output / "workload.json").write_text(json.dumps(record), encoding="utf-8")
    assert day.obstacle(part) is None
    assert day.command(part)[-2:] == ["--n_pages", "1844"]


def test_vllm_is_skipped_where_it_is_not_installed(day, monkeypatch):
    vllm = Part("vllm", 1, "benchmark_vllm")
    monkeypatch.setattr(gpu_day, "HAS_VLLM", "import sys; sys.exit(1)")
    assert day.obstacle(vllm).startswith("vllm is not installed for")
    monkeypatch.setattr(gpu_day, "HAS_VLLM", "")
    assert day.obstacle(vllm) is None


@pytest.mark.parametrize("pretend", [None, "RTX 3090"])
def test_every_part_calls_a_program_with_options_that_it_has(day, pretend):
    day = replace(day, pretend=pretend)
    record = {"result": {"settings": {"n_pages": 2049}}}
    (day.output / "workload.json").write_text(json.dumps(record), encoding="utf-8")
    options = {"benchmark": benchmark.Options, "benchmark_vllm": benchmark_vllm.Options}
    app = typer.Typer()
    app.command()(switches.main)
    for part in PARTS:
        module, *arguments = day.command(part)[2 if pretend is None else 4 :]
        if module in options:
            (parsed,) = HfArgumentParser(options[module]).parse_args_into_dataclasses(arguments)
            parsed.fill_in("cuda")
        elif module == "benchmarks.switches":
            typer.main.get_command(app).make_context("switches", arguments)
        else:
            assert (part.name, module) == ("tests", "pytest")


def test_an_unknown_part_is_named_before_anything_runs(tmp_path):
    with pytest.raises(SystemExit, match="no part is called nonsense: the parts are tests, exact-float32,"):
        gpu_day.main(output=tmp_path / "output", only="tests,nonsense")
    assert not (tmp_path / "output").exists()


def test_without_a_gpu_nothing_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_day.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="there is no CUDA device"):
        gpu_day.main(output=tmp_path / "output", only="")
    assert not (tmp_path / "output").exists()
