"""How to call models whose outputs are not plain logits or maps: module, inputs -> {name in the manifest: tensor}."""

import torch


def vim_segmentation(module, inputs):
    maps = module.forward_maps(inputs["input"])
    results = {f"feat{i}": y for i, y in enumerate(module.neck(maps))}
    return results | {f"raw{i}": x for i, x in enumerate(maps)}


def vim_detection(module, inputs):
    maps = module.forward_maps(inputs["input"])
    return {f"p{i + 2}": y for i, y in enumerate(module.neck(maps))} | {"last_feat": maps[-1]}


def maps_as_out(module, inputs):
    return {f"out{i}": y for i, y in enumerate(module(inputs["input"]))}


def videomamba_with_layer_norm(**kwargs):
    from torch import nn

    from linescan.backbones.videomamba import VideoMamba

    return VideoMamba(norm_layer=nn.LayerNorm, **kwargs)


def videomamba_tables(module, inputs):
    pooled = module.forward_head(module.forward_features(inputs["input"]), pre_logits=True)
    positions = torch.cat([module.cls_pos_embed, module.pos_embed.flatten(1, 2)], 1)
    results = {"pooled": pooled, "logits": module.head(pooled), "pos_embed": positions}
    results["patch_weight"] = module.patch_embed.weight
    if module.num_frames:
        results["temporal_pos_embedding"] = module.temporal_pos_embed
    return results


def videomamba_distilled(module, inputs):
    logits, feats = module.forward_distill(inputs["input"])
    pooled = module.forward_head(module.forward_features(inputs["input"]), pre_logits=True)
    return {"logits": logits, "pooled": pooled, "feats": feats}


def videomamba_mask(manifest):
    """The manifests' masks: in every frame the fifth of the patches with the smallest noise is visible."""
    import numpy as np

    from tests.parity import recipe

    _, frames, *size = manifest["inputs"]["x"]["shape"][1:]
    patches = (manifest["inputs"]["mask"]["shape"][1] - 1) // frames
    order = recipe.noise("mask", (frames, patches)).argsort(1)
    mask = np.ones((frames, patches), bool)
    np.put_along_axis(mask, order[:, : patches - int(0.8 * patches)], False, 1)
    return torch.from_numpy(np.concatenate([[False], mask.reshape(-1)]))[None]


def videomamba_pretrain(module, inputs, manifest):
    decoded, streams = module.forward_decoded(inputs["x"], videomamba_mask(manifest))
    return {"clip": decoded, "clip_vis": streams}


def videomamba_text(module, inputs, manifest):
    if "x" not in inputs:
        vis, pool = module.forward_pooled(inputs["input"])
        _, per_frame = module.forward_pooled(inputs["input"], keep_temporal=True)
        return {"vis": vis, "pool": pool, "pool_temporal": per_frame}
    mask = videomamba_mask(manifest)
    vis, pool = module.forward_pooled(inputs["x"], mask)
    return {"vis": vis, "pool": pool, "clip": module.forward_decoded(inputs["x"], mask)[0]}


def vision_rwkv(module, inputs):
    tokens, blocks = module.forward_intermediates(inputs["input"])
    pooled = module.forward_head(tokens, pre_logits=True)
    return {"block0": blocks[0], "feature": tokens, "pooled": pooled, "logits": module(inputs["input"])}


def pyramid_as_f(module, inputs):
    return {f"f{i + 1}": y for i, y in enumerate(module(inputs["input"]))}


def segman(module, inputs):
    x = inputs["input"]
    maps = module.forward_features(x)
    results = {f"stage{i + 1}": y for i, y in enumerate(maps)}
    return results | {"logits_8": module.decode_head(maps), "logits": module(x)}


def sigma(module, inputs):
    """The encoder's maps of each image alone, the fused ones, and the logits."""
    rgb, extra = (module.encoder(x) for x in (inputs["rgb"], inputs["modal_x"]))
    named = {"encoder_rgb": rgb, "encoder_x": extra, "fused": module.fuse(rgb, extra)}
    results = {f"{name}{i}": y for name, maps in named.items() for i, y in enumerate(maps)}
    return results | {"logits": module(inputs["rgb"], inputs["modal_x"])}


def sigma_cross(module, inputs):
    return dict(zip(("rgb", "modal_x"), module(inputs["rgb"], inputs["modal_x"])))


def sigma_concat(module, inputs):
    return {"fused": module(inputs["rgb"], inputs["modal_x"])}


def frequency_fusion(module, inputs):
    return {"output": module(inputs["pre"], inputs["post"])}


