"Training files: good ones pass, broken ones of each kind are refused with line and reason, round trips lose nothing, and nothing is half-written"
import gzip, json, os, random, resource, signal, subprocess, sys, time, tracemalloc
from dataclasses import replace

import polars as pl, pytest
from hypothesis import HealthCheck, given, settings as hyp, strategies as st

from somaagent.core.errors import DataError, SomaError
from somaagent.data import formats
from somaagent.data.chatformats import FEATURES, FORMATS, Call, Example, Turn, ask, chat, fit, fits, loses, number, uses
from somaagent.data.chatrules import check
from somaagent.data.dataset import COLUMNS, write_dataset
from somaagent.data.formats import candidates, detect, export, from_dataset, ids_path, read, validate, write
from somaagent.data.price import run_price, token_counter

quick = lambda n: hyp(max_examples=n, deadline=None, suppress_health_check=list(HealthCheck), database=None)
TOOL = dict(type="function", function=dict(name="find", description="Finds", parameters=dict(type="object", properties=dict(n=dict(type="integer")))))
SYSTEM = "together-instruction"  # the one format that has no system prompt


def example(i, fmt):
    f = FORMATS[fmt]
    return ask(f"Where is order {i}?", f"Order {i} arrives tomorrow.", system="You are brief." if "system" in f.holds else "", rejected=f"No idea, {i}." if f.preference else None, id=f"int_{i}")

def records(fmt, n=40): return [FORMATS[fmt].write(fit(example(i, fmt), fmt)) for i in range(n)]
def put(path, lines):
    path.write_bytes(b"".join((l if isinstance(l, bytes) else json.dumps(l).encode()) + b"\n" for l in lines))
    return path
def found(rep, level="error"): return {(p.line, p.reason) for p in rep.problems if p.level == level}


# ---- good files

@pytest.mark.parametrize("fmt", FORMATS)
def test_a_good_file_passes(fmt, tmp_path):
    done = write((example(i, fmt) for i in range(40)), tmp_path/"t.jsonl", fmt)
    rep = validate(tmp_path/"t.jsonl", fmt)
    assert rep.ok and not rep.warnings and rep.examples == 40 == done.examples and rep.tokens > rep.learned_tokens > 0, rep.problems
    assert rep.method.startswith("estimate") and rep.price.tokens == rep.tokens
    assert (rep.price.usd is None) == (not fmt.startswith(("trl", "sharegpt", "alpaca")))
    assert list(read(tmp_path/"t.jsonl", fmt)) == [example(i, fmt) for i in range(40)]


# ---- broken files, one fault each on line 3

def edit(rec, fmt, what):
    "A fault of this kind, in this format's own words"
    side = lambda r: r["messages"] if "messages" in r else r["input"]["messages"] if "input" in r else r.get("conversations") or r.get("prompt")
    role, text = ("from", "value") if fmt == "sharegpt" else ("role", "content")
    strings = fmt in ("alpaca", "together-instruction")
    reply = next((k for k in ("preferred_output", "chosen", "completion") if isinstance(rec.get(k), list)), None)
    ms = None if strings else side(rec)
    at = len(ms)-1-(reply is None) if ms else 0  # the question
    if what == "wrong_role": ms[at][role] = "robot"
    if what == "wrong_order" and reply: rec[reply] = rec[reply] + [dict(role="tool", content="x", tool_call_id="c")] if fmt != "together-preference" else rec[reply]; ms.append(dict(role="assistant", content="Hello")) if fmt != "trl-preference" and fmt != "trl-prompt-completion" else None
    elif what == "wrong_order": ms.append({role: "human" if fmt == "sharegpt" else "user", text: "And then?"})
    if what == "empty" and strings: rec["instruction" if fmt == "alpaca" else "prompt"] = " \n"
    elif what == "empty": ms[at][text] = " \n"
    if what == "no_assistant" and strings: del rec["output" if fmt == "alpaca" else "completion"]
    elif what == "no_assistant" and reply: rec[reply] = []
    elif what == "no_assistant": del ms[-1]
    if what == "unknown_key": rec["colour"] = "red"
    if what == "nul": (ms[at] if ms else rec).__setitem__(text if ms else ("instruction" if fmt == "alpaca" else "prompt"), "a\0b")
    if what == "surrogate": (ms[at] if ms else rec).__setitem__(text if ms else ("instruction" if fmt == "alpaca" else "prompt"), "a\ud83d")
    if what == "wrong_type" and strings: rec["instruction" if fmt == "alpaca" else "prompt"] = 7
    elif what == "wrong_type": ms[at][text] = 7
    if what == "missing": del rec[next(iter(k for k in rec if k not in ("system", "id", "tools")))]
    if what == "not_conversation" and not strings: rec[next(k for k in rec if k not in ("system", "id", "tools"))] = "text"
    return rec

