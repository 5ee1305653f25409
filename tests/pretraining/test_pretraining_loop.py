"""The pretraining loop: the loss of the reference, resume to the bit, and that it learns."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import training_job
from reference import assert_as_exact
from torch import nn
from training_job import RULES, make_corpus, make_model, model_inputs

import minibert
from minibert.pretraining.batches import BatchMaker
from minibert.pretraining.corpus import Corpus
from minibert.pretraining.loop import Run, Settings
from minibert.pretraining.loss import PretrainingLoss, pair_lengths, pretraining_loss
from minibert.pretraining.order import plan_batches
from minibert.pretraining.pairs import PairRules
from minibert.training import onednn
from minibert.training.distributed import World
from minibert.training.optimizer import learning_rate, make_optimizer

JOB = [sys.executable, training_job.__file__]
FAST = {"rows": 8, "warmup_steps": 2, "learning_rate": 1e-2, "log_every": 1}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Corpus:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


def batch_of(corpus: Corpus, *, packed: bool = False, rows: int = 8):
    return BatchMaker(corpus, RULES, packed=packed)[next(plan_batches(corpus, RULES, rows, packed=packed))]


def loss_of(batch, sums: torch.Tensor) -> torch.Tensor:
    return sums[0] / batch.masked + sums[2] / len(batch.cls_positions)


def parameters_of(path: Path) -> dict[str, torch.Tensor]:
    state = torch.load(path / "checkpoint.pt", weights_only=True)["parameters"]
    return {f"{name}.{key}": value for name, values in state.items() for key, value in values.items()}


def assert_same_end(one: Path, other: Path) -> None:
    first, second = parameters_of(one), parameters_of(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def metrics_of(path: Path) -> list[dict[str, float]]:
    records = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in record.items() if "per_second" not in name} for record in records]


# --- the loss


def test_dense_training_is_transformers_to_the_bit(corpus):
    transformers = pytest.importorskip("transformers")
    ours = make_model(corpus).train()
    theirs = transformers.BertForPreTraining(transformers.BertConfig(**ours.config.to_dict())).train()
    theirs.load_state_dict(ours.state_dict())
    optimizers = [make_optimizer(model, 1e-3, 0.01, (0.9, 0.999), 1e-6) for model in (ours, theirs)]
    loss, maker = PretrainingLoss(ours, dense=True), BatchMaker(corpus, RULES)
    for step, plan in zip(range(4), plan_batches(corpus, RULES, 8), strict=False):
        batch = maker[plan]
        torch.manual_seed(step)
        mine = loss_of(batch, loss(**vars(batch)))
        torch.manual_seed(step)
        reference = theirs(**model_inputs(batch)).loss
        assert torch.equal(mine, reference)
        mine.backward()
        reference.backward()
        gradients = dict(theirs.named_parameters())
        assert all(torch.equal(p.grad, gradients[name].grad) for name, p in ours.named_parameters())
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm().clamp(min=1e-30))


@pytest.mark.parametrize("classes", [{}, onednn.LINEAR_LAYERS], ids=["torch", "onednn"])
def test_gathered_loss_and_gradients(corpus, classes):
    """As exact as the dense ones, by which transformers computes; in float64 the same: no rounding hides a slip."""
    batch, results = batch_of(corpus), []
    for dense, used, dtype in (
        (False, classes, torch.float32),
        (True, {}, torch.float32),
        (True, {}, torch.float64),
        (False, classes, torch.float64),
    ):
        model = make_model(corpus, dropout=0.0).to(dtype)
        loss = loss_of(batch, PretrainingLoss(onednn.twin(model, used), dense=dense)(**vars(batch)))
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    gathered, dense32, exact, gathered64 = results
    names = ["loss", *(name for name, _ in model.named_parameters())]
    for name, single, reference, double, other in zip(names, gathered, dense32, exact, gathered64, strict=True):
        if not name.endswith("key.bias"):  # it has no gradient but rounding: softmax does not see what all scores get
            assert relative(other, double) < 1e-9, name
            # Eight times: some gradients are of few numbers
            assert_as_exact(single, reference, double, factor=8)


@pytest.mark.skipif(not onednn.available(), reason="this build of PyTorch has no oneDNN")
def test_onednn_linear_layers():
    torch.manual_seed(0)
    x, layer = torch.randn(3, 5, 16, dtype=torch.double, requires_grad=True), torch.nn.Linear(16, 8).double()
    expected = torch.autograd.grad(layer(x).square().sum(), [x, *layer.parameters()])
    x32, layer32 = x.detach().float().requires_grad_(), torch.nn.Linear(16, 8)
    layer32.load_state_dict(layer.state_dict())
    twin32, twin64 = onednn.twin(nn.ModuleList([layer32, layer]), onednn.LINEAR_LAYERS)
    usual = torch.autograd.grad(layer32(x32).square().sum(), [x32, *layer32.parameters()])
    out = twin32(x32)
    assert "Linear" in out.grad_fn.name()
    found = torch.autograd.grad(out.square().sum(), [x32, *layer32.parameters()])
    assert torch.equal(twin64(x), F.linear(x, layer.weight, layer.bias))  # what is not float32 goes the usual way
    assert type(layer32) is nn.Linear
    for a, b, exact in zip(found, usual, expected, strict=True):
        assert_as_exact(a, b, exact)


@pytest.mark.skipif(not onednn.available(), reason="this build of PyTorch has no oneDNN")
@pytest.mark.parametrize(
    ("width", "kind"), [("AVX512", onednn.LinearLayer), ("AVX2", nn.Linear), ("DEFAULT", nn.Linear)]
)
def test_products_are_the_faster_ones_for_the_vectors_of_the_cpu(corpus, tmp_path, monkeypatch, width, kind):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: width)
    run = Run(make_model(corpus), corpus, tmp_path, settings=Settings(steps=2, warmup_steps=1), rules=RULES)
    assert {type(module) for module in run.loss.modules() if isinstance(module, nn.Linear)} == {kind}


def test_a_twin_has_the_parameters_and_its_own_mode(corpus):
    model = make_model(corpus).eval()
    kinds = [type(module) for module in model.modules()]
    twin = onednn.twin(model, onednn.LINEAR_LAYERS | onednn.ATTENTION_BY_PRODUCTS).train()
    assert [type(module) for module in model.modules()] == kinds
    assert not any(module.training for module in model.modules())
    assert all(module.training for module in twin.modules())
    pairs = zip(model.named_parameters(), twin.named_parameters(), strict=True)
    assert all(name == other and one is two for (name, one), (other, two) in pairs)
    assert {type(module) for module in twin.modules()} >= {onednn.LinearLayer, onednn.AttentionByProducts}
    assert twin.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight


@pytest.mark.parametrize("packed", [False, True])
def test_attention_by_products(corpus, packed):
    """The same loss and gradients; in double precision, which autocast leaves alone: no rounding hides a slip."""
    batch, results = batch_of(corpus, packed=packed), []
    model = make_model(corpus, dropout=0.0).double()
    for classes in ({}, onednn.ATTENTION_BY_PRODUCTS):
        with torch.autocast("cpu", torch.bfloat16):
            sums = PretrainingLoss(onednn.twin(model, classes))(**vars(batch))
            loss = loss_of(batch, sums)
            gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        kernels = {type(node).__name__ for node in backward_nodes(sums)}
        assert any("ScaledDotProduct" in name for name in kernels) == (not classes)
        results.append((loss.detach(), torch.cat([g.flatten() for g in gradients if g is not None])))
    for loss, gradient in results[1:]:
        assert abs(loss - results[0][0]) < 1e-9
        assert relative(gradient, results[0][1]) < 1e-9


def backward_nodes(tensor: torch.Tensor) -> set:
    """All nodes of the graph behind a tensor."""
    found, waiting = set(), [tensor.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found.add(node)
            waiting += [next_node for next_node, _ in node.next_functions]
    return found


def test_packed_pairs_do_not_see_each_other(corpus):
    """Each pair of a packed batch alone gives the same sums and gradients as all of them in their rows."""
    plan = next(plan_batches(corpus, RULES, 8, packed=True))
    maker, single = BatchMaker(corpus, RULES, packed=True), BatchMaker(corpus, RULES)
    assert len(plan.pairs) > 8
    model = make_model(corpus, dropout=0.0).double()
    loss = PretrainingLoss(model)
    together = loss(**vars(maker[plan]))
    (together[0] + together[2]).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    alone = []
    for i in range(len(plan.pairs)):
        pairs = plan.pairs[i : i + 1].copy()
        pairs["row"] = pairs["column"] = 0
        alone.append(loss(**vars(single[replace(plan, pairs=pairs, rows=1)])))
        (alone[-1][0] + alone[-1][2]).backward()
    assert torch.allclose(together, torch.stack(alone).sum(0), rtol=1e-9)
    for name, parameter in model.named_parameters():
        assert torch.allclose(gradients[name], parameter.grad, rtol=1e-9, atol=1e-9), name


def test_gradient_checkpointing_changes_nothing(corpus, tmp_path):
    for name, option in (("plain", False), ("checkpointed", True)):
        settings = Settings(steps=3, gradient_checkpointing=option, **FAST)
        Run(make_model(corpus), corpus, tmp_path / name, rules=RULES, settings=settings, progress=False).fit()
    assert_same_end(tmp_path / "plain", tmp_path / "checkpointed")


def test_accumulated_parts_are_the_batch(corpus, tmp_path):
    for parts in (1, 4):
        settings = Settings(steps=4, accumulate=parts, **FAST)
        model = make_model(corpus, dropout=0.0).double()  # or what rounding does to the first steps shows
        Run(model, corpus, tmp_path / str(parts), rules=RULES, settings=settings, progress=False).fit()
    whole, parts = metrics_of(tmp_path / "1"), metrics_of(tmp_path / "4")
    assert [r["loss"] for r in whole] == pytest.approx([r["loss"] for r in parts], rel=1e-9)


def test_learning_rate():
    rates = [learning_rate(step, 2.0, 4, 12) for step in range(12)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates[4:] == [2.0 - 0.25 * i for i in range(8)]


def test_biases_and_layer_norms_do_not_decay(corpus):
    model = make_model(corpus)
    decayed, spared = make_optimizer(model, 1.0, 0.5, (0.9, 0.999), 1e-6).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    assert all(p.ndim == 1 for p in spared["params"])
    assert all(p.ndim == 2 for p in decayed["params"])
    assert len(decayed["params"]) + len(spared["params"]) == len(names)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.5, 0.0)


# --- resume


@pytest.mark.parametrize("options", [[], ["--packed", "--accumulate", "2"]], ids=["padded", "packed"])
def test_killed_and_resumed_runs_end_in_the_same_weights(corpus, tmp_path, options):
    common = [str(corpus.directory), "--steps", "20", "--save-every", "6", *options]
    command = [*JOB, common[0], str(tmp_path / "whole"), *common[1:]]
    subprocess.run(command, check=True, capture_output=True)
    killed = [*JOB, common[0], str(tmp_path / "killed"), *common[1:]]
    for at, resume in ((4, []), (9, []), (16, ["--resume"])):  # before the first checkpoint, and between two
        ended = subprocess.run([*killed, "--kill-at", str(at), *resume], capture_output=True)
        assert ended.returncode == -signal.SIGKILL
    subprocess.run([*killed, "--resume"], check=True, capture_output=True)
    assert_same_end(tmp_path / "whole", tmp_path / "killed")
    assert metrics_of(tmp_path / "whole") == metrics_of(tmp_path / "killed")[-len(metrics_of(tmp_path / "whole")) :]


def test_sigterm_saves_and_stops(corpus, tmp_path):
    common = [str(corpus.directory), "--steps", "12", "--save-every", "100"]
    subprocess.run([*JOB, common[0], str(tmp_path / "whole"), *common[1:]], check=True, capture_output=True)
    stopped = [*JOB, common[0], str(tmp_path / "stopped"), *common[1:]]
    signalled = [*stopped, "--kill-at", "5", "--send", str(int(signal.SIGTERM))]
    subprocess.run(signalled, check=True, capture_output=True)
    assert 5 <= torch.load(tmp_path / "stopped" / "checkpoint.pt", weights_only=True)["step"] <= 6
    subprocess.run([*stopped, "--resume"], check=True, capture_output=True)
    assert_same_end(tmp_path / "whole", tmp_path / "stopped")


def test_workers_change_nothing(corpus, tmp_path):
    for workers in (0, 2):
        settings = Settings(steps=4, workers=workers, **FAST)
        run = Run(make_model(corpus), corpus, tmp_path / str(workers), rules=RULES, settings=settings, progress=False)
        assert run.fit()
    assert_same_end(tmp_path / "0", tmp_path / "2")


def test_what_cannot_be_resumed(corpus, tmp_path):
    def run(rules=RULES, model=None, **settings) -> Run:
        settings = Settings(**{"steps": 3, **FAST, **settings})
        return Run(model or make_model(corpus), corpus, tmp_path, rules=rules, settings=settings, progress=False)

    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        run().resume()
    run().fit()
    with pytest.raises(ValueError, match="trained with masked=0.15, not 0.2"):
        run(rules=replace(RULES, masked=0.2)).resume()
    with pytest.raises(ValueError, match="trained with rows=8, not 16"):
        run(rows=16).resume()
    other = make_model(corpus)
    other.bert.encoder.layer = other.bert.encoder.layer[:1]
    with pytest.raises(ValueError, match="another architecture"):
        run(model=other).resume()
    again = run(steps=4)
    again.resume()
    assert again.step == 3
    assert again.fit()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"steps": 5, "warmup_steps": 5}, "warmup_steps is 5"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
    ],
)
def test_impossible_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        Settings(**settings)


def test_rows_must_be_shared_out_evenly(corpus, tmp_path):
    settings = Settings(steps=2, rows=8, accumulate=3, warmup_steps=0)
    with pytest.raises(ValueError, match="multiple of 3: 1 processes x 3"):
        Run(make_model(corpus), corpus, tmp_path, settings=settings, world=World())


# --- learning


def test_it_learns_both_tasks(tmp_path):
    """The self-test: on a tiny corpus both losses fall near zero."""
    corpus = make_corpus(tmp_path, documents=4, sentences=4)
    rules = PairRules(max_length=32, short_probability=0.0)
    settings = Settings(steps=600, rows=24, learning_rate=3e-3, warmup_steps=40, weight_decay=0.0, log_every=100)
    model = make_model(corpus, dropout=0.0, hidden_size=64, intermediate_size=128, initializer_range=0.1)
    Run(model, corpus, tmp_path / "run", rules=rules, settings=settings, progress=False).fit()
    first, last = metrics_of(tmp_path / "run")[0], metrics_of(tmp_path / "run")[-1]
    assert first["mlm_loss"] > 1.5
    assert last["mlm_loss"] < 0.2
    assert last["nsp_loss"] < 0.1


def test_a_gpu_gets_its_own_loss():
    from minibert.fast.pretraining import PackedPretrainingLoss

    model, gpu = minibert.BertForPreTraining(minibert.BertConfig.named("tiny", vocab_size=50)), torch.device("cuda")
    assert type(pretraining_loss(model, gpu, dense=False, fsdp=False)) is PackedPretrainingLoss
    assert type(pretraining_loss(model, gpu, dense=True, fsdp=False)) is PretrainingLoss
    assert type(pretraining_loss(model, torch.device("cpu"), dense=False, fsdp=False)) is PretrainingLoss


def test_lengths_of_packed_pairs():
    assert pair_lengths(torch.tensor([[1, 1, 2, 2, 2, 0], [1, 2, 2, 0, 0, 0]])) == [2, 3, 1, 2]
