"""The map between our names and the published ones."""

import pytest
import torch
from torch import nn

from models.backbone import STRIDES, Backbone, Stage
from models.published import Rule, constants, from_published, is_published, to_published
from tests.helpers.small_models import NAMES, scrambled, shrunken


@pytest.fixture(scope="module")
def model():
    return scrambled(shrunken("groupmixformer_mobile"))


@pytest.mark.parametrize("name", NAMES)
def test_round_trip_is_bit_equal(name):
    own = scrambled(shrunken(name))
    theirs = to_published(own, own.state_dict())
    back = from_published(own, theirs)
    assert back.keys() == own.state_dict().keys()
    assert all(torch.equal(back[key], tensor) for key, tensor in own.state_dict().items())
    again = to_published(own, back)
    assert again.keys() == theirs.keys()
    assert all(torch.equal(again[key], tensor) for key, tensor in theirs.items())


@pytest.mark.parametrize("name", NAMES)
def test_load_state_dict_accepts_published_names(name):
    source, target = scrambled(shrunken(name)), shrunken(name, seed=5)
    theirs = to_published(source, source.state_dict())
    assert is_published(target, theirs)
    assert not is_published(target, source.state_dict())
    target.load_state_dict(theirs)
    assert all(torch.equal(target.state_dict()[key], tensor) for key, tensor in source.state_dict().items())


def test_batch_counters_and_identity_kernels_may_come_or_not():
    own = scrambled(shrunken("stvit_small"))
    theirs = to_published(own, own.state_dict())
    few = {key: tensor for key, tensor in theirs.items() if not key.endswith("num_batches_tracked")}
    assert len(few) < len(theirs)
    few["layers.0.unfold.weights"] = few["layers.0.fold.weights"] = torch.eye(9)
    shrunken("stvit_small").load_state_dict(few)


def test_constants_are_dropped_for_the_family_that_declares_them_only(model):
    theirs = to_published(model, model.state_dict())
    assert constants(model, theirs) == {}
    with pytest.raises(ValueError, match=r"1 unexpected: layers\.0\.unfold\.weights"):
        from_published(model, {**theirs, "layers.0.unfold.weights": torch.eye(9)})


def test_missing_entry_is_named(model):
    theirs = to_published(model, model.state_dict())
    del theirs["norm4.bias"]
    with pytest.raises(ValueError, match=r"1 missing: norm4\.bias"):
        from_published(model, theirs)
    assert "neck.bias" not in from_published(model, theirs, strict=False)


def test_unexpected_entry_is_named(model):
    theirs = to_published(model, model.state_dict())
    with pytest.raises(ValueError, match=r"1 unexpected: norm5\.bias"):
        from_published(model, {**theirs, "norm5.bias": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"1 not in this model: neck\.wait"):
        to_published(model, {"neck.wait": torch.zeros(3)})


def test_other_shapes_are_named_and_counted(model):
    theirs = to_published(model, model.state_dict())
    theirs["head.weight"], theirs["head.bias"] = torch.zeros(1000, 160), torch.zeros(1000)
    with pytest.raises(ValueError, match=r"2 of another shape: head\.weight \(1000, 160\) instead of \(10, 160\)"):
        from_published(model, theirs)
    with pytest.raises(ValueError, match=r"head\.bias \(1000,\) instead of \(10,\)"):
        model.load_state_dict(theirs)
    with pytest.raises(ValueError, match=r"head\.bias \(3,\) instead of \(10,\)"):
        to_published(model, {"head.bias": torch.zeros(3)})


def test_rule_numbers_are_shifted():
    rule = Rule("stages.{i}.blocks.{j}.*", "block{i+1}.{j}.*")
    assert rule.names("stages.2.blocks.11.attn.q.weight") == ("block3.11.attn.q.weight",)
    assert rule.names("stages.2.norm.weight") is None


def test_rule_stacks_several_entries_by_their_parts():
    rule = Rule("q.*", ("a.*", "b.*"), parts=(1, 3))
    ours = torch.arange(16.0).view(8, 2)
    first, second = rule.split("q.weight", ours)
    assert torch.equal(first, ours[:2])
    assert torch.equal(second, ours[2:])
    assert torch.equal(rule.join("q.weight", [first, second]), ours)
    with pytest.raises(ValueError, match="6 rows"):
        rule.split("q.weight", torch.zeros(6, 2))


def test_rule_rows_say_where_ours_come_from():
    rule = Rule("q.*", "a.*", rows=lambda n: torch.arange(n).roll(1))
    theirs = torch.arange(4.0)
    assert rule.join("q.bias", [theirs]).tolist() == [3, 0, 1, 2]
    assert torch.equal(rule.split("q.bias", rule.join("q.bias", [theirs]))[0], theirs)


def test_rule_ones_are_added_to_weights_only():
    rule = Rule("fc.*", "conv.*", ones=(2, 3))
    (weight,), (bias,) = rule.split("fc.weight", torch.zeros(4, 3)), rule.split("fc.bias", torch.zeros(4))
    assert weight.shape == (4, 3, 1, 1)
    assert bias.shape == (4,)
    assert rule.join("fc.weight", [weight]).shape == (4, 3)
    (gamma,) = Rule("gamma", "gamma_1", ones=(0, 2, 3)).split("gamma", torch.zeros(5))
    assert gamma.shape == (1, 5, 1, 1)
    assert Rule("gamma", "gamma_1", ones=(0, 2, 3)).join("gamma", [gamma]).shape == (5,)


def test_family_without_published_names_loads_its_own():
    class Unpublished(Backbone):
        to_nchw = staticmethod(lambda x: x)

    def make():
        stages = [Stage(nn.Identity(), [nn.Conv2d(4, 4, 1)]) for _ in STRIDES]
        return Unpublished(nn.Conv2d(3, 4, 4, 4), stages, nn.BatchNorm2d(4), (4, 4, 4, 4), 4, num_classes=2)

    source, target = scrambled(make()), make()
    target.load_state_dict(source.state_dict())
    assert all(torch.equal(target.state_dict()[key], tensor) for key, tensor in source.state_dict().items())
    assert not is_published(target, source.state_dict())
