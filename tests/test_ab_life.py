"""Experiments: what is refused, what may follow what, processes that decide at once or die in the middle, looks that are repeated, late, or fewer than before."""
import datetime as dt, json, math, os, signal, time
from concurrent.futures import ThreadPoolExecutor

import numpy as np, polars as pl, pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, settings as hyp, strategies as hs
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from test_store import done, postgres, python, state_url  # noqa: F401 (fixtures)

from somaagent.abtest.demo import DAYS, START, demo_experiment, traffic
from somaagent.abtest.life import STEPS, Experiments, possible, route
from somaagent.abtest.live import analyze, history
from somaagent.abtest.spec import TEMPLATES, Metric, dump, hash_weights, load, metrics_of, primary, template, validate
from somaagent.abtest.verdict import conclude, watch
from somaagent.core.errors import ExperimentError, StoreError
from somaagent.core.records import Experiment
from somaagent.store.state import ExperimentEventRow, State

def exp(name="t", w=(.5, .5), **kw):
    names = "control b c d e".split()[:len(w)]
    return Experiment(name=name, arms=[dict(name=n, weight=v) for n, v in zip(names, w)], **(dict(metrics=[dict(name="success", mde=.03)]) | kw))

@pytest.fixture
def xs(tmp_path):
    s = State(f"sqlite:///{tmp_path}/s.db")
    yield Experiments(s, "tester")
    s.close()

# ---- what is refused -------------------------------------------------------------------------------------------------------
GOOD = dict(name="t", arms=dict(control=.5, b=.5), metrics=[dict(name="success", mde=.03)])
@pytest.mark.parametrize("change,says", [
    (dict(arms=dict(control=.5, b=.4)), "sums to 0.900, not 1"), (dict(arms=dict(control=1.)), "at least two arms"), (dict(arms=dict(control=math.nan, b=.5)), "weight"), (dict(arms=dict(control=-.5, b=1.5)), "weight"),
    (dict(arms=dict(control=math.inf, b=.5)), "weight"), (dict(arms=dict(control=0., b=1.)), "the control needs traffic"), (dict(arms=dict(control=1., b=0.)), "no traffic for any arm"),
    (dict(arms=[dict(name="a", weight=.5), dict(name="a", weight=.5)]), "same name"), (dict(metrics=[]), "exactly one primary"), (dict(metrics=[dict(name="a", mde=.1), dict(name="b")]), "exactly one primary"),
    (dict(metrics=[dict(name="a", mde=.1), dict(name="a", role="secondary")]), "two metrics have the same name"), (dict(metrics=[dict(name="a", value="okay", mde=.1)]), "Did you mean ok"), (dict(metrics=[dict(value="ok")]), "needs a name"),
    (dict(metrics=[dict(name="a", mde=math.nan)]), "mde must be"), (dict(metrics=[dict(name="a", mde=-1)]), "mde must be"), (dict(metrics=[dict(name="a", mde=.1, direction="left")]), "direction"), (dict(metrics=[dict(name="a", mde=.1, tollerance=.1)]), "Did you mean tolerance"),
    (dict(metrics=[dict(name="a", mde=.1, relative_mde=.1)]), "one of mde and relative_mde"), (dict(metrics=[dict(name="a", kind="quantile", value="latency_ms")]), "q belongs to a quantile"), (dict(metrics=[dict(name="a", kind="quantile", value="latency_ms", q=.95)]), "only at a fixed horizon"),
    (dict(metrics=[dict(name="a")]), "how much information"), (dict(rule=dict(kind="fixed")), "needs its horizon"), (dict(rule=dict(kind="grup")), "Did you mean group"), (dict(rule=dict(alpha=0)), "alpha lies strictly"), (dict(rule=dict(alpha=math.nan)), "alpha lies strictly"),
    (dict(rule=dict(looks=0)), "planned looks"), (dict(rule=dict(colour="red")), "no such part"), (dict(horizon=dict(units=0)), "units must be above 0"), (dict(horizon=dict(weeks=2)), "horizon has no such part"),
    (dict(population=dict(status="ok")), "before the arm answers"), (dict(population=dict(category=[])), "nobody"), (dict(population=dict(app=None)), "a value or a list"), (dict(overrides=dict(u="z")), "does not exist"),
    (dict(overrides=dict(u="b"), excluded=["u"]), "both sent to an arm and excluded"), (dict(slots=[[0, .5]]), "slots belong to a layer"), (dict(layer="l", slots=[[0, .5], [.4, 1]]), "do not overlap"), (dict(layer="l", slots=[[.5, .2]]), "do not overlap"),
    (dict(layer="l", unit="request"), "requests cannot be kept apart"), (dict(unit="request", metrics=[dict(name="a", mde=.1, cuped=True)]), "no past"), (dict(unit="planet"), "unit"), (dict(metric=[]), "Did you mean metrics"), (dict(coverage=2), "coverage")])
