"Fine-tuning under faults: memory, disk, damaged files, odd rows, odd tokenizers, early stopping, several processes"
import errno, json, random, shutil

import polars as pl
import pytest

torch = pytest.importorskip("torch"); pytest.importorskip("trl")
from somaagent.core.errors import DataError, ModelError, NoUsableRowsError, TrainError
from somaagent.core.settings import data_dir
from somaagent.data.supportdesk import ask, reference
from somaagent.llm.chat import load_model
from somaagent.train import fit
from somaagent.train.export import merge, to_gguf
from somaagent.train.packing import CHATML, examples, give_template, load_rows
from somaagent.train.sft import SFTConfig, sft

JOB = dict(max_steps=6, batch=8, save_every=2, eval_every=2, rank=4)


def rows(n, seed):
    rng = random.Random(seed)
    return pl.DataFrame([dict(prompt=p, answer=reference(p)) for p in (ask(rng) for _ in range(n))])


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    d = tmp_path_factory.mktemp("ds")
    rows(48, 1).write_parquet(d / "train.parquet"); rows(12, 2).write_parquet(d / "validation.parquet")
    return d


@pytest.fixture(scope="module")
def whole(dataset, tmp_path_factory):
    "The job as it ends when nobody disturbs it"
    return sft(SFTConfig(**JOB), dataset, tmp_path_factory.mktemp("job"))


def losses(res): return [h["loss"] for h in res.history]


def stop_at(n):
    def f(step, steps, loss):
        if step == n: raise KeyboardInterrupt
    return f


@pytest.mark.slow
def test_packed_accumulated_and_stopped_early_resumes_exactly(dataset, tmp_path):
    "A packed job of two micro-batches with early stopping, interrupted twice, its newest checkpoint damaged: the same bytes as undisturbed"
    cfg = SFTConfig(**JOB | dict(max_steps=20, batch=4, epochs=99, lr=5e-2, save_every=3), eval_rows=6, layout="packed", micro_batch=2, patience=2)
    want = sft(cfg, dataset, tmp_path / "a")
    assert want.best_step < want.steps < 20
    assert want.best_step == min((h for h in want.history if h["val_loss"] is not None), key=lambda h: h["val_loss"])["step"]
    out, at = tmp_path / "b", want.steps - 1
    with pytest.raises(KeyboardInterrupt): sft(cfg, dataset, out, progress=stop_at(at))
    newest = sorted((out / "checkpoints").glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))[-1]
    f = newest / "adapter_model.safetensors"; raw = bytearray(f.read_bytes()); raw[-9] ^= 1; f.write_bytes(raw)
    got = sft(cfg, dataset, out)
    assert got.resumed_from == int(newest.name.split("-")[1]) - 3
    assert any("damaged" in n for n in got.notes)
    assert (got.hash, got.steps, got.best_step) == (want.hash, want.steps, want.best_step)
    assert losses(got) == pytest.approx(losses(want), abs=1e-5)


def test_layouts_and_micro_batches_learn_the_same(dataset, whole, tmp_path):
    for k, kw in enumerate((dict(layout="packed", micro_batch=2), dict(recompute=True))):
        assert losses(sft(SFTConfig(**JOB | dict(max_steps=1), **kw), dataset, tmp_path / str(k)))[0] == pytest.approx(losses(whole)[0], abs=1e-5)


def test_out_of_memory_halves_the_micro_batch(dataset, whole, tmp_path, monkeypatch):
    "Memory appears to run out after step 3, on a GPU and then as a processor says it: the batch stays, the losses too, and the job says what it did"
    errors = [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
              RuntimeError("[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")]
    real, calls = fit.lean_loss, []
    def lean(core, x, n=None):
        calls.append(len(x["labels"]))
        if len(calls) > 4 and errors: raise errors.pop(0)
        return real(core, x, n)
    monkeypatch.setattr(fit, "lean_loss", lean)
    res = sft(SFTConfig(**JOB), dataset, tmp_path / "job")
    assert (res.plan.batch, res.plan.micro_batch, res.resumed_from) == (8, 2, 2)
    assert [n.split(": ")[1] for n in res.notes] == ["going on with 4, 2 times per update; the batch stays 8", "going on with 2, 4 times per update; the batch stays 8"]
    assert losses(res) == pytest.approx(losses(whole), abs=1e-5)


