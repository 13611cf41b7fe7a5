"Reports of A/B tests and `soma ab`: edge cases, escaping, schema, a browser, real processes."
import copy, datetime as dt, html.parser, json, os, subprocess, sys, zlib
from pathlib import Path

import pytest
from click.testing import CliRunner

from somaagent.abtest import figures
from somaagent.abtest.demo import START, demo_experiment, fill, traffic
from somaagent.abtest.document import SCHEMA, document, plain
from somaagent.abtest.life import Experiments
from somaagent.abtest.live import analyze
from somaagent.abtest.report import Report, card, render, report
from somaagent.abtest.panels import page
from somaagent.cli.ab import ab
from somaagent.core.errors import ExperimentError
from somaagent.core.records import Experiment, frozen_clock
from somaagent.store.state import State
from somaagent.store.warehouse import Warehouse

EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'`{{7*7}}</style></pre>"
DAY = lambda k: START+dt.timedelta(days=k)

def begin(stores, name, at=START, **kw):
    "A running demo experiment"
    xs = Experiments(stores[1], "tester")
    with frozen_clock(at, seed=zlib.crc32(name.encode())): return xs.start(xs.create(demo_experiment(name, **kw)).name)

@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    d = tmp_path_factory.mktemp("ab")
    wh, st = Warehouse(f"chdb://{d}/wh", mode="direct"), State(f"sqlite:///{d}/state.db")
    yield wh, st
    wh.close(); st.close()

@pytest.fixture(scope="module")
def whole(stores):
    "A decided experiment's report"
    wh, st = stores
    x = begin(stores, "whole")
    fill(x, wh, users=2600)
    for k in range(2, 15, 3):
        with frozen_clock(DAY(k), seed=k): a = analyze(x.id, wh, st, at=DAY(k))
        if a.recorded: break
    return report(a, wh, st)

class Tags(html.parser.HTMLParser):
    "Tags that are opened and closed in order"
    void = {"meta", "link", "br", "img", "line", "path", "input", "hr"}
    def __init__(self): super().__init__(); self.open, self.bad, self.seen, self.ids = [], [], [], []
    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs))); self.ids += [v for k, v in attrs if k == "id"]
        if tag not in self.void: self.open.append(tag)
    def handle_startendtag(self, tag, attrs): self.seen.append((tag, dict(attrs)))
    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag: self.bad.append(tag)

def parse(text):
    t = Tags(); t.feed(text); t.close()
    assert not t.bad and not t.open, (t.bad[:5], t.open)
    return t

def no_script_but_ours(text):
    t = parse(text)
    assert sum(tag == "script" for tag, _ in t.seen) <= 1 and not [tag for tag, _ in t.seen if tag in ("img", "iframe", "object", "embed", "form")]
    assert not [a for _, at in t.seen for a in at if a.startswith("on")]
    return t

# ---- the page

def test_the_page_is_well_formed_and_names_no_address(whole):
    text = whole.html()
    t = no_script_but_ours(text)
    assert len(t.ids) == len(set(t.ids))
    hrefs = [at["href"] for tag, at in t.seen if tag == "a"]
    assert hrefs and all(h.startswith("#") and h[1:] in t.ids for h in hrefs)
    assert not any(u in text.replace("http://www.w3.org/2000/svg", "") for u in ("http://", "https://", "@import", "url("))
    assert all(at.get("aria-label") for tag, at in t.seen if at.get("role") == "img"), "every drawing has words"
    assert "NaN" not in text and "None" not in text.replace("'none'", "") and "nan" not in text.split("<main>")[1].split("<pre>")[0]

