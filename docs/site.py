"""The pages of this repository as a site: `make docs` writes it to site/html.

README, docs/, the decisions, the changelog, the package's source files, configs/ and launch/ become
pages of one folder, site/pages, in which every relative link leads to a page. zensical builds that
folder; a warning is an error.
"""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SITE = ROOT / "site"
PAGES = SITE / "pages"
LINK = re.compile(r"\]\(([^)\s:]+?)(#[^)\s]*)?\)")
TEXT = {".py": "python", ".sh": "bash", ".yaml": "yaml", ".txt": "text", ".json": "json"}


def written() -> dict[Path, Path]:
    """File of the repository -> its page, for what is written as a page already."""
    found = {ROOT / "README.md": PAGES / "index.md"}
    for name in ("BUILD_NOTES.md", "CHANGELOG.md", "CONTRIBUTING.md"):
        found[ROOT / name] = PAGES / name
    docs = ROOT / "docs"
    return found | {page: PAGES / page.relative_to(docs) for page in sorted(docs.rglob("*.md"))}


def sources() -> dict[Path, Path]:
    """File or folder of the package, or one that a page may link to -> its page."""
    found = {}
    for top in ("sdpo_jax", "configs", "launch"):
        for path in sorted([ROOT / top, *(ROOT / top).rglob("*")]):
            place = PAGES / "source" / path.relative_to(ROOT)
            if path.is_dir() and path.name != "__pycache__":
                found[path] = place / "index.md"
            elif path.suffix in TEXT:
                found[path] = place.with_name(path.name.replace(".", "-") + ".md")
    return found


def first_line(path: Path) -> str:
    """What a module's docstring begins with."""
    if path.is_dir():
        path = path / "__init__.py"
    if path.suffix != ".py" or not path.exists():
        return ""
    return (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0]


def contents(path: Path) -> str:
    """Links to the lines of a module's functions and classes."""
    if path.suffix != ".py":
        return ""
    kinds = (ast.FunctionDef, ast.ClassDef)
    defined = [node for node in ast.parse(path.read_text()).body if isinstance(node, kinds)]
    links = [f"[`{node.name}`](#__codelineno-0-{node.lineno})" for node in defined]
    return " · ".join(links) + "\n\n"


def source_page(path: Path, pages: dict[Path, Path]) -> str:
    """A file's text, or a folder's files with what each is for."""
    title = f"---\nhide: [toc]\n---\n\n# `{path.relative_to(ROOT)}`\n\n"
    if path.is_file():
        fence = f'``````{TEXT[path.suffix]} linenums="1"'
        text = f"{fence}\n{path.read_text().rstrip()}\n``````\n"
        return title + contents(path) + text
    rows = ["| file | what it is for |", "|---|---|"]
    for child in sorted(path.iterdir(), key=lambda child: (child.is_file(), child.name)):
        if child in pages:
            link = os.path.relpath(pages[child], pages[path].parent)
            rows.append(f"| [`{child.name}`]({link}) | {first_line(child)} |")
    return title + "\n".join(rows) + "\n"


def relinked(path: Path, pages: dict[Path, Path]) -> str:
    """The text of a page with its links as they are in the site.

    A file that has no page (a picture, a table of results) is copied beside the pages.
    """
    here = pages[path].parent

    def link(match: re.Match) -> str:
        target, anchor = match[1], match[2] or ""
        there = (path.parent / target).resolve()
        if there not in pages and there.is_file():
            pages[there] = PAGES / "files" / there.relative_to(ROOT)
            pages[there].parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(there, pages[there])
        if there not in pages:
            raise SystemExit(f"{path}: found a link to {target}, expected a file or a page")
        return f"]({os.path.relpath(pages[there], here)}{anchor})"

    return LINK.sub(link, path.read_text())


def main() -> None:
    shutil.rmtree(PAGES, ignore_errors=True)
    own, code = written(), sources()
    pages = own | code
    texts = {pages[path]: relinked(path, pages) for path in own}
    texts |= {code[path]: source_page(path, code) for path in code}
    for page, text in texts.items():
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(text)
    shutil.copy(ROOT / "docs" / "zensical.toml", SITE)
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean"]
    sys.exit(subprocess.run(command, cwd=SITE, check=False).returncode)


if __name__ == "__main__":
    main()
