"Workflows: killed at every point, side by side, taken from before, approved, and what is refused. Where nothing but the driver is meant, cells run in this process; otherwise kernels are real."
import json, os, random, signal, subprocess, sys, time
from concurrent.futures import Future
from pathlib import Path

import nbformat, psutil, pytest

from somaagent.core.errors import RunError
from somaagent.core.records import Run
from somaagent.runs import approval, background
from somaagent.runs.parameters import read_cells
from somaagent.runs.record import load_run, save_run, write_json
from somaagent.runs.workflow import Flow, draw, load_workflow, load_workflow_run, run_workflow

@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("SOMA_STORES_HOME", str(tmp_path/"home"))
    monkeypatch.setenv("SOMA_TRACKING_BACKEND", "none")
    return tmp_path/"home"

def notebook(path, first, *cells):
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(first, metadata=dict(tags=["parameters"]))] + [nbformat.v4.new_code_cell(c) for c in cells])
    nbformat.write(nb, path)
    return path

class Here:
    "An executor that runs a notebook's cells in this process, at once"
    def __init__(self): self.ran, self.jobs, self.capacity = [], [], 2
    def submit(self, job, on_event=None):
        self.ran.append(job.name); self.jobs.append(job)
        outputs, space, status, error, f = {}, {}, "completed", "", Future()
        for c in read_cells(job.notebook):
            space |= dict(output=outputs.__setitem__, folder=Path(job.run_dir)) | (job.params if space else {})
            space["folder"].mkdir(parents=True, exist_ok=True)
            try: exec(c["source"], space)
            except Exception as e: status, error = "failed", f"{job.name}: {type(e).__name__}: {e}"; break
        write_json(Path(job.run_dir)/"result.json", dict(outputs=outputs))
        f.set_result(save_run(Run(id=job.run_id, name=job.name, status=status, error=error, parameters=job.params, outputs=outputs if status == "completed" else {}, parent=job.parent, path=str(job.run_dir)), row=True))
        return f
    def cancel(self, run_id): pass

def flow(folder, text):
    (folder/"w.yaml").write_text(text)
    return load_workflow(folder/"w.yaml")

def go(wf, params=None, **kw):
    "Status or error, the run, and which notebooks ran"
    ex = Here()
    try: wr = run_workflow(wf, params, executor=ex, **kw); return wr.run.status, wr, ex.ran
    except RunError as e: return str(e), load_workflow_run(sorted((Path(os.environ["SOMA_STORES_HOME"])/"runs").glob("run_*"))[-1]), ex.ran

# --- killed anywhere --------------------------------------------------------------------------------

GRAPH = """
name: chain
params: {seed: {type: int, default: 0}, mark: {type: str, default: ""}}
stages:
  - {id: a, notebook: a.ipynb, params: {seed: "${seed}", mark: "${mark}"}, outputs: {xs: list}}
  - {id: b, notebook: b.ipynb, params: {x: "${each}", mark: "${mark}"}, each: "${a.xs}", outputs: {y: int}}
  - {id: d, notebook: d.ipynb, params: {xs: "${a.xs}", mark: "${mark}"}, outputs: {n: int}}
  - {id: c, notebook: c.ipynb, params: {ys: "${b.y}", n: "${d.n}", mark: "${mark}"}, outputs: {total: int, file: path}}
"""

def graph(folder, real=False):
    "Four stages; each leaves a line outside the run when it begins, and takes a little while"
    head = "from pathlib import Path\ndef say(t):\n    with open(mark, 'a') as f: f.write(t+'\\n')" + ("\nfrom somaagent.runs.record import current_run\nrun = current_run()\noutput, folder = run.output, run.dir" if real else "")
    nap = "\nimport time; time.sleep(.15)" if real else ""
    notebook(folder/"a.ipynb", "seed = 0\nmark = ''", head, f"say('a'){nap}\noutput('xs', [seed, seed+1, seed+2])")
    notebook(folder/"b.ipynb", "x = 0\nmark = ''", head, f"say(f'b{{x}}'){nap}\noutput('y', x*x)")
    notebook(folder/"d.ipynb", "xs = []\nmark = ''", head, f"say('d'){nap}\noutput('n', len(xs))")
    notebook(folder/"c.ipynb", "ys = []\nn = 0\nmark = ''", head, f"say('c'){nap}\n(folder/'out.txt').write_text(str(sum(ys)))\noutput('total', sum(ys)*n)\noutput('file', str(folder/'out.txt'))")
    return flow(folder, GRAPH)