KINDS = dict(wrong_role="wrong_role", wrong_order="wrong_order", empty="empty", no_assistant="no_assistant", unknown_key="unknown_key", nul="nul_byte", surrogate="bad_encoding", wrong_type="wrong_type", missing="missing")

@pytest.mark.parametrize("what", KINDS)
@pytest.mark.parametrize("fmt", FORMATS)
def test_a_broken_record_is_refused_with_its_line_and_reason(fmt, what, tmp_path):
    if fmt in ("alpaca", "together-instruction") and what in ("wrong_role", "wrong_order"): return  # no roles in this format
    recs = records(fmt)
    recs[2] = edit(recs[2], fmt, what)
    rep = validate(put(tmp_path/"t.jsonl", recs), fmt)
    want = KINDS[what]
    if what == "no_assistant": want = "missing" if fmt in ("alpaca", "together-instruction") else "empty" if isinstance(recs[2].get("preferred_output", recs[2].get("chosen", recs[2].get("completion"))), list) else "no_assistant"
    level = "warning" if what == "unknown_key" and fmt.startswith(("trl", "sharegpt", "alpaca")) else "error"  # trainers ignore it, services refuse it
    assert (3, want) in found(rep, level) and {line for line, _ in found(rep)} <= {3}, rep.problems
    p = next(p for p in rep.problems if p.reason == want)
    assert p.text and p.field is not None and (p.hint or what == "wrong_type")
    if level == "error":
        assert not rep.ok
        with pytest.raises(DataError, match="line 3: "): list(read(tmp_path/"t.jsonl", fmt))

RAW = dict(broken_json=b'{"messages": [{"role": "user"', not_an_object=b'["a", "list"]', bad_encoding=b'{"messages": "caf\xe9"}', nul_byte=b'{"messages": "a\x00b"}', too_large=b'{"x": "' + b"y"*9_000_000 + b'"}', deep=b"[" * 100_000)

@pytest.mark.parametrize("what", RAW)
def test_a_broken_line_is_refused_in_every_format(what, tmp_path):
    for fmt in ("openai", "anthropic", "together-instruction", "trl-preference", "alpaca"):
        recs = records(fmt); recs[2] = RAW[what]
        rep = validate(put(tmp_path/"t.jsonl", recs), fmt)
        assert found(rep) == {(3, "broken_json" if what == "deep" else what)} and rep.examples == 40
        with pytest.raises(DataError, match="line 3"): list(read(tmp_path/"t.jsonl", fmt))

@pytest.mark.parametrize("fmt", FORMATS)
def test_rules_of_the_whole_file(fmt, tmp_path):
    f, recs = FORMATS[fmt], records(fmt, 35)
    recs[30] = recs[4]
    rep = validate(put(tmp_path/"dup.jsonl", recs), fmt, max_tokens=5)
    assert (31, "duplicate") in found(rep, "warning") and "line 5" in next(p.text for p in rep.problems if p.reason == "duplicate")
    assert rep.counts["error", "too_long"] == 35 and rep.longest > 5
    few = validate(put(tmp_path/"few.jsonl", recs[:f.min_examples-1]), fmt)
    assert (0, "too_few") in found(few) and not few.ok
    assert validate(put(tmp_path/"empty.jsonl", []), fmt).counts["error", "too_few"] == 1
    (tmp_path/"t.jsonl.gz").write_bytes(gzip.compress(b"\n".join(json.dumps(r).encode() for r in recs)))
    gz = validate(tmp_path/"t.jsonl.gz", fmt)
    assert gz.examples == 35 and ("error" if f.min_examples > 1 or fmt.startswith("together") else "warning", "wrong_suffix") in gz.counts

