"""YAML files -> a configuration: each over the ones before it, all over the defaults."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from config import PipelineConfig, UserError

AS_WRITTEN = ("forget_class", "gcn.train_classes")  # names of classes, whatever YAML takes them for


def _text(node: Any) -> Any:
    """A YAML node's scalars as they are written: 007, no and 1_0 stay what a person typed. None where it is null."""
    from yaml import ScalarNode, SequenceNode

    if isinstance(node, ScalarNode):
        return None if node.tag.endswith(":null") else node.value
    return [_text(item) for item in node.value] if isinstance(node, SequenceNode) else None


def _below(node: Any, name: str) -> Any:
    """The node of a (dotted) field below a mapping node, if it is there."""
    pairs = node.value if isinstance(getattr(node, "value", None), list) else []
    for key, value in (pair for pair in pairs if isinstance(pair, tuple)):
        if key.value == name:
            return value
        if name.startswith(f"{key.value}.") and (found := _below(value, name.removeprefix(f"{key.value}."))):
            return found
    return None


def names_as_written(path: Path, within: str = "") -> Mapping[str, Any]:
    """Fields of a YAML file that hold names of classes -> their text (texts, lists of texts); null ones are left out.

    YAML takes 007 for the number 7 and `no` for a truth value, which would be another class, or none.

    Args:
        within: dotted name of the mapping that holds the fields, as in "sweep.over"; by default the whole file.
    """
    from yaml import SafeLoader, compose

    whole = compose(path.expanduser().read_text(encoding="utf-8"), Loader=SafeLoader)
    nodes = {name: _below(whole, f"{within}.{name}" if within else name) for name in AS_WRITTEN}
    texts = {name: _text(node) for name, node in nodes.items()}
    return {name: text for name, text in texts.items() if text is not None}


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
            for name, text in names_as_written(path).items() if isinstance(values, DictConfig) else ():
                OmegaConf.update(values, name, [text] if isinstance(text, str) else text)
            if isinstance(values, DictConfig) and isinstance(values.get("mask_layer"), int | str):
                values["mask_layer"] = [values["mask_layer"]]  # one layer may be written without brackets
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
