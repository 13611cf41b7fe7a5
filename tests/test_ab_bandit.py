"""Bandits, off-policy estimates and rankings: against their formulas row by row, by enumeration, by simulation with a stated error, on real answers where they are at hand, and with what goes wrong."""
import itertools, json, math, os, sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings as hyp, strategies as st

from somaagent.abtest import bandit as B, offpolicy as O
from somaagent.abtest.bandit import Bandit, p_best, route, serve, top_two, trial
from somaagent.abtest.exposures import Exposures
from somaagent.abtest.moments import Moments
from somaagent.abtest.offpolicy import evaluate, learn, logged
from somaagent.abtest.spec import Metric
from somaagent.core.errors import EvalError, ExperimentError, MissingExtraError
from somaagent.core.records import Experiment, frozen_clock
from somaagent.data.interactions import log as log_interactions
from somaagent.evals import bradleyterry as R
from somaagent.evals.bradleyterry import bradley_terry, ppi_ranking

root = Path(__file__).resolve().parents[1]
shared = Path(os.environ.get("SOMA_SHARED_DATA") or root.parent/"shared"/"data")

# ---- chances to be best ----------------------------------------------------------------------------------------------
@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), min_size=2, max_size=5))
@hyp(max_examples=40, deadline=None)
def test_chances_sum_to_one_and_agree_with_draws(counts):
    b = Bandit([f"a{i}" for i in range(len(counts))])
    if not sum(x+y for x, y in counts): return
    b.update({f"a{i}": (x, x+y) for i, (x, y) in enumerate(counts)}, dict.fromkeys(b.arms, 1/len(counts)))
    s = b.shares()
    draws = np.random.default_rng(0).beta([[1+x for x, _ in counts]], [[1+y for _, y in counts]], (20_000, len(counts))).argmax(1)
    p = np.bincount(draws, minlength=len(counts))/20_000
    assert abs(sum(s.share.values())-1) < 1e-12 and min(s.share.values()) >= b.floor-1e-12
    assert np.abs(p-list(s.best.values())).max() < 4.5*.5/math.sqrt(20_000)+s.error

def test_an_arm_known_a_thousand_times_better_is_not_stepped_over():
    from scipy.stats import norm
    p, e = p_best([0., .5], [1., 1e-3])
    assert abs(p[1]-norm.cdf(.5/math.hypot(1, 1e-3))) < 1e-5 and e < 5e-3
    assert np.allclose(p_best([0.]*4, [1.]*4)[0], .25)
    assert np.allclose(top_two([1., 0., 0.]), [.5, .25, .25], atol=1e-4) and np.isfinite(top_two([1., 0.])).all()

# ---- inference -------------------------------------------------------------------------------------------------------
def by_rows(batches, one, two):
    "Hadad et al. 2021 row by row: scores of every unit, weights √e, variance of the difference"
    rows, sums = [], np.zeros((2, batches[0][0].shape[0]))
    for t, (e, arm, y) in enumerate(batches):
        seen = sums.copy()
        for a, v in zip(arm, y): sums[:, a] += (1, v)
        now = sums if t == 0 else seen
        m = np.where(now[0] > 0, now[1]/np.maximum(now[0], 1), seen[1].sum()/max(seen[0].sum(), 1))
        for a, v in zip(arm, y):
            g = m.copy(); g[a] += (v-m[a])/e[a]
            rows.append((np.sqrt(e), g))
    h, g = np.array([r[0] for r in rows]), np.array([r[1] for r in rows])
    Q = (h*g).sum(0)/h.sum(0)
    z = h*(g-Q)/h.sum(0)
    return Q, (z[:, one]-z[:, two])@(z[:, one]-z[:, two]), z[:, one]@z[:, one]