def test_no_memory_at_all_is_a_clear_end(dataset, tmp_path, monkeypatch):
    real = fit.lean_loss
    def lean(core, x, n=None):
        if n is not None: raise MemoryError
        return real(core, x, n)
    monkeypatch.setattr(fit, "lean_loss", lean)
    with pytest.raises(TrainError, match="even with one example"): sft(SFTConfig(**JOB | dict(batch=2)), dataset, tmp_path / "job")
    assert json.loads((tmp_path / "job" / "memory.json").read_text())["recompute"] is True


def test_little_memory_means_small_micro_batches(dataset, whole, tmp_path, monkeypatch):
    model = load_model("tiny")
    monkeypatch.setattr(fit, "free_bytes", lambda dev: 20_000_000)
    res = sft(SFTConfig(**JOB | dict(max_steps=2)), dataset, tmp_path / "job")
    assert res.plan.micro_batch < 8 and res.plan.batch == 8
    assert losses(res)[:1] == pytest.approx(losses(whole)[:1], abs=1e-5)
    assert model.n_params * 4 < 20_000_000   # the figure above is not absurd


def test_a_loss_that_is_no_number_names_its_rows(dataset, tmp_path, monkeypatch):
    real, calls = fit.lean_loss, []
    def lean(core, x, n=None):
        if n is not None: calls.append(1)
        return real(core, x, n) * (float("nan") if len(calls) == 2 else 1)
    monkeypatch.setattr(fit, "lean_loss", lean)
    with pytest.raises(TrainError, match=r"no number at step 2, on rows \d+, .* of train.parquet") as e: sft(SFTConfig(**JOB), dataset, tmp_path / "job")
    named = [int(t) for t in str(e.value).split("on rows ")[1].split(" of ")[0].split(", ")]
    assert len(set(named)) == 8 and max(named) < 48
    assert not (tmp_path / "job" / "result.json").exists()


def test_full_disk_in_mid_checkpoint(dataset, whole, tmp_path, monkeypatch):
    "The second checkpoint does not fit: a clear end, nothing half written, and the same command goes on from the first"
    real, out = torch.save, tmp_path / "job"
    def save(obj, f, *a, **kw):
        if "checkpoint-4" in str(f): raise OSError(errno.ENOSPC, "No space left on device")
        return real(obj, f, *a, **kw)
    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(TrainError, match="No space left.*[Ff]ree space"): sft(SFTConfig(**JOB), dataset, out)
    assert [p.name for p in (out / "checkpoints").glob("*checkpoint*")] == ["checkpoint-2"]
    monkeypatch.setattr(torch, "save", real)
    res = sft(SFTConfig(**JOB), dataset, out)
    assert res.resumed_from == 2 and res.hash == whole.hash


def test_conversations_with_tools(tmp_path):
    call = dict(type="function", function=dict(name="track", arguments='{"order": "FW-1"}'))
    talk = [dict(role="system", content="Be short."), dict(role="user", content="Where is FW-1?"), dict(role="assistant", content=None, tool_calls=[call]),
            dict(role="tool", content="on its way"), dict(role="assistant", content="On its way."), dict(role="user", content="Thanks"), dict(role="assistant", content="You are welcome.")]
    tools = [dict(type="function", function=dict(name="track", description="find a parcel", parameters=dict(type="object")))]
    bad = [talk[:2], [*talk[:4], dict(role="assistant", content=" ")]]
    pl.DataFrame(dict(messages=[json.dumps(m) for m in (talk, *bad, talk[:5])], tools=[json.dumps(tools)] * 4)).write_parquet(tmp_path / "train.parquet")
    with pytest.raises(DataError, match="leaves tool calls out"): sft(SFTConfig(max_steps=1), tmp_path, tmp_path / "job")
    res = sft(SFTConfig(max_steps=1, chat_template="chatml"), tmp_path, tmp_path / "job2")
    assert (res.plan.examples, res.plan.dropped) == (2, {"empty": 2})
    model = load_model("tiny"); give_template(model.tok, "chatml")
    ex = examples(model, load_rows(tmp_path, "train")[0], 1024).items[0]
    learnt = model.tok.decode([t for t in ex["labels"] if t >= 0])
    assert learnt.count("<|im_end|>") == 3 and "tool_call" in learnt and "Where is" not in learnt and "on its way" not in learnt
    assert "find a parcel" in model.tok.decode(ex["input_ids"])


