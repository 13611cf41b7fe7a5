"One run under faults: what it prints, what it exceeds, what dies, who kills it. Real kernels, tiny notebooks."
import json, os, random, signal, subprocess, sys, threading, time
from pathlib import Path

import nbformat, psutil, pytest

from somaagent.core.errors import BusyError, RunError
from somaagent.runs.batch import Job, LocalExecutor, Resources, run_many
from somaagent.runs.notebook import execute, explain
from somaagent.runs.record import list_runs, load_run
from somaagent.runs.watch import cancel_run

broken = Path(__file__).parent/"broken_notebooks"

@pytest.fixture(scope="module", autouse=True)
def shared_home(tmp_path_factory):
    "One home for the module: one process keeps warm kernels for all of it"
    home, mp = tmp_path_factory.mktemp("home"), pytest.MonkeyPatch()
    for k, v in dict(SOMA_STORES_HOME=home, SOMA_TRACKING_BACKEND="none", SOMA_KERNELS_WARM_IDLE_S=20).items(): mp.setenv(k, str(v))
    yield home
    mp.undo()

@pytest.fixture
def nb(tmp_path):
    def make(*cells, first="n = 1", name="a"):
        nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(first, metadata=dict(tags=["parameters"]))] + [nbformat.v4.new_code_cell(c) for c in cells])
        nbformat.write(nb, tmp_path/f"{name}.ipynb")
        return tmp_path/f"{name}.ipynb"
    return make

def saved(run): return nbformat.read(Path(run.path)/"notebook.ipynb", 4)
def texts(run): return "".join(o.text for c in saved(run).cells if c.cell_type == "code" for o in c.outputs if o.output_type == "stream")

def wait_for(what, seconds=40):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if (r := what()): return r
        time.sleep(.02)
    raise AssertionError("waited in vain")

def gone(who):
    try: p = psutil.Process(who["pid"])
    except psutil.NoSuchProcess: return True
    return (who["began"] and abs(p.create_time() - who["began"]) > 1) or p.status() == psutil.STATUS_ZOMBIE

# --- parameters and files ------------------------------------------------------------------------

def test_a_notebook_without_a_parameters_cell_runs_as_it_is_and_takes_none(tmp_path):
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("6*7")]), tmp_path/"a.ipynb")
    r = execute(tmp_path/"a.ipynb")
    assert r.status == "completed" and saved(r).cells[0].outputs[0].data["text/plain"] == "42"
    with pytest.raises(RunError, match="no parameters"): execute(tmp_path/"a.ipynb", dict(n=1))

@pytest.mark.parametrize("given, says", [(dict(stepz=1), "Did you mean 'steps'"), (dict(steps="3"), "wants int | None, not str"), (dict(steps=True), "not bool"), (dict(how="c"), "one of 'a', 'b'"), (dict(xs=[1, "x"]), "holds str"),
                                        (dict(xs=3), "not int"), (dict(lr="x"), "wants float"), (dict(), "must be given")])
def test_unknown_and_mistyped_parameters_are_refused_before_a_folder_exists(nb, shared_home, given, says):
    f = nb(first="from typing import Literal\nsteps: int|None = None\nhow: Literal['a', 'b'] = 'a'\nxs: list[int] = []\nlr: float = 1e-3\nlog: str")
    before = len(list(shared_home.glob("runs/*")))
    with pytest.raises(RunError) as e: execute(f, given | ({} if not given else dict(log="x")))
    assert says in str(e.value) and len(list(shared_home.glob("runs/*"))) == before

@pytest.mark.parametrize("file", sorted(p.name for p in broken.glob("*.ipynb")))
def test_a_broken_notebook_file_is_named_and_nothing_starts(file, shared_home):
    before = len(list(shared_home.glob("runs/*")))
    with pytest.raises(RunError, match="not a notebook|not valid Python|plain value|does not fit"): execute(broken/file)
    assert len(list(shared_home.glob("runs/*"))) == before