def test_bad_specifications(change, says):
    validate(load(GOOD))
    with pytest.raises(ExperimentError) as e: load(GOOD | change)
    assert says in str(e.value), e.value

def test_files(tmp_path):
    for kind in TEMPLATES:
        x = template(kind, "a", ["b", "c"], coverage=.5, population={"meta.language": ["de", "en"]}, horizon=dict(units=1000, days=7.5))
        dump(x, tmp_path/"x.yaml")
        assert load(tmp_path/"x.yaml") == x == load(dump(x)) and primary(x) in metrics_of(x)
    for text, says in (("a: [", "not YAML"), ("- 1\n- 2", "a mapping of fields"), ("name: x\narms: [a, b]\nmetrics: [{name: s, mde: 1e-3}]", "YAML reads 1e-3 as text")):
        with pytest.raises(ExperimentError, match=says): load(text+"\n")
    with pytest.raises(ExperimentError, match="no such file"): load(tmp_path/"none.yaml")
    with pytest.raises(ExperimentError, match="no such template"): template("two-model")

# ---- what may follow what ----------------------------------------------------------------------------------------------------
NEXT = dict(start="running", pause="paused", resume="running", stop="stopped", decide="decided")
class Life(RuleBasedStateMachine):
    "One experiment beside a model of what should be"
    xs = None
    def __init__(self):
        super().__init__()
        Life.n = getattr(Life, "n", 0)+1
        self.x = Life.xs.create(exp(f"machine {Life.n}", (.5, .25, .25)))
        self.status, self.archived, self.steps, self.off, self.w = "draft", False, 1, set(), dict(control=.5, b=.25, c=.25)
    def step(self, action, do, changes=True):
        able = self.status in STEPS[action] and not self.archived
        if action == "decide" and self.status == "decided": do(); return False
        if not able:
            with pytest.raises(ExperimentError, match="this step is not possible"): do()
            return False
        do(); self.steps += changes
        self.status = NEXT.get(action, self.status)
        return True
    @rule(action=hs.sampled_from(["start", "pause", "resume", "stop"]))
    def move(self, action): self.step(action, lambda: getattr(Life.xs, action)(self.x.name))
    @rule(verdict=hs.sampled_from(["ship", "keep", "no difference"]))
    def decide(self, verdict):
        before = Life.xs.get(self.x.id).decision
        self.step("decide", lambda: Life.xs.decide(self.x.id, dict(verdict=verdict, arm="b", sentence="so")))
        if before: assert Life.xs.get(self.x.id).decision == before
    @rule(arm=hs.sampled_from("bc"))
    def halt(self, arm):
        if self.step("halt", lambda: Life.xs.halt(self.x.id, arm), arm not in self.off) and arm not in self.off: self.off.add(arm); self.w["control"] += self.w[arm]; self.w[arm] = 0.
    @rule(b=hs.sampled_from([.1, .2, .3]), c=hs.sampled_from([.1, .2]))
    def reweight(self, b, c):
        w = dict(b=0. if "b" in self.off else b, c=0. if "c" in self.off else c); w["control"] = 1-w["b"]-w["c"]
        if self.step("reweight", lambda: Life.xs.reweight(self.x.id, w), w != self.w): self.w = w
    @rule()
    def archive(self): self.archived |= self.step("archive", lambda: Life.xs.archive(self.x.id))
    @invariant()
    def agrees(self):
        x, h = Life.xs.get(self.x.id), Life.xs.history(self.x.id)
        assert (x.status, bool(x.meta.get("archived")), x.revision, len(h)) == (self.status, self.archived, self.steps-1, self.steps)
        assert [r["revision"] for r in h] == list(range(self.steps)) and (x.decision is not None) == (self.status == "decided")
        assert {a.name: a.weight for a in x.arms} == pytest.approx(self.w) and math.isclose(sum(route(x).values()), 1) and math.isclose(sum(hash_weights(x).values()), 1) and min(hash_weights(x).values()) >= 0
        assert all(h[i]["after"].get("status", x.status) for i in range(len(h)))

