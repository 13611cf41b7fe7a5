"""Group-sequential boundaries against published tables and other integrators, looks under bad input, estimates after stopping, rules under simulation."""
import json, math, time
from pathlib import Path

import numpy as np, pytest
from hypothesis import given, settings, strategies as st
from scipy.stats import multivariate_normal, norm

from somaagent.abtest.estimate import two_proportions
from somaagent.abtest.group import GroupSequential, expected_n, inflation, ready, score, score_means
from somaagent.abtest.simulate import Rule, first, fixed_rule, group_rule, open_rule, peeking_rule, plugin_rule, simulate, study, wilson
from somaagent.abtest.stopped import estimate, exaggeration
from somaagent.abtest.walk import Boundaries, _boundaries, boundaries, classical, spending
from somaagent.abtest.worlds import Scenario, draw
from somaagent.core.errors import ExperimentError

root = Path(__file__).resolve().parents[1]
NAMES = ["obf", "pocock", "t2", "t3", "power:1", "hsd:-4", "hsd:1"]

# Jennison and Turnbull (2000), tables 2.1 (Pocock) and 2.3 (O'Brien and Fleming): two-sided, equal looks, constants C at the last look
POCOCK = {.1: {1: 1.645, 2: 1.875, 3: 1.992, 4: 2.067, 5: 2.122, 10: 2.270, 20: 2.392},
          .05: {1: 1.960, 2: 2.178, 3: 2.289, 4: 2.361, 5: 2.413, 6: 2.453, 7: 2.485, 8: 2.512, 9: 2.535, 10: 2.555, 15: 2.626, 20: 2.672},
          .01: {1: 2.576, 2: 2.772, 3: 2.873, 4: 2.939, 5: 2.986, 10: 3.117, 20: 3.225}}
OBF = {.1: {1: 1.645, 2: 1.678, 3: 1.710, 4: 1.733, 5: 1.751, 10: 1.801},
       .05: {1: 1.960, 2: 1.977, 3: 2.004, 4: 2.024, 5: 2.040, 6: 2.053, 7: 2.063, 8: 2.072, 9: 2.080, 10: 2.087, 15: 2.110, 20: 2.126},
       .01: {1: 2.576, 2: 2.580, 3: 2.595, 4: 2.609, 5: 2.621, 10: 2.660}}

@pytest.mark.parametrize("shape,table", [("pocock", POCOCK), ("obf", OBF)])
def test_classical_constants_are_the_published_ones(shape, table):
    got = {a: {K: classical(K, a, shape).z[-1] for K in row} for a, row in table.items()}
    wrong = [(a, K, round(got[a][K], 4), c) for a, row in table.items() for K, c in row.items() if abs(got[a][K]-c) > .0012]
    assert not wrong

def test_published_spending_boundaries():
    "Lan and DeMets (1983), as Reboussin, DeMets, Kim and Lan (2000) print them: two-sided 5 %, five equal looks"
    np.testing.assert_allclose(boundaries(5).z, [4.8769, 3.3570, 2.6803, 2.2898, 2.0310], atol=1e-4)
    np.testing.assert_allclose(boundaries(5, spending="pocock").z, [2.4380, 2.4268, 2.4101, 2.3966, 2.3859], atol=1.5e-4)
    np.testing.assert_allclose(classical(5).z, [4.5617, 3.2256, 2.6337, 2.2810, 2.0401], atol=1.5e-4)

def test_efficiency_as_measured_before():
    "Expected n over the fixed n at the design alternative, 10 looks: O'Brien–Fleming .794 / .722, t² .762 / .672; all within 1.27 of Wald's limit .626 / .571"
    for name, want in (("obf", (.794, .722)), ("t2", (.762, .672))):
        for power, w, limit in zip((.8, .9), want, (.626, .571)):
            got = expected_n(dict(spending=name, looks=10, power=power))
            assert abs(got-w) < 6e-4 and got/limit < 1.27
    assert inflation(dict(kind="fixed")) == pytest.approx(1, abs=1e-4)

