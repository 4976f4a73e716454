"""Clips in memory are torch uint8 [T, H, W, 3], RGB. The names below load their modules on first use."""

from importlib import import_module

_HOMES = {
    "VideoInfo": "video",
    "probe_video": "video",
    "read_video": "video",
    "write_video": "video",
    "fit_frames": "video",
    "frame_hash": "video",
    "Clips": "clips",
    "ClipWindows": "clips",
    "open_clips": "clips",
    "ClipOrder": "order",
}
__all__ = list(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'fastvid.data' has no attribute '{name}'")
    return getattr(import_module(f"fastvid.data.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
