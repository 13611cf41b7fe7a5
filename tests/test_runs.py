"Runs and workflows under faults: killed runners, dead kernels, hanging cells, full disks, two at once. Real processes."
import json, os, signal, subprocess, sys, time
from pathlib import Path

import nbformat, psutil, pytest

from somaagent.core.errors import DataError, RunError
from somaagent.runs.notebook import execute, explain
from somaagent.runs.record import list_runs, load_run
from somaagent.runs.workflow import load_workflow, load_workflow_run, run_workflow

@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("SOMA_STORES_HOME", str(tmp_path/"home"))
    monkeypatch.setenv("SOMA_TRACKING_BACKEND", "none")
    return tmp_path/"home"

def notebook(path, first, *cells):
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(first, metadata=dict(tags=["parameters"]))] + [nbformat.v4.new_code_cell(c) for c in cells])
    nbformat.write(nb, path)
    return path

def wait_for(what, seconds=40, every=.02):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if (r := what()): return r
        time.sleep(every)
    raise AssertionError("waited in vain")

def gone(pid, seconds=6):
    try: psutil.Process(pid).wait(seconds)
    except psutil.NoSuchProcess: return True
    except psutil.TimeoutExpired: return False
    return True

def test_what_runs_notebooks_is_imported_without_a_grammar():
    "jsonschema builds one at its import where `rfc3987_syntax` is there: more than a second in every process"
    code = "import sys, somaagent.runs.notebook; print('lark' in sys.modules, 'rfc3987_syntax' in sys.modules); import rfc3987_syntax"
    r = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert r.stdout.split() == ["False", "False"] and (not r.returncode or "No module named" in r.stderr), r.stderr    # and whoever wants it can still import it

# --- one notebook --------------------------------------------------------------------------------

def test_failures_are_told_apart_and_leave_the_partial_notebook(tmp_path):
    ends = {}
    for what, code, kw in (("error", "print('so far'); 1/0", {}), ("died", "print('so far', flush=True); import os, time; time.sleep(1); os._exit(3)", {}), ("timeout", "print('so far', flush=True); import time; time.sleep(60)", dict(timeout=1.5))):
        r = execute(notebook(tmp_path/f"{what}.ipynb", "n = 1", code, "never = 1"), run_dir=tmp_path/what, **kw)
        nb = nbformat.read(tmp_path/what/"notebook.ipynb", 4)
        states = [c.metadata.papermill["status"] for c in nb.cells if "papermill" in c.metadata and not c.metadata.get("tags")]
        assert r.status == "failed" and load_run(tmp_path/what).status == "failed"
        assert r.env["failure"]["kind"] == what and states == ["failed", "pending"]
        assert "so far" in (tmp_path/what/"log.txt").read_text()
        assert gone(r.env["kernel"]["pid"])
        ends[what] = str(explain(r))
    assert "ZeroDivisionError" in ends["error"] and "exit code 3" in ends["died"] and "longer than 1.5 s" in ends["timeout"]

def test_an_error_of_ours_keeps_its_class_and_exit_code(tmp_path):
    r = execute(notebook(tmp_path/"a.ipynb", "n = 1", "from somaagent.core.errors import WarehouseBusyError\nraise WarehouseBusyError('it is taken', value=7)"), run_dir=tmp_path/"r")
    assert explain(r).exit_code == 3 and str(explain(r)) == "it is taken: 7"

def test_parameters_are_checked_before_anything_starts(tmp_path):
    nb = notebook(tmp_path/"a.ipynb", "steps = 10\nname = 'x'\nlr: float = 1e-3")
    for bad, says in ((dict(step=3), "Did you mean 'steps'"), (dict(steps="3"), "wants int, not str"), (dict(steps=True), "wants int, not bool"), (dict(lr="x"), "wants float")):
        with pytest.raises(RunError, match=says): execute(nb, bad, tmp_path/"r")
    with pytest.raises(RunError, match="no parameters"):
        nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("a = 1")]), tmp_path/"b.ipynb")
        execute(tmp_path/"b.ipynb", dict(a=2), tmp_path/"r")
    (tmp_path/"c.ipynb").write_text('{"cells": [')
    with pytest.raises(RunError, match="not a notebook"): execute(tmp_path/"c.ipynb", {}, tmp_path/"r")
    assert not (tmp_path/"r").exists()

