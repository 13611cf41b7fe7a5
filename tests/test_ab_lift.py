"""Moments, lifts, several comparisons, plans: golden values, properties, edges, and coverage by simulation."""
import datetime as dt, math

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy import stats

from somaagent.abtest.design import (plan_units, power, power_mean, power_quantile, quantile_sd, sample_size, sample_size_arms, sample_size_guard, sample_size_mean,
    sample_size_quantile, open_ended, spread, watched)
from somaagent.abtest.lift import Lift, guard, joint, lift, lifts, rate_ratio, relative_lift
from somaagent.abtest.moments import Moments, merge
from somaagent.abtest.several import adjust, against_control, bh, critical, holm, subgroups, within
from somaagent.abtest.spec import Metric
from somaagent.core.errors import ExperimentError

SUCCESS = dict(name="success", kind="rate", value="ok", over="requests")
RATIO = dict(name="success", kind="ratio", value="ok", over="requests")
COST = dict(name="cost", kind="mean", value="cost", over="units")

def within_mc(hits, R, p, sigmas=3.5): return abs(hits/R-p) <= sigmas*math.sqrt(p*(1-p)/R)

def users(rng, n, rate=.8, icc=.2, mean=6., each=None):
    m = np.full(n, each) if each else rng.geometric(1/mean, n)
    k = (1-icc)/icc
    taste = rng.beta(rate*k, (1-rate)*k, n)
    pm = rng.geometric(1/mean, n)
    return dict(requests=m, ok=rng.binomial(m, taste), cost=rng.lognormal(0, 1, n)*m, pre_requests=pm, pre_ok=rng.binomial(pm, taste), pre_cost=rng.lognormal(0, 1, n)*pm)

def counted(x, n): return Moments(("ok", "requests"), n, [x/n, 1.], np.diag([x/n*(1-x/n)*n/max(1, n-1), 0.]))

@pytest.fixture(scope="module")
def pair():
    rng = np.random.default_rng(11)
    a, b = users(rng, 180), users(rng, 90, .84)
    return a, b, Moments.of(a), Moments.of(b)

# --- moments

@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 60), st.integers(0, 60), st.floats(-1e9, 1e9), st.floats(1e-3, 1e6))
def test_merging_is_the_moments_of_the_whole(seed, n, cut, shift, scale):
    rng = np.random.default_rng(seed); cut = min(cut, n)
    y = dict(a=shift+scale*rng.normal(size=n), b=rng.poisson(3, n).astype(float), c=rng.lognormal(size=n))
    whole, part = Moments.of(y), Moments.of({k: v[:cut] for k, v in y.items()}) + Moments.of({k: v[cut:] for k, v in reversed(y.items())})
    part = part.pick(whole.names)
    assert part.n == n
    np.testing.assert_allclose(part.mean, whole.mean, rtol=1e-12, atol=1e-9*scale)
    s = np.sqrt(np.outer(np.diag(whole.cov), np.diag(whole.cov)))
    np.testing.assert_allclose(part.cov, whole.cov, rtol=1e-7, atol=float((1e-9*s).max()) + 1e-13*shift**2)

def test_moments_are_numpys(pair):
    a, _, m, _ = pair
    np.testing.assert_allclose(m.cov, np.cov(np.stack([np.asarray(a[k], float) for k in m.names])), rtol=1e-12)
    assert m.total("requests") == pytest.approx(a["requests"].sum()) and m.total() == 180 and m.at(None) == 1

@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_no_numbers_are_refused_by_name(bad):
    with pytest.raises(ExperimentError, match="rating has values"): Moments.of(dict(ok=[1., 1.], rating=[3., bad]))
    with pytest.raises(ExperimentError, match="cost has values"): Moments(("ok", "cost"), 5, [.5, bad], np.eye(2))
    with pytest.raises(ExperimentError, match="ok has values"): Moments(("ok", "cost"), 5, [.5, 1.], [[bad, 0], [0, 1]])

def test_moments_that_make_no_sense():
    for args, say in (((("a", "a"), 3, [0, 0], np.eye(2)), "named twice"), ((("a",), -1, [0], [[1]]), "number of units"), ((("a", "b"), 3, [0], np.eye(2)), "do not fit"), ((("a",), 9, [1.], [[-1.]]), "negative")):
        with pytest.raises(ExperimentError, match=say): Moments(*args)
    with pytest.raises(ExperimentError, match="do not add"): Moments.of(dict(a=[1., 2])) + Moments.of(dict(b=[1., 2]))
    with pytest.raises(ExperimentError, match="not measured"): Moments.of(dict(a=[1., 2])).pick(["b"])
    with pytest.raises(ExperimentError, match="different numbers"): Moments.of(dict(a=[1., 2], b=[1.]))
    with pytest.raises(ExperimentError): merge([])
    none = Moments.of(dict(a=[])); one = Moments.of(dict(a=[4.]))
    assert none.n == 0 and (none+one).mean[0] == 4 and one.cov[0, 0] == 0 and (one+none+one).n == 2

