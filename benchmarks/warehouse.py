"""How fast the warehouse takes interactions and answers a dashboard.

    python benchmarks/warehouse.py                          both tables; dashboard on 1 M rows
    python benchmarks/warehouse.py --rows 1000000 10000000  dashboard on 1 M and on 10 M rows
    python benchmarks/warehouse.py --no-insert --rows 10000000

Inserts: durable (the table is fsynced on insert, the call returns afterwards), through the public `Warehouse` API, beside plain clickhouse-connect on the same chDB in the same process, into a table
of the same definition. The two alternate, round by round, so that a busy machine is unfair to both alike; figures are medians over the rounds.
Dashboard: generated calls (`somaagent.store.sample`, a month), medians of 7 after one unmeasured run; `cold` is that first run, on a freshly opened warehouse. Peak memory is of this process.
"""
import argparse, datetime as dt, os, platform, random, resource, statistics as st, sys, tempfile, time
from decimal import Decimal

NOW = dt.datetime(2026, 10, 1, tzinfo=dt.timezone.utc)
words = "order refund delivery invoice account password late broken thanks please cancel change address payment card".split()

def interactions(n, start=0):
    r = random.Random(start)
    return [dict(id=f"int_{start+i:012d}", ts=NOW + dt.timedelta(milliseconds=37*(start+i)), app="desk", user_id=f"u{r.randrange(5000)}", session_id=f"s{r.randrange(20000)}", prompt=" ".join(r.choices(words, k=20)),
                 answer=" ".join(r.choices(words, k=60)), model="tiny", provider="local", category=r.choice(words), prompt_tokens=r.randrange(20, 200), completion_tokens=r.randrange(20, 300),
                 cost_usd=Decimal(r.randrange(10**6)).scaleb(-9), latency_ms=r.lognormvariate(6, .5), status="ok", rating=float(r.randrange(1, 6)), meta=dict(lang="en")) for i in range(n)]

def table(title, head, rows):
    cells = [head, *[[f"{x:,.0f}" if isinstance(x, float) and x >= 100 else f"{x:.3g}" if isinstance(x, float) else f"{x:,}" if isinstance(x, int) else str(x) for x in r] for r in rows]]
    w = [max(len(c[i]) for c in cells) for i in range(len(head))]
    print(f"\n{title}\n")
    for k, c in enumerate(cells):
        print("| " + " | ".join(v.ljust(n) if i == 0 else v.rjust(n) for i, (v, n) in enumerate(zip(c, w))) + " |")
        if not k: print("|" + "|".join("-"*(n+1) + ("-" if i == 0 else ":") for i, n in enumerate(w)) + "|")
    sys.stdout.flush()

def timed(f):
    t = time.perf_counter(); f(); return time.perf_counter() - t

def bench_insert(home, rounds):
    import clickhouse_connect
    from somaagent.store.warehouse import Warehouse
    wh = Warehouse(f"chdb://{home}/direct", mode="direct")
    two = Warehouse(f"chdb://{home}/shared", mode="shared", idle_s=300)
    wh.command("CREATE TABLE raw_interactions AS interactions")
    raw = clickhouse_connect.get_client(interface="chdb", path=str(wh.path))
    cols = list(interactions(1)[0])
    out, at = [], 0
    for size, calls in ((1, 60), (100, 15), (1000, 8), (10_000, 3), (100_000, 1)):
        took = dict(raw=[], ours=[], shared=[])
        for k in range(rounds + 1):  # the first round is not counted
            batches = [interactions(size, at + i*size) for i in range(calls)]
            lists = [[[r[c] for c in cols] for r in b] for b in batches]  # the driver's own form, made outside the clock
            at += size*calls
            for name, f in (("raw", lambda: [raw.insert("raw_interactions", b, column_names=cols) for b in lists]), ("ours", lambda: [wh.insert("interactions", b) for b in batches]),
                            ("shared", lambda: [two.insert("interactions", b) for b in batches])):
                t = timed(f)
                if k: took[name].append(size*calls/t)
        r, o, s = (st.median(took[n]) for n in ("raw", "ours", "shared"))
        out.append([f"{size:,}", o, s, r, o/r, s/r])
    n = wh.query("SELECT (SELECT count() FROM interactions) a, (SELECT count() FROM raw_interactions) b").row(0)
    assert n[0] == n[1] == two.query("SELECT count() n FROM interactions")["n"][0] == at, "rows were lost or doubled"
    raw.close(); wh.close(); two.close()
    os.kill(two.server["pid"], 15)
    table("Interactions stored per second, durable", ["rows per call", "Warehouse, direct", "Warehouse, shared", "clickhouse-connect on chDB", "direct / raw", "shared / raw"], out)

