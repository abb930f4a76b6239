"""The documentation site, in _docs/: the notebooks as pages, a card for every public name, the experiments' committed results, search. No network is
needed to read it, and none to build it but for one file of MathJax from npm.

usage: python docs/build.py"""
import ast
import builtins
import csv
import gzip
import html
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import nbformat

sys.path.insert(0, str(Path(__file__).parent))
from readme import ROOT, directives, render

SITE, BUILD = ROOT / "_docs", ROOT / "docs" / "_build"
MATHJAX = "3.2.2"
PRESETS = ("gpu", "evidence", "demo", "paper", "smoke")  # the first that was run is shown
GROUPS = {"0": "Volumes and rays", "1": "CT, calibration, physics", "2": "X-rays and cohorts", "3": "Segmentation and registration", "4": "Pairs",
          "5": "Models", "6": "Training", "7": "Measures", "8": "Experiments, commands", "9": "Making the shipped predictor"}


# ---- public names

def public_names(notebook) -> set[str]:
    "What a notebook exports and means to be used: no leading underscore."
    return {name for cell in notebook.cells if cell.cell_type == "code" and is_exported(cell) for name, _ in definitions(cell.source)}


def is_exported(cell) -> bool:
    return bool({"export", "exports", "exporti"} & directives(cell.source))


def definitions(source: str) -> list[tuple[str, ast.AST]]:
    "Public functions and classes of a cell; a patched method is named with its class."
    found = []
    for node in ast.parse(source).body:
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name.startswith("_"): continue
        patched = isinstance(node, ast.FunctionDef) and any(getattr(d, "id", None) in ("patch", "patch_property") for d in node.decorator_list)
        owner = ast.unparse(node.args.args[0].annotation) + "." if patched and node.args.args and node.args.args[0].annotation else ""
        found.append((owner + node.name, node))
    return found


def header(source: str, node) -> str:
    "The lines of a definition before its body, with their comments."
    lines, first = source.splitlines(), node.body[0]
    start = node.lineno - 1 - len(node.decorator_list)
    if first.lineno == node.lineno: return lines[node.lineno - 1][node.col_offset:first.col_offset].rstrip()
    return "\n".join(line[node.col_offset:] for line in lines[start:first.lineno - 1]).rstrip()


def card(source: str, module: str, name: str, node, level: int) -> str:
    "Heading, signature with the parameters' comments, docstring; for a class its fields and its public methods."
    shown = header(source, node)
    if isinstance(node, ast.ClassDef):
        lines = source.splitlines()
        body = [n for n in node.body if not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant))]
        for n in body:
            if isinstance(n, (ast.AnnAssign, ast.Assign)): shown += "\n" + "\n".join(lines[n.lineno - 1:n.end_lineno])
        for n in body:
            if isinstance(n, ast.FunctionDef) and not n.name.startswith("_"):
                doc = (ast.get_docstring(n) or "").split("\n")[0]
                shown += "\n\n" + "\n".join("    " + line for line in header(source, n).splitlines()) + (f'\n        "{doc}"' if doc else "")
    doc = ast.get_docstring(node) or ""
    return f"({module}.{name})=\n{'#'*level} {name}\n\n{doc}\n\n```python\n{shown}\n```"


# ---- pages

def page(path: Path, names: dict[str, str]):
    "A notebook as the site shows it; `names`: public name -> module."
    notebook = nbformat.read(path, 4)
    cells, module, level = [], None, 1
    for cell in notebook.cells:
        said = directives(cell.source) if cell.cell_type == "code" else set()
        exports = next((d.split()[1] for d in said if d.startswith("default_exp")), None)
        if exports: module = exports
        if exports or "hide" in said: continue
        if cell.cell_type == "markdown":
            headings = re.findall(r"^(#+) ", re.sub(r"```.*?```", "", cell.source, flags=re.S), re.M)
            level = len(headings[-1]) if headings else level
            cell.source = linked(cell.source, names, module)
            cells.append(cell)
        elif cell.cell_type == "code":
            body = "\n".join(line for line in cell.source.splitlines() if not line.startswith("#|")).strip()
            if not body: continue
            if is_exported(cell):
                if all(isinstance(n, (ast.Import, ast.ImportFrom)) for n in ast.parse(body).body): continue
                cards = [card(body, module, name, node, min(level + 1, 4)) for name, node in definitions(body)]
                cells += [nbformat.v4.new_markdown_cell(c) for c in cards]
                if cards or any(isinstance(n, (ast.FunctionDef, ast.ClassDef)) for n in ast.parse(body).body):
                    cell.metadata["tags"] = [*cell.metadata.get("tags", []), "hide-input"]
            cell.source = body
            cells.append(cell)
    notebook.cells = cells
    return notebook