@pytest.mark.parametrize("kind", ["rate", "mean"])
def test_batched_formula_is_the_one_by_rows(kind):
    g, raw, b = np.random.default_rng(3), [], Bandit(["a", "b", "c"], kind=kind)
    for t in range(6):
        e = g.dirichlet([3, 3, 3])
        arm = g.choice(3, 40, p=e)
        y = (g.random(40) < .6).astype(float) if kind == "rate" else g.gamma(2, 3, 40)
        raw.append((e, arm, y))
        b.update({n: (float(y[arm == k].sum()), int((arm == k).sum())) if kind == "rate" else Moments.of(dict(x=y[arm == k])) for k, n in enumerate(b.arms)}, dict(zip(b.arms, e)))
    Q, v, v1 = by_rows(raw, 2, 0)
    e = b.contrast("c", "a")
    assert math.isclose(e.diff, Q[2]-Q[0], rel_tol=1e-10) and math.isclose((e.hi-e.lo)/2/1.959963984540054, math.sqrt(v), rel_tol=1e-9)
    value, lo, hi = b.estimate()["c"]
    assert math.isclose(value, Q[2], rel_tol=1e-10) and math.isclose((hi-lo)/2/1.959963984540054, math.sqrt(v1), rel_tol=1e-9)

def test_naive_test_fails_and_the_weighed_one_holds():
    "3,000 worlds without a difference: Monte-Carlo error .4 %"
    t = trial((.5, .5), units=1000, floor=.01, reps=3000, seed=11)
    assert t.naive > .075 and abs(t.reject-.05) < .012 and abs(t.cover-(1-t.reject)) < 1e-9
    even = trial((.5, .5), units=1000, floor=.5, reps=3000, seed=11)
    assert abs(even.naive-.05) < .015 and t.width > even.width

def test_statistics_that_are_none():
    b = Bandit(["a", "b"], kind="mean")
    for bad in ((10, math.nan, 1.), (10, 1., math.inf), (10, 1., -1.), (math.nan, 1., 1.)):
        with pytest.raises(ExperimentError, match="not numbers"): b.update(dict(a=bad))
    for bad, why in (({"x": (1, 2, 3)}, "does not have"), ({"a": 3.}, "object of type"), ({"a": (1, 2, 3, 4)}, "no statistics")):
        with pytest.raises((ExperimentError, TypeError), match=why): b.update(bad)
    for share in (dict(a=.5, b=.6), dict(a=1., b=0.), dict(a=1.), dict(a=math.nan, b=.5)):
        with pytest.raises(ExperimentError, match="sum to 1"): b.update(dict(a=(5, 1., 1.)), share)
    for kw in (dict(arms=["a"]), dict(arms=["a", "a"]), dict(kind="median"), dict(floor=.6), dict(beta=0), dict(discount=1.1), dict(prior=(0, 1))):
        with pytest.raises(ExperimentError): Bandit(**(dict(arms=["a", "b"]) | kw))
    with pytest.raises(ExperimentError, match="no batch"): b.contrast("a", "b")
    b.update(dict(a=(10, 1., 1.)))
    with pytest.raises(ExperimentError, match="no exposure in the b"): b.contrast("a", "b")
    assert b.shares().share == dict(a=.5, b=.5)

def test_all_successes_is_a_defined_answer():
    e = Bandit(["a", "b"]).update(dict(a=(50, 50), b=(50, 50))).contrast("b", "a")
    assert e.diff == 0 and e.p == 1 and math.isnan(e.lo) and "no variation" in e.method

# ---- serving, and the warehouse --------------------------------------------------------------------------------------
def experiment(id, **kw): return Experiment(id=id, name=id, arms=[dict(name="small", weight=.5), dict(name="large", weight=.5)], **kw)

class Notes(list):
    def log(self, *a): self.append(a)

def test_serving_keeps_who_was_seen_and_logs_the_rest_once():
    x, notes, seen = experiment("exp_serve", overrides={"boss": "large"}, excluded=["bot"]), Notes(), {"old": "small"}
    now = route(x, B.Shares(dict(small=.1, large=.9), {}, 0.))
    units = ["old", "boss", "bot", *(f"u{i}" for i in range(2000))]
    arms = serve(now, units, notes, seen)
    assert arms[:3] == ["small", "large", ""] and abs(arms.count("large")/2000-.9) < .03
    assert serve(now, units, notes, seen) == arms and len(notes) == 2001
    assert {(n[2], n[3], n[4]) for n in notes} == {("small", .1, "bandit"), ("large", .9, "bandit"), ("large", 1., "override")}
    with pytest.raises(ExperimentError, match="does not have"): route(x, B.Shares(dict(a=.5, b=.5), {}, 0.))

