"Training: what happens when the model is missing, the data is empty, the process is killed"
import json, os, random, shutil, signal, subprocess, sys, time
from pathlib import Path

import polars as pl
import pytest

pytest.importorskip("torch"); pytest.importorskip("trl")
from somaagent.core.errors import DataError, MissingModelError, ModelError, NoUsableRowsError, TrainError
from somaagent.data.supportdesk import ask, reference
from somaagent.llm.chat import load_model
from somaagent.train.sft import SFTConfig, sft

ENV = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
JOB = dict(max_steps=12, batch=8, save_every=2, eval_every=4, rank=4)
CODE = "import sys, json; from somaagent.train.sft import SFTConfig, sft; print(sft(SFTConfig(**json.loads(sys.argv[1])), sys.argv[2], sys.argv[3]).hash)"


def rows(n, seed):
    rng = random.Random(seed)
    return pl.DataFrame([dict(prompt=p, answer=reference(p)) for p in (ask(rng) for _ in range(n))])


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    d = tmp_path_factory.mktemp("ds")
    rows(64, 1).write_parquet(d / "train.parquet"); rows(16, 2).write_parquet(d / "validation.parquet")
    return d


@pytest.fixture(scope="module")
def whole(dataset, tmp_path_factory):
    "The job as it ends when nobody disturbs it"
    return sft(SFTConfig(**JOB), dataset, tmp_path_factory.mktemp("job"))


def test_killed_job_resumes_to_the_same_weights(dataset, whole, tmp_path):
    "kill -9 after the second checkpoint; the same command again ends with the same bytes, in another process"
    out, cmd = tmp_path / "job", [sys.executable, "-W", "ignore", "-c", CODE, json.dumps(JOB), str(dataset), str(tmp_path / "job")]
    p = subprocess.Popen(cmd, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.time() + 50
    while time.time() < end and p.poll() is None and not list((out / "checkpoints").glob("checkpoint-[46]/somaagent.json")): time.sleep(.02)
    os.kill(p.pid, signal.SIGKILL); p.wait()
    assert not (out / "result.json").exists() and not (out / "adapter").exists()
    torn = out / "checkpoints" / "checkpoint-11"; torn.mkdir(); (torn / "trainer_state.json").write_text('{"global_')   # as if killed while writing
    res = sft(SFTConfig(**JOB), dataset, out)
    assert res.resumed_from >= 4
    assert res.hash == whole.hash
    assert [h["step"] for h in res.history] == [h["step"] for h in whole.history]
    assert [h["loss"] for h in res.history] == pytest.approx([h["loss"] for h in whole.history], abs=1e-5)
    assert not (out / "checkpoints").exists()


def test_another_seed_gives_another_adapter(dataset, whole, tmp_path):
    assert sft(SFTConfig(**JOB, seed=1), dataset, tmp_path / "job").hash != whole.hash


def test_adapter_names_no_path(whole):
    text = "".join(f.read_text() for f in Path(whole.adapter_dir).glob("*.json"))
    assert str(Path(whole.adapter_dir).parent) not in text and "/" not in json.loads(text)["base_model_name_or_path"]


def test_tuned_model_is_less_surprised(whole, dataset):
    val = pl.read_parquet(dataset / "validation.parquet")
    before, after = (load_model("tiny", a).loss(val["prompt"].to_list(), val["answer"].to_list())[0].mean() for a in (None, whole.adapter_dir))
    assert after < before


def test_missing_model(dataset, tmp_path):
    with pytest.raises(MissingModelError, match="no such model") as e: sft(SFTConfig(base="no-such-model"), dataset, tmp_path / "job")
    assert "make tiny" in str(e.value)
    assert not (tmp_path / "job").exists()


def test_damaged_weights(tmp_path):
    from somaagent.core.settings import data_dir
    bad = tmp_path / "bad"; shutil.copytree(data_dir() / "tiny", bad)
    raw = (bad / "model.safetensors").read_bytes(); (bad / "model.safetensors").write_bytes(raw[:len(raw) // 2])
    with pytest.raises(ModelError): load_model(bad)


def test_no_chat_template(tmp_path):
    from somaagent.core.settings import data_dir
    d = tmp_path / "plain"; shutil.copytree(data_dir() / "tiny", d); (d / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match="no chat template"): load_model(d)


@pytest.mark.parametrize("n,limit,why", [(0, None, "0 training rows"), (5, 8, "5 of them longer than 8 tokens")])
def test_nothing_to_learn_from(n, limit, why, tmp_path):
    (rows(n, 1) if n else rows(1, 1).clear()).write_parquet(tmp_path / "train.parquet")
    with pytest.raises(NoUsableRowsError, match=why): sft(SFTConfig(max_length=limit), tmp_path, tmp_path / "job")
    assert not (tmp_path / "job" / "result.json").exists()


def test_missing_columns(tmp_path):
    pl.DataFrame(dict(text=["a"])).write_parquet(tmp_path / "train.parquet")
    with pytest.raises(DataError, match="columns are missing"): sft(SFTConfig(), tmp_path, tmp_path / "job")


def test_long_rows_are_counted(dataset, tmp_path):
    df = pl.concat([rows(16, 3), pl.DataFrame(dict(prompt=["word " * 3000], answer=["yes"]))]); df.write_parquet(tmp_path / "train.parquet")
    res = sft(SFTConfig(max_steps=1, batch=4), tmp_path, tmp_path / "job")
    assert (res.plan.examples, res.plan.too_long) == (16, 1)


def test_runaway_loss_stops_with_a_hint(dataset, tmp_path):
    with pytest.raises(TrainError, match="Lower lr"): sft(SFTConfig(method="full", lr=1e4, max_steps=30, batch=8), dataset, tmp_path / "job")
    assert not (tmp_path / "job" / "result.json").exists()


def test_full_fine_tuning_stands_alone(dataset, tmp_path):
    res = sft(SFTConfig(method="full", max_steps=4, batch=8), dataset, tmp_path / "job")
    alone, over = load_model(res.adapter_dir), load_model("tiny", res.adapter_dir)
    assert alone.generate(["Where is FW-1234?"])[0].text == over.generate(["Where is FW-1234?"])[0].text
    assert alone.n_params == load_model("tiny").n_params
