"""The proof: golden values, coverage by simulation with its error stated, and edges."""
import json, math, os, subprocess, sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings as hyp, strategies as st
from scipy import stats

from somaagent.abtest.assign import assign, assign_sql, bounds
from somaagent.abtest.design import mde, mde_mean, plan, power, power_mean, sample_size, sample_size_mean
from somaagent.abtest.engine import run_experiment
from somaagent.abtest.estimate import rates, srm, two_proportions, welch
from somaagent.core.errors import EvalError, ExperimentError
from somaagent.core.records import Experiment
from somaagent.evals.compare import compare, holm, paired, tango
from somaagent.evals.judge import Rubric, agreement
from somaagent.evals.tasks import EvalResult, best_constant, exact_match, final_answer, interval, load_eval, mark

def exp(w=.5, salt="s", **kw): return Experiment(id="exp_t", name="t", salt=salt, arms=[dict(name="control", weight=1-w), dict(name="treatment", weight=w)], **kw)

# ---- design: golden values -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("p,q,pw,n", [(.8,.84,.8,1444), (.8,.84,.9,1933), (.6,.63,.8,4126), (.6,.63,.9,5523), (.5,.525,.8,6271), (.5,.525,.9,8395)])
def test_sample_sizes_of_the_tables(p, q, pw, n): assert sample_size(p, q, power=pw) == (n, n)

def test_design_against_statsmodels():
    sm = pytest.importorskip("statsmodels.stats.power")
    t = sm.TTestIndPower()
    for d, n, r in ((.5, 64, 1), (.2, 100, 2), (.05, 1000, 1)): assert power_mean(n, d, 1, ratio=r) == pytest.approx(t.power(d, n, .05, ratio=r), abs=1e-6)
    assert sample_size_mean(.5, 1) == (64, 64) and math.ceil(t.solve_power(.5, power=.8, alpha=.05)) == 64

@given(st.floats(.02, .98), st.floats(.5, .95), st.integers(50, 100_000), st.floats(.05, 1))
@hyp(max_examples=60, deadline=None)
def test_mde_is_the_inverse_of_power(base, pw, n, ratio):
    d = mde(n, base, power=pw, ratio=ratio)
    if not math.isnan(d): assert power(n, base, base+d, ratio=ratio) == pytest.approx(pw, abs=1e-4)
    else: assert power(n, base, 1., ratio=ratio) < pw

def test_design_refuses():
    for bad in (lambda: sample_size(.8, .8), lambda: sample_size(1.2, .8), lambda: sample_size(.8, .9, power=1.), lambda: plan((100, 0), .5, .6), lambda: sample_size_mean(0, 1), lambda: power_mean(10, 1, math.nan)):
        with pytest.raises(ExperimentError): bad()
    with pytest.raises(ExperimentError, match="cannot answer the question"): plan((500, 500), .8, .84).require()
    assert plan((1444, 1444), .8, .84).require().ok and mde_mean(10, 0) == 0

# ---- paired comparisons ----------------------------------------------------------------------------------------------
def brute_tango(won, lost, n, crit):
    "The same interval by maximising the likelihood numerically and walking a grid"
    from scipy.optimize import minimize_scalar
    def z(d):
        f = lambda q: -(won*np.log(q+d) + lost*np.log(q) + (n-won-lost)*np.log(1-2*q-d))
        lo, hi = max(0, -d)+1e-10, (1-d)/2-1e-10
        q = minimize_scalar(f, bounds=(lo, hi), method="bounded", options=dict(xatol=1e-12)).x
        return (won-lost-n*d)/math.sqrt(n*(2*q+d*(1-d)))
    ds = [d for d in np.linspace(-.999, .999, 1999) if abs(z(d)) < crit]
    return min(ds), max(ds)

@pytest.mark.parametrize("won,lost,n", [(9, 1, 60), (3, 7, 25), (20, 18, 200), (1, 1, 10)])
def test_tango_is_the_score_interval(won, lost, n):
    assert np.allclose(tango(won, lost, n, 1.959964), brute_tango(won, lost, n, 1.959964), atol=2e-3)

def test_mcnemar_exact():
    a, b = np.array([1]*2+[0]*9+[1]*30), np.array([0]*2+[1]*9+[1]*30)
    e = paired(a, b)
    assert e.p == pytest.approx(2*stats.binom.cdf(2, 11, .5)) and e.diff == pytest.approx(7/41)

