"""`soma serve` as a new user starts it (fresh home, no provider, no key but its own), asked by the clients that applications already have, unchanged: base_url and key, nothing else."""
import contextlib, importlib, json, os, shutil, signal, subprocess, sys
from pathlib import Path

import pytest

from conftest import missing

ORDER = dict(type="object", properties=dict(id=dict(type="integer", minimum=1, maximum=99999), reason=dict(type="string", enum=["late", "broken", "wrong"])), required=["id", "reason"], additionalProperties=False)
TOOLS = [dict(type="function", function=dict(name="look_up", description="Look up an order", parameters=ORDER))]
ASK = [dict(role="user", content="Where is my order 4711?")]

class Served:
    "The process and its address"
    def __init__(self, home):
        self.home = home
        env = {k: v for k, v in os.environ.items() if not k.endswith("_API_KEY")}
        self.p = subprocess.Popen([str(Path(sys.executable).with_name("soma")), "serve", "--port", "0"], stdout=subprocess.PIPE, stderr=open(home.parent/"err", "w"), text=True, env={**env, "SOMA_STORES_HOME": str(home), "SOMA_PROGRESS": "none"})
        for line in self.p.stdout:
            if line.startswith("Ready"): break
        else: raise AssertionError((home.parent/"err").read_text()[-3000:])
        cred = json.loads((home/"credentials.json").read_text())
        self.url, self.key = cred["base_url"], cred["api_key"]
        for m in ("openai", "anthropic", "langchain_openai"):      # while the process loads its model
            with contextlib.suppress(ImportError): importlib.import_module(m)
    def rows(self):
        "What is in the log so far"
        with contextlib.suppress(FileNotFoundError): return [json.loads(l) for f in sorted(self.home.glob("spool/sp_*/*")) if f.suffix in (".jsonl", ".open") for l in f.read_text().split("\n")[:-1]]
        return self.rows()          # a file was renamed in between

@pytest.fixture(scope="module")
def served(tmp_path_factory):
    s = Served(tmp_path_factory.mktemp("clients")/"home")
    yield s
    s.p.send_signal(signal.SIGTERM)
    try: s.p.wait(30)
    except subprocess.TimeoutExpired: s.p.kill(); s.p.wait()

@pytest.fixture(scope="module")
def openai(served):
    mod = pytest.importorskip("openai")
    c = mod.OpenAI(base_url=served.url+"/v1", api_key=served.key, max_retries=0)
    yield c
    c.close()

def test_openai_chat_and_stream(openai, served):
    whole = openai.chat.completions.create(model="tiny", messages=ASK, max_tokens=24)
    m = whole.choices[0]
    assert m.message.role == "assistant" and m.message.content.strip() and m.finish_reason in ("stop", "length") and whole.usage.total_tokens == whole.usage.prompt_tokens+whole.usage.completion_tokens > 0
    chunks = list(openai.chat.completions.create(model="tiny", messages=ASK, max_tokens=24, stream=True, stream_options=dict(include_usage=True)))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == m.message.content and len(chunks) > 4
    assert chunks[-1].usage.model_dump(exclude={"cost_usd"}) == whole.usage.model_dump() and chunks[-1].usage.cost_usd == "0"  # what streams cost stands where usage was asked for
    assert not chunks[-1].choices and [c.choices[0].finish_reason for c in chunks if c.choices][-1] == m.finish_reason
    with openai.chat.completions.stream(model="tiny", messages=ASK, max_tokens=24) as s:      # the client's own accumulator
        kinds = {e.type for e in s}
        assert {"chunk", "content.delta", "content.done"} <= kinds and s.get_final_completion().choices[0].message.content == m.message.content

