"Replay: the same run again is equal to the last bit; a changed row, tensor, figure or clock is told apart, found and named. Real kernels, tiny notebooks."
import json, os, shutil
from datetime import datetime, timedelta, timezone
from pathlib import Path

import nbformat, numpy as np, polars as pl, pytest
from hypothesis import given, settings as hyp, strategies as st
from safetensors.numpy import save_file

from somaagent.core.errors import RunError
from somaagent.core.records import Run, new_id
from somaagent.runs.again import checks, home_before
from somaagent.runs.cellwise import follows
from somaagent.runs.filediff import Eyes
from somaagent.runs.fingerprint import fingerprint, settled, value_hash
from somaagent.runs.notebook import execute
from somaagent.runs.record import Record, load_run, save_run
from somaagent.runs.replay import compare, replay
from somaagent.runs.rules import Frame, frame_of, normalise, number_rule
from somaagent.runs.workflow import load_workflow, load_workflow_run, run_workflow

# --- rules ---------------------------------------------------------------------------------------

BEGIN = datetime(2026, 11, 20, 10, tzinfo=timezone.utc).timestamp()
THEN, NOW = Frame((("/Users/ann/.soma/runs/run_1", "<run>"),), BEGIN, BEGIN+100, "ann-laptop"), Frame((("/tmp/replay/soma/runs/run_1", "<run>"),), BEGIN+1e6, BEGIN+1e6+100, "build-7")

@hyp(max_examples=150, deadline=None)
@given(st.text(max_size=200))
def test_a_text_is_the_same_as_itself_and_normalising_it_twice_changes_nothing(text):
    assert Eyes(THEN, NOW).text(text, text) is None
    once = normalise(text, THEN)[0]
    assert normalise(once, THEN)[0] == once

@hyp(max_examples=100, deadline=None)
@given(st.floats(0, 99), st.integers(0, 10**6), st.integers(1, 2000))
def test_what_cannot_be_the_same_is_and_what_is_data_is_not(after, n, days):
    at = lambda f, s: datetime.fromtimestamp(f.begin+s, timezone.utc).isoformat()
    eyes = Eyes(THEN, NOW)
    assert eyes.same(f"{THEN.names[0][0]}/x at {at(THEN, after)} in {after:.1f} s by ann-laptop", f"{NOW.names[0][0]}/x at {at(NOW, 1)} in 3 s by build-7")
    old = datetime.fromtimestamp(BEGIN, timezone.utc) - timedelta(days=days)
    assert not eyes.same(f"first row {old.isoformat()}", f"first row {(old+timedelta(hours=1)).isoformat()}"), "a moment in the data is data"
    assert not eyes.same(f"{n} rows", f"{n+1} rows")
    assert eyes.rules["clock"] == eyes.rules["path"] == eyes.rules["host"] == 1

def test_an_id_counts_as_new_only_if_its_time_lies_in_the_run():
    fresh, known = new_id("exp"), "exp_01HZXW5Q8YJ3F4G5H6J7K8M9NP"
    t = datetime.now(timezone.utc).timestamp()
    assert normalise(f"{fresh} {known}", Frame((), t-5, t+5))[0] == f"<id> {known}"

def test_a_number_is_excused_by_its_field_and_never_by_its_value():
    assert [number_rule(k, 3.2, THEN) for k in ("seconds", "wall_s", "latency_ms", "peak_mb", "loss", "accuracy", "steps", "users")] == ["duration", "duration", "duration", "memory", "", "", "", ""]
    assert number_rule("created", BEGIN+50, THEN) == "clock" and number_rule("created", BEGIN-86400, THEN) == ""

def test_hours_in_an_answer_are_data_and_in_what_a_cell_printed_they_are_not():
    eyes = Eyes(THEN, NOW)
    assert eyes.same("trained in 24 s", "trained in 48 s") and eyes.same("9 s", "3 s", "took")
    assert not eyes.same("within 24 hours", "within 48 hours", "answer") and not eyes.same(dict(answer="24 hours"), dict(answer="48 hours"))
    assert eyes.cells(pl.DataFrame(dict(answer=["24 hours"])), pl.DataFrame(dict(answer=["48 hours"])))
    assert value_hash(dict(answer="24 hours"), THEN) != value_hash(dict(answer="48 hours"), NOW)

