"""Rows for the stores' tests, in a module that their child processes import quickly."""
import datetime as dt
from decimal import Decimal

NOW = dt.datetime(2026, 10, 1, 12, tzinfo=dt.timezone.utc)

def usage(n, batch=0): return [dict(ts=NOW + dt.timedelta(minutes=i), id=f"{batch}-{i}", app="desk", model=f"m{i%2}", prompt_tokens=i, completion_tokens=1, cost_usd=Decimal("0.000000001"),
                                    latency_ms=10. + i, status="error" if i % 5 == 0 else "ok") for i in range(n)]
