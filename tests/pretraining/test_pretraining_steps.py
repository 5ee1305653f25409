"""What a step of pretraining does, seen where the losses would not show it."""

from __future__ import annotations

import math
from dataclasses import replace
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from training_job import RULES, make_corpus, make_model

from minibert.pretraining.batches import BatchMaker
from minibert.pretraining.corpus import Corpus
from minibert.pretraining.loop import Run, Settings
from minibert.pretraining.order import plan_batches
from minibert.training.distributed import World, load_state, state_of
from minibert.training.optimizer import make_optimizer
from minibert.training.run import read_metrics

FAST = {"rows": 8, "warmup_steps": 2, "learning_rate": 1e-2, "log_every": 1}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Corpus:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


def make_run(corpus, directory, *, dropout: float = 0.1, world: World | None = None, model=None, **settings) -> Run:
    settings = Settings(**{"steps": 4, **FAST, **settings})
    model = model or make_model(corpus, dropout)
    run = Run(model, corpus, directory, rules=RULES, settings=settings, validation=corpus, world=world, progress=False)
    run.loss.train()
    return run


def parts(corpus: Corpus, count: int = 1, rows: int = 8) -> list:
    plan = next(plan_batches(corpus, RULES, rows))
    return [BatchMaker(corpus, RULES)[plan.part(i, count)] for i in range(count)]


# --- validation


def test_validation_is_without_dropout_and_always_the_same(corpus, tmp_path):
    run = make_run(corpus, tmp_path, dropout=0.5, validation_rows=16)
    torch.manual_seed(1)
    first = run.validate()
    torch.manual_seed(2)
    assert run.validate() == first
    assert run.loss.training  # and training goes on as training
    still = make_run(corpus, tmp_path, dropout=0.0, validation_rows=16, model=make_model(corpus, 0.0))
    still.model.load_state_dict(run.model.state_dict())
    assert still.validate() == first


def test_validation_does_not_depend_on_the_runs_seed(corpus, tmp_path):
    results = []
    for seed in (0, 1):
        run = Run(
            make_model(corpus, 0.0),
            corpus,
            tmp_path,
            rules=replace(RULES, seed=seed),
            settings=Settings(steps=4, **FAST),
            validation=corpus,
            progress=False,
        )
        results.append(run.validate())
    assert results[0] == results[1]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("rows", [4, 8, 64])
def test_one_pass_of_validation_is_one_pass(corpus, tmp_path, rows, packed):
    """However many rows a batch has, each pair of the corpus counts once."""
    run = make_run(corpus, tmp_path, dropout=0.0, rows=rows, packed=packed, validation_rows=None)
    seen, forward = [], run._forward
    run._forward = lambda batch: (seen.append(batch), forward(batch))[1]
    run.validate()
    plans = list(plan_batches(corpus, replace(RULES, seed=0), rows, packed=packed, epochs=1))
    assert len(seen) == len(plans)
    pairs = {(plan.block, number) for plan in plans for number in plan.pairs["number"].tolist()}
    assert sum(batch.pairs for batch in seen) == len(pairs)


def test_validation_rows_limit_it(corpus, tmp_path):
    run = make_run(corpus, tmp_path, validation_rows=16)
    seen, forward = [], run._forward
    run._forward = lambda batch: (seen.append(batch), forward(batch))[1]
    run.validate()
    assert len(seen) == 2


# --- the update


def test_the_gradient_is_clipped(corpus, tmp_path):
    run = make_run(corpus, tmp_path, clip_norm=0.01)
    norms = []
    step = run.optimizer.step

    def stepping() -> None:
        norms.append(float(torch.stack([p.grad.norm() for p in run.model.parameters()]).norm()))
        step()

    run.optimizer.step = stepping
    run.train_step(parts(corpus))
    assert run.grad_norm > 0.1  # what it was
    assert norms[0] == pytest.approx(0.01, rel=1e-3)


def test_the_learning_rate_of_each_step(corpus, tmp_path):
    """The one used is the one written down: the first step's is not 0, and the last one's neither."""
    run, used = make_run(corpus, tmp_path, steps=6, warmup_steps=2, learning_rate=4e-3), []
    step = run.optimizer.step
    run.optimizer.step = lambda: used.append([group["lr"] for group in run.optimizer.param_groups]) or step()
    run.fit()
    assert [rates[0] for rates in used] == pytest.approx([2e-3, 4e-3, 4e-3, 3e-3, 2e-3, 1e-3])
    assert all(first == second for first, second in used)
    assert [line["lr"] for line in read_metrics(tmp_path / "metrics.jsonl") if "lr" in line] == [r[0] for r in used]