def finished(runs):
    "Parts whose record says that they succeeded: name → line they leave"
    out = set()
    for f in (f for d in runs for f in d.glob("0*/**/run.json")):
        r = json.loads(f.read_text())
        if r["status"] == "completed" and not r["env"].get("parts"): out.add(r["name"][0] + (str(r["parameters"]["x"]) if "x" in r["parameters"] else ""))
    return out

def in_a_child(body):
    "Run it in a process of its own; its exit status"
    pid = os.fork()
    if pid: return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    code = 1
    signal.alarm(120)   # a forked process may wait for a lock that nobody opens any more
    try:
        with open(os.devnull, "w") as null: os.dup2(null.fileno(), 2)
        os.fsync = lambda fd: None   # what a process wrote outlives it; only a machine that stops needs more
        body(); code = 0
    finally: os._exit(code)

def test_killed_at_every_single_write_it_goes_on_without_repeating_what_succeeded(tmp_path, home):
    "The driver dies before its 1st, 3rd, 5th … change of a file (with SOMA_TEST_LONG: before every one), and is started again"
    wf, left, real = graph(tmp_path), [], os.replace
    assert go(wf, dict(mark=str(tmp_path/"warm")))[0] == "completed"   # everything is imported, the state store is there
    folders = lambda: {*(home/"runs").glob("run_*")}
    for n in range(1, 200, 1 if os.environ.get("SOMA_TEST_LONG") else 2):
        had, mark = folders(), tmp_path/f"mark{n}"
        run = lambda: run_workflow(wf, dict(seed=2, mark=str(mark)), executor=Here(), cache=False)
        def dying():
            count = [0]
            def replace(*a, **kw):
                count[0] += 1
                if count[0] == n: os.kill(os.getpid(), signal.SIGKILL)
                return real(*a, **kw)
            os.replace = replace
            run()
        died = in_a_child(dying)
        before, said = finished(folders() - had), mark.read_text().split() if mark.exists() else []
        if died == 0: break
        assert died == -signal.SIGKILL
        def again():
            w = run()
            assert (w.output("c", "total"), Path(w.output("c", "file")).read_text(), w.run.status) == (87, "29", "completed")
        assert in_a_child(again) == 0, n
        after = mark.read_text().split()
        assert all(after.count(s) == said.count(s) for s in before), (n, "a stage that had succeeded ran again")
        assert set(after) == {"a", "b2", "b3", "b4", "d", "c"} and max(map(after.count, after)) <= 2
        assert len(folders() - had) == 1
        left.append(len(before))
    assert died == 0 and len(left) > 10 and len(set(left)) >= 5, "many states between nothing and everything were met"

def of_home(home):
    "Processes that belong to this home"
    out = []
    for p in psutil.process_iter():
        try:
            if p.pid != os.getpid() and any(str(home) in v for v in p.environ().values()): out.append(p)
        except psutil.Error: pass
    return out

@pytest.mark.slow
def test_kill_9_of_driver_and_kernels_at_random(tmp_path, home, monkeypatch):
    "Real processes: whatever dies, whenever, the end is the same, nothing is left behind, and what succeeded is not repeated"
    monkeypatch.setenv("SOMA_KERNELS_WARM", "0")
    graph(tmp_path, real=True)
    mark, rnd, kept = tmp_path/"mark", random.Random(7), {}
    code = f"from somaagent.runs.workflow import *; run_workflow(load_workflow({str(tmp_path/'w.yaml')!r}), dict(seed=2, mark={str(mark)!r}))"
    start = lambda: subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    lines = lambda: mark.read_text().split() if mark.exists() else []
    for victim in ("driver", "kernel"):
        p, want = start(), len(lines()) + rnd.choice((1, 2))
        end = time.monotonic() + 60
        while len(lines()) < want and p.poll() is None: assert time.monotonic() < end; time.sleep(.01)
        time.sleep(rnd.random()*.3)
        if victim == "driver": p.kill()
        else:
            for f in (home/"runs").glob("run_*/0*/**/run.json"):
                r = json.loads(f.read_text())
                if r["status"] == "running" and r["env"].get("kernel"):
                    try: os.kill(r["env"]["kernel"]["pid"], signal.SIGKILL)
                    except ProcessLookupError: pass
        p.wait(60); p.stderr.close()
        end = time.monotonic() + 15
        while of_home(home): assert time.monotonic() < end, "a process was left behind"; time.sleep(.05)
        for s in finished((home/"runs").glob("run_*")): kept.setdefault(s, lines().count(s))
    p = start()
    assert p.wait(120) == 0, p.stderr.read()
    wr = load_workflow_run(next((home/"runs").glob("run_*")))
    assert (wr.run.status, wr.output("c", "total")) == ("completed", 87)
    assert all(lines().count(s) == n for s, n in kept.items()), (kept, lines())
    assert not of_home(home) and len(list((home/"runs").glob("run_*"))) == 1

