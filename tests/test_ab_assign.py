"""Assignment, exposures and health: a million units in Python and SQL, ramps, odd names, batches that fail, clocks that are wrong, and the A/A test against sums done by hand."""
import datetime as dt, math, random, threading

import numpy as np, polars as pl, pytest
from hypothesis import given, settings as hyp, strategies as hs
from scipy.stats import chi2
from test_store import done, python

from somaagent.abtest.aatest import _aa_sql, _moments, aa_test
from somaagent.abtest.assign import Assigner, assign, assign_sql, bucket, matches, moves, population_sql
from somaagent.abtest.cuts import bounds, cuts_of, reweight
from somaagent.abtest.exposures import Exposures, first_sql, planned
from somaagent.abtest.growthbook import bucket_ranges, in_namespace, slot
from somaagent.abtest.health import checks
from somaagent.abtest.spec import Metric
from somaagent.abtest.statement import Column, Query
from somaagent.core.errors import ExperimentError, StoreError
from somaagent.core.records import Experiment, Interaction

BEGIN = dt.datetime(2026, 11, 2, tzinfo=dt.timezone.utc)
def exp(id="exp_t", w=(.5, .5), **kw):
    return Experiment(id=id, name=id, salt=kw.pop("salt", "lamp"), arms=[dict(name=n, weight=v) for n, v in zip("control b c d e f".split(), w)], **(dict(metrics=[dict(name="success", mde=.03)]) | kw))
def with_meta(x, **meta): return x.model_copy(update=dict(meta=x.meta | meta))

@pytest.fixture(scope="module")
def wh(stores): return stores[0]

# ---- SQL and Python ----------------------------------------------------------------------------------------------------------
GATES = dict(coverage=.6, layer="answers", slots=[[.5, .9], [0, .3]], meta=dict(holdouts=[dict(name="2026", share=.1)]), overrides={"user-7": "c", "user-8": "b"}, excluded=["user-9", "user-8x"])
@pytest.mark.parametrize("x", [exp(), reweight(reweight(exp(w=(.2, .3, .5)), dict(control=.6, b=.2, c=.2)), dict(control=.4, b=0., c=.6)).model_copy(update={k: v for k, v in GATES.items() if k != "meta"})], ids=["plain", "everything"])
def test_a_million_units_are_equal_in_python_and_sql(wh, x):
    N = 1_000_000 if x.layer else 200_000
    x = with_meta(x, **(GATES["meta"] if x.layer else {}))
    sql, params = assign_sql(x, "u")
    by_sql = wh.query(f"SELECT toLowCardinality({sql}) AS arm FROM (SELECT concat('user-', toString(number)) AS u FROM numbers({N})) SETTINGS max_threads = 1", params)["arm"].cast(pl.String)
    by_python = Assigner(x).many([f"user-{i}" for i in range(N)])
    assert len(by_sql) == N and (by_sql == by_python).all()
    share = by_python.value_counts().to_dict(as_series=False)
    n = N*(.9*.7*.6 if x.layer else 1)
    for a, k in zip(share["arm"], share["count"]):
        if a: assert abs(k - n*Assigner(x).weights[a]) < 6*math.sqrt(n)

NAMES = ["Ünï", "漢字", "o'neil", "a:b", " x ", "🦊", "\\n", "", "tab\there", "new\nline", "{ab_salt:String}", "%s", "'; DROP TABLE interactions; --", "a"*3000, "user-7", "user-9"]
@pytest.mark.parametrize("kw", [{}, GATES, dict(hashing="growthbook"), dict(hashing="growthbook", coverage=.4, layer="desk", slots=[[.1, .8]], meta=dict(hash_version=1, holdouts=[dict(name="h", share=.2)])), dict(salt="sälz:'🦊"), dict(coverage=0.), dict(layer="l", slots=[[0, 1]]),
    dict(meta=dict(halted=dict(b=dict(weight=.2))), overrides={"user-1": "control"})], ids=["plain", "gates", "growthbook", "growthbook with namespace", "odd salt", "nobody", "whole layer", "halted"])