# --- what it prints ------------------------------------------------------------------------------

def test_a_cell_that_prints_a_hundred_megabytes(nb):
    "The notebook keeps the beginning and the end, the log everything, and the runner's memory does not grow with it"
    line = "x"*999
    f = nb(f"for i in range(100_000): print('{line}')\nprint('the last word')")
    me, peak, end = psutil.Process(), [], threading.Event()
    def look():
        while not end.wait(.02): peak.append(me.memory_info().rss/2**20)
    before = me.memory_info().rss/2**20
    t = threading.Thread(target=look); t.start()
    r = execute(f)
    end.set(); t.join()
    assert r.status == "completed"
    size = (Path(r.path)/"notebook.ipynb").stat().st_size
    assert size < 2.3*2**20 and "are left out here; the whole is in the run's log.txt" in texts(r) and texts(r).endswith("the last word\n")
    assert (Path(r.path)/"log.txt").stat().st_size == 100_000*1000 + len("the last word\n")
    assert max(peak) - before < 400, f"{before:.0f} → {max(peak):.0f} MB"

def test_the_log_has_an_end_too(nb, monkeypatch):
    monkeypatch.setenv("SOMA_RUNS_LOG_MB", "0.1"); monkeypatch.setenv("SOMA_RUNS_OUTPUT_MB", "0.01")
    r = execute(nb("for i in range(1000): print('y'*999)\n'z'*100_000"))
    log = (Path(r.path)/"log.txt").read_text()
    assert r.status == "completed" and len(log) < .12*2**20 and "the log ends here" in log
    assert (Path(r.path)/"notebook.ipynb").stat().st_size < 40_000 and "characters are left out" in saved(r).cells[1].outputs[-1].data["text/plain"] and "yyy" in saved(r).cells[1].outputs[0].text

def test_a_secret_is_in_nothing_that_is_saved(nb, monkeypatch):
    secret = "sk-live/0123+45 6789"
    monkeypatch.setenv("MY_SECRET_SOURCE", secret)
    code = ["import base64, os, sys, urllib.parse\nfrom somaagent.runs.record import current_run\nk = os.environ['API_KEY']\nassert len(k) == 20\nprint(k); print(repr(k)); print(base64.b64encode(f'user:{k}'.encode()).decode(), urllib.parse.quote(k))",
            "for c in k: sys.stdout.write(c); sys.stdout.flush()\nos.write(2, k.encode())\ncurrent_run().output('key', k); current_run().note(k)\n{'k': k}", "raise ValueError(f'bad key {k}')"]
    heard = []
    r = execute(nb(*code), secrets=dict(API_KEY="env:MY_SECRET_SOURCE"), on_event=heard.append)
    assert r.env["failure"]["ename"] == "ValueError" and "[secret API_KEY]" in r.error and r.env["secrets"] == dict(API_KEY="env:MY_SECRET_SOURCE")
    whole = "".join(p.read_bytes().decode("utf-8", "replace") for p in Path(r.path).rglob("*") if p.is_file()) + str(heard) + r.model_dump_json()
    for piece in ("0123+45", "0123%2B45", "MDEyMys0NSA2Nzg5", "live/0123"): assert piece not in whole, piece
    assert whole.count("[secret API_KEY]") > 8
    monkeypatch.delenv("MY_SECRET_SOURCE")
    with pytest.raises(RunError, match="MY_SECRET_SOURCE"): execute(nb("1"), secrets=dict(API_KEY="env:MY_SECRET_SOURCE"))

