"""How to call models whose outputs are not plain logits or maps: module, inputs -> {name in the manifest: tensor}."""


def vim_segmentation(module, inputs):
    maps = module.forward_maps(inputs["input"])
    results = {f"feat{i}": y for i, y in enumerate(module.neck(maps))}
    return results | {f"raw{i}": x for i, x in enumerate(maps)}


def vim_detection(module, inputs):
    maps = module.forward_maps(inputs["input"])
    return {f"p{i + 2}": y for i, y in enumerate(module.neck(maps[-1]))} | {"last_feat": maps[-1]}


def maps_as_out(module, inputs):
    return {f"out{i}": y for i, y in enumerate(module(inputs["input"]))}