def test_life_cycle_beside_a_model(tmp_path):
    s = State(f"sqlite:///{tmp_path}/s.db"); Life.xs = Experiments(s)
    run_state_machine_as_test(Life, settings=hyp(max_examples=8, stateful_step_count=14, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)))
    s.close()

def test_the_audit_can_only_be_added_to(state_url):
    x = Experiments(State(state_url), "ada")
    x.create(exp()); x.start("t", reason="go")
    h = x.history("t")
    assert [(r["action"], r["actor"], r["reason"]) for r in h] == [("create", "ada", ""), ("start", "ada", "go")] and h[1]["before"]["status"] == "draft" and h[1]["after"]["status"] == "running"
    for q in ("DELETE FROM experiment_events", "UPDATE experiment_events SET action = 'x'"):
        with pytest.raises(StoreError, match="can only be added"):
            with x.state.session() as s: s.execute(sa.text(q))
    with pytest.raises(StoreError, match="such a row already"):
        with x.state.session() as s: s.add(ExperimentEventRow(experiment=x.get("t").id, revision=1))
    x.state.close()

def test_in_flight(xs):
    "Renamed, re-weighted, re-measured: refused, or recorded"
    xs.create(exp(w=(.5, .25, .25))); x = xs.start("t")
    for what, says in ((dict(arms=[dict(name="control", weight=.5), dict(name="B", weight=.5)]), "arms keep their names"), (dict(arms=[a.model_dump() | dict(weight=w) for a, w in zip(x.arms, (.6, .2, .2))]), "changed by reweight"), (dict(coverage=.5), "changed by reweight"),
                       (dict(metrics=[dict(name="cost")]), "what was promised stands"), (dict(name="u"), "what was promised stands"), (dict(status="decided"), "not a field that can be changed"), (dict(colour=1), "not a field")):
        with pytest.raises(ExperimentError, match=says): xs.change("t", **what)
    for w, says in ((dict(control=.5, B=.25, c=.25), "keep their names"), (dict(control=.5, b=.5), "every arm gets a weight"), (dict(control=.5, b=.4, c=.2), "sums to 1.1"), (dict(control=0., b=.5, c=.5), "control needs traffic"), (dict(control=.5, b=math.nan, c=.5), "share from 0 to 1")):
        with pytest.raises(ExperimentError, match=says): xs.reweight("t", w)
    assert xs.get("t").revision == 1 and xs.change("t", owner="bob").owner == "bob"
    y = xs.reweight("t", dict(control=.6, b=.2, c=.2), coverage=.5)
    assert y.meta["weights_since"] and y.coverage == .5 and xs.history("t")[-1]["before"]["coverage"] == 1
    with pytest.raises(ExperimentError, match="revision 1, now 3"): xs.stop("t", revision=1)
    xs.create(exp("watched", rule=dict(kind="always"))); xs.start("watched")
    with pytest.raises(ExperimentError, match="keeps its weights"): xs.reweight("watched", dict(control=.9, b=.1))
    assert xs.reweight("watched", coverage=.2).coverage == .2

def test_names_and_archives(xs):
    xs.create(exp())
    with pytest.raises(ExperimentError, match="such an experiment already"): xs.create(exp())
    with pytest.raises(ExperimentError, match="no such experiment"): xs.get("q")
    with pytest.raises(ExperimentError, match="begins as a draft"): xs.create(exp("u", status="running"))
    first = xs.archive("t")
    second = xs.create(exp())
    assert xs.get("t").id == second.id and xs.get(first.id).meta["archived"] and [x.id for x in xs.list()] == [second.id] and [x.id for x in xs.list(archived=True)] == [first.id]
    assert possible(first) == []