def test_paired_t_and_clusters_of_one():
    rng = np.random.default_rng(0); x = rng.normal(size=30); y = x+rng.normal(.3, 1, 30)
    ref = stats.ttest_rel(y, x); e = paired(x, y); c = paired(x, y, [f"u{i}" for i in range(30)])
    assert (e.lo, e.p) == pytest.approx((ref.confidence_interval().low, ref.pvalue)) and (c.lo, c.hi, c.n_clusters) == pytest.approx((e.lo, e.hi, 30))

def test_clustered_se_against_statsmodels():
    sm = pytest.importorskip("statsmodels.api")
    rng = np.random.default_rng(1); g = np.repeat(np.arange(25), rng.integers(1, 6, 25)); d = rng.normal(size=25)[g]+rng.normal(.4, 1, len(g))
    fit = sm.OLS(d, np.ones(len(d))).fit(cov_type="cluster", cov_kwds=dict(groups=g, df_correction=False, use_correction=False))
    e, G, n = paired(np.zeros(len(d)), d, g), 25, len(d)
    assert (e.hi-e.lo)/2 == pytest.approx(fit.bse[0]*math.sqrt(G/(G-1))*stats.t.isf(.025, G-1), rel=1e-9)

@pytest.mark.parametrize("a,b", [([1]*20, [1]*20), ([0]*20, [0]*20), ([0]*20, [1]*20), ([1]*20, [0]*20), ([1], [0])])
def test_paired_at_the_extremes(a, b):
    e = paired(a, b)
    assert -1 <= e.lo <= e.diff <= e.hi <= 1 and e.hi > e.lo

def test_paired_edges():
    assert math.isnan(paired([3., 3., 3.], [4., 4., 4.]).lo) and paired([2.5, 3.], [2.5, 3.]).p == 1
    assert math.isnan(paired([1, 0, 1], [0, 1, 1], ["u"]*3).lo)
    for a, b in (([], []), ([1, 2], [1]), ([1., math.nan], [1., 2.]), ([1., math.inf], [1., 2.])):
        with pytest.raises(EvalError): paired(a, b)

@given(st.integers(0, 15), st.integers(0, 15), st.integers(0, 30))
@hyp(max_examples=80, deadline=None)
def test_paired_is_antisymmetric(won, lost, same):
    if won+lost+same == 0: return
    a, b = [0]*won+[1]*lost+[1]*same, [1]*won+[0]*lost+[1]*same
    e, f = paired(a, b), paired(b, a)
    assert (e.diff, e.lo, e.hi, e.p) == pytest.approx((-f.diff, -f.hi, -f.lo, f.p), abs=1e-7) and e.lo <= e.diff <= e.hi

def covers(make, truth, R, seed):
    rng = np.random.default_rng(seed)
    return np.mean([(e := make(rng)).lo <= truth <= e.hi for _ in range(R)])

# 600 replications: the standard error of a 95 % coverage is .9 points, so 92.5 % is 2.8 standard errors below: a right method fails one run in 400, and the seed is fixed.
def test_coverage_paired_clustered():
    def make(rng):
        m = 1+rng.poisson(3, 50); who = np.repeat(np.arange(50), m)
        fate = lambda k: rng.choice([1, -1, 0], k, p=[.2, .1, .7]); d = np.where(rng.random(len(who)) < .6, fate(50)[who], fate(len(who)))
        return paired((d < 0).astype(float), (d > 0).astype(float), who)
    assert covers(make, .1, 600, 1) >= .925

def test_coverage_two_arms_clustered_at_a_high_rate():
    def make(rng):
        def arm(p):
            m = 1+rng.poisson(4, 60); who = np.repeat(np.arange(60), m); u = rng.beta(p*4, (1-p)*4, 60)
            return (rng.random(len(who)) < u[who]).astype(float), who
        (x, u), (y, v) = arm(.9), arm(.95)
        return rates(x, y, u, v)
    assert covers(make, .05, 600, 2) >= .925