def test_progress_lines_may_be_more_or_fewer_and_the_last_one_stays():
    slow, quick = "training: 4/20 – loss .3\ntraining: 12/20 – loss .2\ntraining: 20/20 in 9 s – loss .1\nok\n", "training: 20/20 in 2 s – loss .1\nok\n"
    assert settled(slow)[0] == slow.split("\n", 2)[2] and settled(quick) == (quick, 0)
    assert settled("training: 20/20 – loss .1\n"+quick) == (quick, 1) and settled("score: 3/3\n") == ("score: 3/3\n", 0)
    assert settled(" 10%|#   | 1/10\r100%|####| 10/10\rdone") == ("done", 0)

def test_a_score_that_looks_like_progress_is_a_result():
    assert settled("correct: 45/50\n") == ("correct: 45/50\n", 0) and settled("share 45%| of all\n") == ("share 45%| of all\n", 0)
    assert settled("training: 30/60 – loss 1\ntraining: 40/60 in 3 s – loss .9\n") == ("training: 40/60 in 3 s – loss .9\n", 1), "it ended early"
    assert number_rule("min", 3.2, THEN) == number_rule("loss_min", 3.2, THEN) == "", "the least value is no duration"

def test_a_point_of_a_curve_counts_and_its_time_does_not(tmp_path):
    from somaagent.runs.cellwise import compare_record
    def one(name, points):
        rec = Record(tmp_path/name); rec.save()
        for s, v in points: rec.report(s, loss=v)
        return save_run(Run(id=name, name=name, status="completed", path=str(rec.dir)))
    a, b, c, d = one("a", [(1, .5), (2, .4)]), one("b", [(1, .5), (2, .4)]), one("c", [(1, .5), (2, .4000001)]), one("d", [(1, .5)])
    look = lambda x, y: [str(f[1]) for f in compare_record(Eyes(), x, y, [], None, None)[0]]
    assert look(a, b) == [] and look(a, c) == ["curve loss: step 2: 0.4 → 0.4000001"] and look(a, d) == ["curve loss: 2 → 1 points"]

def test_what_a_long_silent_cell_shows_is_kept_even_when_it_comes_after_the_reply(monkeypatch):
    "On a busy machine the two channels of a kernel are apart; a figure was lost that way, and its replay told"
    import asyncio, time
    from queue import Empty
    from types import SimpleNamespace as NS
    from somaagent.runs import session
    real, t0, replied = time.monotonic, time.monotonic(), []
    monkeypatch.setattr(session, "time", NS(monotonic=lambda: t0 + 50*(real()-t0)))   # seconds pass quickly
    word = lambda kind, **c: dict(msg_type=kind, parent_header=dict(msg_id="m"), content=c)
    shown = [word("display_data", data={"text/plain": "a figure"}, metadata={}), word("status", execution_state="idle")]
    class Client:
        def execute(self, source, allow_stdin=False): return "m"
        async def get_iopub_msg(self, timeout):
            await asyncio.sleep(.005)
            if not replied or real()-replied[0] < .03: raise Empty
            return shown.pop(0)
        async def get_shell_msg(self, timeout):
            await asyncio.sleep(.001)
            if real()-t0 < .25: raise Empty
            replied.append(real())
            return word("execute_reply", status="ok", execution_count=1)
    async def alive(): return True
    nb = dict(cells=[dict(cell_type="code", source="fig", metadata={}, outputs=[])], metadata={})
    assert asyncio.run(session.Session(nb, Client(), alive, 1000).run()) is None
    assert nb["cells"][0]["outputs"][0]["data"] == {"text/plain": "a figure"}

# --- differences ---------------------------------------------------------------------------------

