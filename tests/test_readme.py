"""The README's snippet runs as pasted and prints what stands below it; its links lead somewhere."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"


SNIPPETS = re.findall(r"```python\n(.*?)```\n```text\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.compiled
@pytest.mark.parametrize(("snippet", "shown"), SNIPPETS, ids=("in a notebook", "what is shared", "sampling"))
def test_snippet_prints_what_the_readme_shows(snippet, shown, capsys):
    exec(compile(snippet, "README.md", "exec"), {})
    assert capsys.readouterr().out == shown


def test_links_to_files_are_not_broken():
    targets = re.findall(r"\]\(([^)#:]+)\)", README.read_text(encoding="utf-8"))
    assert targets
    assert [target for target in targets if not (README.parent / target).exists()] == []
