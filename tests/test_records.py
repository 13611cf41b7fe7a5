"""Records of runs under real conditions: both databases, killed processes, odd text, and what may never be thrown away."""
import json, os, random, subprocess, sys, time
from datetime import timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa
from click.testing import CliRunner

from somaagent.core.errors import RunError
from somaagent.core.records import Run, new_id, utcnow
from somaagent.core.settings import settings
from somaagent.runs import gc
from somaagent.runs.curve import add_line, add_point, ask_to_stop, curve, read_lines, usage
from somaagent.runs.find import named, search
from somaagent.runs.record import Record, children, find_run, load_run, process_id, save_run, tag_run, told
from somaagent.runs.where import holds, parse
from somaagent.store.artifacts import artifacts
from somaagent.store.state import DatasetRow, ModelVersionRow, RunRow, State, state

@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("SOMA_STORES_HOME", str(tmp_path/"home"))
    monkeypatch.delenv("SOMA_RUN_DIR", raising=False)
    return tmp_path/"home"

def made(home, name="tune", status="completed", at=None, **kw):
    rid = kw.pop("id", None) or new_id("run")
    rec = Record(home/"runs"/rid); rec.save()
    return save_run(Run(id=rid, name=name, status=status, started_at=at or utcnow(), ended_at=utcnow(), path=str(rec.dir), **kw), row=True)

# ---- conditions
PATHS = ["metrics.acc", "metrics.acc.lo", "metrics['a b']", "params.lr", "params.name", "params.flag", "params.deep.x", "params.list", "seconds", "name", "tags", "cost.usd", "error", "metrics.nothing"]
CONSTS = ["0", "0.5", "-1", "1e-3", "'tiny'", "''", "true", "None", "'it''s'", "\"x' OR 1=1 --\"", "'ü'", "2**70"[:1], "1e308", "('tiny', 3)", "[]"]

def some_run(rng):
    val = lambda: rng.choice([0, .5, 1, -1, .25, None, True, False, "tiny", "", "ü", "it's", [1, "a"], dict(x=.5), 10**20])
    d = dict(parameters={k: val() for k in ("lr", "name", "flag", "list") if rng.random() < .8} | (dict(deep=dict(x=val())) if rng.random() < .5 else {}), metrics={}, cost=dict(usd=rng.random()))
    for m in ("acc", "a b"):
        if rng.random() < .8: d["metrics"][m] = rng.choice([val(), dict(value=rng.choice([0, .5, 1, None]), lo=rng.choice([0, .4, None]))])
    return d

def expression(rng, depth=0):
    if depth < 2 and rng.random() < .5: return f"({expression(rng, depth+1)} {rng.choice(['and', 'and', 'or'])} {expression(rng, depth+1)})"
    if rng.random() < .15: return f"not {expression(rng, 2)}"
    a, b = rng.choice(PATHS), rng.choice(CONSTS)
    if rng.random() < .2: a, b = b, a
    return f"{a} {rng.choice(['<', '<=', '==', '!=', '>', '>=', '<', '>', 'in', 'not in'])} {b}"

def check_conditions(rng, n):
    "SQL only narrows: what is found is what Python alone finds"
    runs = search(limit=None)
    assert len(runs) == 60
    for _ in range(n):
        q = expression(rng)
        assert {r.id for r in search(where=q, limit=None)} == {r.id for r in runs if holds(parse(q), r)}, q

def test_conditions_mean_the_same_in_sql_and_python(home):
    rng = random.Random(7)
    for i in range(60): made(home, name=rng.choice(["tiny", "it's", "ü"]), tags=rng.sample(["a", "night"], rng.randint(0, 2)), **some_run(rng))
    check_conditions(rng, 120)
    acc = lambda r: r.metrics["acc"]["value"] if isinstance(r.metrics["acc"], dict) else r.metrics["acc"]
    nums = [acc(r) for r in search(sort="-metrics.acc", limit=None) if "acc" in r.metrics and isinstance(acc(r), (int, float))]
    assert nums == sorted(nums, reverse=True) and len(nums) > 15
    assert {r.id for r in search(tag="night", limit=None)} == {r.id for r in search(limit=None) if "night" in r.tags}