# --- lift: other people's numbers

def test_welch_is_scipys(pair):
    a, b, c, t = pair
    ref = stats.ttest_ind(b["cost"], a["cost"], equal_var=False)
    l = lift(c, t, COST)
    assert (l.p, l.lo, l.hi, l.df) == pytest.approx((ref.pvalue, *ref.confidence_interval(), ref.df), rel=1e-9)
    few = stats.ttest_ind([1., 5, 9], [2., 3.], equal_var=False)
    l = lift(Moments.of(dict(cost=[2., 3])), Moments.of(dict(cost=[1., 5, 9])), COST)
    assert (l.p, l.lo, l.hi) == pytest.approx((few.pvalue, *few.confidence_interval()), rel=1e-9)

@pytest.mark.parametrize("how", ["mean", "ratio", "mean_cuped", "ratio_cuped"])
def test_tea_tasting_agrees(pair, how):
    from tea_tasting.aggr import Aggregates
    from tea_tasting.metrics import Mean, RatioOfMeans
    _, _, c, t = pair
    k = c.names
    tea = lambda m: Aggregates(m.n, dict(zip(k, m.mean)), dict(zip(k, np.diag(m.cov))), {(x, y): m.cov[i, j] for i, x in enumerate(k) for j, y in enumerate(k) if i < j})
    theirs, metric, pre = dict(mean=(Mean("cost"), COST, False), ratio=(RatioOfMeans("ok", "requests"), RATIO, False), mean_cuped=(Mean("cost", "pre_cost"), COST, ("pre_cost", None)),
        ratio_cuped=(RatioOfMeans("ok", "requests", "pre_ok", "pre_requests"), RATIO, ("pre_ok", "pre_requests")))[how]
    r, l = theirs.analyze_aggregates(tea(c), tea(t)), lift(c, t, metric, adjust=pre, relative="log")
    assert (l.value_control, l.value_arm, l.diff, l.lo, l.hi, l.p, l.rel, l.rel_lo, l.rel_hi) == pytest.approx((r.control, r.treatment, r.effect_size, r.effect_size_ci_lower, r.effect_size_ci_upper, r.pvalue,
        r.rel_effect_size, r.rel_effect_size_ci_lower, r.rel_effect_size_ci_upper), rel=1e-9)

def test_cluster_robust_regression_agrees(pair):
    from statsmodels.regression.linear_model import OLS
    from statsmodels.tools import add_constant
    rng = np.random.default_rng(2); a, b = users(rng, 120), users(rng, 120)
    rows = [(i+120*g, g, o) for g, u in enumerate((a, b)) for i, (k, m) in enumerate(zip(u["ok"], u["requests"])) for o in [1.]*k+[0.]*(m-k)]
    who, side, hit = map(np.array, zip(*rows))
    fit = OLS(hit, add_constant(side)).fit(cov_type="cluster", cov_kwds=dict(groups=who, use_correction=False))
    l = lift(Moments.of(a), Moments.of(b), RATIO)
    assert (l.diff, l.se) == pytest.approx((fit.params[1], fit.bse[1]*math.sqrt(120/119)), rel=1e-9)

def test_several_covariates_are_least_squares():
    rng = np.random.default_rng(5); n = 4000
    x = rng.normal(size=(2, n, 2)); y = x@[.6, -.4] + rng.normal(size=(2, n))*.5
    arms = [Moments.of(dict(cost=y[i], pre_a=x[i, :, 0], pre_b=x[i, :, 1])) for i in (0, 1)]
    l, none = lift(*arms, COST, adjust=[("pre_a", None), ("pre_b", None)]), lift(*arms, COST)
    X, Y, D = x.reshape(-1, 2), y.reshape(-1), x[1].mean(0)-x[0].mean(0)
    theta = np.linalg.lstsq(X-X.mean(0), Y-Y.mean(), rcond=None)[0]
    assert l.diff == pytest.approx(none.diff-theta@D, rel=1e-9) and l.reduction == pytest.approx(.52/.77, abs=.02)
    twice = lift(*arms, COST, adjust=[("pre_a", None), ("pre_a", None), ("pre_b", None)])  # collinear covariates cost nothing
    assert twice.se == pytest.approx(l.se, rel=1e-6)

