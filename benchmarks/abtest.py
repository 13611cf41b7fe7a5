"""A whole experiment's statistics: one statement in the warehouse, beside libraries that fetch the rows.

    python benchmarks/abtest.py                      10 M requests of about 500 k users, four arms (a few minutes, 3 GB of memory with the peers)
    python benchmarks/abtest.py --rows 1000000       smaller
    python benchmarks/abtest.py --sides ours,floor   without the peers (sides: floor, ours, capped, quantiles, rollup, polars, pandas, tea, assign)

The requests are made by the engine itself and lie in `interactions`. Every side answers the same question: seven metrics (success, errors, stars, good ratings, cost, latency, tokens) of four arms by user,
with means and covariances between users, so that any lift follows. `floor` is the least a scan can do: four sums per arm. polars, pandas and tea-tasting fetch the columns they need over Arrow and sum up per user themselves;
tea-tasting is given the per-user frame of polars and computes its aggregates from it. Sides run in turn, round by round, after one unmeasured run each; figures are medians, wall seconds and processor seconds of this process.
"""
import argparse, os, platform, resource, statistics as st, tempfile, time

from somaagent.abtest.aggregate import aggregate
from somaagent.abtest.assign import Assigner, assign_sql
from somaagent.abtest.quantile import quantile_lifts
from somaagent.abtest.rollup import Rollup
from somaagent.abtest.spec import Metric
from somaagent.core.records import Experiment
from somaagent.store.warehouse import Warehouse

ARMS, T0, DAYS = ["control", "b", "c", "d"], 1_790_000_000_000, 28
METRICS = [Metric("success"), Metric("errors", value="error", role="secondary", direction="down"), Metric("stars", "mean", "rating", role="secondary"), Metric("good", value="good", role="secondary"),
           Metric("cost", "mean", "cost_usd", role="secondary", direction="down"), Metric("latency", "mean", "latency_ms", role="secondary", direction="down"), Metric("tokens", "mean", "tokens", role="secondary")]
CAPPED = [m if m.name not in ("cost", "latency") else Metric(m.name, "mean", m.value, role="secondary", direction="down", cap=.99) for m in METRICS]
QUANTILES = [Metric(f"p{round(100*q)}", "quantile", "latency_ms", q=q, role="secondary", direction="down") for q in (.5, .95, .99)]