def test_too_many_and_too_large(tmp_path, monkeypatch):
    big = replace(FORMATS["anthropic"], max_examples=dict(train=34), max_bytes=dict(train=100))
    rep = validate(put(tmp_path/"t.jsonl", records("anthropic", 35)), big)
    assert found(rep) == {(0, "too_many"), (0, "file_too_large")}
    assert validate(tmp_path/"t.jsonl", "anthropic", split="validation").ok

def test_exact_counts_and_prices(tmp_path):
    p = put(tmp_path/"t.jsonl", records("openai", 12))
    words = validate(p, "openai", tokenizer=lambda s: len(s.split()), epochs=4, usd_per_million="3.00")
    assert words.tokens == 12*(3+4+4 + 3*3) and words.learned_tokens == 12*(4+3)
    assert words.price.exact and words.price.usd == run_price(words.tokens*4, usd_per_million=3).usd and "≈" not in repr(words.price)
    tiny = validate(p, "openai", tokenizer="tiny")
    assert tiny.method == "tokenizer tiny" and tiny.tokens == sum(token_counter("tiny").count(m["content"])+3 for r in records("openai", 12) for m in r["messages"])
    assert "price unknown" in repr(tiny.price)

CALLS = [("unanswered_call", lambda ms: ms.pop(2)), ("unknown_call", lambda ms: ms[2].update(tool_call_id="other")), ("missing", lambda ms: ms[2].pop("tool_call_id")), ("missing", lambda ms: ms[1]["tool_calls"][0].pop("id")),
    ("wrong_type", lambda ms: ms[1]["tool_calls"][0]["function"].update(arguments={"n": 1})), ("bad_value", lambda ms: ms[1]["tool_calls"][0].update(type="retrieval")), ("bad_weight", lambda ms: ms[3].update(weight=0.5)),
    ("bad_weight", lambda ms: [ms[1].update(weight=0), ms[3].update(weight=0)]), ("unknown_key", lambda ms: ms[0].update(weight=1)), ("bad_weight", lambda ms: ms[3].update(weight=True)), ("wrong_order", lambda ms: ms.append(dict(role="user", content="?"))),
    ("missing", lambda ms: ms[1]["tool_calls"][0]["function"].pop("name")), ("wrong_type", lambda ms: ms[1].update(tool_calls={})), ("unknown_key", lambda ms: ms[3].update(refusal="no"))]

@pytest.mark.parametrize("i", range(len(CALLS)))
def test_tools_and_weights(i):
    want, spoil = CALLS[i]
    ex = chat([Turn("user", "Where?"), Turn("assistant", calls=(Call("find", '{"n": 1}', "call_1"),)), Turn("tool", "here", call_id="call_1"), Turn("assistant", "Here.")], tools=[TOOL])
    rec = FORMATS["openai"].write(ex)
    assert not check(rec, "openai")
    spoil(rec["messages"])
    assert want in {p.reason for p in check(rec, "openai") if p.level == "error"}

@pytest.mark.parametrize("tools", [[1], {}, [dict(type="x")], [dict(type="function")], [dict(type="function", function=dict(name="a b"))], [dict(type="function", function=dict(name="a", parameters=[]))]])
def test_broken_definitions_of_tools(tools):
    for fmt in ("openai", "together", "trl"): assert any(p.level == "error" and p.field.startswith("tools") for p in check(records(fmt, 1)[0] | dict(tools=tools), fmt))


# ---- whatever the file holds

json_ = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), lambda c: st.lists(c, max_size=4) | st.dictionaries(st.sampled_from(
    "messages role content tool_calls function name arguments id type weight input preferred_output non_preferred_output prompt chosen rejected completion conversations from value instruction output history system tools text".split()) | st.text(max_size=3), c, max_size=5), max_leaves=20)

@given(json_, st.integers(0, 5))
@quick(150)
def test_no_record_makes_the_rules_raise(junk, where):
    for fmt in FORMATS:
        check(junk, fmt)
        rec = records(fmt, 1)[0]
        keys = list(rec); rec[keys[where % len(keys)]] = junk
        if not any(p.level == "error" for p in check(rec, fmt)):  # what passes can be read, counted and written again
            ex = FORMATS[fmt].read(rec); formats.count_tokens(ex)

