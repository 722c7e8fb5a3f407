"""The README's snippets run as pasted and print the output below them. Links to files are not broken."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"


SNIPPETS = re.findall(r"```python\n(.*?)```\n```text\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.compiled
@pytest.mark.parametrize(("snippet", "shown"), SNIPPETS, ids=("in a notebook", "shared pages", "sampling"))
def test_a_snippet_prints_the_output_in_the_readme(snippet, shown, capsys):
    exec(compile(snippet, "README.md", "exec"), {})
    assert capsys.readouterr().out == shown


def test_links_to_files_are_not_broken():
    targets = re.findall(r"\]\(([^)#:]+)\)", README.read_text(encoding="utf-8"))
    assert targets
    assert [target for target in targets if not (README.parent / target).exists()] == []
