"""How to call LION, OccRWKV and their parts: module, inputs -> {name in the manifest: tensor}."""

import math

import numpy as np
import torch
from torch import nn

from linescan.backbones.points.lion import (
    OPERATORS,
    Place,
    PositionMLP,
    VoxelMerging,
    operators_from_official,
)
from linescan.checkpoint import rename
from linescan.heads.points.occupancy import OFFICIAL_KEYS as OCC_KEYS
from linescan.heads.points.occupancy import (
    Fusion,
    LocalConv,
    MapRWKV,
    OccRWKV,
    PointEncoder,
    PyramidPooling,
    ResidualConv3d,
    class_weights,
    double_conv,
)
from linescan.layers.rwkv import from_official
from linescan.layers.sparse import Sites, SparseTensor, from_spconv, scatter
from linescan.scans.routes import group_table, window_order

from . import recipe
from .points import stored


def sites(coords, grid):
    """Voxels (b, z, y, x) in a grid (x, y, z) of the manifest."""
    return Sites(coords, grid[::-1], int(coords[:, 0].max()) + 1)


def watch(parts):
    """What the named modules give, as it comes."""
    seen, hooks = {}, []
    for name, part in parts.items():

        def keep(module, given, result, name=name):
            result = result[0] if type(result) is tuple else result
            seen[name] = result.features
            if name.startswith("dow"):
                seen[f"{name}_coords"] = result.sites.coords

        hooks.append(part.register_forward_hook(keep))
    return seen, hooks


def backbone(module, inputs, manifest):
    x = SparseTensor(inputs["voxel_features"], sites(inputs["voxel_coords"], manifest["grid_size_xyz"]))
    parts = {"layer1_0": module.blocks[0].encoder[0], "linear_out": module.out}
    for i, (block, merge) in enumerate(zip(module.blocks, module.merges), 1):
        parts |= {f"block{i}": block, f"dow{i}": merge}
    if module.flatten is not None:
        parts["dow_out"] = module.flatten
    seen, hooks = watch(parts)
    y = module(x)
    for hook in hooks:
        hook.remove()
    return seen | {"encoded": y.features, "encoded_coords": y.sites.coords}


class Pieces(nn.Module):
    """One operator of each kind, a merging, a pooling, and positions."""

    def __init__(self, dim=32):
        super().__init__()
        own = {"retnet": {"num_heads": 2}}
        names = ("Mamba", "RWKV", "RetNet", "xLSTM", "TTT")
        make = {name: OPERATORS[name.lower()] for name in names}
        self.op = nn.ModuleDict({n: make[n](dim, Place(1, 34), 0.0, **own.get(n.lower(), {})) for n in names})
        self.merge = VoxelMerging(dim, (2, 1, 1), 0.2)
        self.pool = VoxelMerging(dim, (2, 2, 2))
        self.pos = PositionMLP(dim)

    def checkpoint_filter(self, state):
        rules = [
            (r"^op\.Mamba\.norm", "op.Mamba.norm1"),
            (r"sub_conv\.0", "conv"),
            (r"sub_conv\.1", "norm1"),
            (r"^(merge|pool)\.norm\.", r"\1.norm2."),
            (r"position_embedding_head\.", ""),
        ]
        return from_spconv(operators_from_official(rename(state, rules), self), self)


def pieces(module, inputs, manifest):
    where = sites(inputs["voxel_coords"], manifest["grid_size_xyz"])
    noise = torch.from_numpy(recipe.noise("voxel_features", (len(where), 32)).astype("float32"))
    x = SparseTensor(noise.to(module.pos[0].weight), where)
    results = {}
    counts = where.coords[:, 0].bincount()
    for name, shift in (("plain", False), ("shift", True)):
        for axis, axes in (("x", "xyz"), ("y", "yxz")):
            results[f"map_{name}_{axis}"] = window_order(where.coords, (32, 13, 13), axes, shift)
        # The original's table of groups over places in an order: the same for every order.
        table = group_table(torch.arange(len(where)), counts, 64).flatten().long()
        results[f"map_{name}_flat2win"] = torch.where(table < 0, -2 - table, table)
        results[f"map_{name}_win2flat"] = (table >= 0).nonzero()[:, 0]
    merged, results["merge_inverse"] = module.merge(x)
    results |= {"merge": merged.features, "merge_coords": merged.sites.coords}
    sparse = VoxelMerging(32, (2, 1, 1), 0.2, step=2, diagonals=2).to(module.pos[0].weight.dtype)
    sparse.load_state_dict(module.merge.state_dict())
    sparse, _ = sparse(x)
    results |= {"merge_s2d2": sparse.features, "merge_s2d2_coords": sparse.sites.coords}
    pooled, index = module.pool(x)
    results |= {"pool": pooled.features, "pool_coords": pooled.sites.coords, "pool_inverse": index}
    results["expand"] = x.features + pooled.features[index]
    results["pos"] = module.pos(x)
    results |= {f"op_{name}": operator(inputs["sequence"]) for name, operator in module.op.items()}
    return results