@pytest.fixture(scope="module")
def postgres(tmp_path_factory):
    import glob, shutil, tempfile
    bins = sorted(glob.glob("/usr/lib/postgresql/*/bin"))
    if not bins: pytest.skip("no PostgreSQL here")
    d = Path(tempfile.mkdtemp(prefix="pg"))   # short: a socket lies in it
    as_pg = []
    if os.geteuid() == 0: shutil.chown(d, "postgres"); as_pg = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
    sh = lambda *a: subprocess.run([*as_pg, *a], check=True, capture_output=True, cwd="/")
    sh(f"{bins[-1]}/initdb", "--no-sync", "-A", "trust", "-U", "soma", "-D", str(d/"db"))
    sh(f"{bins[-1]}/pg_ctl", "-w", "-D", str(d/"db"), "-l", str(d/"log"), "-o", f"-c listen_addresses='' -k {d} -c fsync=off", "start")
    yield f"postgresql://soma@/postgres?host={d}"
    sh(f"{bins[-1]}/pg_ctl", "-D", str(d/"db"), "-m", "immediate", "stop"); shutil.rmtree(d, ignore_errors=True)

def test_conditions_on_postgresql(home, postgres, monkeypatch):
    monkeypatch.setenv("SOMA_STORES_STATE", postgres)
    rng = random.Random(8)
    for i in range(60): made(home, name=rng.choice(["tiny", "it's", "ü"]), tags=rng.sample(["a", "night"], rng.randint(0, 2)), **some_run(rng))
    assert not state().sqlite
    check_conditions(rng, 60)
    assert {r.id for r in search(tag="night", limit=None)} == {r.id for r in search(limit=None) if "night" in r.tags}
    assert search(sort="-metrics.acc", limit=3) and named(search(limit=1)[0].id[-8:])
    r = tag_run(search(limit=1)[0], ["kept"])
    assert [x.id for x in search(tag=["kept"])] == [r.id]
    assert gc.references().words is not None and r.id in {x.id for x in gc.plan(where="'kept' in tags").runs}
    state().close()

def test_conditions_cannot_do_anything_else(home):
    for bad in ("__import__('os').system('true')", "metrics.acc.__class__", "(lambda: 1)()", "[x for x in tags]", "name if 1 else 2", "f'{name}'", "metrics[name]", "params.lr + 1 > 2", "x := 3", "*tags", "name; id", "1" * 3000, "(" * 300 + "1" + ")" * 300, "metrics.acc > \0 1", "", "yield", "name.upper()", "tags[0:2]", "not " * 60 + "1", "-tags"):
        if bad == "metrics.acc.__class__": assert not holds(parse(bad), Run(name="x", metrics=dict(acc=dict(value=1)))); continue   # a key like any other
        with pytest.raises(RunError): parse(bad)
    with pytest.raises(RunError, match="acuracy"): parse("metrics.loss < 1 and acuracy > 2")

# ---- curves
def test_points_of_several_processes_are_whole_lines(tmp_path):
    code = "import sys; from somaagent.runs.curve import add_point\nfor s in range(300): add_point(sys.argv[1], s, {sys.argv[2]: s, 'long': 1/3})"
    ps = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path), k]) for k in "ab"]
    assert [p.wait(60) for p in ps] == [0, 0]
    points, at = read_lines(tmp_path/"curve.jsonl")
    assert len(points) == 600 and at == (tmp_path/"curve.jsonl").stat().st_size and [v for _, v in curve(tmp_path)["a"]] == list(range(300))

def test_a_torn_line_costs_one_point(tmp_path):
    add_point(tmp_path, 1, dict(loss=2.)); (tmp_path/"curve.jsonl").open("a").write('{"step":2,"metr')
    subprocess.run([sys.executable, "-c", "import sys; from somaagent.runs.curve import add_point; add_point(sys.argv[1], 3, dict(loss=float('nan'), acc=.5))", str(tmp_path)], check=True)
    assert curve(tmp_path) == dict(loss=[(1, 2.), (3, None)], acc=[(3, .5)])
    ask_to_stop(tmp_path, "enough")
    assert add_point(tmp_path, 4, dict(loss=1)) is False and Record(tmp_path).report(5, loss=1) is False
    for bad in (dict(step=True, loss=1), dict(step="1", loss=1), dict(step=float("nan"), loss=1), dict(step=1), dict(step=1, loss="x")):
        with pytest.raises(RunError): add_point(tmp_path, bad.pop("step"), bad)