def test_a_halted_arm_gets_nothing_back():
    x = experiment("exp_halted").model_copy(update=dict(meta=dict(halted=dict(large={}))))
    with pytest.raises(ExperimentError, match="guardrail stopped"): route(x, B.Shares(dict(small=.5, large=.5), {}, 0.))
    x = Experiment(name="three", arms=[dict(name=a, weight=w) for a, w in (("a", .5), ("b", .5), ("c", 0.))], meta=dict(halted=dict(c={})))
    assert [a.weight for a in route(x, B.Shares(dict(a=.2, b=.8), {}, 0.)).arms] == [.2, .8, 0.]

def test_replay_and_log_from_the_warehouse(stores):
    wh, _ = stores
    x, metric = experiment("exp_replay"), Metric("success", "rate")
    with frozen_clock("2026-11-01", tick_ms=10), Exposures(wh) as ex:
        for i in range(40): ex.log(x, f"r{i}", "large" if i % 2 else "small", .5, "bandit")
        y = x.model_copy(update=dict(revision=1))
        for i in range(40, 60): ex.log(y, f"r{i}", "large", .9, "bandit")     # nobody met the small arm in this revision
        ex.log(y, "quiet", "large", .9, "bandit")                               # never came back
        ex.log(y, "tester", "small", 1., "override")                            # not randomised
    with frozen_clock("2026-10-01"): log_interactions([dict(user_id="r1", prompt="?", answer="!", status="error")], wh)  # before its exposure
    with frozen_clock("2026-11-02", tick_ms=10):
        rows = [dict(id=f"id{i}-{k}", user_id=f"r{i}", prompt="?", answer="!", category="long" if k else "short", status="ok" if (i+k) % 3 else "error") for i in range(60) for k in range(1+i % 2)]
        log_interactions(rows, wh); log_interactions(rows[:10], wh, token="again")  # the same events twice
    b = Bandit(["small", "large"], kind="mean").replay(x, wh, metric)
    by = {}
    for r in rows: by.setdefault(r["user_id"], []).append(r["status"] == "ok")
    large = [np.mean(by[f"r{i}"]) for i in range(1, 40, 2)]
    assert len(b.batches) == 2 and b.missing == 1
    assert np.allclose(b.batches[0][0], .5) and np.allclose(b.batches[1][0], [.1, .9]) and b.batches[1][1].tolist() == [0, 20]
    assert math.isclose(b.batches[0][2][1], np.mean(large)) and math.isclose(b.batches[0][3][1], np.var(large)*len(large))
    log = logged(x, wh, metric)
    assert log["n"].sum() == len(rows) and log["total"].sum() == sum(r["status"] == "ok" for r in rows) and set(log["context"]) == {"short", "long"}
    assert logged(x, wh, metric, context=("category", "meta.tier"))["context"].str.contains(" / ").all()
    with pytest.raises(ExperimentError, match="known before an arm answers"): logged(x, wh, metric, context="latency_ms")
    with pytest.raises(ExperimentError, match="per request"): logged(x, wh, Metric("cost", "mean", "cost_usd", "units"))
    with pytest.raises(ExperimentError, match="no exposure with an outcome"): logged(experiment("exp_nobody"), wh, metric)
    with Exposures(wh) as ex: ex.log(y, "wrong", "large", .7, "bandit")
    with frozen_clock("2027-01-01"): log_interactions([dict(user_id="wrong", prompt="?", answer="!")], wh)
    with pytest.raises(ExperimentError, match="two propensities"): Bandit(["small", "large"], kind="mean").replay(x, wh, metric)
    with pytest.raises(ExperimentError, match="no batch"): Bandit(["small", "large"]).replay(experiment("exp_nobody"), wh, metric).contrast("large", "small")