def test_layers(xs):
    a, b, c, d = (xs.create(exp(n, layer="l", slots=s, unit=u)) for n, s, u in (("a", [[0, .3]], "user"), ("b", [[.2, .5]], "user"), ("c", [], "user"), ("d", [[.6, .8]], "session")))
    xs.start("a")
    with pytest.raises(ExperimentError, match=r"taken by a.*Free: 70% \(\[0.3, 1\]\)"): xs.start("b")
    with pytest.raises(ExperimentError, match="taken by a"): xs.start("c")
    with pytest.raises(ExperimentError, match="split by user"): xs.start("d")
    xs.change("b", slots=[[.3, .5], [.9, 1]]); xs.start("b")
    assert xs.layers()["l"]["free"] == [[.5, .9]]
    xs.pause("a")
    with pytest.raises(ExperimentError, match="taken by"): xs.start("c")
    xs.stop("a"); xs.stop("b"); xs.start("c")
    assert xs.layers()["l"]["free"] == []
    xs.holdout("h", .1)
    for share in (0, 1, math.nan, "x"):
        with pytest.raises(ExperimentError, match="a holdout is a share"): xs.holdout("i", share)
    with pytest.raises(ExperimentError, match="such a holdout already"): xs.holdout("h", .2)
    xs.create(exp("later")); assert xs.start("later").meta["holdouts"][0]["share"] == .1 and "holdouts" not in xs.get("c").meta

# ---- processes -----------------------------------------------------------------------------------------------------------------
DECIDE = """
import json, sys, time; from pathlib import Path
from somaagent.abtest.life import Experiments; from somaagent.store.state import State
xs = Experiments(State(sys.argv[1]), sys.argv[2])
print("ready")
while not Path(sys.argv[3]).exists(): time.sleep(.002)
print(json.dumps(xs.decide("t", dict(verdict=sys.argv[4], arm="b", sentence="so says "+sys.argv[2]))))
"""
def test_two_engines_decide_at_once(state_url, tmp_path):
    x = Experiments(State(state_url)); x.create(exp()); x.start("t")
    ps = [python(DECIDE, state_url, f"engine {i}", tmp_path/"go", v) for i, v in enumerate(("ship", "keep"))]
    for p in ps: assert p.stdout.readline() == "ready\n"
    (tmp_path/"go").touch()
    said = [json.loads(done(p)) for p in ps]
    assert said[0] == said[1] == x.get("t").decision and x.get("t").status == "decided"
    assert [h["action"] for h in x.history("t")] == ["create", "start", "decide"] and x.history("t")[-1]["actor"] == said[0]["decided_by"]
    x.state.close()

DIE = """
import sys, time; import sqlalchemy as sa
from sqlalchemy.orm import Session
from somaagent.abtest.life import Experiments; from somaagent.store.state import State
xs = Experiments(State(sys.argv[1]), "doomed")
@sa.event.listens_for(Session, sys.argv[2])
def _(s): print("half", flush=True); time.sleep(60)
xs.decide("t", dict(verdict="ship", arm="b", sentence="never heard"))
"""
def killed(url, moment, decided):
    "A process that dies while it decides leaves nothing, or the whole of it: row and audit together"
    x = Experiments(State(url)); x.create(exp()); x.start("t")
    p = python(DIE, url, moment)
    assert p.stdout.readline() == "half\n"
    os.kill(p.pid, signal.SIGKILL); p.wait()
    end, y = time.monotonic()+20, x.get("t")
    assert (y.status == "decided") == (y.decision is not None) == (len(x.history("t")) == 3) == decided
    got = x.decide("t", dict(verdict="keep", arm="b", sentence="after all"))
    assert got["verdict"] == ("ship" if decided else "keep") and time.monotonic() < end and [h["action"] for h in x.history("t")] == ["create", "start", "decide"]
    x.state.close()

