"Sweeps under faults: killed at random moments, failing trials, early ends, the same result however parallel. Real processes, and real kernels where they matter."
import json, math, os, pickle, random, signal, subprocess, sys, time
from pathlib import Path

import nbformat, pytest
from click.testing import CliRunner

from somaagent.core.errors import DataError, RunError
from somaagent.core.records import Run
from somaagent.runs.batch import LocalExecutor
from somaagent.runs.findings import load_findings
from somaagent.runs.record import Record, list_runs, save_run
from somaagent.runs.space import make_sweep
from somaagent.runs.sweep import load_sweep_run, run_sweep

@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("SOMA_STORES_HOME", str(tmp_path/"home"))
    monkeypatch.setenv("SOMA_TRACKING_BACKEND", "none")
    monkeypatch.setattr("somaagent.runs.study.code_hash", lambda: "the same")   # whatever is edited meanwhile
    return tmp_path/"home"

def notebook(path, *cells):
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c, metadata=dict(tags=["parameters"][:i == 0])) for i, c in enumerate(cells)])
    nbformat.write(nb, path)
    return path

@pytest.fixture
def fit(tmp_path): return notebook(tmp_path/"fit.ipynb", "lr = .1\nrank = 8\nseed = 0", "train()")

def sweep(path, **kw):
    raw = dict(name="t", notebook=path.name, space=dict(lr="loguniform(1e-4, 1)", rank=[4, 8, 16]), metric="loss", goal="minimize", trials=9, startup=3, seed=2)
    return make_sweep(raw | kw, path.with_suffix(".yaml"))

def stand_in(job, on_event=None, cancel=None, nap=0.):
    "What the notebook would do; a line in `ran.txt` when it is done"
    Path(job.run_dir).mkdir(parents=True, exist_ok=True)
    rec, p = Record(job.run_dir), job.params
    loss = (math.log10(p["lr"]) + 2)**2 + p["rank"]/100
    for s in range(1, 10):
        time.sleep(nap)
        if not rec.report(s, loss=loss + 1/s): break
        if on_event: on_event(dict(event="metric", step=s, metrics=dict(loss=loss + 1/s)))
    rec.metric("loss", loss)
    run = save_run(Run(id=job.run_id, name=job.name, status="completed", parameters=p, metrics=rec.result["metrics"], path=str(job.run_dir), parent=job.parent))
    with open(Path(job.notebook).parent/"ran.txt", "a") as f: f.write(f"{job.run_id}\n")
    return run

def table(sr): return sr.frame(result=True).rows()

# --- killed --------------------------------------------------------------------------------------

def work(path, kw, where, parallel):
    "What a process of its own does: the sweep, with a stand-in for the kernels where `parallel` says how many"
    import somaagent.runs.study as study
    study.code_hash = lambda: "the same"   # as in the fixture
    sw = sweep(Path(path), **kw)
    print("ready", flush=True)
    if parallel: run_sweep(sw, on=LocalExecutor(parallel, run=lambda *a: stand_in(*a, nap=.01)), home=where)
    else: run_sweep(sw)

def process(path, kw, where="", parallel=0):
    "The sweep in a fresh process (not a forked one: a fork has this process's locks without the threads that would open them), from the moment it begins"
    code = "import json, sys; sys.path.insert(0, sys.argv[1]); import test_sweep; test_sweep.work(*json.loads(sys.argv[2]))"
    p = subprocess.Popen([sys.executable, "-c", code, str(Path(__file__).parent), json.dumps([str(path), kw, str(where), parallel])], stdout=subprocess.PIPE, text=True)
    assert p.stdout.readline().strip() == "ready"
    return p

def in_a_process(*what, kill_after=None):
    "Run it; SIGKILL it after some seconds"
    p = process(*what)
    try: return p.wait(120 if kill_after is None else kill_after)
    except subprocess.TimeoutExpired: p.kill()
    assert kill_after is not None, "it did not end"
    return p.wait(20)

@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_at_random_moments_it_goes_on_and_finds_the_same(fit, tmp_path, seed):
    rng, kw = random.Random(seed), dict(prune=dict(kind="asha", first=2, factor=2, last=9))
    p, begun = process(fit, kw, tmp_path/"whole", 3), time.monotonic()
    assert p.wait(120) == 0
    took, kills = time.monotonic() - begun, 0
    for _ in range(3):
        kills += in_a_process(fit, kw, tmp_path/"cut", 2, kill_after=rng.uniform(.05, .7*took)) == -signal.SIGKILL
        done = [t.run_id for d in (tmp_path/"cut"/"runs").glob("run_*") if (d/"sweep.json").exists() and (d/"run.json").exists() for t in load_sweep_run(d).trials if t.final]
        ran = (tmp_path/"ran.txt").read_text().split()
        assert all(ran.count(i) <= 1 for i in done), "a finished trial ran twice"
    assert kills and in_a_process(fit, kw, tmp_path/"cut", 2) == 0
    whole, cut = (next(load_sweep_run(p.parent) for p in (tmp_path/w/"runs").glob("*/sweep.json")) for w in ("whole", "cut"))
    assert len(list((tmp_path/"cut"/"runs").glob("*/sweep.json"))) == 1
    assert table(whole) == table(cut) and whole.run.outputs["dataset_hash"] == cut.run.outputs["dataset_hash"]
    assert whole.counts().get("pruned")

