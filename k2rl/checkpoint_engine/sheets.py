"""Device sheets: the clusters that `k2rl plan` knows, and files with measured ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from k2rl.choices import config_folder
from k2rl.config import DeviceConfig
from k2rl.config_check import DEVICE_BOUNDS
from k2rl.errors import ConfigError


def cluster_names() -> list[str]:
    """Those of `conf/cluster/` that have a device sheet."""
    files = sorted((config_folder() / "cluster").glob("*.yaml"))
    return [path.stem for path in files if "\ndevice:" in path.read_text(encoding="utf-8")]


def load_sheet(cluster: str, changes: Mapping[str, str]) -> DeviceConfig:
    """The sheet of a cluster, by name or by the path of its file, with some values replaced.

    Raises:
        ConfigError: no such cluster or value.
    """
    names = cluster_names()
    path = config_folder() / "cluster" / f"{cluster}.yaml" if cluster in names else Path(cluster)
    if cluster not in names and (path.suffix != ".yaml" or not path.is_file()):
        raise ConfigError(f"cluster={cluster} is not one of: {', '.join(names)}; nor a sheet's .yaml file")
    try:
        loaded = OmegaConf.to_container(OmegaConf.load(path))
        values = loaded.get("device", {}) if isinstance(loaded, dict) else {}
        sheet = OmegaConf.merge(OmegaConf.structured(DeviceConfig), values, dict(changes))
        device = OmegaConf.to_object(sheet)
    except OmegaConfBaseException as error:
        known = ", ".join(asdict(DeviceConfig()))
        raise ConfigError(f"{path.name}: device: {str(error).splitlines()[0]}; it has: {known}") from error
    assert isinstance(device, DeviceConfig)
    for name, bound in DEVICE_BOUNDS.items():
        if not bound.holds(getattr(device, name)):
            raise ConfigError(f"device.{name}={getattr(device, name)} must be {bound}")
    return device


def write_sheet(device: DeviceConfig, path: Path, note: str) -> None:
    """A file that `cluster=PATH` takes, with a comment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rounded = {
        key: round(value, 4) if value < 100 else round(value, 1) for key, value in asdict(device).items()
    }
    text = OmegaConf.to_yaml(OmegaConf.create({"address": "local", "device": rounded}))
    path.write_text(f"# {note}\n{text}", encoding="utf-8")
