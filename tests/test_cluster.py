"""Runs, sweeps, workflows and curation on a two-node Ray cluster on loopback, one of whose nodes is killed; nothing stays behind."""
import contextlib, importlib.util, json, os, signal, subprocess, sys, textwrap, time
from pathlib import Path

import nbformat, psutil, pytest

from conftest import missing

pytestmark = pytest.mark.slow
if importlib.util.find_spec("ray") is None: missing("ray")

from somaagent.core.errors import RunError
from somaagent.core.records import content_hash
from somaagent.runs.batch import Job, Resources
from somaagent.runs.cluster import RayExecutor, connect, two_nodes

BODY = """
import os, time
from pathlib import Path
from somaagent.runs.record import current_run
run = current_run()
n = len(Path(data).read_text()) if data else 0
print('seen', n, flush=True)
until = time.monotonic() + wait
while time.monotonic() < until: time.sleep(.05)
run.metric('y', (x-3)**2 + n)
(f := run.path('made', 'a.txt')).write_text(f'{x} {n}')
Path(os.environ['SOMA_STORES_HOME'], 'elsewhere.txt').write_text(str(x))
run.output('file', str(f)); run.output('given', data); run.output('home', os.environ['SOMA_STORES_HOME'] + '/elsewhere.txt')
if word: assert os.environ[word] == 'psssst!'; print(os.environ[word])
"""