@given(st.data())
@quick(60)
def test_a_record_with_one_leaf_changed_passes_or_is_refused(data):
    fmt = data.draw(st.sampled_from(list(FORMATS)))
    rec = records(fmt, 1)[0]; node = rec
    while True:
        key = data.draw(st.sampled_from(list(node) if isinstance(node, dict) else range(len(node))))
        if not isinstance(node[key], (dict, list)) or not node[key] or data.draw(st.booleans()): break
        node = node[key]
    node[key] = data.draw(json_)
    if not any(p.level == "error" for p in check(rec, fmt)):
        ex = FORMATS[fmt].read(rec); formats.count_tokens(ex); uses(ex)

@given(st.binary(max_size=400))
@quick(60)
def test_any_bytes_give_a_report(tmp_path_factory, raw):
    p = tmp_path_factory.mktemp("b")/"t.jsonl"; p.write_bytes(raw)
    for fmt in ("openai", "sharegpt"): assert not validate(p, fmt).ok or raw
    try: detect(p)
    except SomaError: pass

def test_files_that_are_no_files(tmp_path):
    with pytest.raises(DataError, match="no such file"): validate(tmp_path/"nothing.jsonl", "openai")
    with pytest.raises(DataError, match="no such format"): validate(put(tmp_path/"t.jsonl", []), "jsonl")
    (tmp_path/"a.json").write_text("[{}]")
    assert validate(tmp_path/"a.json", "alpaca").counts["error", "unreadable"] == 1
    (tmp_path/"u.jsonl").write_bytes("{}".encode("utf-16"))
    assert "UTF-16" in validate(tmp_path/"u.jsonl", "openai").problems[0].text

def test_memory_is_bounded(tmp_path):
    line = json.dumps(records("openai", 1)[0]).encode()
    with open(tmp_path/"big.jsonl", "wb") as f:
        for i in range(6_000): f.write(line.replace(b"order 0", b"order %d" % i)+b"\n")
        f.write(b'{"messages": "'); [f.write(b"x"*1_000_000) for _ in range(30)]; f.write(b'"}\n')
    tracemalloc.start()
    rep = validate(tmp_path/"big.jsonl", "openai")
    peak = tracemalloc.get_traced_memory()[1]; tracemalloc.stop()
    assert found(rep) == {(6001, "too_large")} and peak < 24_000_000, peak

def test_a_report_keeps_the_first_problems_and_counts_all(tmp_path):
    rep = validate(put(tmp_path/"t.jsonl", [{}]*500), "openai", keep=10)
    assert len(rep.problems) == 10 and rep.errors == 500 and rep.warnings == 499 and "more" in rep._repr_markdown_()
    assert json.loads(json.dumps(rep.as_dict()))["counts"] == {"error:missing": 500, "warning:duplicate": 499}


# ---- round trips

words = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=12).filter(lambda s: s.strip())

@st.composite
def held(draw, can, preference):
    "An example that uses only features in `can`"
    may = lambda k: k in can and draw(st.booleans())
    reply = lambda: Turn("assistant", draw(words))
    def call_block():
        k = draw(st.integers(2, 3)) if may("several_calls") else 1
        args = st.sampled_from(['{"n":1}', "{ }", "oops", '{"n": 1.50}']) if may("raw_arguments") else st.dictionaries(words, st.integers() | words, max_size=2).map(lambda o: json.dumps(o, ensure_ascii=False))
        return [Turn("assistant", draw(words) if may("words_beside_call") else None, tuple(Call("find", draw(args)) for _ in range(k)))] + [Turn("tool", draw(words)) for _ in range(k)]
    ask_ = lambda: Turn("user", [dict(type="text", text=draw(words))] if "mixed_parts" in can and may("parts") else draw(words), name="Ann" if may("names") else "")
    past = [t for _ in range(draw(st.integers(0, 2)) if may("history") else 0) for t in [ask_(), *(call_block() if may("calls") else []), reply()]]
    if may("assistant_first") and "history" in can: past = [reply(), *past]
    if may("free_order") and "history" in can: past = [*past, ask_()]
    prompt = [Turn("system", draw(words))]*bool(may("system")) + past + [ask_()]
    answer = ([*call_block()] if "long_answer" in can and may("calls") else []) + [reply()]
    rejected = [reply()] if preference else None
    if "border" in can and may("calls"): prompt += call_block()
    elif "border" in can and may("continuation"): prompt.append(reply())
    if may("weights"): answer[-1] = replace(answer[-1], weight=draw(st.sampled_from([None, 1]))); prompt = [replace(t, weight=draw(st.sampled_from([0, 1, None]))) if t.role == "assistant" else t for t in prompt]
    if "mixed_parts" not in can and may("parts"): prompt, answer, rejected = ([replace(t, content=[dict(type="text", text=t.content)]) if t.content else t for t in s] if s else s for s in (prompt, answer, rejected))
    n = len(prompt); whole = number(prompt + answer)
    if may("call_ids"): whole = tuple(replace(t, call_id=t.call_id and "x"+t.call_id, calls=tuple(replace(c, id="x"+c.id) for c in t.calls)) for t in whole)
    ex = Example(whole[:n], whole[n:], tuple(rejected) if preference else None, [TOOL] if may("tools") else None, draw(st.booleans()) if may("parallel") else None, draw(words) if may("id") else "")
    if may("input"): q = draw(words); ex = replace(ex, prompt=ex.prompt[:-1] + (Turn("user", f"{q}\n{draw(words)}"),), input_at=len(q)+1)
    return ex if "border" in can else chat(ex.turns, rejected=ex.rejected, tools=ex.tools, parallel=ex.parallel, id=ex.id, input_at=ex.input_at)

