"""Sufficient statistics from the warehouse, held against polars: broken values, duplicates, late events, other sources of arms, looks, quantiles, and the roll-up under kill -9."""
import datetime as dt, json, math, random, time

import numpy as np, polars as pl, pytest
from hypothesis import HealthCheck, Phase, given, settings as hyp, strategies as hs
from test_store import done, python  # noqa: F401

from somaagent.abtest.aggregate import aggregate, looks
from somaagent.abtest.assign import Assigner
from somaagent.abtest.lift import lift
from somaagent.abtest.moments import Moments
from somaagent.abtest.quantile import needed, quantile_lifts, quantiles
from somaagent.abtest.rollup import Rollup
from somaagent.abtest.spec import Metric
from somaagent.abtest.statement import MEASURES, Query, columns_of
from somaagent.core.errors import ExperimentError
from somaagent.core.records import Experiment, new_id
from somaagent.store.migrations import verify
from somaagent.store.warehouse import Warehouse

T0 = dt.datetime(2026, 10, 1, tzinfo=dt.timezone.utc)
KEYS = dict(user="user_id", session="session_id", request="id")
ALL = [Metric("success"), Metric("errors", value="error"), Metric("stars", "mean", "rating"), Metric("good", value="good"), Metric("passed", value="passed"), Metric("cost", "mean", "cost_usd"), Metric("latency", "mean", "latency_ms"),
       Metric("tokens", "mean", "tokens"), Metric("in", "mean", "prompt_tokens"), Metric("out", "mean", "completion_tokens"), Metric("turns", "mean", "meta.turns"), Metric("thumbs", "mean", "feedback.thumbs")]

@pytest.fixture(scope="module")
def wh(tmp_path_factory):
    with Warehouse(f"chdb://{tmp_path_factory.mktemp('ab')/'wh'}", mode="direct") as w: yield w

def exp(unit="user", arms=("a", "b"), **kw): return Experiment(**(dict(id=new_id("exp"), name="t", unit=unit, arms=[dict(name=n, weight=1/len(arms)) for n in arms]) | kw))
def req(i, user="u1", arm="a", minute=0, **kw): return dict(id=f"{i}", ts=T0+dt.timedelta(minutes=minute), user_id=user, session_id=f"{user}/{int(minute) % 3}", arm=arm, **kw)
def put(wh, x, rows): wh.insert("interactions", [r | dict(id=f"{x.id}/{r['id']}", experiment=x.id) for r in rows])

# ---- the same by hand ------------------------------------------------------------------------------------------------------
def num(t):
    if isinstance(t, bool) or t in ("true", "false"): return float(t in (True, "true"))
    try: return float(t)
    except (TypeError, ValueError): return math.nan
def values(r):
    "Measures of a row, and which values it lacks"
    rating, ms, passed, turns, thumbs = (num(v) for v in (r.get("rating"), r.get("latency_ms"), r.get("meta", {}).get("passed"), r.get("meta", {}).get("turns"), r.get("feedback", {}).get("thumbs")))
    has = dict(rating=math.isfinite(rating), latency_ms=math.isfinite(ms) and ms > 0, passed=math.isfinite(passed))
    return dict(requests=1, ok=r["status"] == "ok", error=r["status"] == "error", rated=has["rating"], rating=rating if has["rating"] else 0, good=has["rating"] and rating >= 4, passed=has["passed"] and passed >= .5, judged=has["passed"],
        cost_usd=float(r["cost_usd"]), latency_ms=ms if has["latency_ms"] else 0, timed=has["latency_ms"], tokens=r["prompt_tokens"]+r["completion_tokens"], prompt_tokens=r["prompt_tokens"], completion_tokens=r["completion_tokens"]) | {
        "meta.turns": turns if math.isfinite(turns) else 0, "feedback.thumbs": thumbs if math.isfinite(thumbs) else 0}
def by_hand(rows, unit="user", clean=lambda v: v):
    "arm -> Moments, from rows, by polars"
    df = pl.DataFrame([clean({k: float(v) for k, v in values(r).items()}) | dict(arm=r["arm"], unit=r[KEYS[unit]]) for r in rows], infer_schema_length=None)
    g = df.group_by("arm", "unit").agg(pl.exclude("arm", "unit").sum())
    return {a[0]: Moments.of({k: p[k].to_numpy() for k in p.columns if k not in ("arm", "unit")}) for a, p in g.group_by("arm")}