def test_odd_names_are_equal_one_by_one_together_and_in_sql(wh, kw):
    w = (.3, .3, .4) if not (kw.get("meta") or {}).get("halted") else (.5, 0., .5)
    x = exp(w=w, **kw)
    units = NAMES + [f"user-{i}" for i in range(500 if x.hashing == "growthbook" else 3000)]
    sql, params = assign_sql(x, "t.u")
    by_sql = wh.query(f"SELECT {sql} AS arm FROM (SELECT arrayJoin({{us:Array(String)}}) AS u) AS t", params | dict(us=units))["arm"].to_list()
    a = Assigner(x)
    assert by_sql == a.many(units).to_list() == [a.arm(u) for u in units] == [a.explain(u)["arm"] for u in units]
    assert a.arm("") == "" and (kw.get("coverage") != 0. or set(by_sql) == {""})
    nullable = wh.query(f"SELECT {assign_sql(x, 'u')[0]} AS arm FROM (SELECT CAST(NULL AS Nullable(String)) AS u)", params)["arm"].to_list()
    assert nullable == [""]

def test_population_is_the_same_in_python_and_sql(wh):
    x = exp(w=(.5, .5), population={"app": "pop-desk", "category": ["billing", "it's", 3], "meta.language": ["en", ""], "meta.vip": True}, excluded=["u-3"])
    rng = random.Random(1)
    rows = [Interaction(id=f"pop-{i}", ts=BEGIN, app=rng.choice(["pop-desk", "other"]), user_id=f"u-{i % 40}", prompt="?", category=rng.choice(["billing", "it's", "3", "x"]), meta=rng.choice([{}, dict(language="en", vip="true"), dict(language="de", vip="true"), dict(vip="true")])) for i in range(400)]
    wh.insert("interactions", rows)
    cond, params = population_sql(x, "i.")
    got = wh.query(f"SELECT i.id AS id FROM interactions AS i WHERE i.id LIKE 'pop-%' AND {cond}", params)["id"].to_list()
    assert sorted(got) == sorted(r.id for r in rows if matches(x, r)) and 20 < len(got) < 200
    sql, params = assign_sql(x, "i.user_id")
    arms = dict(wh.query(f"SELECT i.id AS id, {sql} AS arm FROM interactions AS i WHERE i.id LIKE 'pop-%'", params).iter_rows())
    a = Assigner(x)
    assert arms == {r.id: a.arm(r.user_id, r.model_dump()) for r in rows}
    frame = pl.DataFrame([dict(app=r.app, category=r.category, meta=r.meta, id=r.id, user_id=r.user_id) for r in rows], schema_overrides=dict(meta=pl.Object))
    assert a.many(frame["user_id"], frame).to_list() == [arms[i] for i in frame["id"]]
    with pytest.raises(ExperimentError, match="has a population"): a.arm("u-1")
    with pytest.raises(ExperimentError, match="has a population"): a.many(["u-1"])
    with pytest.raises(ExperimentError, match="one row per unit"): a.many(["u-1", "u-2"], frame)
    assert Assigner(x, population=False).arm("u-1") in ("control", "b")

def test_overrides_can_be_left_out_of_an_analysis(wh):
    x = exp(overrides={"ann": "b"})
    sql, params = assign_sql(x, "u", overrides=False)
    assert Assigner(x).arm("ann") == "b" and wh.query(f"SELECT {sql} AS arm FROM (SELECT 'ann' AS u)", params)["arm"].to_list() == [""]

@pytest.mark.parametrize("unit", ["user_id; DROP", "a.b.c", "f(x)", "", "1a"])
def test_only_column_names_enter_a_statement(unit):
    with pytest.raises(ExperimentError, match="not a column name"): assign_sql(exp(), unit)

@pytest.mark.parametrize("unit", [float("nan"), 1.5, True, b"bytes", ["list"], {"a": 1}, object()])
def test_what_is_no_name_is_refused(unit):
    a = Assigner(exp())
    with pytest.raises(ExperimentError, match="not the name of a unit"): a.arm(unit)
    with pytest.raises(ExperimentError, match="not the name of a unit"): a.many(["ok", unit])
    with pytest.raises(ExperimentError): assign(["ok", unit], exp())

def test_names_that_are_numbers_or_missing():
    a = Assigner(exp(excluded=["12"]))
    assert a.arm(7) == a.arm("7") == a.many([7])[0] and a.arm(12) == a.arm("12") == "" and a.arm(0) == a.arm("0") != "" and a.arm(None) == ""
    assert a.many(pl.Series(["x", None])).to_list() == [a.arm("x"), ""] and a.many([]).to_list() == []
    assert a.arm("\ud800") in ("control", "b")  # half a surrogate pair
    for u in (None, ""):
        with pytest.raises(ExperimentError, match="without a name"): assign(["a", u], exp())

