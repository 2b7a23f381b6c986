"""What the documentation takes from the rest of the repository, and how blocks are marked.

`mkdocs.yml` names this file. Links that lead out of docs/ on a disk lead to pages here.
"""

import re
from pathlib import Path, PurePosixPath

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
PAGES = {
    "recipes/README.md": "recipes/index.md",
    "benchmarks/RESULTS.md": "benchmarks.md",
    "CHANGELOG.md": "changelog.md",
}


def on_files(files, config):
    sources = {**PAGES, **{f"recipes/{p.name}": f"recipes/{p.stem}.md" for p in recipes()}}
    for source, page in sources.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        if source.endswith(".py"):
            text = f"# {Path(source).name}\n\n```python\n{text}```\n"
        files.append(File.generated(config, page, content=text))
    for picture in sorted((ROOT / "recipes" / "pictures").glob("*.png")):
        path = f"recipes/pictures/{picture.name}"
        files.append(File.generated(config, path, abs_src_path=str(picture)))
    return files


def recipes():
    return sorted((ROOT / "recipes").glob("*.py"))


def on_page_markdown(markdown, page, config, files):
    """Give blocks a title for the file that they are; the mark of those that tests run goes."""
    markdown = re.sub(r"^```(\w+) run$", r"```\1", markdown, flags=re.MULTILINE)
    markdown = re.sub(r"^```(\w+) ([\w.]+)$", r'```\1 title="\2"', markdown, flags=re.MULTILINE)
    here = PurePosixPath(page.file.src_uri).parent

    def page_of(match):
        target = match[1]
        source = (here / target).as_posix().removeprefix("../")
        if here.as_posix() == "recipes" and target.endswith(".py"):
            return f"]({target.removesuffix('.py')}.md)"
        if source in PAGES and target.startswith("../"):
            return f"]({PAGES[source]})"
        if target.startswith("../recipes/") and target.endswith(".py"):
            return f"]({target.removeprefix('../').removesuffix('.py')}.md)"
        return match[0]

    return re.sub(r"\]\(([^)#:]+)\)", page_of, markdown)