def test_openai_tools_and_the_turn_after(openai):
    ask = dict(model="tiny", messages=ASK, tools=TOOLS, tool_choice="required", max_tokens=60)
    m = openai.chat.completions.create(**ask).choices[0]
    call = m.message.tool_calls[0]
    got = json.loads(call.function.arguments)
    assert m.finish_reason == "tool_calls" and m.message.content is None and call.function.name == "look_up" and 1 <= got["id"] <= 99999 and got["reason"] in ("late", "broken", "wrong")
    parts = [t for c in openai.chat.completions.create(**ask, stream=True) for t in (c.choices[0].delta.tool_calls or [])]
    assert parts[0].id and parts[0].function.name == "look_up" and json.loads("".join(p.function.arguments or "" for p in parts)) == got and {p.index for p in parts} == {0}
    turn = [*ASK, m.message, dict(role="tool", tool_call_id=call.id, content=json.dumps(dict(status="on its way")))]     # the message goes back as the client gave it
    after = openai.chat.completions.create(model="tiny", messages=turn, tools=TOOLS, max_tokens=24).choices[0]
    assert after.message.content and not after.message.tool_calls and after.finish_reason in ("stop", "length")
    two = [*TOOLS, dict(type="function", function=dict(name="cancel", parameters=dict(ORDER)))]
    assert openai.chat.completions.create(**dict(ask, tools=two)).choices[0].message.tool_calls[0].function.name in ("look_up", "cancel")
    assert openai.chat.completions.create(**dict(ask, tools=two, tool_choice=dict(type="function", function=dict(name="cancel")))).choices[0].message.tool_calls[0].function.name == "cancel"
    assert not openai.chat.completions.create(**dict(ask, tool_choice="none", max_tokens=8)).choices[0].message.tool_calls

def test_openai_structured_output(openai):
    form = dict(type="json_schema", json_schema=dict(name="order", strict=True, schema=ORDER))
    ask = dict(model="tiny", messages=ASK, max_tokens=60)
    whole = json.loads(openai.chat.completions.create(**ask, response_format=form).choices[0].message.content)
    assert set(whole) == {"id", "reason"} and whole["reason"] in ("late", "broken", "wrong")
    assert json.loads("".join(c.choices[0].delta.content or "" for c in openai.chat.completions.create(**ask, response_format=form, stream=True) if c.choices)) == whole
    from pydantic import BaseModel
    class Order(BaseModel):
        id: int
        tags: list[str]
        urgent: bool
    got = openai.chat.completions.parse(**dict(ask, max_tokens=400), response_format=Order).choices[0].message.parsed
    assert isinstance(got, Order) and isinstance(got.urgent, bool)

def test_openai_completions_embeddings_models(openai, served):
    text = openai.completions.create(model="tiny", prompt="Where is my order?", max_tokens=12).choices[0].text
    assert text and "".join(c.choices[0].text for c in openai.completions.create(model="tiny", prompt="Where is my order?", max_tokens=12, stream=True)) == text
    vectors = openai.embeddings.create(model="minilm", input=["where is my order", "the parcel has not come", "blue"])      # the client asks for base64 by itself
    a, b, c = (d.embedding for d in vectors.data)
    dot = lambda x, y: sum(i*j for i, j in zip(x, y))
    assert len(a) == 384 and abs(dot(a, a)-1) < 1e-3 and dot(a, b) > dot(a, c) and vectors.usage.prompt_tokens > 5
    assert abs(dot(openai.embeddings.create(model="minilm", input="blue", encoding_format="float").data[0].embedding, c)-1) < 1e-3
    assert [m.id for m in openai.models.list()] == ["local/tiny", "local/minilm"] and openai.models.retrieve("tiny").id == "local/tiny"