QUESTIONS = {
    "last 48 hours by hour, one app: calls, errors, p95, p99": "SELECT hour, sum(h.calls) calls, sum(h.errors) errors, quantilesTDigestMerge(0.5,0.95,0.99)(latency_quantiles) q FROM model_performance_hourly h WHERE app='desk' AND hour >= {end:DateTime64(0,'UTC')} - INTERVAL 48 HOUR GROUP BY hour ORDER BY hour",
    "whole month by hour, app and model: calls, errors, mean, p95, p99": "SELECT * FROM model_performance ORDER BY hour, app, model",
    "whole month by day and model: exact cost": "SELECT day, model, sum(cost_usd) usd FROM model_cost GROUP BY day, model ORDER BY day, model",
    "the same p95, p99 by hour, from the raw rows (for comparison)": "SELECT toStartOfHour(ts) h, app, model, count(), quantilesTDigest(0.5,0.95,0.99)(latency_ms) q FROM model_usage GROUP BY h, app, model ORDER BY h, app, model",
}
def bench_dashboard(home, rows):
    from somaagent.store.sample import sample
    from somaagent.store.warehouse import Warehouse
    url = f"chdb://{home}/dash{rows}"
    with Warehouse(url, mode="direct") as wh:
        fill = timed(lambda: sample(wh, rows, end=NOW))
        assert wh.query("SELECT count() n FROM model_usage")["n"][0] == wh.query("SELECT sum(calls) n FROM model_performance")["n"][0] == wh.query("SELECT sum(calls) n FROM model_cost")["n"][0] == rows
    out = []
    with Warehouse(url, mode="direct") as wh:
        for q, sql in QUESTIONS.items():
            ask = lambda: wh.query(sql, dict(end=NOW))
            cold, n = timed(ask), len(ask())
            out.append([q, n, cold*1000, st.median(timed(ask) for _ in range(7))*1000])
    table(f"Dashboard on {rows:,} calls (generated and stored with both roll-ups in {fill:.1f} s, {rows/fill:,.0f} rows/s)", ["question", "rows back", "cold ms", "median ms"], out)

def machine():
    import chdb, clickhouse_connect
    cpu = next((l.split(":")[1].strip() for l in open("/proc/cpuinfo") if l.startswith("model name")), platform.processor()) if os.path.exists("/proc/cpuinfo") else platform.processor()
    print(f"{cpu}, {len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f} | Python {platform.python_version()}, chdb {chdb.__version__}, clickhouse-connect {clickhouse_connect.common.version()}")

if __name__ == "__main__":
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--rows", type=int, nargs="*", default=[1_000_000], help="dashboard sizes (default: 1000000)")
    ap.add_argument("--rounds", type=int, default=5, help="insert rounds that count (default: 5)")
    ap.add_argument("--no-insert", action="store_true", help="only the dashboard")
    a = ap.parse_args()
    machine()
    with tempfile.TemporaryDirectory() as home:
        if not a.no_insert: bench_insert(home, a.rounds)
        for n in a.rows: bench_dashboard(home, n)
    print(f"\npeak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/2**10:,.0f} MiB")
