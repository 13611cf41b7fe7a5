"""One call to any model: through the real SDKs against servers on loopback, with every fault they can have, and against the tiny model of this machine."""
import asyncio, json, sys, threading, time
from decimal import Decimal
from pathlib import Path

import anthropic, openai  # noqa: F401  (their imports take seconds, which no deadline below should see)
import pytest
from pydantic import BaseModel

sys.path.append(str(Path(__file__).parent/"fakes"))
from models import FakeModels, chunks_of, completion, events_of, message
from somaagent.core.errors import ModelError
from somaagent.llm import ask as ask_module
from somaagent.llm import catalog
from somaagent.llm.ask import Scripted, aask, ask, astream, stream
from somaagent.llm.catalog import Usage
from somaagent.llm.resilience import DeadlineError, Retry, deadline
from somaagent.llm.targets import BadRequest, KeyRefused, MissingKey, RateLimited, Unavailable, WrongForm, target

Q = "Where is my card?"
FAST = Retry(base=.01, top=.02)

@pytest.fixture(autouse=True)
def keys(monkeypatch, home):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-openai"); monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-anthropic")
    for k in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"): monkeypatch.delenv(k, raising=False)
    ask_module._breakers.clear()

@pytest.fixture
def fake(monkeypatch):
    with FakeModels() as f:
        monkeypatch.setenv("OPENAI_BASE_URL", f.url); monkeypatch.setenv("ANTHROPIC_BASE_URL", f.origin)
        yield f

both = pytest.mark.parametrize("model", ["openai/gpt-4o-mini", "anthropic/claude-sonnet-5-5"])

# ---- the fake says what the published types say ----------------------------------------------------------------------------------------------

def test_the_fakes_answers_are_of_the_published_types():
    from anthropic.types import Message
    from openai.types.chat import ChatCompletion, ChatCompletionChunk
    for calls in ((), [("look", dict(id=3))]):
        ChatCompletion.model_validate_json(json.dumps(completion(calls=calls)), strict=True); Message.model_validate_json(json.dumps(message(calls=calls)), strict=True)
        for e in chunks_of(completion(calls=calls))[:-1]: ChatCompletionChunk.model_validate_json(e.removeprefix("data: "), strict=True)
        assert events_of(message(calls=calls))[-1].startswith("event: message_stop")

# ---- the ordinary case -----------------------------------------------------------------------------------------------------------------------

@both
def test_an_answer_has_everything(fake, model):
    a = ask(model, [dict(role="system", content="Be kind."), dict(role="user", content=Q)], temperature=.3, max_tokens=100, retry=FAST)
    path, headers, body = fake.requests[0]
    assert a.text == "Your card is on its way." and a.finish == "stop" and a.model == model and a.attempts == 1 and a.request_id == "req_42" and a.latency_ms > 0 and not a.estimated
    assert a.raw["id"] in ("chatcmpl-abc", "msg_abc") and a.message == dict(role="assistant", content=a.text)
    assert (a.usage.prompt, a.usage.completion, a.usage.cached) == (1200, 300, 1024)
    assert a.cost_usd == catalog.cost(model, a.usage) > 0
    if model.startswith("openai"):
        assert a.usage.reasoning == 256 and body["max_completion_tokens"] == 100 and "max_tokens" not in body and body["temperature"] == .3 and headers["authorization"] == "Bearer sk-openai" and a.dropped == ()
    else: assert body["max_tokens"] == 100 and body["system"] == "Be kind." and "temperature" not in body and a.dropped == ("temperature",) and headers["anthropic-version"] == "2026-10-21" and headers["authorization"] == "Bearer sk-anthropic"

