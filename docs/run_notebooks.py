"""Execute the notebooks of docs/notebooks on a CPU and keep their outputs.

python docs/run_notebooks.py            # all, in place; or the names of some
python docs/run_notebooks.py --check    # execute copies, and leave the files as they are

Needs the extra ``docs`` (nbclient, ipykernel). A notebook has 60 seconds on an idle machine; ``--limit`` is the time
after which it is stopped.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient


FOLDER = Path(__file__).parent / "notebooks"
LARGEST = 200_000  # bytes of a notebook with its outputs


def execute(path: Path, limit: int) -> nbformat.NotebookNode:
    """Return a notebook with the outputs of a run in an empty folder."""
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(notebook, timeout=limit, resources={"metadata": {"path": folder}}).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times of this run
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if not (o.output_type == "stream" and o.name == "stderr")]
            cell.outputs = [
                o for o in cell.outputs if "application/vnd.jupyter.widget-view+json" not in o.get("data", {})
            ]
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    return notebook


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="by default all")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--limit", type=int, default=600)
    args = parser.parse_args()
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    for path in sorted(FOLDER.glob("*.ipynb")):
        if args.names and path.stem not in args.names:
            continue
        started = time.perf_counter()
        notebook = execute(path, args.limit)
        size = len(nbformat.writes(notebook))
        if size > LARGEST:
            print(f"{path.name}: {size} bytes with its outputs, expected at most {LARGEST}")
            return 1
        if not args.check:
            nbformat.write(notebook, path)
        print(f"{path.name}: {time.perf_counter() - started:.0f} s, {size} bytes", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