def test_what_a_notebook_told(home, tmp_path):
    rec = Record(tmp_path/"r"); rec.save()
    rec.metric("acc", .8, lo=.7, hi=.9); rec.report(1, acc=.1, loss=2.); rec.seed(3); rec.tokens(5, 2, usd=.5, source="judge"); rec.tag("x")
    assert rec.artifact("raw", b"abc") == rec.artifact("again", b"abc") and artifacts().read(rec.result["artifacts"]["raw"]["hash"]) == b"abc"
    f = told(Record(tmp_path/"r"), ["given"])
    assert f["metrics"]["acc"]["value"] == .8 and f["metrics"]["loss"]["value"] == 2. and f["seeds"] == dict(run=3) and f["tags"] == ["given", "x"] and usage(tmp_path/"r")["judge"]["usd"] == .5
    run = Run(id="run_live", name="x", status="running", path=str(rec.dir), started_at=utcnow(), env=dict(process=process_id()))
    save_run(run, row=True); tag_run(run, ["late"])
    assert "late" in told(Record(rec.dir))["tags"] and find_run("run_live").tags == ["late"]

# ---- throwing away
def test_what_something_points_to_stays(home):
    old = utcnow() - timedelta(days=40)
    runs = {n: made(home, n, at=old) for n in "model dataset id digest free tagged".split()}
    for n in runs: (Path(runs[n].path)/"big").write_bytes(os.urandom(1000))
    digest = artifacts().put(b"weights of the run")
    with state().session() as s:
        s.add(ModelVersionRow(name="m", version="1.0.0", base="tiny", hash="h", path=f"{runs['model'].path}/adapter/v1"))
        s.add(DatasetRow(name="d", hash="h", path="/elsewhere", sources=[runs["dataset"].id], splits={}))
        s.add(ModelVersionRow(name="m", version="1.1.0", base="tiny", hash=digest, evidence=dict(deep=[dict(note=f"see {runs['id'].id}, please")])))
        s.get(RunRow, runs["digest"].id).artifacts = dict(w=dict(hash=digest), mine=dict(hash=artifacts().put(b"only mine")))
    tag_run(runs["tagged"], ["keep"])
    child, parent = made(home, "child", at=old), made(home, "parent", at=old)
    with state().session() as s: s.get(RunRow, child.id).parent = parent.id; s.add(ModelVersionRow(name="m", version="1.2.0", base="tiny", hash="h", path=child.path))
    live = made(home, "live", "running", at=old, env=dict(process=process_id()))
    p = gc.plan(older="30d")
    assert {r.name for r in p.runs} == {"digest", "free"} and p.orphans == [artifacts().put(b"only mine")] and p.bytes > 2000 and set(p.kept) >= {live.id, parent.id}
    assert gc.collect(p) == 2 and artifacts().has(digest) and not artifacts().has(p.orphans[0])
    assert {r.name for r in search(limit=None)} == {"model", "dataset", "id", "tagged", "child", "parent", "live"} and not Path(runs["free"].path).exists() and Path(runs["model"].path).exists()
    assert gc.plan([child]).kept[child.id].startswith("it belongs to")

def test_folders_of_artifacts_share_files(home, tmp_path):
    for n, files in (("a", dict(x="same", y="of a")), ("b", dict(x="same", z="of b"))):
        (tmp_path/n).mkdir()
        for f, t in files.items(): (tmp_path/n/f).write_text(t)
    st = artifacts()
    ha, hb = st.put(tmp_path/"a"), st.put(tmp_path/"b")
    a, b = made(home, "a", artifacts=dict(w=dict(hash=ha))), made(home, "b", artifacts=dict(w=dict(hash=hb)))
    assert gc.collect(gc.plan([a])) == 1
    assert st.verify(hb) and not st.has(ha) and not st.has(gc_hash("of a")) and st.has(gc_hash("same"))