@both
def test_the_four_ways_give_the_same(fake, model):
    a = ask(model, Q)
    async def others():
        b, s = await aask(model, Q), astream(model, Q)
        return b, [p async for p in s], s.answer
    b, parts, c = asyncio.run(others())
    with stream(model, Q) as s: whole = "".join(s)
    assert a.text == b.text == "".join(parts) == whole == s.answer.text and len(parts) > 2
    assert {(x.usage, x.cost_usd, x.finish, x.model) for x in (a, b, c, s.answer)} == {(a.usage, a.cost_usd, "stop", model)}
    assert all(r["stream_options"] == dict(include_usage=True) for r in fake.bodies if r.get("stream") and "stream_options" in r) and s.answer.request_id == "req_42"

def test_the_price_is_that_of_the_processing_that_the_provider_reports(fake):
    u = Usage(1200, 300, 1024, reasoning=256)
    for tier, model in (("default", "openai/gpt-5"), ("flex", "openai/gpt-5"), ("priority", "openai/gpt-5-mini")):
        fake.plan += [dict(tier=tier)]*2
        with stream(model, Q) as s: "".join(s)
        assert ask(model, Q).cost_usd == s.answer.cost_usd == catalog.cost(model, u, service_tier=tier)
    assert catalog.cost("openai/gpt-5", u, service_tier="flex")*2 == catalog.cost("openai/gpt-5", u)
    fake.plan += [dict(usage=dict(input_tokens=1000, output_tokens=100, service_tier="batch"))]*2
    a = ask("anthropic/claude-sonnet-5-5", Q)
    with stream("anthropic/claude-sonnet-5-5", Q) as s: "".join(s)
    assert a.cost_usd == s.answer.cost_usd == catalog.cost("anthropic/claude-sonnet-5-5", Usage(1000, 100), processing="batch")

def test_an_older_version_of_anthropics_api_takes_sampling_parameters(fake):
    from dataclasses import replace
    t = replace(target("anthropic/claude-3-haiku"), version="2023-06-01")
    a = ask(t, Q, temperature=.3)
    _, headers, body = fake.requests[0]
    assert body["temperature"] == .3 and headers["anthropic-version"] == "2023-06-01" and headers["x-api-key"] == "sk-anthropic" and a.dropped == ()

def look(id: int, kind: str="card")->str:
    "Look an order up"

@both
def test_tool_calls_whole_and_streamed(fake, model):
    fake.plan += [dict(calls=[("look", dict(id=3)), ("look", dict(id=4))])]*2
    a = ask(model, Q, tools=[look])
    with stream(model, Q, tools=[look], tool_choice="required") as s: assert list(s) == []
    assert [c["arguments"] for c in a.tool_calls] == [dict(id=3), dict(id=4)] == [c["arguments"] for c in s.answer.tool_calls] and a.finish == s.answer.finish == "tool_calls"
    body = fake.bodies[0]
    props = (body["tools"][0]["function"]["parameters"] if model.startswith("openai") else body["tools"][0]["input_schema"])["properties"]
    assert props["id"]["type"] == "integer" and props["kind"]["default"] == "card"
    fake.plan.append({})
    b = ask(model, [dict(role="user", content=Q), a.message, *[dict(role="tool", tool_call_id=c["id"], content="found") for c in a.tool_calls]], tools=[look])
    assert b.text and "found" in json.dumps(fake.bodies[-1]["messages"])

def test_arguments_that_are_not_json_are_said_not_lost(fake):
    fake.plan.append(dict(calls=[("look", '{"id": 3')]))
    assert ask("openai/gpt-4o-mini", Q, tools=[look]).tool_calls[0]["arguments"] == dict(_unreadable='{"id": 3')

@both
def test_images_go_through_untouched(fake, model):
    parts = [dict(type="text", text="What is this?"), dict(type="image_url", image_url=dict(url="data:image/png;base64,iVBORw0KGgo="))]
    rows = []
    ask(model, [dict(role="user", content=parts)], log=rows.append)
    sent = fake.bodies[0]["messages"][0]["content"]
    assert sent == parts if model.startswith("openai") else sent[1]["source"] == dict(type="base64", media_type="image/png", data="iVBORw0KGgo=")
    assert "iVBORw0KGgo" not in json.dumps(rows, default=str) and rows[0]["prompt"] == "What is this?"

