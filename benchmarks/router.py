"""How long a routing decision takes: features, learned chances, live state, price and reasons.

    python benchmarks/router.py            a few seconds; aim: 1 ms

Prompts of 10 to 100,000 words and a whole chat body, two and ten models, by rule, learned, and learned in plain Python as in the gateway (`light`). The estimate is trained here on made answers; its size does not depend on what it learned. Figures are
microseconds per `choose`: wall, and processor time of the thread (`cpu`), which is what remains on a machine that does other things besides.
"""
import argparse, os, platform, time
import numpy as np, polars as pl

from somaagent.llm.difficulty import train
from somaagent.llm.hardness import Light, features
from somaagent.llm.route import Router

TEN = ["openai/gpt-4o-mini", "openai/gpt-4o", "openai/gpt-4.1", "openai/gpt-4.1-mini", "openai/gpt-5", "openai/gpt-5-mini", "openai/gpt-4-turbo", "openai/gpt-4", "openai/gpt-3.5-turbo", "anthropic/claude-3-haiku-20240307"]

def estimate(models, n=300):
    rng = np.random.default_rng(0)
    words = [f"word{k}" for k in range(400)]
    k = rng.integers(1, 30, n)
    prompts = [" ".join(rng.choice(words, j)) + f" {j}?" for j in k]
    est = train(pl.concat([pl.DataFrame(dict(prompt=prompts, model=m, good=(rng.random(n) < 1/(1+np.exp(.15*(k-12-i)))).astype(int))) for i, m in enumerate(models)]), strengths=(3.,), folds=3)
    assert est.card["useful"]
    return est

def timed(fn, n):
    for _ in range(20): fn()
    t = np.empty((2, n))
    for i in range(n):
        a, b = time.perf_counter_ns(), time.thread_time_ns()
        fn()
        t[:, i] = time.perf_counter_ns()-a, time.thread_time_ns()-b
    return np.quantile(t/1e3, [.5, .95, .99], axis=1).T

def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--n", type=int, default=1000)
    a = ap.parse_args()
    rng = np.random.default_rng(1)
    text = lambda n: " ".join(f"{rng.choice(['add', 'boxes', 'how', 'many', 'of'])}{rng.integers(0, 999)}" if j % 3 else str(rng.integers(0, 9999)) for j in range(n))
    asks = {f"{n:,} words": text(n) for n in (10, 60, 1000, 20_000)} | {"chat of 20 turns": dict(messages=[dict(role="user" if j % 2 == 0 else "assistant", content=text(60)) for j in range(21)], max_tokens=200)}
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}; {a.n} decisions each, µs\n\n{'models':>6} {'chances':>8} {'request':>18} {'p50':>7} {'p95':>7} {'p99':>7} {'cpu p50':>8} {'cpu p99':>8}")
    for models in (TEN[:2], TEN):
        full = estimate(models)
        for name, est in (("rule", None), ("learned", full), ("light", Light(full.light()))):
            r = Router(models, est, epsilon=.05)
            for what, q in asks.items():
                w, c = timed(lambda: r.choose(q), a.n)
                print(f"{len(models):>6} {name:>8} {what:>18} {w[0]:7.0f} {w[1]:7.0f} {w[2]:7.0f} {c[0]:8.0f} {c[2]:8.0f}", flush=True)
    q = asks["60 words"]
    print(f"features alone, 60 words: {timed(lambda: features(q), a.n)[1, 0]:.0f} µs cpu")

if __name__ == "__main__": main()