def test_openai_errors_are_of_their_types(openai, served):
    import openai as mod
    say = openai.chat.completions.create
    with pytest.raises(mod.AuthenticationError) as e: mod.OpenAI(base_url=served.url+"/v1", api_key="sk-wrong", max_retries=0).chat.completions.create(model="tiny", messages=ASK)
    assert e.value.status_code == 401 and e.value.request_id
    with pytest.raises(mod.NotFoundError) as e: say(model="gpt-nobody", messages=ASK)
    assert e.value.code == "model_not_found" and e.value.param == "model"
    for kw in (dict(messages=[]), dict(messages=ASK, temperature=9), dict(messages=[dict(role="user", content="word "*9000)]), dict(messages=ASK, n=2), dict(messages=[dict(role="king", content="x")])):
        with pytest.raises(mod.BadRequestError): say(model="tiny", **kw)
    with pytest.raises(mod.NotFoundError): openai.images.generate(model="tiny", prompt="x")

def test_async_openai_in_parallel(served):
    import asyncio, openai as mod
    async def go():
        async with mod.AsyncOpenAI(base_url=served.url+"/v1", api_key=served.key, max_retries=0) as c:
            one = lambda i: c.chat.completions.create(model="tiny", messages=[dict(role="user", content=f"Where is order {i % 3}?")], max_tokens=8)
            return [r.choices[0].message.content for r in await asyncio.gather(*[one(i) for i in range(12)])]
    got = asyncio.run(go())
    assert all(got) and all(got[i] == got[i % 3] for i in range(12)), got       # beside others, the same answer as alone

def test_anthropic_client(served):
    mod = pytest.importorskip("anthropic")
    c = mod.Anthropic(base_url=served.url, api_key=served.key, max_retries=0)
    ask = dict(model="tiny", max_tokens=40, messages=ASK)
    m = c.messages.create(**ask, system="You answer questions about orders.")
    assert (m.type, m.role, m.content[0].type) == ("message", "assistant", "text") and m.content[0].text and m.stop_reason in ("end_turn", "max_tokens") and m.usage.input_tokens > 0 < m.usage.output_tokens
    with c.messages.stream(**ask, system="You answer questions about orders.") as s: assert "".join(s.text_stream) == m.content[0].text and s.get_final_message().usage == m.usage
    tools = [dict(name="look_up", description="Look up an order", input_schema=ORDER)]
    with c.messages.stream(**dict(ask, max_tokens=80), tools=tools, tool_choice=dict(type="any")) as s: use = s.get_final_message()
    b = next(b for b in use.content if b.type == "tool_use")
    assert b.name == "look_up" and b.input["reason"] in ("late", "broken", "wrong") and use.stop_reason == "tool_use"
    turn = [*ASK, dict(role="assistant", content=use.content), dict(role="user", content=[dict(type="tool_result", tool_use_id=b.id, content="on its way")])]
    assert c.messages.create(**dict(ask, messages=turn), tools=tools).content[0].type == "text"
    assert "local/tiny" in [x.id for x in c.models.list()]
    with pytest.raises(mod.AuthenticationError): mod.Anthropic(base_url=served.url, api_key="no", max_retries=0).messages.create(**ask)
    with pytest.raises(mod.NotFoundError): c.messages.create(**dict(ask, model="claude-nobody"))
    with pytest.raises(mod.BadRequestError): c.messages.create(**dict(ask, messages=[]))
    assert mod.Anthropic(base_url=served.url, api_key=None, auth_token=served.key, max_retries=0).messages.create(**dict(ask, max_tokens=2)).content      # the newer of its two key headers

