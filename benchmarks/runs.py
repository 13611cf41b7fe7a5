"""What starting a run costs: an empty notebook from start to finish, a hundred of them together, a stage of a workflow, a warm kernel that waits, a replay.

    python benchmarks/runs.py                                one, phases, memory, stages: three minutes
    python benchmarks/runs.py --parts one,many --runs 100    a hundred runs on two cores, three to five minutes more
    python benchmarks/runs.py --parts replay                 the sample loop and its replay, minutes
    python benchmarks/runs.py --ploomber SCRATCH/bin/python  ploomber-engine beside them, from an environment of its own
    python benchmarks/runs.py --out experiments/runs_speed.json  keep the figures (merged with those of the parts that were not measured)

Every case runs once unmeasured, then all cases in turn, round after round; medians of the rounds, wall seconds and processor seconds. Processor seconds are those of the process, its children and, for warm kernels, of the
kernel and of the command that a zygote's child runs. `ours, command, warm` is the third such command and those after it: the second leaves a process behind for the next ones. `API` cases run in one process that has imported its library; `command` cases are whole processes. Our figures include what the others do not do: a checked record with hashes of notebook
and code, a row in the state store, a watch on memory and time, every write flushed to the disk.
A hundred runs: each spins for one second of processor time, and says how much it really was; the ideal is the sum of that, measured inside the kernels while they run together, divided by the cores: starting and ending a
run is no part of it. A stage's overhead is what a workflow of empty notebooks takes beyond its stages' own
seconds, divided by their number.
"""
import argparse, asyncio, json, os, platform, resource, shutil, statistics as st, subprocess, sys, tempfile, time
from pathlib import Path

PLOOMBER = """
import sys, time, json, resource
from ploomber_engine import execute_notebook
for line in sys.stdin:
    t, c = time.perf_counter(), sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    execute_notebook(sys.argv[1], sys.argv[2], parameters=dict(n=2), verbose=False, progress_bar=False) if len(sys.argv) > 2 else None
    print(json.dumps([time.perf_counter()-t, sum(resource.getrusage(resource.RUSAGE_SELF)[:2])-c]), flush=True)
"""

def notebook(path, *cells):
    import nbformat
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("n = 1  # a number", metadata=dict(tags=["parameters"])), *map(nbformat.v4.new_code_cell, cells)], metadata=dict(kernelspec=dict(name="python3", display_name="Python 3", language="python")))
    nbformat.write(nb, path)
    return path

def cpu():
    "Processor seconds of this process and of its children that have ended"
    return sum(sum(resource.getrusage(w)[:2]) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))

def timed(f):
    "Wall and processor seconds; `f` may return processor seconds that the system does not count here"
    t, c = time.perf_counter(), cpu()
    more = f()
    more = more if isinstance(more, (int, float)) else 0
    return time.perf_counter()-t, cpu()-c+more

def alternate(cases, rounds):
    "Medians of all cases, in turn"
    got = {n: [] for n in cases}
    for f in cases.values(): f()
    for _ in range(rounds):
        for n, f in cases.items(): got[n].append(timed(f))
    return {n: dict(wall_s=round(st.median(w for w, _ in g), 4), low_s=round(min(w for w, _ in g), 4), high_s=round(max(w for w, _ in g), 4), cpu_s=round(st.median(c for _, c in g), 4)) for n, g in got.items()}

