"""Gates 1 and 2: `nbdev-clean` and `nbdev-export` leave no difference. What they change stays changed: look at it and commit it."""
import hashlib, subprocess, sys
from pathlib import Path

root = Path(__file__).resolve().parents[1]
watched = [("nbs", "*.ipynb"), ("experiments", "*.ipynb"), ("somaagent", "*.py")]

def snapshot():
    files = [p for d, g in watched for p in (root/d).rglob(g) if ".ipynb_checkpoints" not in p.parts]
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}

def gate(name, *cmds):
    before = snapshot()
    for c in cmds: subprocess.run(c, cwd=root, check=True)
    after = snapshot()
    diff = sorted(f for f in before.keys() | after.keys() if before.get(f) != after.get(f))
    print(f"gate {name}: " + ("no difference" if not diff else "changed " + ", ".join(diff)))
    return diff

bindir = Path(sys.executable).parent
diff = gate("clean", [bindir/"nbdev-clean"], [bindir/"nbdev-clean", "--fname", "experiments"])
diff += gate("export", [bindir/"nbdev-export"])
sys.exit("the working tree was not clean: commit what changed" if diff else 0)
