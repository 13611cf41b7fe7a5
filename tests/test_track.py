"""Tracking: offline W&B runs that W&B's own uploader reads and sends, MLflow's stores, a queue that loses nothing."""
import json, os, signal, subprocess, sys, time
from pathlib import Path

import plotly.graph_objects as go
import pytest

from fakes.wandb_server import Server
from somaagent.core.errors import RunError
from somaagent.core.records import Run, new_id, utcnow
from somaagent.runs import track
from somaagent.runs.record import Record, save_run
from somaagent.runs.towandb import offline_runs, read_wandb, sync_wandb

KEY = "k" * 40

@pytest.fixture
def home(tmp_path, monkeypatch):
    for k in [k for k in os.environ if k.startswith("WANDB_")]: monkeypatch.delenv(k)
    monkeypatch.setenv("SOMA_STORES_HOME", str(tmp_path/"home"))
    (tmp_path/"home").mkdir()
    yield tmp_path/"home"
    for k in [k for k in os.environ if k.startswith("WANDB_")]: os.environ.pop(k)   # set by W&B's start, for this home

def finished(home, name="finetune", row=False, **kw):
    run_id = new_id("run")
    rec = Record(home/"runs"/run_id)
    rec.metric("val_loss", 1.1, lo=1.0, hi=1.2, n=200)
    rec.table("history", [dict(step=i, loss=4.0/(i+1)) for i in range(40)])
    rec.table("samples", [dict(prompt="Where is my order?", answer="On its way.")])
    rec.figure("loss", go.Figure(go.Scatter(y=[4, 2, 1.3])))
    for i in range(5): rec.report(i, accuracy=i/5)
    kw = dict(parameters=dict(rank=16), outputs=dict(adapter=str(rec.dir/"tables"), adapter_hash="sha256:" + "ab"*32), status="completed") | kw
    return save_run(Run(id=run_id, name=name, path=str(rec.dir), metrics=rec.result["metrics"], started_at=utcnow(), ended_at=utcnow(), **kw), row=row)

def test_an_offline_run_is_complete_and_wandb_itself_can_send_it(home, monkeypatch):
    r = finished(home)
    there = track.track(r, group="improve", backend="wandb")["wandb"]
    assert read_wandb(there)["ended"] and not offline_runs(home)[0]["synced"]
    s = Server()
    monkeypatch.setenv("WANDB_BASE_URL", s.url); monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert sync_wandb(home) == [there] and offline_runs(home)[0]["synced"]
    assert s.done and s.runs[0]["name"] == r.id.lower() and s.runs[0]["displayName"] == "finetune" and s.runs[0]["groupName"] == "improve"
    assert json.loads(s.runs[-1]["config"])["parameters"]["value"] == dict(rank=16)
    assert [h["history/loss"] for h in s.history if "history/loss" in h] == [4.0/(i+1) for i in range(40)]
    assert [h["accuracy"] for h in s.history if "accuracy" in h] == [i/5 for i in range(5)]
    summary = s.summary | json.loads(s.files["wandb-summary.json"])
    assert (summary["val_loss"], summary["val_loss.lo"], summary["val_loss.n"], summary["status"]) == (1.1, 1.0, 200, "completed")
    table = next(json.loads(b) for n, b in s.files.items() if n.startswith("media/table/samples"))
    assert table["data"] == [["Where is my order?", "On its way."]]
    assert any(n.startswith("media/plotly/figure/loss") for n in s.files)
    sent = {a["artifactCollectionName"]: [x["alias"] for x in a["aliases"]] for a in s.artifacts}
    assert "ab"*6 in sent["adapter"], sent
    assert KEY not in "".join(p.read_text(errors="replace") for p in home.rglob("*") if p.is_file() and p.stat().st_size < 1e6)
    assert sync_wandb(home) == [], "what is sent is not sent again"

def test_names_that_wandb_does_not_take(home):
    r = finished(home, name="fit[2], März", outputs=dict())
    (Path(r.path)/"notebook.ipynb").write_text("{}")
    there = track.track(r, backend="wandb")["wandb"]
    assert "fit-2-M-rz-notebook" in read_wandb(there)["artifacts"] and track.queue(home) == []

def test_a_server_that_refuses_costs_nothing_and_says_so(home, monkeypatch):
    track.track(finished(home), backend="wandb")
    s = Server(refuse=True)
    monkeypatch.setenv("WANDB_BASE_URL", s.url); monkeypatch.setenv("WANDB_API_KEY", KEY)
    with pytest.raises(RunError, match="not sent") as e: sync_wandb(home, timeout_s=60)
    assert KEY not in str(e.value) and not offline_runs(home)[0]["synced"]

def test_online_without_a_key_goes_on_offline(home, monkeypatch, caplog):
    monkeypatch.setenv("SOMA_TRACKING_MODE", "online"); monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert "offline-run" in track.track(finished(home), backend="wandb")["wandb"]