@pytest.mark.parametrize("x0,n0,x1,n1,lo,hi", [(48, 80, 56, 70, .0533, .3377), (3, 10, 9, 10, .1821, .8370), (2, 7, 6, 7, .0544, .8478)])
def test_score_interval_is_mees_as_newcombe_printed_it(x0, n0, x1, n1, lo, hi):
    l = lift(counted(x0, n0), counted(x1, n1), SUCCESS)
    assert (l.lo, l.hi) == pytest.approx((lo, hi), abs=6e-5)

@pytest.mark.parametrize("x0,n0,x1,n1", [(1155, 1444, 1213, 1444), (3788, 3800, 196, 200), (1, 34, 7, 34)])
def test_relative_score_interval_is_statsmodels(x0, n0, x1, n1):
    from statsmodels.stats.proportion import confint_proportions_2indep
    _, lo, hi = rate_ratio(x0, n0, x1, n1, stats.norm.isf(.025))
    assert (1+lo, 1+hi) == pytest.approx(confint_proportions_2indep(x1, n1, x0, n0, compare="ratio", method="score", correction=False), rel=1e-6)

def test_the_p_value_of_a_rate_is_the_pooled_chi_square():
    l = lift(counted(30, 200), counted(19, 61), SUCCESS)
    assert l.p == pytest.approx(stats.chi2_contingency([[30, 170], [19, 42]], correction=False).pvalue, rel=1e-9) and l.z**2 == pytest.approx(stats.chi2.isf(l.p, 1), rel=1e-6)

# --- lift: properties

@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["rate", "ratio", "mean", "cuped"]))
def test_swapping_the_arms_flips_the_sign(seed, kind):
    rng = np.random.default_rng(seed)
    c, t = Moments.of(users(rng, 30+seed % 50)), Moments.of(users(rng, 40, .7))
    metric, pre = dict(rate=(SUCCESS, False), ratio=(RATIO, False), mean=(COST, False), cuped=(RATIO, ("pre_ok", "pre_requests")))[kind]
    rel = "score" if kind == "rate" else "log"
    f, b = lift(c, t, metric, adjust=pre, relative=rel), lift(t, c, metric, adjust=pre, relative=rel)
    assert (f.diff, f.lo, f.hi, f.p, f.se) == pytest.approx((-b.diff, -b.hi, -b.lo, b.p, b.se), rel=1e-6, abs=1e-9)
    assert ((1+f.rel)*(1+b.rel), (1+f.rel_lo)*(1+b.rel_hi)) == pytest.approx((1, 1), rel=1e-6)
    if f.p not in (.05,): assert (f.lo > 0 or f.hi < 0) == (f.p < .05) or abs(f.p-.05) < 1e-6

@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.floats(1e-6, 1e6), st.sampled_from(["delta", "log", "fieller"]))
def test_the_unit_of_measurement_does_not_matter(seed, scale, rel):
    rng = np.random.default_rng(seed); a, b = users(rng, 30), users(rng, 50)
    f = lift(Moments.of(a), Moments.of(b), COST, relative=rel)
    g = lift(*(Moments.of(u | dict(cost=u["cost"]*scale)) for u in (a, b)), COST, relative=rel)
    assert (g.diff, g.lo, g.hi) == pytest.approx((f.diff*scale, f.lo*scale, f.hi*scale), rel=1e-8, abs=1e-12*scale)
    assert (g.p, g.rel, g.rel_lo, g.rel_hi) == pytest.approx((f.p, f.rel, f.rel_lo, f.rel_hi), rel=1e-7, abs=1e-9)

def test_fieller_inverts_its_test_and_knows_when_it_cannot():
    r, lo, hi = relative_lift(10, 1., 12, 2., 1.96, "fieller")
    for edge in (lo, hi): assert abs(12-(1+edge)*10)/math.sqrt(2+(1+edge)**2) == pytest.approx(1.96, rel=1e-9)
    assert relative_lift(1, 1., 2, 1., 1.96, "fieller")[1:] == (-math.inf, math.inf)
    tight = [relative_lift(10, 1e-6, 11, 1e-6, 1.96, k) for k in ("delta", "log", "fieller")]
    assert np.ptp([t[1] for t in tight]) < 1e-6 and np.ptp([t[2] for t in tight]) < 1e-6
    assert all(math.isnan(v) for v in relative_lift(-1, 1, 1, 1, 1.96)) and math.isnan(relative_lift(1, .1, -1, .1, 1.96, "log")[1])
    with pytest.raises(ExperimentError, match="relative interval"): relative_lift(1, 1, 1, 1, 1, "bayes")