def test_what_people_wrote_is_text_everywhere(whole):
    d = json.loads(whole.json())
    def poison(v): return {k: v2 if k in ("schema", "version", "at", "ts", "status", "kind", "role", "direction", "unit", "value", "over", "verdict", "started_at", "stopped_at", "created_at", "rule", "horizon", "guard", "action", "by") else poison(v2) for k, v2 in v.items()} if isinstance(v, dict) else [poison(x) for x in v] if isinstance(v, list) else v
    def names(v, old, new): return {(new if k == old else k): names(x, old, new) for k, x in v.items()} if isinstance(v, dict) else [names(x, old, new) for x in v] if isinstance(v, list) else new if v == old else v
    d = names(names(names(d, "small", EVIL), "success", EVIL+"m"), "billing", EVIL+"s")
    d["experiment"] |= dict(name=EVIL, question=EVIL, owner=EVIL, id=EVIL, population={EVIL: [EVIL]}, layer=EVIL)
    d["experiment"]["arms"][1]["model"] = EVIL+"model"
    d["decision"] |= dict(sentence=EVIL, basis=[EVIL])
    d["checks"] = [dict(name=EVIL, status="fail", value=1, sentence=EVIL)]
    d["history"] = [dict(ts=d["at"], event=EVIL, who=EVIL, text=EVIL)]
    d["sql"] = {k: EVIL for k in d["sql"]}
    for text in (render(d), card(d)):
        no_script_but_ours(text if text.startswith("<!doctype") or "<!doctype" in text else f"<div>{text}</div>")
        assert "49" not in text[:0] and "<img" not in text and "alert(1)</script>" not in text
    assert "<img" not in Report(d)._repr_markdown_() and "<script" not in Report(d)._repr_markdown_()

def test_the_page_follows_from_the_json(whole, tmp_path):
    p = whole.json(tmp_path/"deep"/"r.json")
    assert render(json.loads(p.read_text())) == whole.html()
    assert whole.html(tmp_path/"r.html").read_text() == whole.html()

def faults(v, schema, at=""):
    "What of a JSON value breaks a schema (the part of the language that `SCHEMA` uses)"
    types = dict(object=dict, array=list, string=str, integer=int, null=type(None), number=(int, float))
    want = schema.get("type", [])
    if want and not any(isinstance(v, types[t]) and not (isinstance(v, bool) and t in ("integer", "number")) for t in ([want] if isinstance(want, str) else want)): return [f"{at}: {type(v).__name__} is no {want}"]
    if "const" in schema and v != schema["const"] or "enum" in schema and v not in schema["enum"]: return [f"{at}: {v!r}"]
    out = [f"{at}: no {k}" for k in schema.get("required", []) if k not in v]
    if isinstance(v, dict): out += [f for k, s in schema.get("properties", {}).items() if k in v for f in faults(v[k], s, f"{at}.{k}")] + [f for k in v if "additionalProperties" in schema for f in faults(v[k], schema["additionalProperties"], f"{at}.{k}")]
    return out + [f for i, x in enumerate(v) if "items" in schema for f in faults(x, schema["items"], f"{at}[{i}]")] if isinstance(v, list) else out

def test_the_document_keeps_its_schema(whole):
    assert faults(whole.doc, SCHEMA) == []
    assert json.loads(json.dumps(whole.doc, allow_nan=False)) == whole.doc
    broken = copy.deepcopy(whole.doc); del broken["decision"]; broken["estimates"][0]["diff"] = "much"
    assert faults(broken, SCHEMA) == [": no decision", ".estimates[0].diff: str is no ['number', 'null']"]

def test_every_figure_has_its_sql_and_it_runs(whole, stores):
    d = whole.doc
    assert {"estimates", "path", "exposures", "latency", "plane", "slices_category"} <= d["sql"].keys()
    sql = d["sql"]["exposures"]
    params = dict(l[len("SET param_"):-1].split(" = ", 1) for l in sql.splitlines() if l.startswith("SET param_"))
    assert params["ab_x"] == f"'{d['experiment']['id']}'"
    got = stores[0].query("\n".join(l for l in sql.splitlines() if not l.startswith("SET ")), {k: json.loads(v.replace("'", '"')) for k, v in params.items()})
    assert sum(got["units"]) == sum(a["units"] for a in d["arms"])

def test_the_figures_agree_with_the_rows(whole, stores):
    d = whole.doc
    at = dt.datetime.fromisoformat(d["at"])
    f = stores[0].query("SELECT arm, user_id, status, latency_ms, cost_usd, ts FROM interactions WHERE experiment = {x:String} AND ts < {t:DateTime64(3, 'UTC')}", dict(x=d["experiment"]["id"], t=at))
    for arm in ("large", "small"):
        rows = f.filter(f["arm"] == arm)
        assert [r["units"] for r in d["exposures"] if r["arm"] == arm][-1] == rows["user_id"].n_unique()
        lat = d["latency"]["arms"][arm]
        assert lat["n"] == len(rows) and lat["q"][d["latency"]["grid"].index(.5)] == pytest.approx(rows["latency_ms"].median(), rel=1e-6)
        p = next(a for a in d["plane"]["arms"] if a["arm"] == arm)
        e = next(e for e in d["estimates"] if e["metric"] == "cost per request")
        assert p["y"] == pytest.approx((rows["status"] == "ok").mean()) and p["x"] == pytest.approx(e["value_control" if arm == "large" else "value_arm"])