def detector(module, inputs, manifest):
    points = inputs["points"]
    counts = points[:, 0].long().bincount().tolist()
    seen = {}
    hooks = [module.encoder.register_forward_hook(lambda m, x, y: seen.update(voxels=y))]
    hooks += [module.backbone.register_forward_hook(lambda m, x, y: seen.update(encoded=y))]
    features = module.features(points[:, 1:], counts)
    for hook in hooks:
        hook.remove()
    results = {
        "voxel_coords": seen["voxels"].sites.coords,
        "voxel_features": seen["voxels"].features,
        "encoded": seen["encoded"].features,
        "encoded_coords": seen["encoded"].sites.coords,
    }
    if module.neck is not None:
        results |= {"bev": seen["encoded"].dense().flatten(1, 2), "spatial_features_2d": features}
    raw = module.head(features)
    if isinstance(raw, list):
        for i, head in enumerate(raw):
            results |= {f"head{i}_{name}": x for name, x in head.items() if name != "sites"}
            results[f"head{i}_heatmap"] = head["hm"]
    elif "cls" in raw:
        names = {"cls": "conv_cls", "box": "conv_box", "dir": "conv_dir_cls"}
        results |= {f"head_{names[name]}": x for name, x in raw.items()}
    else:
        own = {name: x if name == "dense_heatmap" else x.mT for name, x in raw.items() if name != "label"}
        results |= {f"head_{name}": x for name, x in own.items()} | {"query_labels": raw["label"]}
    module.head.decode(raw)
    return results


# -- OccRWKV -----------------------------------------------------------------------------------------------------------


def clouds_of(manifest, like):
    """The points of all samples, packed, and how many each has."""
    names = [f"input_points{b}" for b in range(len(manifest["inputs"]["points"].get("counts", (0, 0))))]
    clouds = [stored(manifest, name) for name in names]
    return torch.cat(clouds).to(like), [len(cloud) for cloud in clouds]


def volume_of(manifest, name, shape):
    """A volume of bits."""
    bits = stored(manifest, name).numpy()
    return torch.from_numpy(np.unpackbits(bits)[: math.prod(shape)].reshape(shape))


def tokens(maps):
    return maps.flatten(2).mT


def occupancy(module, inputs, manifest):
    like = module.encoder.gate.weight
    points, counts = clouds_of(manifest, like)
    shape = manifest["inputs"]["occupancy"]["shape"]
    hit = volume_of(manifest, "input_occupancy_bits", shape)
    published = occupancy_in(module, points, counts, hit, shape, manifest)
    if not any(entry["name"].endswith("__formula") for entry in manifest["outputs"]):
        return published
    plain = type(module)(low=module.low, high=module.high, cells=module.cells, kernel=False).eval().to(like.dtype)
    plain.load_state_dict(module.state_dict())
    other = occupancy_in(plain, points, counts, hit, shape, manifest)
    return published | {f"{name}__formula": x for name, x in other.items()}