def test_tables_are_compared_by_row_and_column():
    a = pl.DataFrame(dict(id=["a", "b", "c", "d"], n=[1, 2, 3, 4], x=[.5, float("nan"), .25, None]))
    eyes = Eyes()
    assert eyes.table(a, a.clone()) is None
    says = lambda b, **kw: Eyes(**kw).table(a, b, "t").text
    assert "row 3 (id c), column n: 3 → 7" in says(a.with_columns(n=pl.Series([1, 2, 7, 4])))
    assert says(a.filter(pl.col("id") != "b")) == "1 row went: id b"
    assert says(a.reverse()) == "the rows stand in another order"
    assert "columns differ: n: Int64 → Float64" in says(a.with_columns(pl.col("n").cast(pl.Float64)))
    assert "1 row came: id e" in says(pl.concat([a, pl.DataFrame(dict(id=["e"], n=[5], x=[0.])).cast(a.schema)]))
    near = a.with_columns(x=pl.col("x")*(1+1e-9))
    assert "relative difference 1e-09" in says(near)
    eyes = Eyes(tolerance=1e-5)
    assert eyes.table(a, near) is None and eyes.rules["tolerance"] == 2 and eyes.largest < 2e-9

def test_weights_by_tensor_half_precision_too(tmp_path):
    def save(tensors, path):
        at, spec = 0, {}
        for k, (dtype, x) in tensors.items(): spec[k] = dict(dtype=dtype, shape=list(x.shape), data_offsets=[at, at+x.nbytes]); at += x.nbytes
        head = json.dumps(spec).encode()
        path.write_bytes(len(head).to_bytes(8, "little") + head + b"".join(x.tobytes() for _, x in tensors.values()))
    half = lambda *v: (np.array(v, "<f4").view("<u4") >> 16).astype("<u2")
    w = dict(a=("F32", np.arange(6, dtype="<f4").reshape(2, 3)), b=("BF16", half(1, 1, 1, 1)), c=("F16", np.ones(2, "<f2")))
    save(w, tmp_path/"x.safetensors")
    save(w | dict(b=("BF16", half(1, 1, 1.5, 1))), tmp_path/"y.safetensors")
    save({k: v for k, v in w.items() if k != "c"}, tmp_path/"z.safetensors")
    d = Eyes().file(tmp_path/"x.safetensors", tmp_path/"y.safetensors", "w")
    assert (d.what, d.expected, d.got) == ("weights", 1., 1.5) and "1 of 3 tensors differ, most of all b" in d.text and "0.5" in d.text
    assert "without c" in Eyes().file(tmp_path/"x.safetensors", tmp_path/"z.safetensors").text
    assert Eyes(tolerance=.6).file(tmp_path/"x.safetensors", tmp_path/"y.safetensors") is None

def test_a_pickle_is_never_opened(tmp_path):
    import pickle
    class Bad:
        def __reduce__(self): return (os.mkdir, (str(tmp_path/"opened"),))
    (tmp_path/"a.pt").write_bytes(pickle.dumps(Bad())); (tmp_path/"b.pt").write_bytes(pickle.dumps(Bad())+b".")
    assert "a pickle is not looked into" in Eyes().file(tmp_path/"a.pt", tmp_path/"b.pt").text and not (tmp_path/"opened").exists()

def test_datasets_say_which_row_moved(tmp_path):
    rows = pl.DataFrame(dict(id=[f"r{i}" for i in range(6)], prompt=[f"q{i}" for i in range(6)], answer=["x"]*6))
    def folder(name, train, answer="x"):
        (tmp_path/name).mkdir()
        for s, ids in dict(train=train, test=[i for i in range(6) if i not in train]).items(): rows[ids].with_columns(answer=pl.lit(answer)).write_parquet(tmp_path/name/f"{s}.parquet")
        (tmp_path/name/"manifest.json").write_text(json.dumps(dict(name="d", hash=name)))
        return tmp_path/name
    a = folder("a", [0, 1, 2, 3])
    d = Eyes().path(a, folder("b", [0, 1, 2, 4]), "dataset")
    assert d.what == "dataset" and "(id r3), column split: train → test" in d.text and "(id r4), column split: test → train" in d.text
    assert "the same rows; its manifest differs: hash" in Eyes().path(a, folder("c", [0, 1, 2, 3]), "dataset").text