def test_peeking_is_as_bad_as_they_say():
    "Armitage, McPherson and Rowe (1969), table 2: a 5 % test looked at K times"
    for K, p in ((2, .083), (5, .142), (10, .193), (20, .248), (50, .320), (100, .374)):
        flat = Boundaries(tuple((np.arange(K)+1)/K), (1.959964,)*K, (math.nan,)*K)
        assert flat.power(0.) == pytest.approx(p, abs=.0006)

@pytest.mark.parametrize("eta", [0., 2.5])
def test_another_integrator_agrees(eta):
    "Three unequal looks against scipy's multivariate normal distribution"
    t = np.array([.2, .55, 1.])
    b = boundaries(t, spending="t2")
    cov = np.sqrt(np.minimum.outer(t, t)/np.maximum.outer(t, t))
    stay = multivariate_normal(eta*np.sqrt(t), cov, abseps=1e-6).cdf(np.array(b.z), lower_limit=-np.array(b.z), rng=np.random.default_rng(0))
    assert b.power(eta) == pytest.approx(1-stay, abs=1e-5)

@pytest.mark.parametrize("sides", [1, 2])
def test_simulated_walks_agree(sides):
    t = np.array([.1, .37, .4, .8, 1.])
    g = GroupSequential(dict(spending="t2", looks=5, futility=True, sides=sides))
    b = _boundaries(tuple(t), g.design, True)
    w = (np.random.default_rng(3).normal(size=(200_000, 5))*np.sqrt(np.diff(t, prepend=0))+g.drift*np.diff(t, prepend=0)).cumsum(1)
    z, alive, e = w/np.sqrt(t), np.ones(200_000, bool), b.exits(g.drift)
    for k in range(5):
        up, down = alive & (z[:, k] >= b.z[k]), alive & (z[:, k] <= -b.z[k]) & (sides == 2)
        fut = alive & ~up & ((np.abs(z[:, k]) if sides == 2 else z[:, k]) < np.nan_to_num(b.futility[k], nan=-math.inf))
        for got, want in ((up, e["up"][k]), (down, e["down"][k]), (fut, e["futile"][k])): assert abs(got.mean()-want) < 4.5*math.sqrt(want*(1-want)/200_000)+1e-6
        alive &= ~(up | down | fut)

fractions = st.lists(st.floats(.01, 1.4), min_size=1, max_size=8, unique=True).map(sorted)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(fractions, st.sampled_from(NAMES), st.sampled_from([.01, .05, .2]), st.sampled_from([1, 2]))
def test_error_is_what_was_spent_at_any_looks(t, name, alpha, sides):
    b = boundaries(t, alpha, name, sides)
    assert b.power(0.) == pytest.approx(sides*spending(name)(t[-1], alpha/sides), abs=3e-6)     # |z| > 8 is never asked for
    np.testing.assert_allclose(boundaries(t[:-1], alpha, name, sides).z if len(t) > 1 else [], b.z[:-1])   # what comes later changes nothing
    assert boundaries(t, alpha, name, sides, last=True).power(0.) == pytest.approx(alpha, abs=3e-6)
    assert all(np.array(boundaries(t, alpha/2, name, sides).z) >= np.array(b.z)-1e-9)            # less error, higher boundaries

@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.sampled_from(NAMES), st.floats(0, 1.5), st.floats(0, 1.5), st.floats(1e-6, .5))
def test_spending_rises_from_nothing_to_alpha(name, a, b, alpha):
    f = spending(name)
    assert 0 <= f(min(a, b), alpha) <= f(max(a, b), alpha)+1e-15 and f(max(a, b), alpha) <= alpha*(1+1e-9)
    assert f(0., alpha) == 0 and f(1., alpha) == pytest.approx(alpha)