# ---- edges

def test_nobody_came(stores):
    x = begin(stores, "nobody")
    r = report(analyze(x.id, *stores, at=DAY(1), store=False), *stores)
    no_script_but_ours(r.html())
    p = page(r.doc)
    assert p["exposures"] is None and p["path"] is None and p["big"] is None and p["plane"] is None
    assert {row["word"] for row in p["scorecard"]["forest"]["rows"]} == {"not estimated"}
    with pytest.raises(ExperimentError, match="no column to slice by"): report(analyze(x.id, *stores, at=DAY(1), store=False), *stores, by=("nosuch",))

def test_one_look_and_a_handful_of_units(stores):
    x = begin(stores, "few")
    fill(x, stores[0], seed=3, users=30)
    r = report(analyze(x.id, *stores, at=DAY(14), store=False), *stores)
    no_script_but_ours(r.html())
    assert r.doc["decision"]["verdict"] == "continue" or r.doc["decision"]["verdict"] in ("no difference",)
    assert len(r.doc["path"]) <= 1

def test_three_arms_each_have_a_picture(stores):
    arms = [dict(name=n, weight=w, model=n) for n, w in (("large", .4), ("small", .3), ("tiny", .3))]
    x = begin(stores, "three", arms=arms)
    fill(x, stores[0], seed=4, users=900)
    for k in (5, 10):
        with frozen_clock(DAY(k), seed=k): a = analyze(x.id, *stores, at=DAY(k))
    r = report(a, *stores)
    p = page(r.doc)
    no_script_but_ours(r.html())
    assert [t["arm"] for t in p["path"]["tracks"]] == ["small", "tiny"] and {d["color"] for d in p["plane"]["plot"]["dots"]} == {"arm0", "arm1", "arm2"}
    assert sum(row["main"] for row in p["scorecard"]["forest"]["rows"]) == 2 and len(r.doc["slices"]) == 2
    assert "k questions" not in r.doc["slices"][0]["note"] and "Bonferroni" in r.doc["slices"][0]["note"]

def test_a_refused_metric_says_why(whole):
    d = copy.deepcopy(whole.doc)
    e = next(e for e in d["estimates"] if e["role"] == "guardrail")
    e |= dict(refused="330 requests: p99 needs 380", diff=None, lo=None, hi=None, rel=None, rel_lo=None, rel_hi=None)
    assert "330 requests: p99 needs 380" in render(d)

def test_a_quantile_guardrail_is_shown_and_not_open(whole):
    d = copy.deepcopy(whole.doc)
    tails = {m["name"] for m in d["metrics"] if m["kind"] == "quantile"}
    for e in d["estimates"]:
        if e["role"] == "guardrail": e |= dict(refused="", diff=.01, rel=.01, lo=-.1, hi=.1, rel_lo=-.1, rel_hi=.1, guard="unclear" if e["metric"] in tails else "ok")
    p = page(d)
    assert tails and sum((r["sign"], r["word"]) == ("○", "shown, not watched") for r in p["scorecard"]["forest"]["rows"]) == len(tails)
    assert p["tiles"][3]["v"] == "✓ hold" and not any(t in p["tiles"][3]["s"] for t in tails)

def test_a_guardrail_that_stopped_the_test_is_its_title(whole):
    d = copy.deepcopy(whole.doc)
    d["path"] = [q | dict(action="continue") for q in d["path"]]
    last = max(q["look"] for q in d["path"])
    assert "no decision yet" in page(d)["path"]["title"]
    d["decision"]["verdict"], d["guardrails"][0]["status"] = "harm", "harm"
    assert page(d)["path"]["title"] == f"Stopped by a guardrail at look {last}"

def test_all_refused_still_makes_a_page(whole):
    d = copy.deepcopy(whole.doc)
    for e in d["estimates"]: e |= dict(refused="no variation", diff=None, lo=None, hi=None, rel=None, rel_lo=None, rel_hi=None, se=None, value_control=None, value_arm=None)
    d |= dict(path=[], trajectory=[], needed=[], corrected=None, plane=None, slices=[], latency={}, exposures=[], checks=[], history=[], guardrails=[])
    no_script_but_ours(render(d)); no_script_but_ours(card(d))