def test_a_secret_of_digits_leaves_the_figures_readable_and_a_variable_of_the_caller_is_cut_out_too(nb, monkeypatch):
    monkeypatch.setenv("PIN_SOURCE", "123456")
    r = execute(nb("import os\nfrom somaagent.runs.record import current_run\nrun = current_run(); run.metric('a', 1234567); run.metric('b', 7); print(os.environ['OUR_API_KEY'])"), secrets=dict(PIN="env:PIN_SOURCE"), env=dict(OUR_API_KEY="sk-given-by-the-caller-01"))
    assert r.metrics["b"]["value"] == 7 and r.metrics["a"]["value"] == "[secret PIN]7" and texts(r) == "[secret OUR_API_KEY]\n"
    assert not [f for f in Path(r.path).rglob("*") if f.is_file() and (b"123456" in f.read_bytes().replace(b"0.123456", b"") and f.name == "result.json" or b"sk-given" in f.read_bytes())]

def test_whoever_listens_and_fails_takes_no_run_along_and_limits_are_kept(nb):
    heard = []
    def listen(e):
        heard.append(e["event"])
        if e["event"] == "metric": raise ValueError("the listener is broken")
    r = execute(nb("from somaagent.runs.record import current_run\ncurrent_run().report(1, x=1)\nimport time; time.sleep(30)"), on_event=listen, resources=Resources(time_s=1.5))
    assert r.env["failure"]["kind"] == "time" and r.cost["wall_s"] < 20 and heard[-1] == "metric" and "the listener is broken" in r.env["beside"]

@pytest.mark.parametrize("what, ends", [(ValueError("no"), "failed"), (KeyboardInterrupt(), "cancelled")])
def test_a_run_that_breaks_off_before_it_is_looked_after_does_not_go_on_running(nb, monkeypatch, shared_home, what, ends):
    from somaagent.runs import notebook
    def keep(*a): raise what
    monkeypatch.setattr(notebook, "keep", keep)
    with pytest.raises(type(what)): execute(nb("1"), run_id=f"run_off_{ends}")
    assert load_run(shared_home/"runs"/f"run_off_{ends}").status == ends and [r.status for r in list_runs(limit=200) if r.id == f"run_off_{ends}"] == [ends]

# --- limits --------------------------------------------------------------------------------------

@pytest.mark.parametrize("what, code, limit, says", [("memory", "x = bytearray(400_000_000)\nimport time; time.sleep(30)", dict(memory_mb=300), "more than the 300 MB"), ("time", "import time; time.sleep(30)", dict(time_s=.6), "longer than the 0.6 s"),
                                                      ("cpu", "while True: pass", dict(cpu_s=.5), "of processor time, more than the 0.5 s")])
def test_a_limit_ends_the_run_and_says_which(nb, what, code, limit, says):
    began = time.monotonic()
    r = execute(nb("print('before')", code, "never = 1"), resources=Resources(**limit), retries=3)
    assert r.status == "failed" and r.env["failure"]["kind"] == what and says in r.error and time.monotonic() - began < 25
    assert "attempts" not in r.env, "a limit is kept by the next attempt as well"
    assert gone(r.env["kernel"]) and texts(r) == "before\n"

def test_a_childs_memory_counts_and_the_child_goes_with_the_kernel(nb):
    child = "import subprocess, sys, time\np = subprocess.Popen([sys.executable, '-c', 'x = bytearray(400_000_000); import time; time.sleep(60)'], start_new_session=True)\nfrom somaagent.runs.record import current_run\ncurrent_run().output('pid', p.pid)\ntime.sleep(30)"
    r = execute(nb(child), resources=Resources(memory_mb=300))
    assert r.env["failure"]["kind"] == "memory" and wait_for(lambda: gone(dict(pid=r.outputs["pid"], began=None)), 15)

