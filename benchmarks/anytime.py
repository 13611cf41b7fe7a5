"""Open-ended tests of abtest: requests against the limit ln(1/α)/KL, false alarms under continuous watching, and the split.

`python benchmarks/anytime.py [--reps 4000] [--part rates|means]` prints its tables (about two processor minutes at 2,000). Everything is seeded; one test is one replication."""
import argparse, math
import numpy as np
from somaagent.abtest.eprocess import best_n, effects, split_wealth, wealth
from somaagent.abtest.anytime import log_mixture

need = math.log(20)

def arms(rng, p0, p1, m0, m1, R, K): return rng.binomial(m0, p0, (R, K)).cumsum(1), rng.binomial(m1, p1, (R, K)).cumsum(1)

def chunks(reps, fn, size=100): return np.concatenate([fn(np.random.default_rng([7, i]), min(size, reps-i)) for i in range(0, reps, size)])

def requests(p0, p1, mde, share, reps, base, looks=600, far=6):
    "Requests until the wealth is 20 over the limit, at looks every hundredth of it"
    limit = best_n(p0, p1, share=share)
    m1 = max(1, round(far*limit*share/looks)); m0 = round(m1*(1-share)/share); k = np.arange(1, looks+1)
    def stop(rng, R):
        s0, s1 = arms(rng, p0, p1, m0, m1, R, looks)
        hit = wealth(s0, m0*k, s1, m1*k, *effects(mde), base=base) >= need
        return np.where(hit.any(1), hit.argmax(1)+1, np.inf)*(m0+m1)/limit
    n = chunks(reps, stop)
    end = np.minimum(n, looks*(m0+m1)/limit)
    return end.mean(), end.std()/math.sqrt(reps), np.isfinite(n).mean()

def alarms(p, share, reps, looks=400, batch=100):
    "Tests without a difference that fire: exact, mixture with the house rules, plug-in without"
    m1 = max(1, round(batch*share)); m0 = batch-m1; k = np.arange(1, looks+1); n0, n1 = m0*k, m1*k
    mde = .1*math.sqrt(p*(1-p)/share/(1-share)/4)
    def fire(rng, R):
        s0, s1 = arms(rng, p, p, m0, m1, R, looks)
        pool = (s0+s1)/(n0+n1)
        score = np.sqrt(np.maximum(pool*(1-pool), 1e-12)*(1/n0+1/n1))
        own = np.sqrt(np.maximum(s0/n0*(1-s0/n0)/n0+s1/n1*(1-s1/n1)/n1, 1e-12))
        ready = np.minimum(pool, 1-pool)*np.minimum(n0, n1) >= 5
        d, e = s1/n1-s0/n0, effects(mde)
        return np.stack([(wealth(s0, n0, s1, n1, *e) >= need).any(1), ((log_mixture(d, score, *e, df=np.maximum(np.minimum(n0, n1)-1, 1)) >= need) & ready).any(1), (log_mixture(d, own, *e) >= need).any(1)], 1)
    return chunks(reps, fire).mean(0)

def split(reps, days=200, each=50):
    "Clean splits that raise an alarm: chi-square at 5 % and the e-process at 1000"
    def fire(rng, R):
        n = rng.multinomial(each, [.5, .5], (R, days)).cumsum(1)
        return np.stack([((n[..., 0]-n[..., 1])**2/n.sum(-1) > 3.841).any(1), (split_wealth(n, [.5, .5]) >= math.log(1000)).any(1)], 1)
    return chunks(reps, fire, 500).mean(0)