# --- side by side, again, in time ---------------------------------------------------------------------

def test_independent_stages_run_at_once_and_a_dead_kernel_is_tried_again_with_its_reason(tmp_path, home):
    meet = "from pathlib import Path\nimport os, time\nPath(mark, me).touch()\nend = time.time()+30\nwhile len(list(Path(mark).glob('*'))) < 2: assert time.time() < end; time.sleep(.02)"
    notebook(tmp_path/"a.ipynb", "mark = ''\nme = ''", meet)
    notebook(tmp_path/"die.ipynb", "mark = ''", "from pathlib import Path\nimport os\nf = Path(mark+'.tried')\nif not f.exists(): f.touch(); os._exit(3)", "from somaagent.runs.record import current_run\ncurrent_run().output('done', True)")
    (tmp_path/"m").mkdir()
    wf = flow(tmp_path, f"name: w\nstages: [{{id: a, notebook: a.ipynb, params: {{mark: '{tmp_path}/m', me: a}}}}, {{id: b, notebook: a.ipynb, params: {{mark: '{tmp_path}/m', me: b}}}}, {{id: c, notebook: die.ipynb, needs: [a, b], params: {{mark: '{tmp_path}/m'}}, retries: 1, outputs: {{done: bool}}}}]")
    news = []
    wr = run_workflow(wf, on_event=news.append, parallel=2)
    assert wr.output("c", "done") is True and [e["why"] for e in news if e["event"] == "retry"], news

def test_elements_run_in_order_at_most_so_many_at_a_time_and_none_is_nothing(tmp_path):
    notebook(tmp_path/"a.ipynb", "n = 0", "output('xs', list(range(n)))")
    notebook(tmp_path/"b.ipynb", "x = 0\nd = {}", "output('y', 10*x)")
    wf = flow(tmp_path, "name: w\nparams: {n: {type: int, default: 3}}\nstages: [{id: a, notebook: a.ipynb, params: {n: '${n}'}, outputs: {xs: list}}, {id: b, notebook: b.ipynb, params: {x: '${each}'}, each: '${a.xs}', max_parallel: 2, outputs: {y: int}}]")
    status, wr, ran = go(wf)
    assert (status, wr.output("b", "y"), ran) == ("completed", [0, 10, 20], ["a", "b[0]", "b[1]", "b[2]"])
    status, wr, ran = go(wf, dict(n=4))
    assert ran == ["a", "b[3]"] and wr.output("b", "y") == [0, 10, 20, 30], "elements that were computed before are taken"
    status, wr, ran = go(wf, dict(n=0))
    assert (status, wr.output("b", "y"), wr.stages["b"].status) == ("completed", [], "completed")
    notebook(tmp_path/"a.ipynb", "n = 0", "output('xs', 'abc')")
    wf["a"].outputs["xs"] = "any"
    assert "each wants a list" in go(wf)[0]

# --- taken from before --------------------------------------------------------------------------------

CHAIN = """
name: four
params: {{seed: {{type: int, default: 1}}, log: {{type: path, default: ""}}}}
stages:
  - {{id: a, notebook: a.ipynb, params: {{seed: "${{seed}}", log: "${{log}}"}}, outputs: {{file: path}}{a}}}
  - {{id: b, notebook: b.ipynb, params: {{file: "${{a.file}}"}}, outputs: {{n: int}}}}
  - {{id: c, notebook: c.ipynb, params: {{n: "${{b.n}}"}}, outputs: {{n: int}}}}
  - {{id: d, notebook: d.ipynb, params: {{n: "${{c.n}}"}}, outputs: {{n: int}}}}
"""

