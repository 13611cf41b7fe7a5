"The queue of training jobs under faults: many workers, killed workers, sleeping workers, jobs that fail in every way. Real processes."
import json, os, random, signal, subprocess, sys, time
from pathlib import Path

import polars as pl
import pytest

from somaagent.core.errors import TrainError
from somaagent.data.supportdesk import ask, reference
from somaagent.store.state import State
from somaagent.train.job import Backend, JobSpec
from somaagent.train.jobs import Jobs, recipe_of
from somaagent.train.recipe import load_recipe, read_pairs, recipes, reward_of
from somaagent.train.worker import Worker, ensure_worker, worker_note
from test_store import postgres, state_url  # noqa: F401

MINE = '''
import json, os, pathlib, signal, time
def train(config, data, out_dir, progress=None, reward=None):
    "Counts to n, remembers how far it was, and misbehaves as it is told"
    out = pathlib.Path(out_dir); out.mkdir(exist_ok=True); f = out/"at.json"
    begun = at = json.loads(f.read_text()) if f.exists() else 0
    print("hello", os.environ.get("MY_TOKEN"), "Bearer abcdefgh12345678", flush=True)
    keep = []
    with open(out/"starts", "a") as h: h.write(f"{os.getpid()} {begun}\\n")
    for i in range(at, config.get("n", 3)):
        time.sleep(config.get("s", 0))
        f.write_text(json.dumps(i+1)); progress(i+1, config.get("n", 3), dict(loss=1/(i+1)))
        if config.get("mb"): keep.append(b"x"*config["mb"]*2**20)
        if config.get("die") == i+1-begun: os.kill(os.getpid(), signal.SIGKILL)
        if config.get("raise") == i+1: raise ValueError("the column 'answer' is empty")
        if config.get("exit") == i+1: print("cannot go on", flush=True); os._exit(7)
    return dict(hash="sha256:counted", steps=config.get("n", 3), resumed_from=begun, history=[dict(step=config.get("n", 3), loss=.5)])
'''

@pytest.fixture
def jobs(tmp_path, monkeypatch):
    "A queue, and a trainer of our own beside it"
    (tmp_path/"mine.py").write_text(MINE)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}"); monkeypatch.setenv("SOMA_STORES_HOME", str(tmp_path/"home")); monkeypatch.setenv("MY_TOKEN", "hush-hush-hush")
    j = Jobs(State(f"sqlite:///{tmp_path}/state.db"), tmp_path/"jobs", lease_s=5)
    yield j
    if n := worker_note(j): os.kill(n["pid"], signal.SIGKILL)
    j.state.close()

def mine(name="count", **config): return dict(trainer="mine:train", name=name, config=config)

def until(what, s=60):
    end = time.time()+s
    while not (got := what()):
        assert time.time() < end, "waited too long"
        time.sleep(.05)
    return got

def starts(j): return [tuple(map(int, l.split())) for l in (Path(j.remote["folder"])/"out"/"starts").read_text().splitlines()]

CLAIM = """
import sys; from pathlib import Path; from somaagent.store.state import State; from somaagent.train.jobs import Jobs
jobs,me = Jobs(State(sys.argv[1]), Path(sys.argv[2])), sys.argv[3]
print(jobs.submit(dict(trainer="mine:train", name="all want this")).id)
while j := jobs.claim(me):
    print(j.id); assert jobs.beat(j.id, me, 1) == "go"
    assert jobs.finish(j.id, me, 1, "succeeded") == "succeeded"
"""
def test_every_job_is_claimed_once(state_url, tmp_path):
    "Two workers, thirty jobs, and one that both submit at once: each is carried out by one"
    st = State(state_url); jobs = Jobs(st, tmp_path/"jobs")
    for i in range(30): jobs.submit(mine(seed=i))
    ps = [subprocess.Popen([sys.executable, "-c", CLAIM, state_url, str(tmp_path/"jobs"), w], stdout=subprocess.PIPE, text=True) for w in "ab"]
    said = [p.communicate(timeout=60)[0].split() for p in ps]
    assert not any(p.returncode for p in ps)
    assert len({s[0] for s in said}) == 1, "one job for the same spec"
    did = sorted(i for s in said for i in s[1:])
    assert len(did) == 31 and did == sorted({j.id for j in jobs.list()})
    assert all(j.status == "succeeded" and j.remote["attempt"] == 1 for j in jobs.list())
    st.close()