@pytest.mark.parametrize("x,says", [(exp(overrides={"u": "z"}), "does not exist"), (with_meta(exp(), cuts=[["control", "0"], ["old name", "8"*16]]), "an arm that is gone"), (with_meta(exp(), cuts=[["control", "zz"]]), "cannot be read"),
    (with_meta(exp(), cuts=[["control", "1"], ["b", "2"]]), "do not cover"), (with_meta(exp(), cuts="rubbish"), "cannot be read"), (with_meta(exp(), holdouts=[dict(name="h", share=2)]), "not a holdout"), (with_meta(exp(), holdouts=[dict(share=.1)]), "not a holdout"),
    (exp(population={"status": "ok"}), "known before an arm answers"), (with_meta(exp(hashing="growthbook"), hash_version=3), "no such version")])
def test_what_cannot_be_assigned_says_so(x, says):
    with pytest.raises(ExperimentError, match=says): Assigner(x).arm("u")

# ---- who moves -----------------------------------------------------------------------------------------------------------------
@hyp(max_examples=40, deadline=None, derandomize=True)
@given(hs.lists(hs.lists(hs.integers(0, 20), min_size=4, max_size=4).filter(lambda v: v[0] > 0), min_size=2, max_size=6))
def test_every_change_of_weights_moves_the_least_possible(steps):
    steps = [[v/sum(s) for v in s] for s in steps]
    x = exp(w=steps[0])
    for w in steps[1:]:
        y = reweight(x, dict(zip("control b c d".split(), w)))
        between = sum(v for (a, b), v in moves(x, y).items() if a != b)
        old = {a.name: a.weight for a in x.arms}
        assert abs(between - sum(abs(old[a.name]-a.weight) for a in y.arms)/2) < 1e-9
        gain, lose = ({a.name for a in y.arms if s*(a.weight-old[a.name]) > 0} for s in (1, -1))
        assert all(a in lose and b in gain for (a, b), v in moves(x, y).items() if a != b and v > 1e-9)
        assert cuts_of(y)[-1][1] == 2**64 and sorted({e for _, e in cuts_of(y)}) == [e for _, e in cuts_of(y)]
        x = y

def test_weights_that_changed_without_new_ranges_still_move_the_least():
    x = reweight(exp(w=(1/3, 1/3, 1/3)), dict(control=.5, b=.25, c=.25))
    y = x.model_copy(update=dict(arms=[a.model_copy(update=dict(weight=w)) for a, w in zip(x.arms, (.5, .1, .4))]))
    assert abs(sum(v for (a, b), v in moves(x, y).items() if a != b) - .15) < 1e-9 and set(k for k, v in moves(x, y).items() if k[0] != k[1] and v > 1e-9) == {("b", "c")}

def test_a_ramp_of_the_coverage_moves_nobody_between_arms():
    units, last = [f"u{i}" for i in range(20_000)], None
    for c in (.05, .2, .5, 1.):
        now = Assigner(exp(w=(.9, .1), coverage=c)).many(units)
        assert abs((now != "").mean()-c) < 5*math.sqrt(c*(1-c)/20_000)+1e-12
        if last is not None: assert ((now == last) | (last == "")).all()
        last = now

def test_a_halted_arm_leaves_and_nobody_joins_the_control():
    x = exp(w=(.4, .3, .3))
    y = with_meta(x.model_copy(update=dict(arms=[a.model_copy(update=dict(weight=w)) for a, w in zip(x.arms, (.7, 0., .3))])), halted=dict(b=dict(weight=.3)))
    units = [f"u{i}" for i in range(5000)]
    before, after = Assigner(x).many(units), Assigner(y).many(units)
    assert (after == before.replace("b", "")).all() and Assigner(y).explain(units[before.to_list().index("b")])["reason"] == "halted"
    assert Assigner(y).explain(units[before.to_list().index("c")])["propensity"] == pytest.approx(.3/.7)

def test_layers_share_no_unit_and_other_layers_know_nothing_of_them():
    units = [f"u{i}" for i in range(20_000)]
    a, b = (Assigner(exp(f"e{i}", salt=f"s{i}", layer="l", slots=s)).many(units) != "" for i, s in enumerate(([[0, .4]], [[.4, .7], [.9, 1]])))
    other = Assigner(exp("e3", salt="s3", layer="m", slots=[[0, .5]])).many(units) != ""
    assert not (a & b).any() and abs(a.mean()-.4) < .02 and abs(b.mean()-.4) < .02
    assert abs((a & other).mean() - .2) < 5*math.sqrt(.2*.8/20_000)