def test_langchain(served):
    lc = pytest.importorskip("langchain_openai")
    from langchain_core.messages import ToolMessage
    from langchain_core.tools import tool
    from pydantic import BaseModel
    llm = lc.ChatOpenAI(model="tiny", base_url=served.url+"/v1", api_key=served.key, max_retries=0, max_tokens=60, temperature=0)
    whole = llm.invoke("Where is my order?")
    assert whole.content and whole.usage_metadata["total_tokens"] > 0 and whole.response_metadata["finish_reason"] in ("stop", "length")
    parts = list(llm.stream("Where is my order?"))
    assert "".join(p.content for p in parts) == whole.content and len(parts) > 3
    @tool
    def look_up(id: int, urgent: bool) -> str:
        "Look up an order"
        return "on its way"
    bound = llm.bind_tools([look_up], tool_choice="look_up")
    m = bound.invoke("Where is my order 7?")
    call = m.tool_calls[0]
    assert call["name"] == "look_up" and isinstance(call["args"]["id"], int) and isinstance(call["args"]["urgent"], bool)
    chunks = list(bound.stream("Where is my order 7?"))
    assert sum(chunks[1:], chunks[0]).tool_calls[0]["args"] == call["args"]
    assert llm.invoke(["Where is my order 7?", m, ToolMessage(look_up.invoke(call).content, tool_call_id=call["id"])]).content
    class Order(BaseModel):
        "An order that somebody asks about"
        id: int
        urgent: bool
    for how in ("json_schema", "function_calling"): assert isinstance(llm.with_structured_output(Order, method=how).invoke("Where is my order 7?"), Order)
    assert len(lc.OpenAIEmbeddings(model="minilm", base_url=served.url+"/v1", api_key=served.key, check_embedding_ctx_length=False).embed_query("where is it")) == 384

def test_curl(served):
    curl = shutil.which("curl") or missing("curl")
    def ask(*args): return subprocess.run([curl, "-sS", "--max-time", "30", *args], capture_output=True, text=True, timeout=60)
    auth, body = ("-H", f"Authorization: Bearer {served.key}", "-H", "Content-Type: application/json"), dict(model="tiny", messages=ASK, max_tokens=24)
    r = ask("-i", *auth, "-d", json.dumps(body), served.url+"/v1/chat/completions")
    head, _, text = r.stdout.replace("\r", "").partition("\n\n")
    assert head.startswith("HTTP/1.1 200") and "x-request-id:" in head and "x-soma-interaction:" in head and "x-soma-cost-usd: 0" in head
    answer = json.loads(text)["choices"][0]["message"]["content"]
    r = ask("-N", *auth, "-d", json.dumps(dict(body, stream=True)), served.url+"/v1/chat/completions")
    events = [l[6:] for l in r.stdout.splitlines() if l.startswith("data: ")]
    assert events[-1] == "[DONE]" and "".join(json.loads(e)["choices"][0]["delta"].get("content") or "" for e in events[:-1] if json.loads(e)["choices"]) == answer
    r = ask("-N", "-H", f"x-api-key: {served.key}", "-H", "anthropic-version: 2023-06-01", "-d", json.dumps(dict(body, stream=True)), served.url+"/v1/messages")
    assert "event: message_start" in r.stdout and r.stdout.rstrip().endswith('data: {"type":"message_stop"}')
    big = json.dumps(dict(body, metadata=dict(pad="x"*40_000)))       # curl waits for `100 Continue` before it sends more than a megabyte, or when told to
    assert json.loads(ask(*auth, "-H", "Expect: 100-continue", "-d", big, served.url+"/v1/chat/completions").stdout)["choices"]
    assert ask("-o", os.devnull, "-w", "%{http_code}", "-d", "{}", served.url+"/v1/chat/completions").stdout == "401"
    assert json.loads(ask(*auth, served.url+"/v1/models").stdout)["data"][0]["id"] == "local/tiny"

def test_each_of_them_is_an_interaction(served, openai):
    for _ in range(3):        # a file of the log may go to the warehouse between the answer and the look
        raw = openai.chat.completions.with_raw_response.create(model="tiny", messages=ASK, max_tokens=4, user="ann", extra_headers={"x-soma-durable": "1"})
        if got := [r for r in served.rows() if r.get("id") == raw.headers["x-soma-interaction"]]: break
    assert raw.headers["x-soma-logged"] == "1" and (got[0]["user_id"], got[0]["prompt"], got[0]["model"], got[0]["status"]) == ("ann", ASK[0]["content"], "local/tiny", "ok") and got[0]["meta"]["request_id"] == raw.headers["x-request-id"]
