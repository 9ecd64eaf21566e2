"""models.attention_maps: maps agree with the attentions' outputs, and the forward pass is unchanged."""

import pytest
import timm
import torch

from models.attention_maps import all_blocks, attention_maps, has_maps, last_blocks
from models.groupmixformer import GroupMixAttention
from models.sgformer_attention import (
    HybridScaleAttention,
    PlainAttention,
    SelfGuidedAttention,
    merge_plan,
    run_tokens,
    sort_tokens,
)
from models.stvit import SuperTokenAttention, neighbor_affinity, super_tokens, to_cells
from tests.helpers.small_models import SMALLEST, images, scrambled, shrunken

POINT = (0.4, 0.7)


def double(*shape, seed=3):
    return images(*shape, seed=seed, dtype=torch.float64)


@pytest.mark.parametrize("at", [None, POINT], ids=["received", "query"])
@pytest.mark.parametrize("name", SMALLEST)
def test_logits_are_bitwise_the_same_and_hooks_are_gone(name, at):
    model, x = scrambled(shrunken(name)).eval(), images(2, 3, 50, 70)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with torch.no_grad():
        want = model(x)
    logits, maps = attention_maps(model, x, at, all_blocks(model))
    assert torch.equal(logits, want)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    for found in maps:
        size = tuple(-(-side // found.patch) for side in (50, 70))
        assert found.reading.values.shape == (2, *size)
        assert found.reading.values.double().isfinite().all()


def test_hooks_are_removed_after_an_error():
    model = shrunken("groupmixformer_mobile").eval()
    with pytest.raises(ValueError, match="images must have shape"):
        attention_maps(model, torch.zeros(1, 4, 64, 64))
    assert not any(module._forward_hooks for module in model.modules())


def test_significance_is_the_one_that_guides_the_next_block():
    model, x = scrambled(shrunken("sgformer_small")).double().eval(), double(2, 3, 60, 90)
    made = []
    hook = model.stages[0].blocks[0].attn.register_forward_hook(lambda module, inputs, output: made.append(output[1]))
    _, maps = attention_maps(model, x)
    hook.remove()
    assert [found.name for found in maps[:2]] == ["stage1_block1_significance", "stage1_block2_merged"]
    torch.testing.assert_close(maps[0].reading.values, made[0])


def test_merge_plan_gives_the_published_number_of_tokens():
    for tokens, lengths, merged in ((3136, [196, 56, 28], 60), (784, [49, 14, 7], 60), (196, [2, 1], 147)):
        numbers, level = merge_plan(tokens, lengths)
        assert int(numbers.max()) + 1 == merged
        assert (torch.bincount(numbers) == torch.tensor([int(level[numbers == n][0]) for n in range(merged)])).all()


def test_merged_regions_are_the_runs_that_become_one_token():
    torch.manual_seed(0)
    attention, x, significance = SelfGuidedAttention(8, 2, 4).double(), double(2, 9, 12, 8), double(2, 9, 12)
    (reading,) = attention.attention_maps(x, significance, None)
    tokens = run_tokens(sort_tokens(x, significance), [(run.weight, run.bias) for run in attention.runs])
    # A token moves the merged token of its own region, and no other.
    for row, column in ((0, 0), (8, 11), (4, 5)):
        moved = x.clone()
        moved[:, row, column] += 1
        other = run_tokens(sort_tokens(moved, significance), [(run.weight, run.bias) for run in attention.runs])
        changed = (other != tokens).any(-1)
        assert (changed.sum(1) == 1).all()
        assert torch.equal(changed.int().argmax(1), reading.values[:, row, column])


def test_query_of_self_guided_attention_gives_what_its_merged_tokens_get():
    torch.manual_seed(0)
    attention, x, significance = SelfGuidedAttention(8, 2, 4).double(), double(1, 9, 12, 8), double(1, 9, 12)
    tokens = run_tokens(sort_tokens(x, significance), [(run.weight, run.bias) for run in attention.runs])
    q, k = attention.q(x[:, 2, 3]).view(2, 4), attention.kv(tokens)[0, :, :8].view(-1, 2, 4)
    p = torch.einsum("kd,mkd->km", q, k).div(2).softmax(1).mean(0)
    (reading,) = attention.attention_maps(x, significance, (2, 3))
    (regions,) = attention.attention_maps(x, significance, None)
    got = torch.zeros(len(p), dtype=torch.float64).index_add(
        0, regions.values.flatten(), reading.values.flatten() / 108
    )
    torch.testing.assert_close(got, p)


def test_plain_attention_of_a_query_is_its_softmax():
    torch.manual_seed(0)
    attention, x = PlainAttention(8, 2).double(), double(2, 3, 5, 8)
    q, k, _ = attention.qkv(x).view(2, 15, 3, 2, 4).unbind(2)
    p = torch.einsum("bnkd,bmkd->bknm", q, k).div(2).softmax(-1).mean(1)  # (B, N, N)
    (reading,) = attention.attention_maps(x, None, (1, 2))
    torch.testing.assert_close(reading.values, 15 * p[:, 7].view(2, 3, 5))
    (received,) = attention.attention_maps(x, None, None)
    torch.testing.assert_close(received.values, 15 * p.mean(1).view(2, 3, 5))


def test_hybrid_attention_of_a_query_stays_in_its_window_and_sums_to_one():
    torch.manual_seed(0)
    attention, x = HybridScaleAttention(8, 4, 4, guides=True).double(), double(2, 9, 15, 8)
    far, near = attention.attention_maps(x, None, (8, 13))
    for reading in (far, near):
        torch.testing.assert_close(reading.values.mean((1, 2)), torch.ones(2, dtype=torch.float64))
    inside = torch.zeros(9, 15, dtype=torch.bool)
    inside[7:, 14:] = False
    inside[7:, 7:14] = True
    assert (near.values[:, inside] > 0).all()
    assert (near.values[:, ~inside] == 0).all()
    assert torch.equal(far.values[:, 4:8, 4:8].flatten(1).std(1), torch.zeros(2, dtype=torch.float64))  # one cell


def identity_values(attention):
    """Give STViT's attention identity values and projection: its output is the weighted mean of its input."""
    dim = attention.proj.in_channels
    with torch.no_grad():
        attention.qkv.weight[2 * dim :] = torch.eye(dim)[:, :, None, None]
        attention.qkv.bias[2 * dim :] = 0
        attention.proj.weight.copy_(torch.eye(dim)[:, :, None, None])
        attention.proj.bias.zero_()
    return attention


@pytest.mark.parametrize("iterations", [1, 2])
def test_attention_through_super_tokens_weighs_the_pixels_as_the_output_does(iterations):
    torch.manual_seed(0)
    attention, x = identity_values(SuperTokenAttention(6, 1, 4, iterations).double()), double(2, 12, 16, 6)
    output = attention(x)
    for row, column in ((0, 0), (5, 9), (11, 15)):
        (reading,) = attention.attention_maps(x, None, (row, column))
        got = torch.einsum("bhw,bhwc->bc", reading.values / (12 * 16), x)
        torch.testing.assert_close(got, output[:, row, column])
    *_, received = attention.attention_maps(x, None, None)
    torch.testing.assert_close(torch.einsum("bhw,bhwc->bc", received.values / 192, x), output.mean((1, 2)))


def test_super_token_of_a_pixel_is_the_one_of_its_largest_affinity():
    x, cell = double(1, 8, 12, 5), 4
    cells = to_cells(x, cell)
    affinity = neighbor_affinity(cells, cells.mean(3))
    found = super_tokens(affinity, cell, 8, 12)[0]
    means = cells.mean(3)[0]
    for row in range(8):
        for column in range(12):
            around = [(i, j) for i in range(2) for j in range(3) if abs(i - row // 4) < 2 and abs(j - column // 4) < 2]
            best = max(around, key=lambda token: float(x[0, row, column] @ means[token]))
            assert int(found[row, column]) == 3 * best[0] + best[1]


def test_groups_of_group_mix_attention_weigh_values_as_the_output_does():
    torch.manual_seed(0)
    attention, x = GroupMixAttention(20, 4).double().eval(), double(2, 4, 6, 20)  # a head a group
    q, k, v, _ = (part.flatten(1, 2) for part in attention.mix(x))
    readings = list(attention.attention_maps(x, None, (1, 2)))
    assert [reading.part for reading in readings] == ["1×1 group", "3×3 group", "5×5 group", "7×7 group"]
    for group, reading in enumerate(readings):
        own = slice(4 * group, 4 * group + 4)
        context = k[..., own].softmax(1).transpose(1, 2) @ v[..., own]
        want = (20 / 4) ** -0.5 * q[:, 8, own][:, None] @ context
        got = reading.values.flatten(1)[:, None] / 24 @ v[..., own]
        torch.testing.assert_close(got, want)
    for group, reading in enumerate(attention.attention_maps(x, None, None)):
        want = 24 * k[..., 4 * group : 4 * group + 4].softmax(1).mean(2).view(2, 4, 6)
        torch.testing.assert_close(reading.values, want)


def test_point_is_the_token_that_covers_it():
    model, x = scrambled(shrunken("stvit_small")).eval(), images(1, 3, 40, 100)
    _, maps = attention_maps(
        model, x, (0.65, 0.5), [(4, 1)]
    )  # column 65 of 100 lies in token 2 of 4, row 20 in token 0 of 2
    attention = model.stages[3].blocks[0].attn
    taken = []
    hook = attention.register_forward_hook(lambda module, inputs, output: taken.append(inputs[0]))
    model(x)
    hook.remove()
    (want,) = attention.attention_maps(taken[0], None, (0, 2))
    torch.testing.assert_close(maps[0].reading.values, want.values)


def test_last_blocks_show_the_pair_of_a_guided_stage():
    assert last_blocks(shrunken("sgformer_small", depths=(2, 4, 2, 1))) == [
        (1, 1),
        (1, 2),
        (2, 3),
        (2, 4),
        (3, 1),
        (3, 2),
        (4, 1),
    ]
    assert last_blocks(shrunken("stvit_small", depths=(1, 2, 3, 1))) == [(1, 1), (2, 2), (3, 3), (4, 1)]


def test_mistake_is_an_error_with_a_remedy():
    model, x = shrunken("stvit_small").eval(), images(1, 3, 64, 64)
    with pytest.raises(
        ValueError, match=r"no block 1\.3; both are counted from 1, and the stages have 2, 2, 2, 2 blocks"
    ):
        attention_maps(model, x, blocks=[(1, 3)])
    with pytest.raises(ValueError, match="outside the picture"):
        attention_maps(model, x, (1.2, 0))
    with pytest.raises(ValueError, match=r"call model.eval\(\)"):
        attention_maps(model.train(), x)
    with pytest.raises(ValueError, match="has no maps"):
        attention_maps(timm.create_model("test_efficientnet").eval(), x)


def test_group_of_several_heads_has_the_mean_of_their_weights():
    torch.manual_seed(0)
    attention, x = GroupMixAttention(40, 8).double().eval(), double(1, 3, 5, 40)  # two heads of 4 channels a group
    q, k, _, _ = (part.flatten(1, 2)[0] for part in attention.mix(x))
    for group, reading in enumerate(attention.attention_maps(x, None, (2, 1))):
        heads = [slice(8 * group + 4 * i, 8 * group + 4 * i + 4) for i in range(2)]
        weights = [(40 / 8) ** -0.5 * k[:, own].softmax(0) @ q[11, own] for own in heads]
        torch.testing.assert_close(reading.values[0].flatten() / 15, (weights[0] + weights[1]) / 2)


def test_models_whose_attentions_are_unknown_have_no_maps():
    model = shrunken("stvit_small")
    assert has_maps(model)
    model.stages[1].blocks[0].attn = torch.nn.Identity()
    assert not has_maps(model)
    del model.stages[1].blocks[0].attn
    assert not has_maps(model)
    with pytest.raises(ValueError, match="no maps to show"):
        attention_maps(model.eval(), torch.zeros(1, 3, 64, 64))


def test_compiled_model_is_shown_without_compiling_it_anew():
    torch._dynamo.reset()
    model, x, compiled = shrunken("stvit_small").eval(), images(2, 3, 64, 64), []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    with torch.no_grad():
        want = model(x)
        model.compile(backend=backend, dynamic=False)
        model(x)
        before = len(compiled)
        logits, maps = attention_maps(model, x)
        assert torch.equal(logits, want)
        assert maps
        model(x)
    assert len(compiled) == before > 0