def test_coverage_wilson_and_canary():
    assert np.mean([(c := interval(np.r_[np.ones(k), np.zeros(30-k)]))["lo"] <= .95 <= c["hi"] for k in np.random.default_rng(3).binomial(30, .95, 400)]) >= .91
    rng = np.random.default_rng(4); a, b = rng.binomial(1900, .99, 2000), rng.binomial(100, .99, 2000)
    cache = {}
    alarms = np.mean([cache.setdefault((x, y), two_proportions(int(x), 1900, int(y), 100).significant) for x, y in zip(a, b)])
    assert alarms <= .065  # 5 % nominal, 2,000 replications: standard error .5 points

# ---- two arms ----------------------------------------------------------------------------------------------------------
def test_two_proportions_is_the_pooled_test():
    for x0, n0, x1, n1 in ((1155, 1444, 1213, 1444), (12, 40, 25, 45), (1, 100, 9, 90)):
        e = two_proportions(x0, n0, x1, n1)
        ref = stats.chi2_contingency([[x0, n0-x0], [x1, n1-x1]], correction=False).pvalue
        assert e.p == pytest.approx(ref, rel=1e-9) and e.significant == (ref < .05)
        f = two_proportions(x1, n1, x0, n0)
        assert (f.lo, f.hi) == pytest.approx((-e.hi, -e.lo), abs=1e-8)

def test_welch_golden():
    rng = np.random.default_rng(5); a, b = rng.normal(0, 3, 25), rng.normal(1, 1, 60)
    r, e = stats.ttest_ind(b, a, equal_var=False), welch(a, b)
    assert (e.lo, e.hi, e.p) == pytest.approx((*r.confidence_interval(), r.pvalue))

def test_arm_edges():
    e = two_proportions(10, 10, 10, 10); assert e.lo < 0 < e.hi and e.p == 1
    e = two_proportions(0, 10, 10, 10); assert e.hi == 1 and e.lo > .5 and e.p < 1e-4
    assert math.isnan(welch([1., 1.], [1., 1.]).lo) and welch([1., 1.], [1., 1.]).p == 1
    for bad in (lambda: two_proportions(0, 0, 1, 2), lambda: two_proportions(3, 2, 1, 2), lambda: rates([1, 0], []), lambda: rates([1, 0], [.5, 1]), lambda: welch([1., math.nan], [1., 2.]), lambda: welch([1., math.inf], [1., 2.])):
        with pytest.raises(ExperimentError): bad()

def test_srm():
    s = srm(dict(a=480, b=520), dict(a=.5, b=.5))
    assert (s.chi2, s.p) == pytest.approx(tuple(stats.chisquare([480, 520]))) and s.ok
    assert not srm(dict(a=950, b=20), dict(a=.95, b=.05)).ok and not srm(dict(a=10, b=5), dict(a=1., b=0.)).ok
    for bad in (lambda: srm(dict(a=0, b=0), dict(a=.5, b=.5)), lambda: srm(dict(a=1, c=1), dict(a=.5, b=.5))):
        with pytest.raises(ExperimentError): bad()

# ---- assignment ---------------------------------------------------------------------------------------------------------
def test_splits_must_sum_to_one():
    for bad in (dict(a=.5, b=.4), dict(a=.5, b=.6), dict(a=1.), dict(a=1.5, b=-.5), dict(a=math.nan, b=1.)):
        with pytest.raises(ExperimentError): bounds(bad)
    assert bounds(dict(a=.1, b=.2, c=.7))[-1] == ("c", 2**64)
    with pytest.raises(ExperimentError, match="without a name"): assign(["u", ""], exp())

def test_sql_and_python_agree(tmp_path):
    from somaagent.store.warehouse import warehouse
    users = [f"user-{i}" for i in range(5000)]+["Ünï", "漢字", "o'neil", "a:b", "🦊", "\\", " "]
    e = Experiment(id="exp_three", name="x", salt="ß-1", arms=[dict(name="a", weight=.05), dict(name="b", weight=.15), dict(name="c", weight=.8)])
    sql, params = assign_sql(e)
    with warehouse(f"chdb://{tmp_path}/wh", mode="direct") as wh: got = dict(wh.query(f"select user_id, {sql} as arm from (select arrayJoin({{u:Array(String)}}) as user_id)", dict(params, u=users)).iter_rows())
    assert got == dict(zip(users, assign(users, e))) and set(got.values()) == {"a", "b", "c"}

