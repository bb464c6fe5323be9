"""ViTs, Swin and ConvNeXt: what common/backbones.py makes of timm's networks, and the two semantic
scripts with these. Expected values come from the networks' own layers, called one by one."""

import copy
from types import SimpleNamespace

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models import register_model
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import gist_rist
import gta_seg
from common import backbones, cli
from common.distributed import World
from common.errors import UserError
from common.semantic import Batch

CLASSES, WORLD = 4, World()
DINOV2 = "vit_small_patch14_dinov2"


@register_model
def tiny_swin(
    pretrained=False, pretrained_cfg=None, pretrained_cfg_overlay=None, cache_dir=None, **settings
):
    """A Swin of a few thousand weights; timm has none so small."""
    return SwinTransformer(
        embed_dim=8, depths=(1, 2, 2, 1), num_heads=(1, 1, 2, 2), window_size=4, **settings
    )


@register_model
def vit_behind(
    pretrained=False, pretrained_cfg=None, pretrained_cfg_overlay=None, cache_dir=None, **settings
):
    """A tiny ViT that pools first and normalises then, as those of MAE do."""
    return VisionTransformer(
        embed_dim=16, depth=6, num_heads=2, global_pool="avg", fc_norm=True, **settings
    )


# A ViT, one whose last norm lies behind its pooling, a Swin with drop path, a ConvNeXt.
SMALL = ["test_vit", "vit_behind", "tiny_swin", "test_convnext"]
each_network = pytest.mark.parametrize("name", SMALL)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def batch(seed: int, count: int = 2, size: int = 64) -> Batch:
    g = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, size, size, generator=g)
    label = torch.randint(0, CLASSES, (count, size, size), generator=g)
    return Batch(images, torch.ones_like(label, dtype=torch.bool), label, torch.zeros(count))


def gta_args(name: str, **more) -> gta_seg.Args:
    small = dict(weights="none", width=8, batch_size=2, steps=10, cutmix=1.0)
    return gta_seg.preset("shapes", backbone=name, **small | more)


def gist_args(name: str, **more) -> gist_rist.Args:
    return gist_rist.preset("shapes", backbone=name, weights="none", **more)


def gta_state(args: gta_seg.Args) -> gta_seg.State:
    s, _ = gta_seg.build(args, CLASSES, WORLD)
    gta_seg.end_of_warmup(s, args)
    s.student.train()
    return s


def gta_step(s: gta_seg.State, args: gta_seg.Args) -> dict[str, Tensor]:
    return gta_seg.train_step(s, batch(1), batch(2), args, WORLD)


def gist_step(net: gist_rist.SegNet, args: gist_rist.Args) -> dict[str, Tensor]:
    teacher = copy.deepcopy(net).requires_grad_(False).eval()
    s = gist_rist.State(net.train(), gist_rist.optimizer_of(net, args), teacher)
    return gist_rist.refine_step(s, args, "L", 1.0, 0, batch(1))