@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([RATIO, COST]))
def test_fieller_never_contradicts_the_test(seed, metric):
    rng = np.random.default_rng(seed)
    l = lift(Moments.of(users(rng, 40)), Moments.of(users(rng, 15, .7)), metric, relative="fieller")
    assert (l.rel_lo > 0 or l.rel_hi < 0) == (l.p < .05) or abs(l.p-.05) < 1e-9

def test_a_shifted_covariate_changes_nothing_and_a_constant_one_removes_nothing(pair):
    a, b, c, t = pair
    plain, first = lift(c, t, COST), lift(c, t, COST, adjust=("pre_cost", None))
    moved = lift(*(Moments.of(u | dict(pre_cost=u["pre_cost"]+50)) for u in (a, b)), COST, adjust=("pre_cost", None))
    flat = lift(*(Moments.of(u | dict(pre_cost=np.full(len(u["ok"]), 3.))) for u in (a, b)), COST, adjust=("pre_cost", None))
    assert moved.diff == pytest.approx(first.diff) and flat.diff == plain.diff and flat.reduction == 0 and "CUPED" not in flat.method
    assert lift(c, t, dict(COST, cuped=True)).diff == pytest.approx(first.diff) and lift(c, t, dict(COST, cuped=True), adjust=False).diff == plain.diff
    with pytest.raises(ExperimentError, match="time before"): lift(c, t, COST, adjust=("pre_tokens", None))

def test_specs_metrics_and_joint(pair):
    _, _, c, t = pair
    l = lift(c, t, Metric("success"))
    assert l.p == lift(c, t, SUCCESS).p and l.n_control == c.total("requests") and l.units_arm == 90
    j = joint(c, t, RATIO, COST)
    assert np.sqrt(np.diag(j.cov)) == pytest.approx([lift(c, t, RATIO).se, lift(c, t, COST).se])
    e = j.ellipse() - j.diff
    assert np.einsum("ij,jk,ik->i", e, np.linalg.inv(j.cov), e) == pytest.approx(stats.chi2.isf(.05, 2))
    with pytest.raises(ExperimentError, match="no mean"): lift(c, t, Metric("p95", "quantile", "latency_ms", q=.95))
    assert [x.metric for x in lifts(dict(a=c, b=t), [Metric("success"), Metric("p95", "quantile", "latency_ms", q=.95)])] == ["success"]

# --- lift: the edges

@pytest.mark.parametrize("x0,n0,x1,n1", [(20, 20, 20, 20), (0, 20, 0, 20), (20, 20, 0, 20), (0, 20, 20, 20), (20, 20, 19, 20), (500, 500, 10, 10), (0, 5, 1, 5)])
def test_extreme_rates_have_intervals_with_a_width(x0, n0, x1, n1):
    l = lift(counted(x0, n0), counted(x1, n1), SUCCESS)
    assert not l.refused and l.lo < l.diff+1e-9 and l.diff-1e-9 < l.hi and l.hi-l.lo > .01 and -1 <= l.lo and l.hi <= 1 and 0 <= l.p <= 1
    assert l.rel_lo < l.rel_hi and (l.rel_lo > 0 or l.rel_hi < 0) == (l.lo > 0 or l.hi < 0) == (l.p < .05)

def test_flawless_users_count_once_whatever_they_sent():
    flawless = lambda n, m: Moments.of(dict(ok=np.full(n, m), requests=np.full(n, m)))
    by_user, single = lift(flawless(20, 50), flawless(20, 50), SUCCESS), lift(counted(20, 20), counted(20, 20), SUCCESS)
    assert by_user.hi == pytest.approx(single.hi, abs=.02) and by_user.p == 1