def test_a_template_that_rewrites_the_past_learns_the_last_turn():
    model = load_model("tiny")
    model.tok.chat_template = CHATML.replace("(m['content'] or '')", "('' if m['role'] == 'assistant' and not loop.last else m['content'])")
    talk = [dict(role=r, content=c) for r, c in (("user", "Hi"), ("assistant", "Hello"), ("user", "Bye"), ("assistant", "See you"))]
    ex = examples(model, pl.DataFrame(dict(row=[0], messages=[talk])), 256)
    assert ex.changed == {"last_turn": 1}
    assert model.tok.decode([t for t in ex.items[0]["labels"] if t >= 0]).startswith("See you")


def test_doubled_special_tokens_are_removed():
    model = load_model("tiny")
    model.tok.bos_token = "<|im_start|>"   # a template that writes the begin token itself, before one that writes it again
    model.tok.chat_template = "{{ bos_token }}" + model.tok.chat_template
    ex = examples(model, rows(3, 1), 256)
    assert ex.changed == {"doubled": 3} and ex.items[0]["input_ids"][0] != ex.items[0]["input_ids"][1]


def test_rows_too_long_are_cut_when_asked(tmp_path):
    pl.concat([rows(8, 3), pl.DataFrame(dict(prompt=["Say much", "word " * 900], answer=["word " * 900, "yes"]))]).write_parquet(tmp_path / "train.parquet")
    res = sft(SFTConfig(max_steps=1, batch=2, max_length=200, on_long="truncate"), tmp_path, tmp_path / "job")
    assert (res.plan.examples, res.plan.dropped, res.plan.changed) == (9, {"too_long": 1}, {"truncated": 1})
    assert any("1 rows left out: too_long" in n for n in res.notes)


def test_a_base_without_chat_template(dataset, tmp_path):
    "It gets ChatML, since its vocabulary knows the marks; the result stands alone, with the template"
    base = tmp_path / "plain"; shutil.copytree(data_dir() / "tiny", base); (base / "chat_template.jinja").unlink()
    with pytest.raises(ModelError): load_model(base)
    res = sft(SFTConfig(base=str(base), max_steps=1, batch=4), dataset, tmp_path / "job")
    assert any("chatml is used" in n for n in res.notes)
    assert load_model(res.adapter_dir).generate(["Hello"], max_new_tokens=2)


def test_qlora_says_what_it_needs(dataset, tmp_path):
    if torch.cuda.is_available(): pytest.skip("there is a GPU")
    with pytest.raises(TrainError, match="method='lora'"): sft(SFTConfig(method="qlora"), dataset, tmp_path / "job")


def test_early_stopping_needs_something_to_look_at(tmp_path):
    rows(8, 1).write_parquet(tmp_path / "train.parquet")
    with pytest.raises(TrainError, match="needs validation rows"): sft(SFTConfig(patience=1), tmp_path, tmp_path / "job")


def test_gguf_is_read_back_by_another_reader(whole, tmp_path):
    pytest.importorskip("gguf")
    model = merge("tiny", whole.adapter_dir, tmp_path / "whole")
    file = to_gguf(model, tmp_path / "whole.gguf", dtype="f32")   # compares predictions before it gives the file its name
    from transformers import AutoTokenizer
    text = "Where is order FW-1234? It cost 12.50<|im_end|>"
    assert AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name)(text)["input_ids"] == load_model("tiny").tok(text)["input_ids"]
    bad = tmp_path / "bad"; shutil.copytree(model, bad)
    t = json.loads((bad / "tokenizer.json").read_text()); t["pre_tokenizer"]["pretokenizers"].pop(0); t["pre_tokenizer"]["pretokenizers"].insert(0, dict(type="Whitespace")); (bad / "tokenizer.json").write_text(json.dumps(t))
    with pytest.raises(ModelError, match="no name that is known"): to_gguf(bad, tmp_path / "bad.gguf")


def test_two_processes_follow_the_losses_of_one(dataset, whole, tmp_path):
    "DDP over gloo: the batch is shared, every update is the same up to rounding; an error of a child is the parent's"
    res = sft(SFTConfig(**JOB | dict(save_every=9), processes=2), dataset, tmp_path / "job")
    assert res.plan.micro_batch == 4 and res.steps == whole.steps
    assert losses(res) == pytest.approx(losses(whole), abs=2e-4)
    a, b = (load_model("tiny", r.adapter_dir).loss(["Where is FW-1234?"], ["On its way."])[0][0] for r in (res, whole))
    assert a == pytest.approx(b, abs=1e-2)
