"""The commands: ``moe-interp report | routing | labels | profile | saturation | lens | tuned-lens | similarity | ...``.

Everything they do is one call of the library. What can be refused is refused before a model is loaded, and torch is
imported by no command's help. Errors of moe_interp are printed without a traceback; the exit status is then 2 (1 for an
audit that failed).
"""

import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

import moe_interp as moe
from moe_interp.errors import BadInput, BadOutput, MoEError
from moe_interp.paths import check_writable
from moe_interp.views.terminal import Escaping, Terminal, show, show_words

if TYPE_CHECKING:
    import xarray as xr

    from moe_interp.data import Corpus
    from moe_interp.model import MoEModel

app = typer.Typer(
    help="Open up mixture-of-experts models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
console = Terminal()

Model = Annotated[str | None, typer.Argument(help="Hub id or folder; the bundled reference model if left out.")]
Data = Annotated[
    str | None,
    typer.Option(help="A jsonl(.gz), json, csv, txt or parquet file, a folder, a dataset id; else the bundled sample."),
]
Limit = Annotated[int | None, typer.Option(min=1, help="At most so many documents of each domain.")]
MaxTokens = Annotated[
    int | None, typer.Option(min=2, help="Longer documents are cut to so many tokens, at most the context length.")
]
DomainField = Annotated[str | None, typer.Option("--domain-field", help="Field of the data that holds the domain.")]
Field = Annotated[str, typer.Option("--text-field", help="Field of the data that holds the text.")]
Output = Annotated[
    Path | None, typer.Option("--output", "-o", help="Where to write the result: netCDF, a name in .nc.")
]
DType = Annotated[str, typer.Option(help="Of the weights: auto, float32, bfloat16, float16.")]
DeviceMap = Annotated[str | None, typer.Option(help="As for from_pretrained: auto, cpu, cuda, ...")]
Trust = Annotated[bool, typer.Option(help="Let code beside the checkpoint run.")]


def _check_output(output: Path | None, result: bool = True) -> None:
    """Refuse a file that could not be written before the work is done; a result's is netCDF."""
    if output is None:
        return
    if result and output.suffix != ".nc":
        raise BadOutput(
            f"cannot write {output}", expected="a name that ends in .nc: results are netCDF", got=output.name
        )
    check_writable(output)


def _check_text(text: str | None) -> None:
    if text is not None and not text.strip():
        raise BadInput("the text is empty", expected="at least one character", got=repr(text))


def _load(model: str | None, dtype: str, device_map: str | None, trust_remote_code: bool) -> "MoEModel":
    options = {} if device_map is None else {"device_map": device_map}
    if dtype != "auto":
        options["dtype"] = dtype
    return moe.load(model, trust_remote_code=trust_remote_code, **options)


def _corpus(data: str | None, limit: int | None, text: str, domain: str | None) -> "Corpus":
    corpus = moe.sample() if data is None else moe.read_corpus(data, text=text, domain_field=domain)
    return corpus if limit is None else corpus.take(limit)


def _version(asked: bool) -> None:
    if asked:
        console.print(f"moe-interp {moe.__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Open up mixture-of-experts models."""


@app.command()
def report(
    model: Model = None,
    data: Data = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The HTML file to write.")] = Path("report.html"),
    text: Annotated[str | None, typer.Option(help="Text for the routing map and the lens.")] = None,
    text_field: Field = "text",
    domain_field: DomainField = None,
    limit: Limit = None,
    max_tokens: MaxTokens = 256,
    dtype: DType = "auto",
    device_map: DeviceMap = None,
    trust_remote_code: Trust = False,
) -> None:
    """The main job: four questions about a model, answered in one HTML file."""
    _check_output(output, result=False)
    _check_text(text)
    corpus = _corpus(data, limit, text_field, domain_field)
    opened = _load(model, dtype, device_map, trust_remote_code)
    written = moe.report(opened, corpus, output, text=text, max_tokens=max_tokens)
    console.print(f"wrote {escape(str(written.resolve()))}", soft_wrap=True)


@app.command()
def routing(
    model: Model = None,
    data: Data = None,
    output: Output = None,
    text_field: Field = "text",
    domain_field: DomainField = None,
    limit: Limit = None,
    max_tokens: MaxTokens = None,
    dtype: DType = "auto",
    device_map: DeviceMap = None,
    trust_remote_code: Trust = False,
) -> None:
    """Who is routed where."""
    from moe_interp.views import tables

    _check_output(output)
    corpus = _corpus(data, limit, text_field, domain_field)
    result = moe.routing(_load(model, dtype, device_map, trust_remote_code), corpus, max_tokens=max_tokens)
    _save(result, output)
    show(console, tables.routing(result))
    console.print(
        f"Specialization under a uniform router: {tables.several(100 * result['specialization_baseline'], 1)} %"
    )


@app.command()
def labels(
    label: Annotated[str, typer.Argument(help="kind, punctuation, script or position.")] = "kind",
    model: Annotated[str | None, typer.Option("--model", help="Hub id or folder.")] = None,
    data: Data = None,
    output: Output = None,
    text_field: Field = "text",
    domain_field: DomainField = None,
    limit: Limit = None,
    max_tokens: MaxTokens = None,
    dtype: DType = "auto",
    device_map: DeviceMap = None,
    trust_remote_code: Trust = False,
) -> None:
    """Which expert takes which kind of token."""
    from moe_interp.analyses.labels import check_label
    from moe_interp.views import tables

    _check_output(output)
    check_label(label)
    corpus = _corpus(data, limit, text_field, domain_field)
    opened = _load(model, dtype, device_map, trust_remote_code)
    result = moe.routing_by_label(opened, corpus, label, max_tokens=max_tokens)
    _save(result, output)
    show(console, tables.labels(result))
    console.print(f"Under a uniform router: {tables.several(100 * result['specialization_baseline'], 1)} %")


@app.command()
def profile(
    layer: Annotated[int | None, typer.Argument(help="An MoE layer; all experts if left out (with --output).")] = None,
    expert: Annotated[int | None, typer.Argument(help="One of its experts.")] = None,
    model: Annotated[str | None, typer.Option("--model", help="Hub id or folder.")] = None,
    data: Data = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="HTML page of all experts.")] = None,
    text_field: Field = "text",
    domain_field: DomainField = None,
    limit: Limit = None,
    max_tokens: MaxTokens = None,
    dtype: DType = "auto",
    device_map: DeviceMap = None,
    trust_remote_code: Trust = False,
) -> None:
    """What is known of an expert, or a page of them all."""
    if output is None and (layer is None or expert is None):
        got = "neither" if layer is None else "a layer alone"
        raise BadInput("which expert", expected="a layer and an expert, or --output for a page of all", got=got)
    _check_output(output, result=False)
    opened = _load(model, dtype, device_map, trust_remote_code)
    if layer is not None and expert is not None:
        opened.spec.check_expert(layer, expert)
    result = moe.expert_profiles(opened, _corpus(data, limit, text_field, domain_field), max_tokens=max_tokens)
    if layer is not None and expert is not None:
        console.print(escape(str(moe.profile(result, layer, expert))), soft_wrap=True)
    if output is not None:
        console.print(f"wrote {escape(str(moe.profile_page(result, output).resolve()))}", soft_wrap=True)