def test_figures_packed_or_not_and_images(tmp_path):
    import base64, struct, zlib
    def png(path, x, filtered):
        "A grey picture, its lines as they are or, from the second on, as differences"
        rows = [bytes([0]) + bytes(x[0])] + [(bytes([2]) + bytes((x[i]-x[i-1]) & 255) if filtered else bytes([0]) + bytes(x[i])) for i in range(1, len(x))]
        part = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind+data))
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + part(b"IHDR", struct.pack(">IIBBBBB", x.shape[1], x.shape[0], 8, 0, 0, 0, 0)) + part(b"IDAT", zlib.compress(b"".join(rows))) + part(b"IEND", b""))
    pack = lambda v: dict(dtype="f8", bdata=base64.b64encode(np.array(v, "<f8").tobytes()).decode())
    fig = lambda y: dict(data=[dict(type="scatter", x=[1, 2], y=y, name="tuned")], layout=dict(width=400))
    assert Eyes().figure(fig(pack([.1, .2])), fig([.1, .2])) is None
    assert "trace 1 (tuned), y, point 2: 0.2 → 0.3" in Eyes().figure(fig(pack([.1, .2])), fig(pack([.1, .3])), "f").text
    x = np.arange(32, dtype="u1").reshape(4, 8); y = x.copy(); y[1, 3] = 200
    png(tmp_path/"a.png", x, False); png(tmp_path/"same.png", x, True); png(tmp_path/"b.png", y, True)
    assert Eyes().file(tmp_path/"a.png", tmp_path/"same.png") is None
    assert "1 of 32 pixels differ, in rows 2–2 and columns 4–4" in Eyes().file(tmp_path/"a.png", tmp_path/"b.png").text
    (tmp_path/"c.png").write_bytes((tmp_path/"a.png").read_bytes()[:40])
    assert "bytes" in Eyes().file(tmp_path/"a.png", tmp_path/"c.png").text

def test_what_follows_from_what():
    assert follows(["x = f()", "y = x + 1", "z = 3", "print(y)"], [1, 2, 4]) == {2: 1, 4: 1}
    assert follows(["x = f()", "x = 1", "print(x)"], [1, 3]) == {}, "set anew from what is the same"
    assert follows(["xs = []", "xs.append(f())", "print(xs)"], [2, 3]) == {3: 2}
    assert follows(["run.metric('a', f())", "run.metric('b', 1)"], [1, 2]) == {}, "the record carries nothing over"
    assert follows(["x = f()", "%%bash\necho $x", "y"], [1, 2, 3]) == {2: 1, 3: 1}, "what cannot be read may depend on everything"

# --- the registry as it stood --------------------------------------------------------------------

def test_the_registry_of_a_replay_is_that_of_the_run_s_beginning(tmp_path, monkeypatch):
    monkeypatch.setenv("SOMA_STORES_HOME", str(tmp_path/"old"))
    from somaagent.core.records import ModelVersion
    from somaagent.store.artifacts import Artifacts
    from somaagent.store.state import ModelVersionRow, ReleaseEventRow, State
    t = datetime(2026, 11, 1, tzinfo=timezone.utc)
    (tmp_path/"w").mkdir(); (tmp_path/"w"/"a.txt").write_text("weights")
    digest = Artifacts(tmp_path/"old"/"artifacts").put(tmp_path/"w")
    s = State(f"sqlite:///{tmp_path/'old'/'state.db'}")
    with s.session() as q:
        for i, (v, status) in enumerate((("1.0.0", "retired"), ("1.1.0", "production"), ("1.2.0", "refused"))):
            q.add(ModelVersionRow.of(ModelVersion(name="desk", version=v, base="tiny", hash=digest, status=status, created_at=t+timedelta(days=i))))
            if status != "refused": q.add(ReleaseEventRow(name="desk", version=v, action="promoted", ts=t+timedelta(days=i, hours=1)))
    s.close()
    for when, want in ((timedelta(hours=2), {"1.0.0": "production"}), (timedelta(days=1, minutes=5), {"1.0.0": "production", "1.1.0": "candidate"}), (timedelta(days=1, hours=2), {"1.0.0": "retired", "1.1.0": "production"})):
        new = tmp_path/f"new{when.total_seconds():.0f}"
        home_before(tmp_path/"old", new, t+when)
        d = State(f"sqlite:///{new/'state.db'}")
        with d.session(write=False) as q: assert {r.version: r.status for r in q.query(ModelVersionRow)} == want
        d.close()
        assert Artifacts(new/"artifacts").verify(digest)