@pytest.mark.parametrize("verdict", ["ship", "keep", "no difference", "continue", "invalid", "harm", "better", "worse", "not enough data", "something new"])
def test_every_verdict_has_words(whole, verdict):
    d = copy.deepcopy(whole.doc); d["decision"]["verdict"] = verdict
    p = page(d)
    assert p["headline"] and p["verdict"]["word"]
    if verdict in ("keep", "invalid", "harm", "worse"): assert p["verdict"]["tone"] in ("warn", "bad")

def test_extreme_numbers_are_drawn_inside_the_frame():
    s = figures.style(dict(name="cost_usd", kind="mean", value="cost_usd"))
    path = [dict(look=i, n=10**i, diff=(-1)**i*10.**-i, fixed_lo=-1e6/10**i, fixed_hi=1e6/10**i, lo=None, hi=None, critical=None, action="continue") for i in range(1, 7)]
    t = figures.track(path, s, 10**7)
    assert all(0 <= d["at"] <= 100 and 0 <= d["left"] <= 100 for q in t["series"] for d in q["dots"])
    f = figures.forest([dict(label=str(i), est=e, lo=e-w, hi=e+w, main=i == 0) for i, (e, w) in enumerate(((.01, .02), (-.9, .01), (40., 39.), (0., 1e-9)))])
    for r in f["rows"]:
        assert 0 <= r["left"] <= 100 and 0 <= r["left"]+r["width"] <= 100.01
        if not 0 < r["at"] < 100: assert r["off"]
    assert figures.forest([dict(label="x", est=None, lo=None, hi=None)]) is None and figures.track([], s) is None

def test_numbers_as_people_write_them():
    assert figures.number(-0.0004, 2) == "0.00" and figures.number(float("inf")) == "–" and figures.number(-1234.5, 1) == "−1\u202f234.5"
    assert plain({"a": float("nan"), 1: {2, }}) == {"a": None, "1": [2]}

@pytest.mark.browser
def test_the_page_reads_in_a_browser(whole, tmp_path):
    "Wide and narrow, light and dark, with JavaScript and without: no error, nothing fetched, nothing wider than the screen"
    chromium = next((p for p in ("/usr/bin/chromium", "/usr/bin/chromium-browser", "/usr/bin/google-chrome") if os.path.exists(p)), None)
    if not chromium: pytest.skip("no Chromium here")
    from playwright.sync_api import sync_playwright
    d = copy.deepcopy(whole.doc)
    d["experiment"]["name"] = d["decision"]["sentence"] = EVIL
    good, evil = whole.html(tmp_path/"good.html"), tmp_path/"evil.html"
    evil.write_text(render(d))
    with sync_playwright() as pw:
        b = pw.chromium.launch(executable_path=chromium, args="--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync".split())
        seen = {}
        for width, scheme, js in ((1280, "light", True), (1280, "dark", True), (390, "light", True), (390, "dark", False)):
            c = b.new_context(viewport=dict(width=width, height=900), color_scheme=scheme, java_script_enabled=js)
            p, faults, asked = c.new_page(), [], []
            p.on("console", lambda m: faults.append(m.text)); p.on("pageerror", lambda e: faults.append(str(e))); p.on("request", lambda r: asked.append(r.url)); p.on("dialog", lambda g: (faults.append("dialog"), g.dismiss()))
            for f in (good, evil):
                p.goto(f"file://{f}")
                if js: assert p.evaluate("document.documentElement.scrollWidth") <= width, (f, width)
                assert p.locator("h1").first.is_visible() and p.locator(".forest").first.is_visible()
            assert not faults and all(u.startswith(("file:", "data:")) for u in asked), (faults, asked)
            if js: seen[width, scheme] = p.evaluate("getComputedStyle(document.body).backgroundColor")
            if (width, scheme) == (1280, "dark"):
                p.goto(f"file://{good}"); p.hover("#path .plot"); assert p.locator("#path .tip").first.inner_text().startswith("look")
                p.click("button.theme"); assert p.evaluate("getComputedStyle(document.body).backgroundColor") == seen[1280, "light"]
            c.close()
        assert seen[1280, "light"] != seen[1280, "dark"]
        b.close()

# ---- the view