def test_killed_with_real_kernels(tmp_path, home):
    nb = notebook(tmp_path/"fit.ipynb", "x = 0", "from somaagent.runs.record import current_run\nrun = current_run()\nrun.metric('loss', (x-2)**2)", "open(run.dir.parents[2]/'log.txt', 'a').write(f'{x}\\n')")
    kw = dict(space=dict(x=[0, 1, 2]), sampler="grid", trials=None, parallel=1)
    sw = sweep(nb, **kw)
    def finished(): return [t.number for f in home.glob("runs/*/sweep.json") if (f.parent/"run.json").exists() for t in load_sweep_run(f.parent).trials if t.final]
    p = process(nb, kw)
    end = time.monotonic() + 60
    while not finished() and time.monotonic() < end: time.sleep(.05)
    time.sleep(random.Random(os.getpid()).uniform(0, .5))
    p.kill(); p.wait(20)
    at_kill = finished()
    assert load_sweep_run(next(home.glob("runs/*/sweep.json")).parent).run.status == "interrupted"
    sr = run_sweep(sw)
    lines = (home/"runs"/"log.txt").read_text().split()
    assert at_kill and sr.resumed and sr.run.status == "completed" and sr.best.params == dict(x=2)
    assert all(lines.count(str(sr.trials[n].params["x"])) == 1 for n in at_kill)

# --- one sweep with real kernels, looked at from many sides -------------------------------------------

cells = ["how = 'good'\nscale = 1.", """
import time
from somaagent.runs.record import current_run
run = current_run()
if how == 'boom': raise ValueError('out of luck')
for step in range(1, 41):
    if not run.report(step, **{'other' if how == 'silent' else 'loss': scale/step}): break
    time.sleep(.03 if scale > 1 else 0)
if how != 'silent': run.metric('loss', float('nan') if how == 'nan' else scale/step)
run.output('steps', step)"""]

@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    d = tmp_path_factory.mktemp("mixed")
    nb = notebook(d/"mixed.ipynb", *cells)
    os.environ["SOMA_STORES_HOME"], old = str(d/"home"), os.environ.get("SOMA_STORES_HOME")
    events = []
    try:
        sw = sweep(nb, space=dict(how=["good", "nan", "boom", "silent"], scale=[1., 9.]), sampler="random", trials=10, seed=23, batch=2, prune=dict(kind="asha", first=2, factor=2, last=40), max_failures=10)
        return run_sweep(sw, on_event=events.append), events, d/"home"
    finally: os.environ.update(SOMA_STORES_HOME=old) if old else os.environ.pop("SOMA_STORES_HOME")

def test_a_failed_trial_is_a_result_with_its_reason(mixed):
    sr, events, _ = mixed
    assert sr.run.status == "completed" and len(sr.trials) == 10
    why = {t.params["how"]: t.reason for t in sr.trials if t.state == "failed"}
    assert "out of luck" in why["boom"] and "not a number" in why["nan"] and "records no metric 'loss'" in why["silent"]
    assert sr.best.params == dict(how="good", scale=1.)

def test_poor_trials_end_early(mixed):
    sr, events, _ = mixed
    ended = [t for t in sr.trials if t.state == "pruned" and not t.same]
    assert ended and all(t.step < 40 and "others were better" in t.reason for t in ended)
    steps = [json.loads((Path(t.path)/"result.json").read_text())["outputs"].get("steps") for t in ended if t.params["scale"] > 1]
    assert steps and all(s < 40 for s in steps), "the notebook was not told"
    assert {e["event"] for e in events} >= {"begin", "trial", "metric", "end"}

def test_the_same_parameters_run_once(mixed):
    sr, _, home = mixed
    twins = [t for t in sr.trials if t.same.startswith("trial ")]
    assert twins and all(t.value == sr.trials[int(t.same[6:])].value for t in twins)
    ran = list((sr.path/"trials").glob("*/run.json"))
    assert len(ran) == len(sr.trials) - len(twins) == len({t.key for t in sr.trials})