# -------------------------------------------------------------------------------------------- maps
@each_network
def test_maps_have_their_channels_second_and_cover_the_picture(name):
    body, reductions, channels = backbones.build(name, 8)
    assert len(channels) == 4 and isinstance(body, backbones.LayerNormed)
    for height, width in ((64, 96), (97, 33)):
        height_of_patches = -(-height // body.patch) * body.patch
        width_of_patches = -(-width // body.patch) * body.patch
        for m, r, c in zip(
            body(torch.randn(2, 3, height, width)), reductions, channels, strict=True
        ):
            assert m.shape == (2, c, height_of_patches // r, width_of_patches // r)


def test_maps_of_a_vit_are_those_of_four_blocks_through_the_last_norm():
    body = backbones.build(DINOV2, 8)[0].eval()
    net = body.body
    nn.init.normal_(net.norm.weight)
    nn.init.normal_(net.norm.bias)
    images, expected = torch.randn(1, 3, 56, 84), []
    with torch.no_grad():
        x = net.norm_pre(net._pos_embed(net.patch_embed(images)))
        for i, block in enumerate(net.blocks):
            x = block(x)
            if i in (2, 5, 8, 11):
                expected.append(net.norm(x)[:, 1:].transpose(1, 2).unflatten(2, (4, 6)))
        maps = body(images)
    assert len(maps) == 4
    for a, b in zip(maps, expected, strict=True):
        assert (a - b).abs().max() < 1e-4


def test_maps_without_a_norm_of_their_own_get_the_adaptors():
    normed, bare = (backbones.build(name, 8) for name in ("test_vit", "vit_behind"))
    assert normed[0].normed and isinstance(backbones.adaptor(*normed, 8).first, nn.Identity)
    assert not bare[0].normed and isinstance(backbones.adaptor(*bare, 8).first, nn.LayerNorm)


def test_maps_of_a_swin_are_those_of_its_stages():
    body = backbones.build("tiny_swin", 8)[0].eval()
    x = body.body.patch_embed(torch.ones(1, 3, 64, 96).cumsum(3) / 96)
    for m, stage in zip(
        body(torch.ones(1, 3, 64, 96).cumsum(3) / 96), body.body.layers, strict=True
    ):
        x = stage(x)
        assert torch.equal(m, x.permute(0, 3, 1, 2))


def test_swin_shifts_its_windows_where_one_held_the_whole_map_of_its_own_size():
    """At 224 pixels the last stage is one window; larger pictures need the shift there, too."""
    net = backbones.of_any_size("tiny_swin")
    assert any(sum(block.shift_size) for block in net.layers[2].blocks)
    large = backbones.build("swin_tiny_patch4_window7_224", 8)[0].body
    assert any(sum(block.shift_size) for block in large.layers[3].blocks)


def test_the_table_of_positions_is_resized_to_every_grid():
    """By integer sizes, bicubic, antialiased (timm's rule). By a factor, as DINOv2's own code does
    it, some of these sizes miss their grid of patches."""
    with torch.device("meta"):
        body = backbones.build(DINOV2, 8)[0]
        for height, width in [(s, s) for s in (546, 602, 1092, 1204, 1610, 1722)] + [(518, 714)]:
            deepest = body(torch.zeros(1, 3, height, width))[-1]
            assert deepest.shape[-2:] == (height // 14, width // 14)


def positions(net: nn.Module, grid: tuple[int, int]) -> Tensor:
    """What a ViT adds to its patches of a grid, (h w, C)."""
    x = torch.zeros(1, *grid, net.embed_dim)
    return net._pos_embed(x)[0, net.num_prefix_tokens :]


def resized_table(net: nn.Module, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    table = net.pos_embed[0, net.num_prefix_tokens :].T.unflatten(1, old)[None]
    table = F.interpolate(table, size=new, mode="bicubic", antialias=True, align_corners=False)
    return table[0].flatten(1).T


@torch.no_grad()
def test_positions_at_the_own_size_are_the_table_itself():
    net = backbones.build(DINOV2, 8)[0].body
    nn.init.normal_(net.pos_embed)
    assert torch.equal(positions(net, (37, 37)), net.pos_embed[0, 1:])
    assert torch.equal(positions(net, (39, 31)), resized_table(net, (37, 37), (39, 31)))


@torch.no_grad()
@pytest.mark.parametrize("old, new", [((10, 10), (5, 20)), ((2, 8), (4, 4))])
def test_positions_of_as_many_patches_in_another_grid_are_resized(old, new):
    size = (16 * old[0], 16 * old[1])
    net = timm.create_model("test_vit", img_size=size, dynamic_img_size=True)
    nn.init.normal_(net.pos_embed)
    own = net.pos_embed[0, net.num_prefix_tokens :]
    assert not torch.allclose(positions(net, new), own)
    assert torch.equal(positions(net, new), resized_table(net, old, new))


@torch.no_grad()
def test_every_pixel_keeps_its_place_in_a_picture_of_no_whole_patches(monkeypatch):
    """An identity of cells, on a picture of its own coordinates: what comes back is less than half
    a cell off, at opposite borders alike, and right in the middle."""
    body = backbones.build(DINOV2, 8)[0]
    monkeypatch.setattr(
        body.body, "forward_intermediates", lambda x, **_: [F.avg_pool2d(x, body.patch)]
    )
    height, width = 500, 375
    ys, xs = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    picture = torch.stack([ys, xs, ys]).float()
    (cells,) = body(picture[None])
    error = gta_seg.upsample(cells, (height, width))[0] - picture
    assert error.abs().max() < body.patch / 2
    assert (error[0] + error[0].flip(0)).abs().max() < 1e-2
    assert (error[1] + error[1].flip(1)).abs().max() < 1e-2


@torch.no_grad()
def test_registers_are_no_patches():
    plain = backbones.build(DINOV2, 8)[0].eval()
    body = backbones.build("vit_small_patch14_reg4_dinov2", 8)[0].eval()
    nn.init.normal_(body.body.reg_token)
    images = torch.randn(1, 3, 56, 84)
    maps = body(images)
    assert [m.shape for m in maps] == [m.shape for m in plain(images)]
    body.body.reg_token.copy_(body.body.reg_token.flip(1))
    for a, b in zip(maps, body(images), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_a_network_for_one_size_is_refused_in_a_sentence():
    with pytest.raises(UserError, match="mixer_s16_224 has no maps of pictures of other sizes"):
        backbones.build("mixer_s16_224", 8)


def test_who_is_normalised_by_layers():
    for name in [*SMALL, DINOV2, "convnext_tiny", "vit_small_patch16_dinov3", "pvt_v2_b0"]:
        assert backbones.is_layer_normed(name), name
    # the last two have LayerNorm beside BatchNorm, and beside GroupNorm in blocks of a ResNet
    for name in ["resnet18", "test_resnet", "mobilenet_v2", "", "nonsense", "gcresnet50t"]:
        assert not backbones.is_layer_normed(name), name


# ----------------------------------------------------------------------------------------- adaptor
@pytest.mark.parametrize(
    "reductions, channels, stride, shape",
    [
        ([14] * 4, [32] * 4, 8, (16, 8, 12)),  # stride 7
        ([14], [32], 4, (8, 16, 24)),  # stride 3.5
        ([16] * 4, [32] * 4, 16, (32, 4, 6)),
        ([4, 8, 16, 32], [8, 16, 32, 64], 8, (16, 16, 24)),
        ([4], [8], 4, (8, 4, 6)),
        ([4, 8, 16, 32], [8, 16, 32, 64], 32, (64, 4, 6)),
    ],
)
def test_the_adaptor_doubles_and_meets_the_maps_on_its_way(reductions, channels, stride, shape):
    maps = []
    for reduction, count in zip(reductions, channels, strict=True):
        times = reductions[-1] // reduction
        maps.append(torch.randn(1, count, 4 * times, 6 * times, requires_grad=True))
    net = backbones.Adaptor(False, reductions, channels, stride)
    out = net(maps)
    assert out.shape == (1, *shape) and net.channels == shape[0]
    out.square().sum().backward()
    assert all(p.grad is not None for p in net.parameters())
    for m, reduction in zip(maps[:-1], reductions, strict=False):
        assert (m.grad is not None) == (len(set(reductions)) > 1 and stride <= reduction)


def test_a_cnn_has_no_adaptor():
    body, reductions, channels = backbones.build("test_resnet", 8)
    adaptor = backbones.adaptor(body, reductions, channels, 8)
    maps = body(torch.randn(1, 3, 64, 64))
    assert adaptor(maps) is maps[-1] and not list(adaptor.state_dict())


# ----------------------------------------------------------------------------- the two scripts
@each_network
@pytest.mark.parametrize("freeze", [False, True])
def test_gta_seg_steps(name, freeze):
    """Each parameter that learns has a gradient, as DDP demands, and a step moves it."""
    args = gta_args(name, freeze_backbone=freeze, aux=0.4)
    s = gta_state(args)
    before = copy.deepcopy(s.student.state_dict())
    losses = gta_step(s, args)
    assert all(value.isfinite() for value in losses.values())
    for net in (s.student, s.gta):
        assert all((p.grad is not None) == p.requires_grad for p in net.parameters())
    for key, value in s.student.state_dict().items():
        if key.startswith("features.backbone."):
            assert torch.equal(value, before[key]) or not freeze
    moved = [k for k, v in s.student.state_dict().items() if not torch.equal(v, before[k])]
    assert any("backbone" in key for key in moved) != freeze
    assert any(key.startswith("features.aspp") for key in moved)
    with torch.no_grad():
        assert gta_seg.predict_logits(s.teacher, torch.randn(1, 3, 50, 75)).shape[-2:] == (50, 75)


@each_network
@pytest.mark.parametrize("freeze", [False, True])
def test_gist_rist_steps(name, freeze):
    args = gist_args(name, freeze_backbone=freeze)
    net = gist_rist.SegNet(args, CLASSES)
    before = copy.deepcopy(net.state_dict())
    assert gist_step(net, args)["loss"].isfinite()
    assert all((p.grad is not None) == p.requires_grad for p in net.parameters())
    moved = [k for k, v in net.state_dict().items() if not torch.equal(v, before[k])]
    assert any(key.startswith("backbone.") for key in moved) != freeze
    assert any(key.startswith("head.") for key in moved)
    assert net(torch.zeros(1, 3, 50, 75))[0].shape[1] == CLASSES


def kept_bytes(forward) -> int:
    """Bytes that a forward pass keeps for its backward pass, each storage once."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    assert output is not None
    return sum(kept.values())


@pytest.mark.parametrize("name", [*SMALL, "resnet18"])
@pytest.mark.parametrize("script", [gta_seg, gist_rist])
def test_a_frozen_backbone_is_constant_and_keeps_no_graph(script, name):
    args = gta_args if script is gta_seg else gist_args
    net = script.SegNet(args(name, freeze_backbone=True), CLASSES).train()
    free = script.SegNet(args(name), CLASSES).train()
    part = net.features if script is gta_seg else net
    assert not any(module.training for module in part.backbone.modules())
    assert part.aspp.training if script is gta_seg else part.head.training
    images, before = 255 * torch.rand(2, 3, 64, 64), copy.deepcopy(part.backbone.state_dict())
    first, second = part.backbone(images), part.backbone(images)
    for a, b in zip(first, second, strict=True):  # no drop path, no statistics of the batch
        assert torch.equal(a, b) and a.grad_fn is None
    after = part.backbone.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    settings = args(name, freeze_backbone=True)
    if script is gta_seg:
        learned = gta_seg.optimizer_of(net, settings, WORLD).param_groups
    else:
        learned = gist_rist.optimizer_of(net, settings).param_groups
    own = {id(p) for p in part.backbone.parameters()}
    assert not any(id(p) in own for group in learned for p in group["params"])
    assert kept_bytes(lambda: net(images)) < kept_bytes(lambda: free(images))


def test_frozen_backbones_of_the_three_networks_are_one():
    args = gta_args("test_vit", freeze_backbone=True)
    s = gta_state(args)
    gta_step(s, args)
    places = [
        {p.data_ptr() for p in net.features.backbone.parameters()} for net in s.networks().values()
    ]
    assert len(places) == 3 and places[0] == places[1] == places[2]


def test_transformers_learn_by_adamw_and_cnns_by_sgd():
    for name, kind in {"test_vit": torch.optim.AdamW, "test_resnet": torch.optim.SGD}.items():
        args = gta_args(name)
        net = gta_seg.SegNet(args, CLASSES)
        optimizer = gta_seg.optimizer_of(net, args, WORLD)
        assert type(optimizer) is kind
        count = sum(len(group["params"]) for group in optimizer.param_groups)
        assert count == len(list(net.parameters()))
        gta_seg.set_learning_rates(optimizer, gta_seg.learning_rate_factor(5, 10))
        for group in optimizer.param_groups[1:]:
            assert group["lr"] == pytest.approx(args.decoder_lr * optimizer.param_groups[0]["lr"])
        args = gist_args(name)
        net = gist_rist.SegNet(args, CLASSES)
        optimizer = gist_rist.optimizer_of(net, args)
        assert type(optimizer) is kind
        count = sum(len(group["params"]) for group in optimizer.param_groups)
        assert count == len(list(net.parameters()))


def parsed(script, *flags: str):
    return cli.parse(script.Args, script.settings, script.CHOOSERS, list(flags))


def test_the_backbone_picks_its_rates_and_flags_override_them():
    args = parsed(gta_seg, "--backbone", "test_vit")
    assert (args.lr, args.decoder_lr, args.weight_decay) == (5e-6, 40, 0.01)
    args = parsed(gta_seg, "--backbone", "test_vit", "--dataset", "cityscapes", "--lr", "0.5")
    assert (args.lr, args.decoder_lr, args.crop_size) == (0.5, 40, 769)
    assert parsed(gta_seg, "--backbone", "resnet18") == gta_seg.preset(backbone="resnet18")
    assert parsed(gta_seg, "--backbone", "resnet18").lr == gta_seg.preset().lr
    args = parsed(gist_rist, "--backbone", "test_vit")
    assert (args.lr, args.head_lr, args.pixels, args.weights) == (5e-6, 40, "imagenet", "imagenet")
    assert parsed(gist_rist, "--backbone", "test_vit", "--weights", "none").weights == "none"
    assert parsed(gist_rist, "--backbone", "resnet18") == gist_rist.preset(backbone="resnet18")


@each_network
def test_files_of_weights_in_timms_names_fit(name, tmp_path):
    net = timm.create_model(name, num_classes=10)
    for parameter in net.parameters():
        nn.init.normal_(parameter)
    file = tmp_path / "weights.pth"
    torch.save(net.state_dict(), file)
    s, notes = gta_seg.build(gta_args(name, weights=str(file), method="suponly"), CLASSES, WORLD)
    given = net.state_dict()
    own = s.student.features.backbone.body.state_dict()
    assert all(torch.equal(value, given[key]) for key, value in own.items())
    assert not any("left fresh" in note for note in notes)
    args = gist_args(name)
    args.weights = str(file)
    weights, _ = gist_rist.initial_weights(args, CLASSES)
    assert all(torch.equal(weights[f"backbone.body.{key}"], given[key]) for key in own)


def test_a_cut_leaves_the_last_map_out():
    whole = gist_rist.SegNet(gist_args("tiny_swin"), CLASSES)
    cut = gist_rist.SegNet(gist_args("tiny_swin", cut=1), CLASSES)
    assert whole.backbone.channels[:3] == cut.backbone.channels
    assert len(cut.backbone.body.layers) == 3
    vit = gist_rist.SegNet(gist_args("test_vit", cut=2), CLASSES)
    assert len(vit.backbone.body.blocks) == vit.backbone.places[-1] + 1 < 6


def test_stores_from_before_the_flag_keep_their_names():
    def key(args: gist_rist.Args) -> str:
        data = SimpleNamespace(classes=["a"])
        tree = SimpleNamespace(args=args, labeled=[], pool=[], dev=[], data=data)
        return gist_rist.key_of(tree, set())

    args = gist_args("test_resnet")
    before = copy.copy(args)
    del before.freeze_backbone  # the class still has its default
    assert key(args) == key(before) != key(gist_args("test_resnet", freeze_backbone=True))


def test_a_pyramid_of_a_convnext():
    net = backbones.FourMaps("test_convnext", frozen=False, pretrained=False)
    maps = net(torch.randn(1, 3, 64, 96))
    assert [m.shape[-2:] for m in maps] == [(16, 24), (8, 12), (4, 6), (2, 3)]
    assert [m.shape[1] for m in maps] == net.channels