# --- a workflow, twice ---------------------------------------------------------------------------

def notebook(path, first, *cells):
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(first, metadata=dict(tags=["parameters"]))] + [nbformat.v4.new_code_cell(c, metadata=dict(tags=["varies"]) if c.startswith("# varies") else {}) for c in cells])
    nbformat.write(nb, path)
    return path

MAKE = ["import json, time\nfrom pathlib import Path\nimport polars as pl\nfrom somaagent.core.settings import settings\nfrom somaagent.runs.record import current_run\nrun = current_run()",
    "rows = pl.read_csv(log)\nrun.table('log', rows)\nprint(len(rows), 'rows in', round(time.process_time(), 3), 's')",
    "d = settings().stores.home/'datasets'/'demo'\nd.mkdir(parents=True, exist_ok=True)\nrows.head(3).write_parquet(d/'train.parquet')\nrows.tail(-3).write_parquet(d/'test.parquet')\n(d/'manifest.json').write_text(json.dumps(dict(name='demo')))\nrun.output('dataset', str(d))"]
TRAIN = ["import numpy as np, polars as pl\nfrom pathlib import Path\nfrom safetensors.numpy import save_file\nfrom somaagent.runs.record import current_run\nrun = current_run()\nrng = np.random.default_rng(seed)",
    "y = pl.read_parquet(Path(dataset)/'train.parquet')['rating'].to_numpy()\nw = rng.normal(size=(3, 2)) + y.mean()\nsave_file(dict(w=w, b=np.zeros(2)), run.path('model', 'model.safetensors'))\nrun.output('model', str(run.path('model')))",
    "loss = float((w**2).mean())\nrun.metric('loss', loss)\nrun.metric('seconds', __import__('time').process_time(), unit='s')\nprint(f'loss {loss:.4f}')",
    "# varies: nobody seeds it\nimport os\nos.urandom(4).hex()", "names = sorted(['b', 'a'])\nnames"]

@pytest.fixture(scope="module")
def wf(tmp_path_factory):
    d = tmp_path_factory.mktemp("wf")
    notebook(d/"make.ipynb", "log = ''", *MAKE); notebook(d/"train.ipynb", "dataset = ''\nseed = 0", *TRAIN)
    (d/"two.yaml").write_text(json.dumps(dict(name="two", params=dict(log=dict(type="path", default=""), seed=dict(type="int", default=0)), stages=[dict(id="make", notebook="make.ipynb", params=dict(log="${log}"), outputs=["dataset"]),
        dict(id="train", notebook="train.ipynb", params=dict(dataset="${make.dataset}", seed="${seed}"), outputs=["model"])])))
    (d/"log.csv").write_text("id,prompt,rating\n" + "".join(f"r{i},question {i},{i%5}\n" for i in range(5)))
    return d

@pytest.fixture(scope="module", autouse=True)
def at(tmp_path_factory):
    old = {k: os.environ.get(k) for k in ("SOMA_STORES_HOME", "SOMA_TRACKING_BACKEND")}
    os.environ.update(SOMA_STORES_HOME=str(tmp_path_factory.mktemp("replay")/"home"), SOMA_TRACKING_BACKEND="none")
    yield Path(os.environ["SOMA_STORES_HOME"])
    for k, v in old.items(): os.environ.pop(k) if v is None else os.environ.update({k: v})

@pytest.fixture(scope="module")
def ran(wf, at):
    return run_workflow(load_workflow(wf/"two.yaml"), dict(log=str(wf/"log.csv"), seed=7)).run