def test_a_killed_helper_loses_nothing_and_writes_nothing_twice(home):
    runs = [finished(home, f"trial-{i}") for i in range(3)]
    for r in runs: track.track_later(r, group="sweep", backend="both")
    end = time.monotonic()+60
    while len(track.queue(home)) == 3 and time.monotonic() < end: time.sleep(.01)
    helper = track._helpers[home.resolve()]
    os.kill(helper.pid, signal.SIGKILL); helper.wait()
    subprocess.run(["pkill", "-KILL", "-f", f"wandb-core.*{helper.pid}"])   # W&B's own process goes on otherwise, and ends by itself
    assert track.flush(home, wait_s=120) == []
    from somaagent.runs.tomlflow import client
    c = client(home)
    exp = c.get_experiment_by_name("somaagent").experiment_id
    assert sorted(r.info.run_name for r in c.search_runs([exp]) if r.info.run_name.startswith("trial")) == [r.name for r in runs]
    ended = [o["run"] for o in offline_runs(home) if read_wandb(o["folder"])["ended"]]
    assert sorted(ended) == sorted(r.id.lower() for r in runs)
    assert all(track.tracked(r.id, home).keys() == {"wandb", "mlflow"} for r in runs)

def test_what_a_tracker_refuses_waits_with_its_reason_and_sync_does_it_later(home, monkeypatch):
    r = finished(home)
    monkeypatch.setenv("SOMA_TRACKING_URI", "sqlite:////proc/nowhere/mlflow.db")
    track.track_later(r, backend="mlflow")
    late = track.flush(home, wait_s=120)
    assert [q["run"] for q in late] == [r.id] and late[0]["tries"] == 3 and "mlflow" in late[0]["error"]
    monkeypatch.delenv("SOMA_TRACKING_URI")
    assert track.sync(home, backend="mlflow", registry=False)["tracked"] == [r.id] and track.queue(home) == []

def test_the_registry_is_mirrored_as_it_is(home):
    from somaagent.core.records import ModelVersion
    from somaagent.runs.tomlflow import client, mirror_registry
    vs = [ModelVersion(name="desk", version=v, base="tiny", path=str(home), hash="sha256:"+v, status=s, created_at=utcnow()) for v, s in (("1.0.0", "retired"), ("1.1.0", "production"), ("1.2.0", "refused"))]
    mirror_registry(vs, home)
    c = client(home)
    assert {v.tags["soma.version"]: v.tags["soma.status"] for v in c.search_model_versions("name = 'desk'")} == {"1.0.0": "retired", "1.1.0": "production", "1.2.0": "refused"}
    assert c.get_model_version_by_alias("desk", "production").tags["soma.version"] == "1.1.0"
    mirror_registry([v.model_copy(update=dict(status="retired")) for v in vs], home)
    assert "production" not in c.get_registered_model("desk").aliases

@pytest.mark.slow
def test_sync_command(home):
    finished(home, row=True)
    soma = lambda *a: subprocess.run([sys.executable, "-c", "from somaagent.cli.app import main; main()", "sync", *a], capture_output=True, text=True, env=os.environ | dict(SOMA_PROGRESS="none"))
    p = soma("--backend", "mlflow", "--all", "--json")
    assert p.returncode == 0 and len(json.loads(p.stdout)["tracked"]) == 1, p.stderr
    assert json.loads(soma("--backend", "mlflow", "--all", "--dry-run", "--json").stdout)["waiting"] == []

def test_a_stage_that_failed_and_is_run_again_is_told_again(home):
    from somaagent.runs.tomlflow import client
    r = finished(home, status="failed", error="no disk")
    one = track.track(r, backend="mlflow")["mlflow"]
    assert not track.track_later(r, backend="mlflow"), "the same execution is told once"
    again = save_run(r.model_copy(update=dict(status="completed", error="", ended_at=utcnow(), metrics=dict(val_loss=dict(value=.5)))))
    rec = Record(r.path); rec.metric("val_loss", .5)
    assert track.track_later(again, backend="mlflow") and track.flush(home) == []
    now = client(home).get_run(one)
    assert now.info.status == "FINISHED" and now.data.metrics["val_loss"] == .5 and now.data.tags["soma.status"] == "completed"

def test_what_is_queued_when_the_helper_is_about_to_end_is_not_left(home):
    p = track._helpers[home.resolve()] = subprocess.Popen(["sleep", "60"])
    (home/"tracking").mkdir(); (home/"tracking"/"helper.says").write_text("over")   # it has looked into the queue for the last time
    try:
        track.track_later(finished(home), backend="mlflow")
        assert track._helpers[home.resolve()] is not p and track.flush(home) == []
    finally: p.kill(); p.wait()