# ---- off-policy ------------------------------------------------------------------------------------------------------
def test_ips_and_dr_are_unbiased_over_every_assignment():
    "All 2⁸ ways to assign eight rows, weighed by their chance, average to the truth; with any model, as DR promises"
    y = np.array([[.2, .9], [.4, .1], [.7, .8], [.0, 1.], [.5, .6], [.3, .3], [.9, .2], [.1, .7]])
    x, e1, want = np.array([0, 0, 1, 1, 0, 1, 0, 1]), np.array([.3, .3, .7, .7, .3, .7, .3, .7]), np.array([1, 0])
    P, q = np.eye(2)[want], np.array([[[.5, .2], [.9, .1]]])
    truth, total = y[np.arange(8), want[x]].mean(), dict(ips=0., dr=0.)
    for arms in itertools.product((0, 1), repeat=8):
        a = np.array(arms); e = np.where(a, e1, 1-e1)
        L = O._Log(["a", "b"], ["s", "l"], x, a, e, np.ones(8), y[np.arange(8), a], np.arange(8))
        psi = O._parts(P, L, q, np.zeros(8, int), None, None)[2]
        for m in total: total[m] += e.prod()*psi[m].mean()
    assert all(math.isclose(v, truth, abs_tol=1e-12) for v in total.values())

def a_log(n=4000, seed=0, share=.3):
    g = np.random.default_rng(seed)
    x, a = g.random(n) < .5, g.random(n) < share
    p = np.select([~x & ~a, ~x & a, x & ~a], [.9, .8, .4], .7)
    return pl.DataFrame(dict(context=np.where(x, "hard", "easy"), arm=np.where(a, "large", "small"), propensity=np.where(a, share, 1-share), value=(g.random(n) < p).astype(float)))

best = dict(hard="large", easy="small")

def test_doubly_robust_survives_either_error():
    log, truth = a_log(40_000), .8
    blind = evaluate(log, best, ridge=1e12)                                       # a model that knows nothing
    wrong = evaluate(log.with_columns(propensity=pl.when(pl.col("arm") == "large").then(.15).otherwise(.85)), best, ridge=0, check=math.inf)  # propensities that are wrong
    assert abs(blind["dr"]["value"]-truth) < .02 and abs(wrong["dr"]["value"]-truth) < .02
    assert abs(blind["dm"]["value"]-truth) > .05 and abs(wrong["ips"]["value"]-truth) > .05
    assert evaluate(log, best)["dr"]["hi"]-evaluate(log, best)["dr"]["lo"] < evaluate(log, best)["ips"]["hi"]-evaluate(log, best)["ips"]["lo"]

