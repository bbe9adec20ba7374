"""Every error modelgrove raises on purpose, by who must act.

The message says what is wrong, which file, tensor or parameter, and what there is instead.
Each branch has an exit code for the CLI and a status for the API; both are caught once, at
the root. Kernels raise only `ValueError` and `TypeError`.
"""

from __future__ import annotations


class ModelgroveError(Exception):
    """The root of all errors raised on purpose."""

    exit_code = 1
    status = 500


class UsageError(ModelgroveError):
    """The caller must act: a wrong argument or a request that cannot be met."""

    exit_code = 2
    status = 422


class NotFoundError(UsageError):
    """The caller named something that is not there."""

    exit_code = 3
    status = 404


class ConflictError(UsageError):
    """The caller asked for something that is already there, or in use."""

    exit_code = 4
    status = 409


class DataError(ModelgroveError):
    """The file must be replaced: damaged, hostile, or not what it claims to be."""

    exit_code = 5
    status = 422


class CorruptFileError(DataError):
    """A file breaks the rules of its own format."""


class UnsafeFileError(DataError):
    """A file may run code when read, so it is not read."""


class PluginError(ModelgroveError):
    """The plugin's author must act; the message names the distribution."""

    exit_code = 6
    status = 502


class JobFailedError(ModelgroveError):
    """A job ended without its result; the job's row holds the reason."""

    exit_code = 6
    status = 502


class StorageError(ModelgroveError):
    """The operator must act: disk, database or broker. The only branch that is retried."""

    exit_code = 7
    status = 503