@pytest.mark.slow
def test_killed_worker_is_followed_by_another_and_the_weights_are_the_same(tmp_path, monkeypatch):
    "kill -9 of the worker in mid-training: the child dies with it, the next worker resumes, and the adapter is the one of an undisturbed run"
    pytest.importorskip("trl")
    monkeypatch.setenv("SOMA_STORES_HOME", str(tmp_path/"home"))
    rng = random.Random(1); ds = tmp_path/"ds"; ds.mkdir()
    pl.DataFrame([dict(prompt=p, answer=reference(p)) for p in (ask(rng) for _ in range(48))]).write_parquet(ds/"train.parquet")
    jobs = Jobs(State(f"sqlite:///{tmp_path}/state.db"), tmp_path/"jobs", lease_s=2)
    rec = load_recipe("lora", data=str(ds), config=dict(max_steps=10, batch=4, rank=4, save_every=2, seed=3))
    j = jobs.submit(rec)
    first = ensure_worker(jobs, idle_s=.1)
    out = Path(j.remote["folder"])/"out"
    until(lambda: list((out/"checkpoints").glob("checkpoint-[46]/trainer_state.json")), 120)
    import psutil
    kids = psutil.Process(first["pid"]).children()
    os.kill(first["pid"], signal.SIGKILL)
    until(lambda: not any(k.is_running() and k.status() != psutil.STATUS_ZOMBIE for k in kids), 5)
    until(lambda: worker_note(jobs) is None, 10)
    assert not (out/"result.json").exists() and jobs.get(j.id).status == "running"
    w = Worker(jobs, beat_s=.2)
    until(lambda: w.run(once=True))   # nothing to do until the lease is over
    end = jobs.get(j.id)
    assert end.status == "succeeded" and end.remote["attempt"] == 2 and end.result["resumed_from"] >= 4
    assert [e.data["kind"] for e in jobs.events(j.id)] == ["queued", "running", "lost", "running", "succeeded"]
    assert rec.run(tmp_path/"whole").hash == end.result["model_hash"]
    steps = [m["step"] for m in jobs.metrics(j.id)]
    assert steps == list(range(1, 11)) and end.step == 10 and end.result["peak_mb"] > 100

def test_cancel_keeps_what_is_there_and_retry_goes_on(jobs):
    a,b = jobs.submit(mine(n=30, s=.1)), jobs.submit(mine(n=1))
    one = ensure_worker(jobs, idle_s=3)
    assert one["started"] and ensure_worker(jobs, idle_s=3)["pid"] == one["pid"], "a second start finds the first"
    until(lambda: jobs.get(a.id).step >= 3)
    running = until(lambda: (j := jobs.get(a.id)).eta_s is not None and j)
    assert running.total == 30 and 0 < running.eta_s < 30
    assert jobs.cancel(b.id).status == "cancelled"
    assert jobs.cancel(a.id).remote["cancelling"]
    end = until(lambda: (j := jobs.get(a.id)).over and j)
    assert end.status == "cancelled" and 3 <= end.step < 30 and jobs.cancel(a.id).status == "cancelled"
    jobs.retry(a.id, "it was the right one after all")
    with pytest.raises(TrainError, match="cannot be retried"): jobs.retry(a.id)
    end = until(lambda: (j := jobs.get(a.id)).over and j)
    assert end.status == "succeeded" and "it was the right one" in " ".join(e.text for e in jobs.events(a.id))
    assert [at for _,at in starts(end)] == [0, end.result["resumed_from"]] and end.result["resumed_from"] >= 3

def test_a_worker_that_sleeps_through_its_lease_and_one_that_is_asked_to_end(jobs):
    "SIGSTOP for longer than the lease: another takes the job, and the sleeper finds that it is not his. SIGTERM: the job is put back, and the attempt does not count"
    jobs.lease_s = 1.
    j = jobs.submit(mine(n=20, s=.1))
    one = ensure_worker(jobs, idle_s=9)
    until(lambda: jobs.get(j.id).step >= 2)
    os.kill(one["pid"], signal.SIGSTOP)
    try: other = until(lambda: jobs.claim("other"))
    finally: os.kill(one["pid"], signal.SIGCONT)
    second = jobs.submit(mine(n=20, s=.1, second=1))
    until(lambda: jobs.get(second.id).step >= 2)   # the sleeper has left the first job and taken this one
    now = jobs.get(j.id)
    assert other.remote["attempt"] == 2 and (now.status, now.remote["worker"]) == ("running", "other")
    assert jobs.finish(j.id, "other", 2, "failed", "error", "given up") == "failed"
    os.kill(one["pid"], signal.SIGTERM)
    back = until(lambda: (x := jobs.get(second.id)).status == "queued" and x)
    until(lambda: worker_note(jobs) is None)
    assert back.remote["attempt"] == 0
    assert Worker(jobs, poll_s=.02).run(once=True) == 1
    end = jobs.get(second.id)
    assert end.status == "succeeded" and end.result["resumed_from"] >= 2 and end.remote["attempt"] == 1 and end.result["seconds"] > 1.9