def mambafcs(module, inputs):
    """The encoder's maps of the first image, both decoders' features, and all logits."""
    pre, post = (inputs[name] for name in ("pre", "post"))
    dates = module.encode(pre, post)
    changes = module.decode_changes(*dates)
    results = {f"encoder_pre{i}": y for i, y in enumerate(dates[0])}
    results |= {f"change_feature{i + 1}": y for i, y in enumerate(changes)}
    results |= {f"decoder_T{i + 1}": module.decode_semantics(i, maps, changes) for i, maps in enumerate(dates)}
    return results | dict(zip(("change_logits", "semantic_T1", "semantic_T2"), module(pre, post)))


def change_losses_and_scores(manifest, labels, dtype):
    """Of the noisy logits that the manifest describes; their sum is that of the published training."""
    from torch.nn.functional import one_hot

    from linescan.engine import change_losses, change_scores
    from linescan.tasks.segment import cross_entropy
    from tests.parity import recipe

    def logits(name, target, classes):
        shape = target.shape[0], classes, *target.shape[1:]
        noise = 2 * torch.from_numpy(recipe.noise(name, shape, manifest["salt"]))
        return (noise + 1.5 * one_hot(target, classes).permute(0, 3, 1, 2)).to(dtype)

    labels, classes = {name: value.long() for name, value in labels.items()}, manifest["shape"][1]
    change = logits("pred_cd", labels["label_cd"], 2)
    dates = [logits(f"pred_t{i}", labels[f"label_t{i}"], classes) for i in (1, 2)]
    known = [torch.where(labels[name] > 0, labels[name], 255) for name in ("label_t1", "label_t2")]
    changed = labels["label_cd"] > 0
    results = {"ce_change": cross_entropy(change, labels["label_cd"])}
    results["lovasz_change"] = change_losses.lovasz_softmax(change, labels["label_cd"])
    for i in (0, 1):
        results[f"ce_t{i + 1}"] = cross_entropy(dates[i], known[i])
        results[f"lovasz_t{i + 1}"] = change_losses.lovasz_softmax(dates[i], known[i])
    results["similarity"] = change_losses.similarity_loss(*dates, known[0] == 255)
    for name, eps in (("sek_loss_first_call", 1e-7), ("sek_loss_later_calls", 1e-6)):
        results[name] = change_losses.sek_loss(*dates, known, changed, eps=eps)
    weights = {"sek_loss_first_call": 0.5, "ce_change": 1, "similarity": 0.05}
    weights |= dict.fromkeys(("ce_t1", "ce_t2", "lovasz_t1", "lovasz_t2", "lovasz_change"), 0.5)
    results["total_with_first_call"] = sum(weight * results[name] for name, weight in weights.items())
    found = [change.argmax(1) * x.argmax(1) for x in dates]
    table = sum(change_scores.confusion(x, labels[f"label_t{i}"], 37) for i, x in enumerate(found, 1))
    scores = change_scores.semantic_scores(table)
    names = {"OA": "oa", "Fscd": "f_scd", "mIoU": "miou", "SeK": "sek"}
    results |= {f"metric_{name}": scores[ours] for name, ours in names.items()}
    table[0, 0] = 0
    results["metric_kappa_n0"] = change_scores.kappa_of(table.double())
    return {name: float(value) for name, value in results.items()}


def restoration(module, inputs):
    """The restored image, and what can be seen on the way to it."""
    results, hooks = {}, []

    def keep(name, part):
        if part is not None:
            hooks.append(part.register_forward_hook(lambda m, x, y: results.update({name: y.flatten(1, 2)})))

    groups = getattr(module, "groups", [None])
    keep("group0_tokens", groups[0])
    keep("tokens_after_norm", getattr(module, "norm", None))
    scans = [m for m in module.modules() if hasattr(m, "class_embed")]
    if scans:
        plain = scans[0].scores
        scans[0].scores = lambda x: results.setdefault("scores", plain(x))
    results["output"] = module(inputs["input"])
    if scans:
        results["route_first"] = results.pop("scores").argmax(-1)
        del scans[0].scores
    for hook in hooks:
        hook.remove()
    return results


NEAR = 1e-4  # scores of two classes that rounding in float32 can exchange


def restoration_by_classes(module, inputs):
    """`restoration` of MambaIRv2: where two classes are as good as equal, the one that they have in float64.

    One pixel of another class moves all that are scanned after it: errors of 1e-7 in a score can be 0.1 in the image.
    """
    parts = [part for part in module.modules() if hasattr(part, "routing")]
    dtype, found = inputs["input"].dtype, {}
    if dtype == torch.float64:
        return restoration(module, inputs)

    def keep(number, scores):
        found[number] = scores
        return torch.zeros_like(scores)

    def decide(number, scores):
        top = found[number].topk(2).values
        best = torch.zeros_like(scores).scatter_(-1, found[number].argmax(-1, keepdim=True), 1.0)
        return best * (top[..., :1] - top[..., 1:] < NEAR)

    for part in parts:
        part.routing = keep
    with torch.no_grad():
        module.double()(inputs["input"].double())
    for part in parts:
        part.routing = decide
    return restoration(module.to(dtype), inputs)