def test_salts_are_independent():
    "100 pairs of salts, 5,000 units: the smallest p-value of 100 is below 1e-7 once in 100,000 runs of other salts; these salts are fixed"
    units = [f"user-{i}" for i in range(5000)]
    arms = [np.asarray(Assigner(exp(w=(.25,)*4, salt=f"salt {i}")).many(units).replace_strict(dict(control=0, b=1, c=2, d=3))) for i in range(101)]
    ps = []
    for x, y in zip(arms, arms[1:]):
        t = np.bincount(4*x+y, minlength=16).reshape(4, 4); e = t.sum(1, keepdims=True)*t.sum(0)/t.sum()
        ps.append(chi2.sf(((t-e)**2/e).sum(), 9))
    assert min(ps) > 1e-7 and abs(np.mean(np.array(ps) < .5) - .5) < 4*.05

def test_random_draws_follow_the_weights_and_need_requests():
    a, rng = Assigner(exp(w=(.7, 0., .3), unit="request", coverage=.5)), random.Random(3)
    got = [a.draw(rng) for _ in range(6000)]
    for arm, p in (("", .5), ("control", .35), ("c", .15)): assert abs(sum(g[0] == arm for g in got)/6000 - p) < .03
    assert {round(p, 9) for g, p in got if g == "c"} == {.15} and not any(g == "b" for g, _ in got)
    with pytest.raises(ExperimentError, match="only requests"): Assigner(exp()).draw()

def test_growthbook_published_runs_through_the_assigner():
    "packages/sdk-js/test/cases.json of GrowthBook, specification 0.5.4: section run"
    gb = lambda **kw: Assigner(Experiment(id="e", name="n", salt=kw.pop("key", "my-test"), hashing="growthbook", arms=[dict(name=str(i), weight=w) for i, w in enumerate(kw.pop("w", (.5, .5)))], meta=dict(hash_version=kw.pop("v", 1)), **kw))
    arms = lambda a: "".join(a.arm(str(u)) or "-" for u in range(1, 10))
    assert arms(gb()) == "100111010" and arms(gb(w=(.1, .9))) == "110111011" and arms(gb(coverage=.4)) == "-00-1-01-" and arms(gb(w=(1/3, 1/3, 1/3))) == "200212010"
    assert gb(key="my-test-3").arm("1") == "0" and gb(layer="namespace", slots=[[.1, 1]]).arm("1") == "1" and gb(layer="namespace", slots=[[0, .1]]).arm("1") == "" and gb(key="foo", v=2).arm("1") == "1" and gb(key="no-coverage", coverage=0.).arm("1") == ""
    assert [in_namespace(u, n, lo, hi) for u, n, lo, hi in (("1", "namespace1", 0, .4), ("1", "namespace1", .4, 1), ("3", "namespace2", 0, .4), ("4", "namespace2", .4, 1))] == [False, True, True, False]
    assert [slot("", "a", 1), slot("b", "a", 1), slot("seed", "b", 2)] == [220, 946, 2696] and bucket_ranges(4, 1, [.4, .4, .2])[1] == (.25, .5)

# ---- exposures -------------------------------------------------------------------------------------------------------------------
def stored(wh, x): return wh.query("SELECT count() AS n, uniqExact(unit, arm) AS u FROM ab_exposures WHERE experiment = {x:String}", dict(x=x.id)).row(0)

class Broken:
    "A warehouse that fails as it is told to: before storing, or after"
    def __init__(self, wh, plan): self.wh, self.plan = wh, list(plan)
    def insert(self, *a, **kw):
        what = self.plan.pop(0) if self.plan else "ok"
        if what == "before": raise StoreError("no connection")
        n = self.wh.insert(*a, **kw)
        if what == "after": raise StoreError("the answer was lost")
        return n

