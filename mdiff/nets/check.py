"""Does a network fit its images, and do its fields fit together?"""

from __future__ import annotations

from mdiff import config
from mdiff.data.captions import FEWEST
from mdiff.errors import UserError


def check(cfg: config.Net, size: int) -> None:
    """Can `cfg` process images of `size` x `size`?

    Raises:
      UserError: a field is out of range, does not fit another one, or does not apply to `cfg.arch`.
    """
    _check_ranges(cfg)
    if cfg.text:
        _check_text(cfg, size)
    if cfg.arch == "dit":
        _check_dit(cfg, size)
    else:
        _check_unet(cfg, size)


def _check_ranges(cfg: config.Net) -> None:
    if cfg.channels < 4 or cfg.channels % 4:
        raise UserError(f"net.channels = {cfg.channels}: must be a positive multiple of 4")
    if not cfg.mults or min(cfg.mults) < 1:
        raise UserError(f"net.mults = {cfg.mults}: give one level or more, each 1 or more, such as 1 2 2")
    for name in ("blocks", "patch"):
        if getattr(cfg, name) < 1:
            raise UserError(f"net.{name} = {getattr(cfg, name)}: must be 1 or more")
    for name in ("head_channels", "classes", "vector"):
        if getattr(cfg, name) < 0:
            raise UserError(f"net.{name} = {getattr(cfg, name)}: must be 0 (none) or more")
    for name in ("dropout", "condition_dropout"):
        if not 0 <= getattr(cfg, name) < 1:
            raise UserError(f"net.{name} = {getattr(cfg, name)}: must be in [0, 1)")
    if cfg.text < 0:
        raise UserError(f"net.text = {cfg.text}: must be 0 (none) or more")
    if cfg.condition_dropout and not (cfg.classes or cfg.vector or cfg.text):
        raise UserError(
            f"net.condition_dropout = {cfg.condition_dropout}: there is no condition to drop; "
            "set net.classes, net.vector or net.text, or leave it at 0"
        )
    if not 0 < cfg.sigma_data < float("inf"):
        raise UserError(
            f"net.sigma_data = {cfg.sigma_data}: must be above 0 (images in [-1, 1] have about 0.5)"
        )
    if cfg.prediction != "edm" and cfg.sigma_data != config.Net().sigma_data:
        raise UserError(
            f"net.sigma_data = {cfg.sigma_data}: applies to net.prediction edm only; "
            f"leave it at {config.Net().sigma_data} (prediction is {cfg.prediction})"
        )


def _check_text(cfg: config.Net, size: int) -> None:
    if cfg.arch == "dit":
        raise UserError(
            f"net.text = {cfg.text}: a DiT reads no text; set net.arch to ddpmpp, or net.text to 0"
        )
    for name in ("classes", "vector"):
        if getattr(cfg, name):
            raise UserError(
                f"net.{name} = {getattr(cfg, name)}: text is the only condition of a text model; set it to 0"
            )
    if cfg.text < 8 or cfg.text % 4:
        raise UserError(
            f"net.text = {cfg.text}: must be a multiple of 4, 8 or more; 0 trains without captions"
        )
    if cfg.text_blocks < 1:
        raise UserError(f"net.text_blocks = {cfg.text_blocks}: must be 1 or more")
    if cfg.text_length < 3:
        raise UserError(f"net.text_length = {cfg.text_length}: must be 3 or more (start, a word, end)")
    if cfg.vocabulary < FEWEST:
        raise UserError(
            f"net.vocabulary = {cfg.vocabulary}: must be {FEWEST} or more (the bytes and special tokens)"
        )
    resolutions = {size // cfg.patch >> level for level in range(len(cfg.mults))}
    if not resolutions & set(cfg.cross):
        there = " ".join(map(str, sorted(resolutions, reverse=True)))
        raise UserError(f"net.cross = {cfg.cross}: no block has such a resolution; choose from {there}")
    if cfg.cross_channels < 0:
        raise UserError(
            f"net.cross_channels = {cfg.cross_channels}: must be 1 or more, or 0 for the feature map's channels"
        )


def _check_heads(cfg: config.Net, width: int) -> None:
    if cfg.head_channels and width % cfg.head_channels:
        fits = [d for d in range(1, width + 1) if width % d == 0]
        near = min(fits, key=lambda d: abs(d - cfg.head_channels))
        raise UserError(
            f"net.head_channels = {cfg.head_channels}: does not divide the {width} channels of an attention layer; "
            f"set it to {near}, or to 0 for a single head"
        )


def _check_size(size: int, factor: int, who: str) -> None:
    if size % factor:
        fits = max(factor, round(size / factor) * factor)
        raise UserError(f"data.size = {size}: {who} a multiple of {factor}; set data.size to {fits}")


def _check_unet(cfg: config.Net, size: int) -> None:
    levels = len(cfg.mults)
    _check_size(
        size,
        cfg.patch * 2 ** (levels - 1),
        f"{levels} levels (net.mults) with patch {cfg.patch} need",
    )
    for level, mult in enumerate(cfg.mults):
        at = (size // cfg.patch) >> level
        if level == levels - 1 or at in cfg.attention:
            _check_heads(cfg, cfg.channels * mult)
        if cfg.text and at in cfg.cross:
            _check_heads(cfg, cfg.cross_channels or cfg.channels * mult)


def _check_dit(cfg: config.Net, size: int) -> None:
    for name in ("mults", "attention", "scan_safe"):
        default = getattr(config.Net(), name)
        if getattr(cfg, name) != default:
            raise UserError(
                f"net.{name} = {getattr(cfg, name)}: does not apply to a DiT, which has no levels and no "
                f"convolutions; set it back to its default, {default}"
            )
    _check_size(size, cfg.patch, f"patch {cfg.patch} needs")
    _check_heads(cfg, cfg.channels)
