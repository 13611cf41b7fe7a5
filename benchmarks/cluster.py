"""What a run on a Ray cluster costs beside the run itself, in processor time of caller and head and in bytes: python benchmarks/cluster.py [--runs 40]

With --sweep FILE instead: that sweep here, and on two nodes of which one is killed in mid-run; are the results the same?"""
import argparse, json, os, tempfile, time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

def cpu(pid):
    import psutil
    t = psutil.Process(pid).cpu_times()
    return t.user + t.system

def compare(file):
    import threading
    from somaagent.runs.cluster import RayExecutor, two_nodes
    from somaagent.runs.sweep import run_sweep
    with tempfile.TemporaryDirectory() as d:
        t = time.perf_counter()
        here = run_sweep(file, home=Path(d)/"here")
        print(here, f"here, {time.perf_counter()-t:.0f} s", flush=True)
        t, heard, killed = time.perf_counter(), [], []
        def listen(e):
            heard.append(e)
            done = sum(x.get("event") == "trial" and x["status"] in ("completed", "pruned") for x in heard)
            if not killed and done >= here.sweep.trials//3 and e.get("event") == "cell" and e.get("run_id") in ex.turns and ex.turns[e["run_id"]].node == c.nodes[1].node_id:
                killed.append(e["run_id"]); threading.Thread(target=c.nodes[1].kill).start()
        with two_nodes() as c, RayExecutor(cluster=c) as ex: there = run_sweep(file, on=ex, home=Path(d)/"there", on_event=listen)
        print(there, f"two nodes, {time.perf_counter()-t:.0f} s; killed under {killed}; {[e['why'] for e in heard if e.get('event') == 'retry']}")
        same = there.frame(result=True).equals(here.frame(result=True))
        print("the trial tables are", "equal" if same else "different", f"({there.frame(result=True).shape})", "; best", there.best.number, here.best.number)
        return same and bool(killed)

def main():
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument("--runs", type=int, default=40)
    ap.add_argument("--sweep")
    a = ap.parse_args()
    if a.sweep: raise SystemExit(not compare(a.sweep))
    with tempfile.TemporaryDirectory() as d:
        os.environ["SOMA_STORES_HOME"] = str(Path(d)/"home")
        import nbformat, psutil
        from somaagent.runs.batch import Job
        from somaagent.runs.cluster import RayExecutor, two_nodes
        cells = [nbformat.v4.new_code_cell("x = 0", metadata=dict(tags=["parameters"])), nbformat.v4.new_code_cell("print(x)")]
        nbformat.write(nbformat.v4.new_notebook(cells=cells), nb := Path(d)/"empty.ipynb")
        with two_nodes() as c, RayExecutor(cluster=c, ship=True) as ex:
            for f in [ex.submit(Job(nb)) for _ in range(4)]: f.result()   # workers are up, modules imported
            gcs = next(p.pid for n in c.nodes for p in psutil.Process(n.proc.pid).children() if "gcs_server" in p.name())
            heard = []
            t, mine, head = time.perf_counter(), time.process_time(), cpu(gcs)
            runs = [f.result() for f in [ex.submit(Job(nb), heard.append) for _ in range(a.runs)]]
            wall, mine, head = time.perf_counter() - t, time.process_time() - mine, cpu(gcs) - head
            from somaagent.runs.ship import pack
            size = [os.path.getsize(Path(d)/"t") for r in runs if pack(r.path, Path(d)/"t")]
            g0, t0 = cpu(gcs), time.perf_counter()
            time.sleep(10)
            idle = (cpu(gcs) - g0) / (time.perf_counter() - t0)
            assert all(r.status == "completed" for r in runs), [r.error for r in runs]
        print(json.dumps(dict(runs=a.runs, wall_s_per_run=round(wall/a.runs, 3), run_s=round(sum(r.cost["wall_s"] for r in runs)/a.runs, 3), driver_cpu_ms=round(1e3*mine/a.runs, 2), gcs_cpu_ms=round(1e3*head/a.runs, 2),
                              gcs_idle_cpu_share_of_two_nodes=round(idle, 4), events=round(len(heard)/a.runs, 1), folder_kb=round(sum(size)/len(size)/1024, 1), load=os.getloadavg()[0]), indent=1))

if __name__ == "__main__": main()