PAIRS = [(a, b) for a in FORMATS for b in FORMATS if FORMATS[a].preference == FORMATS[b].preference]

def through(ex, fmt):
    rec = json.loads(json.dumps(FORMATS[fmt].write(fit(ex, fmt)), ensure_ascii=False))
    bad = [p for p in check(rec, fmt) if p.level == "error"]
    assert not bad, (bad, rec)
    return FORMATS[fmt].read(rec)

@pytest.mark.parametrize("a,b", PAIRS)
def test_round_trips_lose_nothing_that_both_can_hold(a, b):
    can = FORMATS[a].holds & FORMATS[b].holds
    @given(held(can, FORMATS[a].preference))
    @quick(14)
    def go(ex):
        assert uses(ex) <= can | {"rejected"}
        assert through(through(ex, a), b) == ex
        assert {a, b} <= set(fits(ex))
    go()

@pytest.mark.parametrize("fmt", FORMATS)
def test_files_come_back_with_their_ids(fmt, tmp_path):
    @given(st.lists(held(FORMATS[fmt].holds | {"id"}, FORMATS[fmt].preference), min_size=1, max_size=4))
    @quick(6)
    def go(exs):
        done = write(exs, tmp_path/"t.jsonl", fmt)
        assert list(read(tmp_path/"t.jsonl", fmt)) == exs
        assert bool(done.ids) == ids_path(tmp_path/"t.jsonl").exists() == (("id" not in FORMATS[fmt].holds) and any(e.id for e in exs))
    go()

@pytest.mark.parametrize("b", FORMATS)
@pytest.mark.parametrize("a", FORMATS)
def test_what_cannot_be_held_is_refused_and_named(a, b):
    @given(held(FORMATS[a].holds, FORMATS[a].preference))
    @quick(5)
    def go(ex):
        lost = uses(ex) - FORMATS[b].holds - {"id", "input"}
        assert uses(ex) - FORMATS[b].holds <= set(loses(a, b))
        if FORMATS[b].preference and ex.rejected is None:
            with pytest.raises(DataError, match="needs a rejected answer"): fit(ex, b)
        elif lost:
            with pytest.raises(DataError) as e: fit(ex, b)
            assert all(FEATURES[k] in e.value.message for k in lost)
            try: less = fit(ex, b, lossy=True)
            except DataError: return
            assert uses(less) <= FORMATS[b].holds
            through(less, b)
        else: assert through(ex, b) == replace(ex, id=ex.id if "id" in FORMATS[b].holds else "", input_at=ex.input_at if "input" in FORMATS[b].holds else None)
    go()

