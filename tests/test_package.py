"""Properties of the whole package: its imports have no side effects, and point one way."""

import ast
import io
import subprocess
import sys
import tokenize
from pathlib import Path

import flex_nano_vllm

PACKAGE = Path(flex_nano_vllm.__file__).parent
# Levels of modules. A module may import only modules of earlier levels.
ORDER = [
    ["masks", "sampling_params", "prefix_cache", "compiling", "grammar", "detokenizer"],
    ["geometry", "outputs", "pruning"],
    ["device", "linear", "sequence", "probe"],
    ["models", "page_table", "policies"],
    ["kv_manager", "gather"],
    ["scheduler", "cascade"],
    ["step", "invariants", "output_processor", "logprobs"],
    ["attention", "sampler"],
    ["memory", "patching"],
    ["input_processor", "runner"],
    ["warmup"],
    ["inference"],
    ["async_inference", "llm"],
    ["__init__"],
    ["server_tools"],
    ["server_protocol"],
    ["server_guard"],
    ["server_chat"],
    ["server_responses"],
    ["server"],
    ["cli"],
]


# The modules on the way of a token. They should be read in an evening.
CORE = [
    *("scheduler", "kv_manager", "page_table", "prefix_cache", "geometry", "masks", "step", "cascade", "attention"),
    *("patching", "compiling", "runner", "sampler", "sequence", "inference"),
]


def code_lines(source: str) -> int:
    """Return the number of lines with code: neither blank lines nor comments nor docstrings."""
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in (tokenize.NAME, tokenize.OP, tokenize.NUMBER, tokenize.STRING):
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            lines -= {*range(node.body[0].lineno, node.body[0].end_lineno + 1)}
    return len(lines)


def test_the_package_is_small():
    assert code_lines('"""Doc."""\n\nx = 1  # why\n# a comment\ny = f(\n    x,\n)\n') == 4
    assert len([*PACKAGE.glob("*.py")]) <= 42
    sizes = {name: code_lines((PACKAGE / f"{name}.py").read_text(encoding="utf-8")) for name in CORE}
    assert sum(sizes.values()) <= 1850, sizes


def test_importing_the_package_has_no_side_effects():
    """The import prints nothing, does not initialize CUDA, compiles nothing, and does not change torch's settings.

    Only benchmarks need pandas, and only the command line needs rich.
    """
    program = """
import sys, torch, torch._dynamo
from torch._dynamo.utils import counters
limit = torch._dynamo.config.recompile_limit
import flex_nano_vllm
assert not torch.cuda.is_initialized()
assert not counters["stats"]
assert torch._dynamo.config.recompile_limit == limit
assert torch.is_grad_enabled()
assert not {"pandas", "rich", "typer", "matplotlib"} & {*sys.modules}
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_modules_import_only_modules_of_earlier_levels():
    rank = {name: level for level, names in enumerate(ORDER) for name in names}
    assert set(rank) == {path.stem for path in PACKAGE.glob("*.py")}
    for path in PACKAGE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            modules = names if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                modules = [f"{node.module}.{name}" for name in names]
            for module in modules:
                top, _, rest = module.partition(".")
                assert top not in ("benchmarks", "examples", "tests"), f"{path.name} imports {module}"
                imported = rest.partition(".")[0]
                if top == "flex_nano_vllm" and imported in rank:
                    assert rank[imported] < rank[path.stem], f"{path.name} imports {imported}"