def test_what_cannot_be_answered_is_refused_in_words(pair):
    _, _, c, t = pair
    empty, one = Moments.of({k: [] for k in c.names}), Moments.of({k: [1.] for k in c.names})
    assert lift(c, empty, SUCCESS, arm="b").refused == "no exposure in b" and lift(one, t, COST).refused == "only one unit in control"
    flat = lambda v: Moments.of(dict(cost=np.full(5, v)))
    same, other = lift(flat(2.), flat(2.), COST), lift(flat(2.), flat(3.), COST)
    assert same.p == 1 and same.diff == 0 and not same.refused and math.isnan(same.lo) and other.refused.startswith("no variation") and math.isnan(other.p)
    half = lift(flat(2.), Moments.of(dict(cost=[1., 2, 4, 3, 2])), COST)
    assert not half.refused and half.df == pytest.approx(4)
    assert not other.significant and "no answer" in repr(other)
    with pytest.raises(ExperimentError, match="not a rate"): lift(Moments.of(dict(ok=[3., 4], requests=[1., 1])), Moments.of(dict(ok=[3., 4], requests=[1., 1])), SUCCESS)
    for alpha in (0, 1, -.1):
        with pytest.raises(ExperimentError, match="alpha"): lift(c, t, SUCCESS, alpha)
    with pytest.raises(ExperimentError, match="control and an arm"): lifts(dict(a=c), [SUCCESS])

def test_guardrails():
    rng = np.random.default_rng(1); big = [Moments.of(users(rng, 4000, each=5) | dict(cost=rng.lognormal(g, .5, 4000))) for g in (0., math.log(1.3), 0.)]
    down = dict(COST, direction="down", tolerance=.1)
    assert [guard(big[0], b, down).verdict for b in big[1:]] == ["harm", "ok"] and guard(big[0], big[2], down, tolerance=0.).verdict == "unclear"
    assert guard(big[0], big[1], down, direction="up").verdict == "ok"
    assert guard(big[0], Moments.of({k: [] for k in big[0].names}), down).verdict == "unclear"
    errors = dict(name="errors", kind="rate", value="ok", over="requests", direction="down", tolerance=.5)
    assert guard(counted(0, 4000), counted(40, 4000), errors).verdict == "harm"

# --- coverage

R = 800
def rejections(make, metric, R=R, **kw):
    return sum(lift(*make(), metric, **kw).p < .05 for _ in range(R))

def test_users_who_come_back():
    "20 requests per user on average, intra-class correlation .2, no difference: per request half of all tests fire, by user 5 %"
    rng = np.random.default_rng(4); made = []
    def make():
        c, t = (Moments.of({k: v for k, v in users(rng, 100, mean=20).items() if k in ("ok", "requests")}) for _ in range(2)); made.append((c, t)); return c, t
    ours = rejections(make, RATIO)
    p, N = np.array([[m.at("ok")/m.at("requests") for m in x] for x in made]), np.array([[m.total("requests") for m in x] for x in made])
    naive = np.mean(abs(np.diff(p)[:, 0])/np.sqrt((p*(1-p)/N).sum(1)) > 1.96)
    assert within_mc(ours, R, .05) and naive > .45

@pytest.mark.parametrize("rate,n0,n1", [(.8, 950, 50), (.99, 950, 50), (.995, 400, 400)])
def test_small_arms_and_high_rates_by_user(rate, n0, n1):
    rng, R = np.random.default_rng(7), 300
    hits = rejections(lambda: [Moments.of(dict(requests=m, ok=rng.binomial(m, rng.beta(rate*4, (1-rate)*4, len(m))))) for m in (rng.geometric(.25, n0), rng.geometric(.25, n1))], SUCCESS, R, relative="delta")
    assert hits/R < .05+3.5*math.sqrt(.05*.95/R)

def test_log_normal_costs_and_cuped_keep_five_percent():
    rng = np.random.default_rng(8)
    def make(n0=760, n1=400):
        out = []
        for n in (n0, n1): s = rng.lognormal(0, .8, n); out.append(Moments.of(dict(cost=s*rng.lognormal(0, .4, n), pre_cost=s*rng.lognormal(0, .4, n))))
        return out
    assert within_mc(rejections(make, COST), R, .05) and within_mc(rejections(make, COST, adjust=("pre_cost", None)), R, .05)
    l = lift(*make(20_000, 20_000), COST, adjust=("pre_cost", None))
    assert .4 < l.reduction < .75

@pytest.mark.parametrize("how", ["delta", "fieller", "log"])
def test_relative_intervals_cover_the_truth(how):
    rng, R = np.random.default_rng(9), 1000
    def covers():
        l = lift(*(Moments.of(dict(cost=rng.gamma(2, s, 150))) for s in (1., 1.2)), COST, relative=how)
        return l.rel_lo <= .2 <= l.rel_hi
    assert within_mc(sum(covers() for _ in range(R)), R, .95)

# --- several