def test_records_of_others_are_read():
    r = dict(messages=[dict(role="user", content="Hi", name=None, tool_calls=None), dict(role="assistant", content=None, tool_calls=[dict(type="function", function=dict(name="find", arguments=dict(n=1)))]), dict(role="tool", name="find", content="x"), dict(role="assistant", content="Yo")], tools=json.dumps([TOOL]))
    ex = FORMATS["trl"].read(r)  # nulls as Arrow writes them, arguments as objects, no ids, tools as text
    assert not check(r, "trl") and ex.turns[1].calls == (Call("find", '{"n": 1}', "call_1"),) and ex.turns[2].call_id == "call_1" and ex.tools == [TOOL]
    assert FORMATS["trl-prompt-completion"].read(dict(prompt="Hi", completion="Yo")) == ask("Hi", "Yo")
    s = dict(system="S", conversations=[{"from": "user", "value": "Hi"}, {"from": "chatgpt", "value": "Yo"}])
    assert not check(s, "sharegpt") and FORMATS["sharegpt"].read(s) == ask("Hi", "Yo", "S")
    al = dict(instruction="Sum up", input="a\nb", output="ab", history=[["q", "a"]])
    assert FORMATS["alpaca"].write(FORMATS["alpaca"].read(al)) == al and FORMATS["openai"].write(fit(FORMATS["alpaca"].read(al), "openai"))["messages"][2]["content"] == "Sum up\na\nb"

def test_ids_of_another_file_are_refused(tmp_path):
    p = tmp_path/"t.jsonl"
    write([example(i, "openai") for i in range(12)], p, "openai")
    with open(p, "ab") as f: f.write(b"{}\n")
    with pytest.raises(DataError, match="belong to another file"): list(read(p, "openai"))
    write([replace(example(i, "openai"), id="") for i in range(12)], p, "openai")
    assert [f.name for f in tmp_path.iterdir()] == ["t.jsonl"] and len(list(read(p, "openai"))) == 12
    with pytest.raises(DataError, match="no such file of ids"): list(read(p, "openai", ids=tmp_path/"x"))


# ---- detection

@pytest.mark.parametrize("fmt", FORMATS)
def test_detection_decides_only_when_it_can(fmt, tmp_path):
    recs = records(fmt, 20); recs[7] = b"{broken"
    p = put(tmp_path/"t.jsonl", recs)
    assert fmt in candidates(p)
    same = {"openai", "together", "trl"}, {"openai-preference", "together-preference"}, {"together-instruction", "trl-prompt-completion"}
    twins = next((s for s in same if fmt in s), {fmt})
    if fmt in ("trl", "trl-prompt-completion") : recs = records(fmt, 20)
    if "id" in FORMATS[fmt].holds or len(twins) == 1: assert detect(p) == fmt and validate(p).format == fmt
    else:
        with pytest.raises(DataError, match="several formats"): detect(p)
        assert set(candidates(p)) == twins

def test_no_format_at_all(tmp_path):
    with pytest.raises(DataError, match="no training file that is known"): detect(put(tmp_path/"t.jsonl", [dict(a=1)]*5))
    with pytest.raises(DataError, match="no training file that is known"): detect(put(tmp_path/"e.jsonl", []))


# ---- nothing is half-written

WRITER = """
import sys, time
from somaagent.data.chatformats import ask
from somaagent.data.formats import write
def slow():
    for i in range(10**6):
        if i == 500: print("writing", flush=True)
        if i > 500: time.sleep(.001)
        yield ask(f"Where is order {i}?", "There.", id=str(i))
write(slow(), sys.argv[1], "openai")
"""