def gc_hash(text):
    from somaagent.core.records import content_hash
    return content_hash(text.encode())

def test_a_folder_of_somebody_else_keeps_what_is_not_ours(home, tmp_path):
    rec = Record(tmp_path/"mine"); rec.save(); (tmp_path/"mine"/"thesis.tex").write_text("years of work")
    r = save_run(Run(id=new_id("run"), name="x", status="failed", path=str(rec.dir), started_at=utcnow()), row=True)
    other = save_run(Run(id=new_id("run"), name="y", status="failed", path=str(tmp_path), started_at=utcnow()), row=True)
    save_run(r.model_copy(update=dict(id="run_other", path=str(tmp_path))))   # the folder of `other` is another run's by now
    assert gc.collect(gc.plan([r, other])) == 2
    assert (tmp_path/"mine"/"thesis.tex").read_text() == "years of work" and not (tmp_path/"mine"/"run.json").exists() and (tmp_path/"run.json").exists()

KILL = """
import os, sys, signal
from somaagent.runs import gc
n = 0
def die(what, *a):
    global n
    if (what.startswith(("os.rename", "os.remove", "os.rmdir", "shutil.rmtree")) or what == "sqlite3.connect/handle"):
        n += 1
        if n == int(sys.argv[1]): os.kill(os.getpid(), signal.SIGKILL)
p = gc.plan(older="30d")
sys.addaudithook(die)
gc.collect(p)
"""

def test_what_waits_for_a_person_or_for_its_tracker_stays(home, monkeypatch):
    from somaagent.runs import track
    monkeypatch.setattr(track, "_start_helper", lambda home: 0)
    asked, queued = made(home, status="waiting", kind="workflow"), made(home)
    assert track.track_later(queued, backend="mlflow")
    kept = gc.plan([asked, queued]).kept
    assert "waiting" in kept[asked.id] and "tracker" in kept[queued.id]

def test_a_killed_removal_is_finished_later(home):
    old, rng, killed = utcnow() - timedelta(days=40), random.Random(1), 0
    for k in (1, 4, 7):
        runs = [made(home, f"r{i}", at=old, artifacts=dict(w=dict(hash=artifacts().put(f"{k}.{i}".encode())))) for i in range(3)]
        p = subprocess.run([sys.executable, "-c", KILL, str(k)], capture_output=True, text=True)
        killed += p.returncode == -9
        assert p.returncode in (0, -9), p.stderr
        for r in search(limit=None): assert r.id in {x.id for x in runs} and (Path(r.path)/"run.json").exists()   # whoever is still listed is whole
        gc.finish(); gc.collect(gc.plan(older="30d"))
        assert search(limit=None) == [] and not any(Path(r.path).exists() or artifacts().has(r.artifacts["w"]["hash"]) for r in runs)
    assert killed >= 2 and not list((home/"runs"/".removing").glob("run_*"))