def test_dunnett_is_scipys_and_the_simulations():
    rng = np.random.default_rng(3)
    control, *arms = [rng.normal(m, 1, n) for m, n in ((0, 50), (.3, 20), (.5, 35), (0, 15))]
    ref = stats.dunnett(*arms, control=control, random_state=1)
    lam = [math.sqrt(len(x)/(len(x)+50)) for x in arms]
    assert [1-within(abs(t), lam, 50+20+35+15-4) for t in ref.statistic] == pytest.approx(ref.pvalue, abs=2e-3)
    u, z = rng.standard_normal((400_000, 1)), rng.standard_normal((400_000, 3)); lam = np.array([.3, .7, .95])
    assert within(2.2, lam) == pytest.approx(np.mean((abs(lam*u+np.sqrt(1-lam**2)*z) < 2.2).all(1)), abs=1.5e-3)
    assert critical([.5]) == pytest.approx(1.959964, abs=1e-5) and critical([.7], 8) == pytest.approx(stats.t.isf(.025, 8), rel=1e-6)

def test_corrections_are_statsmodels():
    from statsmodels.stats.multitest import multipletests
    for seed in range(20):
        p = np.random.default_rng(seed).beta(.4, 2, 1+seed)
        np.testing.assert_allclose(holm(p), multipletests(p, method="holm")[1]); np.testing.assert_allclose(bh(p), multipletests(p, method="fdr_bh")[1])

def test_adjusting_a_report():
    rng = np.random.default_rng(6)
    arms = {k: Moments.of(users(rng, n, r)) for k, n, r in (("control", 400, .8), ("a", 200, .84), ("b", 100, .8), ("c", 200, .86))} | {"late": Moments.of({k: [] for k in users(rng, 2)})}
    raw = lifts(arms, [SUCCESS, COST])
    for how in ("dunnett", "stepdown", "holm", "bh"):
        out = adjust(raw, how)
        assert [o.refused for o in out] == [r.refused for r in raw] and math.isnan(out[3].p_adjusted)
        assert all(o.p_adjusted >= r.p-1e-12 for o, r in zip(out, raw) if not r.refused)
        back = adjust(raw[::-1], how)[::-1]
        assert [o.p_adjusted for o in out if o.adjusted] == pytest.approx([o.p_adjusted for o in back if o.adjusted])
    single, step, each = (adjust([r for r in raw if r.metric == "success"], k) for k in ("dunnett", "stepdown", "holm"))
    assert all(s.p_adjusted <= min(d.p_adjusted, h.p_adjusted)+1e-9 for s, d, h in zip(step, single, each) if s.adjusted)
    cost = adjust([r for r in raw if r.metric == "cost"])
    assert all((o.lo > 0 or o.hi < 0) == (o.p_adjusted < .05) for o in cost if o.adjusted)
    exact = against_control(arms, SUCCESS)
    assert all((o.lo > 0 or o.hi < 0) == o.significant for o in exact if not o.refused) and exact[3].refused == "no exposure in late"
    with pytest.raises(ExperimentError, match="no such correction"): adjust(raw, "sidak")

def test_slices_without_difference_differ_in_five_percent():
    rng, R = np.random.default_rng(10), 1500
    se = rng.uniform(.5, 2, (R, 8)); d = rng.normal(1, se)
    def q(d, se): return subgroups({i: dict(c=Moments(("cost",), 10**9, [10.], [[s*s*5e8]]), t=Moments(("cost",), 10**9, [10.+x], [[s*s*5e8]])) for i, (x, s) in enumerate(zip(d, se))}, COST)
    looked = [q(*x) for x in zip(d[:400], se[:400])]
    assert within_mc(sum(s.heterogeneous for s in looked), 400, .05)
    cover = np.mean([[lo <= 1 <= hi for _, lo, hi in s.shrunk.values()] for s in looked])
    assert cover > .93
    with pytest.raises(ExperimentError, match="no slices"): subgroups({}, COST)
    assert subgroups({"a": dict(c=Moments.of(dict(cost=[])), t=Moments.of(dict(cost=[])))}, COST).shrunk == {}

# --- design

def test_the_table_of_what_a_thousand_requests_find():
    p95 = quantile_sd(.95, sigma=.8)
    found = [power(1000, .9, .945), power(1000, .8, .84), power(1000, .6, .63), power_mean(1000, .05, 1), power_quantile(1000, .05, p95)]
    assert [round(100*f, 1) for f in found] == [96.5, 64.5, 28.1, 20.1, 9.9]
    need = [sample_size(b, t, power=p)[0] for b, t in ((.8, .84), (.6, .63), (.5, .525)) for p in (.8, .9)]
    assert need == [1444, 1933, 4126, 5523, 6271, 8395] and sample_size_quantile(.05, p95) == (18_846, 18_846)