def linked(text: str, names: dict[str, str], module: str | None = None) -> str:
    "Markdown with every public name in backticks turned into a link to its card, and the repository's paths into the site's."
    def link(match):
        name = match[1].removesuffix("()")
        return f"[`{match[1]}`](#{names[name]}.{name})" if name in names else match[0]
    parts = re.split(r"(```.*?```|\[[^\]]*\]\([^)]*\)|\$\$.*?\$\$)", text, flags=re.S)
    text = "".join(p if i % 2 else re.sub(r"(?<!`)`([A-Za-z_][\w.]*(?:\(\))?)`(?!`)", link, p) for i, p in enumerate(parts))
    text = re.sub(r"\$\$(.+?)\$\$", r"\n\n$$\n\1\n$$\n\n", text, flags=re.S)  # a formula of its own needs lines of its own
    return re.sub(r"\]\(\.\./", "](/", text)


def results(folder: Path, target: Path, here: str) -> list[str]:
    "What an experiment's folder of committed results holds, as Markdown: who made it, tables, pictures."
    manifest = folder / "manifest.json"
    about = json.loads(manifest.read_text(encoding="utf-8")) if manifest.exists() else {}
    target.mkdir(parents=True, exist_ok=True)
    out = ["## Results"]
    if about:
        out.append(f"Preset **{about['preset']}**, seed {about['seed']}, {about['wall_time_s']:.0f} s on {about['hardware']['cpu']} "
                   f"({about['hardware']['cores']} cores), commit `{(about['git_commit'] or 'unknown')[:10]}`.")
    for table in sorted([*folder.rglob("*.csv"), *folder.rglob("*.csv.gz")]):
        with (gzip.open if table.suffix == ".gz" else open)(table, "rt", newline="", encoding="utf-8") as f: rows = list(csv.reader(f))
        shutil.copyfile(table, target / table.name)
        name = table.name.split(".")[0]
        link = f"[{name}]({here}/{table.name})"
        if len(rows) > 60 or not rows: out.append(f"{link}: {max(len(rows) - 1, 0)} rows")
        else: out += [f"**{link}**", f'<div class="results table-scroll">{html_table(rows)}</div>']
    for picture in sorted(folder.rglob("*.png")):
        shutil.copyfile(picture, target / picture.name)
        out += [f"**{picture.stem}**", f"![{picture.stem}]({here}/{picture.name})"]
    return out


def html_table(rows: list[list[str]]) -> str:
    "Rows as a table; numbers to four digits."
    def show(x):
        try: return f"{float(x):.4g}"
        except ValueError: return html.escape(x)
    head, *body = rows
    return ("<table><thead><tr>" + "".join(f"<th>{html.escape(h)}</th>" for h in head) + "</tr></thead><tbody>"
            + "".join("<tr>" + "".join(f"<td>{show(x)}</td>" for x in row) + "</tr>" for row in body) + "</tbody></table>")


def api_page(modules: dict[str, tuple[str, list]]) -> str:
    "Every public name with the first line of what it says of itself, by module."
    out = ["# API", "Every public function and class. A name leads to its card: signature, parameters with shape and unit, source, and the checks beside it."]
    for module, (stem, entries) in modules.items():
        if not entries: continue
        out.append(f"## {module}\n\n`from bmd_xray.{module} import ...` · [notebook]({stem}.ipynb)\n")
        out.append("| | |\n|---|---|\n" + "\n".join(f"| [`{n}`](#{module}.{n}) | {doc.replace('|', '/')} |" for n, doc in entries))
    return "\n\n".join(out) + "\n"


def toctree(caption: str, pages: list[str]) -> str:
    return "```{toctree}\n:hidden:\n:caption: " + caption + "\n\n" + "\n".join(pages) + "\n```"