@pytest.mark.parametrize("how,reason,says,began", [
    (dict(die=2), "signal 9", "killed by SIGKILL at step 4", 2), ({"raise": 2}, "error", "the column 'answer' is empty", 1), (dict(exit=1), "error", "code 7.*cannot go on", 1), (dict(mb=300, n=30, s=.15), "memory limit", "its bound is 600 MB", 1)])
def test_a_job_that_fails_says_why(jobs, how, reason, says, began):
    import re
    j = jobs.submit(mine(**dict(n=9) | how) | dict(attempts=2, memory_mb=600))
    Worker(jobs, poll_s=.02).run(once=True)
    end = jobs.get(j.id)
    assert (end.status, end.remote["reason"], end.remote["attempt"]) == ("failed", reason, began)
    assert re.search(says, end.error, re.S) and len(starts(end)) == began
    assert end.result["peak_mb"] > (600 if reason == "memory limit" else 1)
    log = jobs.log(j.id).read_text()
    assert log.startswith("hello *** Bearer ***") and "hush" not in log

def test_a_job_whose_data_changed_is_refused(jobs, tmp_path):
    ds = tmp_path/"ds"; ds.mkdir(); pl.DataFrame(dict(prompt=["a"], answer=["b"])).write_parquet(ds/"train.parquet")
    j = jobs.submit(load_recipe("quick", data=str(ds)))
    pl.DataFrame(dict(prompt=["a"], answer=["c"])).write_parquet(ds/"train.parquet")
    Worker(jobs, poll_s=.02).run(once=True)
    assert jobs.get(j.id).status == "failed" and "changed since" in jobs.get(j.id).error

def test_a_full_disk_is_told(jobs, tmp_path):
    disk = tmp_path/"disk"; disk.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk], capture_output=True).returncode: pytest.skip("needs to mount a tmpfs")
    try:
        (tmp_path/"fills.py").write_text("import pathlib\ndef train(config, data, out_dir, progress=None, reward=None):\n    d = pathlib.Path(out_dir); d.mkdir()\n    for i in range(9): (d/str(i)).write_bytes(b'x'*100_000); progress(i+1, 9, {})\n")
        full = Jobs(jobs.state, disk/"jobs")
        j = full.submit(dict(trainer="fills:train"))
        Worker(full, poll_s=.02).run(once=True)
        end = full.get(j.id)
        assert (end.status, end.remote["reason"]) == ("failed", "disk full") and "Make room and retry" in end.error and end.step >= 1
    finally: subprocess.run(["umount", "-l", disk])

def test_the_local_backend_is_one(jobs, tmp_path):
    assert isinstance(jobs, Backend)
    spec = JobSpec(kind="full", name="desk", inputs=dict(dataset=str(tmp_path)), config=dict(max_steps=3), seed=4)
    rec = recipe_of(spec)
    assert (rec.trainer, rec.settings().method, rec.settings().seed, rec.settings().max_steps) == ("sft", "full", 4, 3)
    with pytest.raises(TrainError, match="hosted"): recipe_of(JobSpec(kind="openai", name="x"))
    pl.DataFrame(dict(prompt=["a"], answer=["b"])).write_parquet(tmp_path/"train.parquet")
    a = jobs.create(spec)
    assert jobs.create(spec).id == a.id
    jobs.cancel(a.id)
    assert jobs.create(spec).id != a.id
    assert jobs.estimate(spec).seconds is None and "no job" in jobs.estimate(spec).source
    for i in range(3):
        j = jobs.submit(mine(n=4, seed=i)); jobs.claim("w"); jobs.claim("w"); jobs.finish(j.id, "w", 1, "succeeded", result=dict(steps=4), seconds=2.)
    assert jobs.estimate(load_recipe(mine(max_steps=100))).seconds == 50.