def test_nothing_is_lost_or_doubled_whatever_fails(wh):
    x = exp("exp_fail")
    log = Exposures(Broken(wh, ["before", "after", "ok", "after", "before", "before", "ok", "after"]), batch=20)
    for i in range(205): log.log(x, f"u{i % 203}", "b", .5, ts=BEGIN)
    for _ in range(10):
        try: log.close(); break
        except StoreError: pass
    assert stored(wh, x) == (203, 203) and log.written == 203 and len(log) == 0 and log.closed and log.fault is None
    with pytest.raises(ExperimentError, match="closed"): log.log(x, "late", "b")

def test_a_warehouse_that_stays_away_is_told_before_memory_runs_out(wh):
    log = Exposures(Broken(wh, ["before"]*1000), batch=10, limit=30)
    for i in range(30): log.log(exp("exp_away"), f"u{i}", "b")
    with pytest.raises(StoreError, match="no connection"): log.log(exp("exp_away"), "one more", "b")
    assert len(log) == 30 and log.log(exp("exp_away"), "u3", "b") is False
    log.wh.plan.clear(); log.close()
    assert stored(wh, exp("exp_away")) == (30, 30)

def test_memory_of_what_was_logged_is_bounded_and_duplicates_do_no_harm(wh):
    x = exp("exp_twice")
    with Exposures(wh, batch=7, remember=5) as log:
        for day in range(3):
            for i in range(20): log.log(x, f"u{i}", "b", .25, ts=BEGIN+dt.timedelta(days=2-day))
    sql, params = first_sql(x)
    got = wh.query(f"SELECT count() AS n, min(first) AS a, max(first) AS b, max(arms) AS arms, min(exposures) AS e FROM ({sql})", params).row(0, named=True)
    assert len(log._seen) <= 5 and got == dict(n=20, a=BEGIN, b=BEGIN, arms=1, e=3)
    assert planned(x, wh)["units"].to_list() == [0, 20] and planned(exp("exp_nobody"), wh)["share"].to_list() == [0., 0.]

def test_threads_log_each_exposure_once(wh):
    x, log = exp("exp_threads"), Exposures(wh, batch=50)
    a = Assigner(x)
    ts = [threading.Thread(target=lambda: [log.expose(a, f"u{i}") for i in range(400)]) for _ in range(6)]
    for t in ts: t.start()
    for t in ts: t.join()
    log.close()
    assert stored(wh, x) == (400, 400)

@pytest.mark.parametrize("kw,says", [(dict(unit=""), "needs a unit"), (dict(unit=float("nan")), "not the name"), (dict(arm=""), "needs a unit and an arm"), (dict(arm="z"), "no such arm"), (dict(reason="whim"), "no such reason"),
    (dict(propensity=0.), "not the probability"), (dict(propensity=math.nan), "not the probability"), (dict(propensity=1.1), "not the probability")])
def test_an_exposure_that_makes_no_sense_is_refused(wh, kw, says):
    with pytest.raises(ExperimentError, match=says): Exposures(wh).log(exp(), **dict(unit="u", arm="b") | kw)

def test_a_killed_process_loses_no_acknowledged_exposure(tmp_path):
    url, head = f"chdb://{tmp_path/'wh'}", """
        import os, signal, sys
        from somaagent.abtest.exposures import Exposures
        from somaagent.core.records import Experiment
        from somaagent.store.warehouse import warehouse
        wh = warehouse(sys.argv[1], mode="direct")
        """
    p = python(head + """
        x = Experiment(id="exp_kill", name="k", arms=[dict(name="control", weight=.5), dict(name="b", weight=.5)])
        log = Exposures(wh, batch=50)
        for i in range(1, 10_000):
            log.log(x, f"u{i}", "b")
            if i == 230: print(log.written, flush=True); os.kill(os.getpid(), signal.SIGKILL)
        """, url)
    assert p.communicate(timeout=60)[0].strip() == "200" and p.returncode == -9
    assert done(python(head + """print(*wh.query("SELECT count() AS n, uniqExact(unit) AS u FROM ab_exposures").row(0)); wh.close()""", url)).split() == ["200", "200"]

# ---- health ----------------------------------------------------------------------------------------------------------------------
def visits(x, users=400, seed=0, per_user=4, days=10, **kw):
    rng, a = np.random.default_rng(seed), Assigner(x, population=False)
    rows = []
    for u in range(users):
        p = min(.98, max(.02, .8+rng.normal(0, .05)))
        for i in range(1+rng.poisson(per_user-1)): rows.append(dict(id=f"{x.id}-{u}-{i}", ts=BEGIN+dt.timedelta(milliseconds=int(rng.uniform(0, days*864e5))), app=x.population.get("app", "d"), user_id=f"{x.id}-{u}", session_id=f"{x.id}-{u}", prompt="?", status="ok" if rng.random() < p else "error", experiment=x.id, arm=a.arm(f"{x.id}-{u}"), **kw))
    return rows
