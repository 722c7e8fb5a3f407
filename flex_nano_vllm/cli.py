"""`flex-nano-vllm chat | serve`: the command line of the engine."""

import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from flex_nano_vllm.inference import Inference
from flex_nano_vllm.sampling_params import SamplingParams

app = typer.Typer(
    help=__doc__.split(":")[0].replace("`", ""),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

HELP = "/new starts a new conversation, /exit or Ctrl-D quits, Ctrl-C interrupts an answer"


@app.callback()  # without it, `chat` would not be a command as long as it is the only one
def flex_nano_vllm() -> None:
    pass


@app.command()
def chat(
    model: Annotated[str, typer.Option(help="Folder, hub id, or tiny-gemma2.")] = "tiny-gemma2",
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    temperature: Annotated[float, typer.Option(help="Sampling temperature; 0 is greedy.")] = 0.0,
    top_p: Annotated[
        float, typer.Option(help="Draw from the most likely tokens that together have this probability.")
    ] = 1.0,
    max_tokens: Annotated[int | None, typer.Option(help="Maximum number of tokens of an answer.")] = None,
    max_seq_length: Annotated[int | None, typer.Option(help="Maximum number of tokens of the conversation.")] = None,
    compile: Annotated[
        bool, typer.Option(help="Compile the model: takes minutes the first time, then it runs faster.")
    ] = False,
) -> None:
    """Chat with a model in the terminal. Lines of piped input are answered one after another."""
    console = Console(highlight=False)
    with console.status("loading"):
        sizes = dict(max_batch_size=1, max_seq_length=max_seq_length, compile=None if compile else False)
        try:
            params = SamplingParams(temperature=temperature, top_p=top_p, max_tokens=max_tokens)
            engine = Inference.from_pretrained(model, **sizes)
        except (ValueError, OSError) as error:
            raise SystemExit(str(error)) from None
    opening = [{"role": "system", "content": system}] if system else []
    messages = list(opening)
    if console.is_terminal:
        console.print(f"[bold]{escape(model)}[/] [dim]{HELP}[/]")
    with engine:
        while True:
            try:
                text = console.input("[bold cyan]> [/]" if console.is_terminal else "").strip()
            except (EOFError, KeyboardInterrupt):
                break
            if text == "/exit":
                break
            if text == "/new":
                messages = list(opening)
            elif text:
                messages = answer(engine, [*messages, {"role": "user", "content": text}], params, console)


def answer(engine: Inference, messages: list[dict], params: SamplingParams, console: Console) -> list[dict]:
    """Print the model's answer while it is generated. Return the conversation with the answer, or without its last turn
    if the request is invalid.
    """
    texts = []
    try:
        for delta in engine.stream_chat(messages, params):
            texts.append(delta.text)
            console.print(delta.text, end="", markup=False, soft_wrap=True)
    except KeyboardInterrupt:
        console.print(" [dim](interrupted)[/]", end="")
    except ValueError as error:
        console.print(f"[red]{escape(str(error))}[/]")
        return messages[:-1]
    console.print()
    return [*messages, {"role": "assistant", "content": "".join(texts)}]


def needs_serve() -> None:
    """Exit with installation instructions if the extra `serve` is missing."""
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise SystemExit(f"{error}: the server needs an extra: pip install 'flex-nano-vllm[serve]'") from None


def main() -> None:
    """Run the console script. `serve` has its options only if the extra is installed."""
    for stream in (sys.stdout, sys.stderr):  # a terminal may not support every character that a model writes
        stream.reconfigure(errors="replace")
    try:
        from flex_nano_vllm.server import serve
    except ImportError:

        @app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
        def serve() -> None:
            """Serve a model over the OpenAI API (needs the extra: flex-nano-vllm[serve])."""
            needs_serve()
    else:
        app.command()(serve)
    app()
