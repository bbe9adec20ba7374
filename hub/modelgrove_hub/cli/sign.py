"""`modelgrove sign` and `modelgrove check-signature`: who answers for a model's bytes."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from modelgrove_hub.cli.output import json_option, print_json, say
from modelgrove_hub.cli.place import only_here
from modelgrove_hub.cli.work import open_hub, resolve
from modelgrove_hub.errors import DataError, UsageError

_FILE = click.Path(path_type=Path, dir_okay=False)


@click.command()
@click.argument("model")
@click.option("--key", type=_FILE, required=True, help="Your private key: PEM, EC on P-256, P-384 or P-521.")
@json_option
def sign(model: str, key: Path, as_json: bool) -> None:
    """Sign all files of MODEL (OpenSSF Model Signing); the signature is kept with it and exported with it."""
    from modelgrove_hub.signing import sign_revision

    hub = open_hub()
    signature = sign_revision(hub, resolve(hub, model), key)
    if as_json:
        print_json({"model": model, "signature": signature})
    else:
        say(f"Signed. Whoever has the public key checks it: modelgrove check-signature {model} --key PUBLIC")


@click.command("check-signature")
@click.argument("model", required=False)
@click.option("--folder", type=click.Path(path_type=Path, file_okay=False), help="Check this folder, not a model.")
@click.option("--key", type=_FILE, required=True, help="The signer's public key: PEM.")
@click.option(
    "--signature", type=_FILE, help="The signature's file; unset: those kept with MODEL, or FOLDER/model.sig."
)
@json_option
def check_signature(model: str | None, folder: Path | None, key: Path, signature: Path | None, as_json: bool) -> None:
    """Check that MODEL, or a folder, holds exactly the files that were signed (exit code 5 if not)."""
    from modelgrove_hub.registry.attestations import SIGNATURE_FILE
    from modelgrove_hub.signing import Checked, check, check_revision, read_signature

    if (model is None) == (folder is None):
        raise UsageError("name a model, or a folder with --folder")
    if folder is not None:
        place = signature or folder / SIGNATURE_FILE
        check(folder, read_signature(place), key)
        results = [Checked(str(place), "")]
    else:
        only_here("`modelgrove check-signature MODEL`")
        hub = open_hub()
        results = check_revision(hub, resolve(hub, str(model)), key, signature)
    holds = [result for result in results if not result.reason]
    if as_json:
        print_json([asdict(result) for result in results])
    if not holds:
        raise DataError(f"no signature of {model} holds: {'; '.join(result.reason for result in results)}")
    say(f"The signature {holds[0].name[:64]} holds: these are the files that the owner of {key} signed.")