def test_killed_before_the_commit(state_url): killed(state_url, "before_commit", False)
def test_killed_after_the_commit(tmp_path): killed(f"sqlite:///{tmp_path}/s.db", "after_commit", True)

# ---- looks -------------------------------------------------------------------------------------------------------------------------
NONE = dict(success=0., cost=1., latency=0., tail=0., rating=0.)
def day(k): return START+dt.timedelta(days=k)
class Bench:
    def __init__(self, stores): self.wh, s = stores; self.xs = Experiments(s, "bench")
    def run(self, name, truth=None, seed=0, rows=None, **kw):
        x = demo_experiment(name, seed=seed)
        x = Experiment(**x.model_dump() | dict(metrics=[m for m in x.metrics if m.get("kind") != "quantile"]) | kw)
        self.xs.create(x); x = self.xs.start(name)
        x.started_at = START
        from somaagent.store.state import ExperimentRow
        with self.xs.state.session() as s: s.get(ExperimentRow, x.id).started_at = START
        t = traffic(x, truth=truth, seed=seed)
        self.wh.insert("interactions", t if rows is None else rows(t))
        return x
    def look(self, name, *days, **kw): return [analyze(name, self.wh, self.xs, at=day(k), **kw) for k in days]
    def stored(self, x): return self.wh.query("SELECT * FROM ab_test_results WHERE experiment = {x:String} ORDER BY look, metric, arm", dict(x=x.id))

@pytest.fixture(scope="module")
def bench(stores): return Bench(stores)

def test_nothing_to_see_yet(bench):
    x = bench.xs.create(exp("empty")); bench.xs.start("empty")
    a = analyze("empty", bench.wh, bench.xs, at=day(1))
    assert a.verdict == "continue" and a.look == 0 and len(a.path) == 0 and len(bench.stored(x)) == 0 and all(l.refused for l in a.lifts) and json.dumps(a.summary())

def test_no_difference_is_not_found(bench):
    x = bench.run("same", NONE, seed=3)
    seen = bench.look("same", 7, DAYS)
    assert {a.verdict for a in seen} <= {"continue", "no difference"} and seen[-1].verdict == "no difference" and seen[-1].recorded
    assert bench.xs.get("same").status == "decided" and seen[-1].decision["needed_n"] > 0

@pytest.mark.parametrize("kind", ["fixed", "group", "always"])
def test_a_difference_is_found_and_looking_again_adds_nothing(bench, kind):
    x = bench.run(f"real {kind}", dict(success=.08), seed=2, rule=dict(kind=kind, looks=10))
    seen = bench.look(x.name, 9, DAYS)
    end = next(a for a in seen if a.verdict == "ship")
    assert seen[-1].verdict == "ship" and seen[-1].decision["arm"] == "small" and (kind != "fixed" or [a.verdict for a in seen] == ["continue", "ship"])
    c = end.corrected
    assert (c is None) == (kind == "fixed") and (kind == "fixed" or 0 < c.lo < c.estimate <= c.raw*(1+1e-9) < c.hi)
    before, h = bench.stored(x), bench.xs.history(x.name)
    again = bench.look(x.name, DAYS)
    assert bench.stored(x).equals(before) and bench.xs.history(x.name) == h and again[-1].decision["decided_at"] == seen[-1].decision["decided_at"] and again[-1].look == seen[-1].look
    assert again[-1].path.filter(pl.col("action") == "reject").height == 1 and end.decision["decided_at"] == again[-1].decision["decided_at"]
    assert before.filter(pl.col("metric") == "success")["look"].to_list() == list(range(1, seen.index(end)+2)) and json.dumps(again[-1].summary())

def test_the_history_is_exact_at_the_next_call(bench):
    "Looks that were stored and read back give the boundaries of looks held in memory"
    x = bench.run("exact", dict(success=.02), seed=5)
    seen = bench.look(x.name, 2, 4, 7, decide=False)
    rows = history(bench.xs.get(x.name), bench.wh)["arms"]["small"]
    path, _ = watch(bench.xs.get(x.name), rows["points"], .05, rows["plan"])
    assert np.allclose([q["boundary"] for q in path], seen[-1].path["boundary"].to_numpy()) and [q["n"] for q in path] == [int(a.arms["units"].sum()) for a in seen]