def same(a, b, rtol=1e-9):
    "Moments of aggregate and by hand"
    b = b.pick(a.names)
    assert a.n == b.n
    sd = np.sqrt(np.diag(b.cov)) + 1e-6*abs(b.mean)  # of a constant: what rounding leaves of its mean
    np.testing.assert_allclose(a.mean, b.mean, rtol=rtol, atol=1e-12)
    assert (abs(a.cov-b.cov) <= 1e-8*np.outer(sd, sd) + 1e-15).all(), (a.cov, b.cov)

odd = hs.sampled_from([None, 1., 2.5, 4., 5., math.nan, math.inf, -math.inf])
row = hs.fixed_dictionaries(dict(user=hs.integers(0, 5), arm=hs.integers(0, 1), minute=hs.integers(0, 500), status=hs.sampled_from(["ok", "error"]), rating=odd, latency_ms=hs.sampled_from([None, 0., 120.5, 3000., math.nan, math.inf]),
    cost=hs.integers(0, 10**6), prompt_tokens=hs.integers(0, 4000), completion_tokens=hs.integers(0, 4000), passed=hs.sampled_from(["", "1", "0", "true", "False", "yes", "0.5"]), turns=hs.sampled_from(["", "3", "2.5", "nan", "inf", "-1e3", "many"]),
    thumbs=hs.sampled_from([None, 1, -1, "2", True, "x"])))
def build(drawn): return [req(i, f"u{d['user']}", "ab"[d["arm"]], d["minute"], status=d["status"], rating=d["rating"], latency_ms=d["latency_ms"], cost_usd=d["cost"]/10**9, prompt_tokens=d["prompt_tokens"], completion_tokens=d["completion_tokens"],
    meta=dict(passed=d["passed"], turns=d["turns"]), feedback={} if d["thumbs"] is None else dict(thumbs=d["thumbs"]), category="xy"[d["minute"] % 2]) for i, d in enumerate(drawn)]