def test_servers_that_speak_like_openai(fake, monkeypatch):
    a = ask(f"{fake.url}#llama-3", Q, max_tokens=7, extra_thing=1, seed=5)
    path, headers, body = fake.requests[0]
    assert path == "/v1/chat/completions" and body["model"] == "llama-3" and body["max_tokens"] == 7 and body["extra_thing"] == 1 and body["seed"] == 5 and "sk-" not in headers["authorization"], "no key of another provider goes to a server"
    assert a.cost_usd is None and a.model.endswith("/llama-3")
    monkeypatch.setenv("TOGETHER_BASE_URL", fake.url); monkeypatch.setenv("TOGETHER_API_KEY", "sk-together"); monkeypatch.setenv("OLLAMA_BASE_URL", fake.url)
    t = ask("llama-3", Q)
    assert t.model == "together/meta-llama/Llama-3-8b-chat-hf" and t.cost_usd > 0 and fake.requests[1][1]["authorization"] == "Bearer sk-together"
    assert ask("ollama/phi3", Q).model == "ollama/phi3" and fake.bodies[2]["model"] == "phi3"
    monkeypatch.setenv("MY_KEY", "sk-mine")
    ask("small", Q, base_url=fake.url, key_env="MY_KEY")
    assert fake.requests[3][1]["authorization"] == "Bearer sk-mine"
    for bad in ("http://user:pw@127.0.0.1/v1#m", "http:///v1#m", "azure/phi-3-mini-128k-instruct", "", None, "nobody/knows", "file:///etc/passwd#m"):
        with pytest.raises(ModelError) as e: ask(bad, Q)
        assert "pw" not in str(e.value)

# ---- structured output -----------------------------------------------------------------------------------------------------------------------

class Ticket(BaseModel):
    topic: str
    urgent: bool

SCHEMA = dict(type="object", properties=dict(topic=dict(type="string"), urgent=dict(type="boolean")), required=["topic", "urgent"])

@both
def test_structured_output_is_asked_for_parsed_and_checked(fake, model):
    good = dict(topic="card", urgent=True)
    answer = dict(text=json.dumps(good)) if model.startswith("openai") else dict(calls=[("json_answer", good)])
    fake.plan += [answer]*3
    assert ask(model, Q, response_format=Ticket).parsed == Ticket(topic="card", urgent=True)
    assert ask(model, Q, response_format=SCHEMA).parsed == good
    with stream(model, Q, response_format=Ticket) as s: "".join(s)
    assert s.answer.parsed.urgent is True
    if model.startswith("openai"):
        assert fake.bodies[0]["response_format"]["json_schema"]["strict"] is True and "strict" not in fake.bodies[1]["response_format"]["json_schema"]
    for wrong in ('{"topic": 3}', "I cannot", '["topic"]', '{"topic": "x", "urgent": "maybe"}'):
        fake.plan.append(dict(text=wrong))
        with pytest.raises(WrongForm) as e: ask(model, Q, response_format=SCHEMA)
        assert e.value.answer.text == wrong

def test_repair_tells_the_model_and_adds_up_what_both_took(fake):
    fake.plan += [dict(text="{nonsense"), dict(text='{"topic": "card", "urgent": false}')]
    a = ask("openai/gpt-4o-mini", Q, response_format=Ticket, repair=1)
    assert a.parsed.urgent is False and a.usage.prompt == 2400 and a.cost_usd == 2*catalog.cost("openai/gpt-4o-mini", Usage(1200, 300, 1024, reasoning=256))
    assert fake.bodies[1]["messages"][-2]["content"] == "{nonsense" and "form" in fake.bodies[1]["messages"][-1]["content"]

def test_a_schema_fetches_nothing(fake):
    fake.plan.append(dict(text="{}"))
    with pytest.raises(Exception): ask("openai/gpt-4o-mini", Q, response_format={"$ref": f"{fake.url}/schema.json", "type": "object"})
    assert [p for p, *_ in fake.requests] == ["/v1/chat/completions"]

