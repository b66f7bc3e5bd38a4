"""Configurations as diffusers keeps them: a flat JSON file of the constructor's arguments, `_class_name` beside them."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any, TypeVar

CONFIG_NAME = "scheduler_config.json"
T = TypeVar("T", bound="Configured")


class Config(dict):
    """A dict that is not changed after it is made, whose entries are attributes too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def _fixed(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError("a scheduler's config does not change: make another by from_config(config, name=value)")

    __setitem__ = __delitem__ = __setattr__ = __delattr__ = update = pop = popitem = clear = setdefault = _fixed  # type: ignore[assignment]

    def __reduce__(self) -> Any:
        return Config, (dict(self),)


def taken_by(cls: type) -> set[str]:
    """The names of a constructor's arguments: those of its class where it is declared with any (**kwargs)."""
    own = list(inspect.signature(cls.__init__).parameters.values())[1:]  # type: ignore[misc]
    named = {p.name for p in own if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    return named if len(named) == len(own) else named | set(inspect.signature(cls).parameters)


class Configured:
    """from_config, from_pretrained and save_pretrained. Entries that the class does not take are kept for a round trip."""

    config: Config

    @classmethod
    def from_config(cls: type[T], config: dict[str, Any], *, noise: str = "torch", **changed: Any) -> T:
        """
        A scheduler from a config: this class's, another's or diffusers'.

        Args:
            config: of arguments by name. What this class does not take is kept, and is there for the next class.
            noise: "torch" draws what diffusers would draw; "philox" draws in registers, from a key that a run draws once.
            changed: arguments in place of the config's.
        """
        if not isinstance(config, dict):
            raise TypeError(f"config must be a dict of arguments, got {type(config).__name__}")
        given = {**config, **changed}
        taken = taken_by(cls)
        scheduler = cls(**{name: value for name, value in given.items() if name in taken})
        own = {name: value for name, value in given.items() if name not in taken and not name.startswith("_")}
        scheduler.config = Config({**scheduler.config, **own})
        scheduler.use_noise(noise)  # type: ignore[attr-defined]
        return scheduler

    @classmethod
    def from_pretrained(
        cls: type[T], folder: str | Path, subfolder: str | None = None, *, noise: str = "torch", **changed: Any
    ) -> T:
        """A scheduler from `scheduler_config.json` in a local folder, as diffusers writes it. Nothing is downloaded."""
        path = Path(folder) / (subfolder or "") / CONFIG_NAME
        if not path.is_file():
            raise FileNotFoundError(f"folder must hold {CONFIG_NAME}, got {path.parent}")
        return cls.from_config(json.loads(path.read_text()), noise=noise, **changed)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes `scheduler_config.json`, which diffusers reads."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        content = {"_class_name": type(self).__name__, **{n: v for n, v in self.config.items() if n != "_class_name"}}
        text = json.dumps(dict(sorted(content.items())), indent=2, default=lambda v: v.tolist() if hasattr(v, "tolist") else str(v))
        (Path(folder) / CONFIG_NAME).write_text(text + "\n")

    save_config = save_pretrained

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{n}={v!r}' for n, v in self.config.items())})"
