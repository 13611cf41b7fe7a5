"Schedules: against an independent calendar, through every change of the clocks, with several schedulers at once, with kill -9, for real, and in the words of Kubernetes, Airflow and JupyterLab."
import ast, datetime as dt, functools, json, os, random, re, shlex, signal, subprocess, sys, threading, time
from pathlib import Path
from zoneinfo import ZoneInfo

import nbformat
import pytest
import yaml
from click.testing import CliRunner
from nbformat.v4 import new_code_cell, new_notebook

from conftest import missing
from somaagent.cli.schedule import schedule as soma_schedule
from somaagent.core.errors import RunError
from somaagent.runs.export import airflow_dag, cron_job
from somaagent.runs.record import find_run, list_runs
from somaagent.runs.schedule import Schedules
from somaagent.runs.scheduler import Scheduler, SimulatedClock, pretend, run_scheduler
from somaagent.runs.slots import UTC, Rule, cron_next, instants, parse_cron, time_zone
from somaagent.store.state import State
from test_store import postgres, state_url  # noqa: F401

def at(*t): return dt.datetime(*t, tzinfo=UTC)

# ---- when ------------------------------------------------------------------------------------------------------------------------------------------------------

@functools.lru_cache(None)
def values(field, lo, hi):
    "A second reading of a cron field, for numbers only"
    out = set()
    for part in field.split(","):
        span, _, step = part.partition("/")
        a, b = (lo, hi) if span == "*" else map(int, span.split("-")) if "-" in span else (int(span), hi if step else int(span))
        out |= set(range(a, b+1, int(step or 1)))
    return out

def fits(line, t):
    m, h, d, mo, w = line.split()
    day, week = t.day in values(d, 1, 31), t.isoweekday() % 7 in {v % 7 for v in values(w, 0, 7)}
    either = day or week if d != "*" and w != "*" else day and week
    return t.minute in values(m, 0, 59) and t.hour in values(h, 0, 23) and t.month in values(mo, 1, 12) and either