def test_rows_and_sums_are_the_same_log():
    log = a_log().with_columns(unit=pl.int_range(pl.len()) // 4)
    sums = log.group_by("unit", "context", "arm", "propensity").agg(n=pl.len(), total=pl.col("value").sum())
    a, b = evaluate(log, best), evaluate(sums.sort("unit", "context", "arm"), best)
    assert np.allclose(a.table.drop("method").to_numpy(), b.table.drop("method").to_numpy(), equal_nan=True) and a.requests == b.requests and math.isclose(a.ess, b.ess)

def test_clip_and_switch_say_what_they_cut():
    log = a_log(share=.05)
    plain, clip, switch = evaluate(log, best), evaluate(log, best, clip=5), evaluate(log, best, switch=5)
    assert plain.cut == 0 and 0 < clip.cut < switch.cut < 1 and clip.heaviest == 5 and clip.ess > plain.ess
    assert switch["dr"]["hi"]-switch["dr"]["lo"] < plain["dr"]["hi"]-plain["dr"]["lo"]

@pytest.mark.parametrize("change, route_, why", [
    (dict(value=pl.lit(math.nan)), best, "not numbers"), (dict(value=pl.lit(None, pl.Float64)), best, "empty cells"), (dict(propensity=pl.lit(1.5)), best, "at most at 1"),
    ({}, dict(hard=dict(large=.5)), "sum to 1|does not say"), ({}, {"*": dict(large=.7, small=.7)}, "sum to 1"), ({}, {"*": "huge"}, "never tried"),
    (dict(unit=pl.lit(1)), best, "one unit"), (dict(arm=pl.when(pl.col("context") == "hard").then(pl.lit("small")).otherwise("arm")), best, "never tried")])
def test_logs_that_say_nothing(change, route_, why):
    with pytest.raises(ExperimentError, match=why): evaluate(a_log().with_columns(**change), route_)

def test_learning_needs_a_price_it_knows_and_arms_that_were_tried():
    log = a_log(6000)
    route_, worth = learn(log)
    assert route_ == best and worth["dr"]["diff_lo"] > 0
    route_, worth = learn(log, price=dict(large=.4), control="small")
    assert route_ == dict(easy="small", hard="small") and worth["dr"]["diff"] == 0
    rare = pl.concat([log, log.head(5).with_columns(context=pl.lit("rare"))])
    with pytest.raises(ExperimentError, match="no arm was tried often enough"): learn(rare)
    with pytest.raises(ExperimentError, match="price for an arm"): learn(log, price=dict(huge=1.))
    with pytest.raises(ExperimentError, match="too few units"): learn(log.head(5))

def test_empty_log_and_missing_columns():
    with pytest.raises(ExperimentError, match="empty"): evaluate(a_log().head(0), best)
    with pytest.raises(ExperimentError, match="lacks a column"): evaluate(a_log().drop("propensity"), best)
    with pytest.raises(ExperimentError, match="weight above 0"): evaluate(a_log(), best, clip=-1)

# ---- rankings --------------------------------------------------------------------------------------------------------
def games(n=600, seed=0, k=4, ties=.2, source=3):
    g = np.random.default_rng(seed)
    s = np.linspace(0, 1.5, k)
    a = g.integers(0, k, n); b = (a+g.integers(1, k, n)) % k
    y = np.where(g.random(n) < ties, .5, (g.random(n) < 1/(1+np.exp(s[a]-s[b]))).astype(float))
    return pl.DataFrame(dict(model_a=[f"m{i}" for i in a], model_b=[f"m{i}" for i in b], points=y, source=np.arange(n)//source, longer=g.normal(size=n)))

@pytest.mark.parametrize("ties", ["davidson", "half"])
def test_order_and_side_do_not_matter(ties):
    d = games()
    turned = d.sample(fraction=1, shuffle=True, seed=1).select(model_a="model_b", model_b="model_a", points=1-pl.col("points"), source="source")
    a, b = bradley_terry(d, ties), bradley_terry(turned, ties)
    assert np.allclose(a.strength, b.strength, atol=1e-9) and np.allclose(a.cov, b.cov, atol=1e-9) and math.isclose(a.ties, b.ties, abs_tol=1e-9)

@pytest.mark.parametrize("davidson", [True, False])
def test_score_is_the_gradient(davidson):
    g = R._games(games(60), ("longer",))
    def loglik(par):
        d = g.X@par[:g.X.shape[1]]
        if not davidson: return (g.y*d-np.logaddexp(0, d)).sum()
        return ((g.y-.5)*d+(g.y == .5)*par[-1]-np.log(np.exp(d/2)+np.exp(-d/2)+math.exp(par[-1]))).sum()
    par, eps = np.array([.3, -.2, .5, .1]+[-.4]*davidson), 1e-6
    _, grad, info = R._system(g, par, davidson, 0.)
    step = np.eye(len(par))*eps
    assert np.allclose(grad, [(loglik(par+s)-loglik(par-s))/(2*eps) for s in step], atol=1e-5)
    assert np.allclose(info, [-(R._system(g, par+s, davidson, 0.)[1]-R._system(g, par-s, davidson, 0.)[1])/(2*eps) for s in step], atol=1e-4) or davidson  # expected, not observed, information

def test_intervals_hold_when_sources_repeat():
    "120 worlds, 150 sources of four comparisons of the same pair that mostly agree: Monte-Carlo error 2 %"
    g, held, naive = np.random.default_rng(5), 0, 0
    for _ in range(120):
        a = g.integers(0, 3, 150); b = (a+g.integers(1, 3, 150)) % 3
        first = g.random(150) < 1/(1+np.exp(.6*(a-b)))
        y = np.where(g.random((4, 150)) < .7, first, g.random((4, 150)) < 1/(1+np.exp(.6*(a-b)))).astype(float).T.ravel()
        d = pl.DataFrame(dict(model_a=[f"m{i}" for i in np.repeat(a, 4)], model_b=[f"m{i}" for i in np.repeat(b, 4)], points=y, source=np.repeat(np.arange(150), 4)))
        for r, which in ((bradley_terry(d), 0), (bradley_terry(d.drop("source")), 1)):
            _, lo, hi, _ = r.contrast("m2", "m0")
            if which: naive += lo <= 1.2 <= hi
            else: held += lo <= 1.2 <= hi
    assert held/120 > .89 and naive/120 < held/120-.1

def test_no_ranks_from_nothing():
    d = games()
    with pytest.raises(EvalError, match="m9 never lost"): bradley_terry(pl.concat([d.drop("longer"), pl.DataFrame(dict(model_a="m9", model_b="m0", points=[0.], source=[999]))], how="vertical_relaxed"))
    with pytest.raises(EvalError, match="never met.*m0, m1|m0, m1.*never met|groups"): bradley_terry(pl.concat([d.drop("longer"), d.drop("longer").with_columns(pl.col("model_a", "model_b").str.replace("m", "x"))]))
    for change, why in ((dict(points=pl.lit(.7)), "1, 0.5 or 0"), (dict(model_b=pl.col("model_a")), "with itself"), (dict(longer=pl.lit(math.inf)), "not a number"), (dict(longer=pl.lit(0.)), "0 everywhere"), (dict(source=pl.lit(1)), "one source")):
        with pytest.raises(EvalError, match=why): bradley_terry(d.with_columns(**change), style=["longer"])
    for kw, why in ((dict(ties="drop"), "no such treatment"), (dict(style=["x"]), "lack a column")):
        with pytest.raises(EvalError, match=why): bradley_terry(d, **kw)
    with pytest.raises(EvalError, match="no comparisons"): bradley_terry(d.head(0))
    with pytest.raises(EvalError, match="needs ties and decisions"): bradley_terry(d.filter(pl.col("points") != .5), ties="davidson")
    with pytest.raises(EvalError, match="no such model"): bradley_terry(d).contrast("m0", "m7")

def test_without_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "evalica", None)
    with pytest.raises(MissingExtraError, match="ranks"): bradley_terry(games())

def test_ppi_with_nothing_of_the_judge_is_the_people():
    d = games(900).with_columns(judge="points")
    lab, rest = d.filter(pl.col("source") < 60), d.filter(pl.col("source") >= 60)
    a, b = ppi_ranking(lab, rest, lam=0.), bradley_terry(lab, ties="half")
    assert np.allclose(a.strength, b.strength, atol=1e-8) and np.allclose(a.cov, b.cov, rtol=.03)
    assert np.diag(ppi_ranking(lab, rest).cov).sum() < .5*np.diag(b.cov).sum()      # a perfect judge
    with pytest.raises(EvalError, match="on both sides"): ppi_ranking(lab, d)
    with pytest.raises(EvalError, match="no human verdict"): ppi_ranking(lab, rest.with_columns(model_a=pl.lit("new")))

def flat(x, at=""):
    "Leaves of nested dicts and lists, by path"
    if isinstance(x, (dict, list)): return {k: v for i, y in (x.items() if isinstance(x, dict) else enumerate(x)) for k, v in flat(y, f"{at}/{i}").items()}
    return {at: x}

# ---- real answers ----------------------------------------------------------------------------------------------------
@pytest.mark.skipif(not all((shared/p).exists() for p in ("routellm", "gsm8k", "pandalm")), reason="../shared/data is not here")
def test_the_saved_results_come_from_the_data(monkeypatch):
    "What does not depend on the number of orders is what was saved; the rest passes the notebook's own assertions"
    nb, ns = json.loads((root/"experiments/ab_models.ipynb").read_text(encoding="utf-8")), {}
    monkeypatch.chdir(root)
    for c in nb["cells"]:
        if c["cell_type"] != "code": continue
        exec(compile("".join(c["source"]), c["id"], "exec"), ns)
        if "parameters" in c["metadata"].get("tags", []): ns |= dict(data=str(shared), orderings=400, draws=60)
    saved = json.loads((root/"experiments/ab_models.json").read_text(encoding="utf-8"))
    for k in ("answers", "four_models", "bradley_terry", "one_order"): 
        now, was = flat(ns["results"][k]), flat(saved[k])
        assert now.keys() == was.keys() and all(v == pytest.approx(was[i], rel=1e-3, abs=1e-9) if isinstance(v, float) else v == was[i] for i, v in now.items() if i != "/say"), k