@app.command()
def saturation(
    checkpoints: Annotated[list[str] | None, typer.Argument(help="Folders or hub ids, the final one last.")] = None,
    revision: Annotated[list[str] | None, typer.Option(help="Of the one hub id, the final one last.")] = None,
    data: Data = None,
    output: Output = None,
    text_field: Field = "text",
    domain_field: DomainField = None,
    limit: Limit = None,
    dtype: DType = "auto",
    trust_remote_code: Trust = False,
) -> None:
    """How early in training the routing was settled; of the bundled model's own training if nothing is named."""
    from moe_interp.views import tables

    if not checkpoints and (revision or data is not None or limit is not None):
        raise BadInput("which checkpoints", expected="folders or hub ids", got="none, but options for them")
    _check_output(output)
    options: dict[str, Any] = {} if dtype == "auto" else {"dtype": dtype}
    result = (
        moe.router_saturation(
            checkpoints,
            _corpus(data, limit, text_field, domain_field),
            revisions=revision,
            trust_remote_code=trust_remote_code,
            **options,
        )
        if checkpoints
        else moe.reference_saturation()
    )
    _save(result, output)
    show(console, tables.saturation(result))
    first = float(result["independent"].isel(step=0).mean())
    console.print(
        f"Uniform router: {tables.several(result['saturation_baseline'], 2)}; by loads alone at the first: {first:.2f}"
    )


@app.command()
def lens(
    text: Annotated[str, typer.Argument(help="The text to decode.")],
    model: Annotated[str | None, typer.Option("--model", help="Hub id or folder.")] = None,
    position: Annotated[int, typer.Option(help="Which token; -1 is the last.")] = -1,
    tuned: Annotated[str | None, typer.Option(help="A tuned lens: a file, or reference for the bundled one.")] = None,
    output: Output = None,
    dtype: DType = "auto",
    device_map: DeviceMap = None,
    trust_remote_code: Trust = False,
) -> None:
    """What each expert writes, at one position of a text."""
    from moe_interp.views import tables

    _check_output(output)
    _check_text(text)
    through = None if tuned is None else moe.tuned_lens(tuned) if tuned == "reference" else moe.TunedLens.load(tuned)
    opened = _load(model, dtype, device_map, trust_remote_code)
    result = moe.expert_lens(opened, text, positions=position, lens=through)
    _save(result, output)
    show(console, tables.lens(result))