def test_the_dataset_is_what_it_says(mixed):
    sr, _, _ = mixed
    d = load_findings(sr.run.outputs["dataset"])
    assert d.hash == sr.run.outputs["dataset_hash"] and d.trials.height == 10 and d.manifest["runs"]["0"] == sr.trials[0].run_id
    f = d.path/"trials.parquet"
    good = f.read_bytes()
    try:
        f.write_bytes(good[:-1] + b"x")
        with pytest.raises(DataError, match="changed after"): load_findings(d.path)
    finally: f.write_bytes(good)

def test_the_command_line_tells_it(mixed, monkeypatch, tmp_path):
    from somaagent.cli.sweep import sweep as cli
    sr, _, home = mixed
    monkeypatch.setenv("SOMA_STORES_HOME", str(home))
    say = lambda *a: CliRunner().invoke(cli, list(a))
    out = json.loads(say("show", "t", "--json").stdout)
    assert len(out["table"]) == 10 and out["best"]["params"] == dict(how="good", scale=1.) and out["standing"]["sentence"]
    assert sr.run.id[-10:] in say("list").output and "scale = 1.0" in say("best").output and "out of luck" in say("status").output
    assert say("show", "last", "--html", str(tmp_path/"p.html")).exit_code == 0 and "parcoords" in (tmp_path/"p.html").read_text()
    assert say("stop").exit_code != 0 and "not running" in say("stop").output
    assert say("show", "nowhere").exit_code != 0

# --- what was asked, and by whom ----------------------------------------------------------------------

def test_jobs_travel(fit):
    seen = []
    class Far(LocalExecutor):
        def submit(self, job, on_event=None):
            seen.append(pickle.loads(pickle.dumps(job)))
            assert json.loads(json.dumps(job.params)) == job.params
            return super().submit(seen[-1], on_event)
    sr = run_sweep(sweep(fit, trials=3), on=Far(2, run=stand_in))
    assert [j.parent for j in seen] == [sr.run.id]*3 and len(list_runs(parent=sr.run.id)) == 0   # the stand-in writes no rows

def test_too_many_failures_end_it_and_failed_trials_can_have_another_chance(fit):
    def bad(job, on_event=None, cancel=None): raise OSError("the network is gone")
    with pytest.raises(RunError, match="4 trials failed.*the network is gone"): run_sweep(sweep(fit, max_failures=3), on=LocalExecutor(1, run=bad))
    sr = load_sweep_run(list_runs(kind="sweep")[0].path)
    assert sr.run.status == "failed" and sr.counts() == dict(failed=4)
    again = run_sweep(sweep(fit, max_failures=3), on=LocalExecutor(1, run=stand_in), retry_failed=True)
    assert again.run.id == sr.run.id and again.counts() == dict(completed=9)

def test_stop_begins_no_more_and_the_same_goes_on(fit):
    def until_three(job, on_event=None, cancel=None):
        run = stand_in(job, on_event)
        if job.run_dir.endswith("0002"): (Path(job.run_dir).parents[1]/"stop").touch()
        return run
    sr = run_sweep(sweep(fit), on=LocalExecutor(1, run=until_three))
    assert sr.run.status == "cancelled" and sr.counts() == dict(completed=3)
    assert run_sweep(sweep(fit), on=LocalExecutor(1, run=stand_in)).counts() == dict(completed=9)

def test_a_cancelled_trial_is_no_verdict(fit):
    "An executor that loses a run's machine cannot say how the trial would have been"
    class Lost(LocalExecutor):
        n = 0
        def submit(self, job, on_event=None):
            f = super().submit(job, on_event)
            self.n += 1
            if self.n == 2: self.cancel(job.run_id)
            return f
    def patient(job, on_event=None, cancel=None):
        if job.run_dir.endswith("0001") and cancel.wait(5): return Run(id=job.run_id, name="x", status="cancelled", path=job.run_dir)
        return stand_in(job, on_event)
    sw = sweep(fit, sampler="random", trials=4)
    sr = run_sweep(sw, on=Lost(2, run=patient))
    assert sr.run.status == "cancelled" and sr.counts() == dict(completed=3, waiting=1)
    assert run_sweep(sw, on=LocalExecutor(2, run=stand_in)).counts() == dict(completed=4)

def test_what_was_decided_freely_stays_decided(fit, tmp_path):
    "Asynchronous decisions depend on the moment; after a crash the recorded ones hold"
    sw = sweep(fit, order="free", prune=dict(kind="asha", first=1, factor=2, last=9))
    sr = run_sweep(sw, on=LocalExecutor(3, run=stand_in))
    assert sr.counts().get("pruned")
    before = table(sr)
    files = {t.number: json.loads((sr.path/"trials"/f"{t.number:04}.json").read_text()) for t in sr.trials}
    assert all(files[t.number]["state"] == t.state for t in sr.trials)
    run = json.loads((sr.path/"run.json").read_text()) | dict(status="cancelled")
    (sr.path/"run.json").write_text(json.dumps(run))
    n = len((tmp_path/"ran.txt").read_text().split())
    again = run_sweep(sw, on=LocalExecutor(1, run=stand_in))
    assert table(again) == before and len((tmp_path/"ran.txt").read_text().split()) == n

