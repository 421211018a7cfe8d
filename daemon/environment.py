"""What the environment adds to the configuration's file: REELD_ variables, and systemd's credentials.

Owns which variables there are, what wins, and which variable a value came from. Leaves out the settings themselves
(`daemon.config`) and how pydantic takes them from variables.
"""

import difflib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic_settings import BaseSettings, EnvSettingsSource, SettingsError

from daemon.errors import ConfigError

PREFIX = "REELD_"
_URL_VARIABLE = "REELD_AMQP_URL"

# Variables that are no settings.
_OTHERS = frozenset(
    {
        _URL_VARIABLE,
        "REELD_CONFIG",
        "REELD_INSTANCE",
        # From the launcher to its ranks.
        "REELD_LAUNCHER",
        "REELD_LOG_FORMAT_RESOLVED",
        "REELD_LOG_LOCK",
        "REELD_RUNTIME_DIRECTORY",
        # Of the tests and the Makefile.
        "REELD_BUILD_RELEASE",
        "REELD_DEBIAN_MIRROR",
        "REELD_EVERY_TASK",
        "REELD_EXACTNESS_CASES",
        "REELD_EXACTNESS_SEED",
        "REELD_TEST_BROKER_ROOT",
        "REELD_TEST_CACHE",
    }
)

# What Kubernetes gives every container of a namespace with a Service named reeld or reeld-something.
_OF_KUBERNETES = re.compile(r"REELD_(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_(TCP|UDP|SCTP)(_\w+)?)?)")

# What systemd's LoadCredential= puts into $CREDENTIALS_DIRECTORY, and the setting that it stands in for.
_CREDENTIALS = {
    "broker-url": "url_file",
    "broker-ca": "ca_file",
    "broker-cert": "cert_file",
    "broker-key": "key_file",
}


class Environment:
    """The environment as it is now, seen as the settings' second source. Raises ConfigError when it cannot be read."""

    def __init__(self, settings: type[BaseSettings]) -> None:
        # As pydantic reads it: the case of a name does not count, and what is empty is not there.
        self._variables = {name.upper(): value for name, value in os.environ.items() if value}
        self._names = dict(_settings_by_variable(settings))
        self._values: dict[str, Any] = _read(settings)
        if _URL_VARIABLE in self._variables:
            _section(self._values, "broker").setdefault("url", self._variables[_URL_VARIABLE])

    def add_to(self, values: dict[str, Any]) -> None:
        """Puts into the file's values what pydantic does not find itself: the short name of the URL, and credentials.

        A variable wins over the file, and the file over a credential. A URL in a variable so wins over one that either
        keeps in a file of its own. Of two variables `url_file`'s wins. Raises ConfigError.
        """
        broker, given = _section(values, "broker"), _section(self._values, "broker")
        _pick_up_credentials(broker)
        if "url" in given:
            broker["url"] = given["url"]
            if "url_file" not in given:
                broker.pop("url_file", None)

    def mistyped(self) -> Iterator[str]:
        """A fault, of one line, for each variable named like reeld's that is none."""
        for name in sorted(self._variables):
            if not name.startswith(PREFIX) or name in _OTHERS or _OF_KUBERNETES.fullmatch(name):
                continue
            if not self._is_setting(name):
                meant = difflib.get_close_matches(name, self._names, n=1, cutoff=0.85)
                yield f"{name}: no setting has this variable" + (f": is {meant[0]} meant?" if meant else "")

    def source_of(self, path: tuple[int | str, ...]) -> str | None:
        """The variable that a setting's value came from; None when no variable gave it."""
        value: Any = self._values
        for part in path:
            if not isinstance(value, dict):
                break  # what is wrong is within one variable's value
            if part not in value:
                return None
            value = value[part]
        for end in range(len(path), 0, -1):
            name = PREFIX + "__".join(str(part) for part in path[:end]).upper()
            if name in self._variables:
                return name
        return _URL_VARIABLE if path == ("broker", "url") else None

    def _is_setting(self, name: str) -> bool:
        """Also what is within a section: whether it has such a setting is found with the section's other faults."""
        section, separator, _ = name.removeprefix(PREFIX).partition("__")
        return self._names.get(PREFIX + section) is True or (not separator and name in self._names)


def _read(settings: type[BaseSettings]) -> dict[str, Any]:
    """What pydantic takes from the variables, nested like the file. Raises ConfigError that names the unreadable."""
    source = EnvSettingsSource(settings)
    faults = []
    for name, value in sorted(source.env_vars.items()):
        if not name.upper().startswith(PREFIX):
            continue
        alone = EnvSettingsSource(settings)  # or the error would not say which variable it is
        alone.env_vars = {name: value}
        try:
            alone()
        except SettingsError:
            faults.append(f"{name.upper()}: must be JSON, like every variable for a list or a whole section")
    if faults:
        raise ConfigError("\n".join(faults))
    return source()


def _settings_by_variable(settings: type[BaseSettings]) -> Iterator[tuple[str, bool]]:
    """Each variable, and whether it is that of a whole section."""
    for name, field in settings.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            yield f"{PREFIX}{name}".upper(), True
            for each in section.model_fields:
                yield f"{PREFIX}{name}__{each}".upper(), False
        else:
            yield f"{PREFIX}{name}".upper(), False


def _section(values: dict[str, Any], name: str) -> dict[str, Any]:
    """A table of the file; one that is none is left for the settings to find."""
    section = values.setdefault(name, {})
    return section if isinstance(section, dict) else {}


def _pick_up_credentials(broker: dict[str, Any]) -> None:
    """Credentials that the service manager hands over; a path that the file names itself wins."""
    directory = os.environ.get("CREDENTIALS_DIRECTORY")
    if not directory:
        return
    for name, field in _CREDENTIALS.items():
        path = Path(directory) / name
        try:
            handed_over = path.is_file()
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}") from error
        if handed_over:
            broker.setdefault(field, str(path))
