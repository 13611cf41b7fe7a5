"""Open-ended tests: fair bets by enumeration, Ville by simulation, coverage by inversion, resumption, the split, guardrails and bad input."""
import json, math, random
from itertools import product

import numpy as np, pytest
from scipy.stats import binom, multinomial

from somaagent.abtest.anytime import MeanE, always_valid, careful_se, harm, harm_of, log_mixture, ready, watch
from somaagent.abtest.eprocess import BinomialE, SplitE, _factor, _null, average, best_n, effects, growth, split_wealth, wealth
from somaagent.abtest.lift import Lift
from somaagent.core.errors import ExperimentError

need = math.log(20)

def expectation(pattern, p0, p1, delta=0., mde=.1, sides=2, base=None):
    "E[e] after the batches of `pattern`, summed over every outcome"
    cells = [list(product(range(a+1), range(b+1))) for a, b in pattern]
    paths = np.array(list(product(*cells)), float)                      # [outcomes, batches, 2]
    n = np.array(pattern, float)
    prob = (binom.pmf(paths[..., 0], n[:, 0], p0)*binom.pmf(paths[..., 1], n[:, 1], p1)).prod(1)
    lw = wealth(paths[..., 0].cumsum(1), n[:, 0].cumsum(), paths[..., 1].cumsum(1), n[:, 1].cumsum(), *effects(mde, sides), delta=delta, base=base)
    assert abs(prob.sum()-1) < 1e-9
    return float(prob@np.exp(lw[:, -1]))

patterns = [[(1, 1)], [(5, 3)], [(1, 1), (1, 1), (1, 1)], [(2, 1), (1, 3)], [(3, 0), (0, 2), (2, 2)], [(4, 1), (1, 4)], [(12, 1), (6, 1)], [(30, 25)]]

@pytest.mark.parametrize("pattern", patterns, ids=str)
@pytest.mark.parametrize("base", [None, .9])
def test_a_bet_is_fair_whatever_the_common_rate_and_the_batches(pattern, base):
    got = [expectation(pattern, p, p, base=base) for p in (0., .005, .1, .5, .8, .97, .995, 1.)]
    assert max(got) <= 1+1e-9, got

@pytest.mark.parametrize("delta", [-.6, -.02, .05, .3, .95])
def test_a_bet_against_a_difference_is_fair(delta):
    lo, hi = max(0, -delta), min(1, 1-delta)
    got = [expectation(pt, p, p+delta, delta) for pt in ([(2, 1), (1, 3)], [(6, 1), (3, 2)]) for p in np.linspace(lo, hi, 7)]
    assert max(got) <= 1+1e-9, got

@pytest.mark.parametrize("side", [1, -1])
def test_a_one_sided_bet_is_fair_in_the_whole_half_plane(side):
    "H0: the difference is at most .1 (side 1), or at least .1 (side −1): corners and inside"
    for p0, p1 in product(np.linspace(0, 1, 6), np.linspace(0, 1, 6)):
        if (p1-p0-.1)*side <= 1e-12: assert expectation([(2, 2), (1, 2)], p0, p1, .1, sides=side) <= 1+1e-9, (p0, p1)

def test_the_test_can_fail():
    "A bet that looks at its own batch for the base rate is not fair, and the enumeration sees it"
    n0 = n1 = 3
    total = 0.
    for a, b in product(range(4), range(4)):
        f = _factor(a, n0, b, n1, (a+b)/6, .5, 0., np.array([(b-a)/3 or .1]))[0]
        total += binom.pmf(a, 3, .5)*binom.pmf(b, 3, .5)*math.exp(f)
    assert total > 1.05

def test_the_projection_is_the_nearest_null():
    rng = np.random.default_rng(1)
    t0, t1, f1 = rng.uniform(.01, .99, 300), rng.uniform(.01, .99, 300), rng.choice([.05, .5, .9], 300)
    for d in (-.4, .03, .7):
        p0, p1, c = _null(t0, t1, f1, d)
        kl = lambda t, p: t*np.log(t/p)+(1-t)*np.log((1-t)/(1-p))
        far = lambda v: (1-f1)*kl(t0, v)+f1*kl(t1, v+d)
        lo, hi = max(0, -d)+1e-6, min(1, 1-d)-1e-6
        assert (far(p0) <= far(np.clip(p0+1e-4, lo, hi))+1e-12).all() and (far(p0) <= far(np.clip(p0-1e-4, lo, hi))+1e-12).all()
        assert np.allclose(p1-p0, d) and (c >= 0).all() and c.max() < 1e-6

