"""The main job on the shipped sample, as a whole: wall time, processor time and memory of all its processes together.

    python benchmarks/improve.py [--keep FOLDER] [options of soma improve]

Everything that works under the job's home is counted: the command, the notebooks' kernels, the tracker, and the warehouse's server.
"""
import json, os, shutil, subprocess, sys, tempfile, threading, time
from pathlib import Path

import psutil

class Tree:
    "Processor time and memory of every process that works under `home`"
    def __init__(self, home): self.home, self.cpu, self.peak, self.most, self.end = str(home), {}, 0, 0, threading.Event()
    def ours(self, p):
        try: return p.environ().get("SOMA_STORES_HOME") == self.home
        except psutil.Error: return False
    def sample(self):
        total = n = 0
        for p in psutil.process_iter():
            if not self.ours(p): continue
            try:
                with p.oneshot(): t, m, key = p.cpu_times(), p.memory_info().rss, (p.pid, p.create_time())
            except psutil.Error: continue
            self.cpu[key], total, n = t.user + t.system, total + m, n + 1
        self.peak, self.most = max(self.peak, total), max(self.most, n)
    def __enter__(self):
        def look():
            while not self.end.wait(.25): self.sample()
        self.thread = threading.Thread(target=look, daemon=True); self.thread.start(); return self
    def __exit__(self, *_): self.end.set(); self.thread.join()

def run(home, args):
    "Run the command once; its outcome and what it took"
    env = {k: v for k, v in os.environ.items() if not k.startswith("SOMA_")} | dict(SOMA_STORES_HOME=str(home), SOMA_STORES_IDLE_S="5")
    t = time.perf_counter()
    with Tree(home) as tree:
        p = subprocess.run([sys.executable, "-c", "from somaagent.cli.app import main; main()", "improve", "--json", *args], env=env, capture_output=True, text=True)
        wall = time.perf_counter() - t
    if p.returncode: sys.exit(p.stderr)
    return json.loads(p.stdout), wall, tree

def main(args):
    keep = args[args.index("--keep")+1] if "--keep" in args else None
    if keep: args = [a for i, a in enumerate(args) if a != "--keep" and args[i-1] != "--keep"]
    home = Path(keep or tempfile.mkdtemp(prefix="soma-bench-")).resolve()
    load = os.getloadavg()[0]
    out, wall, tree = run(home, args)
    stages = json.loads(subprocess.run([sys.executable, "-c", "from somaagent.cli.app import main; main()", "runs", "--home", str(home), "show", out["run"], "--json"], capture_output=True, text=True, check=True).stdout)["stages"]
    print(f"`soma improve {' '.join(args)}`: {out['sentence']}\n")
    print("| | wall s | processor s | peak memory MB |\n|---|---|---|---|")
    for s in stages: print(f"| {s['name']} | {s['cost']['wall_s']:.1f} | {s['cost']['cpu_s']:.1f} | {s['cost']['peak_mb']:.0f} |")
    print(f"| **the whole job**, at most {tree.most} processes at once | **{wall:.1f}** | **{sum(tree.cpu.values()):.1f}** | **{tree.peak/2**20:.0f}** |")
    size = sum(f.stat().st_size for f in home.rglob("*") if f.is_file())
    print(f"\n{psutil.cpu_count()} processors, load {load:.1f} when it began; {size/2**20:.1f} MB on disk afterwards. Aim: under 300 s and 4096 MB.")
    if not keep: shutil.rmtree(home, ignore_errors=True)
    if tree.peak > 4*2**30: sys.exit("over the aim for memory")

if __name__ == "__main__": main(sys.argv[1:])
