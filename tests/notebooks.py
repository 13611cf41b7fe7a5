"""Gate 3: run every notebook in a copy of the tree, and hold its saved outputs against the new ones.

`python tests/notebooks.py [NAME …]` runs all, or those whose path contains one of the names; `--save` writes the new outputs
into the notebooks, figures also as pictures (needs Chromium). Numbers may differ in the fifth digit: another
processor sums in another order. Text may not. Pictures of figures are for readers on the web and are not compared; their data is."""
import json, math, os, re, shutil, signal, subprocess, sys, tempfile, time
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

WARM = """numpy scipy.stats scipy.optimize sqlalchemy.orm alembic.command pydantic plotly.graph_objects plotly.io yaml jinja2 httpx rich.console click IPython execnb.shell
    nbformat torch torch._dynamo transformers.models.llama.modeling_llama peft nbdev.test""".split()  # slow to import and start no thread: a process with threads must not be forked (pandas, polars, pyarrow and chdb have some)

LONG = """guide rlaif prefer ppo prompts compare sft reward ab track builder supportdesk db background tomlflow parts rollup calibrate sweep sync towandb workflow study replay notebook
    datatools data log capsule labjobs findings scheduler""".split()  # the longest first: begun last, one would keep a processor waiting

def child(rel, tmp, env, out):
    "In a forked process: run one copy as `nbdev-test --save` would"
    import types
    os.setsid(); os.chdir(tmp); os.environ.update(env)
    f = os.open(out, os.O_WRONLY|os.O_CREAT|os.O_TRUNC)
    os.dup2(f, 1); os.dup2(f, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    sys.__stdout__, sys.__stderr__, sys.modules["__main__"] = sys.stdout, sys.stderr, types.ModuleType("__main__")
    sys.path[0] = ""
    from nbdev.test import nbdev_test
    code = 0
    try: nbdev_test(str(rel), save=True, n_workers=0)
    except SystemExit as e: code = int(bool(e.code))
    except BaseException:
        import traceback
        traceback.print_exc(); code = 1
    finally:
        for s in (sys.stdout, sys.stderr): s.flush()
    import atexit
    atexit._run_exitfuncs(); os._exit(code)

def run_all(tmp, found, save):
    """Run the copies side by side, each in a process and a home of its own: what one leaves behind does not reach the next. They are forked from
    one that has imported the slow libraries already, which saves a second or more apiece."""
    os.environ |= {"OMP_NUM_THREADS": "1", "SOMA_PROGRESS": "none", "SOMA_KERNELS_WARM_IDLE_S": "10", "PLOTLY_RENDERER": "plotly_mimetype" + "+png"*save}
    if len(found) > 1:
        import gc, importlib
        for m in WARM: importlib.import_module(m)
        gc.freeze()
        if os.path.isdir("/proc/self/task") and (n := len(os.listdir("/proc/self/task"))) > 1: print(f"note: a library in WARM starts threads here ({n}); take it out if notebooks hang", flush=True)
    todo, running, bad, most = sorted(found, key=lambda p: (p.parent.name != "experiments", LONG.index(p.stem) if p.stem in LONG else len(LONG))), {}, 0, min(os.cpu_count() or 2, 4)+1  # one more than processors: some wait for a process of their own
    try:
        while todo or running:
            while todo and len(running) < most:
                rel = (p := todo.pop(0)).relative_to(root)
                home, out = tmp/".homes"/"-".join(rel.with_suffix("").parts), tmp/".out"/"-".join(rel.parts)
                out.parent.mkdir(exist_ok=True)
                if not (pid := os.fork()): child(rel, tmp, {"SOMA_STORES_HOME": str(home)}, out)
                running[pid] = rel, out, time.time()
            pid, status, used = os.wait4(-1, 0)
            rel, out, t0 = running.pop(pid)
            print(f"{'FAILED' if status else 'ok':6} {time.time()-t0:5.1f} s, of processors {used.ru_utime+used.ru_stime:5.1f} s  {rel}" + ("\n"+out.read_text(errors="replace") if status else ""), flush=True)
            bad += status != 0
    finally:
        for pid in running: os.killpg(pid, signal.SIGKILL)
    return bad

def main(args):
    names, save = [a for a in args if a != "--save"], "--save" in args
    found = [p for d in ("nbs", "experiments") for p in sorted((root/d).rglob("*.ipynb")) if ".ipynb_checkpoints" not in p.parts and not p.name.startswith(("_", "."))]
    if names: found = [p for p in found if any(n in str(p.relative_to(root)) for n in names)]
    if not found: sys.exit(f"no notebook matches {names}")
    t0 = time.time()
    tmp = Path(tempfile.mkdtemp(prefix="soma-nbs-"))  # not a TemporaryDirectory: its finaliser would run in every forked process
    try:
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
    finally: shutil.rmtree(tmp, ignore_errors=True)
    print(f"notebooks: {len(found)} run in {time.time()-t0:.0f} s, " + (f"{bad} problem(s)" if bad else "outputs saved" if save else "all pass and their saved outputs are current"))
    sys.exit(bool(bad))

if __name__ == "__main__": main(sys.argv[1:])
