"""README.md is `nbs/index.ipynb` as markdown. Quarto is not needed for it: nbconvert writes the markdown, and cells with `#| hide` stay out.

`python tests/readme.py` checks that the two are in sync; `--write` writes README.md."""
import re, sys
from pathlib import Path

root = Path(__file__).resolve().parents[1]

def render():
    import nbformat
    from nbconvert import MarkdownExporter
    nb = nbformat.read(root/"nbs/index.ipynb", as_version=4)
    keep = []
    for c in nb.cells:
        lines = c.source.split("\n")
        tags = [l for l in lines if re.match(r"#\|\s*\w+", l)]
        if any(re.match(r"#\|\s*hide\b", l) for l in tags): continue
        if any(re.match(r"#\|\s*echo:\s*false", l) for l in tags): c.metadata["echo"] = False
        c.source = "\n".join(l for l in lines if l not in tags).strip()
        keep.append(c)
    nb.cells = keep
    shown = []
    for c in nb.cells:  # a cell that hides its code is its output
        if c.metadata.pop("echo", True): shown.append(c)
        else: shown += [nbformat.v4.new_markdown_cell(o["data"]["text/markdown"]) for o in c.outputs if "text/markdown" in o.get("data", {})]
    nb.cells = shown
    text, _ = MarkdownExporter().from_notebook_node(nb)
    text = re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"
    text = text.replace("](images/", "](nbs/images/")
    return "<!-- written from nbs/index.ipynb by `make readme`: edit the notebook -->\n\n" + text

def main():
    new, path = render(), root/"README.md"
    if "--write" in sys.argv: path.write_text(new, encoding="utf-8"); print("README.md written"); return
    if not path.exists() or path.read_text(encoding="utf-8") != new: sys.exit("README.md is not what nbs/index.ipynb says: run `make readme`")
    print("README.md is in sync")

if __name__ == "__main__": main()
