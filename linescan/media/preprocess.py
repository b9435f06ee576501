"""How a model wants its images."""

from dataclasses import asdict, dataclass

from timm.data import create_transform

from ..errors import InputError

__all__ = ["Preprocess"]


@dataclass(frozen=True)
class Preprocess:
    """How a model wants its pictures.

    Attributes:
        size: (channels, height, width).
        mean, std: of each channel, of values in 0..1.
        interpolation: of the resize.
        crop_pct: the share of the shorter side that the centre crop keeps.
    """

    size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    crop_pct: float = 1.0

    @classmethod
    def from_dict(cls, values: dict) -> "Preprocess":
        """The inverse of `asdict`, from JSON too."""
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})

    def as_dict(self) -> dict:
        """Plain values."""
        return asdict(self)

    @property
    def channels(self) -> int:
        """The number of input channels."""
        return self.size[0]

    def transform(self, augment: str | None = None, erasing: float = 0.0):
        """PIL image -> normalised tensor (C, H, W).

        Args:
            augment: None, to resize and crop as in evaluation; "light", for small shifts and scales only; "standard",
                random crops, mirroring and colour jitter; or a policy of timm ("rand-m9-mstd0.5-inc1") on top of that.
            erasing: how often a rectangle is erased.

        Raises:
            InputError: an unknown augmentation.
        """
        common = dict(
            input_size=self.size, mean=self.mean, std=self.std, interpolation=self.interpolation, crop_pct=self.crop_pct
        )
        if augment is None:
            return create_transform(**common)
        strength = {
            "none": dict(no_aug=True),
            "light": dict(scale=(0.7, 1.0), ratio=(0.85, 1.18), hflip=0.0, color_jitter=0.0),
            "standard": dict(),
        }
        if augment not in strength and self.channels != 3:
            raise InputError(f"--augment {augment} is for RGB pictures; here: {', '.join(strength)}")
        try:
            options = strength.get(augment, dict(auto_augment=augment))
            return create_transform(**common, is_training=True, re_prob=erasing, re_mode="pixel", **options)
        except (AssertionError, ValueError, KeyError):
            raise InputError(
                f"unknown augmentation {augment!r}; there are: {', '.join(strength)}, and timm's policies "
                "(rand-m9-mstd0.5-inc1, augmix-m5-w4-d2, original, ...)"
            ) from None