def one(a, d):
    "An empty parameterised notebook, start to finish"
    import papermill as pm
    from somaagent.runs.notebook import execute
    nb, n = notebook(d/"empty.ipynb"), iter(range(10**6))
    os.environ["JUPYTER_PATH"] = str(spec(d))
    def ours(warm):
        os.environ["SOMA_KERNELS_WARM"] = str(int(warm))
        r = execute(nb, dict(n=2), d/f"run{next(n)}")
        assert r.status == "completed" and r.env["kernel"]["how"] == ("warm" if warm else "cold"), r.error or r.env["kernel"]
        return r.cost["cpu_s"] if warm else 0
    def elsewhere(): return sum(z["children_s"] for z in zygotes()) if sys.platform.startswith("linux") else 0
    def command(*argv, **env):
        t = elsewhere()
        subprocess.run(argv, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, **env})
        return max(0, elsewhere()-t)
    soma = [str(Path(sys.executable).parent/"soma"), "run", str(nb), "-p", "n=2", "-q"]
    cases = {"ours, API, warm": lambda: ours(True), "ours, API, cold": lambda: ours(False),
             "papermill, API": lambda: (pm.execute_notebook(str(nb), str(d/"out.ipynb"), dict(n=2), progress_bar=False), 0)[1],
             "ours, command, warm": lambda: command(*soma, SOMA_KERNELS_WARM="1"), "ours, command, cold": lambda: command(*soma, SOMA_KERNELS_WARM="0"),
             "papermill, command": lambda: command(sys.executable, "-m", "papermill", str(nb), str(d/"out.ipynb"), "-p", "n", "2", "--no-progress-bar")}
    if a.ploomber:
        p = subprocess.Popen([a.ploomber, "-c", PLOOMBER, str(nb), str(d/"out2.ipynb")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env={**os.environ, "PLOOMBER_STATS_ENABLED": "false"})
        def ask(): p.stdin.write("go\n"); p.stdin.flush(); return json.loads(p.stdout.readline())[1]
        cases["ploomber-engine, API (in this process, no kernel)"] = ask
        cases["ploomber-engine, command"] = lambda: command(str(Path(a.ploomber).parent/"ploomber-engine"), str(nb), str(d/"out2.ipynb"), "-p", "n", "2", PLOOMBER_STATS_ENABLED="false")
    for _ in range(2): cases["ours, command, warm"]()
    end = time.monotonic() + 20
    while not any("run-" in z["key"] for z in zygotes()) and time.monotonic() < end: time.sleep(.1)
    got = alternate(cases, a.rounds)
    if a.ploomber: p.stdin.close(); p.wait(20)
    return got

def zygotes():
    "Processes that wait, and the processor seconds of their children that have ended: kernels, and commands that were handed on"
    from somaagent.runs import pool
    ticks, out = os.sysconf("SC_CLK_TCK"), []
    for z in pool.status():
        f = Path(f"/proc/{z['pid']}/stat").read_text().rpartition(")")[2].split()
        out.append(z | dict(children_s=(int(f[13])+int(f[14]))/ticks))
    return out

def spec(d):
    "papermill's `python3` shall be this interpreter, too"
    k = d/"jupyter"/"kernels"/"python3"
    k.mkdir(parents=True, exist_ok=True)
    (k/"kernel.json").write_text(json.dumps(dict(argv=[sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"], display_name="Python 3", language="python")))
    return d/"jupyter"

def phases(a, d):
    "Where the seconds go: papermill's, and ours when the kernel is warm"
    import nbclient, papermill as pm
    from jupyter_client.client import KernelClient
    from somaagent.runs import kernels, notebook as ours
    from somaagent.runs.session import Session
    nb, rows, now = notebook(d/"empty.ipynb"), [], {}
    os.environ["JUPYTER_PATH"] = str(spec(d))
    def clock(cls, name, key):
        old = getattr(cls, name)
        if asyncio.iscoroutinefunction(old):
            async def new(*x, **kw):
                t = time.perf_counter()
                try: return await old(*x, **kw)
                finally: now[key] = now.get(key, 0) + time.perf_counter()-t
        else:
            def new(*x, **kw):
                t = time.perf_counter()
                try: return old(*x, **kw)
                finally: now[key] = now.get(key, 0) + time.perf_counter()-t
        setattr(cls, name, new)
        return lambda: setattr(cls, name, old)
    answered = []
    old = KernelClient._handle_kernel_info_reply
    def reply(self, msg): answered.append(time.perf_counter()); return old(self, msg)
    def whole(f):
        now.clear(); answered.clear()
        t = time.perf_counter(); f(); now["whole"] = time.perf_counter()-t
        return dict(now)
    def papermill():
        KernelClient._handle_kernel_info_reply = reply
        ready = nbclient.client.NotebookClient.async_start_new_kernel_client
        async def client(self):
            t = time.perf_counter(); kc = await ready(self)
            now["the kernel's imports, until it answers"] = answered[0]-t; now["waiting for silence"] = time.perf_counter()-answered[0]
            return kc
        nbclient.client.NotebookClient.async_start_new_kernel_client = client
        nbclient.client.NotebookClient.start_new_kernel_client = nbclient.client.run_sync(client)
        undo = [clock(nbclient.client.NotebookClient, "start_new_kernel", "starting a process"), clock(pm.clientwrap.PapermillNotebookClient, "papermill_execute_cells", "cells, saved after each"), clock(nbclient.client.NotebookClient, "_cleanup_kernel", "the kernel's end")]
        try: return whole(lambda: pm.execute_notebook(str(nb), str(d/"out.ipynb"), dict(n=2), progress_bar=False))
        finally:
            KernelClient._handle_kernel_info_reply, nbclient.client.NotebookClient.async_start_new_kernel_client = old, ready
            nbclient.client.NotebookClient.start_new_kernel_client = nbclient.client.run_sync(ready)
            [u() for u in undo]
    def warm():
        os.environ["SOMA_KERNELS_WARM"] = "1"
        undo = [clock(kernels.pool, "fork", "a fork becomes a kernel"), clock(Session, "run", "cells, saved after each"), clock(kernels.Kernel, "end", "the kernel's end")]
        try: return whole(lambda: ours.execute(nb, dict(n=2), d/f"phase{len(rows)}"))
        finally: [u() for u in undo]
    papermill(), warm()
    for _ in range(a.rounds): rows.append((papermill(), warm()))
    def bare(code): return st.median(timed(lambda: subprocess.run([sys.executable, "-c", code], check=True))[0] for _ in range(a.rounds))
    python, imports = bare("pass"), bare("import papermill.cli")
    out = {}
    for i, name in enumerate(("papermill", "ours, warm")):
        keys = [k for k in rows[0][i] if k != "whole"]
        m = {k: round(st.median(r[i][k] for r in rows), 4) for k in keys}
        m["the rest"] = round(max(0., st.median(r[i]["whole"] for r in rows) - sum(m.values())), 4)
        out[name] = m
    out["papermill's command, before it begins"] = {"Python": round(python, 4), "imports": round(imports-python, 4)}
    return out

def many(a, d):
    "Runs together, over the ideal"
    from somaagent.runs.batch import Job, run_many
    from somaagent.runs.notebook import execute
    os.environ["SOMA_KERNELS_WARM"] = "1"
    nb, cores = notebook(d/"spin.ipynb", "import time\nbegan = time.process_time()\nwhile time.process_time() < began + 1: pass\nprint(time.process_time() - began)"), a.cores
    alone = []
    for i in range(4):
        t = time.perf_counter(); assert execute(nb, dict(n=i), d/f"alone{i}").status == "completed"; alone.append(time.perf_counter()-t)
    t = time.perf_counter()
    runs = [r for _, r in run_many([Job(str(nb), dict(n=i), run_dir=str(d/f"many{i}")) for i in range(a.runs)], parallel=cores)]
    wall = time.perf_counter()-t
    assert len(runs) == a.runs and all(r.status == "completed" for r in runs)
    def own(r): return float("".join(json.loads((Path(r.path)/"notebook.ipynb").read_text())["cells"][-1]["outputs"][0]["text"]))
    ideal, one = sum(own(r) for r in runs)/cores, st.median(alone[1:])
    return dict(runs=a.runs, cores=cores, wall_s=round(wall, 2), alone_s=round(one, 3), ideal_s=round(ideal, 2), over_ideal=round(wall/ideal, 3), over_alone=round(wall/(a.runs*one/cores), 3))

def stages(a, d, n=8):
    "What a workflow adds to a stage, and what a stage costs that is taken from an earlier run"
    from somaagent.runs.workflow import load_workflow, run_workflow
    os.environ["SOMA_KERNELS_WARM"] = "1"
    notebook(d/"stage.ipynb", "from somaagent.runs.record import current_run\ncurrent_run().output('x', n+1)")
    def flow(name):
        spec = dict(name=name, params=dict(seed=dict(type="int", default=0)), stages=[dict(id=f"s{i}", notebook="stage.ipynb", params=dict(n=f"${{s{i-1}.x}}" if i else "${seed}"), outputs=["x"]) for i in range(n)])
        (d/f"{name}.yaml").write_text(json.dumps(spec))
        return load_workflow(d/f"{name}.yaml")
    first, second, over, taken = flow("chain"), flow("again"), [], []
    def whole(wf, seed):
        t = time.perf_counter(); w = run_workflow(wf, dict(seed=seed*1000), home=d/"flow"); wall = time.perf_counter()-t
        assert len(w.stages) == n and w.run.status == "completed"
        return wall, sum((r.ended_at-r.started_at).total_seconds() for r in w.stages.values())
    whole(first, -1)                      # makes the state store
    for seed in range(a.rounds):          # another seed: nothing can be taken from before
        wall, own = whole(first, seed); over.append((wall-own)/n)
        wall, own = whole(second, seed); taken.append((wall-own)/n)
    return dict(stages=n, overhead_ms=round(st.median(over)*1e3, 1), unchanged_ms=round(st.median(taken)*1e3, 1))

def memory(a, d):
    "PSS: memory that is shared counts in parts"
    from somaagent.runs import pool
    from somaagent.runs.kernels import lease
    pool.stop(); z = pool.warm(); time.sleep(.5)
    alone = pool.memory(z["pid"])
    def kernel(warm):
        with lease(env=pool.run_env(), cwd=d, warm=warm) as k: time.sleep(2); return pool.memory(k.pid), pool.memory(z["pid"])
    (w, with_one), (c, _) = kernel(True), kernel(False)
    return dict(zygote_mb=round(alone, 1), warm_kernel_adds_mb=round(w+with_one-alone, 1), cold_kernel_mb=round(c, 1))

def replays(a, d):
    "The sample loop, and its replay"
    from somaagent.core.settings import experiments_dir
    from somaagent.runs.replay import replay
    from somaagent.runs.workflow import load_workflow, run_workflow
    os.environ["SOMA_KERNELS_WARM"] = "1"
    home = d/"loop"
    os.environ["SOMA_STORES_HOME"] = str(home)
    small = dict(max_steps=4, limit=30) if a.small else {}
    t = time.perf_counter(); w = run_workflow(load_workflow(experiments_dir()/"improve.yaml"), small, home=home); run_s = time.perf_counter()-t
    t = time.perf_counter(); r = replay(w.run); replay_s = time.perf_counter()-t
    return dict(run_s=round(run_s, 1), replay_s=round(replay_s, 1), small=a.small, ratio=round(replay_s/run_s, 3), equal=bool(r.equal))

def show(got):
    "Tables for people"
    if o := got.get("one"):
        base = {k: o[f"papermill, {k}"]["wall_s"] for k in ("API", "command")}
        print("\n| an empty notebook | median s | min | max | processor s | × faster than papermill's |\n|---|---|---|---|---|---|")
        for n, m in o.items(): print(f"| {n} | {m['wall_s']:.3f} | {m['low_s']:.3f} | {m['high_s']:.3f} | {m['cpu_s']:.3f} | {base['command' if 'command' in n else 'API']/m['wall_s']:.1f} |")
        if not any("ploomber" in n for n in o): print("| ploomber-engine | not measured: no environment given (--ploomber) | | | | |")
    for who, m in (got.get("phases") or {}).items(): print(f"\n{who}: " + ", ".join(f"{k} {v*1e3:.0f} ms" for k, v in m.items()))
    for part, text in dict(many="{runs} runs on {cores} cores: {wall_s} s, ideal {ideal_s} s ({alone_s} s alone), {over_ideal} × the ideal, {over_alone} × runs that follow each other on every core", stages="a stage of a workflow: {overhead_ms} ms beyond its run; unchanged and taken from an earlier run: {unchanged_ms} ms",
                           memory="memory (PSS): the process that waits {zygote_mb} MB, a warm kernel on top {warm_kernel_adds_mb} MB, a cold kernel {cold_kernel_mb} MB", replay="the sample loop {run_s} s, its replay {replay_s} s: {ratio} ×, equal: {equal}").items():
        if got.get(part): print("\n" + text.format(**got[part]))

def main(argv=None):
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("--parts", default="one,phases,memory,stages"); ap.add_argument("--rounds", type=int, default=7); ap.add_argument("--runs", type=int, default=100); ap.add_argument("--cores", type=int, default=min(2, os.cpu_count()))
    ap.add_argument("--small", action="store_true", help="replay: four optimizer steps and thirty questions")
    ap.add_argument("--ploomber", help="python of an environment that has ploomber-engine"); ap.add_argument("--out", type=Path, help="JSON to write")
    a = ap.parse_args(argv)
    d = Path(tempfile.mkdtemp(prefix="soma-bench-"))
    for k, v in dict(SOMA_STORES_HOME=d/"home", SOMA_TRACKING_BACKEND="none", SOMA_PROGRESS="none", OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1").items(): os.environ[k] = str(v)
    old = json.loads(a.out.read_text()) if a.out and a.out.exists() else {}
    got = {}
    try:
        for part in a.parts.split(","):
            load = os.getloadavg()[0]
            got[part] = dict(one=one, phases=phases, many=many, stages=stages, memory=memory, replay=replays)[part](a, d)
            print(f"{part}: measured (load before it {load:.1f})", file=sys.stderr, flush=True)
    finally:
        from somaagent.runs import pool
        os.environ["SOMA_STORES_HOME"] = str(d/"home")
        pool.stop()
        shutil.rmtree(d, ignore_errors=True)
    show(got)
    if a.out:
        a.out.write_text(json.dumps(old | got | dict(about=dict(date=time.strftime("%Y-%m-%d"), python=platform.python_version(), cpus=os.cpu_count(), load=round(os.getloadavg()[0], 1), rounds=a.rounds)), indent=1) + "\n")

if __name__ == "__main__": main()