def test_the_view_stands_still_without_a_kernel_and_survives_faults(stores):
    pytest.importorskip("ipywidgets")
    from somaagent.abtest.view import watch
    x = begin(stores, "viewed")
    fill(x, stores[0], seed=5, users=300)
    v = watch("viewed", *stores, clock=lambda: DAY(6))
    assert v._repr_mimebundle_().keys() == {"text/plain", "text/html"} and "viewed" in v._repr_mimebundle_()["text/plain"]
    before = v.html.value
    v.name = "gone"; v.again.click()
    assert "Not refreshed" in v.message.value and v.html.value == before
    v.name = "viewed"; v.reason.value = "   "; v.halt.click()
    assert Experiments(stores[1]).get("viewed").status == "running" and "why" in v.message.value
    v.play.value = 1
    assert "is running" in v.message.value
    with frozen_clock(DAY(7), seed=77): v.stop(EVIL)
    assert "<script" not in v.message.value and Experiments(stores[1]).get("viewed").status == "stopped"
    v.refresh(); assert v.halt.disabled

# ---- soma ab

@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("SOMA_STORES_HOME", str(tmp_path/"home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path

def soma(*args, ok=True):
    r = CliRunner().invoke(ab, [str(a) for a in args])
    assert (r.exit_code == 0) == ok, (r.exit_code, r.output, r.exception)
    return r.output

def test_design_without_anything():
    out = soma("design", "--base", .8, "--to", .84)
    assert "1,444 requests per arm" in out and "2,888 in all" in out
    d = json.loads(soma("design", "--base", .8, "--to", .84, "--power", .9, "--json"))
    assert d["n_control"] == 1933 and d["group"]["on_average"] < d["n"] < d["group"]["at_most"]
    assert "80 % is written 0.8" in soma("design", "--base", 80, "--to", 84, ok=False)
    soma("design", "--base", .8, "--to", .8, ok=False)
    assert "cannot answer the question" in soma("design", "--base", .8, "--to", .84, "--have", 1000) and json.loads(soma("design", "--base", .8, "--to", .84, "--have", 1500, "--json"))["enough"] is True
    one, three = (json.loads(soma("design", "--base", .8, "--to", .84, "--arms", k, "--json")) for k in (1, 3))
    assert three["n_control"] > one["n_control"] and three["n"] == three["n_control"]+3*three["n_treatment"]
    assert json.loads(soma("design", "--sd", 1, "--delta", .1, "--json"))["n_control"] in range(1565, 1575)
    assert "say --base and --to" in soma("design", "--base", .8, ok=False)
    for sd, delta in ((1, "nan"), ("nan", 1), ("inf", 1)): assert "say a finite one" in soma("design", "--sd", sd, "--delta", delta, ok=False)

def test_a_fixed_test_claims_no_interval_before_its_end():
    import polars as pl
    from types import SimpleNamespace
    from somaagent.cli.ab import _gist
    say = lambda rule, lo, hi: _gist(SimpleNamespace(experiment=demo_experiment("x", rule), path=pl.DataFrame([dict(diff=.03, lo=lo, hi=hi, fixed_lo=.02, fixed_hi=.05)])))
    assert say("fixed", float("nan"), float("nan")).endswith("+3.0 points, decided at the horizon")
    assert say("fixed", .021, .055).endswith("95% interval +2.1 … +5.5 points") and "holds at every look: +2.1" in say("group", .021, .055)

def test_levels_and_p_values_in_words():
    from somaagent.abtest.lift import lift
    from somaagent.abtest.moments import Moments
    from somaagent.abtest.spec import Metric
    import numpy as np
    r = np.random.default_rng(0)
    c, t = (Moments.of(dict(latency_ms=r.normal(mean, 1., 4000))) for mean in (10., 11.))
    said = repr(lift(c, t, Metric("latency", kind="mean", value="latency_ms", over="units"), .025))
    assert "p < 1e-16" in said and said.endswith("97.5%)")

def test_every_command_has_help_with_examples():
    for name in ab.commands:
        out = soma(name, "--help")
        assert "Examples:" in out and f"soma ab {name}" in out, name

def test_from_a_fresh_home_to_a_decision(home):
    assert "soma ab demo" in soma("status") and json.loads(soma("status", "--json")) == []
    assert "no such experiment" in soma("analyze", "nothing", ok=False)
    assert "two-models" in soma("create", ok=False)
    (home/"bad.yaml").write_text("name: x\narms: {a: .5, b: .4}\nmetrics: [{name: success, mde: .02}]\n")
    assert "sums to 0.9" in soma("create", "bad.yaml", ok=False)
    (home/"exp.yaml").write_text(soma("create", "--template", "two-models", "--control", "large", "--treatment", "small", "--name", "take over", "--print"))
    assert "id:" not in (home/"exp.yaml").read_text()
    x = json.loads(soma("create", "exp.yaml", "--json"))
    assert x["status"] == "draft" and "`soma ab start 'take over'`" in soma("analyze", "take over", ok=False)
    soma("start", "take over")
    assert "there is such an experiment already" in soma("create", "exp.yaml", ok=False)
    assert "all traffic goes to large; resume restores large 50%, small 50%" in soma("pause", "take over", "--reason", "break")
    soma("resume", "take over")
    assert "ARM=SHARE" in soma("reweight", "take over", "small", ok=False)
    soma("reweight", "take over", "large=.8", "small=.2")
    rows = json.loads(soma("status", "--json"))
    assert rows[0]["arms"] == dict(large=.8, small=.2) and rows[0]["verdict"] == "no data"
    assert "no traffic is split any more" in soma("stop", "take over")
    assert "`soma ab decide 'take over' keep" in soma("decide", "take over", "ship", "--arm", "large", "--reason", "x", ok=False)
    assert "needs --reason" in soma("decide", "take over", "keep", ok=False)
    assert json.loads(soma("decide", "take over", "keep", "--reason", "enough", "--json"))["already"] is False
    assert json.loads(soma("decide", "take over", "--json"))["already"] is True
    assert "is decided already: keep" in soma("decide", "take over", "ship", "--arm", "small", "--reason", "no", ok=False)
    assert json.loads(soma("decide", "take over", "keep", "--reason", "again", "--json"))["verdict"] == "keep"
    assert [e["action"] for e in json.loads(soma("history", "take over", "--json"))] == ["create", "start", "pause", "resume", "reweight", "stop", "decide"]
    soma("create", "--template", "two-models", "--name", "ab-demo")
    assert "an experiment of yours" in soma("demo", ok=False)
    assert "take over" in soma("list") and json.loads(soma("list", "--status", "running", "--json")) == []
    assert "take over is archived" in soma("archive", "take over") and "take over" not in soma("list")
    assert "decided, archived" in soma("list", "--all")

def test_the_demo_runs_in_a_fresh_process_and_twice(home):
    "From nothing to a page, by the real command; the second time changes nothing"
    run = lambda *a: subprocess.run([sys.executable, "-c", "from somaagent.cli.ab import ab; ab()", *a], capture_output=True, text=True, timeout=120, env=os.environ | dict(OMP_NUM_THREADS="1"))
    r = run("demo", "--json", "--users", "1500")
    assert r.returncode == 0, r.stderr
    d = json.loads(r.stdout)
    assert d["synthetic"] is True and Path(d["report"]).is_file() and d["decision"]["verdict"] in ("ship", "continue", "no difference")
    again = json.loads(soma("demo", "--json", "--users", "1500"))
    assert again["decision"]["sentence"] == d["decision"]["sentence"] and again["arms"] == d["arms"]
    peek = json.loads(soma("analyze", "ab-demo", "--peek", "--at", "2026-11-20", "--json"))
    assert peek["decision"]["verdict"] == d["decision"]["verdict"]
    weeks = json.loads(soma("design", "ab-demo", "--json"))
    assert weeks["metric"] == "success" and weeks["weeks"][0]["units"] > 500 and weeks["sentence"]
    assert "is no time" in soma("analyze", "ab-demo", "--at", "yesterday", ok=False)
    soma("report", "ab-demo", "--at", "2026-11-20", "-o", "x.html"); parse((home/"x.html").read_text())
    assert json.loads(soma("report", "ab-demo", "--at", "2026-11-20", "--json"))["schema"] == "somaagent.ab-report/1"
    d = json.loads(soma("aa-test", "ab-demo", "--reps", 20, "--json")); assert 0 <= d["interval"][0] <= d["rate"] <= d["interval"][1] <= 1

def test_demo_traffic_refuses_nonsense():
    x = demo_experiment(id="exp_t")
    with pytest.raises(ExperimentError): traffic(x, users=1)
    with pytest.raises(ExperimentError): traffic(x, truth=dict(sucess=.1))

def test_status_and_health_judge_a_split_by_the_same_evidence():
    from somaagent.abtest.eprocess import SplitE
    from somaagent.cli.ab import _split
    said = [_split(SplitE(dict(a=.5, b=.5), .001), dict(a=a, b=b)) for a, b in ((500, 500), (897, 736), (1500, 500))]
    assert said == ["ok", "split doubtful", "SPLIT BROKEN"]