# ---- faults ----------------------------------------------------------------------------------------------------------------------------------

@both
def test_429_waits_as_long_as_the_server_says(fake, model):
    naps = []
    async def sleep(s): naps.append(s)
    fake.plan += [dict(status=429, headers={"retry-after": "7"}), dict(status=429, headers={"retry-after-ms": "120"})]
    a = ask(model, Q, sleep=sleep)
    assert a.attempts == 3 and naps == [7, .12] and len(fake.requests) == 3, "our retries only, the SDK's own are off"
    fake.plan += [dict(status=429, headers={"retry-after": "3600"}, message="slow down")]
    with pytest.raises(RateLimited, match="slow down") as e: ask(model, Q, sleep=sleep)
    assert e.value.status == 429 and e.value.headers["retry-after"] == "3600" and len(fake.requests) == 4

@both
def test_500s_are_tried_again_with_jitter_and_then_said(fake, model):
    naps = []
    async def sleep(s): naps.append(s)
    fake.plan += [dict(status=500), dict(status=529)]
    assert ask(model, Q, sleep=sleep).attempts == 3 and .375 <= naps[0] <= .5 and .75 <= naps[1] <= 1
    fake.plan += [dict(status=503)]*3
    with pytest.raises(Unavailable) as e: ask(model, Q, retry=FAST)
    assert e.value.status == 503 and len(fake.requests) == 6

@both
def test_what_will_not_pass_is_not_tried_again(fake, model):
    for status, kind in ((400, BadRequest), (401, KeyRefused), (403, KeyRefused), (404, BadRequest), (422, BadRequest)):
        fake.requests.clear(); fake.plan.append(dict(status=status, message="look here"))
        with pytest.raises(kind, match="look here"): ask(model, Q)
        assert len(fake.requests) == 1

@both
def test_stalls_end_at_the_deadline_and_at_the_patience_of_an_attempt(fake, model):
    fake.plan.append(dict(wait=8))
    t = time.monotonic()
    with pytest.raises(DeadlineError): ask(model, Q, timeout=.3)
    assert time.monotonic()-t < 5
    fake.plan += [dict(wait=8), {}]
    a = ask(model, Q, patience=.3, retry=FAST)
    assert a.attempts == 2 and a.text and time.monotonic()-t < 7
    with deadline(.2):
        fake.plan.append(dict(wait=8))
        with pytest.raises(DeadlineError): ask(model, Q, timeout=60)
    assert time.monotonic()-t < 7.5

@both
def test_connections_that_drop_and_servers_that_are_not_there(fake, model, monkeypatch):
    fake.plan += [dict(drop=True), dict(drop=True)]
    assert ask(model, Q, retry=FAST).attempts == 3
    with FakeModels() as gone: pass
    monkeypatch.setenv("OPENAI_BASE_URL", gone.url); monkeypatch.setenv("ANTHROPIC_BASE_URL", gone.origin)
    with pytest.raises(Unavailable, match="cannot be reached"): ask(model, Q, retry=FAST)

@both
@pytest.mark.parametrize("raw", ["<html>busy</html>", "{}", "[]", "null", '{"choices": []}', '{"choices": [{"message": 3}]}', '{"content": 7}', '{"id": "x", "choices": ', '"text"'])
def test_answers_that_are_none(fake, model, raw):
    fake.plan += [dict(raw=raw)]*3
    with pytest.raises(Unavailable): ask(model, Q, retry=FAST)
    assert len(fake.requests) == 3

def test_usage_that_makes_no_sense_is_estimated_and_said(fake):
    for usage in (dict(prompt_tokens=-3, completion_tokens=2, total_tokens=0), dict(prompt_tokens=10, completion_tokens="many", total_tokens=1), dict(prompt_tokens=3, completion_tokens=1, total_tokens=4, prompt_tokens_details=dict(cached_tokens=99))):
        fake.plan.append(dict(usage=usage))
        a = ask("openai/gpt-4o-mini", Q)
        assert a.estimated and a.usage.prompt > 0 and a.usage.completion == 6