def test_the_kernel_is_this_interpreter_whatever_python3_means_elsewhere(tmp_path, monkeypatch):
    spec = tmp_path/"jupyter"/"kernels"/"python3"
    spec.mkdir(parents=True)
    (spec/"kernel.json").write_text(json.dumps(dict(argv=["/bin/false", "{connection_file}"], display_name="another", language="python")))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path/"jupyter"))
    r = execute(notebook(tmp_path/"a.ipynb", "n = 1", "import sys\nfrom somaagent.runs.record import current_run\ncurrent_run().output('exe', sys.executable)"), run_dir=tmp_path/"r")
    assert r.status == "completed" and r.outputs["exe"] == sys.executable

def test_a_killed_runner_takes_its_kernel_along_and_is_recognised(tmp_path, home):
    nb = notebook(tmp_path/"a.ipynb", "n = 1", "import time; time.sleep(60)")
    p = subprocess.Popen([sys.executable, "-c", f"from somaagent.runs.notebook import execute; execute({str(nb)!r}, run_dir={str(tmp_path/'r')!r})"])
    kernel = wait_for(lambda: (tmp_path/"r"/"run.json").exists() and json.loads((tmp_path/"r"/"run.json").read_text())["env"].get("kernel"))
    assert load_run(tmp_path/"r").status == "running"
    p.send_signal(signal.SIGKILL); p.wait()
    assert gone(kernel["pid"]), "the kernel outlived its runner"
    assert load_run(tmp_path/"r").status == "interrupted"
    assert [r.status for r in list_runs()] == ["interrupted"]

# --- workflows -----------------------------------------------------------------------------------

def chain(folder, nap=0.):
    "Three stages; each counts its executions and works from the one before"
    folder.mkdir(exist_ok=True)
    head = "from pathlib import Path\nimport time\nfrom somaagent.runs.record import current_run\nrun = current_run()"
    count = "f = Path(mark)/'%s'\nf.write_text(f.read_text()+'x' if f.exists() else 'x')\ntime.sleep(nap)"
    notebook(folder/"a.ipynb", "seed = 0\nmark = ''\nnap = 0.0", head, count % "a", "import random\nrun.output('xs', [random.Random(seed).random() for _ in range(5)])")
    notebook(folder/"b.ipynb", "xs = []\nmark = ''\nnap = 0.0", head, count % "b", "run.table('squares', [dict(x=x, y=x*x) for x in xs])\nrun.output('total', sum(xs))")
    notebook(folder/"c.ipynb", "total = 0.0\nmark = ''\nnap = 0.0", head, count % "c", "run.output('answer', round(total*100, 6))\nrun.metric('answer', total*100)")
    wf = dict(name="chain", params=dict(seed=dict(type="int", default=0), mark=dict(type="str", default=""), nap=dict(type="float", default=nap)),
              stages=[dict(id="a", notebook="a.ipynb", params=dict(seed="${seed}", mark="${mark}", nap="${nap}"), outputs=["xs"]), dict(id="b", notebook="b.ipynb", params=dict(xs="${a.xs}", mark="${mark}", nap="${nap}"), outputs=["total"]),
                      dict(id="c", notebook="c.ipynb", params=dict(total="${b.total}", mark="${mark}", nap="${nap}"), outputs=["answer"])])
    (folder/"chain.yaml").write_text(json.dumps(wf))
    return folder/"chain.yaml"