def test_no_child_is_born_while_its_run_is_ended(nb):
    "It starts processes without end, each in a session of its own"
    r = execute(nb("import subprocess\nwhile True: subprocess.Popen(['sleep', '77.7'], start_new_session=True)"), resources=Resources(time_s=.5))
    left = [p for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"] == ["sleep", "77.7"] and p.status() != psutil.STATUS_ZOMBIE]
    for p in left: p.kill()
    assert r.env["failure"]["kind"] == "time" and not left

def test_children_end_with_their_run_and_those_sent_away_on_purpose_only_with_one_that_fails(nb):
    code = "import subprocess\nfrom somaagent.runs.record import current_run\nfor own in (False, True): current_run().output(f'own {own}', subprocess.Popen(['sleep', '60'], start_new_session=own).pid)"
    good, bad = execute(nb(code)), execute(nb(code, "1/0"))
    for pid in (good.outputs["own False"], bad.outputs["own False"], bad.outputs["own True"]): wait_for(lambda: gone(dict(pid=pid, began=None)), 15)
    os.kill(good.outputs["own True"], signal.SIGKILL)

# --- again ---------------------------------------------------------------------------------------

def test_what_chance_may_have_caused_is_tried_again_and_every_attempt_is_kept(nb, tmp_path):
    f = nb(f"from pathlib import Path\nf = Path({str(tmp_path/'tries')!r})\nk = len(f.read_text()) if f.exists() else 0\nf.write_text('x'*(k+1))\nprint('try', k+1)",
           "import os\nif k == 0: raise ConnectionError('the service was away')\nif k == 1: os._exit(9)", "from somaagent.runs.record import current_run\ncurrent_run().metric('tries', k+1)")
    heard = []
    r = execute(f, retries=3, pause_s=.01, on_event=heard.append)
    assert r.status == "completed" and r.metrics["tries"]["value"] == 3
    assert [(a["attempt"], a["kind"]) for a in r.env["attempts"]] == [(1, "error"), (2, "died")] and "service was away" in r.env["attempts"][0]["error"] and "exit code 9" in r.env["attempts"][1]["error"]
    from somaagent.core.records import Run
    odd = Run(id="r", name="a", env=dict(failure=dict(kind="died", exit=-40)))
    assert "killed by signal 40" in str(explain(odd))
    first = nbformat.read(Path(r.path)/"attempt-1.ipynb", 4)
    assert first.cells[2].outputs[-1].ename == "ConnectionError" and "try 2" in (Path(r.path)/"attempt-2.ipynb").read_text()
    assert [e["event"] for e in heard if e["event"] in ("begin", "retry", "end")] == ["begin", "retry", "retry", "end"]

def test_what_the_code_does_wrong_is_not_tried_again_unless_asked(nb):
    f = nb("x = (")
    assert "attempts" not in execute(f, retries=2, pause_s=.01).env
    assert len(execute(f, retries=1, retry_all=True, pause_s=.01).env["attempts"]) == 1

# --- one id, the clock, the disk -----------------------------------------------------------------

def test_two_runs_with_one_id(nb):
    f, ended = nb("import time; time.sleep(n)", name="b"), []
    t = threading.Thread(target=lambda: ended.append(execute(f, dict(n=2), run_id="run_same")))
    t.start()
    wait_for(lambda: list_runs(status="running", limit=5))
    with pytest.raises(BusyError, match="run of this id is under way"): execute(f, dict(n=2), run_id="run_same")
    t.join()
    again = execute(f, dict(n=2), run_id="run_same")
    assert again.ended_at == ended[0].ended_at and again.status == "completed", "a finished run is the answer"
    with pytest.raises(BusyError, match="another run has this id"): execute(f, dict(n=3), run_id="run_same")
    with LocalExecutor(1, run=lambda j, e, c: c.wait(5)) as ex:
        ex.submit(Job(f, run_id="run_x"))
        with pytest.raises(RunError, match="under way"): ex.submit(Job(f, run_id="run_x"))
        ex.cancel("run_x")

@pytest.mark.parametrize("jump", [-86_400, 86_400])
def test_a_clock_that_jumps(nb, monkeypatch, jump):
    import datetime as dt
    from somaagent.runs import notebook
    real, calls = notebook.utcnow, []
    monkeypatch.setattr(notebook, "utcnow", lambda: (calls.append(1), real() + (dt.timedelta(seconds=jump) if len(calls) > 1 else dt.timedelta()))[1])
    r = execute(nb("1"))
    assert r.status == "completed" and 0 <= (r.ended_at - r.started_at).total_seconds() < 30 and 0 < r.cost["wall_s"] < 30

@pytest.fixture
def tiny_disk(tmp_path):
    d = tmp_path/"disk"; d.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", d], capture_output=True).returncode: pytest.skip("needs to mount a tmpfs")
    yield d
    subprocess.run(["umount", "-l", d])

def test_a_full_disk_is_written_down_on_the_full_disk(nb, tiny_disk):
    r = execute(nb("from pathlib import Path\nimport os\nf = open('big', 'wb')\ntry:\n    while True: f.write(b'x'*4096); f.flush()\nexcept OSError: pass", "print('y'*200_000)", "raise OSError(28, 'No space left on device')"), run_dir=tiny_disk/"r")
    assert r.status == "failed" and "disk is full" in r.error
    assert load_run(tiny_disk/"r").status == "failed" and "disk is full" in load_run(tiny_disk/"r").error

def test_a_disk_that_fills_up_under_the_runner(nb, monkeypatch):
    "The notebook cannot be saved: a failure like others, with a record of it"
    from somaagent.runs import notebook
    real = notebook.write_atomic
    def full(path, data, *more):
        if Path(path).name == "notebook.ipynb" and "full now" in data: raise RunError("the disk is full", value="runs")
        return real(path, data, *more)
    monkeypatch.setattr(notebook, "write_atomic", full)
    r = execute(nb("print('full', 'now')", "2"))
    assert r.status == "failed" and "disk is full" in r.error and gone(r.env["kernel"]) and load_run(r.path).status == "failed"

# --- who ends it ---------------------------------------------------------------------------------

def test_cancel_by_a_thread_and_from_another_process(nb):
    f, stop = nb("print('on')", "import time; time.sleep(60)"), threading.Event()
    r = execute(f, cancel=stop, on_event=lambda e: e.get("text") == "on" and threading.Timer(.1, stop.set).start())
    assert r.status == "cancelled" and texts(r) == "on\n" and gone(r.env["kernel"]) and saved(r).cells[2].metadata.papermill.status == "failed"
    p = subprocess.Popen([sys.executable, "-c", f"import sys\nfrom somaagent.runs.notebook import execute\nr = execute({str(f)!r}, run_id='run_away')\nsys.exit(r.status != 'cancelled')"])
    wait_for(lambda: any(x.id == "run_away" and x.env.get("kernel") for x in [load_run(q.parent) for q in Path(os.environ["SOMA_STORES_HOME"]).glob("runs/run_away/run.json")]))
    r = cancel_run("run_away", by="Ann")
    assert r.status == "cancelled" and "cancelled by Ann" in r.error and p.wait(30) == 0 and gone(r.env["kernel"])
    with pytest.raises(RunError, match="is cancelled"): cancel_run("run_away", wait_s=0)

def test_ctrl_c_ends_a_batch_and_leaves_nothing_behind(nb, shared_home, tmp_path):
    f, said = nb("import time; time.sleep(60)", name="batch"), tmp_path/"said"
    code = f"from somaagent.runs.batch import *\ntry:\n    for j, r in run_many([Job({str(f)!r}, name='batch') for _ in range(5)], parallel=2): pass\nexcept KeyboardInterrupt: open({str(said)!r}, 'w').write('interrupted')"
    p = subprocess.Popen([sys.executable, "-c", code])
    def kernels():
        ks = [json.loads((Path(r.path)/"run.json").read_text())["env"].get("kernel") for r in list_runs(name="batch", limit=9) if (Path(r.path)/"run.json").exists()]
        return len(ks) == 2 and all(ks) and ks
    up = wait_for(kernels)
    p.send_signal(signal.SIGINT)
    assert p.wait(30) == 0 and said.read_text() == "interrupted"
    assert all(map(gone, up)) and [r.status for r in list_runs(name="batch", limit=9)] == ["cancelled"]*2

def test_jobs_that_plan_too_much_wait_and_failures_are_results(nb):
    good, bad = nb("import time; time.sleep(.1)", name="good"), nb("1/0", name="bad")
    with LocalExecutor(2, memory_mb=1000) as ex:
        peak, lock = [0, 0], threading.Lock()
        def see(e):
            if e["event"] in ("begin", "end"): peak[0] += 1 if e["event"] == "begin" else -1; peak[1] = max(peak)
        runs = {j.name: r for j, r in run_many([Job(good, name=f"g{i}", resources=Resources(cpu=0, memory_mb=600)) for i in range(3)] + [Job(bad, name="bad"), Job(good, dict(m=1), name="odd"), Job(Path("none.ipynb"), name="none")], on=ex, on_event=see)}
    assert {k: r.status for k, r in runs.items()} == dict(g0="completed", g1="completed", g2="completed", bad="failed", odd="failed", none="failed")
    assert "ZeroDivisionError" in runs["bad"].error and "no such parameter" in str(explain(runs["odd"])) and "no such notebook" in runs["none"].error

def test_a_thread_that_cannot_be_started_fails_its_run_and_no_other(monkeypatch):
    start = threading.Thread.start
    def some(self):
        if self.name == "run_b": raise RuntimeError("can't start new thread")
        start(self)
    monkeypatch.setattr(threading.Thread, "start", some)
    with LocalExecutor(1, run=lambda j, e, c: j.run_id) as ex: got = [ex.submit(Job("x.ipynb", run_id=i)).result(20) for i in ("run_a", "run_b", "run_c")]
    assert got[::2] == ["run_a", "run_c"] and got[1].status == "failed" and "thread" in got[1].error and ex.room.cpu == 1

def test_killed_at_random_moments_nothing_is_lost_and_it_goes_on(nb, shared_home):
    "Runner or kernel, `kill -9`: the record is there and true, no process is left, and the same id runs to its end"
    f = nb("from somaagent.runs.record import current_run\nrun = current_run()\nf = run.path('done.txt')\nimport time", "for i in range(int(f.read_text() or 0) if f.exists() else 0, 8):\n    f.write_text(str(i+1)); time.sleep(.05)", "run.output('steps', int(f.read_text()))", name="killed")
    code = f"import sys\nfrom somaagent.runs.notebook import execute\nprint('up', flush=True)\nr = execute({str(f)!r}, run_id=sys.argv[1])\nprint(r.status)"
    rng = random.Random(7)
    for k, whom in enumerate(("kernel", "runner", "kernel", "runner")):
        rid, d = f"run_kill{k}", shared_home/"runs"/f"run_kill{k}"
        ended = []
        p = subprocess.Popen([sys.executable, "-c", code, rid], stdout=subprocess.PIPE, text=True) if whom == "runner" else threading.Thread(target=lambda: ended.append(execute(f, run_id=rid).status))
        p.stdout.readline() if whom == "runner" else p.start()
        known = wait_for(lambda: (d/"run.json").exists() and (whom == "runner" or json.loads((d/"run.json").read_text())["env"].get("kernel")))
        time.sleep(rng.random()*.4)
        who = json.loads((d/"run.json").read_text())["env"].get("kernel")
        if whom == "runner": p.kill()
        elif not gone(who): os.kill(who["pid"], signal.SIGKILL)
        p.communicate(timeout=60) if whom == "runner" else p.join(60)
        r = load_run(d)
        who = r.env.get("kernel") or known
        assert isinstance(who, bool) or wait_for(lambda: gone(who), 15)
        assert r.status in (("interrupted", "completed") if whom == "runner" else ("failed", "completed")) and (whom == "runner" or ended == [r.status])
        assert [x.status for x in list_runs(limit=200) if x.id == rid] == [r.status]
        assert execute(f, run_id=rid).outputs["steps"] == 8
