"""README.md and its picture from nbs/index.ipynb: its code cells are run, so that every number in the prose comes from a committed file.

The start page's picture is the one that the lesson ends with.

usage: python docs/readme.py [--check]"""
import ast
import base64
import re
import sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
PICTURE = "figures/tour/one_hip.jpg"


def directives(source: str) -> set[str]:
    "The words after `#|` at the head of a cell."
    return {line[2:].strip() for line in source.splitlines() if line.startswith("#|")}


def run_cell(source: str, scope: dict):
    "Run a cell; the value of its last line if that is an expression."
    *body, last = ast.parse(source).body
    if not isinstance(last, ast.Expr): body, last = [*body, last], None
    exec(compile(ast.Module(body, []), "nbs/index.ipynb", "exec"), scope)
    return last and eval(compile(ast.Expression(last.value), "nbs/index.ipynb", "eval"), scope)


def render(root: Path = ROOT) -> str:
    "The start page as Markdown, its links relative to the repository."
    parts, scope = [], {}
    for cell in nbformat.read(root / "nbs" / "index.ipynb", 4).cells:
        if cell.cell_type == "markdown": parts.append(cell.source)
        elif cell.source: parts.append(getattr(run_cell(cell.source, scope), "data", ""))
    text = "\n\n".join(p.strip() for p in parts if p.strip())
    return re.sub(r"\]\(\.\./", "](", text) + "\n"


def lesson_picture(root: Path = ROOT) -> bytes:
    "The JPEG in the lesson's cell that is tagged start-page."
    for cell in nbformat.read(root / "nbs" / "85_tour.ipynb", 4).cells:
        if "start-page" in cell.metadata.get("tags", []):
            for output in cell.outputs:
                if picture := output.get("data", {}).get("image/jpeg"): return base64.b64decode(picture)
    raise SystemExit("nbs/85_tour.ipynb has no picture in a cell tagged start-page: run the notebook and save it with its pictures")


def main(argv: list[str]) -> int:
    "Write README.md, or with --check say whether it is what it should be."
    made = {ROOT / "README.md": render().encode(), ROOT / PICTURE: lesson_picture()}
    stale = [path for path, content in made.items() if not path.exists() or path.read_bytes() != content]
    for path in stale:
        name = path.relative_to(ROOT)
        if "--check" in argv: print(f"{name} is not what the notebooks say: run python docs/readme.py", file=sys.stderr)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content := made[path])
            print(f"{name}: {len(content)} bytes")
    return 1 if stale and "--check" in argv else 0


if __name__ == "__main__": raise SystemExit(main(sys.argv[1:]))