AFTER = BEGIN+dt.timedelta(days=11)
def status(c): return {k.name: k.status for k in c if k.status != "ok"}

def test_a_sound_experiment_is_healthy_by_every_source(wh):
    x = exp("h_sound", started_at=BEGIN, population=dict(app="h_sound"))
    rows = visits(x)
    wh.insert("interactions", rows)
    with Exposures(wh) as log:
        for r in sorted(rows, key=lambda r: r["ts"]): log.log(x, r["user_id"], r["arm"], .5, ts=r["ts"])
    found = {source: checks(x, wh, source=source, at=AFTER) for source in ("stamped", "exposed", "hashed")}
    assert all(status(c) == {} and len(c) == 8 and c.status == "ok" for c in found.values()), found
    assert len({c["split"].value for c in found.values()}) == 1 and len({round(c["day of week"].value, 9) for c in found.values()}) == 1

def test_events_out_of_time_are_counted(wh):
    x = exp("h_clock", started_at=BEGIN, stopped_at=BEGIN+dt.timedelta(days=10))
    rows = visits(x)
    odd = [rows[0] | dict(id="h_clock-f", ts=AFTER+dt.timedelta(hours=1)), rows[1] | dict(id="h_clock-e", ts=BEGIN-dt.timedelta(hours=1)), rows[2] | dict(id="h_clock-l", ts=BEGIN+dt.timedelta(days=10, hours=1))]
    wh.insert("interactions", rows+odd)
    c = checks(x, wh, at=AFTER)["clock"]
    assert c.status == "warn" and (c.detail["future"], c.detail["early"], c.detail["late"]) == (1, 1, 2) and "lie in the future" in c.sentence
    wh.insert("interactions", [r | dict(id=r["id"]+"again", ts=BEGIN-dt.timedelta(days=1)) for r in rows[:50]])
    assert checks(x, wh, at=AFTER)["clock"].status == "fail"

def test_duplicates_are_counted_not_believed(wh):
    x = exp("h_dup")
    rows = visits(x)
    wh.insert("interactions", rows + rows[:10] + rows[:3])
    c = checks(x, wh, at=AFTER)["duplicates"]
    assert c.status == "warn" and c.value == pytest.approx(13/(len(rows)+13)) and "13 of" in c.sentence

def test_gaps_that_differ_between_arms_fail_and_even_gaps_do_not(wh):
    for name, drop, expected in (("h_gap", dict(control=.1, b=.4), "fail"), ("h_even", dict(control=.3, b=.3), "ok")):
        x, rng = exp(name, metrics=[dict(name="stars", kind="mean", value="rating", mde=.1)], rule=dict(kind="fixed"), horizon=dict(units=400)), np.random.default_rng(5)
        rows = [r | dict(rating=None if rng.random() < drop[r["arm"]] else float(rng.integers(1, 6))) for r in visits(x)]
        wh.insert("interactions", rows)
        c = checks(x, wh, at=AFTER)["missing outcomes"]
        assert c.status == expected and c.detail["missing"] == sum(r["rating"] is None for r in rows)

def test_broken_values_count_as_missing(wh):
    x = exp("h_nan", metrics=[dict(name="speed", kind="mean", value="latency_ms", relative_mde=.1)])
    rows = [r | dict(latency_ms=[100., math.nan, math.inf, None][i % 4]) for i, r in enumerate(visits(x, users=200))]
    wh.insert("interactions", rows)
    c = checks(x, wh, at=AFTER)["missing outcomes"]
    assert c.detail["missing"] == sum(not (r["latency_ms"] and math.isfinite(r["latency_ms"])) for r in rows)

def test_arms_that_nobody_planned_and_experiments_without_units(wh):
    x = exp("h_renamed")
    assert status(checks(x, wh, at=AFTER)) == {"split": "warn"}
    wh.insert("interactions", [r | dict(arm="treatment" if r["arm"] == "b" else r["arm"]) for r in visits(x, users=60)])
    c = checks(x, wh, at=AFTER)
    assert c["split"].status == "fail" and "treatment" in c["split"].sentence
    y = exp("h_all_renamed"); wh.insert("interactions", [r | dict(arm="?") for r in visits(y, users=30)])
    assert [k.status for k in checks(y, wh, at=AFTER)] == ["fail"]