@pytest.mark.parametrize("name", ["obf", "t2", "pocock"])
@pytest.mark.parametrize("sides", [1, 2])
def test_futility_spends_beta_and_keeps_alpha(name, sides):
    for kind in (True, "binding"):
        g = GroupSequential(dict(spending=name, looks=6, futility=kind, sides=sides, power=.85))
        assert g.planned.power(g.drift) == pytest.approx(.85, abs=1e-6)
        assert g.planned.power(0., futility=kind == "binding") == pytest.approx(.05, abs=1e-6)
        f = [x for x in g.planned.futility if not math.isnan(x)]
        assert f == sorted(f) and f[-1] == g.planned.z[-1]
    assert GroupSequential(dict(spending=name, looks=6, futility="binding", sides=sides)).inflation < GroupSequential(dict(spending=name, looks=6, futility=True, sides=sides)).inflation

def test_a_look_is_fast():
    g, rng = GroupSequential(dict(spending="t2", looks=20, futility=True)), np.random.default_rng(0)
    took, h, w, last = [], [], 0., 0.
    for t in np.sort(rng.uniform(.02, 1, 60)):
        w, last = w+rng.normal()*math.sqrt(t-last), t
        h.append((100*t, w/math.sqrt(t)))
        t0 = time.process_time(); g.look(h, 100.); took.append(time.process_time()-t0)
    assert np.median(took) < .03, f"{1000*np.median(took):.1f} ms"   # about 3 ms on a quiet machine

def test_looks_with_little_or_falling_or_too_much_information():
    g = GroupSequential(dict(spending="t2", looks=5))
    h = [(20., 1.), (20., 1.1), (19., 1.2), (60., 1.), (100., 2.), (130., 2.5)]
    p = g.path(h, 100.)
    assert [x.fraction for x in p] == [.2, .2, .2, .6, 1., 1.3] and p[1].boundary == p[2].boundary == 8. and p[-1].boundary == 8.
    assert p[-1].bounds.power(0.) == pytest.approx(.05, abs=1e-6) and p[-1].spent == pytest.approx(.05)
    over = g.look([(50., 1.), (120., 2.1)], 100.)
    assert over.action == "reject" and over.spent == pytest.approx(.05) and over.boundary < 2.1
    early = g.look([(30., .5), (55., 2.4)], 100., last=True)
    assert early.action == "reject" and early.bounds.power(0.) == pytest.approx(.05, abs=1e-6) and g.look([(30., .5), (55., 2.4)], 100.).action == "continue"
    many = g.look([(t, 0.) for t in np.linspace(1, 99, 150)], 100.)
    assert many.action == "continue" and many.k == 150

def test_a_rejection_stands():
    g = GroupSequential(dict(looks=4, futility=True))
    p = g.path([(50., 4.), (75., .1), (100., .2)], 100.)
    assert [x.action for x in p] == ["reject"]*3 and p[-1].decided == 1 and p[-1].direction == "up"
    assert g.look([(50., -4.)], 100.).direction == "down"
    one = GroupSequential(dict(looks=4, sides=1))
    assert one.look([(50., -4.)], 100.).action == "continue" and one.look([(50., 4.)], 100.).hi == math.inf

@pytest.mark.parametrize("history,top", [([], 1.), ([(math.nan, 0.)], 1.), ([(1., math.inf)], 1.), ([(0., 1.)], 1.), ([(-1., 1.)], 1.), ([(1., 1.)], 0.), ([(1., 1.)], math.nan), ([(1., 1., 0.)], 1.)])
def test_bad_histories_are_refused(history, top):
    with pytest.raises(ExperimentError): GroupSequential({}).look(history, top)

@pytest.mark.parametrize("rule", [dict(alpha=0), dict(alpha=1.), dict(power=1.2), dict(looks=0), dict(looks=2.5), dict(looks=True), dict(spending="x"), dict(spending="power"), dict(spending="power:-1"), dict(spending="hsd:x"), dict(sides=3), dict(kind="always"), dict(futility="nonsense")])
def test_bad_rules_are_refused(rule):
    with pytest.raises(ExperimentError): GroupSequential(rule)

