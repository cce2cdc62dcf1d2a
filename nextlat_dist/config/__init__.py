"""Run configuration: one dataclass per section, YAML plus dotted overrides, one validation pass. No torch import."""

from nextlat_dist.config.load import config_from_dict, config_to_dict, dump_config, load_config
from nextlat_dist.config.rules import validate
from nextlat_dist.config.schema import RunConfig

__all__ = ["RunConfig", "config_from_dict", "config_to_dict", "dump_config", "load_config", "validate"]
