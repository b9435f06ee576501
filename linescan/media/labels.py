"""Names of the classes of public data sets, in the order that published classifiers have them."""

from pathlib import Path

__all__ = ["class_names"]

BREAKFAST = ("cereals", "coffee", "tea", "pancake", "fried egg", "scrambled egg", "sandwich", "juice", "milk", "salad")

MODELNET40 = (
    "airplane", "bathtub", "bed", "bench", "bookshelf", "bottle", "bowl", "car", "chair", "cone", "cup", "curtain",
    "desk", "door", "dresser", "flower_pot", "glass_box", "guitar", "keyboard", "lamp", "laptop", "mantel", "monitor",
    "night_stand", "person", "piano", "plant", "radio", "range_hood", "sink", "sofa", "stairs", "stool", "table",
    "tent", "toilet", "tv_stand", "vase", "wardrobe", "xbox",
)  # fmt: skip
SCANOBJECTNN = (
    "bag", "bin", "box", "cabinet", "chair", "desk", "display", "door", "shelf", "table", "bed", "pillow", "sink",
    "sofa", "toilet",
)  # fmt: skip
SHAPENET_PARTS = {  # how many parts each category has, numbered through
    "Airplane": 4, "Bag": 2, "Cap": 2, "Car": 4, "Chair": 4, "Earphone": 3, "Guitar": 3, "Knife": 2, "Lamp": 4,
    "Laptop": 2, "Motorbike": 6, "Mug": 2, "Pistol": 3, "Rocket": 3, "Skateboard": 3, "Table": 3,
}  # fmt: skip
NUSCENES = (
    "car", "truck", "construction_vehicle", "bus", "trailer", "barrier", "motorcycle", "bicycle", "pedestrian",
    "traffic_cone",
)  # fmt: skip
ARGOVERSE2 = (
    "Regular_vehicle", "Pedestrian", "Bicyclist", "Motorcyclist", "Wheeled_rider", "Bollard", "Construction_cone",
    "Sign", "Construction_barrel", "Stop_sign", "Mobile_pedestrian_crossing_sign", "Large_vehicle", "Bus", "Box_truck",
    "Truck", "Vehicular_trailer", "Truck_cab", "School_bus", "Articulated_bus", "Message_board_trailer", "Bicycle",
    "Motorcycle", "Wheeled_device", "Wheelchair", "Stroller", "Dog",
)  # fmt: skip
SEMANTIC_KITTI = (
    "car", "bicycle", "motorcycle", "truck", "other-vehicle", "person", "bicyclist", "motorcyclist", "road", "parking",
    "sidewalk", "other-ground", "building", "fence", "vegetation", "trunk", "terrain", "pole", "traffic-sign",
)  # fmt: skip
SECOND = ("unchanged", "water", "ground", "low vegetation", "tree", "building", "sports field")

MFNET = ("unlabeled", "car", "person", "bike", "curve", "car stop", "guardrail", "color cone", "bump")
PST900 = ("background", "fire extinguisher", "backpack", "hand drill", "survivor")
ROOMS = (  # SUN RGB-D's 37 classes, and the first of NYUDepth v2's 40
    "wall", "floor", "cabinet", "bed", "chair", "sofa", "table", "door", "window", "bookshelf", "picture", "counter",
    "blinds", "desk", "shelves", "curtain", "dresser", "pillow", "mirror", "floor mat", "clothes", "ceiling", "books",
    "refrigerator", "television", "paper", "towel", "shower curtain", "box", "whiteboard", "person", "night stand",
    "toilet", "sink", "lamp", "bathtub", "bag",
)  # fmt: skip
NYU_MORE = ("other structure", "other furniture", "other prop")


def class_names(data: str) -> list[str] | None:
    """The names of a data set's classes; None where the order that classifiers have them in is not known.

    Args:
        data: as `linescan.zoo.Entry.data` has it: "ImageNet-1K", "Kinetics-400", "Something-Something V2", ...
    """
    find = _KNOWN.get(data)
    return find() if find else None


def _imagenet(subset: str) -> list[str]:
    from timm.data import ImageNetInfo

    info = ImageNetInfo(subset)
    return [info.index_to_description(i) for i in range(info.num_classes())]


def _kinetics() -> list[str]:
    from torchvision.models.video import R3D_18_Weights

    return list(R3D_18_Weights.KINETICS400_V1.meta["categories"])


def _lines(file: str) -> list[str]:
    return Path(__file__).with_name(file).read_text().splitlines()


_KNOWN = {
    "ImageNet-1K": lambda: _imagenet("imagenet-1k"),
    "ImageNet-21K": lambda: _imagenet("imagenet-21k"),
    "ImageNet-21K-Google": lambda: _imagenet("imagenet-21k-goog"),
    "Kinetics-400": _kinetics,
    "Something-Something V2": lambda: _lines("something_something_v2.txt"),
    "Breakfast": lambda: list(BREAKFAST),
    "ModelNet40": lambda: list(MODELNET40),
    "ScanObjectNN": lambda: list(SCANOBJECTNN),
    "nuScenes": lambda: list(NUSCENES),
    "Waymo": lambda: ["Vehicle", "Pedestrian", "Cyclist"],
    "ONCE": lambda: ["Car", "Bus", "Truck", "Pedestrian", "Cyclist"],
    "Argoverse 2": lambda: list(ARGOVERSE2),
    "KITTI": lambda: ["Car", "Pedestrian", "Cyclist"],
    "SECOND": lambda: list(SECOND),
    "Landsat-SCD": lambda: ["unchanged", "farmland", "desert", "building", "water"],
    "SemanticKITTI": lambda: ["empty", *SEMANTIC_KITTI],
    "MFNet": lambda: list(MFNET),
    "PST900": lambda: list(PST900),
    "NYUDepth v2": lambda: [*ROOMS, *NYU_MORE],
    "SUN RGB-D": lambda: list(ROOMS),
    "ShapeNetPart": lambda: [f"{name}/{i}" for name, parts in SHAPENET_PARTS.items() for i in range(parts)],
}