def test_bad_designs_are_refused():
    for f in ([0., .5], [.5, .2], [math.nan], 0, -3, []):
        with pytest.raises(ExperimentError): boundaries(f)
    with pytest.raises(ExperimentError): GroupSequential({}).max_information(0.)
    with pytest.raises(ExperimentError): classical(3, shape="triangle")
    with pytest.raises(ExperimentError): score(5, 4, 1, 4)
    assert not ready(1000, 0, 10, 0) and not ready(0, 0, 0, 0) and not ready(1000, 1000, 1000, 1000) and ready(500, 500, 250, 250)
    d, se = score(np.array([0., 10.]), 10, np.array([0., 10.]), 10)
    assert np.isinf(se).all() and (d == 0).all()
    d, se = score_means(400, 1., 0., 400, 1., 0.)
    assert d == 0 and np.isinf(se)
    low, high = score_means(9_500, 1., 2., 500, .9, .5), score_means(9_500, 1., 2., 500, 1.1, 8.)
    assert low[1] > math.sqrt(2/9_500+.5/500) and high[1] == pytest.approx(math.sqrt(2/9_500+8/500))   # never below the arms' own

def test_information_that_is_measured_keeps_the_error():
    "The rule's own look, with each experiment's measured information, score variance and burn-in; success 99 %, 95/5"
    g, rng, n0, n1 = GroupSequential(dict(spending="t2", looks=8, futility=True)), np.random.default_rng(11), 2375*np.arange(1, 9), 125*np.arange(1, 9)
    top = 1/(.99*.01*(1/n0[-1]+1/n1[-1]))
    def run(): 
        s0, s1 = rng.binomial(2375, .99, 8).cumsum(), rng.binomial(125, .99, 8).cumsum()
        d, se = score(s0, n0, s1, n1)
        ok = np.flatnonzero(ready(n0, n1, s0, s1))
        return g.look([(se[k]**-2, d[k]/se[k]) for k in ok], top, last=True).action == "reject" if len(ok) else False
    hits = sum(run() for _ in range(250))
    assert wilson(hits, 250, .001)[0] <= .05

def test_conditional_power_is_the_tests_own_future():
    g, rng = GroupSequential(dict(spending="obf", looks=4)), np.random.default_rng(5)
    t, c = np.array([.5, .75, 1.]), np.array(g.planned.z[1:])
    w = math.sqrt(.5)*1.4+(rng.normal(size=(100_000, 2))*.5+g.drift*.25).cumsum(1)
    z = w/np.sqrt(t[1:])
    got = g.conditional_power([(25., .3), (50., 1.4)], 100.)
    assert got == pytest.approx((np.abs(z) >= c[1:]).any(1).mean(), abs=.006)
    assert g.conditional_power([(50., 5.)], 100.) == 1 and g.conditional_power([(100., 0.)], 100.) == 0
    assert g.conditional_power([(50., 1.4)], 100., 0.) < got

zs = st.lists(st.floats(-3.5, 3.5), min_size=1, max_size=5)
@settings(max_examples=15, deadline=None, derandomize=True)
@given(zs, st.sampled_from(["obf", "t2", "pocock"]))
def test_interval_and_decision_agree(z, name):
    g = GroupSequential(dict(spending=name, looks=5))
    h = [(20.*(k+1), x) for k, x in enumerate(z)]
    p = g.path(h, 100.)
    stop = next((x for x in p if x.action == "reject"), p[-1])
    if stop.action == "continue": return
    e, m = estimate(stop), estimate(g.path([(i, -x) for i, x in h], 100.))
    assert e.lo < e.estimate < e.hi and (e.lo > 0 or e.hi < 0) == (stop.action == "reject") == (e.p <= .05)
    assert m.estimate == pytest.approx(-e.estimate, abs=1e-6) and m.lo == pytest.approx(-e.hi, abs=1e-6) and m.p == pytest.approx(e.p, abs=1e-9)
    big = estimate(g.look([(i*1e-4, x) for i, x in h[:stop.k]], 100.*1e-4))
    assert big.estimate == pytest.approx(100*e.estimate, rel=1e-6)
    if stop.action == "reject": assert abs(e.estimate) <= abs(e.raw)+1e-9 and abs(e.adjusted) <= abs(e.raw)+1e-9

