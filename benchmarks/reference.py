"""The reference run: the main job on the sample traffic, from an empty home. `make reference` writes its figures to experiments/reference.json, which the
README shows; `--check` runs it again and compares."""
import argparse, json, os, subprocess, sys, tempfile
from pathlib import Path

root = Path(__file__).resolve().parents[1]
file = root/"experiments"/"reference.json"

def run():
    "Figures of one run in a home of its own"
    with tempfile.TemporaryDirectory(prefix="soma-ref-") as home:
        cmd = [Path(sys.executable).parent/"soma", "--home", home, "improve", "--json"]
        out = json.loads(subprocess.run(cmd, stdout=subprocess.PIPE, check=True, cwd=root, env={**os.environ, "SOMA_PROGRESS": "plain"}).stdout)
    for k in ("run", "report"): out.pop(k, None)
    return out

def figures(o):
    "What must be the same on the same kind of machine, as the summary prints it"
    ms = {m["metric"]: [round(m[k], 3) for k in ("base", "tuned", "diff", "lo", "hi")] + [m["n"]] for m in o["metrics"]}
    return dict(decision=o["decision"], version=o["version"], rows=o["rows"], metrics=ms, ab=[o["ab"]["verdict"]] + [round(o["ab"][k], 3) for k in ("diff", "lo", "hi")])

def main():
    p = argparse.ArgumentParser(description=__doc__); p.add_argument("--check", action="store_true"); a = p.parse_args()
    now = run()
    if not a.check: file.write_text(json.dumps(now, indent=1, ensure_ascii=False) + "\n"); print(f"{file.relative_to(root)} written"); return
    was, is_ = figures(json.loads(file.read_text())), figures(now)
    for k in was: print(f"{k:10} {'same' if was[k] == is_[k] else f'was {was[k]}, is {is_[k]}'}")
    sys.exit(was != is_)

if __name__ == "__main__": main()
