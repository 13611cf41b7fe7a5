"""How long a person waits before anything happens: `soma --help` and `import somaagent`, beside bare Python.

    python benchmarks/startup.py [runs]
"""
import shutil, statistics, subprocess, sys, time
from pathlib import Path

SOMA = shutil.which("soma", path=str(Path(sys.executable).parent)) or shutil.which("soma")
CASES = [("python -c pass", [sys.executable, "-c", "pass"], None),
         ("import somaagent", [sys.executable, "-c", "import somaagent"], .15),
         ("soma --version", [SOMA, "--version"], .3),
         ("soma --help", [SOMA, "--help"], .3),
         ("soma improve --help", [SOMA, "improve", "--help"], None),
         ("import papermill", [sys.executable, "-c", "import papermill"], None)]

def measure(cmd, runs):
    "Seconds of whole processes, the first one (cold caches) left out"
    def once():
        t = time.perf_counter()
        subprocess.run(cmd, check=True, stdout=subprocess.DEVNULL)
        return time.perf_counter() - t
    once()
    return sorted(once() for _ in range(runs))

def main(runs=15):
    if not SOMA: sys.exit("the soma command is not installed in this environment")
    base = None
    print(f"Whole processes, {runs} runs each after one to warm the file cache, Python {sys.version.split()[0]}\n")
    print("| command | median s | min | max | × bare Python | aim |\n|---|---|---|---|---|---|")
    late = []
    for name, cmd, aim in CASES:
        ts = measure(cmd, runs)
        med = statistics.median(ts)
        base = base or med
        print(f"| `{name}` | {med:.3f} | {ts[0]:.3f} | {ts[-1]:.3f} | {med/base:.1f} | {f'< {aim} s' if aim else ''} |", flush=True)
        if aim and med > aim: late.append(name)
    if late: sys.exit(f"over their aim: {', '.join(late)}")

if __name__ == "__main__": main(*map(int, sys.argv[1:2]))
