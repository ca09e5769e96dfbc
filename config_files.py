"""YAML files -> a configuration: each over the ones before it, all over the defaults."""

from collections.abc import Sequence
from pathlib import Path

from config import PipelineConfig, UserError


def load_config(paths: Sequence[Path], aside: Sequence[str] = ()) -> PipelineConfig:
    """Merge YAML files, in order, over the defaults; keys named in `aside` are someone else's.

    Raises:
        UserError: a file is missing or not YAML, or a key or value does not fit the schema.
    """
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    merged = OmegaConf.structured(PipelineConfig)
    for path in paths:
        try:
            values = OmegaConf.load(Path(path).expanduser())
            for name in aside:
                if isinstance(values, DictConfig):
                    values.pop(name, None)
            for name in ("mask_layer", "forget_class"):  # one of them may be written without brackets
                if isinstance(values, DictConfig) and isinstance(values.get(name), int | str):
                    values[name] = [values[name]]
            if isinstance(values, DictConfig) and isinstance(values.get("vision_dataset"), str):
                values["vision_dataset"] = values["vision_dataset"].upper()
            merged = OmegaConf.merge(merged, values)
        except FileNotFoundError:
            raise UserError(f"there is no config file {path}: see configs/ for the ones that ship") from None
        except (OmegaConfBaseException, YAMLError, OSError, ValueError, TypeError) as error:
            what = " ".join(str(error).split())
            raise UserError(f"{path}: {what}; correct that line (uv run main.py --help lists the fields)") from None
    try:
        config = OmegaConf.to_object(merged)
    except (OmegaConfBaseException, ValueError) as error:
        names = ", ".join(str(p) for p in paths)
        raise UserError(f"{names}: {' '.join(str(error).split())}") from None
    assert isinstance(config, PipelineConfig)
    return config