@pytest.fixture(scope="module")
def kept(ran, at):
    "The run's replay, in a folder where it stays"
    everything = lambda: {p.relative_to(at): p.read_bytes() for p in at.rglob("*") if p.is_file() and not p.name.startswith("state.db-")}   # of a reader, too, SQLite takes notes
    there = everything()
    rep = replay(ran, at.parent/"kept")
    assert everything() == there, "a replay touches nothing of the run's home"
    return rep

def test_the_same_again_is_equal_to_the_last_bit(kept):
    assert kept.equal and kept.first is None and not kept.rules["tolerance"], kept.summary()
    assert [c.state for c in kept.cells if c.state != "same"] == ["varies"] and "nobody seeds it" in kept.summary()
    assert kept.rules["duration"] >= 1 and "to the last bit" in kept.summary()
    assert all(c.same is not False for c in kept.checks if c.what in ("notebook", "data", "machine", "packages"))
    d = kept.to_dict()
    json.dumps(d)
    assert d["equal"] and [s["id"] for s in d["stages"]] == ["make", "train"] and d["rules"]["duration"]["rule"]

def test_what_a_run_keeps_is_small_and_quick(ran):
    import time
    for s in load_workflow_run(ran.path).stages.values():
        began = time.process_time(); got = fingerprint(s.path, save=False); took = time.process_time()-began
        assert took < .1 and json.loads((Path(s.path)/"fingerprint.json").read_text())["files"] == got["files"]

@pytest.fixture
def changed():
    "Change a file, and have it back afterwards"
    old = {}
    def change(path, how):
        path = Path(path); old[path] = (path.read_bytes(), os.stat(path))
        how(path)
    yield change
    for p, (raw, s) in old.items(): p.write_bytes(raw); os.utime(p, ns=(s.st_atime_ns, s.st_mtime_ns))

def test_a_changed_row_of_a_recorded_table_is_named(ran, kept, changed):
    t = Path(load_workflow_run(ran.path).stages["make"].path)/"tables"/"log.parquet"
    changed(t, lambda p: pl.read_parquet(p).with_columns(prompt=pl.when(pl.col("id") == "r2").then(pl.lit("another")).otherwise("prompt")).write_parquet(p))
    f = compare(ran, kept.home).first
    assert (f.stage, f.cell, f.what, f.name, f.expected, f.got) == ("make", 3, "table", "log", "another", "question 2")
    assert "row 3 (id r2), column prompt: another → question 2" in f.difference and "what it wrote is what the replay wrote" in f.note

def test_changed_weights_and_a_changed_metric_are_named_and_the_cause_comes_first(ran, kept, changed):
    d = Path(load_workflow_run(ran.path).stages["train"].path)
    def one(p):
        from safetensors.numpy import load_file
        w = {k: v.copy() for k, v in load_file(p).items()}; w["w"][1, 1] += 2**-40; save_file(w, p)
    changed(d/"model"/"model.safetensors", one)
    changed(d/"result.json", lambda p: p.write_text(p.read_text().replace('"loss": {\n   "value": ', '"loss": {\n   "value": 1')))
    rep = compare(ran, kept.home)
    assert rep.first.what == "weights" and rep.first.cell == 3 and "1 of 2 tensors differ, most of all w" in rep.first.difference and "9.09e-13" in rep.first.difference
    assert any(f.name == "metric loss" and f.what == "number" and f.cell == 4 and f.note.startswith("changed after") for f in rep.findings), rep.findings
    loose = compare(ran, kept.home, tolerance=1e-9)
    assert [f.name for f in loose.findings if not f.varies] == ["metric loss"] and loose.rules["tolerance"] == 1

def test_a_changed_input_is_named_and_the_run_s_own_copy_is_used_also_of_a_stage_taken_from_another_run(ran, wf, changed):
    run = run_workflow(load_workflow(wf/"two.yaml"), dict(log=str(wf/"log.csv"), seed=9)).run
    assert load_workflow_run(run.path).stages["make"].env["taken"]["workflow"] == ran.id
    changed(wf/"log.csv", lambda p: p.write_text(p.read_text().replace("question 4,4", "question 4,1")))
    said = [c for c in checks(load_workflow_run(run.path).stages["make"]) if c.what == "data"]
    assert [c.same for c in said] == [False] and "row 5 (id r4), column rating: 4 → 1" in said[0].says and "own copy is used" in said[0].says
    rep = replay("last")
    assert rep.run.id == run.id and rep.equal and len(rep.stages) == 2, rep.summary()