def prepare(source: Path, root: Path = ROOT) -> list[str]:
    "Write Sphinx's source of the site; the names of the pages."
    shutil.rmtree(source, ignore_errors=True)
    (source / "_static").mkdir(parents=True)
    shutil.copyfile(root / "docs" / "conf.py", source / "conf.py")
    shutil.copyfile(root / "docs" / "site.css", source / "_static" / "site.css")
    shutil.copyfile(root / "settings.ini", source.parent / "settings.ini")
    nbs = root / "nbs"
    library = sorted(p for p in nbs.glob("[0-9]*.ipynb"))
    experiments = sorted(p for p in nbs.glob("experiments/**/*.ipynb") if ".ipynb_checkpoints" not in p.parts)
    names, modules = {}, {}
    for path in library:
        notebook = nbformat.read(path, 4)
        module = next((d.split()[1] for c in notebook.cells if c.cell_type == "code" for d in directives(c.source) if d.startswith("default_exp")), None)
        if not module: continue
        entries = [(name, (ast.get_docstring(node) or "").split("\n")[0]) for c in notebook.cells if c.cell_type == "code" and is_exported(c)
                   for name, node in definitions("\n".join(line for line in c.source.splitlines() if not line.startswith("#|")))]
        modules[module] = (path.stem, entries)
        for name, _ in entries: names.setdefault(name, module)
    for shadowed in set(dir(builtins)) & set(names): del names[shadowed]
    for path in [*library, *experiments]:
        made, target = page(path, names), source / path.relative_to(nbs)
        target.parent.mkdir(parents=True, exist_ok=True)
        name = path.relative_to(nbs / "experiments").with_suffix("").as_posix() if path in experiments else path.stem.partition("_")[2]
        folders = [root / "figures" / p / name for p in PRESETS] if path in experiments else [root / "figures" / name]
        if (folder := next((f for f in folders if any(f.glob("*.json"))), None)) is not None:
            made.cells += [nbformat.v4.new_markdown_cell(part) for part in results(folder, target.with_suffix(""), target.stem)]
        nbformat.write(made, target)
    lessons = [p.stem for p in library if p.stem not in {s for s, _ in modules.values()}]
    rest = [p.stem for p in library if p.stem not in lessons]
    trees = [toctree("Start", lessons)] if lessons else []
    trees += [toctree(caption, pages) for digit, caption in GROUPS.items() if (pages := [s for s in rest if s[0] == digit])]
    if experiments: trees.append(toctree("Experiments", [p.relative_to(nbs).with_suffix("").as_posix() for p in experiments]))
    prose = [p for p in ("CONTRIBUTING", "CHANGELOG") if (root / f"{p}.md").exists()]
    trees.append(toctree("Reference", ["api", *prose]))
    start = render(root)
    for picture in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", start):
        (source / picture).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(root / picture, source / picture)
    start = re.sub(r"\]\((nbs/)", "](/", start)
    start = re.sub(r"\[([^\]]*)\]\((CITATION\.cff|LICENSE)\)", r"`\1`", start)
    (source / "index.md").write_text(linked(start, names) + "\n\n" + "\n\n".join(trees) + "\n", encoding="utf-8")
    (source / "api.md").write_text(api_page(modules), encoding="utf-8")
    for p in prose:
        text = re.sub(r"\]\((nbs/)", "](/", (root / f"{p}.md").read_text(encoding="utf-8"))
        (source / f"{p}.md").write_text(linked(text, names), encoding="utf-8")
    return ["index", "api", *lessons, *rest, *[p.relative_to(nbs).with_suffix("").as_posix() for p in experiments], *prose]


# ---- the site

def fetch_mathjax(target: Path) -> bool:
    "MathJax's one file from npm, kept in docs/_build for the next time."
    kept = BUILD / f"tex-svg-{MATHJAX}.js"
    if not kept.exists():
        npm = shutil.which("npm")
        if not npm: return False
        with tempfile.TemporaryDirectory() as tmp:
            done = subprocess.run([npm, "pack", f"mathjax@{MATHJAX}", "--silent"], cwd=tmp, capture_output=True, text=True)
            packed = Path(tmp) / f"mathjax-{MATHJAX}.tgz"
            if done.returncode or not packed.exists():
                print(done.stderr.strip().splitlines()[-1:] or "npm pack failed", file=sys.stderr)
                return False
            with tarfile.open(packed) as archive: data = archive.extractfile("package/es5/tex-svg.js").read()
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_bytes(data)
    shutil.copyfile(kept, target)
    return True


def main() -> int:
    source = BUILD / "source"
    pages = prepare(source)
    remote = []
    if not fetch_mathjax(source / "_static" / "tex-svg.js"):
        cdn = f"https://cdn.jsdelivr.net/npm/mathjax@{MATHJAX}/es5/tex-svg.js"
        print(f"npm did not give mathjax@{MATHJAX}: formulas will be drawn from {cdn}, so reading the site needs a network; install npm and build again "
              "for a site that needs none", file=sys.stderr)
        remote = ["-D", f"mathjax_path={cdn}"]
    shutil.rmtree(SITE, ignore_errors=True)
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-E", "-d", str(BUILD / "doctrees"), *remote, "-b", "html", str(source), str(SITE)]
    code = subprocess.run(command, env={**os.environ, "PYTHONWARNINGS": "ignore"}).returncode
    if code: return code
    size = sum(f.stat().st_size for f in SITE.rglob("*") if f.is_file())
    print(f"{len(pages)} pages, {size/2**20:.1f} MB: {SITE / 'index.html'}")
    return 0


if __name__ == "__main__": raise SystemExit(main())