@app.command()
def tuned_lens(
    model: Model = None,
    data: Data = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The safetensors file to write.")] = Path(
        "tuned_lens.safetensors"
    ),
    test: Annotated[str | None, typer.Option(help="Documents to measure the lens on, as for --data.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="At most so many.")] = 1000,
    learning_rate: Annotated[float, typer.Option(help="Of Adam; wide models want less.")] = 1e-3,
    state: Annotated[Path | None, typer.Option(help="A file that a killed training goes on from.")] = None,
    text_field: Field = "text",
    domain_field: DomainField = None,
    limit: Limit = None,
    max_tokens: MaxTokens = None,
    dtype: DType = "auto",
    device_map: DeviceMap = None,
    trust_remote_code: Trust = False,
) -> None:
    """Train a tuned lens, every tenth document held out; --test says how good it is."""
    from moe_interp.views import tables

    _check_output(output, result=False)
    corpus = _corpus(data, limit, text_field, domain_field)
    seen = None if test is None else _corpus(test, limit, text_field, domain_field)
    opened = _load(model, dtype, device_map, trust_remote_code)
    trained = moe.train_tuned_lens(
        opened, corpus, steps=steps, learning_rate=learning_rate, state=state, max_tokens=max_tokens
    )
    console.print(f"wrote {escape(str(trained.save(output).resolve()))}", soft_wrap=True)
    if seen is None:
        return
    result = moe.tuned_lens_quality(opened, trained, seen, max_tokens=max_tokens)
    show(console, tables.tuned_lens(result))


@app.command()
def similarity(
    model: Model = None,
    data: Data = None,
    output: Output = None,
    text_field: Field = "text",
    domain_field: DomainField = None,
    limit: Limit = None,
    max_tokens: MaxTokens = None,
    dtype: DType = "auto",
    device_map: DeviceMap = None,
    trust_remote_code: Trust = False,
) -> None:
    """How well one expert stands for all of them."""
    from moe_interp.views import tables

    _check_output(output)
    corpus = _corpus(data, limit, text_field, domain_field)
    result = moe.ensemble_similarity(_load(model, dtype, device_map, trust_remote_code), corpus, max_tokens=max_tokens)
    _save(result, output)
    for residual in ("without", "with"):
        show(console, tables.similarity(result, residual))


@app.command()
def perplexity(
    model: Model = None,
    data: Data = None,
    output: Output = None,
    renormalise: Annotated[bool, typer.Option(help="Rescale the kept weights to the total of all.")] = False,
    text_field: Field = "text",
    domain_field: DomainField = None,
    limit: Limit = None,
    max_tokens: MaxTokens = None,
    dtype: DType = "auto",
    device_map: DeviceMap = None,
    trust_remote_code: Trust = False,
) -> None:
    """What fewer experts cost."""
    from moe_interp.views import tables

    _check_output(output)
    corpus = _corpus(data, limit, text_field, domain_field)
    opened = _load(model, dtype, device_map, trust_remote_code)
    result = moe.perplexity(opened, corpus, renormalise=renormalise, max_tokens=max_tokens)
    _save(result, output)
    show(console, tables.perplexity(result))
    ratio = float(result["ratio_none_overall"].sel(aggregate="token"))
    console.print(f"Without any routed expert: × {ratio:.3f}")


@app.command()
def audit(
    model: Model = None, dtype: DType = "auto", device_map: DeviceMap = None, trust_remote_code: Trust = False
) -> None:
    """Does it add up on this checkpoint?"""
    from rich.table import Table

    result = _load(model, dtype, device_map, trust_remote_code).audit()
    table = Table("check", "error", "limit", "", "", title=f"Audit of {escape(result.model)}")
    for check in result.checks:
        verdict = "[green]ok[/]" if check.passed else "[red]FAILED[/]"
        table.add_row(escape(check.name), f"{check.error:.1e}", f"{check.limit:.0e}", verdict, escape(check.detail))
    show_words(console, table)
    console.print("passed" if result.passed else "[red]FAILED[/]")
    if not result.passed:
        raise typer.Exit(1)


@app.command()
def models() -> None:
    """What can be opened."""
    from rich.table import Table

    from moe_interp.adapters import FAMILIES

    table = Table("model type of the (text) config", "what is special", title="Architectures that open")
    for name, adapter in sorted(FAMILIES.items()):
        table.add_row(name, " ".join(adapter.notes))
    show_words(console, table)


def _save(result: "xr.Dataset", output: Path | None) -> None:
    if output is None:
        return
    from moe_interp.results import save

    console.print(f"wrote {escape(str(save(result, output).resolve()))}", soft_wrap=True)


def main(arguments: list[str] | None = None) -> Any:
    """The command line."""
    stderr, warn = sys.stderr, warnings.showwarning
    sys.stderr = Escaping(stderr)
    warnings.showwarning = _show_warning
    try:
        return app(arguments)
    except MoEError as error:
        Terminal(file=stderr).print(f"[red]error:[/] {escape(str(error))}", soft_wrap=True)
        sys.exit(2)
    finally:
        sys.stderr, warnings.showwarning = stderr, warn


def _show_warning(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
    print(f"{category.__name__}: {message}", file=sys.stderr)


if __name__ == "__main__":
    main()
