"""One frozen settings object: flags > MODELGROVE_* environment > TOML files > defaults."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from tomllib import TOMLDecodeError
from typing import Literal

from pydantic import Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, TomlConfigSettingsSource

from modelgrove_hub.errors import UsageError


def _config_home() -> Path:
    return Path(os.environ.get("XDG_CONFIG_HOME", Path.home() / ".config")) / "modelgrove"


def _toml_files() -> list[Path]:
    """Later ones win."""
    return [_config_home() / "config.toml", Path("modelgrove.toml")]


def _data_home() -> Path:
    return Path(os.environ.get("XDG_DATA_HOME", Path.home() / ".local/share")) / "modelgrove"


class Settings(BaseSettings):
    """Where things are and how jobs run. `home` holds everything unless told otherwise."""

    model_config = SettingsConfigDict(env_prefix="MODELGROVE_", frozen=True, extra="forbid")

    home: Path = Field(default_factory=_data_home, description="The hub's folder: database, blobs, queue, index.")
    database_url: str = Field("", description="SQLAlchemy URL; empty means SQLite in `home`.")
    store_url: str = Field("", description="fsspec URL of the blob store; empty means a folder in `home`.")
    broker_url: str = Field("", description="Celery broker URL; empty means a folder in `home`, no server.")
    text_encoder: Path | None = Field(
        None, description="Folder of the sentence-transformers model that reads texts; empty means the MiniLM included."
    )
    plugins: str = Field("", description="Comma-separated allow-list of plugins; empty means all.")
    convert_pickles: bool = Field(False, description="Ingestion converts plain pickles to safetensors, confined.")
    distributions: str = Field(
        "", description="Comma-separated allow-list of installed distributions that may add plugins; empty means all."
    )
    safe_mode: bool = Field(False, description="Load only modelgrove's own plugins.")
    lease_seconds: float = Field(30.0, gt=0, description="A running job is taken back when silent this long.")
    max_attempts: int = Field(3, ge=1, description="Attempts before a job is parked as failed.")
    gc_grace_seconds: float = Field(24 * 3600.0, ge=0, description="Unnamed blobs younger than this are kept.")
    warm_bytes: int = Field(4 << 30, ge=0, description="Memory for models that a worker keeps loaded for previews.")
    max_upload_bytes: int = Field(200 << 30, ge=1, description="Size of the largest file that clients may upload.")
    max_requests_per_second: float = Field(
        1000.0, ge=0, description="Requests of one address that are answered; 0 has no limit. An open hub has none."
    )
    hosts: str = Field("", description="Comma-separated names by which clients call the hub; empty means any.")
    trusted_proxies: str = Field(
        "", description="Comma-separated addresses of proxies that are believed who they speak for."
    )
    private_sources: bool = Field(False, description="Sources may be machines of the own network.")
    request_log: Literal["text", "json", "off"] = Field("text", description="How requests are written to the log.")
    hf_token: SecretStr = Field(SecretStr(""), description="Token for a Hugging Face hub.")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags, environment, ./modelgrove.toml, the user's config file, secrets."""
        toml = TomlConfigSettingsSource(settings_cls, toml_file=_toml_files())
        return init_settings, env_settings, toml, file_secret_settings

    @property
    def database(self) -> str:
        """The database URL in force."""
        return self.database_url or f"sqlite:///{self.home.absolute() / 'modelgrove.db'}"

    @property
    def store(self) -> str:
        """The blob store's fsspec URL in force."""
        return self.store_url or f"file://{self.home.absolute() / 'blobs'}"

    @property
    def queue(self) -> Path:
        """Folder of the embedded broker's messages."""
        return self.home / "queue"

    @property
    def incoming(self) -> Path:
        """Folder of uploads that are not whole yet: what nobody goes on with, `gc` removes."""
        return self.home / "incoming"

    @property
    def host_names(self) -> frozenset[str]:
        """The names in `hosts`."""
        return frozenset(name.strip().lower() for name in self.hosts.split(",") if name.strip())

    @property
    def index(self) -> Path:
        """Folder of FAISS files: a cache, rebuilt from the database."""
        return self.home / "index"

    @property
    def previews(self) -> Path:
        """Folder of rendered previews: a cache."""
        return self.home / "previews"


@cache
def settings() -> Settings:
    """The settings of this process, read once. Tests call `settings.cache_clear()`.

    Raises:
        UsageError: a setting is unknown or has a value that cannot be, or a TOML file is not TOML.
    """
    files = " and ".join(map(str, _toml_files()))
    try:
        return Settings()
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise UsageError(f"settings: {wrong}; they come from MODELGROVE_* variables, {files}") from None
    except (TOMLDecodeError, OSError) as error:
        raise UsageError(f"settings: {error}; they are read from {files}") from None