@pytest.mark.parametrize("rate,share", [(.5, .5), (.8, .05), (.99, .5), (.995, .05)])
def test_ville(rate, share):
    "2,000 tests without a difference, 120 looks: at most 5 % ever reach 20 (three standard errors: 1.5 %)"
    rng, R, K = np.random.default_rng(3), 1000, 120
    m1 = max(1, round(40*share)); m0 = round(m1*(1-share)/share); k = np.arange(1, K+1)
    lw = np.concatenate([wealth(rng.binomial(m0, rate, (100, K)).cumsum(1), m0*k, rng.binomial(m1, rate, (100, K)).cumsum(1), m1*k, *effects(1.5*math.sqrt(rate*(1-rate)/40))) for _ in range(R//100)])
    assert (lw >= need).any(1).mean() <= .05+3*math.sqrt(.05*.95/R)
    assert .7 < np.exp(lw[:, 0]).mean() < 1.1          # fair, and not lost beforehand

def test_whoever_chooses_the_moment_of_a_look_by_what_he_sees_gains_nothing():
    "Batches are closed only when the bet has just gained (or lost)"
    eff, w = effects(.04)
    for sign in (1, -1):
        rng, R = np.random.default_rng(0), 400
        S, B, log, ever = np.zeros((R, 4)), np.zeros((R, 4)), np.zeros((R, len(eff))), np.zeros(R)
        for _ in range(150):
            B += np.c_[rng.binomial(20, .8, R), np.full(R, 20), rng.binomial(20, .8, R), np.full(R, 20)]
            past = S[:, 1]+S[:, 3]
            f = _factor(*B.T, (S[:, 0]+S[:, 2]+40)/(past+50), np.full(R, .5), 0., eff)
            now = average(log+f, w); ever = np.maximum(ever, now)
            close = sign*(now-average(log, w)) > 0
            log[close] += f[close]; S[close] += B[close]; B[close] = 0
        assert (ever >= need).mean() <= .05+3*math.sqrt(.05*.95/R)

def test_expected_n_is_near_the_limit():
    "The designed effect, looks at every hundredth of the limit: 1.40 × ln(1/α)/KL is the aim, three standard errors are .13"
    rng, R, K = np.random.default_rng(4), 400, 500
    limit = best_n(.8, .84); m = round(limit/200); k = np.arange(1, K+1)
    lw = np.concatenate([wealth(rng.binomial(m, .8, (100, K)).cumsum(1), m*k, rng.binomial(m, .84, (100, K)).cumsum(1), m*k, *effects(.04), base=.8) for _ in range(R//100)])
    hit = lw >= need
    at = np.where(hit.any(1), hit.argmax(1)+1, K)*2*m/limit
    assert hit.any(1).mean() > .98 and at.mean() < 1.40+3*at.std()/math.sqrt(R)
    assert math.isclose(growth(.8, .84), (.8*math.log(.8/.82)+.2*math.log(.2/.18)+.84*math.log(.84/.82)+.16*math.log(.16/.18))/2)
    assert best_n(.3, .3) == math.inf

def test_the_interval_covers_at_all_looks_and_agrees_with_the_test():
    "Inversion: the truth is inside at every look iff the wealth against it stays below 20; 300 tests, difference +.06, 90/10"
    rng, R, K = np.random.default_rng(5), 600, 40
    k = np.arange(1, K+1)
    s0, s1, n0, n1 = rng.binomial(90, .7, (R, K)).cumsum(1), rng.binomial(10, .76, (R, K)).cumsum(1), 90*k, 10*k
    out = (wealth(s0, n0, s1, n1, *effects(.05), delta=.06) >= need).any(1)
    assert out.mean() <= .05+3*math.sqrt(.05*.95/R)
    t = BinomialE(.05, base=.7)
    look = t.replay(zip(s0[0, 4::9].tolist(), n0[4::9].tolist(), s1[0, 4::9].tolist(), n1[4::9].tolist()))[-1]
    for end in (look.lo, look.hi): assert math.isclose(math.exp(t._at(end, t.grid)[-1]), 20, rel_tol=1e-3)
    assert look.lo < look.diff < look.hi and (look.e >= 20) == (not look.lo <= 0 <= look.hi)

def history(rng, K=12, m=60, p0=.8, p1=.86):
    s0, s1 = (rng.binomial(m, p, K).cumsum().tolist() for p in (p0, p1))
    return [(a, m*(i+1), b, m*(i+1)) for i, (a, b) in enumerate(zip(s0, s1))]

def test_looks_in_one_go_are_looks_one_by_one_and_a_test_resumes_from_its_counts():
    h = history(np.random.default_rng(6))
    whole = BinomialE(.05).replay(h)
    step = BinomialE(.05)
    assert [step.look(*row) for row in h] == whole
    stored = json.loads(json.dumps(step.history[:7]))
    again = BinomialE(.05); again.replay(stored)
    assert [again.look(*row) for row in h[7:]] == whole[7:]
    assert all(a.p >= b.p for a, b in zip(whole, whole[1:]))

def test_a_difference_that_turns_round_is_said():
    look = BinomialE(.05).replay([(500, 1000, 700, 1000), (1200, 2000, 1200, 2000)])[-1]
    assert look.action == 'reject' and math.isnan(look.lo) and 'changed with time' in look.sentence
    assert 'nan' not in BinomialE(.05).look(500, 1000, 700, 1000).sentence

def test_a_batch_with_one_arm_only_stays_open():
    t = BinomialE(.1)
    looks = [t.look(5, 10, 0, 0), t.look(7, 12, 0, 0), t.look(7, 12, 7, 9), t.look(7, 12, 9, 11)]
    one = BinomialE(.1).look(7, 12, 7, 9)
    assert looks[0].e == looks[1].e == 1 and looks[0].why and (looks[2].e, looks[2].lo) == (one.e, one.lo) and looks[3].e == looks[2].e

@pytest.mark.parametrize("row", [(0, 50, 0, 50), (50, 50, 50, 50), (50, 50, 0, 50), (0, 1, 1, 1), (10**6, 10**6, 10**6-3, 10**6)], ids=str)
def test_the_edges_have_defined_results(row):
    look = BinomialE(.02).look(*row)
    assert math.isfinite(look.e) and 0 <= look.p <= 1 and -1 <= look.lo <= look.diff <= look.hi <= 1, look
    assert look.hi-look.lo > 0

def test_giving_up():
    "Futility stops tests without a difference, and those with the designed one with probability β at most"
    rng, R, K = np.random.default_rng(7), 300, 60
    k = np.arange(1, K+1); n = 100*k
    def given_up(p1):
        s0, s1 = rng.binomial(100, .8, (R, K)).cumsum(1), rng.binomial(100, p1, (R, K)).cumsum(1)
        up, down = (np.maximum.accumulate(wealth(s0, n, s1, n, *effects(.04, -s), delta=s*.04, base=.8), 1) for s in (1, -1))
        return (np.minimum(up, down) >= math.log(10)).any(1).mean()
    assert given_up(.80) > .9 and given_up(.84) <= .1+3*math.sqrt(.09/R)
    assert BinomialE(.04, beta=None).replay([(800*i, 1000*i, 800*i, 1000*i) for i in range(1, 9)], intervals=False)[-1].action == 'continue'
    end = BinomialE(.04).replay([(800*i, 1000*i, 800*i, 1000*i) for i in range(1, 9)])[-1]
    assert end.action == 'futile' and 'refuted' in end.sentence

@pytest.mark.parametrize("row,says", [((5, 4, 1, 2), "more successes"), ((float('nan'), 4, 1, 2), "not a count"), ((1.5, 4, 1, 2), "not a count"), ((-1, 4, 1, 2), "not a count"),
                                      ((True, 4, 1, 2), "not a count"), ((float('inf'), 4, 1, 2), "not a count")], ids=str)
def test_bad_counts_are_refused_and_leave_no_trace(row, says):
    t = BinomialE(.05); t.look(1, 2, 1, 2)
    with pytest.raises(ExperimentError, match=says): t.look(*row)
    assert t.history == [(1, 2, 1, 2)]

def test_counts_that_go_down_are_refused():
    t = BinomialE(.05); t.look(5, 10, 5, 10)
    for row in ((4, 10, 5, 10), (5, 9, 5, 10), (8, 11, 5, 10)):     # the last: failures went down
        with pytest.raises(ExperimentError, match="went down"): t.look(*row)

@pytest.mark.parametrize("kw", [dict(mde=0), dict(mde=-1), dict(mde=math.nan), dict(mde=.1, alpha=0), dict(mde=.1, beta=1.), dict(mde=.1, base=1.), dict(mde=.1, sides=3), dict(mde=.6, delta=.5)], ids=str)
def test_designs_that_make_no_sense(kw):
    with pytest.raises(ExperimentError): BinomialE(**kw)

# ---- the split

def test_the_split_bet_is_fair_by_enumeration():
    for w, sizes in (([.5, .5], (3, 4)), ([.9, .1], (5, 2)), ([.2, .3, .5], (3, 2))):
        cells = [[c for c in product(range(m+1), repeat=len(w)) if sum(c) == m] for m in sizes]
        paths = np.array(list(product(*cells)), float)
        prob = np.prod([[multinomial.pmf(b, m, w) for b, m in zip(p, sizes)] for p in paths], 1)
        assert math.isclose(prob@np.exp(split_wealth(paths.cumsum(1), w)[:, -1]), 1, rel_tol=1e-9)
        other = np.array([w, np.roll(w, 1)])                             # re-weighted in flight
        prob = np.prod([[multinomial.pmf(b, m, v) for b, m, v in zip(p, sizes, other)] for p in paths], 1)
        assert math.isclose(prob@np.exp(split_wealth(paths.cumsum(1), other)[:, -1]), 1, rel_tol=1e-9)

def test_batches_of_the_split_do_not_matter():
    c = np.random.default_rng(8).multinomial(30, [.3, .7], 20).cumsum(0)
    assert np.allclose(split_wealth(c, [.3, .7])[-1], split_wealth(c[-1:], [.3, .7])[-1])

def test_the_split_watched_and_reweighted():
    rng, R, K = np.random.default_rng(9), 2000, 60
    w = np.array([[.95, .05]]*20+[[.8, .2]]*20+[[.5, .5]]*20)
    seen = np.stack([rng.multinomial(100, v, R) for v in w], 1).cumsum(1)
    assert (split_wealth(seen, w) >= math.log(1000)).any(1).mean() <= .001+3*math.sqrt(.001/R)
    lost = np.stack([rng.multinomial(100, v*[1, .8]/(v*[1, .8]).sum(), R) for v in w], 1).cumsum(1)
    assert (split_wealth(lost, w) >= math.log(1000)).any(1).mean() > .9

def test_split_looks():
    s = SplitE({'a': .5, 'b': .5})
    h = [({'a': .5, 'b': .5}, {'a': 510, 'b': 490}), ({'a': .9, 'b': .1}, {'a': 1410, 'b': 590}), ({'a': .9, 'b': .1}, {'a': 1700, 'b': 1300})]
    looks = [s.look(c, w) for w, c in h]
    assert [x.ok for x in looks] == [True, True, False] and looks == SplitE({'a': .5, 'b': .5}).replay(h)
    assert looks[1].planned == pytest.approx({'a': 1400, 'b': 600})
    assert not s.look({'a': 2600, 'b': 1400}).ok                          # an alarm stays
    assert not SplitE({'a': 1., 'b': 0.}).look({'a': 50, 'b': 1}).ok
    assert SplitE({'a': 1., 'b': 0.}).look({'a': 50, 'b': 0}).ok and SplitE({'a': .5, 'b': .5}).look({}).ok
    grown = SplitE({'a': .5, 'b': .5}); grown.look({'a': 100, 'b': 100})
    assert grown.look({'a': 150, 'b': 150, 'c': 100}, {'a': 1/3, 'b': 1/3, 'c': 1/3}).seen['c'] == 100   # an arm that joined

@pytest.mark.parametrize("seen", [{'a': 1, 'c': 2}, {'a': -1, 'b': 2}, {'a': math.nan, 'b': 2}, {'a': .5, 'b': 1}], ids=str)
def test_bad_splits(seen):
    with pytest.raises(ExperimentError): SplitE({'a': .5, 'b': .5}).look(seen)

@pytest.mark.parametrize("w", [{'a': 1.}, {'a': .5, 'b': .6}, {'a': math.nan, 'b': 1.}, {'a': -.5, 'b': 1.5}], ids=str)
def test_bad_weights(w):
    with pytest.raises(ExperimentError): SplitE(w)

# ---- means

def test_the_mean_bet_agrees_with_its_integral_and_its_width():
    "E[e] = 1 under the normal null (quadrature), and e at the ends of the interval is 1/α"
    x, w = np.polynomial.hermite_e.hermegauss(120)
    for se in (.5, .1, .03): assert math.isclose((np.exp(log_mixture(x*se, np.full(120, se), *effects(.05)))@w)/math.sqrt(2*math.pi), 1, rel_tol=1e-6)
    look = always_valid(.03, .01, mde=.03, n0=10**7, n1=10**7)
    for end in (look.lo, look.hi): assert math.isclose(math.exp(log_mixture(look.diff-end, .01, *effects(.03))), 20, rel_tol=1e-4)
    t = always_valid(.03, .01, mde=.03, n0=8, n1=8)
    for end in (t.lo, t.hi): assert math.isclose(math.exp(log_mixture(t.diff-end, .01, *effects(.03), df=7)), 20, rel_tol=1e-4)
    assert t.hi-t.lo > 1.4*(look.hi-look.lo)

def test_mean_looks_remember_and_explain():
    t = MeanE(mde=.1)
    first, second, third = t.look(.5, .05, 500, 500), t.look(.02, .04, 900, 900), t.look(0., 0., 900, 900)
    assert first.action == second.action == 'reject' and second.p == first.p and second.e < first.e
    assert third.why and third.action == 'continue'
    assert always_valid(.0, .01, mde=.1, n0=5000, n1=5000).action == 'futile'
    assert MeanE(horizon_se=.02).mde == pytest.approx(.056)
    down = always_valid(-.5, .05, mde=.1, n0=900, n1=900, sides=1)
    assert down.action != 'reject' and down.hi == math.inf

@pytest.mark.parametrize("args", [(math.nan, .1), (.1, math.nan), (.1, -1.), (math.inf, .1)], ids=str)
def test_bad_means(args):
    with pytest.raises(ExperimentError): always_valid(*args, mde=.1, n0=100, n1=100)
    with pytest.raises(ExperimentError): harm(*args[:1], args[1] if args[1] != -1. else math.nan, mde=.1)

def test_ready_says_why():
    assert not ready('rate', 1000, 1000, .8) and not ready('mean', 400, 400) and not ready('mean', 30, 30, skewed=False)
    for kw, says in ((dict(kind='rate', n0=1000, n1=40, rate=.9), "failures"), (dict(kind='rate', n0=1000, n1=400, rate=.01), "successes"), (dict(kind='rate', n0=10, n1=0, rate=.5), "no exposure"),
                     (dict(kind='mean', n0=10**4, n1=399), "400"), (dict(kind='mean', n0=10**4, n1=500, capped=False), "capped"), (dict(kind='rate', n0=10, n1=10, rate=.8, requests=(9000, 9000)), "20 are needed"),
                     (dict(kind='rate', n0=100, n1=100, rate=.8, deff=10.), "2.0 failures"), (dict(kind='rate', n0=100, n1=100, rate=1.), "0.0 failures"), (dict(kind='rate', n0=100, n1=100), "not known")):
        assert says in ready(**kw), kw

def test_watch_reads_lifts():
    base = dict(metric='ok', kind='rate', n_control=500, n_arm=500, units_control=500, units_arm=500)
    good = Lift(**base, value_control=.8, value_arm=.9, diff=.1, se=.022, se0=.0226)
    perfect = Lift(**base, value_control=1., value_arm=1., diff=0., se=0., se0=0.)
    refused = Lift(metric='ok', kind='rate', refused='no exposure in treatment')
    looks = watch([refused, perfect, good], mde=.05)
    assert [bool(l.why) for l in looks] == [True, True, False] and looks[2].action == 'reject' and looks[0].action == 'continue'
    assert math.isclose(looks[2].e, math.exp(log_mixture(.1, .0226, *effects(.05), df=499)), rel_tol=1e-9)
    assert 'capped' in watch([Lift(metric='cost', kind='mean', units_control=900, units_arm=900, diff=1., se=.1)], mde=.1, capped=False)[0].why

def test_a_guardrail_fires_on_harm_and_at_most_alpha_without_it():
    rng, R, K = np.random.default_rng(10), 2000, 80
    n = 50*np.arange(1, K+1); se = np.sqrt(2/n)
    def fires(loss):
        x = (rng.normal(loss*50, math.sqrt(100), (R, K)).cumsum(1))/n
        return (log_mixture(x-.1, np.broadcast_to(se, x.shape), *effects(.1, 1)) >= math.log(100)).any(1).mean()
    assert fires(.1) <= .01+3*math.sqrt(.01/R) and fires(0.) < .002 and fires(.3) > .95
    assert harm(-.5, .05, .1, n0=500, n1=500).credible and not harm(.5, .05, .1, n0=500, n1=500).credible and harm(.5, .05, .1, direction='down', n0=500, n1=500).credible
    h = harm(-.5, .05, .1, n0=500, n1=500); assert .1 < h.least < .5 and 'at least' in h.sentence
    assert harm(.0, .0, n0=5, n1=5).why and not harm(.0, .0, n0=5, n1=5).credible
    with pytest.raises(ExperimentError): harm(.1, .1, direction='sideways', mde=.1)
    with pytest.raises(ExperimentError): harm(.1, .1, tolerance=-1, mde=.1)
    with pytest.raises(ExperimentError, match="how large"): harm(.1, .1)

def test_a_relative_tolerance():
    f = Lift(metric='cost', kind='mean', units_control=900, units_arm=900, value_control=2., value_arm=2.3, diff=.3, se=.05, se0=.05, se_control=.035, se_arm=.035, df=1700.)
    strict, lax = harm_of(f, .02, 'down'), harm_of(f, .14, 'down')
    assert strict.credible and not lax.credible and strict.loss == pytest.approx(.3) and strict.tolerance == pytest.approx(.04) and strict.least > .04
    assert harm_of(Lift(metric='x', refused='no exposure'), .1).why

def test_the_larger_standard_error_is_believed():
    from somaagent.abtest.lift import lift
    from somaagent.abtest.moments import Moments
    rng = np.random.default_rng(11)
    arm = lambda n, bad: Moments.of({'rating': np.r_[np.full(bad, 1.), np.full(n-bad, 5.)]})
    metric = dict(name='rating', kind='mean', numerator='rating')
    lucky, unlucky, even = lift(arm(950, 30), arm(50, 0), metric), lift(arm(950, 30), arm(50, 5), metric), lift(arm(5000, 150), arm(5000, 150), metric)
    assert careful_se(lucky) > 3*lucky.se and careful_se(unlucky) == unlucky.se and math.isclose(careful_se(even), even.se, rel_tol=1e-9)
    assert watch([lucky], mde=.2, skewed=False)[0].action == 'continue' and always_valid(lucky.diff, lucky.se, mde=.2, n0=950, n1=50).action == 'reject'
    assert careful_se(Lift(metric='x', kind='mean', se=.1)) == .1
    alarms = [0, 0]
    for i in range(80):                                      # guardrail and test on a canary of ratings
        a, b = (rng.binomial(m, .03, 7).cumsum() for m in (380, 20))
        path = [lift(arm(380*(k+1), int(a[k])), arm(20*(k+1), int(b[k])), metric) for k in range(1, 7)]
        alarms[0] += any(l.action == 'reject' for l in watch(path, mde=.2, skewed=False, beta=None))
        alarms[1] += any(harm_of(l, 0., alpha=.01).credible for l in path if l.se > 0)
    assert alarms[0]/80 <= .05+3*math.sqrt(.05*.95/80) and alarms[1]/80 <= .01+3*math.sqrt(.01/80), alarms