@pytest.mark.parametrize(("epsilon", "moves"), [(1e-6, True), (1e6, False)])
def test_epsilon_divides(corpus, tmp_path, epsilon, moves):
    run = make_run(corpus, tmp_path, epsilon=epsilon, weight_decay=0.0)
    before = [p.detach().clone() for p in run.model.parameters()]
    run.train_step(parts(corpus))
    change = max(float((p.detach() - b).abs().max()) for p, b in zip(run.model.parameters(), before, strict=True))
    assert (change > 1e-3) == moves


def test_betas_are_those_asked_for(corpus, tmp_path):
    run = make_run(corpus, tmp_path, betas=(0.5, 0.75))
    step, gradients = run.optimizer.step, {}

    def stepping() -> None:
        gradients.update({name: p.grad.clone() for name, p in run.model.named_parameters()})
        step()

    run.optimizer.step = stepping
    run.train_step(parts(corpus))
    for name, values in state_of(run.model, run.optimizer).items():
        assert torch.equal(values["exp_avg"], 0.5 * gradients[name]), name  # powers of two: nothing is rounded
        assert torch.equal(values["exp_avg_sq"], 0.25 * gradients[name].square()), name


def test_every_process_drops_out_other_units(corpus, tmp_path):
    sums = [make_run(corpus, tmp_path, dropout=0.3, world=World(rank)).train_step(parts(corpus)) for rank in (0, 1, 0)]
    assert torch.equal(sums[0], sums[2])
    assert not torch.equal(sums[0][[0, 2]], sums[1][[0, 2]])
    still = [make_run(corpus, tmp_path, dropout=0.0, world=World(rank)).train_step(parts(corpus)) for rank in (0, 1)]
    assert torch.equal(still[0], still[1])


def test_the_dropout_of_each_step_is_another(corpus, tmp_path):
    run = make_run(corpus, tmp_path, dropout=0.3, learning_rate=1e-20)
    first, second = (run.train_step(parts(corpus)) for _ in range(2))
    assert not torch.equal(first[[0, 2]], second[[0, 2]])


@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
def test_gradients_are_added_up_once_a_step(corpus, tmp_path):
    """However many parts a step has, processes exchange their gradients after the last one alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=60))
    try:
        run = make_run(corpus, tmp_path, accumulate=4)
        run.loss = DistributedDataParallel(run.loss)
        buckets = []

        def hook(state, bucket):
            buckets.append(bucket.index())
            done = torch.futures.Future()
            done.set_result(bucket.buffer())
            return done

        run.loss.register_comm_hook(None, hook)
        for _ in range(2):
            run.train_step(parts(corpus, 4))
    finally:
        dist.destroy_process_group()
    assert len(buckets) == 2 * len(set(buckets))


@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
def test_a_validation_leaves_sharded_parameters_to_the_optimizer(corpus, tmp_path):
    """FSDP keeps the root's whole parameters after a forward pass alone: what was saved then lacked their state."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=60))
    try:
        run = make_run(corpus, tmp_path, validation_rows=8)
        fully_shard(run.loss, mesh=dist.device_mesh.init_device_mesh("cpu", (1,)))
        run.optimizer = make_optimizer(run.model, 1e-3, 0.01, (0.9, 0.999), 1e-6)
        run.train_step(parts(corpus))
        before = state_of(run.model, run.optimizer)
        run.validate()
        after = state_of(run.model, run.optimizer)
        assert all(values.keys() == {"value", "step", "exp_avg", "exp_avg_sq"} for values in after.values())
        assert all(torch.equal(after[name][key], value) for name in before for key, value in before[name].items())
    finally:
        dist.destroy_process_group()


def test_a_parameter_that_the_optimizer_does_not_know_is_not_lost_in_silence(corpus):
    model = make_model(corpus)
    optimizer = make_optimizer(model, 1e-3, 0.01, (0.9, 0.999), 1e-6)
    model.cls.seq_relationship.bias = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(RuntimeError, match=r"cls\.seq_relationship\.bias is not among the optimizer's parameters"):
        state_of(model, optimizer)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_checkpointing_computes_layers_again(corpus, tmp_path, checkpointing):
    run = make_run(corpus, tmp_path, gradient_checkpointing=checkpointing)
    computed = []
    for module in run.loss.modules():
        if type(module).__name__ == "BertLayer":
            module.register_forward_pre_hook(lambda *_: computed.append(1))
    run.train_step(parts(corpus))
    layers = run.model.config.num_hidden_layers
    assert len(computed) == (2 * layers if checkpointing else layers)


# --- numbers that are none any more


def test_a_run_that_diverges_stops_and_keeps_what_was_good(corpus, tmp_path):
    run = make_run(corpus, tmp_path, steps=2, warmup_steps=1)
    assert run.fit()
    good = run.directory.checkpoint.read_bytes()
    again = make_run(corpus, tmp_path, steps=40, learning_rate=1e30, save_every=100)
    again.resume()
    with pytest.raises(ValueError, match=r"is (nan|inf) at step \d+: stopped, .*checkpoint\.pt is the last good state"):
        again.fit()
    assert run.directory.checkpoint.read_bytes() == good


