"""Which files are images, videos, point clouds and volumes: by their suffix, and what is read at all."""

from pathlib import Path

from PIL import Image

__all__ = ["CONTAINERS", "image_formats", "is_cloud", "is_hidden", "is_image", "is_video", "is_volume"]

# Formats that Pillow hands to another program (EPS to Ghostscript), to the system (WMF) or to nothing (the stubs),
# and those that are documents with images in them.
_REFUSED = {"BUFR", "EPS", "FPX", "GRIB", "HDF5", "IPTC", "MIC", "MPEG", "PDF", "WMF"}

_VIDEOS = frozenset(
    ".mp4 .m4v .mov .avi .mkv .webm .mpg .mpeg .ts .m2ts .mts .wmv .asf .flv .ogv .3gp .mxf .vob .y4m".split()
)

_CLOUDS = frozenset(".ply .pcd .las .laz .npy .npz .txt .xyz .pts .asc .csv .bin .off .obj .stl".split())

# FFmpeg's names of the containers that are opened. Playlists (HLS, DASH, concat) are not among them: they would make it
# open other files.
CONTAINERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegvideo,mpegts,mpegtsraw,asf,flv,live_flv,ogg,mxf,yuv4mpegpipe,"
    "h264,hevc,vvc,av1,obu,ivf,m4v,mjpeg,h263,dv,nut,gif,apng,rm,vc1,wtv,swf,dirac,cavsvideo"
)


def image_formats() -> list[str]:
    """Pillow's names of the formats that are read, those of plugins too, in the order in which they are tried."""
    Image.init()
    return [name for name in Image.ID if name in Image.OPEN and name not in _REFUSED]


def is_image(path: str | Path) -> bool:
    """Whether a file is an image by its suffix."""
    name = Image.registered_extensions().get(Path(path).suffix.lower())
    return name in Image.OPEN and name not in _REFUSED


def is_video(path: str | Path) -> bool:
    """Whether a file is a video by its suffix."""
    return Path(path).suffix.lower() in _VIDEOS


def is_cloud(path: str | Path) -> bool:
    """Whether a file is a point cloud or a mesh by its suffix."""
    return Path(path).suffix.lower() in _CLOUDS


def is_volume(path: str | Path) -> bool:
    """Whether a file is a volume by its suffix: .nii, .nii.gz or .npy."""
    return str(path).lower().endswith((".nii", ".nii.gz", ".npy"))


def is_hidden(path: str | Path) -> bool:
    """Whether a file or folder is hidden by its name; `._x.jpg` are notes of macOS about `x.jpg`."""
    return Path(path).name.startswith(".")