def test_power_is_statsmodels():
    from statsmodels.stats.power import TTestIndPower
    for n, d, r in ((10, .8, 1), (200, .2, .5), (190, .5, 1/19)): assert power_mean(n, d, 1, ratio=r) == pytest.approx(TTestIndPower().power(d, n, .05, r), rel=1e-9)

def test_plans_keep_their_promise_in_simulation():
    rng, R = np.random.default_rng(12), 700
    past = Moments.of({k: v for k, v in users(rng, 20_000, mean=5).items() if k in ("ok", "requests")})
    value, sd = spread(past, "ok", "requests")
    n = sample_size_mean(.05, sd)[0]
    def one():
        c = Moments.of({k: v for k, v in users(rng, n, mean=5).items() if k in ("ok", "requests")})
        return c, Moments(c.names, *(lambda m: (m.n, m.mean+np.array([m.at("requests")*.05, 0.]) if m.names[0] == "ok" else m.mean+np.array([0., m.at("requests")*.05]), m.cov))(Moments.of({k: v for k, v in users(rng, n, mean=5).items() if k in ("ok", "requests")})))
    assert abs(rejections(one, RATIO, R)/R-.8) < .055

def test_several_arms_have_the_power_that_was_planned():
    rng, R, k = np.random.default_rng(13), 40_000, 3
    a, b = sample_size_arms(.3, 1., k)
    means = rng.normal(0, 1, (R, k+1))/np.sqrt([a]+[b]*k); means[:, 1] += .3
    z = (means[:, 1:]-means[:, :1])/math.sqrt(1/a+1/b); c = critical([math.sqrt(b/(a+b))]*k)
    assert np.mean(abs(z[:, 0]) > c) == pytest.approx(.8, abs=.012) and np.mean((abs(z[:, 1:]) > c).any(1)) < .05
    assert a+k*b < (k+1)*sample_size_arms(.3, 1., k, ratio=1.)[0]

def test_a_guardrail_is_passed_as_often_as_planned():
    rng, R = np.random.default_rng(14), 1500
    n = sample_size_guard(1., .8, .1, "down")[0]
    metric = dict(COST, direction="down", tolerance=.1)
    draw = lambda: Moments(("cost",), n, [rng.normal(1, .8/math.sqrt(n))], [[.64*rng.chisquare(n-1)/(n-1)]])
    assert abs(sum(guard(draw(), draw(), metric).verdict == "ok" for _ in range(R))/R-.8) < .04

def test_plans_that_refuse():
    for n, ok in ((300, False), (20_000, True)):
        p = plan_units((n, n), .8, .5, .02)
        assert p.ok == ok and (f"{p.needed[0]:,}" in p.sentence)
    with pytest.raises(ExperimentError, match="cannot answer"): plan_units((300, 300), .8, .5, .02).require()
    for bad in (dict(n=(0, 10)), dict(sd=0.), dict(delta=0.)):
        with pytest.raises(ExperimentError): plan_units(**(dict(n=(10, 10), value=1., sd=1., delta=.1) | bad))
    assert watched(1000, dict(kind="fixed"))["largest"] == 1000 and watched((1000, 500), dict(kind="group", spending="obf", looks=5))["largest"][0] > 1000
    assert 1.7 < open_ended(.05, .9) < open_ended(.05, .8) < 2
    with pytest.raises(ExperimentError, match="open-ended"): watched(1000, dict(kind="always"))
    with pytest.raises(ExperimentError, match="loss of zero"): sample_size_guard(1, 1, 0.)
    with pytest.raises(ExperimentError, match="positive number"): quantile_sd(.95, sample=[1., -1.])
    with pytest.raises(ExperimentError, match="too few"): quantile_sd(.99, sample=np.ones(20))

# --- traffic