@both
@pytest.mark.parametrize("fault", ["break_at", "end_at", "garbage_at", "error_at"])
def test_streams_that_break_carry_what_had_come(fake, model, fault):
    fake.plan.append({fault: 4})
    got = []
    with pytest.raises(Unavailable) as e:
        for p in (s := stream(model, Q, retry=FAST)): got.append(p)
    assert got and e.value.answer.text == "".join(got) and s.answer is None and len(fake.requests) == 1, "after the first piece nothing is tried again"

@both
def test_a_stream_that_stalls(fake, model):
    fake.plan.append(dict(stall_at=4, seconds=8))
    t = time.monotonic()
    with pytest.raises(Unavailable, match="in time"): list(stream(model, Q, patience=.3))
    fake.plan.append(dict(stall_at=4, seconds=8))
    with pytest.raises(DeadlineError): list(stream(model, Q, timeout=.3))
    assert time.monotonic()-t < 6

@both
def test_a_stream_is_tried_again_before_its_first_piece(fake, model):
    fake.plan += [dict(status=500), dict(break_at=0)]
    with stream(model, Q, retry=FAST) as s: assert "".join(s) == "Your card is on its way."
    assert s.answer.attempts == 3

def test_a_reader_that_leaves_is_logged_and_closes_the_connection(fake):
    rows = []
    s = stream("openai/gpt-4o-mini", Q, log=rows.append)
    assert next(s) == "Your "
    s.close()
    assert rows[0]["status"] == "error" and rows[0]["error"] == "the reader left" and rows[0]["answer"] == "Your "

# ---- chains, keys, deadlines ---------------------------------------------------------------------------------------------------------------

def test_a_list_of_models_is_asked_in_turn(fake, monkeypatch):
    fake.plan += [dict(status=500)]*3
    a = ask(["openai/gpt-4o-mini", "anthropic/claude-sonnet-5-5"], Q, retry=FAST)
    assert a.model == "anthropic/claude-sonnet-5-5" and a.failed[0][0] == "openai/gpt-4o-mini" and "500" in a.failed[0][1] and a.attempts == 4
    fake.plan += [dict(status=401)]
    assert ask(["openai/gpt-4o-mini", Scripted("here")], Q).text == "here"
    monkeypatch.delenv("OPENAI_API_KEY")
    with stream(["openai/gpt-4o-mini", "anthropic/claude-sonnet-5-5"], Q) as s: "".join(s)
    assert "OPENAI_API_KEY" in s.answer.failed[0][1]
    fake.plan += [dict(status=400)]
    n = len(fake.requests)
    with pytest.raises(BadRequest): ask(["anthropic/claude-sonnet-5-5", Scripted("here")], Q)
    assert len(fake.requests) == n+1
    with pytest.raises(Unavailable, match="no model answered"): ask(["openai/gpt-4o-mini", Scripted(ConnectionError("gone"))], Q, retry=Retry(tries=1))

def test_a_missing_key_is_named_and_nothing_is_sent(fake, monkeypatch):
    for model, var in (("openai/gpt-4o-mini", "OPENAI_API_KEY"), ("claude-3-haiku", "ANTHROPIC_API_KEY"), ("groq/x", "GROQ_API_KEY")):
        monkeypatch.delenv(var, raising=False)
        with pytest.raises(MissingKey, match=var): ask(model, Q)
        with pytest.raises(MissingKey, match=var): list(stream(model, Q))
    assert not fake.requests

def test_a_chain_stops_asking_who_is_down(fake):
    fake.plan += [dict(status=503)]*20
    for _ in range(12): ask(["openai/gpt-4o-mini", Scripted("here")], Q, retry=Retry(tries=1))
    assert len(fake.requests) == 10