@pytest.mark.parametrize("change, says", [(dict(space={}), "space"), (dict(space=dict(lr="uniform(2, 1)")), "[Ll]ow is not below high"), (dict(params=dict(lr=.1)), "fixed and varied"),
    (dict(space=dict(lr="uniform(0, 1)"), sampler="grid"), "how many values"), (dict(prune="hyperband"), "hyperband must know"), (dict(confirm=dict(param="sed")), "other seeds"),
    (dict(notebook="no.ipynb"), "no such notebook"), (dict(space=dict(rank=["four"])), "wants int"), (dict(name="../x"), "name"), (dict(extra=1), "extra"), (dict(trials=0), "trials"),
    (dict(space=dict(lr=dict(low=float("nan"), high=1))), "finite"), (dict(batch=0), "batch"), (dict(resources=dict(cores=2)), "no such resource"), (dict(resources=dict(cpu=-1)), "no amount")])
def test_what_cannot_be_run_is_refused_before_anything_starts(fit, home, change, says):
    with pytest.raises(RunError, match=says): sweep(fit, **change)
    assert not (home/"runs").exists()

def test_a_file_that_lacks_something_says_what_may_stand_there(fit, home, tmp_path):
    from somaagent.runs.schedule import check_what
    f = tmp_path/"s.yaml"
    for more, says in (("", "goal is missing.*[Mm]inimize or maximize"), ("goal: minimize\ntrails: 3", "no field trails.*mean 'trials'")):
        f.write_text(f"name: s\nnotebook: {fit}\nspace: {{lr: [0.1, 0.2]}}\nmetric: loss\nsampler: grid\n{more}\n")
        with pytest.raises(RunError, match=says): check_what(dict(sweep=str(f)))   # not only when it fires, at night

def test_a_sweep_without_a_result_is_no_success(fit, home, monkeypatch):
    from somaagent.cli.sweep import sweep as cli
    from somaagent.runs import sweep as module
    def bad(job, on_event=None, cancel=None): raise OSError("the network is gone")
    monkeypatch.setattr(module, "run_sweep", lambda sw, on, **kw: run_sweep(sw, on=LocalExecutor(1, run=bad), **kw))
    r = CliRunner().invoke(cli, ["start", str(fit), "--metric", "loss", "-s", "lr=0.1,0.2", "--sampler", "grid"])
    assert r.exit_code == 1 and "2 trials, minimize loss" in r.output and "2 failed of 2" in r.output, r.output

def test_the_sweep_that_ships():
    from somaagent.runs.space import load_sweep
    sw = load_sweep("finetune")
    assert sw.size() == 24 and sw.prune.kind == "asha" and sw.confirm.seeds == 3
    with pytest.raises(RunError, match="there is no such sweep: 'fintune'. There are: finetune"): load_sweep("fintune")

def test_a_module_beside_the_notebook_and_files_in_a_list_are_part_of_a_trials_name(tmp_path):
    from somaagent.runs.study import Keys
    nb = notebook(tmp_path/"n.ipynb", "lr = .1\nrank = 8\nfiles = []", "import helper")
    (tmp_path/"helper.py").write_text("F = 1"); (tmp_path/"rows.txt").write_text("a")
    key = lambda: Keys(sw := sweep(nb, params=dict(files=[str(tmp_path/"rows.txt")]))).sweep(sw)
    names = [key()]
    assert key() == names[0]
    (tmp_path/"helper.py").write_text("F = 2"); names.append(key())
    (tmp_path/"rows.txt").write_text("b"); names.append(key())
    assert len(set(names)) == 3

def test_trials_are_queued_for_the_tracker_once_and_know_their_sweep(fit, home, monkeypatch):
    from somaagent.runs import track
    told = []
    monkeypatch.setattr(track, "track_later", lambda run, group=None, *a: told.append((run.id, run.status, group)))
    sr = run_sweep(sweep(fit, trials=3), on=LocalExecutor(2, run=stand_in), home=home, parent="run_of_a_schedule")
    assert sorted(told) == sorted((t.run_id, "completed", sr.run.id) for t in sr.trials) and sr.run.parent == "run_of_a_schedule"
    run_sweep(sweep(fit, trials=3), on=LocalExecutor(2, run=stand_in), home=home)
    assert len(told) == 3