# ---- engine --------------------------------------------------------------------------------------------------------------
def small(n=120, users=30, p=(.5, .9), seed=0):
    r = np.random.default_rng(seed); who = r.integers(0, users, n)
    t = pl.DataFrame(dict(id=[f"q{i:04}" for i in range(n)], user_id=[f"u{w}" for w in who], prompt=["?"]*n))
    return t, {a: pl.DataFrame(dict(id=t["id"], answer="x", passed=(r.random(n) < q).astype(float))) for a, q in zip(("control", "treatment"), p)}

def test_engine_edges():
    t, o = small()
    assert run_experiment(exp(), t, o).verdict == "better" and run_experiment(exp(), *small(p=(.9, .3))).verdict == "worse"
    assert run_experiment(exp(), *small(p=(1., 1.))).verdict in ("not enough data", "no difference")
    for bad, what in ((lambda: run_experiment(exp(), t.head(0), o), "no traffic"), (lambda: run_experiment(exp(), t.with_columns(user_id=pl.lit("one")), o), "no exposure"),
                      (lambda: run_experiment(exp(), t, dict(o, treatment=o["treatment"].with_columns(passed=pl.lit(None, dtype=pl.Float64)))), "no outcome"),
                      (lambda: run_experiment(Experiment(id="e", name="e", arms=[dict(name="a", weight=.2), dict(name="b", weight=.3), dict(name="c", weight=.5)]), t, o), "two arms")):
        with pytest.raises(ExperimentError, match=what): bad()

def test_harm_is_a_lower_score_or_a_limit_passed():
    t, o = small(n=400, users=100)
    graded = lambda f, m, k: f.with_columns(rubric=pl.Series(np.random.default_rng(k).normal(m, 1, len(f))), completion_tokens=pl.Series(np.random.default_rng(k).normal(20*m, 1, len(f))))
    r = run_experiment(exp(), t, dict(control=graded(o["control"], 8, 1), treatment=graded(o["treatment"], 3, 2)))
    assert r.verdict == "better" and "mean score fell" in r.decision["harm"][0]
    o = dict(control=graded(o["control"], 3, 1), treatment=graded(o["treatment"], 8, 2))
    assert run_experiment(exp(), t, o).decision["harm"] == [] and "tokens" in run_experiment(exp(), t, o, token_limit=2.).decision["harm"][0]

def test_a_broken_split_gives_no_verdict(monkeypatch):
    import somaagent.abtest.engine as eng
    monkeypatch.setattr(eng, "assign", lambda ids, e: ["treatment" if hash_of(i) else "control" for i in ids])
    def hash_of(i): return int(i[1:]) % 10
    r = run_experiment(exp(), *small(n=3000, users=500))
    assert r.verdict == "not enough data" and not r.decision["valid"]

def test_duplicated_and_shuffled_traffic_changes_nothing():
    t, o = small()
    a, b = run_experiment(exp(), t, o), run_experiment(exp(), pl.concat([t, t]).sample(fraction=1, shuffle=True, seed=1), o)
    assert a.summary() == b.summary() and a.frame.equals(b.frame.select(a.frame.columns))

# ---- marking -------------------------------------------------------------------------------------------------------------
def test_exact_match_and_final_answers():
    assert exact_match("Card Arrival.", "card  arrival") and not exact_match("card_arrival", "card arrival")
    assert exact_match("so it is\n#### 1,234.50", "x #### 1234.5") and not exact_match("1234.5", "x #### 1234.5") and not exact_match("", "#### 0")
    assert final_answer("#### 007") == "7" and final_answer("#### -0.50") == "-0.5" and final_answer("no") is None and final_answer("#### 1/2") == "1/2"

def test_best_constant_finds_the_majority():
    rows = pl.DataFrame(dict(prompt=["q"]*10, reference=["#### 5"]*3+["#### 7"]*7))
    c = best_constant(["a #### 5", "b #### 5", "c #### 7"], rows)
    assert c.meta["answer"] == "#### 7" and c.frame["passed"].mean() == .7
    with pytest.raises(EvalError): best_constant(["", ""], rows)

