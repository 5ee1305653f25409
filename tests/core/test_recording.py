"""A call that is recorded on one mask and run on another computes what the plain call does."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from reference import batch_for, masks, twins
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

ONES = torch.ones(4, 17, dtype=torch.long)
IDS = batch_for("BertModel")["input_ids"]
MASKS = masks(4, 17)


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    """In float64, so that no rounding hides a slip."""
    return twins("BertModel")[1].double().requires_grad_(False)


def traced(call, ids, mask):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that jit will go, and that sizes are compared while it traces
        return torch.jit.trace(call, (ids, mask))


def exported(call, ids, mask):
    class Call(torch.nn.Module):
        def forward(self, ids, mask):
            return call(ids, mask)

    return torch.export.export(Call(), (ids, mask), strict=False).module()


RECORDERS = {
    "jit": traced,
    "make_fx": lambda call, *example: make_fx(call)(*example),
    "make_fx fake": lambda call, *example: make_fx(call, tracing_mode="fake", _allow_non_fake_inputs=True)(*example),
    "export": exported,
    "vmap": lambda call, *example: torch.vmap(lambda ids, mask: call(ids[None], mask[None])[0]),
}


@pytest.mark.parametrize("recorder", RECORDERS)
@pytest.mark.parametrize("kind", ["right", "left", "holes"])
def test_recorded_without_padding_and_run_with_it(model, recorder, kind):
    def call(ids, mask):
        return model(ids, mask).last_hidden_state

    recorded = RECORDERS[recorder](call, IDS, ONES)
    for mask in (MASKS[kind], ONES):
        torch.testing.assert_close(recorded(IDS, mask), call(IDS, mask))


def test_a_trace_takes_other_sizes(model):
    def call(ids, mask):
        return model(ids, mask).last_hidden_state

    recorded = traced(call, IDS, ONES)
    ids, mask = IDS[:2, :9], MASKS["left"][:2, 8:]
    torch.testing.assert_close(recorded(ids, mask), call(ids, mask))


def test_tensors_without_values(model):
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake:
        out = model(fake.from_tensor(IDS), fake.from_tensor(ONES))
    assert out.last_hidden_state.shape == (4, 17, 36)
    meta = copy.deepcopy(model).to("meta")
    assert meta(IDS.to("meta"), ONES.to("meta")).last_hidden_state.shape == (4, 17, 36)
    assert meta(IDS.to("meta")).last_hidden_state.shape == (4, 17, 36)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_captured_graph_computes_with_the_mask_of_its_replay(model):
    model = copy.deepcopy(model).cuda()
    ids, mask = IDS.cuda(), ONES.cuda()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        model(ids, mask)  # what a first call allocates
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        states = model(ids, mask).last_hidden_state
    mask.copy_(MASKS["right"])
    graph.replay()
    torch.testing.assert_close(states, model(ids, MASKS["right"].cuda()).last_hidden_state)
