"""Gate 3: run every notebook in a copy of the tree, and hold its saved outputs against the new ones.

`python tests/notebooks.py [NAME …]` runs all, or those whose path contains one of the names; `--save` writes the new outputs
into the notebooks, figures also as pictures (needs Chromium). Numbers may differ in the fifth digit: another
processor sums in another order. Text may not. Pictures of figures are for readers on the web and are not compared; their data is."""
import json, math, os, re, shutil, subprocess, sys, tempfile, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

root = Path(__file__).resolve().parents[1]
number = re.compile(r"(?<![\w.])-?\d+\.\d+(?:e[+-]?\d+)?", re.I)

def text_of(cell):
    "All that a reader sees of a cell's outputs, as one text"
    out = []
    for o in cell.get("outputs", []):
        if o["output_type"] == "stream":
            if o["name"] == "stdout": out.append("".join(o["text"]))
        elif o["output_type"] == "error": out.append(f"{o['ename']}: {o['evalue']}")
        else: out += [f"{k}\n" + (json.dumps(v, sort_keys=True) if k.endswith("json") else "".join(v)) for k, v in sorted(o.get("data", {}).items()) if not k.startswith("image/")]
    return re.sub(r" at 0x[0-9a-f]+", "", "\n".join(out))

def same(a, b):
    "Equal but for numbers that differ by less than 1 in 10,000"
    if a == b: return True
    if number.sub("#", a) != number.sub("#", b): return False
    return all(math.isclose(float(x), float(y), rel_tol=1e-4, abs_tol=1e-6) for x, y in zip(number.findall(a), number.findall(b)))

def cells(path): return {c["id"]: c for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"}

def stale(saved, fresh):
    "Cells whose saved output is not what the notebook prints today"
    a, b = cells(saved), cells(fresh)
    return [(i, text_of(a[i]), text_of(b[i])) for i in a if i in b and not same(text_of(a[i]), text_of(b[i]))]

def run_all(tmp, found, save):
    "Run the copies two at a time, each in a process and a home of its own, as papermill would: what one leaves behind does not reach the next"
    env = {**os.environ, "OMP_NUM_THREADS": "1", "SOMA_PROGRESS": "none", "PLOTLY_RENDERER": "plotly_mimetype" + "+png"*save}
    def one(p):
        t0, rel = time.time(), p.relative_to(root)
        r = subprocess.run([Path(sys.executable).parent/"nbdev-test", rel, "--save", "--n-workers", "0"], cwd=tmp, env=env | {"SOMA_STORES_HOME": str(tmp/".homes"/"-".join(rel.with_suffix("").parts))},
                           stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        print(f"{'FAILED' if r.returncode else 'ok':6} {time.time()-t0:5.1f} s  {rel}" + ("\n"+r.stdout if r.returncode else ""), flush=True)
        return r.returncode != 0
    with ThreadPoolExecutor(2) as ex: return sum(ex.map(one, sorted(found, key=lambda p: p.parent.name != "experiments")))

def main(args):
    names, save = [a for a in args if a != "--save"], "--save" in args
    found = [p for d in ("nbs", "experiments") for p in sorted((root/d).rglob("*.ipynb")) if ".ipynb_checkpoints" not in p.parts and not p.name.startswith(("_", "."))]
    if names: found = [p for p in found if any(n in str(p.relative_to(root)) for n in names)]
    if not found: sys.exit(f"no notebook matches {names}")
    t0 = time.time()
    with tempfile.TemporaryDirectory(prefix="soma-nbs-") as tmp:
        tmp = Path(tmp)
        for f in ("pyproject.toml", "settings.ini", "_quarto.yml"): shutil.copy(root/f, tmp)
        for p in found:
            (q := tmp/p.relative_to(root)).parent.mkdir(parents=True, exist_ok=True); shutil.copy(p, q)
        bad = run_all(tmp, found, save)
        old = [(p, *c) for p in found for c in stale(p, tmp/p.relative_to(root))]
        for p, i, was, now in old:
            print(f"\n{p.relative_to(root)} cell {i}: the saved output {'was' if save else 'is'} stale\n--- saved\n{was[:600]}\n--- now\n{now[:600]}")
        if save and not bad:
            for p in found: shutil.copy(tmp/p.relative_to(root), p)
            for c in (["nbdev-clean"], ["nbdev-clean", "--fname", "experiments"], ["nbdev-export"]): subprocess.run([Path(sys.executable).parent/c[0], *c[1:]], cwd=root, check=True)
        elif not save: bad += len(old)
    print(f"notebooks: {len(found)} run in {time.time()-t0:.0f} s, " + (f"{bad} problem(s)" if bad else "outputs saved" if save else "all pass and their saved outputs are current"))
    sys.exit(bool(bad))

if __name__ == "__main__": main(sys.argv[1:])
