"""timm's model interface, asked of every registered model."""

import copy

import pytest
import timm
import torch
from timm.models import get_notrace_functions, get_notrace_modules, group_parameters
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from models.published import to_published
from tests.helpers.small_models import NAMES, SMALLEST, images, scrambled, shrunken


def dims(model):
    return [info["num_chs"] for info in model.feature_info]


@pytest.mark.parametrize("name", NAMES)
def test_default_cfg_names_what_the_model_has(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    cfg = model.default_cfg
    assert cfg["architecture"] == name
    assert cfg["input_size"] == (3, 224, 224)
    assert cfg["mean"] == (0.485, 0.456, 0.406)
    assert cfg["std"] == (0.229, 0.224, 0.225)
    assert cfg["pool_size"] == (7, 7)
    assert cfg["crop_pct"] in (0.875, 0.9)
    assert model.num_classes == cfg["num_classes"] == 1000
    assert model.get_parameter(cfg["classifier"] + ".weight").shape == (1000, model.num_features)
    assert model.get_parameter(cfg["first_conv"] + ".weight").shape[1] == 3
    assert [info["reduction"] for info in model.feature_info] == [4, 8, 16, 32]


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_gets_a_gradient(name):
    model = shrunken(name, drop_path_rate=0.1, drop_rate=0.1).train()
    model(images(2, 3, 64, 64)).square().mean().backward()
    assert [key for key, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


@pytest.mark.parametrize("name", NAMES)
def test_features_pool_and_head_make_the_forward_pass(name):
    model, x = shrunken(name).eval(), images(2, 3, 64, 64)
    with torch.no_grad():
        features = model.forward_features(x)
        pooled = model.forward_head(features, pre_logits=True)
        logits = model(x)
        assert features.shape == (2, model.num_features, 2, 2)
        assert pooled.shape == (2, model.head_hidden_size)
        torch.testing.assert_close(pooled, features.mean((2, 3)))
        torch.testing.assert_close(model.get_classifier()(pooled), logits)
        model.reset_classifier(0)
        assert model.num_classes == 0
        assert isinstance(model.get_classifier(), nn.Identity)
        torch.testing.assert_close(model(x), pooled)
        model.reset_classifier(0, "")
        torch.testing.assert_close(model(x), features)
        model.reset_classifier(7, "avg")
        assert model(x).shape == (2, 7)
        assert 0 < model.get_classifier().weight.std() < 0.03


@pytest.mark.parametrize("name", NAMES)
def test_construction_takes_chans_classes_and_pool(name):
    model = shrunken(name, in_chans=1, num_classes=0, global_pool="").eval()
    with torch.no_grad():
        assert model(images(1, 1, 64, 64)).shape == (1, model.num_features, 2, 2)


@pytest.mark.parametrize("name", SMALLEST)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"global_pool": "max"}, "global_pool='max'"),
        ({"global_pool": ""}, "num_classes=0"),
        ({"num_classes": -1}, "num_classes=-1"),
    ],
)
def test_impossible_head_is_refused(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        shrunken(name, **arguments)


@pytest.mark.parametrize("name", SMALLEST)
@pytest.mark.parametrize("shape", [(0, 3, 64, 64), (2, 3, 0, 64), (2, 1, 64, 64), (3, 64, 64)], ids=str)
def test_images_no_model_can_take_are_refused(name, shape):
    model = shrunken(name)
    with pytest.raises(ValueError, match=r"\(" + ", ".join(map(str, shape))):
        model(torch.zeros(shape))


@pytest.mark.parametrize("name", NAMES)
def test_intermediates_are_the_stages_outputs(name):
    model, x = shrunken(name).eval(), images(2, 3, 64, 64)
    with torch.no_grad():
        features, maps = model.forward_intermediates(x)
        torch.testing.assert_close(features, model.forward_features(x))
        assert [tuple(m.shape) for m in maps] == [(2, c, s, s) for c, s in zip(dims(model), (16, 8, 4, 2), strict=True)]
        early, chosen = model.forward_intermediates(x, indices=[0, 2], stop_early=True)
        assert early.shape == maps[2].shape
        torch.testing.assert_close(chosen, [maps[0], maps[2]])
        last = model.forward_intermediates(x, indices=1, norm=True, intermediates_only=True)
        torch.testing.assert_close(last, [features])
        moved = model.forward_intermediates(x, output_fmt="NHWC", intermediates_only=True)
        torch.testing.assert_close(moved, [m.permute(0, 2, 3, 1) for m in maps])
        with pytest.raises(ValueError, match="NLC"):
            model.forward_intermediates(x, output_fmt="NLC")


@pytest.mark.parametrize("name", NAMES)
def test_features_only_gives_the_chosen_maps_and_keeps_no_more(name):
    whole, x = shrunken(name).eval(), images(2, 3, 64, 64)
    model = shrunken(name, features_only=True, out_indices=(1, 2)).eval()
    assert model.feature_info.channels() == dims(whole)[1:3]
    assert model.feature_info.reduction() == [8, 16]
    assert not any(key.startswith(("model.stages.3", "model.head", "model.neck")) for key in model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(model(x), whole.forward_intermediates(x, intermediates_only=True)[1:3])
    everything = shrunken(name, features_only=True).train()
    sum(m.square().mean() for m in everything(x)).backward()
    assert all(p.grad is not None for p in everything.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_grad_checkpointing_changes_nothing(name):
    plain = scrambled(shrunken(name)).train()
    saving = copy.deepcopy(plain)
    saving.set_grad_checkpointing()
    x = images(4, 3, 64, 64)
    outputs = [model(x) for model in (plain, saving)]
    for output in outputs:
        output.square().mean().backward()
    torch.testing.assert_close(outputs[1], outputs[0])
    for (key, p), q in zip(plain.named_parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-3, atol=1e-3 * p.grad.abs().max().item(), msg=key)
    for (key, want), got in zip(plain.named_buffers(), saving.buffers(), strict=True):
        torch.testing.assert_close(got, want, msg=key)


@pytest.mark.parametrize("name", NAMES)
def test_layer_groups_follow_the_depth(name):
    model = shrunken(name, depths=(2, 2, 2, 2))
    fine = group_parameters(model, model.group_matcher(), reverse=True)
    coarse = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    assert fine.keys() == coarse.keys() == {key for key, _ in model.named_parameters()}
    for key, layer in fine.items():
        parts = key.split(".")
        if parts[0] == "stem":
            want = 0
        elif parts[0] == "stages":
            block = {"blocks": parts[3], "downsample": "0", "norm": "1"}[parts[2]]
            want = 1 + 2 * int(parts[1]) + int(block)
        else:
            want = {"neck": 8, "head": 9}[parts[0]]
        assert layer == want, key
        assert coarse[key] == {"stem": 0, "stages": 1 + int(parts[1]) if parts[0] == "stages" else 0}.get(parts[0], 5)


@pytest.mark.parametrize("name", SMALLEST)
def test_nothing_of_two_dimensions_is_spared_from_decay(name):
    assert shrunken(name).no_weight_decay() == set()


@pytest.mark.parametrize("name", SMALLEST)
def test_channels_last_gives_the_same(name):
    model, x = scrambled(shrunken(name)).eval(), images(2, 3, 64, 64)
    with torch.no_grad():
        want = model(x)
        got = model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("scale", [1, 1000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", SMALLEST)
def test_autocast_makes_no_nan(name, dtype, scale):
    model = shrunken(name).train()
    with torch.autocast("cpu", dtype):
        logits = model(scale * images(2, 3, 64, 64))
    logits.float().square().mean().backward()
    assert logits.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", SMALLEST)
def test_sync_batch_norm_can_replace_batch_norm(name):
    model, x = scrambled(shrunken(name)).eval(), images(2, 3, 64, 64)
    with torch.no_grad():
        want = model(x)
        synced = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        torch.testing.assert_close(synced(x), want)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in synced.modules())


@pytest.mark.parametrize(("autocast", "backend"), [(False, "eager"), (True, "aot_eager")])
@pytest.mark.parametrize("name", SMALLEST)
def test_compile_finds_one_graph(name, autocast, backend):
    model = shrunken(name, depths=(2, 1, 1, 1)).train()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = compiled(images(2, 3, 64, 64))
    logits.float().square().mean().backward()
    assert logits.isfinite().all()


@pytest.mark.parametrize("name", SMALLEST)
def test_export_gives_the_same(name):
    model, x = shrunken(name, depths=(2, 1, 1, 1)).eval(), images(2, 3, 64, 64)
    exported = torch.export.export(model, (x,)).module()
    with torch.no_grad():
        torch.testing.assert_close(exported(x), model(x))


@pytest.mark.parametrize("name", SMALLEST)
def test_symbolic_tracing_gives_the_same(name):
    model, x = shrunken(name).eval(), images(2, 3, 64, 64)
    leaves = {"leaf_modules": get_notrace_modules(), "autowrap_functions": get_notrace_functions()}
    _, nodes = get_graph_node_names(model, tracer_kwargs=leaves)
    traced = create_feature_extractor(model, [nodes[-1]], tracer_kwargs=leaves)
    with torch.no_grad():
        assert torch.equal(next(iter(traced(x).values())), model(x))


@pytest.mark.parametrize("name", SMALLEST)
def test_create_model_loads_files_of_either_naming(name, tmp_path):
    source = scrambled(shrunken(name))
    files = {"ours": source.state_dict(), "theirs": {"model": to_published(source, source.state_dict())}}
    for stem, content in files.items():
        path = tmp_path / f"{stem}.pth"
        torch.save(content, path)
        loaded = shrunken(name, checkpoint_path=str(path)).state_dict()
        assert all(torch.equal(loaded[key], tensor) for key, tensor in source.state_dict().items())