def fill(wh, rows, slice_rows=500_000):
    "Requests whose users differ, in arms by user"
    users = max(8, rows//20)
    for a in range(0, rows, slice_rows):
        wh.command("""INSERT INTO interactions (id, ts, app, user_id, session_id, model, category, prompt_tokens, completion_tokens, cost_usd, latency_ms, status, rating, experiment, arm)
WITH cityHash64(number, 1) AS h, toUInt32({users:UInt32} * pow((h % 1000003) / 1000003., 1.3)) AS u, cityHash64(u, 7) AS hu, (intDiv(h, 1000003) % 1000003 + 1) / 1000004. AS v,
  (cityHash64(number, 3) % 1000003) / 1000003. AS w, sqrt(-2*log(v)) * cos(2*pi()*w) AS z
SELECT concat('int_', leftPad(toString(number), 22, '0')), fromUnixTimestamp64Milli({t0:Int64} + toInt64(number * ({span:Float64} / {rows:UInt64})), 'UTC'), 'desk', concat('user_', leftPad(toString(u), 8, '0')), concat('s', toString(u), '_', toString(h % 5)),
  'm', ['a', 'b', 'c', 'd'][1 + h % 4], toUInt32(20 + h % 300), toUInt32(30 + h % 170), CAST(h % 100000 AS Decimal(18, 0)) * toDecimal64('0.000000001', 9), exp(6 + 0.5*z), if(cityHash64(number, 5) % 100 < 82 + hu % 9, 'ok', 'error'),
  if(h % 5 = 0, 1 + cityHash64(number, 9) % 5, NULL), 'exp_bench', ['control', 'b', 'c', 'd'][1 + intDiv(hu, 64) % 4]
FROM numbers({a:UInt64}, {n:UInt64})""", dict(users=users, t0=T0, span=DAYS*864e5, rows=rows, a=a, n=min(slice_rows, rows-a)), settings=dict(max_partitions_per_insert_block=0))
    wh.command("OPTIMIZE TABLE interactions FINAL")

FLOOR = "SELECT arm, sum(status = 'ok') AS ok, sum(cost_usd) AS cost, sum(latency_ms) AS ms, sum(rating) AS stars FROM interactions WHERE experiment = 'exp_bench' GROUP BY arm"
FETCH = "SELECT arm, user_id, status = 'ok' AS ok, rating, cost_usd, latency_ms, prompt_tokens + completion_tokens AS tokens FROM interactions WHERE experiment = 'exp_bench'"
SUMS = ["requests", "ok", "error", "rating", "rated", "good", "cost_usd", "latency_ms", "timed", "tokens"]

def per_user(df):
    import polars as pl
    return df.lazy().group_by("arm", "user_id").agg(requests=pl.len().cast(pl.Float64), ok=pl.col("ok").sum().cast(pl.Float64), error=(1-pl.col("ok").cast(pl.Float64)).sum(), rating=pl.col("rating").sum(), rated=pl.col("rating").is_not_null().sum().cast(pl.Float64),
        good=(pl.col("rating") >= 4).sum().cast(pl.Float64), cost_usd=pl.col("cost_usd").cast(pl.Float64).sum(), latency_ms=pl.col("latency_ms").sum(), timed=pl.col("latency_ms").is_not_null().sum().cast(pl.Float64), tokens=pl.col("tokens").sum().cast(pl.Float64)).collect()

def with_polars(wh):
    import numpy as np
    u = per_user(wh.query(FETCH))
    return {a[0]: (g.height, g.select(SUMS).mean().row(0), np.cov(g.select(SUMS).to_numpy(), rowvar=False)) for a, g in u.group_by("arm")}

def with_pandas(wh):
    d = wh.arrow(FETCH).to_pandas()
    d["error"], d["rated"], d["good"], d["timed"], d["requests"], d["cost_usd"] = 1-d["ok"].astype(float), d["rating"].notna(), d["rating"] >= 4, d["latency_ms"].notna(), 1, d["cost_usd"].astype(float)
    u = d.groupby(["arm", "user_id"], observed=True, sort=False)[SUMS].sum().reset_index()
    return {a: (len(g), g[SUMS].mean(), g[SUMS].astype(float).cov()) for a, g in u.groupby("arm", observed=True)}

def with_tea(wh):
    import tea_tasting as tt
    u = per_user(wh.query(FETCH))
    pairs = [("ok", "requests"), ("error", "requests"), ("rating", "rated"), ("good", "rated"), ("cost_usd", "requests"), ("latency_ms", "timed"), ("tokens", "requests")]
    return tt.Experiment({n: tt.RatioOfMeans(n, d) for n, d in pairs}, variant="arm").analyze(u, all_variants=True)

class Bench:
    def __init__(self, home, rows):
        self.wh = Warehouse(f"chdb://{home}/wh", mode="direct")
        t = time.perf_counter(); fill(self.wh, rows); self.filled = time.perf_counter()-t
        self.x = Experiment(id="exp_bench", name="four models", arms=[dict(name=a, weight=.25) for a in ARMS])
        self.roll = Rollup(self.x, self.wh, METRICS, min_rows=1, settle_s=0)
        self.end = (T0 + int(DAYS*864e5*.97))/1000  # the last 3 % of the time are the tail
    def now(self): import datetime as dt; return dt.datetime.fromtimestamp(self.end, dt.timezone.utc)
    def floor(self): self.wh.query(FLOOR)
    def ours(self): return aggregate(self.x, self.wh, METRICS)
    def capped(self): return aggregate(self.x, self.wh, CAPPED)
    def quantiles(self): return quantile_lifts(self.x, self.wh, QUANTILES)
    def rollup(self): return self.roll.aggregate(now=self.now())
    def polars(self): return with_polars(self.wh)
    def pandas(self): return with_pandas(self.wh)
    def tea(self): return with_tea(self.wh)

NAMES = dict(floor="four sums per arm (the floor)", ours="`aggregate`: 7 metrics, moments by user", capped="`aggregate`, cost and latency capped at p99", quantiles="`quantile_lifts`: p50, p95, p99 by user", rollup="`Rollup`: check, refresh, read",
             polars="polars: fetch, sum, covariances", pandas="pandas: fetch, sum, covariances", tea="tea-tasting over polars: fetch, sum, analyze")

def rounds(b, sides, repeats):
    wall, cpu = {s: [] for s in sides}, {s: [] for s in sides}
    for k in range(repeats+1):
        for s in sides:
            t, c = time.perf_counter(), time.process_time(); getattr(b, s)()
            w, c = time.perf_counter()-t, time.process_time()-c
            print(f"round {k}: {s} {w:.2f} s, {c:.2f} processor s", flush=True)
            if k: wall[s].append(w); cpu[s].append(c)
    return {s: (st.median(wall[s]), st.median(cpu[s]), min(wall[s])) for s in sides}

def check(b, sides):
    "All sides saw the same"
    import math
    a = b.ours()
    if "polars" in sides:
        for k, (n, mean, cov) in b.polars().items():
            m = a.arms[k]
            assert m.n == n and all(math.isclose(m.at(s), v, rel_tol=1e-9) for s, v in zip(SUMS, mean)), k
            for i, s in enumerate(SUMS): assert math.isclose(m.cov[m.names.index(s), m.names.index("requests")], cov[i, 0], rel_tol=1e-6, abs_tol=1e-12), (k, s)
    if "rollup" in sides:
        r = b.rollup()
        assert all(r.arms[k].n == m.n and r.arms[k].pick(["ok", "latency_ms"]).cov[0, 1] - m.pick(["ok", "latency_ms"]).cov[0, 1] < 1e-6*m.pick(["latency_ms"]).cov[0, 0] for k, m in a.arms.items())
    return a

def assignment(b, n=20_000_000, calls=300_000):
    "Nanoseconds per call in Python, millions a second in SQL"
    one = Assigner(b.x).arm
    ids = [f"user_{i:08d}" for i in range(calls)]
    py = min(_loop(one, ids) for _ in range(5))/calls
    expr, p = assign_sql(b.x, "u")
    bare = "SELECT sum(length(u)) FROM (SELECT concat('user_', toString(number)) AS u FROM numbers_mt({n:UInt64}))"
    made, took = [], []
    for _ in range(3):
        t = time.perf_counter(); b.wh.query(bare, dict(n=n)); made.append(time.perf_counter()-t)
        t = time.perf_counter(); b.wh.query(f"SELECT arm, count() FROM (SELECT {expr} AS arm FROM (SELECT concat('user_', toString(number)) AS u FROM numbers_mt({{n:UInt64}}))) GROUP BY arm", p | dict(n=n)); took.append(time.perf_counter()-t)
    return py, n/min(took), n/max(1e-9, min(took)-min(made))
def _loop(f, ids):
    t = time.perf_counter()
    for i in ids: f(i)
    return time.perf_counter()-t

def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--rows", type=int, default=10_000_000); ap.add_argument("--repeats", type=int, default=5)
    ap.add_argument("--sides", default="floor,ours,capped,quantiles,rollup,polars,pandas,tea,assign")
    a = ap.parse_args()
    sides = a.sides.split(",")
    with tempfile.TemporaryDirectory() as home:
        b = Bench(home, a.rows)
        users = b.wh.query("SELECT uniqExact(user_id) AS n FROM interactions")["n"][0]
        print(f"{a.rows:,} requests, {users:,} users, {len(ARMS)} arms; made in {b.filled:.0f} s; {os.cpu_count()} cores ({platform.machine()}), load {os.getloadavg()[0]:.1f}", flush=True)
        check(b, sides)
        got = rounds(b, [s for s in sides if s != "assign"], a.repeats)
        base = got.get("floor")
        print(f"\nmedians of {a.repeats} rounds in turn\n\n| | wall s | best s | processor s | × floor (processor) |\n|---|---|---|---|---|")
        for s, (w, c, m) in got.items(): print(f"| {NAMES[s]} | {w:.2f} | {m:.2f} | {c:.2f} | {c/base[1] if base else float('nan'):.1f} |")
        if "rollup" in sides: print(f"\nroll-up: {b.roll.refreshed}")
        if "assign" in sides:
            py, sql, net = assignment(b)
            print(f"\nassignment: {1e9*py:.0f} ns per call in Python; {sql/1e6:.0f} M/s in SQL with making the names, {net/1e6:.0f} M/s without")
        print(f"\nload {os.getloadavg()[0]:.1f} at the end; peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss//1024:,} MB")
        b.wh.close()

if __name__ == "__main__": main()