@pytest.mark.parametrize("kw", [dict(metrics=[dict(name="spend", kind="mean", value="cost_usd", over="units", mde=.1)]), dict(unit="request"), dict(unit="session"), dict(metrics=[dict(name="m", kind="mean", value="meta.score", mde=1.)]), dict(metrics=[])], ids=["zero variance", "request", "session", "meta", "no metric"])
def test_every_kind_of_metric_and_unit_gets_an_answer(wh, request, kw):
    x = exp(f"h_{request.node.callspec.id}", **kw)
    rows = visits(x, users=150, meta=dict(score="3"))
    if x.unit == "request": rows = [r | dict(arm=Assigner(x).arm(r["id"])) for r in rows]
    wh.insert("interactions", rows)
    c = checks(x, wh, at=AFTER)
    assert len(c) == 8 and c["split"].status == "ok" and all(k.sentence and k.sql for k in c)

def test_the_split_is_held_against_the_weights_that_assigned(wh):
    "Exposures carry their probabilities: a ramp in flight is no mismatch"
    x, y = exp("h_ramp", w=(.9, .1)), exp("h_ramp", w=(.5, .5), revision=1)
    with Exposures(wh, batch=5000) as log:
        for i in range(2000):
            e = x if i < 1000 else y
            log.expose(Assigner(e), f"r{i}", ts=BEGIN+dt.timedelta(minutes=i))
    assert checks(y, wh, source="exposed", at=AFTER)["split"].status == "ok"
    assert checks(y, wh, source="exposed", at=AFTER, planned=[(None, dict(control=.5, b=.5))])["split"].status == "fail"

def test_contrasts_between_arms_are_those_of_the_rows(wh):
    "Past, novelty and weekdays against the delta method done by hand on the rows"
    x, rng = exp("h_hand", w=(.3, .7), metrics=[dict(name="stars", kind="mean", value="rating", mde=.1)]), np.random.default_rng(8)
    rows = [r | dict(rating=None if rng.random() < .2 else float(rng.integers(1, 6))) for r in visits(x, users=300, days=12)]
    past = [r | dict(id=r["id"]+"-p", ts=r["ts"]-dt.timedelta(days=13), experiment="", arm="", rating=float(rng.integers(1, 6))) for r in rows]
    wh.insert("interactions", rows+past)
    c = checks(x, wh, at=AFTER+dt.timedelta(days=5), pre_days=5, early_days=2)
    first = {}
    for r in rows: first[r["user_id"]] = min(r["ts"], first.get(r["user_id"], r["ts"]))
    units, arm = sorted(first), {r["user_id"]: r["arm"] for r in rows}
    def sums(rs, keep):
        z = {u: [0., 0.] for u in units}
        for r in rs:
            if r["rating"] is not None and keep(r): z[r["user_id"]][0] += r["rating"]; z[r["user_id"]][1] += 1
        return np.array([z[u] for u in units])
    def wald(parts, C):
        d, V = np.zeros(len(parts)), np.zeros((len(parts),)*2)
        for a, sign in (("b", 1), ("control", -1)):
            on = np.array([arm[u] == a for u in units])
            lin = []
            for i, z in enumerate(parts):
                ratio = z[on, 0].sum()/z[on, 1].sum(); d[i] += sign*ratio
                lin.append((z[on, 0]-ratio*z[on, 1])/z[on, 1].mean())
            V += np.cov(np.array(lin)).reshape(len(parts), -1)/on.sum()
        v = C@d
        return float(chi2.sf(v@np.linalg.inv(C@V@C.T)@v, len(C)))
    days = lambda r, u: (r["ts"]-first[u]).total_seconds()/86400
    before = sums(past, lambda r: -5 <= days(r, r["user_id"]) < 0)
    early, late = sums(rows, lambda r: days(r, r["user_id"]) < 2), sums(rows, lambda r: days(r, r["user_id"]) >= 2)
    week = [sums(rows, lambda r: r["ts"].weekday() == d) for d in range(7)]
    assert c["pre-exposure"].value == pytest.approx(wald([before], np.eye(1)), rel=1e-6)
    assert c["novelty"].value == pytest.approx(wald([early, late], np.array([[1., -1.]])), rel=1e-6)
    assert c["day of week"].value == pytest.approx(wald(week, np.eye(7)[:-1]-np.eye(7)[1:]), rel=1e-6)