def test_traffic(stores):
    from somaagent.abtest.traffic import mde_by_week
    wh, _ = stores
    rng, t0 = np.random.default_rng(0), dt.datetime(2026, 8, 3, tzinfo=dt.timezone.utc)
    rows = [dict(id=f"t{i}", ts=t0+dt.timedelta(seconds=int(s)), app="desk", user_id=f"u{u}", session_id=f"s{i//2}", status="ok" if o < .8 else "error", latency_ms=float(l), rating=float(g) if o > .5 else None)
        for i, (s, u, o, l, g) in enumerate(zip(np.sort(rng.integers(0, 28*86400, 3000)), rng.integers(0, 400, 3000), rng.random(3000), rng.lognormal(6, .5, 3000), rng.integers(1, 6, 3000)))]
    rows[0]["ts"], rows[-1]["ts"] = t0, t0+dt.timedelta(days=28, milliseconds=-1)
    rows[5]["latency_ms"] = math.nan; rows[7]["rating"] = math.inf
    wh.insert("interactions", rows); wh.insert("interactions", rows[:50])  # the last batch was sent twice
    t = mde_by_week(wh, Metric("success"), population=dict(app="desk"))
    assert len(t.frame) == 4 and t.frame["requests"][-1] == 3000 and t.start == t0
    for w in (1, 4):
        per = {}
        for r in rows:
            if r["ts"] < t0+dt.timedelta(days=7*w): per.setdefault(r["user_id"], []).append(r["status"] == "ok")
        m = Moments.of(dict(ok=[sum(v) for v in per.values()], requests=[len(v) for v in per.values()]))
        f = t.frame.row(w-1, named=True); value, sd = spread(m, "ok", "requests")
        assert (f["units"], f["value"], f["sd"]) == pytest.approx((m.n, value, sd), rel=1e-9)
    stars = mde_by_week(wh, Metric("stars", "mean", "rating"), population=dict(app="desk")).frame
    good = [r["rating"] for r in rows if r["rating"] is not None and math.isfinite(r["rating"])]
    assert stars["value"][-1] == pytest.approx(np.mean(good), rel=1e-9)
    one = mde_by_week(wh, Metric("success"), unit="request", population=dict(app="desk")).frame.row(-1, named=True)
    p = np.mean([r["status"] == "ok" for r in rows])
    assert one["units"] == 3000 and one["sd"]**2 == pytest.approx(p*(1-p)*3000/2999) and math.isnan(one["icc"])
    p50 = mde_by_week(wh, Metric("p50", "quantile", "latency_ms", q=.5), unit="request", population=dict(app="desk")).frame.row(-1, named=True)
    assert p50["sd"] == pytest.approx(quantile_sd(.5, sigma=.5), rel=.25)
    run = t.run_for(rel=.001, maximum=4)
    assert not run.ok and run.extrapolated and "cannot answer the question in 4 weeks" in run.sentence
    assert t.run_for(1.).weeks == 1 and mde_by_week(wh, Metric("success"), population=dict(app="desk"), coverage=.25).frame["mde"][-1] == pytest.approx(2*t.frame["mde"][-1])
    assert mde_by_week(wh, Metric("success"), population=dict(app="desk"), reduction=.75).frame["mde"][-1] == pytest.approx(t.frame["mde"][-1]/2)
    from somaagent.abtest.spec import template
    x = template("two-models", "small", ["large", "larger"], population=dict(app="desk"))
    planned = mde_by_week(wh, Metric("success"), x)
    assert planned.arms == 2 and planned.shares == pytest.approx((1/3,)*3) and planned.frame["mde"][-1] > t.frame["mde"][-1]
    assert mde_by_week(wh, Metric("success"), x, rule=dict(kind="always")).frame["mde"][-1] > planned.frame["mde"][-1]
    with pytest.raises(ExperimentError, match="no past traffic"): mde_by_week(wh, Metric("success"), population=dict(app="nobody"))
    with pytest.raises(ExperimentError, match="which difference"): t.run_for()

def test_a_rate_near_one_is_not_adjusted():
    rng = np.random.default_rng(3); near = [Moments.of(users(rng, 60, .995)) for _ in range(2)]; plenty = [Moments.of(users(rng, 600, .8)) for _ in range(2)]
    cuped = dict(SUCCESS, cuped=True)
    assert lift(*near, cuped).method.startswith("score") and "CUPED" in lift(*plenty, cuped).method

def test_numbers_that_cancel_are_no_variation():
    rng = np.random.default_rng(3); arms = [Moments.of(dict(ok=m*1.1, requests=m*1.1)) for m in (rng.geometric(.1, 300), rng.geometric(.1, 200))]
    same, other = lift(*arms, RATIO), lift(arms[0], Moments.of(dict(ok=(m := rng.geometric(.1, 99))*.7, requests=m*1.)), RATIO)
    assert (same.se, same.p, same.diff) == (0, 1, pytest.approx(0, abs=1e-12)) and math.isnan(same.lo) and other.refused.startswith("no variation")