def by_minutes(line, zone, start, end):
    "Every minute of the world is looked at, and every minute that the wall clock leaves out"
    out, t, before, often = [], start, None, len(values(line.split()[1], 0, 23)) == 24
    while t <= end:
        here = t.astimezone(zone)
        wall = here.replace(tzinfo=None)
        if before is not None and wall - before > dt.timedelta(minutes=1) and not often:
            left_out = [before + dt.timedelta(minutes=k) for k in range(1, int((wall-before).total_seconds())//60)]
            if any(fits(line, w) for w in left_out): out.append(t)
        if fits(line, wall) and (often or not here.fold) and t not in out: out.append(t)
        t, before = t + dt.timedelta(minutes=1), wall
    return out

changes = [("Europe/Berlin", 2026, 3, 28), ("Europe/Berlin", 2026, 10, 24), ("America/New_York", 2026, 3, 7), ("America/New_York", 2026, 10, 31), ("Australia/Lord_Howe", 2026, 4, 4), ("Australia/Lord_Howe", 2026, 10, 3),
           ("America/St_Johns", 2026, 3, 7), ("Pacific/Apia", 2011, 12, 29), ("Asia/Kolkata", 2026, 3, 28)]
@pytest.mark.parametrize("zone,year,month,day", changes, ids=[f"{c[0]}-{c[1]}-{c[2]}" for c in changes])
def test_against_a_calendar_reckoned_by_minutes(zone, year, month, day):
    rng, tz = random.Random(f"{zone}{month}"), ZoneInfo(zone)
    start, end = at(year, month, day), at(year, month, day) + dt.timedelta(days=3)
    lines = ["30 2 * * *", "0 2 * * *", "*/30 * * * *", "15 1-3 * * *", "0 0 * * 0", "45 1 * * 0,6", "0 */2 * * *", "59 23 * * *", "0 0 * * *"]
    lines += [f"{rng.choice(['*/20', '0,30', str(rng.randrange(60))])} {rng.choice(['*', '0-4', '*/3', str(rng.randrange(4))])} {rng.choice(['*', '*', str(min(day+1, 28))])} * {rng.choice(['*', '*', '0,3', '5-7'])}" for _ in range(4)]
    for line in lines:
        rule, got, t = Rule(parse_cron(line), timezone=zone), [], start - dt.timedelta(seconds=1)
        while (t := rule.next(t)) and t <= end: got.append(t)
        want = by_minutes(line, tz, start, end)
        assert got == want, (line, zone, [str(t) for t in set(got) ^ set(want)])

def test_fixed_hours_once_a_day_for_ten_years():
    for zone in ("Europe/Berlin", "America/New_York", "Australia/Lord_Howe"):
        rule, tz = Rule(parse_cron("30 2 * * *"), timezone=zone), ZoneInfo(zone)
        days = [t.astimezone(tz).date() for t in rule.first(730, at(2025, 12, 31, 18))]
        assert days == [days[0] + dt.timedelta(days=k) for k in range(730)]

def test_month_ends_leap_days_names_and_weekdays():
    after = lambda line, *t: [x.strftime("%Y-%m-%d") for x in Rule(parse_cron(line)).first(3, at(*t))]
    assert after("0 0 31 * *", 2026, 1, 31) == ["2026-03-31", "2026-05-31", "2026-07-31"]
    assert after("0 0 L * *", 2027, 12, 1) == ["2027-12-31", "2028-01-31", "2028-02-29"]
    assert after("0 0 29 2 *", 2096, 3, 1) == ["2104-02-29", "2108-02-29", "2112-02-29"]
    assert after("@weekly", 2026, 11, 22, 1) == ["2026-11-29", "2026-12-06", "2026-12-13"] == after("0 0 * * 7", 2026, 11, 22, 1) == after("0 0 * * SUN", 2026, 11, 22, 1)
    assert parse_cron("0 0 * * 5-7").sets[4] == {5, 6, 0} == parse_cron("0 0 * * fri-sun").sets[4] and parse_cron("0 0 * * */2").sets[4] == {0, 2, 4, 6}
    for name in ("@hourly", "@daily", "@midnight", "@monthly", "@yearly", "@annually"): assert Rule(parse_cron(name)).next(at(2026, 1, 1))

@pytest.mark.parametrize("line,field", [("60 * * * *", "minute"), ("* 24 * * *", "hour"), ("* * 0 * *", "day of month"), ("* * * 13 *", "month"), ("* * * * 8", "day of week"), ("* * * * mo", "day of week"), ("*/0 * * * *", "minute"), ("5-1 * * * *", "minute"),
    ("0 0 30 2 *", "day of month"), ("1,,2 * * * *", "minute"), ("* -1 * * *", "hour"), ("* * * * ٣", "day of week"), ("1.5 * * * *", "minute"), ("* * * jan-foo *", "month"), ("* * * *", "five fields"), ("0 * * * * *", "five fields"), ("", "five fields"),
    ("@reboot", "no such cron name")])
def test_bad_cron_names_the_field(line, field):
    with pytest.raises(RunError, match=field): parse_cron(line)

def test_intervals_do_not_drift_and_keep_to_their_span():
    rule = Rule(every=dt.timedelta(seconds=.7), anchor=at(2026, 1, 1), start=at(2026, 1, 1), end=at(2026, 1, 1, 0, 0, 7))
    got = rule.first(100, at(2025, 1, 1))
    assert len(got) == 11 and got[0] == at(2026, 1, 1) and got[-1] == at(2026, 1, 1, 0, 0, 7) and rule.next(got[-1]) is None
    year = Rule(every=dt.timedelta(seconds=.1), anchor=at(2026, 1, 1))
    assert year.next(at(2126, 1, 1, 0, 0, 0, 50_000)) == at(2126, 1, 1, 0, 0, 0, 100_000)
    assert rule.between(at(2025, 1, 1), at(2027, 1, 1), 3) == (got[-3:], 8, True)
    cron = Rule(parse_cron("*/5 * * * *"), timezone="Europe/Berlin", start=at(2026, 3, 28), end=at(2026, 3, 28, 0, 10))
    assert cron.first(9, at(2020, 1, 1)) == [at(2026, 3, 28), at(2026, 3, 28, 0, 5), at(2026, 3, 28, 0, 10)] == cron.between(at(2020, 1, 1), at(2027, 1, 1))[0]

def test_jitter_is_the_same_everywhere_and_never_overtakes():
    for rule in (Rule(parse_cron("*/2 * * * *")), Rule(parse_cron("30 2 * * *"), timezone="Europe/Berlin"), Rule(every=dt.timedelta(seconds=1), anchor=at(2026, 1, 1))):
        slots = rule.first(300, at(2026, 3, 1))
        due = [rule.due(t, 3600, "a") for t in slots]
        assert due == [rule.due(t, 3600, "a") for t in slots] == sorted(due) and all(t <= d < n for t, d, n in zip(slots, due, slots[1:])) and due != [rule.due(t, 3600, "b") for t in slots]

def test_time_zones():
    with pytest.raises(RunError, match="no such time zone.*Europe/Berlin"): time_zone("Europe/Berln")
    for bad in ("", "../etc/passwd", "/etc/localtime", "UTC\0"):
        with pytest.raises(RunError, match="no such time zone"): time_zone(bad)
    assert instants(dt.datetime(2026, 3, 29, 2, 30), ZoneInfo("Europe/Berlin")) == [at(2026, 3, 29, 1)]
    assert cron_next(parse_cron("0 3 30 12 *"), at(2011, 12, 1), ZoneInfo("Pacific/Apia")) == at(2011, 12, 30, 10)  # that day did not exist there

# ---- what becomes of a slot --------------------------------------------------------------------------------------------------------------------------------------

class World:
    "A store, a clock, a scheduler whose fires end when we say so"
    def __init__(self, st, book, start): self.now, self.book, self.open, self.log = start, book, [], []; self.st = Schedules(st, clock=lambda: self.now); self.sch = Scheduler(self.st, lambda: self.now, self.launch, parallel=100)
    def launch(self, f): self.open.append(self.st.begin(f.id, f.token, self.now)); self.log.append(f.slot)
    def make(self, name="job", **kw): return self.st.create(name, dict(notebook=self.book), **({} if "every_s" in kw else dict(cron="0 * * * *")) | kw)
    def to(self, *t): self.now = at(*t) if len(t) > 1 else t[0]; return self.sch.tick()
    def end(self, status="completed", error=""): f = self.open.pop(0); return self.st.finish(f.id, f.token, self.now, status, error)
    def said(self, name="job"): return [(f.slot.hour, f.status) for f in reversed(self.st.history(name, 1000))]

@pytest.fixture(scope="module")
def book(tmp_path_factory):
    f = tmp_path_factory.mktemp("books")/"tiny.ipynb"
    cells = [new_code_cell("n = 1", metadata=dict(tags=["parameters"])), new_code_cell("from pathlib import Path; from somaagent.runs.record import current_run; current_run().output('n', n)"), new_code_cell("if n < 0: raise ValueError('n is below zero')")]
    nbformat.write(new_notebook(cells=cells, metadata=dict(kernelspec=dict(name="python3", display_name="Python 3", language="python"))), f)
    return f

@pytest.fixture
def world(tmp_path, home, book):
    w = World(State(f"sqlite:///{tmp_path}/state.db"), book, at(2026, 11, 20, 0, 30))
    yield w
    w.st.state.close()

@pytest.mark.parametrize("missed,want", [("skip", [4]), ("once", [4]), ("all", [1, 2, 3, 4])])
def test_missed_and_then_on_time(world, missed, want):
    world.make(missed=missed, overlap="allow"); world.to(2026, 11, 20, 4, 0, 10)
    assert [t.hour for t in world.log] == want
    gone = [f for f in world.st.history("job") if f.cause == "missed"]
    assert [f.count for f in gone] == ([] if missed == "all" else [3]) and world.to(2026, 11, 20, 4, 30) == []

@pytest.mark.parametrize("missed,want", [("skip", []), ("once", [4]), ("all", [3, 4])])
def test_missed_and_late(world, missed, want):
    world.make(missed=missed, overlap="allow", bound=2); world.to(2026, 11, 20, 4, 20)
    assert [t.hour for t in world.log] == want
    assert sum(f.count for f in world.st.history("job")) == 4, "every slot is told of"
    world.to(2026, 11, 20, 5)
    assert [t.hour for t in world.log] == [*want, 5]

def test_all_missed_run_one_after_the_other_whatever_the_overlap(world):
    world.make(missed="all", overlap="skip"); world.to(2026, 11, 20, 3, 30)
    for hour in (1, 2, 3):
        assert [f.slot.hour for f in world.open] == [hour]
        world.end(); world.to(world.now)
    assert [s for _, s in world.said()] == ["completed"]*3

def test_overlap_skip_queue_allow_cancel(world):
    for o in ("skip", "queue", "allow", "cancel"): world.make(o, overlap=o, bound=2)
    world.to(2026, 11, 20, 1); world.to(2026, 11, 20, 2); world.to(2026, 11, 20, 3)
    assert world.said("skip") == [(1, "running"), (2, "skipped"), (3, "skipped")]
    assert world.said("queue") == [(1, "running"), (2, "queued"), (3, "queued")]
    assert world.said("allow") == [(1, "running"), (2, "running"), (3, "running")]
    assert world.said("cancel") == [(1, "running"), (2, "skipped"), (3, "queued")]
    old = next(f for f in world.open if f.name == "cancel")
    assert world.st.beat(old.id, old.token, world.now) == "cancel"
    world.st.finish(old.id, old.token, world.now, "cancelled"); world.to(world.now)
    assert world.said("cancel") == [(1, "cancelled"), (2, "skipped"), (3, "running")]
    world.to(2026, 11, 20, 4)
    assert world.said("queue")[-1] == (4, "skipped"), "two wait already"
    first = next(f for f in world.open if f.name == "queue")
    world.st.finish(first.id, first.token, world.now, "completed"); world.to(world.now)
    assert world.said("queue") == [(1, "completed"), (2, "running"), (3, "queued"), (4, "skipped")]

def test_retries_then_failures_in_a_row_then_a_pause(world):
    world.make(retries=1, retry_s=60, pause_after=2)
    for hour in (1, 2):
        world.to(2026, 11, 20, hour)
        assert world.end("failed", "no rows")["event"] == "retry"
        assert world.to(2026, 11, 20, hour, 0, 59) == [] and world.to(2026, 11, 20, hour, 1)[0]["text"].endswith("attempt 2")
        last = world.end("failed", "no rows")
    job = world.st.get("job")
    assert (last["event"], job.status, job.failures) == ("paused", "paused", 2) and "no rows" in job.reason
    assert world.to(2026, 11, 20, 3) == [] and [len(f.attempts) for f in world.st.history("job")] == [2, 2]
    world.st.resume("job"); world.to(2026, 11, 20, 4); world.end()
    assert world.st.get("job").failures == 0 and world.said()[-1] == (4, "completed")

def test_a_failed_attempt_that_waits_counts_as_at_work(world):
    world.make(retries=3, retry_s=7200); world.to(2026, 11, 20, 1); world.end("failed", "x")
    world.to(2026, 11, 20, 2)
    assert world.said() == [(1, "queued"), (2, "skipped")]

def test_the_clock_jumps(world):
    world.make(overlap="allow"); world.to(2026, 11, 20, 1); world.to(2026, 11, 20, 2)
    world.to(2026, 11, 20, 0, 10); world.to(2026, 11, 20, 1); world.to(2026, 11, 20, 2); world.to(2026, 11, 20, 3)
    assert [t.hour for t in world.log] == [1, 2, 3], "back: no slot twice, and it goes on"
    world.to(2031, 1, 1, 0, 30)
    assert world.log[-1] == at(2031, 1, 1) and len(world.log) == 4
    world.to(2026, 11, 20, 3, 30); world.to(2026, 11, 20, 4); world.to(2026, 11, 20, 5)
    assert [t.hour for t in world.log[4:]] == [4, 5], "forward by years and back: it does not fall silent"

def test_pause_resume_start_end_delete(world):
    world.make(start="2026-11-20T02:00", end="2026-11-20T05:00"); world.to(2026, 11, 20, 1)
    assert world.log == [] and world.st.next("job", 9) == [at(2026, 11, 20, h) for h in (2, 3, 4, 5)]
    world.to(2026, 11, 20, 2); world.end(); world.st.pause("job"); world.to(2026, 11, 20, 3, 30); world.st.resume("job"); world.to(2026, 11, 20, 4); world.end()
    assert [t.hour for t in world.log] == [2, 4] and world.to(2026, 11, 20, 5)[0]["event"] == "over" and world.st.get("job").status == "over"
    gone = world.st.delete("job")
    with pytest.raises(RunError, match="no such schedule"): world.st.get("job")
    assert len(world.st.history(gone.id)) == 3 and world.make().name == "job"

def test_what_is_refused(world, tmp_path, book):
    no = lambda match, **kw: pytest.raises(RunError, match=match)
    for match, kw in {"cron line or an interval": dict(cron=""), "interval is a tenth": dict(cron="", every_s=.01), "no such time zone": dict(timezone="Mars/Olympus"), "cannot have this missed": dict(missed="never"), "cannot have this retries": dict(retries=-1),
                      "would never fire": dict(end="2020-01-01"), "ends after it begins": dict(start="2027-01-02", end="2027-01-01"), "no such option": dict(color="red"), "no time": dict(start="tomorrow")}.items():
        with no(match): world.st.create("x", dict(notebook=book), **dict(cron="@daily") | kw)
    for match, what in {"runs one thing": {}, "no such notebook": dict(notebook="none.ipynb"), "no such parameter": dict(notebook=book, params=dict(m=1)), "no such option": dict(notebook=book, shell="rm"), "must be a reference": dict(notebook=book, secrets=dict(K="sk-1")),
                        "no such sweep": dict(sweep="none.yaml"), "there is no such workflow": dict(workflow="none")}.items():
        with no(match): world.st.create("x", what, cron="@daily")
    for name in ("", "Nightly", "a b", "-a", "x"*60, "a;b", "a\n"):
        with no("cannot have this name"): world.st.create(name, dict(notebook=book), cron="@daily")
    assert world.st.list() == []

def test_parallel_is_a_bound(world):
    for k in range(4): world.make(f"job{k}")
    world.sch.parallel = 3; world.to(2026, 11, 20, 1)
    assert len(world.open) == 3
    world.end(); world.to(world.now)
    assert len(world.open) == 3 and len(world.log) == 4

def test_through_both_changes_of_the_clocks(world, book):
    "Done when: a schedule fires with a simulated clock through a DST change"
    for start, until, want in [(at(2026, 3, 28), at(2026, 3, 31), ["28 02:30", "29 03:00", "30 02:30", "31 02:30"]), (at(2026, 10, 24), at(2026, 10, 27), ["24 02:30", "25 02:30", "26 02:30"])]:
        clock, fired = SimulatedClock(start, until), []
        st = Schedules(world.st.state, clock)
        st.create("backup", dict(notebook=book), cron="30 2 * * *", timezone="Europe/Berlin", overlap="allow", replace=True)
        run_scheduler(clock, threading.Event(), st, launch=pretend(st, lambda f: fired.append(f"{f.slot.astimezone(ZoneInfo('Europe/Berlin')):%d %H:%M}")))
        assert fired == want[:len(fired)] and len(fired) >= 3

# ---- several schedulers, and killed ones -------------------------------------------------------------------------------------------------------------------------

RACE = """
import sys, datetime as dt
from somaagent.store.state import State; from somaagent.runs.schedule import Schedules; from somaagent.runs.scheduler import Scheduler, pretend
t = [dt.datetime(2026,11,20,tzinfo=dt.timezone.utc)]
st = Schedules(State(sys.argv[1]), lambda: t[0]); log = open(sys.argv[2], "a")
sch = Scheduler(st, lambda: t[0], pretend(st, lambda f: print(f.name, f.slot.isoformat(), file=log, flush=True)), parallel=100)
sys.stdin.readline()
for k in range(20): t[0] += dt.timedelta(seconds=7); sch.tick()
"""
def test_three_schedulers_fire_every_slot_once(state_url, tmp_path, home, book):
    st = Schedules(State(state_url), lambda: at(2026, 11, 20))
    for k in range(2): st.create(f"job{k}", dict(notebook=book), every_s=10, overlap="queue", missed="all", bound=1000, grace_s=5)
    ps = [subprocess.Popen([sys.executable, "-c", RACE, state_url, str(tmp_path/f"log{i}")], stdin=subprocess.PIPE, text=True) for i in range(3)]
    for p in ps: p.stdin.write("\n"); p.stdin.flush()
    assert [p.wait(120) for p in ps] == [0, 0, 0]
    fired = [l for i in range(3) for l in (tmp_path/f"log{i}").read_text().splitlines()]
    assert len(fired) == len(set(fired)) == 2*14, "none twice, none lost"
    st.state.close()

def test_a_scheduler_killed_between_claim_and_start_loses_nothing(world):
    world.make(); world.now = at(2026, 11, 20, 1)
    code = f"import os, signal, datetime as dt; from somaagent.store.state import State; from somaagent.runs.schedule import Schedules; import somaagent.runs.fires; st = Schedules(State({str(world.st.state.url)!r})); t = dt.datetime(2026,11,20,1,tzinfo=dt.timezone.utc); st.arrange(t); f, _ = st.claim(t); print(f.id, f.token, flush=True); os.kill(os.getpid(), 9)"
    id, token = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True).stdout.split()
    assert [e["event"] for e in world.to(2026, 11, 20, 1, 0, 1)] == ["lost", "started"] and len(world.open) == 1
    assert world.st.begin(id, token, world.now) is None, "the old token opens nothing"
    for _ in range(6): world.st.put_back(world.open[0].id, world.open[0].token, world.now, "x")
    assert world.said() == [(1, "running")], "what has begun is not put back"

def test_a_process_that_dies_before_it_begins_is_not_started_for_ever(world):
    world.make()
    world.sch.launch = lambda f: subprocess.Popen([sys.executable, "-c", "raise SystemExit('no module named x')"], stderr=subprocess.DEVNULL)
    for k in range(12):
        world.to(2026, 11, 20, 1, 0, k)
        for c in world.sch.children.values(): c.wait()
    f = world.st.history("job")[0]
    assert (f.status, len(f.attempts)) == ("failed", 5) and world.st.get("job").failures == 1

def until(what, s=60):
    end = time.time()+s
    while not (got := what()):
        assert time.time() < end, "waited too long"
        time.sleep(.1)
    return got

def serve(home, *more): return subprocess.Popen([sys.executable, "-c", "from somaagent.cli.app import main; main()", "schedule", "serve", "--poll", ".2", *more], env=os.environ | dict(SOMA_STORES_HOME=str(home)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

def test_for_real_every_second_and_kill_minus_nine(home, book):
    "Done when: it fires for real; and a killed scheduler is followed by another"
    st = Schedules()
    st.create("tick", dict(notebook=book, params=dict(n=7)), every_s=1, overlap="skip")
    p = serve(home)
    until(lambda: any(f.status == "running" for f in st.history("tick")))
    p.kill(); p.wait()
    q = serve(home)
    until(lambda: sum(f.status == "completed" for f in st.history("tick", 100)) >= 2)
    st.pause("tick"); q.send_signal(signal.SIGTERM)
    out, _ = q.communicate(timeout=30)
    assert q.returncode == 0 and "started" in out and "stopped" in out
    until(lambda: not [f for f in st.history("tick", 100) if f.status in ("starting", "running")])
    fires = st.history("tick", 100)
    slots = [f.slot for f in fires if f.cause != "missed"]
    assert len(slots) == len(set(slots)) and not [f for f in fires if f.status == "failed"]
    first, last, counted = st.get("tick").anchor, max(slots), sum(f.count for f in fires)
    assert counted == round((last - first).total_seconds()), "every second is told of: run, skipped or missed"
    done = next(f for f in fires if f.status == "completed")
    parent, child = find_run(done.id), find_run(done.run)
    assert (parent.kind, parent.status, child.parent, child.outputs) == ("schedule", "completed", done.id, dict(n=7))

def test_a_failure_a_kill_and_a_cancellation_of_the_work(home, tmp_path):
    f = tmp_path/"hang.ipynb"
    nbformat.write(new_notebook(cells=[new_code_cell("import time; time.sleep(600)")], metadata=dict(kernelspec=dict(name="python3", display_name="Python 3", language="python"))), f)
    st = Schedules()
    for name in ("killed", "stopped"): st.create(name, dict(notebook=f), cron="@yearly"); st.run_now(name)
    sch = Scheduler(st, parallel=4)
    sch.tick()
    fire = {n: until(lambda n=n: next((x for x in st.history(n) if x.status == "running" and x.run and list_runs(parent=x.id)), None)) for n in ("killed", "stopped")}
    os.kill(fire["killed"].worker["pid"], signal.SIGKILL)
    with pytest.raises(RunError, match="runs at the moment"): st.run_now("stopped")
    with st.state.session() as s:
        from somaagent.store.state import FireRow
        s.get(FireRow, fire["stopped"].id).cancel_at = dt.datetime.now(UTC)
    until(lambda: (sch.tick(), st.history("killed")[0].status == "failed" and st.history("stopped")[0].status == "cancelled")[1])
    assert "without a word" in st.history("killed")[0].error and st.get("killed").failures == 1 and st.get("stopped").failures == 0
    assert find_run(fire["stopped"].run).status == "cancelled" and find_run(fire["killed"].run).status == "interrupted"

# ---- the command -----------------------------------------------------------------------------------------------------------------------------------------------

def test_the_command(home, book):
    def soma(*args, code=0):
        r = CliRunner().invoke(soma_schedule, [str(a) for a in args])
        assert r.exit_code == code, (args, r.output, r.exception)
        return r
    soma("list"); soma("create", "a", "--notebook", book, "-p", "n=-1", "--every", "3600", "--missed", "all", "--overlap", "queue", "--retries", 1, "--pause-after", 1, "--secret", "K=env:K")
    assert json.loads(soma("show", "a", "--json").stdout)["what"] == {"notebook": str(book), "params": {"n": -1}, "secrets": {"K": "env:K"}}
    for bad, say in [(["create", "b"], "one thing"), (["create", "b", "--notebook", book, "--capsule", "x", "--cron", "@daily"], "one thing"), (["create", "b", "--notebook", book, "-p", "n=x", "--cron", "@daily"], "wants int"),
                     (["create", "a", "--notebook", book, "--cron", "@daily"], "already"), (["show", "zz"], "There are: a"), (["perform", "{"], "not JSON"), (["perform", "[]"], "JSON object"), (["create", "c", "--notebook", book, "--secret", "hush", "--cron", "@daily"], "NAME=env")]:
        r = soma(*bad, code=1)
        assert say in r.stderr and "hush" not in r.stderr
    assert len(json.loads(soma("next", "a", "-n", 3, "--json").stdout)) == 3
    failed = soma("perform", json.dumps(dict(notebook=str(book), params=dict(n=-1))), code=1)
    assert "n is below zero" in failed.stderr
    assert soma("pause", "a").stdout == "a paused\n" and json.loads(soma("list", "--json").stdout)[0]["status"] == "paused" and soma("delete", "a").exit_code == 0

# ---- elsewhere ---------------------------------------------------------------------------------------------------------------------------------------------------

nasty = "it's {{ ds }} {% raw %} {# x #} $(id) $(API_KEY) `id` \"; rm -rf ~; # ${HOME} $$ \\ \n日本 }} .yaml"

@pytest.mark.parametrize("kw", [dict(cron="30 2 * * 5-7", timezone="Europe/Berlin", missed="once", overlap="skip"), dict(cron="@daily", missed="skip", overlap="allow"), dict(cron="0 0 1,15 * 1", overlap="cancel", missed="all", retries=3, jitter_s=9),
    dict(every_s=900, overlap="queue", pause_after=2, start="2027-01-01", end="2028-01-01")], ids=["skip", "allow", "cancel", "queue"])
def test_exports_hold_and_inject_nothing(world, book, kw):
    what = dict(notebook=book, secrets=dict(API_KEY="env:THEIR_KEY"))
    sch = world.st.create("night_ly", what, **kw)
    sch.what["params"] = dict(n=nasty)
    job = cron_job(sch, folder="/srv/books", gpu=1)
    obj = yaml.safe_load(job.text)
    try: import kubernetes_validate
    except ImportError: kubernetes_validate = None
    if kubernetes_validate: kubernetes_validate.validate(obj, "1.37", strict=True)
    spec, pod = obj["spec"], obj["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    assert set(spec) == {"schedule", "timeZone", "concurrencyPolicy", "startingDeadlineSeconds", "suspend", "successfulJobsHistoryLimit", "failedJobsHistoryLimit", "jobTemplate"} and spec["startingDeadlineSeconds"] >= 10
    assert spec["concurrencyPolicy"] == dict(skip="Forbid", queue="Forbid", allow="Allow", cancel="Replace")[sch.overlap] and spec["timeZone"] == sch.timezone and re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", obj["metadata"]["name"])
    args, env = pod["containers"][0]["args"], pod["containers"][0]["env"]
    assert "$" not in re.sub(r"\$\$", "", args[3]) and json.loads(args[3].replace("$$", "$"))["params"]["n"] == nasty
    assert dict(name="API_KEY", valueFrom=dict(secretKeyRef=dict(name="somaagent", key="THEIR_KEY"))) in env
    for image in ("", "registry.example/soma:1"):
        dag = airflow_dag(sch, image=image, folder="/srv/books")
        words, kwargs = read_dag(dag.text, image)
        assert words[:3] == ["soma", "schedule", "perform"] and json.loads(words[3])["params"]["n"] == nasty and json.loads(words[3])["notebook"] == "/srv/books/tiny.ipynb"
        assert kwargs["dag_id"] == "night_ly" and kwargs["catchup"] == (sch.missed == "all") and kwargs["max_active_runs"] == (16 if sch.overlap == "allow" else 1) and kwargs["max_consecutive_failed_dag_runs"] == sch.pause_after
        assert all(n.split()[0] in dag.text for n in dag.notes)

def read_dag(text, image):
    "Run a DAG file with stand-ins for Airflow's public names; what the shell would get, and the DAG's arguments"
    import jinja2, types
    from contextlib import nullcontext
    made, mods = {}, {n: types.ModuleType(n) for n in ("airflow", "airflow.sdk", "airflow.timetables", "airflow.timetables.trigger", "airflow.providers.standard.operators.bash", "airflow.providers.cncf.kubernetes.operators.pod")}
    def keep(name, *known):
        def call(*a, **kw):
            assert set(kw) <= set(known), f"{name} does not take {set(kw) - set(known)}"
            made[name] = kw | dict(args=a)
            return nullcontext()
        return call
    mods["airflow.sdk"].DAG = keep("DAG", "dag_id", "schedule", "start_date", "end_date", "catchup", "max_active_runs", "max_consecutive_failed_dag_runs", "is_paused_upon_creation", "default_args", "tags")
    mods["airflow.timetables.trigger"].CronTriggerTimetable, mods["airflow.timetables.trigger"].DeltaTriggerTimetable = keep("cron", "timezone", "interval"), keep("delta", "interval")
    mods["airflow.providers.standard.operators.bash"].BashOperator = keep("bash", "task_id", "bash_command", "append_env")
    mods["airflow.providers.cncf.kubernetes.operators.pod"].KubernetesPodOperator = keep("pod", "task_id", "image", "cmds", "arguments", "env_vars", "namespace")
    old = {n: sys.modules.get(n) for n in mods}
    try: sys.modules.update(mods); exec(compile(ast.parse(text), "dag.py", "exec"), {})
    finally:
        for n,m in old.items(): sys.modules.pop(n) if m is None else sys.modules.__setitem__(n, m)
    command = made["pod"]["arguments"][0] if image else made["bash"]["bash_command"]
    assert not command.endswith((".sh", ".bash", ".yaml", ".yml", ".json"))
    shell = jinja2.Environment().from_string(command).render(ds="X")
    if image:
        assert "$" not in re.sub(r"\$\$", "", shell)
        shell = shell.replace("$$", "$")
    return shlex.split(shell), made["DAG"]

def test_what_kubernetes_cannot_say_is_refused_or_told(world):
    world.make("a", every_s=5400); world.make("b", cron="0 0 L * *"); world.make("c", every_s=1)
    for name in "abc":
        with pytest.raises(RunError, match="Kubernetes"): cron_job(world.st.get(name))
    world.make("d", overlap="queue", jitter_s=5, pause_after=3, start="2027-01-01", end="2028-01-01", retries=2, missed="all")
    told = " ".join(cron_job(world.st.get("d")).notes)
    for word in ("queue", "jitter", "pause", "no start", "no end", "retries", "not all of them"): assert word in told

# ---- JupyterLab ----------------------------------------------------------------------------------------------------------------------------------------------------

@pytest.fixture
def lab(home, book, tmp_path):
    pytest.importorskip("jupyter_scheduler")
    from jupyter_scheduler.environments import CondaEnvironmentManager
    from jupyter_scheduler.orm import create_tables
    from somaagent.runs.labjobs import LabScheduler
    create_tables(db := f"sqlite:///{tmp_path}/lab.sqlite")
    return LabScheduler(root_dir=str(book.parent), environments_manager=CondaEnvironmentManager(), db_url=db, staging_path=str(tmp_path/"staging"), task_runner_class=None)

@pytest.mark.slow
def test_jobs_of_lab_run_by_our_runner(lab):
    "Its own scheduler class, in a process of its own, as Lab starts it"
    from jupyter_scheduler.models import CreateJob, ListJobsQuery
    from somaagent.runs.labjobs import typed
    id = lab.create_job(CreateJob(input_uri="tiny.ipynb", name="bad", runtime_environment_name="python3", output_formats=["ipynb"], parameters=dict(n="-1")))
    with pytest.raises(RunError, match="wants int"): typed(dict(n="five"), lab.root_dir + "/tiny.ipynb")
    job = until(lambda: (j := lab.get_job(id)).status in ("COMPLETED", "FAILED") and j)
    assert job.status == "FAILED" and "below zero" in job.status_message
    run = until(lambda: next((r for r in list_runs(kind="notebook") if r.inputs.get("job") == id), None))
    assert (run.status, run.parameters, run.outputs) == ("failed", dict(n=-1), dict(n=-1))
    out = nbformat.read(lab.get_staging_paths(job)["ipynb"], as_version=4)
    assert any(o.output_type == "error" for c in out.cells for o in c.get("outputs", [])), "the partial notebook of a failed job is there"
    assert lab.list_jobs(ListJobsQuery()).total_count == 1

def test_our_schedules_among_lab_s_definitions(lab, book):
    from jupyter_scheduler.exceptions import SchedulerError
    from jupyter_scheduler.extension import JOB_DEFINITION_ID_REGEX, JOB_ID_REGEX
    from jupyter_scheduler.models import CreateJobDefinition, ListJobDefinitionsQuery, ListJobsQuery, UpdateJob, UpdateJobDefinition
    st = Schedules()
    st.create("ours", dict(notebook=book, params=dict(n=3)), cron="0 3 * * *"); st.create("other", dict(notebook=book), every_s=60)
    theirs = lab.create_job_definition(CreateJobDefinition(input_uri="tiny.ipynb", name="theirs", runtime_environment_name="python3", schedule="0 4 * * *", timezone="UTC", output_formats=["ipynb"]))
    seen = lab.list_job_definitions(ListJobDefinitionsQuery())
    assert [d.name for d in seen.job_definitions] == ["other", "ours", "theirs"] and seen.total_count == 3 and [d.name for d in lab.list_job_definitions(ListJobDefinitionsQuery(name="our")).job_definitions] == ["ours"]
    mine = seen.job_definitions[1].job_definition_id
    st.create("daily", dict(notebook=book), cron="@daily"); st.create("odd", dict(notebook=book), every_s=7)
    assert {d.name: d.schedule for d in lab.list_job_definitions(ListJobDefinitionsQuery()).job_definitions} == dict(daily="0 0 * * *", odd=None, other="* * * * *", ours="0 3 * * *", theirs="0 4 * * *"), "Lab's page fails on other words"
    for name in ("daily", "odd"): st.delete(name)
    assert re.fullmatch(JOB_DEFINITION_ID_REGEX, mine)
    for d in (mine, theirs): lab.update_job_definition(d, UpdateJobDefinition(active=False))
    assert st.get("ours").status == "paused" and not lab.get_job_definition(theirs).active and not lab.get_job_definition(mine).active
    with pytest.raises(SchedulerError, match="--replace"): lab.update_job_definition(mine, UpdateJobDefinition(timezone="Europe/Berlin"))
    fire = st.run_now("ours")
    assert re.fullmatch(JOB_ID_REGEX, f"soma-{fire.id}")
    lab.update_job(f"soma-{fire.id}", UpdateJob(status="STOPPED"))
    assert [str(j.status) for j in lab.list_jobs(ListJobsQuery(job_definition_id=mine)).jobs] == ["STOPPED"] == [str(lab.get_job(f"soma-{fire.id}").status)]
    with pytest.raises(SchedulerError, match="kept"): lab.delete_job(f"soma-{fire.id}")
    lab.delete_job_definition(mine)
    assert [s.name for s in st.list()] == ["other"]
