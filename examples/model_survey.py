"""Try every decoder of the installed transformers: `uv run python -m examples.model_survey`.

Each family gets a model with a few thousand random weights. The engine takes it or rejects it. If it takes it, its
greedy tokens are compared with those of the model alone, for prompts longer than every window and chunk, in chunks,
with preemption and cached prefixes. The results are written to docs/models.md. A stopped run continues where it was:
the results so far are in `--results`.
"""

import json
import warnings
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch
import typer
from rich.progress import Progress
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import logging

from flex_nano_vllm import Inference, SamplingParams

VOCABULARY, POSITIONS, WINDOW = 211, 256, 12
MOST_PARAMETERS = 30e6  # of a model that is tried
# Values of the options that a config has. Layers are few and narrow, windows and chunks short.
SIZES = dict(
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), POSITIONS),
    **dict.fromkeys(("sliding_window", "attention_chunk_size"), WINDOW),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_attention_heads", "n_head"), 4),
    **dict.fromkeys(("intermediate_size", "intermediate_size_mlp", "ffn_dim", "n_inner"), 96),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_k", "num_kv_shared_layers"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace"), 1),
    num_key_value_heads=2,
    head_dim=16,
    use_sliding_window=True,
    max_window_layers=2,
    query_pre_attn_scalar=20,
    attn_logit_softcapping=5.0,
    hidden_size_per_layer_input=8,
    initializer_range=0.3,  # makes logits differ, and attention scores large enough for masks to matter
    tie_word_embeddings=False,  # with tied random embeddings, a model repeats its last token
    pad_token_id=0,
    eos_token_id=1,
    bos_token_id=2,
)
# Latent attention: its heads have a part with RoPE, a part without, and values of another size.
LATENT = dict(kv_lora_rank=16, q_lora_rank=24, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=12)
OVERRIDES = {
    name: LATENT | dict(num_key_value_heads=4, head_dim=8, qk_head_dim=24)
    for name in ("deepseek_v2", "deepseek_v3", "youtu", "minicpm3", "glm4_moe_lite", "axk1", "longcat_flash")
}


def tiny_config(config_class: type[PreTrainedConfig]) -> PreTrainedConfig:
    """Return a config of the class in which the text model, and every other part, is tiny."""
    default, overrides = config_class(), OVERRIDES.get(config_class.model_type, {})
    parts = {name: part for name in default.sub_configs if (part := getattr(default, name, None)) is not None}
    sizes = {
        name: _sizes_of(part) | (overrides if part is default.get_text_config() else {}) for name, part in parts.items()
    }
    return config_class(**(sizes or _sizes_of(default) | overrides))


def _sizes_of(config: PreTrainedConfig) -> dict[str, object]:
    names = {*vars(config), *getattr(config, "attribute_map", {})}
    return {name: value for name, value in SIZES.items() if name in names}


def tiny_model(model_type: str) -> PreTrainedModel:
    """Return a model of a family, with the same random weights in every call. Raises ValueError if it is not tiny."""
    config_class = next(cls for cls in MODEL_FOR_CAUSAL_LM_MAPPING if cls.model_type == model_type)
    config = tiny_config(config_class)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        num_parameters = sum(parameter.numel() for parameter in model.parameters())
    if num_parameters > MOST_PARAMETERS:
        raise ValueError(f"the smallest model has {num_parameters / 1e6:.0f} million parameters")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()


@dataclass
class Result:
    """What became of a family."""

    family: str
    verdict: str  # "exact", "wrong", "rejected", or "not tried"
    reason: str = ""


def greedy(model: PreTrainedModel, prompt: list[int], num_tokens: int, use_cache: bool) -> list[int]:
    """Return tokens of the model alone. Without a cache, the model computes each token from the whole sequence."""
    input_ids = torch.tensor([prompt])
    options = dict(do_sample=False, max_new_tokens=num_tokens, eos_token_id=None, pad_token_id=0, use_cache=use_cache)
    return model.generate(input_ids, attention_mask=torch.ones_like(input_ids), **options)[0, len(prompt) :].tolist()


def survey(family: str) -> Result:
    """Try a family."""
    try:
        model = tiny_model(family)
    except Exception as error:
        return Result(family, "not tried", f"{type(error).__name__}: {error}".splitlines()[0][:160])
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in (40, 5, 17, 26)]
    prompts.append(prompts[0][:24] + prompts[1])
    sizes = dict(max_batch_size=3, page_size=4, n_pages=30, max_num_batched_tokens=11, max_seq_length=72)
    try:
        engine = Inference(model, None, **sizes, compile=False)
    except ValueError as error:
        return Result(family, "rejected", str(error))
    with engine:
        params = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
        outputs = [output.outputs[0].token_ids for output in engine.generate(prompts, params, use_tqdm=False)]
    if outputs == [greedy(model, prompt, 10, use_cache=True) for prompt in prompts]:
        return Result(family, "exact")
    if outputs == [greedy(model, prompt, 10, use_cache=False) for prompt in prompts]:
        return Result(family, "exact", "as the model without a cache; its cache drops keys that the mask shows")
    return Result(family, "wrong")


def document(results: list[Result]) -> str:
    """Return the text of docs/models.md."""
    counts = {verdict: sum(r.verdict == verdict for r in results) for verdict in ("exact", "wrong", "rejected")}
    reasons = [result.reason.replace("|", " ").replace("`", "'") for result in results]
    rows = [f"| {result.family} | {result.verdict} | {reason} |" for result, reason in zip(results, reasons)]
    return "\n".join(
        [
            "# Models",
            "",
            f"This table is generated by `uv run python -m examples.model_survey` (torch {torch.__version__},",
            f"transformers {version('transformers')}). It has every decoder that `AutoModelForCausalLM` knows. Each",
            "was tried with a tiny random model, uncompiled, in float32. *Exact*: greedy tokens equal those of Hugging",
            "Face `generate`, for prompts beyond every window and chunk.",
            "",
            "To try a model of your own, build an engine: `Inference(model, tokenizer)`. It runs the model on a few",
            "tokens, packed as the engine packs requests, and compares every module with the model alone.",
            "",
            "| family | result | reason |",
            "|---|---|---|",
            *rows,
            "",
            f"{counts['exact'] + counts['wrong']} of {len(results)} admitted, {counts['wrong']} admitted and wrong.",
            "",
        ]
    )


def main(
    families: str = "", results: Path = Path("results/models.jsonl"), output: Path = Path("docs/models.md")
) -> None:
    """Try all families, or those in `--families` (separated by commas), and write `--output`."""
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    results.parent.mkdir(parents=True, exist_ok=True)
    done = (
        [Result(**json.loads(line)) for line in results.read_text(encoding="utf-8").splitlines()]
        if results.exists()
        else []
    )
    wanted = families.split(",") if families else sorted({cls.model_type for cls in MODEL_FOR_CAUSAL_LM_MAPPING})
    if families:
        done = []  # asked for by name: try them again
    known = {result.family for result in done}
    with Progress() as progress, results.open("a", encoding="utf-8") as file:
        for family in progress.track([family for family in wanted if family not in known], description="families"):
            progress.console.print(family)
            done.append(survey(family))
            file.write(json.dumps(asdict(done[-1])) + "\n")
            file.flush()
    output.write_text(
        document(sorted((r for r in done if r.family in wanted), key=lambda r: r.family)), encoding="utf-8"
    )
    print(output.read_text(encoding="utf-8").splitlines()[-1])


if __name__ == "__main__":
    typer.run(main)
