"""Records: dictionaries that can be written to, compared by identity, taken apart and put together by torch."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Mapping, MutableMapping

import pytest
import torch

from minibert.outputs import BaseModelOutput, LogitsOutput, PreTrainingOutput


def output() -> LogitsOutput:
    return LogitsOutput(torch.ones(2), torch.zeros(2, 3))


def test_two_records_are_two():
    one, other = output(), output()
    assert one == one
    assert one != other
    assert len({one, other, one}) == 2
    assert one in [other, one]


def test_a_record_is_a_mutable_mapping():
    out = output()
    assert isinstance(out, dict)
    assert isinstance(out, Mapping)
    assert isinstance(out, MutableMapping)
    new = torch.full((2, 3), 7.0)
    out["logits"] = new
    assert out.logits is new is out[1]
    out.logits = other = new + 1
    assert out["logits"] is other
    del out["loss"]
    assert out.loss is None
    assert list(out) == ["logits"]
    out.loss = torch.ones(())
    assert list(out.keys()) == ["loss", "logits"]  # where the class has it
    assert out.pop("loss") == 1
    assert out.loss is None
    out.update(hidden_states=(new,))
    assert out.hidden_states == (new,)
    assert out.setdefault("attentions", (other,)) == out.attentions == (other,)
    out |= {"loss": new}
    assert out[0] is new is out.loss
    out["mine"] = 3
    assert out.mine == out["mine"] == out[-1] == 3
    out.not_in_it = 4
    assert "not_in_it" not in out
    out.clear()
    assert len(out) == 0
    assert out.logits is None
    with pytest.raises(KeyError, match="this LogitsOutput has"):
        out["logits"]
    with pytest.raises(TypeError, match="by its name"):
        out[0] = new


def test_copies():
    out = output()
    for again in (copy.copy(out), out.copy(), copy.deepcopy(out), pickle.loads(pickle.dumps(out))):
        assert type(again) is LogitsOutput
        assert list(again) == ["loss", "logits"]
        assert torch.equal(again.logits, out.logits)
        again["logits"] = None
        assert "logits" in out
    assert dict(out).keys() == {**out}.keys() == out.keys()
    assert repr(out).startswith("LogitsOutput(loss=tensor(")


@pytest.mark.parametrize("parts", [dict, lambda out: iter(out.items()), lambda out: tuple(out.items())])
@pytest.mark.parametrize("cls", [BaseModelOutput, LogitsOutput, PreTrainingOutput])
def test_a_record_is_made_of_a_mapping_or_of_pairs(cls, parts):
    tensors = (torch.ones(2), torch.zeros(2, 3), (torch.ones(1), torch.ones(1)))
    out = cls(*tensors[:2], hidden_states=tensors[2])
    again = cls(parts(out))
    assert list(again) == list(out)
    assert all(again[key] is out[key] for key in out)


def gather(outputs):
    """What torch.nn.parallel.gather does with the records of two devices, without the devices."""

    def together(parts):
        first = parts[0]
        if isinstance(first, torch.Tensor):
            return torch.cat([part.reshape(-1) if part.ndim == 0 else part for part in parts])
        if isinstance(first, dict):
            return type(first)((key, together([part[key] for part in parts])) for key in first)
        return type(first)(map(together, zip(*parts, strict=True)))

    return together(outputs)


def test_data_parallel_gathers_and_scatters_records():
    parts = [LogitsOutput(torch.ones(()), torch.zeros(2, 3), (torch.ones(2, 1),)) for _ in range(2)]
    out = gather(parts)
    assert type(out) is LogitsOutput
    assert out.loss.shape == (2,)
    assert out.logits.shape == (4, 3)
    assert out.hidden_states[0].shape == (4, 1)