@hyp(max_examples=6, deadline=None, derandomize=True, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
@given(hs.lists(row, min_size=1, max_size=30), hs.sampled_from(list(KEYS)))
def test_any_rows(wh, drawn, unit):
    x, rows = exp(unit), build(drawn)
    for r in rows:
        if r["meta"]["passed"] == "False": r["meta"]["passed"] = "false"
    put(wh, x, rows)
    a, b = aggregate(x, wh, ALL), by_hand(rows, unit)
    for arm in "ab":
        assert a.rows[arm] == sum(r["arm"] == arm for r in rows)
        if arm in b: same(a.arms[arm], b[arm])
        else: assert a.arms[arm].n == 0
        mine = [r for r in rows if r["arm"] == arm]
        for key, name in (("rating", "rating"), ("latency_ms", "latency_ms")):
            bad = sum(r[key] is not None and not math.isfinite(r[key]) for r in mine)
            assert a.broken.get(arm, {}).get(name, 0) == bad
        if arm in b: assert a.missing[arm]["rating"] == len(mine) - b[arm].total("rated") and a.missing[arm]["latency_ms"] == len(mine) - b[arm].total("timed")
    path = looks(x, wh, ALL, 3)
    for arm in b: same(path[-1].arms[arm], b[arm])

# ---- values that are large, few or strange ------------------------------------------------------------------------------------
@pytest.mark.parametrize("unit", ["user", "request"])
def test_variance_is_stable_at_the_scale_of_time(wh, unit):
    x, rng = exp(unit), np.random.default_rng(0)
    v = 1.79e12+rng.integers(-4, 5, 600)
    put(wh, x, [req(i, f"u{i}", "ab"[i % 2], i, meta=dict(at=str(int(t)))) for i, t in enumerate(v)])
    m = Metric("at", "mean", "meta.at")
    for got in (aggregate(x, wh, [m]).arms, looks(x, wh, [m], 4)[-1].arms):
        for k, arm in enumerate("ab"): assert got[arm].pick(["meta.at"]).cov[0, 0] == pytest.approx((v[k::2]-1.79e12).var(ddof=1), rel=1e-4)
    if unit == "request": assert looks(x, wh, [m], 4)[1].arms["a"].pick(["meta.at"]).cov[0, 0] == pytest.approx((v[0:300:2]-1.79e12).var(ddof=1), rel=1e-4)

def test_nothing_and_nearly_nothing(wh):
    x = exp(arms=("a", "b", "c"))
    a = aggregate(x, wh, ALL)
    assert a.units == dict(a=0, b=0, c=0) and a.n == 0 and not a.missing and looks(x, wh, ALL, 5) == []
    assert "no exposure" in lift(a.arms["a"], a.arms["b"], ALL[0]).refused
    put(wh, x, [req(0, "u", "a", status="ok", rating=5.), req(1, "", "b", status="ok"), req(2, "v", "z", status="ok")])  # one unit; one without a name; one in an arm that nobody knows
    a = aggregate(x, wh, ALL, by="category")
    assert a.units == dict(a=1, b=0, c=0) and (a.arms["a"].cov == 0).all() and a.strangers == dict(z=1) and a.arms["a"].at("rating") == 5
    assert looks(x, wh, ALL, 2)[-1].arms["a"].n == 1
    put(wh, x, [req(10+i, f"w{i}", "bc"[i % 2], status="ok") for i in range(8)])  # zero variance
    a = aggregate(x, wh, ALL)
    assert np.abs(a.arms["b"].cov).max() == 0 and a.arms["b"].n == 4

def test_refusals(wh):
    x = exp()
    for kw, says in ((dict(source="guessed"), "no such source"), (dict(source="hashed"), "from which on"), (dict(by="answer"), "slice by"), (dict(by="meta."), "slice by"), (dict(duplicates="maybe"), "duplicates are"),
                     (dict(start="2026-10-02", end="2026-10-01"), "ends before")):
        with pytest.raises(ExperimentError, match=says): aggregate(x, wh, ALL, **kw)
    with pytest.raises(ExperimentError, match="no time before"): aggregate(exp("request"), wh, ALL, pre_days=7)
    with pytest.raises(ExperimentError, match="one after the other"): looks(x, wh, ALL, [T0, T0])

def test_words_of_users_are_no_sql(wh):
    x = exp(id="x'); DROP TABLE interactions --", population={"meta.a'] OR 1=1 --": "q' OR 1"})
    m = Metric("m", "mean", "meta.k'] OR sleep(3) --")
    assert aggregate(x, wh, [m], by="meta.b'] --").n == 0 and wh.query("SELECT count() AS n FROM interactions") is not None
    assert "DROP" not in Query(x, columns_of([m])).sql() and "sleep" not in Query(x, columns_of([m])).sql()

# ---- duplicates, bounds of time, population ------------------------------------------------------------------------------------
def test_duplicates_count_once_and_the_last_copy_counts(wh):
    for unit in KEYS:
        x, rng = exp(unit), random.Random(1)
        rows = [req(i, f"u{rng.randrange(9)}", "ab"[i % 2], i, status=rng.choice(["ok", "error"]), cost_usd=rng.randrange(10**6)/10**9, prompt_tokens=3, completion_tokens=i) for i in range(60)]
        put(wh, x, rows); put(wh, x, rows[10:30])
        later = [r | dict(status="error", ts=r["ts"]+dt.timedelta(minutes=.5)) for r in rows[40:44]]
        put(wh, x, later)
        final = rows[:40]+later+rows[44:]
        some = [ALL[0], ALL[5]]
        a, b, end = aggregate(x, wh, some), aggregate(x, wh, some, duplicates="drop"), looks(x, wh, some, 4)[-1]
        assert a.duplicates == 24 and sum(aggregate(x, wh, some, duplicates="keep").rows.values()) == 84
        for arm, m in by_hand(final, unit).items(): same(a.arms[arm], m); same(b.arms[arm], m); same(end.arms[arm], m)

def test_time_and_population(wh):
    x, rng = exp(population={"category": ["x", "y"], "meta.lang": "en"}), random.Random(2)
    rows = [req(i, f"u{rng.randrange(9)}", "ab"[i % 2], i, status=rng.choice(["ok", "error"]), cost_usd=0, prompt_tokens=0, completion_tokens=0, category=rng.choice("xyz"), meta=dict(lang=rng.choice(["en", "de"]))) for i in range(300)]
    put(wh, x, rows)
    mine = [r for r in rows if r["category"] in "xy" and r["meta"]["lang"] == "en"]
    at = lambda m: T0+dt.timedelta(minutes=m)
    a = aggregate(x, wh, ALL, start=at(50), end=at(250), until=at(200))
    for arm, m in by_hand([r for r in mine if at(50) <= r["ts"] < at(200)]).items(): same(a.arms[arm], m)
    for ts, arms in looks(x, wh, ALL[:6], [at(60), at(61), at(150), at(400)]):
        for arm, m in by_hand([r for r in mine if r["ts"] < ts]).items(): same(arms[arm], m)

def test_slices_and_caps(wh):
    for unit in KEYS:
        x, rng = exp(unit), np.random.default_rng(3)
        rows = [req(i, f"u{rng.integers(9)}", "ab"[i % 2], i, status="ok", cost_usd=round(float(rng.lognormal(-6, 1)), 9), prompt_tokens=0, completion_tokens=0, latency_ms=float(rng.lognormal(6, 1)), category="xy"[i % 3 == 0]) for i in range(200)]
        put(wh, x, rows)
        a = aggregate(x, wh, [ALL[5], ALL[6]], by="category")
        for s in "xy":
            for arm, m in by_hand([r for r in rows if r["category"] == s], unit).items(): same(a.slices[s][arm], m)
        for arm, m in by_hand(rows, unit).items(): same(a.arms[arm], m)
        capped, both = Metric("c", "mean", "latency_ms", cap=.9), Metric("d", "mean", "latency_ms")
        at = sorted(r["latency_ms"] for r in rows)[180]
        a = aggregate(x, wh, [capped, both, Metric("e", "mean", "latency_ms", cap=500.)])
        for m, top in ((capped, at), (both, math.inf), (Metric("e", "mean", "latency_ms", cap=500.), 500.)):
            got, want = a.of(m), by_hand(rows, unit, lambda v: v | dict(latency_ms=min(v["latency_ms"], top)))
            for arm in "ab": same(got[arm], want[arm])
        per = Metric("f", "mean", "cost_usd", "units", cap=.8)
        a = aggregate(x, wh, [per], by="category")
        sums = by_unit(rows, unit, "cost_usd")
        top = sorted(sums.values())[int(.8*len(sums))]
        for arm in "ab": assert a.arms[arm].at("cost_usd") == pytest.approx(np.mean([min(v, top) for (k, _), v in sums.items() if k == arm]))
        end = looks(x, wh, [capped, per], 3)[-1].arms
        for arm in "ab": assert end[arm].at("cost_usd") == pytest.approx(a.arms[arm].at("cost_usd"))
def by_unit(rows, unit, k):
    out = {}
    for r in rows: out[r["arm"], r[KEYS[unit]]] = out.get((r["arm"], r[KEYS[unit]]), 0)+r[k]
    return out

# ---- who is in which arm ------------------------------------------------------------------------------------------------------
def crowd(n=400, seed=4):
    rng = random.Random(seed)
    return [req(i, f"u{rng.randrange(40)}", "", i, status=rng.choice(["ok", "error"]), cost_usd=rng.randrange(10**6)/10**9, prompt_tokens=rng.randrange(9), completion_tokens=1, rating=rng.choice([None, 3., 5.])) for i in range(n)]

@pytest.mark.parametrize("unit", list(KEYS))
def test_hashed(wh, unit):
    x = exp(unit, population=dict(app=f"hashed {unit}"), excluded=["u3"] if unit == "user" else [])
    rows = [r | dict(id=f"{x.id}/{r['id']}", app=f"hashed {unit}") for r in crowd()]
    wh.insert("interactions", rows)
    who = Assigner(x, population=False)
    arms = {k: who.arm(k) for k in {r[KEYS[unit]] for r in rows}}
    placed = [r | dict(arm=arms[r[KEYS[unit]]]) for r in rows if arms[r[KEYS[unit]]]]
    for got in (aggregate(x, wh, ALL, start=T0, source="hashed").arms, looks(x, wh, ALL, 3, start=T0, source="hashed")[-1].arms):
        for arm, m in by_hand(placed, unit).items(): same(got[arm], m)

def test_exposed(wh):
    x = exp(population=dict(app="exposed"))
    rows = [r | dict(id=f"{x.id}/{r['id']}", app="exposed") for r in crowd()]
    wh.insert("interactions", rows)
    first = {f"u{i}": (T0+dt.timedelta(minutes=5*i), "ab"[i % 2]) for i in range(45)}  # u40 … u44 never came
    seen = [dict(ts=t, experiment=x.id, unit=u, arm=a) for u, (t, a) in first.items()]
    wh.insert("ab_exposures", seen + [s | dict(ts=s["ts"]+dt.timedelta(hours=1)) for s in seen] + [seen[7] | dict(arm="a", ts=T0+dt.timedelta(days=9))])  # logged again; crossed over later
    after = [r | dict(arm=first[r["user_id"]][1]) for r in rows if r["ts"] >= first[r["user_id"]][0]]
    there = {r["user_id"] for r in after}
    zero = dict(status="", cost_usd=0, prompt_tokens=0, completion_tokens=0, session_id="", id="")
    nobody = [zero | dict(user_id=u, arm=a, nothing=True) for u, (_, a) in first.items() if u not in there]
    assert len(nobody) >= 5
    want = by_hand_with(after, nobody)
    for got in (aggregate(x, wh, ALL, source="exposed").arms, looks(x, wh, ALL, 4, source="exposed")[-1].arms, aggregate(x, wh, ALL, source="exposed", by="category").arms):
        for arm, m in want.items(): same(got[arm], m)
def by_hand_with(rows, nobody):
    df = pl.DataFrame([{k: float(v)*(not r.get("nothing")) for k, v in values(r).items()} | dict(arm=r["arm"], unit=r["user_id"]) for r in rows+nobody], infer_schema_length=None)
    g = df.group_by("arm", "unit").agg(pl.exclude("arm", "unit").sum())
    return {a[0]: Moments.of({k: p[k].to_numpy() for k in p.columns if k not in ("arm", "unit")}) for a, p in g.group_by("arm")}

def test_the_time_before(wh):
    x, rng = exp(population=dict(app="before")), random.Random(5)
    old = [r | dict(id=f"{x.id}/o{r['id']}", app="before", experiment="", ts=r["ts"]-dt.timedelta(days=rng.choice([1, 3, 30]))) for r in crowd(seed=5)]
    new = [r | dict(id=f"{x.id}/{r['id']}", app="before", experiment=x.id, arm="ab"[int(r["user_id"][1:]) % 2]) for r in crowd(200, seed=6)]
    wh.insert("interactions", old+new)
    a = aggregate(x, wh, [Metric("success", cuped=True), Metric("cost", "mean", "cost_usd")], pre_days=7, start=T0)
    assert "pre_ok" in a.arms["a"].names and "pre_cost_usd" not in a.arms["a"].names
    past = {}
    for r in old:
        if r["ts"] >= T0-dt.timedelta(days=7): s = past.setdefault(r["user_id"], [0, 0]); s[0] += 1; s[1] += r["status"] == "ok"
    for arm in "ab":
        users = sorted({r["user_id"] for r in new if r["arm"] == arm})
        ok = [sum(r["status"] == "ok" for r in new if r["user_id"] == u) for u in users]
        want = Moments.of(dict(ok=ok, pre_requests=[past.get(u, (0, 0))[0] for u in users], pre_ok=[past.get(u, (0, 0))[1] for u in users]))
        same(a.arms[arm].pick(want.names), want)

# ---- quantiles ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("unit", ["user", "request"])
def test_quantiles_by_hand(wh, unit):
    from scipy.special import stdtrit
    x, rng = exp(unit), np.random.default_rng(7)
    rows = [req(i, f"u{u}", "ab"[u % 2], i, status="ok", latency_ms=float(v) if i % 11 else None) for i, u in enumerate(rng.integers(0, 80, 1500)) for v in [rng.lognormal(6+.3*(u % 5), .5)]]
    put(wh, x, rows)
    got, _ = quantiles(x, wh, levels=[.5, .9])
    for arm in "ab":
        mine = [r for r in rows if r["arm"] == arm and r["latency_ms"] is not None]
        v = np.array([r["latency_ms"] for r in mine])
        _, u = np.unique([r[KEYS[unit]] for r in mine], return_inverse=True)
        for k, p in zip(got[arm], (.5, .9)):
            q = np.quantile(v, p); b, n = np.bincount(u, v <= q), np.bincount(u); f = b.sum()/len(v)
            se = (b-f*n).std(ddof=1)/math.sqrt(len(n))/n.mean() if unit == "user" else math.sqrt(f*(1-f)/len(v))
            t = -stdtrit(len(n)-1, .025)
            assert (k.value, k.n, k.units) == (pytest.approx(q), len(v), len(n)) and (k.lo, k.hi) == (pytest.approx(np.quantile(v, p-t*se)), pytest.approx(np.quantile(v, p+t*se)))

def test_quantiles_refuse(wh):
    x, m = exp(), [Metric("p99", "quantile", "latency_ms", q=.99)]
    put(wh, x, [req(i, f"u{i}", "ab"[i % 2], status="ok", latency_ms=1.+i) for i in range(700)])
    l, = quantile_lifts(x, wh, m)
    assert "350 requests cannot bound it" in l.refused and str(needed(.99))[:2] == "38" and math.isnan(l.diff)
    assert "no request" in quantile_lifts(exp(), wh, m)[0].refused
    y = exp()
    put(wh, y, [req(i, "only one" if i % 2 else f"u{i}", "ab"[i % 2], status="ok", latency_ms=7.) for i in range(2000)])
    assert "1 unit" in quantile_lifts(y, wh, m)[0].refused
    z = exp()
    put(wh, z, [req(i, f"u{i}", "ab"[i % 2], status="ok", latency_ms=7.) for i in range(2000)])  # all the same
    assert quantile_lifts(z, wh, m)[0].diff == 0 and quantile_lifts(z, wh, m)[0].p == 1
    with pytest.raises(ExperimentError, match="between 0 and 1"): quantiles(z, wh, levels=[95])

# ---- the roll-up ---------------------------------------------------------------------------------------------------------------
ROLL = [Metric("success"), Metric("stars", "mean", "rating"), Metric("turns", "mean", "meta.turns"), Metric("cost", "mean", "cost_usd", "units", cap=.9)]
def check(roll, x, wh, **kw):
    a, b = roll.aggregate(**kw), aggregate(x, wh, roll.metrics)
    for arm in b.arms: same(a.arms[arm], b.arms[arm]); assert (a.rows[arm], a.missing[arm], a.broken) == (b.rows[arm], b.missing[arm], b.broken)
    assert a.caps == pytest.approx(b.caps) and a.duplicates == b.duplicates
    return roll.refreshed

def test_rollup_is_the_direct_statement(wh):
    x, rng, day = exp(), random.Random(8), 1440
    roll = Rollup(x, wh, ROLL, min_rows=20, keep=3)
    def some(n, lo, hi): return [req(f"{lo}-{rng.random()}", f"u{(u := rng.randrange(30))}", "ab"[u % 2], rng.uniform(lo, hi), status=rng.choice(["ok", "error"]), cost_usd=rng.randrange(10**6)/10**9, rating=rng.choice([None, 4., math.nan]), meta=dict(turns=rng.choice(["1", "x", ""]))) for _ in range(n)]
    kept = []
    for d in range(8):
        new = some(30, d*day, (d+1)*day); kept += new; put(wh, x, new)
        if d == 4: put(wh, x, some(7, 0, day))       # late
        if d == 5: put(wh, x, kept[30:50])           # again
        if d == 6: wh.command("DELETE FROM interactions WHERE experiment = {x:String} AND user_id = 'u3'", dict(x=x.id))
        r = check(roll, x, wh, now=T0+dt.timedelta(days=d+1, minutes=30))
        assert r.segments <= 3 and (r.stale > 0) == (d in (4, 5, 6)), (d, r)
    assert check(roll, x, wh, now=T0+dt.timedelta(days=8, hours=2)).written == 0
    early = T0+dt.timedelta(days=3)
    for arm, m in aggregate(x, wh, ROLL, until=early).arms.items(): same(roll.aggregate(until=early).arms[arm], m)
    assert verify(wh).ok

def test_rollup_fixes_quantiles_of_requests(wh):
    x, rng = exp(), np.random.default_rng(9)
    rows = [req(i, f"u{i % 20}", "ab"[i % 2], i, status="ok", latency_ms=float(rng.lognormal(6, 1))) for i in range(900)]
    m = Metric("latency", "mean", "latency_ms", cap=.8)
    roll = Rollup(x, wh, [m], min_rows=10)
    put(wh, x, rows[:300]); a = roll.aggregate(now=T0+dt.timedelta(hours=7))
    top = a.caps["latency_ms"]
    assert top == pytest.approx(sorted(r["latency_ms"] for r in rows[:300])[240])
    put(wh, x, rows[300:500]); b = roll.aggregate(now=T0+dt.timedelta(hours=9))
    assert b.caps["latency_ms"] == top
    for arm, w in aggregate(x, wh, [Metric("latency", "mean", "latency_ms", cap=top)]).arms.items(): same(b.arms[arm], w)
    put(wh, x, rows[500:]); assert roll.aggregate(now=T0+dt.timedelta(hours=17)).caps["latency_ms"] == pytest.approx(sorted(r["latency_ms"] for r in rows)[720])  # more than twice as many

WORKER = """
import sys, datetime as dt, random
from somaagent.abtest.aggregate import aggregate
from somaagent.abtest.rollup import Rollup
from somaagent.abtest.spec import Metric
from somaagent.core.records import Experiment
from somaagent.store.warehouse import Warehouse
url, x, task, rng, T0 = sys.argv[1], Experiment.model_validate_json(sys.argv[2]), sys.argv[3], random.Random(10), dt.datetime(2026, 10, 1, tzinfo=dt.timezone.utc)
wh, metrics = Warehouse(url, mode="direct"), [Metric("success"), Metric("cost", "mean", "cost_usd", "units", cap=.9)]
roll = lambda k: Rollup(x, wh, metrics, start=T0-dt.timedelta(days=k+1), min_rows=10, step_s=600)
if task == "work":
    wh.insert("interactions", [dict(id=f"i{i}", ts=T0+dt.timedelta(minutes=i/2), user_id=f"u{(u := rng.randrange(50))}", arm="ab"[u % 2], experiment=x.id, status="ok", cost_usd=rng.randrange(10**6)/10**9) for i in range(3000)])
    for k in range(1000):
        for h in range(2, 30): roll(k).refresh(T0+dt.timedelta(hours=h)); print(h, flush=True)
a, b = roll(0).aggregate(now=T0+dt.timedelta(hours=20)), aggregate(x, wh, metrics)
print(all(a.arms[k].n == m.n and a.rows[k] == b.rows[k] and abs(a.arms[k].cov-m.cov).max() <= 1e-9*abs(m.cov).max() for k, m in b.arms.items()))
wh.close()
"""
def test_rollup_survives_kill_9(tmp_path):
    args = WORKER, f"chdb://{tmp_path/'wh'}", exp().model_dump_json()
    p = python(*args, "work")
    for _ in range(6): assert p.stdout.readline(), p.stderr.read()
    time.sleep(.01)
    p.kill(); p.communicate()
    assert done(python(*args, "check")).split() == ["True"]

def test_every_measure_has_its_sql(wh):
    from somaagent.abtest.spec import MEASURES as words
    assert set(MEASURES) == set(words)
    x = exp()
    assert set(aggregate(x, wh, [Metric(k, "mean", k, "units") for k in words]).arms["a"].names) == set(words)
    assert json.dumps(aggregate(x, wh, ALL).params)

@pytest.mark.parametrize("source", ["stamped", "exposed", "hashed"])
def test_units_sent_by_hand_do_not_count(wh, source):
    "Whoever was put into an arm by an override was not randomised"
    x = exp(population=dict(app=f"hand-{source}"), overrides={"u0": "b", "u1": "b", "u2": "a"}, status="running", started_at=T0)
    to = Assigner(x)
    put(wh, x, [req(k, f"u{k % 50}", to.arm(f"u{k % 50}", dict(app=f"hand-{source}")), k+1, app=f"hand-{source}", prompt="p") for k in range(200)])
    wh.insert("ab_exposures", [dict(ts=T0, experiment=x.id, unit=f"u{k}", arm=to.arm(f"u{k}", dict(app=f"hand-{source}")), propensity=.5, reason="override" if f"u{k}" in x.overrides else "hash", revision=0) for k in range(50)])
    got = aggregate(x, wh, [Metric("success")], start=T0, source=source)
    want = [to.arm(f"u{k}", dict(app=f"hand-{source}")) for k in range(3, 50)]
    counts = {a: m.n for a, m in got.arms.items()}
    assert counts == {a: want.count(a) for a in ("a", "b")}
