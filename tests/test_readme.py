"""The snippets of README and docs run as pasted and print the output below them. Commands and links are valid."""

import ast
import dataclasses
import re
from pathlib import Path

import pytest
import typer

import benchmark
import benchmark_vllm
from benchmarks import gpu_day, serving, switches
from examples import model_survey, train_tiny_gemma2
from flex_nano_vllm import cli, server

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
DOCUMENTS = sorted(
    path for folder in (".", "docs", "flex_nano_vllm/tiny_gemma2") for path in (ROOT / folder).glob("*.md")
)
HISTORY = ("log", "CHANGELOG")  # documents that name what existed at a time
TEXTS = {path: path.read_text(encoding="utf-8") for path in DOCUMENTS}

SNIPPETS = [
    pytest.param(
        path,
        *pair,
        id=f"{path.stem}-{number}",
        marks=[] if re.search(r"compile=False|enforce_eager=True", pair[0]) else pytest.mark.compiled,
    )
    for path, text in TEXTS.items()
    for number, pair in enumerate(re.findall(r"```python\n(.*?)```\n```text\n(.*?)```", text, re.DOTALL))
]


@pytest.mark.parametrize(("path", "snippet", "shown"), SNIPPETS)
def test_a_snippet_prints_the_output_in_its_document(path, snippet, shown, capsys):
    exec(compile(snippet, path.name, "exec"), {})
    assert capsys.readouterr().out == shown


def test_every_python_snippet_runs():
    assert len(SNIPPETS) == sum(text.count("```python\n") for text in TEXTS.values()) >= 5


def test_the_readme_has_at_most_180_lines():
    assert len(TEXTS[README].splitlines()) <= 180


# Links


def anchors(path: Path) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a document."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", TEXTS[path], flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(path: Path, text: str) -> list[str]:
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    broken = []
    for link in links:
        if re.match(r"https?:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    return broken


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.stem)
def test_relative_links_and_anchors_exist(path):
    assert broken_links(path, TEXTS[path]) == []


def test_a_broken_link_is_found():
    text = "[a](docs/limits.md) [b](docs/no.md) [c](#try-it) [d](#no) [e](docs/limits.md#models) [f](docs/limits.md#no)"
    assert broken_links(README, text) == ["docs/no.md", "#no", "docs/limits.md#no"]


def test_the_readme_links_every_document():
    assert {path for path in DOCUMENTS if path.parent.name == "docs"} <= {
        (ROOT / link.partition("#")[0]).resolve() for link in re.findall(r"\]\(([^)\s]+)\)", TEXTS[README])
    }


# Names and figures


def test_every_module_is_in_the_module_table_once():
    table = TEXTS[ROOT / "docs" / "architecture.md"].partition("## Modules")[2].partition("\n## ")[0]
    for folder in ("flex_nano_vllm", "benchmarks", "examples"):
        linked = re.findall(rf"\(\.\./{folder}/(\w+)\.py\)", table)
        modules = {path.stem for path in (ROOT / folder).glob("*.py")} - {"__init__"}
        assert sorted(linked) == sorted(modules)


def test_methods_in_the_documents_exist():
    """A method is written `Class.method`, where the class may be of this package or of another one."""
    members: dict[str, set[str]] = {}
    bases: dict[str, list[str]] = {}
    for module in (ROOT / "flex_nano_vllm").glob("*.py"):
        for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                members[node.name] = {item.name for item in node.body if isinstance(item, ast.FunctionDef)}
                fields = [item.target for item in node.body if isinstance(item, ast.AnnAssign)]
                members[node.name].update(field.id for field in fields)
                bases[node.name] = [base.id for base in node.bases if isinstance(base, ast.Name)]
    named = re.findall(r"`([A-Z]\w+)\.(\w+)", "".join(TEXTS[path] for path in DOCUMENTS if path.stem not in HISTORY))
    ours = [(owner, name) for owner, name in named if owner != "BlockMask"]
    assert len(ours) > 20
    of_class = {name: members[name].union(*(members.get(base, ()) for base in bases[name])) for name in members}
    assert [pair for pair in ours if pair[1] not in of_class.get(pair[0], ())] == []


def test_figures_of_the_readme_are_those_of_the_results():
    rows = re.findall(r"^\|.*\d.*\|$", TEXTS[README], re.MULTILINE)
    figures = [row for row in rows if ".py" not in row]  # the other rows name files
    assert len(figures) == 9
    assert [row for row in figures if row not in TEXTS[ROOT / "docs" / "results.md"].splitlines()] == []


# Commands


def dataclass_options(options: type) -> set[str]:
    names = [field.name for field in dataclasses.fields(options)]
    return {f"--{name}" for name in names} | {f"--no_{name}" for name in names} | {"--help"}


def typer_options(function) -> set[str]:
    app = typer.Typer()
    app.command()(function)
    parameters = typer.main.get_command(app).params
    return {option for parameter in parameters for option in (*parameter.opts, *parameter.secondary_opts)} | {"--help"}


OPTIONS = {
    "benchmark.py": dataclass_options(benchmark.Options),
    "benchmark_vllm.py": dataclass_options(benchmark_vllm.Options),
    "examples.train_tiny_gemma2": dataclass_options(train_tiny_gemma2.Options),
    "flex-nano-vllm chat": typer_options(cli.chat),
    "benchmarks.serving": typer_options(serving.main),
    "benchmarks.gpu_day": typer_options(gpu_day.main),
    "benchmarks.gpu_kernels": {
        "--dtype",
        "--gpus",
        "--models",
        "--all-kernels",
    },  # needs triton
    "benchmarks.pretended_gpu": set(),  # nor is this one; its options are those of another program
    "examples.model_survey": typer_options(model_survey.main),
    "benchmarks.switches": typer_options(switches.main),
    "flex-nano-vllm serve": typer_options(server.serve),
    "flex_nano_vllm.server": typer_options(server.serve),
}


def commands(text: str) -> list[str]:
    """Return the commands in shell blocks and in inline code that run a program of this repository or a tool."""
    blocks = "".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL))
    inline = re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    lines = [*re.sub(r" # .*", "", blocks).splitlines(), *(code.replace("\n", " ") for code in inline)]
    return [
        line for line in lines if re.match(r"([A-Z_]+=\S+ )?(uv run |\S*/bin/|(benchmark|flex-nano-vllm)\S* )", line)
    ]


def unknown_options(command: str) -> list[str]:
    """Return the options of a command that its program does not have, or the command if the program is unknown."""
    if re.search(r" (pytest|pre-commit)( |$)", command):
        return []
    program = next((name for name in OPTIONS if re.search(rf"(^|[ /]){re.escape(name)}( |$)", command)), None)
    if program is None:
        return [command]
    words = command.partition(program)[2].split()
    return [word for word in words if word.startswith("--") and word not in OPTIONS[program]]


@pytest.mark.parametrize("path", [path for path in DOCUMENTS if path.stem not in HISTORY], ids=lambda path: path.stem)
def test_commands_use_existing_programs_and_options(path):
    found = commands(TEXTS[path])
    assert found or "```bash" not in TEXTS[path]
    assert [(command, unknown) for command in found if (unknown := unknown_options(command))] == []


def test_an_unknown_option_and_an_unknown_program_are_found():
    block = "```bash\nuv run benchmark.py --no_chek  # --no\nuv run serving.py\n```\n"
    found = [unknown_options(command) for command in commands(block + "`flex-nano-vllm chat --no-compile --top_p 1`")]
    assert found == [["--no_chek"], ["uv run serving.py"], ["--top_p"]]
