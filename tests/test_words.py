"""Plain English: no sentence of the project is about an unnamed person where it means a sequence or a page."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CODE = ("flex_nano_vllm", "benchmarks", "tests", "examples", ".")
FILES = [
    *(path for folder in CODE for path in sorted((ROOT / folder).glob("*.py"))),
    *(path for folder in (".", "docs", "flex_nano_vllm") for path in sorted((ROOT / folder).glob("*.md"))),
    ROOT / "flex_nano_vllm" / "page.html",
    ROOT / "notebooks" / "tour.ipynb",
]
UNNAMED = re.compile(r"\b(some|any|no|every)(body|one)\b|\b(no one|who|whom|whoever|whosoever)\b", re.IGNORECASE)
# Prompts and other data, which contain such words.
DATA = ["Who has what?", "{{ nobody() }}", '"nobody"', "the-key-that-nobody-logs"]


def unnamed_persons(text: str) -> list[str]:
    for data in DATA:
        text = text.replace(data, "")
    return [line.strip() for line in text.splitlines() if UNNAMED.search(line)]


@pytest.mark.parametrize("path", [path for path in FILES if path != Path(__file__)], ids=lambda path: path.name)
def test_a_file_names_its_subjects(path):
    assert unnamed_persons(path.read_text(encoding="utf-8")) == []


def test_an_unnamed_subject_is_found():
    assert unnamed_persons("pages that nobody uses\nfree pages\nWho has what?") == ["pages that nobody uses"]