def scores(draw, sd, start, share, reps, looks=100, batch=200):
    "Means without a difference that fire, by the standard error that is believed: two-sided at 5 %, harm up and down at 1 %"
    m1 = max(1, round(batch*share)); sizes, k = (batch-m1, m1), np.arange(1, looks+1)
    n0, n1 = sizes[0]*k, m1*k
    def fire(rng, R):
        m, v = [], []
        for size in sizes:
            x = draw(rng, (R, looks, size)); n = size*k
            a, q = x.sum(2).cumsum(1)/n, (x*x).sum(2).cumsum(1)/n
            m.append(a); v.append(np.maximum(q-a*a, 1e-9)*n/(n-1))
        own, pooled = np.sqrt(v[0]/n0+v[1]/n1), np.sqrt((n0*v[0]+n1*v[1])/(n0+n1)*(1/n0+1/n1))
        d, ok, df = m[1]-m[0], np.minimum(n0, n1) >= start, np.minimum(n0, n1)-1.
        out = []
        for se in (own, pooled, np.maximum(own, pooled)):
            for sign, sides, level in ((1, 2, .05), (1, 1, .01), (-1, 1, .01)): out.append(((log_mixture(sign*d, se, *effects(.1*sd, sides), df=df) >= math.log(1/level)) & ok).any(1))
        return np.stack(out, 1)
    return chunks(reps, fire, 50).mean(0).reshape(3, 3)

def metrics():
    "Name, sampler, standard deviation, units of the small arm before a look counts"
    yield 'ratings, 3 % ones, else fives', lambda r, s: np.where(r.random(s) < .03, 1., 5.), 4*math.sqrt(.03*.97), 30
    yield 'ratings 85 % 5, 8 % 4, 7 % 1', lambda r, s: np.array([5., 4., 1.])[np.searchsorted([.85, .93], r.random(s))], 1.03, 30
    for sigma in (1., 2.):
        cap = math.exp(2.326*sigma)
        draw = lambda r, s, sigma=sigma, cap=cap: np.minimum(r.lognormal(0, sigma, s), cap)
        yield f'cost, log-normal {sigma:g}, capped at p99', draw, float(draw(np.random.default_rng(0), 100_000).std()), 400

if __name__ == '__main__':
    a = argparse.ArgumentParser(); a.add_argument('--reps', type=int, default=2000); a.add_argument('--part', choices=['rates', 'means'], default=None); a = a.parse_args(); reps = a.reps
    if a.part != 'rates':
        print("means without a difference, 100 looks of 200 requests; two-sided at 5 % / harm up at 1 % / harm down at 1 %, by standard error: own, pooled, the larger")
        for name, draw, sd, start in metrics():
            for share in (.5, .05): print(f"  {name}, {1-share:.0%}/{share:.0%}: " + ', '.join(' / '.join(f"{v:.2%}" for v in row) for row in scores(draw, sd, start, share, reps)), flush=True)
    if a.part == 'means': raise SystemExit
    print("requests over the limit ln(20)/KL (found by six times the limit)")
    for p0, p1, mde, share, base in ((.80, .84, .04, .5, .8), (.80, .84, .04, .5, None), (.80, .84, .04, .05, .8), (.50, .54, .04, .5, .5), (.95, .97, .02, .5, .95), (.99, .995, .005, .05, .99), (.80, .82, .04, .5, .8), (.80, .88, .04, .5, .8)):
        m, e, f = requests(p0, p1, mde, share, reps, base)
        print(f"  {p0:.1%} → {p1:.1%}, designed for {100*mde:g} points, {1-share:.0%}/{share:.0%}, base {'named' if base else 'unknown'}: {m:.3f} ± {e:.3f} ({f:.1%})", flush=True)
    print(f"false alarms in 400 looks of 100 requests, ± {math.sqrt(.05*.95/reps):.2%}: exact, mixture with burn-in and pooled variance, plug-in")
    for share in (.5, .05):
        for p in (.5, .8, .95, .99, .995): print(f"  {1-share:.0%}/{share:.0%}, success {p:.1%}: " + ', '.join(f"{v:.2%}" for v in alarms(p, share, reps)), flush=True)
    c, e = split(5*reps)
    print(f"clean splits in 200 looks: chi-square {c:.1%}, e-process {e:.3%} of {5*reps:,}")