@pytest.mark.parametrize("sig", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_write_leaves_the_old_file(sig, tmp_path):
    p = tmp_path/"t.jsonl"
    old = write([example(i, "openai") for i in range(12)], p, "openai")
    child = subprocess.Popen([sys.executable, "-c", WRITER, str(p)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert child.stdout.readline() == "writing\n"
    child.send_signal(sig); child.wait(30)
    assert [e.id for e in read(p, "openai")] == [f"int_{i}" for i in range(12)]
    parts = list(tmp_path.glob(".*.part"))
    assert bool(parts) == (sig == signal.SIGKILL)
    assert write([example(i, "openai") for i in range(12)], p, "openai").hash == old.hash
    assert {f.name for f in tmp_path.iterdir()} == {"t.jsonl", "t.jsonl.ids"}

def test_a_full_disk_is_an_error_that_says_so(tmp_path):
    code = "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\nfrom somaagent.data.chatformats import ask\nfrom somaagent.data.formats import write\ntry: write((ask(f'Where is {i}?', 'There.') for i in range(10**5)), sys.argv[1], 'openai')\nexcept Exception as e: print(type(e).__name__, e)"
    out = subprocess.run([sys.executable, "-c", code, str(tmp_path/"t.jsonl")], capture_output=True, text=True)
    assert out.stdout.startswith("DataError the file cannot be written") and "nothing half-written was left" in out.stdout and not list(tmp_path.iterdir()), (out, list(tmp_path.iterdir()))

def test_where_a_file_cannot_go(tmp_path):
    with pytest.raises(DataError, match="JSONL"): write([], tmp_path/"t.csv", "openai")
    with pytest.raises(DataError, match="no such folder"): write([], tmp_path/"a"/"t.jsonl", "openai")


# ---- datasets

def rows(n, tag, **more):
    return pl.DataFrame([dict(id=f"{tag}{i}", ts=1_790_000_000_000+i, user_id=f"u{i%5}", prompt=f"Where is order {i}?", answer=f"In {i} days.", category="order", quality=.9, reference=f"Order {i}: {i} days.", meta="{}", weight=1.) for i in range(n)]).cast(COLUMNS)

@pytest.fixture
def desk(tmp_path): return write_dataset(tmp_path, "desk", dict(train=rows(40, "int_"), validation=rows(12, "val_"), test=rows(11, "test_")), rules={}, lineage={})

@pytest.mark.parametrize("fmt", [f for f in FORMATS if not FORMATS[f].preference])
def test_export_of_a_dataset(fmt, desk, tmp_path):
    rep = export(desk, tmp_path, fmt, system="" if fmt == SYSTEM else "You are brief.", tokenizer="tiny", epochs=3, usd_per_million=2)
    assert rep.ok and rep.price.usd > 0 and rep.written.path.name == f"{desk.name}-train-{fmt}.jsonl"
    back = list(read(rep.written.path, fmt))
    assert [e.id for e in back] == [f"int_{i}" for i in range(40)] and back[3].answer == (Turn("assistant", "In 3 days."),)
    val = export(desk, tmp_path/"val.jsonl", fmt, split="validation")
    assert next(read(val.written.path, fmt)).answer[0].content == "Order 0: 0 days." and val.split == "validation"
    assert val.ok == (FORMATS[fmt].min_examples <= 12)

def test_what_cannot_be_exported(desk, tmp_path):
    for fmt in ("openai-preference", "together-preference", "trl-preference"):
        with pytest.raises(DataError, match="needs a rejected answer"): export(desk, tmp_path/"p.jsonl", fmt)
    with pytest.raises(DataError, match="no such split"): export(desk, tmp_path/"p.jsonl", "openai", split="dev")
    with pytest.raises(DataError, match="no such column"): export(desk, tmp_path/"p.jsonl", "openai", column="best")
    with pytest.raises(DataError, match="no dataset here"): export(tmp_path, tmp_path/"p.jsonl", "openai")
    (desk/"train.parquet").chmod(0o644); (desk/"train.parquet").write_bytes(b"x")
    with pytest.raises(DataError, match="changed after it was written"): export(desk, tmp_path/"p.jsonl", "openai")
    assert not (tmp_path/"p.jsonl").exists()

def test_conversations_and_rejected_answers_of_a_dataset(tmp_path, monkeypatch):
    from somaagent.data import dataset
    monkeypatch.setattr(dataset, "COLUMNS", COLUMNS | dict(messages=pl.String, rejected=pl.String))
    talk = json.dumps([dict(role="user", content="Hi"), dict(role="assistant", content="Hello"), dict(role="user", content="Where is it?")])
    more = lambda n, tag: rows(n, tag).with_columns(messages=pl.when(pl.int_range(pl.len()) == 0).then(pl.lit(talk)), rejected=pl.lit("No idea."))
    ds = write_dataset(tmp_path, "talks", dict(train=more(12, "int_"), validation=more(3, "v"), test=more(3, "t")), rules={}, lineage={})
    exs = list(from_dataset(ds, system="Be brief."))
    assert [t.content for t in exs[0].turns] == ["Be brief.", "Hi", "Hello", "Where is it?", "In 0 days."] and exs[0].rejected[0].content == "No idea."
    assert export(ds, tmp_path/"p.jsonl", "openai-preference").ok
    assert export(ds, tmp_path/"c.jsonl", "openai", lossy=True).ok
    with pytest.raises(DataError, match="cannot hold a rejected answer"): export(ds, tmp_path/"x.jsonl", "openai")