def restoration_with_noise(module, inputs):
    from tests.parity import recipe

    def noise(number, scores):
        return 1.2825 * torch.from_numpy(recipe.noise("gumbel", scores.shape, number)).to(scores)

    for part in module.modules():
        if hasattr(part, "routing"):
            part.routing = noise
    return restoration(module, inputs)


def tiled_restoration(module, inputs):
    """In overlapping parts, as the published tests restore large images."""
    from linescan.tasks.restore import whole

    return {"tiled": whole(module, inputs["input"], module.upscale)}


def as_output(module, inputs):
    return {"output": module(inputs["input"])}


def hybrid_stage(curve, directions, **kwargs):
    from linescan.heads.anomaly.mambaad import HybridStage, routes_of

    return HybridStage(routes=routes_of(curve, directions), **kwargs)


def mambaad_decoder(module, inputs):
    return {f"student{i}": y for i, y in enumerate(module(inputs["input"]))}


def mambaad(module, inputs):
    x = inputs["input"]
    targets, rebuilt = module(x)
    results = {f"teacher{i}": y for i, y in enumerate(targets)} | {f"student{i}": y for i, y in enumerate(rebuilt)}
    maps = module.anomaly_maps(x)
    results |= {"bottleneck": module.bottleneck(targets), "anomaly_map_sigma4": maps}
    return results | {"image_score_max": maps.flatten(1).amax(1)}


def rsmamba(module, inputs, manifest):
    """With the manifests' shuffles, block by block."""
    from tests.parity import recipe

    x, _, context = module.embed(inputs["input"])
    steps = torch.arange(x.shape[1], dtype=torch.int32)
    for i, block in enumerate(module.blocks):
        noise = recipe.noise(manifest["perm"]["key"].format(layer=i), (len(steps),), manifest["perm"]["salt"])
        shuffle = torch.from_numpy(noise.argsort(kind="stable")).int()
        x = block(x, *context, route=torch.stack([steps, steps.flip(0), shuffle]))
    pooled = module.forward_head(module.finish(x), pre_logits=True)
    return {"pooled": pooled, "logits": module.head(pooled)}


def rsmamba_drawn(module, inputs):
    torch.manual_seed(0)
    logits = module(inputs["input"])
    torch.manual_seed(0)
    return {"logits": logits, "pooled": module.forward_head(module.forward_features(inputs["input"]), pre_logits=True)}


def maps_as_stages(module, inputs):
    return {f"stage{i + 1}": y for i, y in enumerate(module(inputs["input"]))}


def mambavision(module, inputs):
    x = inputs["input"]
    pooled = module.forward_head(module.forward_features(x), pre_logits=True)
    results = {"stem": module.patch_embed(x).movedim(-1, 1), "pooled": pooled, "logits": module(x)}
    maps = module.forward_intermediates(x, intermediates_only=True)
    return results | {f"stage{i + 1}": y for i, y in enumerate(maps)}


def care(module, inputs):
    x = inputs["input"]
    maps = module.forward_intermediates(x, intermediates_only=True)
    pooled = module.forward_head(module.forward_features(x), pre_logits=True)
    results = {f"stage{i + 1}": y for i, y in enumerate(maps)} | {"pooled": pooled, "logits": module(x)}
    module.set_distilled_training()
    results["head_logits"], results["dist_logits"] = module.train().forward_head(maps[-1].movedim(1, -1))
    return results


def mean_of_tokens(module, inputs):
    """Where the original's pooled features are those before the norm of the head."""
    x = module.forward_features(inputs["input"])
    return {"pooled": module.pool(x), "logits": module(inputs["input"])}


def vmunet(module, inputs):
    x = inputs["input"]
    stages, bottleneck, decoded = module.forward_features(x)
    results = {f"stage{i + 1}_in": y for i, y in enumerate(stages)} | {"bottleneck": bottleneck, "decoder": decoded}
    logits = module(x)
    return results | {"logits": logits, "prob": logits.sigmoid()}


def _official(module, heads):
    from linescan.heads.vmunet import from_official

    module.checkpoint_filter = lambda state: from_official(state, module, heads)
    return module


