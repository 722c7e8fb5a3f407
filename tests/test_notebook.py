"""The notebook runs unchanged, and prints its saved outputs."""

import json
from pathlib import Path

NOTEBOOK = Path(__file__).parent.parent / "notebooks" / "tour.ipynb"


def test_every_cell_prints_its_saved_output(capsys):
    namespace = {}
    for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), "tour.ipynb", "exec"), namespace)
            assert capsys.readouterr().out == "".join(line for output in cell["outputs"] for line in output["text"])