def test_a_dataset_that_changed_between_two_stages_is_the_cause(wf, at):
    def tamper(e):
        if e["event"] == "stage" and e.get("stage") == "make" and e["status"] == "completed":
            f = Path(e["run"].outputs["dataset"])/"train.parquet"
            pl.read_parquet(f).with_columns(rating=pl.when(pl.col("id") == "r1").then(4).otherwise("rating")).write_parquet(f)
    home = at.parent/"tampered"
    run = run_workflow(load_workflow(wf/"two.yaml"), dict(log=str(wf/"log.csv"), seed=8), home=home, on_event=tamper).run
    rep = replay(run)
    f = rep.first
    assert (f.stage, f.cell, f.what, f.name) == ("train", 0, "dataset", "input dataset"), rep.summary()
    assert "(id r1), column rating: 4 → 1" in f.difference and f.note == "changed after make had written it, before train read it"
    after = [g for g in rep.findings if g.stage == "train" and g is not f]
    assert {"weights", "number"} <= {g.what for g in after} and all(g.because or g.varies for g in after)

def test_a_run_that_is_not_the_same_twice_names_the_first_cell_and_its_consequence(tmp_path):
    nb = notebook(tmp_path/"a.ipynb", "n = 2", "import random", "x = random.random()\nx", "base = 3\nbase", "y = x * n + base\nprint(f'y is {y}')", "import uuid\nuuid.uuid4()")
    run = execute(nb, dict(n=3))
    rep = replay(run)
    assert not rep.equal and (rep.first.cell, rep.first.what) == (3, "number") and [c.state for c in rep.cells] == ["same", "same", "differs", "same", "follows", "same"]
    assert next(f for f in rep.findings if f.cell == 5).because == "cell 3" and rep.rules["id"] == 1
    page = rep.html(tmp_path/"page.html").read_text()
    assert "cell 3" in page and "follows from cell 3" in page and "http" not in page.replace("http-equiv", "")

def test_a_failed_run_fails_again_in_the_same_place_and_an_edited_notebook_does_not_matter(tmp_path):
    nb = notebook(tmp_path/"a.ipynb", "n = 2", "print('so far')\n1/0")
    run = execute(nb)
    assert run.status == "failed"
    notebook(tmp_path/"a.ipynb", "n = 2", "print('mended')")
    rep = replay(run)
    assert rep.equal and any(c.what == "notebook" and c.same is False and "own copy" in c.says for c in rep.checks)

def test_a_single_stage_takes_its_dataset_from_the_home_and_says_when_it_is_another(ran, changed):
    data = Path(load_workflow_run(ran.path).stages["make"].outputs["dataset"])
    changed(data/"test.parquet", lambda p: pl.read_parquet(p).head(1).write_parquet(p))
    rep = replay(ran, stages=["train"])
    assert [c.stage for c in rep.checks if c.what == "data" and c.same is False and "lies in the home" in c.says] == ["train"]
    assert rep.left == ["make"] and {c.state for c in rep.cells} == {"same", "varies"} and not rep.first, "the training does not read the test rows: " + rep.summary()

def test_without_its_input_a_run_cannot_be_repeated(tmp_path, at):
    (tmp_path/"in.txt").write_text("x"*100)
    run = execute(notebook(tmp_path/"a.ipynb", "log = ''", "open(log).read()[:3]"), dict(log=str(tmp_path/"in.txt")))
    (tmp_path/"in.txt").unlink(); shutil.rmtree(at/"artifacts")
    with pytest.raises(RunError, match="an input of the run is gone"): replay(run)
    with pytest.raises(RunError, match="no such stage"): replay(run, stages=["train"])