def test_a_state_that_is_not_finite_is_not_saved(corpus, tmp_path):
    run = make_run(corpus, tmp_path, steps=2, warmup_steps=1)
    run.fit()
    good = run.directory.checkpoint.read_bytes()
    with torch.no_grad():
        run.model.bert.pooler.dense.bias[0] = math.nan
    with pytest.raises(ValueError, match=r"bert\.pooler\.dense\.bias\.value is not finite"):
        run.save()
    with pytest.raises(ValueError, match="the validation loss is nan"):
        run.validate()
    assert run.directory.checkpoint.read_bytes() == good


# --- what fits together


def test_models_and_corpora_that_do_not_fit(corpus, tmp_path):
    with pytest.raises(ValueError, match="max_length is 32, but the model has 31 positions"):
        make_run(corpus, tmp_path, model=make_model(corpus, max_position_embeddings=31))
    with pytest.raises(ValueError, match=r"the corpus has ids up to \d+, the model 20 words"):
        make_run(corpus, tmp_path, model=make_model(corpus, vocab_size=20))
    for dtype in (torch.bfloat16, torch.float16):
        with pytest.raises(ValueError, match=f"the model is in {dtype}, in which small steps are lost"):
            make_run(corpus, tmp_path, model=make_model(corpus).to(dtype))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"workers": -1}, "workers is -1, but must be a whole number, at least 0"),
        ({"rows": 1.5}, "rows is 1.5"),
        ({"validation_rows": 0}, "validation_rows is 0"),
        ({"learning_rate": math.nan}, "learning_rate is nan"),
        ({"learning_rate": math.inf}, "learning_rate is inf"),
        ({"epsilon": 0.0}, "epsilon is 0.0"),
        ({"clip_norm": 0.0}, "clip_norm is 0.0"),
        ({"clip_norm": math.nan}, "clip_norm is nan"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
        ({"betas": (0.9, 1.0)}, "betas is"),
        ({"betas": (0.9,)}, "betas is"),
        ({"warmup_steps": -1}, "warmup_steps is -1"),
    ],
)
def test_impossible_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        Settings(**settings)


def test_a_run_does_not_end_before_where_it_is(corpus, tmp_path):
    make_run(corpus, tmp_path, steps=4).fit()
    with pytest.raises(ValueError, match="steps is 3, but 4 are done already"):
        make_run(corpus, tmp_path, steps=3).resume()


# --- state


def test_the_optimizer_takes_its_state_itself(corpus):
    """Under `fused` on a GPU the count of steps belongs there: Optimizer.load_state_dict knows."""
    model = make_model(corpus)
    optimizer = make_optimizer(model, 1e-3, 0.01, (0.9, 0.999), 1e-6)
    model(
        torch.tensor([[2, 5, 3]]), labels=torch.tensor([[-100, 5, -100]]), next_sentence_label=torch.tensor([0])
    ).loss.backward()
    optimizer.step()
    state = state_of(model, optimizer)
    other = make_model(corpus)
    loaded = make_optimizer(other, 1e-3, 0.01, (0.9, 0.999), 1e-6)
    calls, load = [], loaded.load_state_dict
    loaded.load_state_dict = lambda given: (calls.append(given), load(given))[1]
    load_state(other, loaded, state)
    assert len(calls) == 1
    again = state_of(other, loaded)
    assert all(torch.equal(again[name][key], value) for name, values in state.items() for key, value in values.items())
    assert [group["weight_decay"] for group in loaded.param_groups] == [0.01, 0.0]


def test_a_state_of_other_shapes_changes_nothing(corpus):
    model, small = make_model(corpus), make_model(corpus, intermediate_size=32)
    optimizers = [make_optimizer(each, 1e-3, 0.01, (0.9, 0.999), 1e-6) for each in (model, small)]
    before = {name: p.detach().clone() for name, p in small.named_parameters()}
    with pytest.raises(ValueError, match=r"in the checkpoint, \(32.* here"):
        load_state(small, optimizers[1], state_of(model, optimizers[0]))
    assert all(torch.equal(p, before[name]) for name, p in small.named_parameters())


# --- compiling


def test_packed_batches_compile_once(corpus, tmp_path):
    """The number of pairs in a packed batch varies: one graph for training and one for validation serve all."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    rules = replace(RULES, short_probability=1.0)
    settings = Settings(steps=12, packed=True, compile=True, **FAST)
    run = Run(
        make_model(corpus, 0.0), corpus, tmp_path, rules=rules, settings=settings, validation=corpus, progress=False
    )
    run.loss.compile(dynamic=False, backend=backend)  # instead of the one that takes a minute
    pairs = {len(plan.pairs) for _, plan in zip(range(12), plan_batches(corpus, rules, 8, packed=True), strict=False)}
    assert len(pairs) > 2
    run.fit()
    assert 1 <= len(graphs) <= 2