def notebook(path, body=BODY, head="x = 0.\ndata = ''\nwait = 0.\nword = ''"):
    cells = [nbformat.v4.new_code_cell(head, metadata=dict(tags=["parameters"])), nbformat.v4.new_code_cell(body)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path

@pytest.fixture(scope="module")
def place(tmp_path_factory):
    d = tmp_path_factory.mktemp("ray")
    notebook(d/"tiny.ipynb"); (d/"rows.txt").write_text("12345")
    (d/"sweep.yaml").write_text(json.dumps(dict(name="tiny", notebook="tiny.ipynb", params=dict(data=str(d/"rows.txt"), wait=1.), space=dict(x=dict(choices=[1., 2., 3., 4., 5., 6.])), sampler="grid", metric="y", goal="minimize")))
    return d

@pytest.fixture(scope="module")
def cluster(place):
    "One cluster for all; its second node is started again when a test has killed it"
    old = {k: os.environ.get(k) for k in ("SOMA_STORES_HOME", "THE_WORD")}
    os.environ.update(SOMA_STORES_HOME=str(place/"home"), THE_WORD="psssst!")
    with two_nodes() as c: yield c
    for k,v in old.items(): os.environ.pop(k) if v is None else os.environ.__setitem__(k, v)

def until(what, seconds=60):
    end = time.monotonic() + seconds
    while not (got := what()):
        assert time.monotonic() < end, "it did not happen"
        time.sleep(.1)
    return got

def kernels(of):
    "Kernels of the runs below a folder that are alive"
    from somaagent.runs.record import is_alive
    about = [json.loads(f.read_text())["env"].get("kernel") for f in Path(of).rglob("run.json")]
    return [k["pid"] for k in about if k and is_alive(k)]

def test_a_sweep_is_the_same_with_a_node_lost(cluster, place):
    from somaagent.runs.sweep import run_sweep
    here = run_sweep(place/"sweep.yaml", home=place/"local")
    heard, killed = [], []
    def on_event(e):
        heard.append(e)
        if e.get("event") == "text" and not killed and on_second(e["run_id"]):
            killed.append(e["run_id"]); os.kill(cluster.nodes[1].raylet, signal.SIGKILL)
    on_second = lambda i: ex.turns[i].node == cluster.nodes[1].node_id
    with RayExecutor(cluster=cluster) as ex: there = run_sweep(place/"sweep.yaml", on=ex, home=place/"rayhome", on_event=on_event)
    assert killed, "no trial ran on the second node"
    assert there.frame(result=True).equals(here.frame(result=True)) and there.best.params == here.best.params == dict(x=3.)
    assert {r["x"]: r["y"] for r in here.frame(result=True).to_dicts()} == {x: (x-3)**2 + 5 for x in range(1, 7)}
    lost = [e for e in heard if e.get("event") == "retry"]
    assert [e["why"] for e in lost] == ["worker died, node lost"] and lost[0]["run_id"] == killed[0]
    from somaagent.runs.record import load_run
    trial = next(t for t in there.trials if t.run_id == killed[0])
    assert load_run(trial.path).env["ray"]["lost"][0]["why"] == "worker died, node lost"
    assert not kernels(place/"rayhome"), "a kernel outlived its node"
    cluster.nodes[1].kill()
    cluster.nodes.pop(); cluster.add()
    assert len(cluster.alive()) == 2

def test_files_travel_by_content_and_come_back(cluster, place):
    heard = []
    with RayExecutor(cluster=cluster, ship=True) as ex:
        job = Job(place/"tiny.ipynb", dict(x=4., data=str(place/"rows.txt"), word="THE_WORD"), secrets=dict(THE_WORD="env:THE_WORD"), name="shipped")
        specs, spec = [], ex._spec
        ex._spec = lambda job: specs.append(spec(job)) or specs[-1]
        runs = [f.result(60) for f in [ex.submit(job, heard.append), ex.submit(Job(place/"tiny.ipynb", dict(x=5.), retries=0))]]
        assert len(ex.sent) == 2 and len(specs) == 2 and "psssst!" not in repr(specs)   # notebook and rows, once each
    r = runs[0]
    assert r.status == "completed" and r.metrics["y"]["value"] == 6, r.error
    assert Path(r.outputs["file"]).read_text() == "4.0 5" and Path(r.outputs["file"]).is_relative_to(r.path) and Path(r.path).is_relative_to(place/"home")
    assert r.outputs["given"] == r.parameters["data"] == str(place/"rows.txt")
    assert Path(r.outputs["home"]).read_text() == "4.0" and Path(r.outputs["home"]).is_relative_to(r.path)
    assert any(e["event"] == "text" and "seen 5" in e["text"] for e in heard) and [e["event"] for e in heard][-1] == "end"
    saved = "".join(f.read_text(errors="replace") for f in Path(r.path).rglob("*") if f.is_file())
    assert "psssst!" not in saved and cluster.folder.name not in json.dumps(json.loads((Path(r.path)/"result.json").read_text()))

def test_cancelled_runs_end_their_kernels(cluster, place):
    with RayExecutor(cluster=cluster) as ex:
        f = ex.submit(Job(place/"tiny.ipynb", dict(wait=60.), run_dir=place/"home"/"long"))
        late = [ex.submit(Job(place/"tiny.ipynb", dict(wait=60.))) for _ in range(3)]
        until(lambda: kernels(place/"home"/"long"))
        assert not ex.cancel("run_unknown") and all(ex.cancel(g.run_id) for g in (f, *late))
        assert {g.result(60).status for g in (f, *late)} == {"cancelled"}
    until(lambda: not kernels(place/"home"), 10)

def test_what_cannot_be_done_is_said_at_once(cluster, place):
    with RayExecutor(cluster=cluster) as ex:
        with pytest.raises(RunError, match="no node of the cluster"): ex.submit(Job(place/"tiny.ipynb", resources=Resources(gpu=1)))
        bad = ex.submit(Job(place/"tiny.ipynb", dict(z=1)))
        died = ex.submit(Job(notebook(place/"dies.ipynb", "import os\nos.kill(os.getpid(), 9)"), name="dies"))
        assert bad.result(60).status == "failed" and "no such parameter" in bad.result().error
        assert died.result(60).status == "failed" and "kernel died" in died.result().error and "lost" not in died.result().env["ray"]
    with pytest.raises(RunError, match="another Ray cluster"): connect("10.1.2.3:6379")

def test_a_workflow_with_a_fan_out(cluster, place):
    from somaagent.runs.workflow import load_workflow, run_workflow
    notebook(place/"make.ipynb", "from somaagent.runs.record import current_run\nrun = current_run()\nrun.output('xs', [float(i) for i in range(n)])", "n = 0")
    notebook(place/"square.ipynb", "from somaagent.runs.record import current_run\nrun = current_run()\nrun.output('y', x*x)", "x = 0.")
    notebook(place/"total.ipynb", "from somaagent.runs.record import current_run\nrun = current_run()\nrun.output('total', sum(ys))", "ys = []")
    (place/"flow.yaml").write_text(textwrap.dedent("""
        name: squares
        params: {n: {type: int, default: 3}}
        stages:
          - {id: make, notebook: make.ipynb, params: {n: "${n}"}, outputs: [xs]}
          - {id: square, notebook: square.ipynb, each: "${make.xs}", params: {x: "${each}"}, outputs: [y]}
          - {id: total, notebook: total.ipynb, params: {ys: "${square.y}"}, outputs: [total]}
        """))
    wr = run_workflow(load_workflow(place/"flow.yaml"), home=place/"flowhome", on="ray")
    assert wr.run.status == "completed" and wr.stages["total"].outputs["total"] == 5. and "ray" in wr.stages["make"].env

def test_curation_is_the_same(cluster, place, tmp_path):
    from functools import partial
    from types import SimpleNamespace
    from somaagent.core.settings import data_dir
    from somaagent.data.builder import build
    from somaagent.data.interactions import import_log
    from somaagent.runs import raydata
    from somaagent.store.state import State
    from somaagent.store.warehouse import Warehouse
    with Warehouse(f"chdb://{tmp_path/'wh'}", mode="direct") as wh:
        st = State(f"sqlite:///{tmp_path/'state.db'}")
        src = import_log(data_dir()/"support_desk"/"traffic.jsonl.gz", wh).source
        kw = dict(name="d", st=st, privacy=dict(redact=True))
        here = build(wh, src, tmp_path/"here", **kw)
        far = SimpleNamespace(read_log=partial(raydata.read_log, chunk_bytes=200_000, part_rows=500), redact_parts=raydata.redact_parts)
        there = build(wh, src, tmp_path/"there", farm=far, **kw)
        st.close()
    assert there.hash == here.hash and there.counts == here.counts
    for s in ("train", "validation", "test"): assert content_hash(Path(there.path)/f"{s}.parquet") == content_hash(Path(here.path)/f"{s}.parquet")

def test_training_goes_on_when_a_worker_is_killed(cluster, place, tmp_path):
    import random, threading
    import polars as pl
    from somaagent.data.supportdesk import ask, reference
    from somaagent.runs.raytrain import train
    from somaagent.train.sft import SFTConfig
    for name,n in (("train", 48), ("validation", 12)):
        rng = random.Random(n)
        pl.DataFrame([dict(prompt=p, answer=reference(p)) for p in (ask(rng) for _ in range(n))]).write_parquet(place/f"{name}.parquet")
    out, killed = tmp_path/"job", []
    def kill():
        while not killed:
            time.sleep(.01)
            with contextlib.suppress(OSError, ValueError):
                step, pid = (out/".step").read_text().split()
                if int(step) >= 3: os.kill(int(pid), signal.SIGKILL); killed.append(pid)
    thread = threading.Thread(target=kill); thread.start()
    try: res = train(SFTConfig(max_steps=6, batch=8, save_every=2, eval_every=2, rank=4), place, out)
    finally: killed.append(""); thread.join()
    assert len(killed) == 2 and res.resumed_from >= 2 and res.steps == 6 and [h["step"] for h in res.history] == [1, 2, 3, 4, 5, 6]

DRIVER = """
import os, sys, time
from somaagent.runs.batch import Job
from somaagent.runs.cluster import RayExecutor
ex = RayExecutor("")
ex.submit(Job(sys.argv[1], dict(wait=600.)), lambda e: print(e["event"], flush=True))
time.sleep(600)
"""

def test_a_killed_driver_leaves_nothing(place, tmp_path):
    env = {k: v for k,v in os.environ.items() if not k.startswith("RAY_")} | dict(SOMA_STORES_HOME=str(tmp_path/"home"), SOMA_RAY_CPUS="1")
    p = subprocess.Popen([sys.executable, "-c", DRIVER, str(place/"tiny.ipynb")], env=env, stdout=subprocess.PIPE, text=True)
    try:
        while (said := p.stdout.readline()).strip() != "text": assert said, "the driver ended"
        all_of = [c.pid for c in psutil.Process(p.pid).children(recursive=True)]
        assert len(all_of) > 4 and kernels(tmp_path) and list(Path("/tmp").glob(f"sray-{p.pid}-*"))
    finally: p.kill(); p.wait()
    alive = lambda: [i for i in all_of if psutil.pid_exists(i) and psutil.Process(i).status() != psutil.STATUS_ZOMBIE]
    until(lambda: not alive() and not kernels(tmp_path) and not list(Path("/tmp").glob(f"sray-{p.pid}-*")), 20)