def test_compare_refuses_unequal_questions(tmp_path):
    f = pl.DataFrame(dict(id=["1", "2"], user_id=["u", "v"], category=["a", "a"], passed=[1., 0.]))
    with pytest.raises(EvalError, match="not of the same"): compare(EvalResult(f), EvalResult(f.head(1)))
    with pytest.raises(EvalError, match="for one model only"): compare(EvalResult(f), EvalResult(f.with_columns(passed=pl.Series([1., None]))))
    with pytest.raises(EvalError, match="no such metric"): compare(EvalResult(f), EvalResult(f), "bleu")
    (tmp_path/"x.parquet").write_bytes(b"no")
    with pytest.raises(EvalError, match="not a saved"): load_eval(tmp_path/"x.parquet")

def test_holm_against_statsmodels():
    mt = pytest.importorskip("statsmodels.stats.multitest")
    p = list(np.random.default_rng(7).uniform(0, .1, 12))
    assert holm(p) == pytest.approx(list(mt.multipletests(p, method="holm")[1]))

# ---- rubric ----------------------------------------------------------------------------------------------------------------
RUBRIC = "name: r\npass: 5\nextract:\n  n: {pattern: '(\\d+)', as: number}\ncriteria:\n  - {name: c, points: 1, contains: '{n}'}\n"
@pytest.mark.parametrize("was,now,says", [("points: 1", "points: -1", "line 6, criteria[0].points"), ("points: 1", "points: many", "line 6, criteria[0].points"), ("contains: '{n}'", "contains: '{m}'", "there is no {m}"),
    ("contains: '{n}'", "words: {most: 3}", "only min and max"), ("contains: '{n}'", "required: true", "checks nothing"), ("pass: 5", "pass: 50", "line 2, pass"), ("name: r", "nmae: r", "line 1"), ("as: number", "as: eval", "line 4, extract.n.as"),
    ("(\\d+)", "(\\d+", "does not compile"), ("points: 1", "points: 0", "no points to win"), ("name: r", "name: [r", "not readable as YAML"), ("pass: 5", "when: {a: 1}", "no such key")])
def test_a_wrong_rubric_names_its_line(was, now, says):
    with pytest.raises(EvalError) as e: Rubric.loads(RUBRIC.replace(was, now, 1))
    assert says in str(e.value)

def test_rubric_refuses_aliases_and_runs_no_code():
    with pytest.raises(EvalError, match="aliases"): Rubric.loads("a: &x [1]\nb: *x\n")
    with pytest.raises(Exception): Rubric.loads("name: !!python/object/apply:os.system ['true']\ncriteria: []\n")
    with pytest.raises(EvalError): Rubric.loads("just text")

desk = Rubric.load(Path(__file__).parents[1]/"data"/"support_desk"/"rubric.yaml")

@given(st.text(max_size=300), st.text(max_size=300))
@hyp(max_examples=100, deadline=None)
def test_judging_any_text_is_total_and_deterministic(q, a):
    r = desk
    v = r.score(q, a)
    assert v == r.score(q, a) and 0 <= v.score <= 10 and (not v.passed or v.score >= r.spec.pass_)

def test_agreement_golden():
    s, t = [1, 2, 3, 4, 5, 6], [0, 0, 1, 0, 1, 1]
    a = agreement(s, [x > 3 for x in s], t)
    assert a.auc[0] == pytest.approx(stats.mannwhitneyu([3, 5, 6], [1, 2, 4]).statistic/9) and a.kappa[0] == pytest.approx((4/6-.5)/.5)
    with pytest.raises(EvalError): agreement([1, 2], [1, 1], [1, 1])

# ---- the command line --------------------------------------------------------------------------------------------------------
def test_cli_answers_in_json(tmp_path):
    env = {**os.environ, "SOMA_STORES_HOME": str(tmp_path/"h")}
    code = "from somaagent.cli.model import model; model()"
    run = lambda *a: subprocess.run([sys.executable, "-c", code, *a], capture_output=True, text=True, env=env, timeout=60)
    assert json.loads(run("list", "--json").stdout) == []
    r = run("show", "nobody"); assert r.returncode == 1 and "there is no such model" in r.stderr


def test_rows_without_a_category_are_not_a_category():
    from somaagent.evals.compare import compare
    from somaagent.evals.tasks import EvalResult
    f = lambda n: EvalResult(pl.DataFrame(dict(id=[f"q{i}" for i in range(40)], user_id=[f"u{i}" for i in range(40)], category=[""]*40, passed=[float(i < n) for i in range(40)])), str(n))
    assert compare(f(10), f(20), "passed").table()["category"].to_list() == [""]
