"""Single cells of the notebooks, run on their own."""

import json
from typing import Any

from srlib.run.stages import NOTEBOOKS


def run_cells(notebook: str, scope: dict[str, Any], *holding: str) -> dict[str, Any]:
    """Run the code cells that hold these texts, one for each, as if `scope` were what came before; returns the names."""
    cells = json.loads((NOTEBOOKS / f"{notebook}.ipynb").read_text(encoding="utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    for text in holding:
        (source,) = [source for source in sources if text in source]
        exec(compile(source, f"{notebook}: {text}", "exec"), scope)
    return scope