def occupancy_in(module, points, counts, hit, shape, manifest):
    seen = {}
    parts = {"voxel_features": module.encoder, "sem_conv1": module.semantic.convs[0]}
    for i in range(3):
        parts |= {f"sem_rwkv{i + 1}": module.semantic.blocks[i], f"com_rwkv{i + 1}": module.geometric.blocks[i]}
        parts |= {f"bev_fused{i + 1}": module.unet.fusions[i]}
    parts["bev_rwkv4"] = module.unet.blocks[3]
    hooks = [part.register_forward_hook(lambda m, x, y, n=name: seen.update({n: y})) for name, part in parts.items()]
    hooks.append(module.semantic.heads[0].register_forward_hook(lambda m, x, y: seen.update(sem_proj1=x[0])))
    found = module(points, counts, hit)
    for hook in hooks:
        hook.remove()
    full = module.levels(points, counts)[1].sites.coords
    results = {name: tokens(x) if "rwkv" in name else x for name, x in seen.items()}
    results["sem_conv1"] = seen["sem_conv1"].features
    results |= {"voxel_coords": full[:, [0, 3, 2, 1]], "sem_proj1_coords": found.levels[0].sites.coords}
    results["semantic"] = found.logits
    if "labels" in manifest["inputs"]:
        targets = []
        for scale in (1, 2, 4, 8):
            cells = [shape[0], *(n // scale for n in shape[1:])]
            target = stored(manifest, f"input_label_1_{scale}").long()
            targets.append(target.masked_fill(volume_of(manifest, f"input_invalid_1_{scale}_bits", cells) > 0, 255))
        labels = torch.cat([stored(manifest, f"input_points_label{b}") for b in range(len(counts))]).long()
        losses = module.losses(found, targets[0], labels, targets[1:], class_weights())
        names = {"loss": "total", "volume": "semantic_1_1", "semantic": "semantic_seg", "occupied": "scene_completion"}
        losses["volume"] = 3 * losses["volume"]
        results |= {f"loss_{names[name]}": value for name, value in losses.items()}
    return results


class OccupancyPieces(nn.Module):
    """Small parts of the network."""

    def __init__(self):
        super().__init__()
        self.rwkv = MapRWKV(32, kernel=True)
        self.sfe, self.sgfe, self.fusion = LocalConv(8), PyramidPooling(8, 16), Fusion(32, (16, 16))
        self.down, self.up, self.res = double_conv(8, 16), double_conv(24, 8), ResidualConv3d(4, 8, 2)
        self.pre = PointEncoder(dim=8, width=4)

    def checkpoint_filter(self, state):
        state = {key: x for key, x in state.items() if ".scale_selection." not in key}
        names = {"rwkv": "x.rwkv_block1", "sfe": "sem_branch.conv1_block", "sgfe": "sem_branch.proj1_block"}
        names |= {"fusion": "bev_model.bev_fusions.0", "down": "bev_model.down1", "up": "bev_model.up1"}
        names |= {"res": "com_branch.block_1.0", "pre": "preprocess"}
        state = rename(state, [(rf"^{short}\.", f"{long}.") for short, long in names.items()])
        state = from_official(rename(state, OCC_KEYS))
        own = {"x.blocks.0": "rwkv", "semantic.convs.0": "sfe", "semantic.pools.0": "sgfe", "unet.fusions.0": "fusion"}
        own |= {"unet.downs.0": "down", "unet.ups.0": "up", "geometric.stages.0": "res", "encoder": "pre"}
        return from_spconv(rename(state, [(rf"^{long}\.", f"{short}.") for long, short in own.items()]), self)


def occupancy_pieces(module, inputs, manifest):
    like = module.res.layer.weight
    salt = manifest["inputs"]["tensors"]["salt"]

    def noise(key, *shape):
        return torch.from_numpy(recipe.noise(key, shape, salt).astype("float32")).to(like)

    results = {}
    plain = MapRWKV(32, kernel=False).to(like).eval()
    plain.load_state_dict(module.rwkv.state_dict())
    for h, w in ((16, 12), (8, 8), (32, 32)):
        x = noise(f"tokens{h}x{w}", 2, h * w, 32).mT.unflatten(2, (h, w))
        results |= {f"rwkv_{h}x{w}": tokens(module.rwkv(x)), f"rwkv_{h}x{w}__formula": tokens(plain(x))}
    results["fusion"] = module.fusion(noise("bev", 2, 32, 8, 6), noise("sem", 2, 16, 8, 6), noise("com", 2, 16, 8, 6))
    results["down"] = module.down(nn.functional.max_pool2d(noise("down", 2, 8, 12, 10), 2))
    x = nn.functional.interpolate(noise("up1", 2, 16, 5, 4), scale_factor=2, mode="bilinear", align_corners=True)
    skip = noise("up2", 2, 8, 11, 8)
    results["up"] = module.up(torch.cat([skip, nn.functional.pad(x, (0, 0, 0, 1))], 1))
    results["res"] = module.res(noise("vol", 1, 4, 6, 7, 8))

    points, counts = clouds_of(manifest, like)
    scene = OccRWKV(low=(0, -6.4, -2), high=(12.8, 6.4, 4.4), cells=(64, 64, 32))
    levels = scene.levels(points, counts)
    low = points.new_tensor(scene.low)
    size = (points.new_tensor(scene.high) - low) / points.new_tensor(scene.cells)
    x = SparseTensor(module.pre(points, levels[:2], low, size), levels[1].sites)
    results |= {"voxel_features": x.features, "voxel_coords": x.sites.coords[:, [0, 3, 2, 1]]}
    results["point_to_voxel"] = levels[1].index
    x = module.sfe(x)
    results["sfe"] = x.features
    y = module.sgfe(x)[levels[1].index]
    results["sgfe"] = scatter(y, levels[2].index, len(levels[2].sites), "max")
    results["sgfe_coords"] = levels[2].sites.coords
    return results