def test_a_harmed_guardrail_stops_its_arm(bench):
    x = bench.run("dear", dict(success=.08, cost=1.6), seed=4)
    a, = bench.look(x.name, 7)
    y = bench.xs.get(x.name)
    assert a.verdict == "harm" and "cost per request is" in a.decision["sentence"] and y.status == "decided" and y.meta["halted"]["small"]["weight"] == .5 and [q.weight for q in y.arms] == [1, 0] and route(y) == dict(large=1., small=0.)
    assert [h["action"] for h in bench.xs.history(x.name)] == ["create", "start", "halt", "decide"] and "cost per request" in bench.xs.history(x.name)[2]["reason"]
    assert bench.look(x.name, 8)[0].verdict == "harm"

def test_a_process_that_dies_between_look_and_decision_loses_neither(bench, monkeypatch):
    x = bench.run("interrupted", dict(success=.09), seed=13, rule=dict(kind="always"))
    with monkeypatch.context() as m:
        m.setattr(Experiments, "decide", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt): bench.look(x.name, 12)
    rows = bench.stored(x)
    a, = bench.look(x.name, 12)
    assert len(rows) and bench.stored(x).equals(rows) and a.look == 1 and a.recorded and a.verdict == "ship" and bench.xs.get(x.name).status == "decided"

def test_without_a_store_nothing_is_stopped(bench):
    x = bench.run("only looking", dict(cost=1.6), seed=6)
    a = analyze(bench.xs.get(x.name), bench.wh, at=day(7), store=False)
    assert a.verdict == "harm" and not a.recorded and bench.xs.get(x.name).status == "running" and len(bench.stored(x)) == 0
    with pytest.raises(ExperimentError, match="needs the state store"): analyze(x.name, bench.wh)

def test_a_broken_split_takes_the_verdict_away(bench):
    x = bench.run("lost users", dict(success=.08), seed=7, rows=lambda t: t.filter((pl.col("arm") == "large") | (pl.col("user_id").str.slice(-1).is_in(list("0123456")))))
    a, = bench.look(x.name, DAYS)
    assert a.verdict == "invalid" and not a.decision["valid"] and not a.recorded and bench.xs.get(x.name).status == "running"

def test_clock_set_back_and_rows_taken_out(bench):
    x = bench.run("clock", dict(success=.01), seed=8)
    seen = bench.look(x.name, 4, 8)
    n = len(bench.stored(x))
    past, = bench.look(x.name, 5)
    assert len(bench.stored(x)) == n and not past.recorded and past.arms["units"].sum() < seen[-1].arms["units"].sum() and past.at == day(5)
    bench.wh.command("DELETE FROM interactions WHERE experiment = {x:String} AND user_id LIKE '%1'", dict(x=x.id))
    fewer, = bench.look(x.name, 8.5)
    assert len(bench.stored(x)) == n and "rows were taken out" in "".join(c.sentence for c in fewer.checks) and fewer.look == 2

def test_weights_changed_in_flight_begin_a_new_series_with_what_is_left(bench, monkeypatch):
    x = bench.run("ramp", dict(success=.0), seed=9)
    bench.look(x.name, 4, 8, decide=False)
    from somaagent.abtest import life
    monkeypatch.setattr(life, "utcnow", lambda: day(8))
    bench.xs.reweight(x.name, dict(large=.6, small=.4))
    h = history(bench.xs.get(x.name), bench.wh)
    a, = bench.look(x.name, 13, decide=False)
    assert 0 < h["spent"] < .05 and h["arms"]["small"]["points"] == [] and a.arms["units"].sum() < 3000 and f"{h['spent']:.3g} spent before" in a.decision["basis"][0] and a.look == 3

