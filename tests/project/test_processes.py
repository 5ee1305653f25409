"""Every kind of object in another process: sent to one that was spawned, and to an actor of Ray as its argument."""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import spawned
import torch
from pipeline_case import HEADS, model_pair, same
from spawned import IDS, TEXTS, Holder, use_all

from minibert import BertTokenizer, SentenceEncoder, optimize, pipeline

TASKS = {**HEADS, "zero-shot-classification": "BertForSequenceClassification"}
NAMES = ["no", "neutral", "entailment"]
ENTAILMENT = {"id2label": dict(enumerate(NAMES)), "label2id": {name: i for i, name in enumerate(NAMES)}}


@pytest.fixture(scope="module")
def things(minilm_dir) -> dict[str, Any]:
    tokenizer = BertTokenizer.from_pretrained(minilm_dir, model_max_length=64)
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    found: dict[str, Any] = {"tokenizer": tokenizer, "batch": batch}
    for task, name in TASKS.items():
        model = model_pair(name, 0, 64, **(ENTAILMENT if task.startswith("zero") else {}))[0]
        found |= {task: pipeline(task, model, tokenizer), f"model {name}": model, f"optimized {name}": optimize(model)}
    found |= {"config": model.config, "encoder": SentenceEncoder(found["model BertModel"], tokenizer)}
    with torch.no_grad():
        found["output"] = model(IDS)
    return found


@pytest.fixture(scope="module")
def expected(things) -> dict[str, Any]:
    threads = torch.get_num_threads()
    yield use_all(things)
    torch.set_num_threads(threads)


def check(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """To the bit where the plain model computes; the fast path is built anew in each process."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        fast = name in TASKS or name == "encoder" or name.startswith("optimized")
        assert same(found[name], value) if fast else found[name] == value, name


def test_every_kind_of_object_is_sent_to_a_spawned_process(things, expected):
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        check(pool.submit(use_all, things).result(timeout=300), expected)


@pytest.mark.slow
def test_every_kind_of_object_is_an_argument_of_an_actor(things, expected, monkeypatch):
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    tests = Path(spawned.__file__).parent
    paths = os.pathsep.join([str(tests), str(tests.parent)])
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": paths}})
    try:
        holder = ray.remote(Holder).remote(things)
        check(ray.get(holder.use_all.remote(), timeout=300), expected)
    finally:
        ray.shutdown()