def test_hedged(fake):
    fake.plan += [dict(wait=8, text="late"), dict(text="soon")]
    t = time.monotonic()
    assert ask("openai/gpt-4o-mini", Q, hedge_s=.2).text == "soon" and time.monotonic()-t < 6

def test_many_at_once_share_the_pool_and_loops_do_not_mix(fake):
    async def many(): return await asyncio.gather(*[aask("openai/gpt-4o-mini", Q) for _ in range(20)])
    for _ in range(4): assert len({a.id for a in asyncio.run(many())}) == 20
    asyncio.run(aask("openai/gpt-4o-mini", Q))
    assert len(ask_module._pools) <= 2, "the clients of loops that have ended go with them"
    got = []
    ts = [threading.Thread(target=lambda: got.append(ask("anthropic/claude-sonnet-5-5", Q).text)) for _ in range(8)]
    for t in ts: t.start()
    for t in ts: t.join(10)
    assert len(got) == 8
    async def inside(): return ask("openai/gpt-4o-mini", Q).text
    assert asyncio.run(inside())

def test_bad_requests_never_leave(fake):
    for kw in (dict(messages=[]), dict(messages=[dict(role="wizard", content="x")]), dict(temperature=9), dict(max_tokens=0), dict(tools=[lambda x: x]), dict(tool_choice="required"), dict(response_format=3)):
        with pytest.raises(ModelError): ask("openai/gpt-4o-mini", **{"messages": Q} | kw)
    assert not fake.requests

# ---- the log ---------------------------------------------------------------------------------------------------------------------------------

def test_calls_are_logged_as_interactions(fake, stores):
    from functools import partial
    from somaagent.data.interactions import log
    from somaagent.llm.prompts import shipped
    wh, _ = stores
    r = shipped()["assistant"].render(question=Q)
    a = ask("openai/gpt-4o-mini", r, log=partial(log, wh=wh), about=dict(app="desk", user_id="u1", meta=dict(trace="t1")))
    fake.plan.append(dict(status=400, message="bad"))
    with pytest.raises(BadRequest): ask("openai/gpt-4o-mini", Q, log=partial(log, wh=wh), about=dict(app="desk"))
    df = wh.query("SELECT id, prompt, answer, model, provider, toString(cost_usd) AS usd, status, error, prompt_tokens, meta['prompt_hash'] AS h, meta['trace'] AS t FROM interactions WHERE app = 'desk' ORDER BY id").to_dicts()
    assert len(df) == 2 and df[0]["id"] == a.id and Decimal(df[0]["usd"]) == a.cost_usd and df[0]["h"] == r.hash and df[0]["t"] == "t1" and df[0]["prompt_tokens"] == 1200
    assert df[1]["status"] == "error" and "bad" in df[1]["error"]
    assert "sk-" not in json.dumps(df)
    with pytest.raises(ModelError, match="a log is"): ask("openai/gpt-4o-mini", Q, log=wh)

def test_a_log_that_fails_loses_no_answer(fake):
    def broken(row): raise OSError("disk")
    assert ask("openai/gpt-4o-mini", Q, log=broken).text

# ---- this machine ----------------------------------------------------------------------------------------------------------------------------

def test_the_tiny_model_a_folder_and_a_registered_version(tmp_path):
    import shutil
    from somaagent.core.settings import data_dir
    from somaagent.release.registry import Registry
    from somaagent.store.artifacts import artifacts
    from somaagent.store.state import state
    a = ask("tiny", Q, max_tokens=12)
    with stream("local/tiny", Q, max_tokens=12) as s: text = "".join(s)
    assert a.text == text and a.cost_usd == 0 and a.usage == s.answer.usage
    assert ask("tiny", Q, response_format=Ticket, max_tokens=80).parsed.topic is not None
    call = ask("tiny", Q, tools=[look], tool_choice="required", max_tokens=80).tool_calls
    assert call[0]["name"] == "look" and isinstance(call[0]["arguments"]["id"], int)
    folder = tmp_path/"mine"; shutil.copytree(data_dir()/"tiny", folder)
    b = ask(str(folder), Q, max_tokens=12)
    assert b.text == a.text and b.model == "local/mine"
    reg = Registry(state(), artifacts())
    v = reg.ensure_base("desk", folder)
    for ref in ("local/desk", "local/desk@production", f"local/desk@{v.version}"): assert ask(ref, Q, max_tokens=12).text == a.text
    with pytest.raises(ModelError, match="no such version"): ask("local/desk@9.9.9", Q)
    with pytest.raises(ModelError): ask("local/nothing-here", Q, retry=FAST)