def test_one_of_two_arms_is_stopped_and_the_other_goes_on(bench):
    arms = [dict(name=n, weight=w) for n, w in (("large", .4), ("small", .3), ("tiny", .3))]
    dear = lambda t: t.with_columns(cost_usd=pl.col("cost_usd")*pl.when(pl.col("arm") == "tiny").then(4.).otherwise(1.))
    x = bench.run("three", dict(success=.09, cost=.9, latency=0., tail=0.), seed=11, rows=dear, arms=arms, horizon=dict(units=9000))
    with ThreadPoolExecutor(2) as ex: first, twin = ex.map(lambda _: bench.look(x.name, 9, decide=False)[0], range(2))
    y = bench.xs.get(x.name)
    assert y.status == "running" and list(y.meta["halted"]) == ["tiny"] and route(y) == pytest.approx(dict(large=.7, small=.3, tiny=0.)) and hash_weights(y) == pytest.approx(dict(large=.4, small=.3, tiny=.3))
    rows = bench.stored(x).filter(pl.col("metric") == "success")
    assert first.look == twin.look == 1 and rows["arm"].to_list() == ["small", "tiny"] and [h["action"] for h in bench.xs.history(x.name)].count("halt") == 1
    last, = bench.look(x.name, DAYS)
    assert last.verdict == "ship" and last.decision["arm"] == "small" and {g["arm"] for g in last.guardrails if g["status"] == "harm"} == {"tiny"} and all(l.adjusted.startswith("Dunnett") for l in last.lifts if l.metric == "success")

def test_the_horizon_in_units_is_of_all_arms_together(bench):
    arms = [dict(name=n, weight=w) for n, w in (("large", .4), ("small", .3), ("tiny", .3))]
    x = bench.run("horizon", dict(success=.08), seed=14, rule=dict(kind="fixed"), arms=arms, horizon=dict(units=2000))
    seen = bench.look(x.name, 5, 12)
    n = [a.arms["units"].sum() for a in seen]
    assert n[0] < 2000 < n[1] and [a.verdict for a in seen] == ["continue", "ship"] and {q["action"] for q in seen[1].path.to_dicts() if q["look"] == 2} <= {"reject", "end"}

def test_all_successes(bench):
    "Nothing varies: no estimate is believed, nothing is decided; values that are no numbers are left out, and counted"
    x = bench.run("perfect", NONE, seed=10, rows=lambda t: t.with_columns(status=pl.lit("ok"), latency_ms=pl.when(pl.col("user_id").str.ends_with("7")).then(float("nan")).otherwise(pl.col("latency_ms"))))
    a, = bench.look(x.name, 7)
    assert a.verdict == "continue" and a.path["action"].to_list() == ["continue"] and not a.path["counted"][0]
    assert "no finite numbers were left out" in next(c for c in a.checks if c.name == "values").sentence and all(math.isfinite(l.diff) for l in a.lifts if l.metric == "latency")

def test_an_arm_renamed_in_flight(bench):
    x = bench.run("renamed", dict(success=.08), seed=12, rows=lambda t: t.with_columns(arm=pl.when((pl.col("arm") == "small") & (pl.col("ts") > day(5))).then(pl.lit("smaller")).otherwise(pl.col("arm"))))
    a, = bench.look(x.name, 9)
    assert a.verdict == "invalid" and "smaller" in a.decision["basis"][2] and not a.recorded

def test_the_best_of_several_arms():
    x = exp(w=(.4, .3, .3))
    from somaagent.abtest.lift import Lift
    l = {a: Lift("success", a, "control", "rate", 100, 100, 100, 100, .5, .5+d, d, .01, d-.02, d+.02, .01) for a, d in (("b", .05), ("c", .09))}
    row = lambda a, action: [dict(look=1, arm=a, action=action, diff=l[a].diff, lo=l[a].lo, hi=l[a].hi)]
    say = lambda b, c, **kw: (d := conclude(x, l, dict(b=row("b", b), c=row("c", c)), **kw))["verdict"] + " " + str(d["arm"])
    harm = [dict(arm="c", status="harm", metric="cost", sentence="cost.")]
    assert say("reject", "reject") == "ship c" and say("reject", "continue") == "continue c" and say("continue", "reject") == "ship c" and say("reject", "reject", guardrails=harm) == "ship b"
    assert say("end", "futile") == "no difference c" and say("end", "continue", guardrails=harm) == "no difference b" and say("continue", "continue", guardrails=[dict(harm[0], arm=a) for a in "bc"]).startswith("harm")
