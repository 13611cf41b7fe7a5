"PPO's benchmark and the measurements that its notebook shows"
import importlib.util, json, math, subprocess, sys
from pathlib import Path

import pytest

root = Path(__file__).resolve().parents[1]

@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_ppo", root/"benchmarks"/"ppo.py"); m = importlib.util.module_from_spec(spec); spec.loader.exec_module(m)
    return m

@pytest.mark.parametrize("answer, want", [
    ("Thank you. Order FW-1001 is late. Kind regards, Fernwell", 10.),
    ("Thank you. Order FW-1002 is late. Kind regards, Fernwell", 6.),            # another order
    ("Orders FW-1001 and FW-1002 are late. Kind regards, Fernwell", 6.),         # one too many
    ("Order fw-1001 is late.", 7.), ("", 3.),
    ("Order FW-1001 " + "is very late, "*10 + "Kind regards, Fernwell", 7.),     # far too long: nothing of the three points left
])
def test_points(bench, answer, want): assert bench.points(["where is order FW-1001?"], [answer]) == [pytest.approx(want)]

def test_nobody_learns_from_held_out_questions(bench):
    learn, held = bench.prompts()
    assert (len(learn), len(held)) == (600, 200) and not set(learn) & set(held) and bench.prompts() == (learn, held)
    assert all(len(bench.order.findall(q)) == 1 for q in learn+held)

def test_stored_measurements_are_whole():
    peer = json.loads((root/"experiments"/"ppo_peer.json").read_text())
    sides = {s: [j for j in peer["jobs"] if j["side"] == s] for s in ("ours", "trl")}
    assert {j["seed"] for j in sides["ours"]} == {j["seed"] for j in sides["trl"]} and len(sides["ours"]) >= 3
    for j in peer["jobs"]:
        assert len(j["history"]) == 25 and 0 <= j["greedy"] <= 10 and 0 <= j["sampled"] <= 10 and math.isclose(j["samples_per_s"], 25*64/j["cpu"], rel_tol=1e-3)
    assert all(j["versions"]["trl"] == "1.12.0" for j in sides["trl"])
    hack = json.loads((root/"experiments"/"ppo_hacking.json").read_text())
    assert len({r["start"] for r in hack["runs"] if not r["target"]}) >= 5 and all(math.isfinite(v) for r in hack["runs"] for h in r["history"] for v in h.values())
    assert not any("/tmp/" in f.read_text() or "/home/" in f.read_text() for f in (root/"experiments").glob("ppo_*.json"))

def test_an_unknown_peer_is_refused():
    r = subprocess.run([sys.executable, root/"benchmarks"/"ppo.py", "--peer-python", "/nonexistent/python", "--seeds", "0", "--sides", "trl", "--updates", "1"], capture_output=True, text=True)
    assert r.returncode and "no such python" in r.stderr