# ---- the catalogue has what the founding documents list ---------------------------------------------------------------------------------------

def test_the_catalogue_has_the_founding_models_with_prices():
    import datetime as dt
    for ref in ("claude-3-opus", "claude-3-sonnet", "claude-3-haiku", "gpt-4", "gpt-3.5-turbo", "llama-3", "phi-3"):
        m = catalog.find(ref)
        assert m.context and "chat" in m.can and catalog.price(ref, at=dt.date(2025, 6, 1)).cost(Usage(1000, 1000)) > 0, ref
    assert len([m for m in catalog.models("chat") if m.checked is None]) >= 5, "today's"

# ---- templates

@pytest.mark.parametrize("text", ["{% set a = 'x'*1000 %}" + "{% set a = a ~ a %}"*12 + "{{ a | length }}", "{% set a %}" + "x"*1000 + "{% endset %}" + "{% set a %}{{ a }}{{ a }}{% endset %}"*12 + "{{ a | length }}",
    "{{ (['x'*1000]*1000) | join | length }}", "{{ ''.join(['x'*1000]*1000) | length }}", "{{ (['']*1000) | join('x'*1000) | length }}", "{{ ''.join(['']*2) }}{{ ('x'*1000).join(['']*1000) | length }}", "{{ ([1] | batch(10**6, 'x') | first) | length }}",
    "{{ [1] | tojson(indent=10**6) | length }}", "{{ (1).to_bytes(10**6, 'big') | length }}", "{{ ['x'*1000]*1000 }}", "{{ (['x'*1000]*1000) | string | length }}", "{{ (['x'*1000]*1000) | json | length }}"])
def test_a_template_cannot_grow_without_end(text):
    from somaagent.core.errors import ModelError
    from somaagent.llm.prompts import Prompt
    with pytest.raises(ModelError): Prompt.of(dict(name="x", text=text)).render()

def test_what_templates_are_for_still_works():
    from somaagent.llm.prompts import Prompt
    text = "{{ xs | join(', ') }}|{{ ' '.join(xs) }}|{{ ds | join('/', attribute='n') }}|{{ xs | first ~ '-' ~ n }}|{{ d.get('k', 5000000) }}|{{ ['<'] | tojson }}|{% for r in xs | batch(2) %}[{{ r | join }}]{% endfor %}|{% set a %}{{ n }}{% endset %}{{ a ~ a }}"
    p = Prompt.of(dict(name="x", text=text, variables=dict(xs="list", ds="list", d="dict", n="int")))
    assert p.render(xs=["a", "b", "c"], ds=[dict(n=1), dict(n=2)], d={}, n=10**7).messages[0]["content"] == 'a, b, c|a b c|1/2|a-10000000|5000000|["\\u003c"]|[ab][c]|1000000010000000'

def test_odd_versions_are_no_versions(home):
    from somaagent.core.errors import ModelError
    from somaagent.llm.prompts import Prompt, Prompts
    ps = Prompts()
    ps.save(Prompt.of(dict(name="mine", text="hi")))
    for which in ("²", "99999999999999999999999", "0", "-1", "1.0", "'; DROP TABLE prompts; --"):
        with pytest.raises(ModelError): ps.get(f"mine@{which}")
    assert ps.get("mine@1").version == 1