def start(yaml, params, home):
    code = f"import json, sys\nfrom somaagent.runs.workflow import *\nw = run_workflow(load_workflow({str(yaml)!r}), json.loads(sys.argv[1]), home={str(home)!r}, on_event=lambda e: print(json.dumps(dict(event=e['event'], stage=e.get('stage'), status=e.get('status'), owner=e.get('owner'))), flush=True))\nprint(json.dumps(dict(event='result', answer=w.output('c','answer'), adopted=w.adopted, run=w.run.id)), flush=True)"
    return subprocess.Popen([sys.executable, "-c", code, json.dumps(params)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

def events(p, until=None):
    "Events of a workflow process, up to one that fits"
    out = []
    for line in p.stdout:
        out.append(json.loads(line))
        if until and all(out[-1].get(k) == v for k, v in until.items()): break
    return out

def test_killed_at_every_stage_it_ends_with_the_same_result(tmp_path):
    yaml = chain(tmp_path/"wf")
    for m in ("m0", "m1"): (tmp_path/m).mkdir()
    calm = run_workflow(load_workflow(yaml), dict(mark=str(tmp_path/"m0"), seed=5), home=tmp_path/"h0").output("c", "answer")
    params = dict(mark=str(tmp_path/"m1"), seed=5, nap=.4)
    for stage in "abc":
        p = start(yaml, params, tmp_path/"h1")
        events(p, dict(event="stage", stage=stage, status="running"))
        wait_for(lambda: (tmp_path/"m1"/stage).exists())
        p.kill(); p.wait()
    p = start(yaml, params, tmp_path/"h1")
    seen = events(p)
    assert p.wait() == 0, p.stderr.read()
    assert seen[-1]["answer"] == calm
    assert [(e["stage"], e["status"]) for e in seen if e["event"] == "stage"] == [("a","kept"), ("b","kept"), ("c","running"), ("c","completed")]
    assert {s: len((tmp_path/"m1"/s).read_text()) for s in "abc"} == dict(a=2, b=2, c=2), "a stage that had succeeded ran again"
    assert len(list((tmp_path/"h1"/"runs").glob("run_*"))) == 1

def test_two_of_the_same_job_run_it_once_and_the_second_says_why_it_waits(tmp_path):
    yaml = chain(tmp_path/"wf"); (tmp_path/"m").mkdir()
    params = dict(mark=str(tmp_path/"m"), nap=.3)
    first = start(yaml, params, tmp_path/"h")
    events(first, dict(event="begin"))
    second = start(yaml, params, tmp_path/"h")
    seen2, seen1 = events(second), events(first)
    assert first.wait() == 0 and second.wait() == 0
    waits = [e for e in seen2 if e["event"] == "wait"]
    assert waits and waits[0]["owner"]["pid"] == first.pid and waits[-1]["owner"]["run"] == seen1[-1]["run"]
    assert seen2[-1] == seen1[-1] | dict(adopted=True)
    assert [len((tmp_path/"m"/s).read_text()) for s in "abc"] == [1, 1, 1]

def test_different_jobs_run_at_once(tmp_path):
    yaml = chain(tmp_path/"wf"); (tmp_path/"m").mkdir()
    ps = [start(yaml, dict(mark=str(tmp_path/"m"), seed=s, nap=.3), tmp_path/"h") for s in (1, 2)]
    seen = [events(p) for p in ps]
    assert [p.wait() for p in ps] == [0, 0]
    assert not any(e["event"] == "wait" for s in seen for e in s) and seen[0][-1]["answer"] != seen[1][-1]["answer"]

def test_a_failed_stage_is_tried_again_and_a_changed_input_is_another_job(tmp_path):
    f = tmp_path/"data.txt"
    notebook(tmp_path/"a.ipynb", "data = ''", "from pathlib import Path\nfrom somaagent.core.errors import DataError\nfrom somaagent.runs.record import current_run\nif not Path(data).read_text().strip(): raise DataError('the file is empty', value=data)\ncurrent_run().output('n', len(Path(data).read_text()))")
    (tmp_path/"w.yaml").write_text("name: w\nparams: {data: {type: path, default: ''}}\nstages: [{id: a, notebook: a.ipynb, params: {data: '${data}'}, outputs: [n]}]\n")
    wf = load_workflow(tmp_path/"w.yaml")
    f.write_text(" ")
    with pytest.raises(DataError, match="the file is empty"): run_workflow(wf, dict(data=str(f)), home=tmp_path/"h")
    failed = next((tmp_path/"h"/"runs").glob("run_*"))
    assert load_workflow_run(failed).run.status == "failed"
    f.write_text("abc")
    w = run_workflow(wf, dict(data=str(f)), home=tmp_path/"h")
    assert w.output("a", "n") == 3 and w.path != failed
    assert run_workflow(wf, dict(data=str(f)), home=tmp_path/"h").adopted
    assert not run_workflow(wf, dict(data=str(f)), home=tmp_path/"h", again=True).adopted

def test_a_stage_that_forgets_its_output_fails(tmp_path):
    notebook(tmp_path/"a.ipynb", "n = 1", "x = 1")
    (tmp_path/"w.yaml").write_text("name: w\nstages: [{id: a, notebook: a.ipynb, outputs: [n]}]\n")
    with pytest.raises(RunError, match="without recording n"): run_workflow(load_workflow(tmp_path/"w.yaml"), home=tmp_path/"h")

def test_bad_workflows_are_refused_with_what_is_wrong(tmp_path):
    notebook(tmp_path/"a.ipynb", "n = 1", "x = 1")
    for text, says in (("name: w", "stages"), ("- 1", "not a workflow"), ("a: [", "not valid YAML"), ("name: w\nstages: [{id: A, notebook: a.ipynb}]", "stages.0.id"),
                       ("name: w\nstages: [{id: a, notebook: a.ipynb}, {id: a, notebook: a.ipynb}]", "one id"), ("name: w\nstages: [{id: a, notebook: a.ipynb, needs: [b]}, {id: b, notebook: a.ipynb, needs: [a]}]", "circle"),
                       ("name: w\nstages: [{id: a, notebook: a.ipynb, speed: 3}]", "no field stages.0.speed"), ("name: w\nstages: [{id: a, notebook: a.ipynb, foreach: [1]}]", "mean 'each'"),
                       ("name: w\nstages: [{id: a, notebook: a.ipynb}]\nparam: {}", "no field param.*mean 'params'"), ("stages: [{id: a, notebook: a.ipynb}]", "name is missing")):
        (tmp_path/"w.yaml").write_text(text)
        with pytest.raises(RunError, match=says): load_workflow(tmp_path/"w.yaml")
    (tmp_path/"w.yaml").write_text("name: w\nstages: [{id: a, notebook: a.ipynb, params: {m: 1}}]")
    with pytest.raises(RunError, match="does not have"): run_workflow(load_workflow(tmp_path/"w.yaml"), home=tmp_path/"h")
    assert not list((tmp_path/"h").glob("runs/run_*")), "a refused workflow leaves no run"

@pytest.fixture
def tiny_disk(tmp_path):
    "A disk of 2 MB"
    d = tmp_path/"disk"; d.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", d], capture_output=True).returncode: pytest.skip("needs to mount a tmpfs")
    yield d
    subprocess.run(["umount", "-l", d])

def test_a_full_disk_is_one_clear_error_and_the_job_goes_on_when_there_is_room(tmp_path, tiny_disk):
    notebook(tmp_path/"a.ipynb", "n = 1", "from somaagent.runs.record import current_run\nrun = current_run()\nrun.output('n', 1)")
    notebook(tmp_path/"b.ipynb", "n = 1", "from somaagent.runs.record import current_run\nrun = current_run()\nrun.path('big').write_bytes(bytes(10_000_000))\nrun.output('m', n)")
    (tmp_path/"w.yaml").write_text("name: w\nstages: [{id: a, notebook: a.ipynb, outputs: [n]}, {id: b, notebook: b.ipynb, params: {n: '${a.n}'}, outputs: [m]}]\n")
    with pytest.raises(RunError, match="disk is full"): run_workflow(load_workflow(tmp_path/"w.yaml"), home=tiny_disk/"h")
    run = next((tiny_disk/"h"/"runs").glob("run_*"))
    subprocess.run(["mount", "-o", "remount,size=40m", tiny_disk], check=True)
    seen = []
    w = run_workflow(load_workflow(tmp_path/"w.yaml"), home=tiny_disk/"h", on_event=seen.append)
    assert w.path == run and w.output("b", "m") == 1
    assert [(e["stage"], e["status"]) for e in seen if e["event"] == "stage"][0] == ("a", "kept")

# --- soma run ------------------------------------------------------------------------------------

def soma(*args, **env):
    return subprocess.run([sys.executable, "-c", "from somaagent.cli.app import main; main()", "run", *map(str, args)], capture_output=True, text=True, timeout=60, env=os.environ | env)

def test_soma_run_shows_what_it_does_and_prints_the_result(tmp_path):
    nb = notebook(tmp_path/"train.ipynb", "from typing import Literal\nsteps = 10  # optimizer steps\nhow: Literal['a', 'b'] = 'a'\nlayers: list[int] = [1]",
                  "from somaagent.runs.record import current_run\nrun = current_run()\nfor i in range(3): run.report(i, loss=1/(i+1))", "run.metric('loss', 1/steps, lo=0, hi=1)\nrun.output('layers', layers)\nprint('done')")
    (tmp_path/"p.yaml").write_text("steps: 20\nhow: b\n")
    r = soma(nb, "--param-file", tmp_path/"p.yaml", "-p", "steps=40", "-p", "layers=4,8", "--tag", "night", "--run-id", "run_cli", SOMA_PROGRESS="plain")
    assert r.returncode == 0, r.stderr
    assert r.stdout.splitlines()[:2] == ["loss = 0.025  (0 … 1)", "layers = [4, 8]"] and r.stdout.splitlines()[-1].endswith("run_cli/notebook.ipynb")
    assert "[2/4]" in r.stderr and "completed" in r.stderr
    again = soma(nb, "-p", "steps=40", "-p", "layers=4,8", "-p", "how=b", "--run-id", "run_cli", "--json", "-q")
    assert again.returncode == 0, again.stderr
    again = json.loads(again.stdout)
    assert again["tags"] == ["night"] and again["parameters"] == dict(steps=40, how="b", layers=[4, 8]) and load_run(again["path"]).ended_at.isoformat()[:19] == again["ended_at"][:19]

def test_soma_run_says_what_is_wrong(tmp_path):
    from click.testing import CliRunner
    from somaagent.cli.run import run
    nb = notebook(tmp_path/"a.ipynb", "n: int|None = None  # how many", "import os\nprint(os.environ['KEY'])\n1/0")
    def said(*args, code=1):
        r = CliRunner().invoke(run, [str(a) for a in args])
        assert r.exit_code == code, r.output
        return str(r.exception) + r.output
    for args, says in (((nb, "-p", "n=x"), "wants int | None"), ((nb, "-p", "m=1"), "takes: n"), ((nb, "-p", "n"), "name=value"), ((nb, "--secret", "KEY=sk-0123456789"), "not a reference"), ((nb, "--secret", "KEY=env:NO_SUCH"), "NO_SUCH"),
                       ((tmp_path/"none.ipynb",), "no such notebook"), (("no-such-name",), "no such notebook, experiment or capsule")):
        assert says in said(*args)
    assert "how many" in said(nb, "--help-params", code=0) and json.loads(CliRunner().invoke(run, [str(nb), "--help-params", "--json"]).stdout)[0]["type"] == "int"
    os.environ["MY_KEY"] = "sk-0123456789"
    try: text = said(nb, "--secret", "KEY=env:MY_KEY", "--name", "try")
    finally: del os.environ["MY_KEY"]
    assert "division by zero" in text and "sk-0123456789" not in text and "[secret KEY]" in (Path(text.split("what it did is in ")[1].splitlines()[0])).read_text()
