"""`modelgrove compress`: a smaller copy of a model, by any installed compressor."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from modelgrove_hub.cli.method import MethodCommand, chosen_plugin, given
from modelgrove_hub.cli.output import dry_run_option, human_size, json_option, print_json, print_table, say
from modelgrove_hub.cli.place import ask, copy_artefacts
from modelgrove_hub.cli.work import do, show_job, work_options

if TYPE_CHECKING:
    from modelgrove_hub.verbs.facts import JobFacts


@click.command(cls=MethodCommand, kind="compressor", default="rtn")
@click.argument("model")
@click.option("--name", help="Name of the new model; default: MODEL-METHOD.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="Folder for plots (implies --wait).")
@dry_run_option
@work_options
@json_option
def compress(
    model: str, method: str, name: str | None, out: Path | None, dry_run: bool, wait: bool, local: bool,
    key: str | None, as_json: bool, **values: Any,
) -> None:  # fmt: skip
    """Write a smaller copy of MODEL: a new model, with its lineage and what was lost."""
    plugin = chosen_plugin("compressor", method)
    params = given(plugin.Params, values)
    if dry_run:
        from modelgrove_hub.verbs.jobs import Work, plan_job

        _show_plan(ask(plan_job, work=Work(plugin=f"compressor.{method}", params=params, models=[model])), as_json)
        return
    wait = wait or out is not None
    job = do(f"compressor.{method}", params, [model], target=name, wait=wait, local=local, key=key)
    pictures = _pictures(job, out)
    if not as_json and job.finished_at is not None:
        _tell(method, job.outputs.get("report", {}), pictures)
    show_job(job, as_json=as_json)


def _show_plan(plan: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(plan)
        return
    rows = [
        [layer["name"], _shape(layer), _layout(layer), human_size(layer["bytes_before"]), human_size(layer["bytes"])]
        for layer in plan["layers"]
    ]
    print_table(
        ["layer", "shape", "layout", "before", "after"], rows, empty="Nothing would be packed: all tensors are kept."
    )
    say(f"{plan['method']}: {_sizes(plan)}; nothing was done")


def _tell(method: str, report: Mapping[str, Any], pictures: Mapping[str, str]) -> None:
    """What was lost, as far as the method reports it: strangers' plugins need not."""
    if "bytes_before" in report:
        say(f"{method}: {_sizes(report)}")
    layers = {layer["name"]: layer for layer in report.get("layers", ())}
    for name, sqnr in report.get("worst", {}).items():
        say(f"  {sqnr:5.1f} dB  {_layout(layers[name])}  {name}")
    fidelity = report.get("fidelity", {})
    if "error" in fidelity:
        say(
            f"error of the denoiser's output: {fidelity['error']:.2g} of its energy; "
            f"on the same seeds {_psnr(fidelity)}"
        )
    elif "reason" in fidelity:
        say(f"not compared with the original: {fidelity['reason']}")
    for name, picture in pictures.items():
        say(f"{name}: {picture}")


def _psnr(fidelity: Mapping[str, Any]) -> str:
    return "same pictures" if fidelity["psnr_db"] is None else f"pictures at {fidelity['psnr_db']:.1f} dB PSNR"


def _sizes(report: Mapping[str, Any]) -> str:
    before, after = report["bytes_before"], report["bytes_after"]
    size = f"{human_size(before)} → {human_size(after)} ({after / before:.0%})"
    if "quantized" not in report:
        return size
    return f"{size}, {report['quantized']} tensors packed, {report['kept']} kept"


def _layout(layer: Mapping[str, Any]) -> str:
    """As people write it: int4 g64, lut3 g64, int8 g160 r32."""
    bits = layer["bits"] if layer["layout"] == "lut" else ""
    group = "" if layer["layout"] == "sparse" else f" g{layer['group']}"
    rank = f" r{layer['rank']}" if layer.get("rank") else ""
    return f"{layer['layout']}{bits}{group}{rank}"


def _shape(layer: Mapping[str, Any]) -> str:
    return "×".join(map(str, layer["shape"]))


def _pictures(job: JobFacts, out: Path | None) -> dict[str, str]:
    """The job's plots: their names in it, or where they were copied to."""
    names = job.outputs.get("artefacts", {})
    if out is None or not names:
        return dict.fromkeys(names, f"modelgrove jobs files {job.id[:8]} FOLDER")
    return {name: str(place) for name, place in copy_artefacts(job, out).items()}