def four(tmp_path, a=""):
    notebook(tmp_path/"a.ipynb", "seed = 0\nlog = ''", "import tools\n(folder/'data.bin').write_bytes(bytes([seed])*2_000_000)\noutput('file', str(folder/'data.bin'))")
    notebook(tmp_path/"b.ipynb", "file = ''", "from pathlib import Path\noutput('n', Path(file).read_bytes()[0])")
    for k in "cd": notebook(tmp_path/f"{k}.ipynb", "n = 0", "output('n', n+1)")
    (tmp_path/"tools.py").write_text("FACTOR = 1\n")
    return flow(tmp_path, CHAIN.format(a=a))

def test_a_change_in_the_fourth_stage_runs_only_the_fourth(tmp_path, home, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    wf = four(tmp_path)
    assert go(wf)[2] == ["a", "b", "c", "d"]
    notebook(tmp_path/"d.ipynb", "n = 0", "output('n', n+2)")
    status, wr, ran = go(wf)
    assert (status, ran, wr.output("d", "n")) == ("completed", ["d"], 4)
    first = sorted((home/"runs").glob("run_*"))[0]
    assert wr.stages["b"].env["taken"]["workflow"] == first.name and "↺" in draw(wr) and "taken" in draw(wr)
    assert Path(wr.output("a", "file")).is_relative_to(wr.path), "what is taken lies in this run's folder"
    (tmp_path/"log.txt").write_text("x")
    assert go(wf, dict(log=str(tmp_path/"log.txt")))[2] == ["a"], "an input changed, what came of it did not: the rest is taken"
    (tmp_path/"tools.py").write_text("FACTOR = 2\n")
    assert go(wf)[2] == ["a"], "a module that the first notebook imports has changed"
    assert go(wf, again=True)[2] == ["a", "b", "c", "d"] and go(wf, dict(seed=2), cache=False)[2] == ["a", "b", "c", "d"]
    import shutil
    shutil.rmtree(first)
    assert Path(wr.output("a", "file")).read_bytes()[0] == 1, "the older run may be removed"

def test_a_spoilt_file_is_not_taken_and_cache_false_is_never_taken(tmp_path, home, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    wf = four(tmp_path)
    status, wr, ran = go(wf)
    f = Path(wr.output("a", "file"))
    raw = bytearray(f.read_bytes()); raw[5] ^= 1; f.write_bytes(raw)
    notebook(tmp_path/"d.ipynb", "n = 0", "output('n', n+2)")
    assert go(wf)[2] == ["a", "d"]
    wf = four(tmp_path, ", cache: false")
    assert go(wf)[2] == ["a"] and go(wf, again=True)[2] == ["a", "b", "c", "d"]
    notebook(tmp_path/"d.ipynb", "n = 0", "output('n', n+3)")
    assert go(wf)[2] == ["a", "d"]

def test_a_finished_job_whose_file_was_spoilt_mends_it(tmp_path, home, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    wf = four(tmp_path)
    status, wr, ran = go(wf)
    assert go(wf)[2] == []
    Path(wr.output("a", "file")).write_bytes(b"1")
    status, new, ran = go(wf)
    assert ran == ["a"] and new.run.id == wr.run.id and Path(wr.output("a", "file")).stat().st_size == 2_000_000

# --- conditions, people, failures ---------------------------------------------------------------------

@pytest.fixture
def judge(tmp_path):
    notebook(tmp_path/"eval.ipynb", "accuracy = 0.5", "output('accuracy', accuracy)")
    notebook(tmp_path/"use.ipynb", "value = 0.0\nname = ''", "if name == 'bad': raise ValueError('no')\noutput('value', value)")
    return tmp_path

def test_a_condition_leaves_out_what_follows_unless_a_value_stands_in(judge):
    wf = flow(judge, """
name: w
params: {accuracy: {type: float, default: 0.9}}
stages:
  - {id: evaluate, notebook: eval.ipynb, params: {accuracy: "${accuracy}"}, outputs: {accuracy: float}}
  - {id: good, notebook: use.ipynb, params: {value: "${evaluate.accuracy}"}, when: "${evaluate.accuracy} > 0.8", outputs: {value: float}}
  - {id: after, notebook: use.ipynb, params: {value: "${good.value}"}, outputs: {value: float}}
  - {id: either, notebook: use.ipynb, params: {value: "${good.value ?? -1.0}", name: either}, outputs: {value: float}}
""")
    status, wr, ran = go(wf)
    assert (status, wr.output("either", "value"), len(ran)) == ("completed", .9, 3) and wr.stages["after"].env["taken"], "the same notebook with the same value"
    status, wr, ran = go(wf, dict(accuracy=.5))
    assert [wr.stages[s].status for s in ("good", "after", "either")] == ["skipped", "skipped", "completed"] and wr.output("either", "value") == -1
    assert "good was left out" in wr.stages["after"].env["reason"]
    assert background.status(wr.run)["done"] == 4

def test_an_approval_counts_for_the_inputs_that_were_shown(judge, home):
    text = """
name: w
params: {accuracy: {type: float, default: 0.9}}
stages:
  - {id: evaluate, notebook: eval.ipynb, params: {accuracy: "${accuracy}"}, outputs: {accuracy: float}}
  - {id: publish, notebook: use.ipynb, params: {value: "${evaluate.accuracy}"}, approve: "Publish ${evaluate.accuracy}?", outputs: {value: float}}
"""
    wf = flow(judge, text)
    status, wr, ran = go(wf)
    assert (status, wr.stages["publish"].status, ran) == ("waiting", "waiting", ["evaluate"])
    assert background.status(wr.run)["waiting"][0]["text"] == "Publish 0.9?"
    with pytest.raises(RunError, match="does not wait"): approval.approve(wr.run, "evaluate", "ada")
    said = approval.approve(wr.run, "publish", "ada", "fine")
    notebook(judge/"eval.ipynb", "accuracy = 0.5", "output('accuracy', accuracy/2)")
    (wr.path/"01_evaluate"/"run.json").unlink()          # the first stage is lost, and gives another value now
    background_key = json.loads(next((home/"runs"/".keys").glob("*.json")).read_text())
    status, other, ran = go(wf)
    assert status == "waiting" and other.run.id != wr.run.id, "another notebook is another job: it asks anew"
    wr.run = load_run(wr.path)
    asked = approval.ask(wr.path, "publish", "Publish 0.9?", dict(value=.8))
    assert asked[0] == "waiting", "the same text about other inputs is another question"
    assert approval.ask(wr.path, "publish", "Publish 0.9?", dict(value=.9))[1] == said and background_key
    approval.reject(other.run, "publish", "grace", "too low")
    status, other, ran = go(wf)
    assert "rejected by grace" in status and "too low" in status and other.stages["publish"].status == "failed"
    kept = approval.decisions(other.path, "publish")[0]
    assert kept["shown"]["params"] == dict(value=.45) and kept["inputs"].startswith("sha256:") and kept["by"] == "grace"

def test_an_approved_stage_runs_and_its_record_says_who(judge):
    wf = flow(judge, "name: w\nstages: [{id: publish, notebook: use.ipynb, approve: 'Sure?', outputs: {value: float}}]")
    wr = go(wf)[1]
    approval.approve(wr.run, "publish", "ada")
    status, wr, ran = go(wf)
    assert (status, ran, wr.stages["publish"].env["approval"]["by"]) == ("completed", ["publish"], "ada")
    assert go(wf)[2] == [] and go(wf, again=True)[0] == "waiting", "another run asks again"

def test_failures_stop_continue_or_do_not_matter(judge):
    def text(more): return f"""
name: w
stages:
  - {{id: bad, notebook: use.ipynb, params: {{name: bad}}, outputs: [value]{more}}}
  - {{id: after, notebook: use.ipynb, params: {{value: "${{bad.value}}"}}}}
  - {{id: first, notebook: eval.ipynb}}
  - {{id: other, notebook: eval.ipynb, needs: [first]}}
"""
    for more, says, other in (("", "no", None), (", on_failure: continue", "no", "completed"), (", optional: true", "completed", "completed")):
        status, wr, ran = go(flow(judge, text(more)), cache=False)
        assert says in status and (wr.stages["other"].status if "other" in wr.stages else None) == other, (more, status, wr)
        assert wr.stages["bad"].status == "failed" and wr.run.status == ("completed" if "optional" in more else "failed")
        if other: assert wr.stages["after"].status == "skipped" and "bad failed" in wr.stages["after"].env["reason"]

def test_what_a_job_is_told(judge):
    wf = flow(judge, "name: w\nstages: [{id: a, notebook: eval.ipynb, retries: 3, timeout: 7, kernel: other, resources: {cpu: 2, memory_mb: 100, time_s: 9}, secrets: {MY_KEY: 'env:MY_KEY'}}]")
    ex = Here(); run_workflow(wf, executor=ex)
    j = ex.jobs[0]
    assert (j.retries, j.timeout, j.kernel, j.resources.cpu, j.resources.memory_mb, j.resources.time_s, j.secrets) == (3, 7, "other", 2, 100, 9, dict(MY_KEY="env:MY_KEY"))

def test_a_capsule_is_a_stage(tmp_path, home):
    from somaagent.runs.capsule import Capsules
    c = tmp_path/"adder"; c.mkdir()
    notebook(c/"notebook.ipynb", "a = 1\nb = 2", "output('total', a+b)")
    (c/"capsule.yaml").write_text("{name: adder, version: 1.0.0, inputs: {a: {type: int, most: 9}}, outputs: {total: {type: int}}}")
    Capsules().install(c)
    text = "name: w\nparams: {a: {type: int, default: 4}}\nstages: [{id: add, capsule: 'adder@1.0.0', params: {a: '${a}'}, outputs: {total: int}}]"
    status, wr, ran = go(flow(tmp_path, text))
    assert (status, wr.output("add", "total")) == ("completed", 6)
    assert "out of bounds" in go(flow(tmp_path, text), dict(a=10))[0]
    for new, says in ((text.replace("total: int", "sum: int"), "does not give"), (text.replace("total: int", "total: str"), "gives int"), (text.replace("{a: '", "{c: '"), "does not have"), (text.replace("1.0.0", "2.0.0"), "no such version")):
        assert says in go(flow(tmp_path, new), again=True)[0], says

# --- in Python, and refused -----------------------------------------------------------------------------

def test_a_flow_runs_like_a_file(judge):
    f = Flow("w", judge, accuracy=.9)
    e = f.stage("evaluate", "eval.ipynb", accuracy=f["accuracy"])
    f.stage("use", "use.ipynb", value=e["accuracy"], when=e["accuracy"] > .8, outputs=dict(value="float"))
    status, wr, ran = go(f)
    assert (status, wr.output("use", "value")) == ("completed", .9)
    assert go(load_workflow(f.save(judge/"f.yaml")))[2] == [], "the same graph is the same job, wherever it is written"

BAD = [("{id: a, notebook: use.ipynb, params: {value: '${b.x}'}, outputs: [x]}, {id: b, notebook: use.ipynb, params: {value: '${a.x}'}, outputs: [x]}", "circle"), ("{id: a, notebook: use.ipynb, params: {value: '${seed}'}}", "does not have"),
       ("{id: a, notebook: use.ipynb, params: {value: '${b.x}'}}", "does not exist"), ("{id: a, notebook: use.ipynb}, {id: b, notebook: use.ipynb, params: {value: '${a.x}'}}", "does not declare"), ("{id: a, notebook: use.ipynb}, {id: a, notebook: use.ipynb}", "one id"),
       ("{id: a, notebook: use.ipynb, each: []}", "each over nothing"), ("{id: a, notebook: use.ipynb, each: abc}", "each is a list"), ("{id: a, notebook: use.ipynb, params: {value: '${each}'}}", "has no each"), ("{id: a, notebook: use.ipynb, when: '1 > 0'}", "refers to nothing"),
       ("{id: a, notebook: use.ipynb, outputs: {x: str}}, {id: b, notebook: use.ipynb, when: '${a.x} > 0.5'}", "never be decided"), ("{id: a, notebook: use.ipynb, outputs: [x], when: '${a.x} > 0'}", "circle"), ("{id: a, notebook: use.ipynb, when: '${n}.real > 0'}", "may not stand"),
       ("{id: a, notebook: use.ipynb, when: '${n} >'}", "cannot be read"), ("{id: a, notebook: use.ipynb, capsule: b}", "one of them"), ("{id: a}", "one of them"), ("{id: a, notebook: no.ipynb}", "no such notebook"), ("{id: a, notebook: use.ipynb, params: {speed: 1}}", "does not have"),
       ("{id: a, notebook: use.ipynb, params: {value: fast}}", "wants float"), ("{id: a, notebook: use.ipynb, outputs: {x: str}}, {id: b, notebook: use.ipynb, params: {value: '${a.x}'}}", "wants float"), ("{id: a, notebook: use.ipynb, each: [1], outputs: {x: float}}, {id: b, notebook: use.ipynb, params: {value: '${a.x}'}}", "a fanned stage gives a list"),
       ("{id: a, notebook: use.ipynb, each: [1, x], params: {value: '${each}'}}", "wants float"), ("{id: a, notebook: use.ipynb, outputs: {x: number}}", "outputs"), ("{id: a, notebook: use.ipynb, retries: -1}", "retries"), ("{id: a, notebook: use.ipynb, each: '${n}'}", "wants a list")]

@pytest.mark.parametrize("stages,says", BAD, ids=[b[1]+str(i) for i, b in enumerate(BAD)])
def test_refused_before_anything_starts(judge, home, stages, says):
    with pytest.raises(RunError) as e: run_workflow(flow(judge, f"name: w\nparams: {{n: {{type: int, default: 1}}}}\nstages: [{stages}]"), executor=Here())
    assert says.lower() in str(e.value).lower(), str(e.value)
    assert not list((home/"runs").glob("run_*")) if (home/"runs").is_dir() else True

def test_a_value_of_the_wrong_type_is_said_when_it_exists(judge):
    notebook(judge/"eval.ipynb", "accuracy = 0.5", "output('accuracy', 'high')")
    text = "name: w\nstages: [{id: evaluate, notebook: eval.ipynb, outputs: %s}, {id: use, notebook: use.ipynb, params: {value: '${evaluate.accuracy}'}}, {id: cond, notebook: use.ipynb, when: '${evaluate.accuracy} > 0.5'}]"
    assert "promises float" in go(flow(judge, text % "{accuracy: float}"))[0]
    assert "wants float" in go(flow(judge, text % "[accuracy]"))[0]
    assert "cannot be decided" in go(flow(judge, text.replace("use, notebook: use.ipynb, params: {value: '${evaluate.accuracy}'}", "use, notebook: use.ipynb") % "[accuracy]"))[0]
    assert "without recording speed" in go(flow(judge, text % "[accuracy, speed]"))[0]

# --- results that must not be taken -----------------------------------------------------------------

def reader(tmp_path, cell="data = ''"):
    notebook(tmp_path/"read.ipynb", cell, "output('text', open(data).read())")
    (tmp_path/"data.txt").write_text("one")
    return str(tmp_path/"data.txt")

@pytest.mark.parametrize("way", ["a text", "a list", "in the file", "a default"])
def test_a_finished_job_is_not_the_same_when_a_file_it_was_told_of_has_changed(tmp_path, way):
    data = reader(tmp_path, f"data = {str(tmp_path/'data.txt')!r}" if way == "a default" else "data = ''")
    how = {"a text": dict(params=dict(data="${data}")), "a list": dict(each="${data}", params=dict(data="${each}")), "in the file": dict(params=dict(data=data)), "a default": {}}[way]
    params = {"a text": dict(data=dict(type="str", default=data)), "a list": dict(data=dict(type="list", default=[data]))}.get(way, {})
    wf = flow(tmp_path, json.dumps(dict(name="w", params=params, stages=[dict(id="a", notebook="read.ipynb", outputs=["text"]) | how])))
    said = lambda wr: wr.output("a", "text")[0] if way == "a list" else wr.output("a", "text")
    status, one, ran = go(wf)
    assert said(one) == "one" and go(wf)[2] == [], "the same again is not run again"
    (tmp_path/"data.txt").write_text("two")
    status, two, ran = go(wf)
    assert ran and said(two) == "two" and two.run.id != one.run.id

def test_what_a_package_beside_the_notebook_imports_from_itself_counts(tmp_path):
    from somaagent.runs.code import notebook_code, notebook_hash
    for f, text in {"lib/__init__.py": "from .deep import rule", "lib/deep/__init__.py": "from ..base import FACTOR as rule", "lib/base.py": "FACTOR = 1"}.items():
        (tmp_path/f).parent.mkdir(parents=True, exist_ok=True); (tmp_path/f).write_text(text)
    nb = notebook(tmp_path/"n.ipynb", "x = 1", "import lib")
    before = notebook_hash(nb)
    assert {"lib", "lib.deep", "lib.base"} <= notebook_code(nb)["modules"].keys()
    (tmp_path/"lib"/"base.py").write_text("FACTOR = 2")
    assert notebook_hash(nb) != before

def test_a_workflow_knows_what_it_belongs_to(tmp_path):
    reader(tmp_path)
    wf = flow(tmp_path, f"name: w\nstages: [{{id: a, notebook: read.ipynb, params: {{data: '{tmp_path/'data.txt'}'}}, outputs: [text]}}]\n")
    assert go(wf, parent="run_of_a_schedule")[1].run.parent == "run_of_a_schedule"