# ---- the command
def test_commands(home, tmp_path):
    from somaagent.cli.runs import runs as cli
    say = lambda *a, **k: CliRunner().invoke(cli, list(a), catch_exceptions=False, **k)
    rs = [made(home, "finetune", parameters=dict(lr=lr, rank=8), metrics=dict(accuracy=dict(value=a, lo=a-.02, hi=a+.02, n=600)), at=utcnow() - timedelta(days=d), cost=dict(wall_s=3., usd=.1, by=dict(cpu=.04, judge=.06)), env=dict(python="3.11.9", git=dict(commit="c"*40, dirty=True, diff="sha256:"+"d"*64)))
          for lr, a, d in ((1e-3, .7, 9), (5e-4, .82, 5), (1e-4, .9, 0))]
    sub = made(home, "trial", status="failed"); sub.parent = rs[2].id; save_run(sub, row=True)
    out = json.loads(say("list", "--since", "6d", "--where", "metrics.accuracy > 0.8 and params.lr < 1e-3", "--sort=-metrics.accuracy", "--json").output)
    assert [r["id"] for r in out] == [rs[2].id, rs[1].id]
    table = say("list", "--sort", "metrics.accuracy", "--columns", "params.rank").output
    assert "rank" in table and table.index("0.7") < table.index("0.82") and "trial" not in table and "trial" in say("list", "--all").output and "trial" in say("list", "--of", rs[2].id[-6:]).output
    shown = say("show", rs[1].id[-8:]).output
    assert "lr=0.0005" in shown and "[0.8, 0.84]" in shown and "judge $0.0600" in shown and "cccccccc and changes dddddddd" in shown
    c = say("compare", *(r.id for r in rs)).output
    assert "lr" in c and "rank" not in c and "▲" in c
    page = tmp_path/"c.html"
    say("compare", "--name", "fine*", "--html", str(page))
    assert "<svg" in page.read_text() and str(home) not in page.read_text()
    from somaagent.runs.compare import compare
    assert [d.label for d in compare(rs).figure().data[0].dimensions] == ["lr", "accuracy"]
    assert "night" in say("tag", rs[0].id, "night").output and json.loads(say("list", "--tag", "night", "--json").output)[0]["id"] == rs[0].id
    assert "would go" in say("gc", "--older", "2d", "--keep-best", "accuracy", "--dry-run").output and len(search(parent="")) == 3
    assert say("gc", "--older", "2d", "--keep-best", "accuracy", input="n\n").exit_code == 1 and len(search(parent="")) == 3
    assert "1 run gone" in say("gc", "--older", "2d", "--keep-best", "accuracy", "--yes").output and {r.id for r in search(parent="")} == {rs[1].id, rs[2].id}
    say("rm", rs[2].id, "--yes")
    assert {r.id for r in search()} == {rs[1].id}
    with pytest.raises(RunError, match="not running"): say("cancel", rs[1].id)
    with pytest.raises(RunError, match="which runs"): say("gc")

def test_every_status_and_kind_is_shown(home):
    from somaagent.cli.runs import runs as cli
    say = lambda *a: CliRunner().invoke(cli, list(a), catch_exceptions=False).output
    kinds = ("notebook", "workflow", "sweep", "notebook", "schedule", "replay")
    rs = {s: made(home, f"a {s}", status=s, kind=k, metrics=dict(loss=dict(value=.25)) if s == "completed" else {}) for s, k in zip(("completed", "waiting", "skipped", "cancelled", "queued", "failed"), kinds)}
    sub = made(home, "stage", status="skipped"); sub.parent = rs["waiting"].id; save_run(sub, row=True)
    lines = {s: next(l for l in say("list").splitlines() if f" a {s} " in l) for s in rs}
    assert all(k in lines[s] and s in lines[s].replace(f" a {s} ", "") for s, k in zip(rs, kinds)), lines
    assert "loss 0.25" in lines["completed"] and "waits for a person" in lines["waiting"]
    assert "skipped" in say("show", rs["waiting"].id) and rs["waiting"].name in say("list", "--status", "waiting") and rs["failed"].name in say("list", "--kind", "replay")
    assert "1 run and 0 artifacts" in say("rm", rs["skipped"].id, "--dry-run")

def test_cancel_from_another_process(home, tmp_path):
    import nbformat
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("import time; time.sleep(120)")])
    nbformat.write(nb, tmp_path/"sleep.ipynb")
    p = subprocess.Popen([sys.executable, "-c", "import sys; from somaagent.runs.notebook import execute; execute(sys.argv[1])", str(tmp_path/"sleep.ipynb")])
    try:
        end = time.monotonic() + 60
        while time.monotonic() < end and not any("kernel" in r.env for r in map(lambda r: load_run(r.path), search(status="running"))): time.sleep(.1)
        r = search(status="running")[0]
        assert r.inputs["notebook"] == "sleep.ipynb"
        tag_run(r, ["asked"])
        from somaagent.cli.runs import runs as cli
        assert "cancelled" in CliRunner().invoke(cli, ["cancel", r.id], catch_exceptions=False).output
        assert p.wait(30) == 0 and find_run(r.id).status == "cancelled" and find_run(r.id).tags == ["asked"]
        assert r.env["hardware"]["cores"] >= 1 and r.env["git"] == {} and r.env["environment"].startswith("sha256:")
    finally: p.kill()