def test_watching_a_clean_split_raises_no_alarm_and_a_leak_does():
    from somaagent.abtest.health import _split
    rng, alarms = np.random.default_rng(0), 0
    def rows(p): return [dict(arm=a, revision=0, period=0, day=d, units=int(n), propensity=0., bandit=0) for d in range(8) for k in [rng.binomial(300, p)] for a, n in (("b", k), ("control", 300-k))]
    for _ in range(40): alarms += _split(exp(), rows(.5), None, True, .001, "").status == "fail"
    assert alarms <= 1 and _split(exp(), rows(.44), None, True, .001, "").status == "fail"

# ---- the A/A test ------------------------------------------------------------------------------------------------------------------
def test_the_moments_of_each_split_are_those_of_its_units(wh):
    x = exp("aa_sums", w=(.6, .4), rule=dict(kind="fixed"), horizon=dict(units=300))
    rows = visits(x, users=300)
    wh.insert("interactions", rows)
    m, looks = Metric("success"), 3
    for most in (10**9, 0):  # split by units, and by buckets
        q = Query(x, [Column("requests", "requests"), Column("ok", "ok")])
        q.events(["i.ts AS ab_t"])
        got = wh.query(_aa_sql(q, m, looks, 4, 9, dict(control=.6, b=.4), 50, most), q.params).to_dicts()
        edges = [int(wh.query("SELECT toUnixTimestamp64Milli(quantileExactLow({q:Float64})(ts)) AS e FROM interactions WHERE experiment = 'aa_sums'".replace("{q:Float64}", repr(j/looks)))["e"][0]) for j in (1, 2, 3)]
        for r in got:
            for k in range(looks):
                sums = {}
                for row in rows:
                    u = row["user_id"] if most else str(bucket_of(row["user_id"]) % 50)
                    h = bucket(u, f"aa-9/{r['r']}")
                    if (0 if h < bounds(dict(control=.6, b=.4))[0][1] else 1) != r["arm"] or round(row["ts"].timestamp()*1000) > edges[k]: continue
                    s = sums.setdefault(row["user_id"], [0, 0]); s[0] += row["status"] == "ok"; s[1] += 1
                z = np.array(list(sums.values()), float)
                mom = _moments(r, k, m, list(r["middle"].values())[:2])
                assert mom.n == len(z) and np.allclose(mom.mean, z.mean(0)) and np.allclose(mom.cov, np.cov(z.T))

def bucket_of(u):
    import xxhash
    return xxhash.xxh64_intdigest(u.encode())

def test_an_honest_rule_passes_and_refusals_are_plain(wh):
    x = exp("aa_ok", metrics=[dict(name="spend", kind="mean", value="cost_usd", relative_mde=.1)], rule=dict(kind="fixed"), horizon=dict(units=500))
    rng = np.random.default_rng(2)
    wh.insert("interactions", [r | dict(cost_usd=round(float(np.exp(rng.normal(0, .5))), 6)) for r in visits(x, users=900, per_user=2)])
    t = aa_test(x, wh, reps=60, seed=1)
    again = aa_test(x, wh, reps=60, seed=1)
    assert t.ok and t.rate == again.rate and t.looks == 1 and 0 <= t.interval[0] <= t.rate <= t.interval[1] and t.dict()["reps"] == 60 and (t.hits == again.hits).all()
    assert (aa_test(x, wh, reps=40, seed=2, most=0, buckets=400).hits > 0).mean() < .25
    many = x.model_copy(update=dict(arms=exp(w=(.6, .2, .2)).arms, rule=dict(kind="always"), metrics=[dict(name="success", mde=.1)]))
    three = aa_test(many, wh, reps=12, looks=3)
    assert three.looks == 3 and three.ok and len(three.path) == 3 and three.path["rule"].is_sorted()
    for kw, says in ((dict(reps=0), "number of splits"), (dict(rows="some"), "no such traffic"), (dict(metric=Metric("p95", "quantile", "latency_ms", q=.95)), "quantiles")):
        with pytest.raises(ExperimentError, match=says): aa_test(x, wh, **kw)
    with pytest.raises(ExperimentError, match="no traffic"): aa_test(exp("aa_none", population=dict(app="nobody at all")), wh, reps=5)