def test_recipes_are_checked(tmp_path):
    for name in recipes(): assert load_recipe(name).trainer
    bad = tmp_path/"bad.yaml"
    for text,says in (("trainer: sft\nconfig: {rank: 0}", "rank"), ("trainer: sftt", "Did you mean sft"), ("- a", "mapping"), ("a: [", "YAML"), ("config: {}", "trainer"), ("trainer: dpo\nconfig: {method: kto}", "The trainer is dpo"), ("trainer: sft\nconfig: 3", "mapping"),
                      ("trainer: ppo\nconfig: {samples: 7, per_prompt: 2}", "multiple"), ("trainer: sft\nmemory: 3", "no such key")):
        bad.write_text(text)
        with pytest.raises(TrainError, match=says): load_recipe(bad)
    with pytest.raises(TrainError, match="no such recipe"): load_recipe("lorra")
    for ref in ("nowhere", "os:nothing", "no.such.module:f"):
        with pytest.raises(TrainError): reward_of(ref)
    f = tmp_path/"pairs.jsonl"; f.write_text('{"prompt":"a","chosen":"b","rejected":"c"}\n{"prompt":"","chosen":"b","rejected":"c"}\n')
    assert read_pairs(f).frame.height == 1

def soma(*args, **env): return subprocess.run([sys.executable, "-c", "from somaagent.cli.app import main; main()", *map(str, args)], capture_output=True, text=True, env=os.environ | dict(SOMA_TRACKING_BACKEND="none", SOMA_STORES_IDLE_S="3") | env, timeout=120)

def test_from_the_command_line_to_the_warehouse(jobs, tmp_path, monkeypatch):
    "Submit, be told that it is there, wait, read the log; the background worker fills finetuning_jobs"
    (tmp_path/"job.yaml").write_text("trainer: mine:train\nname: counted\nconfig: {n: 4}\n")
    first = soma("train", "submit", tmp_path/"job.yaml")
    assert first.returncode == 0 and "succeeded" in first.stdout, first.stderr
    again = soma("train", "submit", tmp_path/"job.yaml", "--json")
    assert "there already" in again.stderr and (j := json.loads(again.stdout))["status"] == "succeeded" and j["step"] == 4
    monkeypatch.setenv("SOMA_STORES_IDLE_S", "3")
    from somaagent.store.warehouse import Warehouse
    def filled():
        with Warehouse(mode="shared") as wh: return wh.query("SELECT id, name, method, provider, status, steps, model_hash FROM finetuning_jobs FINAL WHERE status='succeeded'").to_dicts()
    row, = until(filled, 90)
    assert row == dict(id=j["id"], name="counted", method="mine:train", provider="local", status="succeeded", steps=4, model_hash="sha256:counted")

def test_hosted_jobs_from_the_command_line(tmp_path, monkeypatch):
    "The same commands show and end a job at a provider"
    pytest.importorskip("openai")
    from click.testing import CliRunner
    monkeypatch.syspath_prepend(str(Path(__file__).parent/"fakes"))
    from providers import FakeOpenAI
    from somaagent.cli.train import train
    key = "sk-proj-" + "k3y"*12
    for k,v in dict(SOMA_STORES_HOME=str(tmp_path/"home"), OPENAI_API_KEY=key, SOMA_PROGRESS="none").items(): monkeypatch.setenv(k, v)
    say = lambda r,t: dict(role=r, content=t)
    f = tmp_path/"train.jsonl"; f.write_text("".join(json.dumps(dict(messages=[say("user", f"Where is order {i}?"), say("assistant", f"Order {i} arrives tomorrow.")]))+"\n" for i in range(12)))
    def soma(*a):
        r = CliRunner().invoke(train, list(map(str, a)))
        assert r.exit_code == 0, r.output
        return r.output
    with FakeOpenAI(key=key) as fake:
        monkeypatch.setenv("OPENAI_BASE_URL", fake.base_url)
        what = ("hosted", "openai", f, "--base", "gpt-4.1-mini-2025-04-14")
        assert "closed to new users" in soma(*what, "--estimate")
        id = soma(*what, "-d").split()[-1]
        assert soma(*what, "-d").split()[-1] == id
        assert "openai hosted" in soma("show", id) and "cancelled" in soma("cancel", id[-8:].lower())