def test_one_look_is_the_fixed_test():
    e = estimate(GroupSequential(dict(kind="fixed")).look([(400., 2.5)], 400.))
    np.testing.assert_allclose([e.raw, e.estimate, e.adjusted, e.lo, e.hi, e.p], [.125, .125, .125, (2.5-1.959964)/20, (2.5+1.959964)/20, 2*norm.sf(2.5)], rtol=1e-5)

def test_intervals_with_own_variance_are_score_intervals():
    "Close to Miettinen and Nurminen's, at rates and splits where the null variance alone is half of what it should be"
    for s0, n0, s1, n1 in ((18_810, 19_000, 975, 1_000), (9_900, 10_000, 9_850, 10_000), (800, 1_000, 430, 500)):
        (d, se), own = score(s0, n0, s1, n1), math.sqrt(s0/n0*(1-s0/n0)/n0+s1/n1*(1-s1/n1)/n1)
        e, mn = estimate(GroupSequential(dict(kind="fixed")).look([(se**-2, d/se, own)], se**-2)), two_proportions(s0, n0, s1, n1)
        assert abs(e.lo-mn.lo) < .05*(mn.hi-mn.lo) and abs(e.hi-mn.hi) < .05*(mn.hi-mn.lo)
        assert (e.lo > 0 or e.hi < 0) == (mn.p < .05)

def test_winners_curse_grows_with_early_stopping():
    at = [exaggeration(dict(spending=n, looks=10)) for n in ("fixed", "obf", "t2", "pocock")]
    assert at == sorted(at) and at[0] > 1.1 and at[-1] < 1.45
    with pytest.raises(ExperimentError): exaggeration({}, 0.)
    with pytest.raises(ExperimentError): estimate([])

def test_simulation_is_seeded_and_knows_good_from_bad():
    sc = Scenario(base=.99, mde=-.008, share=.05)
    a, b = (study([fixed_rule(), group_rule("t2", 10), peeking_rule(), plugin_rule()], [sc], [0.], 300, 5) for _ in range(2))
    assert [tuple(map(str, r.values())) for r in a] == [tuple(map(str, r.values())) for r in b]
    assert all(r["lo"] <= .05 for r in a[:2]) and all(r["lo"] > .3 for r in a[2:])
    mine = Rule("never", lambda p: first(np.zeros(p.diff.shape, bool), p.diff, p.diff-1, p.diff+1, p.truth), 1., 5)
    r = simulate(mine, sc, 1., 50)
    assert r["reject"] == 0 and r["n"] == pytest.approx(1, abs=.02) and r["coverage"] == 1
    assert simulate(open_rule(looks=20, horizon=2.), sc, 0., 100, 3)["lo"] <= .05 and simulate(dict(kind="always", futility=True), Scenario("mean", 1., .1), 2., 40, 3)["reject"] > .9
    with pytest.raises(ExperimentError): Scenario("poisson")
    with pytest.raises(ExperimentError): Scenario(share=1.)

def test_users_cost_what_their_clustering_says():
    p = draw(Scenario("users", .8, .05), 0., 150, 2)
    naive = p.diff[:, -1]/np.sqrt(.8*.2*(1/p.n0[:, -1]+1/p.n1[:, -1]))
    robust = p.diff[:, -1]/p.se[:, -1]
    assert 1.7 < naive.std() < 2.4 and .8 < robust.std() < 1.2

def test_every_shipped_rule_keeps_its_promise_in_the_saved_table():
    saved = json.loads((root/"experiments/ab_validity.json").read_text())
    rows = [dict(zip(saved["columns"], r)) for r in saved["rows"]]
    null = [r for r in rows if r["effect"] == 0 and "wrong" not in r["rule"]]
    assert len({r["traffic"] for r in null}) == 14 and len({(r["rule"], r["looks"]) for r in null}) >= 27 and min(r["reps"] for r in rows) >= 2000
    assert all(wilson(r["reject"]*r["reps"], r["reps"], 1e-3)[0] <= .05 for r in null)
    assert all(r["reject"] > .25 for r in rows if r["effect"] == 0 and r["rule"].startswith("peeking"))
