"""Published models, from the Hugging Face Hub, its cache, or a folder."""

from pathlib import Path
from typing import Any

from torch import nn

from common import UserError, one_line


def load_pretrained(model_class: Any, name: str, folder: str | Path | None = None) -> nn.Module:
    """Load a transformers or diffusers model in float32, from `folder` or else by its name on the Hub.

    Raises UserError if it is missing or lacks weights, which these libraries would draw at random.
    """
    try:
        model, found = model_class.from_pretrained(str(folder or name), output_loading_info=True)
    except ImportError:
        raise  # a package to install
    except Exception as error:  # Hub errors, damaged files and mismatched shapes have no narrower common class
        where = f"{folder} must hold {name}'s config.json and weights, and cannot be loaded"
        if not folder:
            where = f"{name} cannot be loaded from the Hugging Face cache or the Hub"
        raise UserError(
            f"{where} ({one_line(error)[:200]}): where there is internet, run `hf download {name} --local-dir FOLDER`, "
            "copy FOLDER here, and name it in the config or on the command line"
        ) from error
    if found["missing_keys"]:
        lacking = sorted(found["missing_keys"])
        raise UserError(f"{folder or name} must hold all weights, lacks {len(lacking)}, as {lacking[0]}: get it again")
    return model.float()