def multi_head_scan(dim, d_state, threshold):
    from functools import partial

    from linescan.layers.ss2d import MultiHeadScan
    from linescan.scans.multi_route import RouteAttention

    merge = partial(RouteAttention, threshold=threshold)
    return _official(MultiHeadScan(dim, d_state=d_state, merge=merge), "CXSZ")


def multi_head_outputs(module, inputs):
    x, results = inputs["input"].permute(0, 2, 3, 1), {}
    grid = tuple(x.shape[1:3])
    for letter, head, one in zip("CXSZ", module.heads, module.in_proj(x.flatten(1, 2)).chunk(4, -1)):
        results[f"head_{letter}"] = head(one, grid).mT
    return results | {"y": module(x)}


def ungated(heads, **kwargs):
    from linescan.heads.vmunet import multi_head_ss2d

    return _official(multi_head_ss2d(heads=heads, gated=False, **kwargs), heads)


def as_y(module, inputs):
    return {"y": module(inputs["input"])}


def mhsvm_routes(module, inputs, manifest):
    from linescan.scans.routes import table

    spec = "snake, T:snake, zigzag, fliplr:zigzag, spiral, flipud:spiral, row, col"
    return {one["name"]: table(spec, one["name"].removeprefix("routes_")) for one in manifest["outputs"]}


def rwkvsam(module, inputs):
    """The maps of all stages and the middle of RWKV's blocks, as the kernel computes; the last one by the equation."""
    from linescan.layers.rwkv import KernelMix, SpatialMix

    results, blocks = {}, module.stages[2].blocks
    grid = module.grid_of(*inputs["input"].shape[-2:])
    hook = blocks[len(blocks) // 2].register_forward_hook(
        lambda block, args, y: results.update(middle=y.mT.unflatten(-1, grid))
    )
    maps = module.forward_intermediates(inputs["input"], intermediates_only=True)
    hook.remove()
    results |= {"stride4": maps[0], "stride8": maps[1], "final_norm": maps[2], "final": maps[-1]}
    for block in blocks:
        assert type(block.mixer) is KernelMix
        block.mixer.__class__ = SpatialMix
    results["final_paper_equation"] = module.forward_intermediates(inputs["input"], intermediates_only=True)[-1]
    return results


def rwkvsam_prompted(module, inputs, manifest):
    x, encoder = inputs["input"], module.prompt_encoder
    features = module.encode(x)
    results = {"backbone_final": module.backbone.forward_features(x), "image_embedding": features.embedding}
    results["dense_pe"] = encoder.grid(*features.embedding.shape[-2:])
    for name in ("box", "point"):
        plural = f"{name}es" if name == "box" else f"{name}s"
        prompts = {plural: torch.tensor(manifest["inputs"][plural]["value"])}
        results[f"{name}_sparse"] = encoder(x.shape[-2:], **prompts)
        results[f"{name}_masks"], results[f"{name}_iou"] = module.decode(features, **prompts)
    return results


def yolo_text_scan(**kwargs):
    from linescan.checkpoint import fit_shapes
    from linescan.heads.detection.mamba_yolo_world import official_names
    from linescan.layers.mamba import Mamba2Mixer

    mixer = Mamba2Mixer(**kwargs)
    mixer.checkpoint_filter = lambda state: fit_shapes(official_names(state), mixer)
    return mixer


def yolo_text_states(module, inputs):
    y, (_, state) = module(inputs["input"], return_final_state=True)
    return {"output": y, "final_states": state[:, 0].mT}


def yolo_guided_scan(dim, d_state, head_dim):
    from linescan.checkpoint import fit_shapes, strip_prefix
    from linescan.heads.detection.mamba_yolo_world import GuidedBlock, official_names

    mixer = GuidedBlock(dim, d_state, head_dim).mixer

    def own(state):
        state = official_names({f"neck.fusion.ss2d.0.{key}": value for key, value in state.items()})
        return fit_shapes(strip_prefix(state, "neck.fusion.mixer."), mixer)

    mixer.checkpoint_filter = own
    return mixer


def yolo_guided_states(module, inputs):
    from linescan.heads.detection.mamba_yolo_world import as_guide

    guide = torch.nn.functional.gelu(inputs["guide"])
    y, state = module(inputs["image"], None, guide, return_final_state=True)
    return {"output": y, "final_state": as_guide(state)}


def yolo_world(module, inputs):
    maps = module.backbone(inputs["image"])
    fused, text = module.forward_features(inputs["image"], inputs["text"])
    levels = module(inputs["image"], inputs["text"])
    named = {"backbone": maps, "neck": fused, "cls": levels.logits, "box": levels.distances}
    return {f"{name}{i}": x for name, each in named.items() for i, x in enumerate(each)} | {"text_out": text}
