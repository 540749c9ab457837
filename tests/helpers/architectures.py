"""A tiny model of each causal architecture that transformers has, and what becomes of it here.

``python -m tests.helpers.architectures`` writes the table of docs/models.md anew.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from dumont import models
from dumont.errors import FailedPrecondition
from model_host import model_files
from model_host.engine import Generation, Phases, Settings
from model_host.engines import causal_lm, choice
from model_host.engines.backends import Alone
from model_host.engines.causal_lm import CausalLM
from tests.unit.model_host.tiny_models import VOCABULARY, answers, run_all, save, words

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
BEGIN, END = "<!-- table: python -m tests.helpers.architectures -->", "<!-- end of table -->"
PROMPTS, COUNT = (7, 700), 20
# Of a tiny model. One that is left at its default size takes gigabytes.
MOST_PARAMETERS = 4_000_000
# How far a log-probability may be off, and how far below the likeliest a token that transformers did not
# choose, as fractions of the spread of the logits: two tokens may be as likely as one another.
TOLERANCE = 0.02

# Sizes by what configurations call them.
# Pairs: two sizes may be the same number.
SIZES: tuple[tuple[float, str], ...] = (
    (VOCABULARY, "vocab_size unpadded_vocab_size vocab_size_per_layer_input encoder_hash_byte_group_vocab"),
    (
        1024,
        "max_position_embeddings n_positions max_seq_len n_ctx model_max_length max_target_positions "
        "rel_extent context_length max_source_positions",
    ),
    (
        32,
        "hidden_size d_model n_embd embed_dim embedding_size word_embed_proj_dim attention_hidden_size "
        "lru_width emb_dim embedding_dim input_embedding_size output_embedding_size pronunciation_embed_dim "
        "shape_embed_dim kv_lora_rank q_lora_rank router_hidden_size hidden_size_per_layer_input laurel_rank "
        "adapter_rank ple_embed_dim hc_lowrank o_lora_rank gated_norm_rank hidden_size_global projection_dim "
        "backbone_hidden_size "
        # What takes effect only beyond so many tokens must take effect here.
        "attention_chunk_size index_topk keep_window_size index_block_size local_attn_chunk_length "
        "lsh_attn_chunk_length log_scaling_n_floor floor_scale",
    ),
    (
        64,
        "intermediate_size ffn_dim ffn_hidden_size moe_intermediate_size shared_expert_intermediate_size "
        "shared_experts_intermediate_size shared_intermediate_size intermediate_size_mlp mamba_d_ssm "
        "expert_ffn_hidden_size dense_intermediate_size encoder_ffn_dim decoder_ffn_dim dff dim_ff d_inner "
        "moe_shared_expert_intermediate_size feed_forward_size",
    ),
    (
        4,
        "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads "
        "attention_heads num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads "
        "index_n_heads linear_num_heads linear_num_value_heads linear_num_key_heads num_kv_heads num_experts "
        "n_routed_experts num_local_experts moe_num_experts time_step_rank mamba_dt_rank index_topk_blocks",
    ),
    (
        2,
        "num_key_value_heads swa_num_key_value_heads num_global_key_value_heads num_hidden_layers n_layer "
        "n_layers num_layers encoder_layers decoder_layers num_encoder_layers num_decoder_layers num_blocks "
        "num_experts_per_tok num_experts_per_token moe_topk moe_k zero_expert_num top_k_experts",
    ),
    (
        8,
        "head_dim qk_nope_head_dim qk_rope_head_dim v_head_dim index_head_dim linear_key_head_dim "
        "linear_value_head_dim linear_head_dim swa_head_dim kv_channels dim_head d_head rotary_dim "
        "attention_head_size global_head_dim",
    ),
    (
        16,
        "qk_head_dim sliding_window sliding_window_size window_size attention_window_size local_attention "
        "mamba_d_state state_size ssm_state_size mamba_chunk_size chunk_size",
    ),
    (1, "n_group num_expert_group topk_group n_groups"),
    (0.3, "initializer_range init_std init_method_std"),
)
SMALL = {name: size for size, names in SIZES for name in names.split()}
# Set even where the default is that they follow from something else.
UNSET = ("num_key_value_heads", "head_dim", "num_kv_heads", "intermediate_size")
# Kinds of layers: one of each.
KINDS = ("layer_types", "mlp_layer_types", "layers_block_type")
NO_TOKENS = (
    "bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "sep_token_id", "cls_token_id",
    "forced_eos_token_id",
)  # fmt: skip
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8}
ROPE = {"rope_type": "default", "rope_theta": 1e4}
ZAMBA = {"num_key_value_heads": 4, "attention_hidden_size": 64, "attention_head_dim": 16}
SPECIAL: dict[str, dict[str, Any]] = {
    "BambaForCausalLM": {**MAMBA, "attn_layer_indices": [1]},
    "BlenderbotForCausalLM": {"encoder_no_repeat_ngram_size": 0},  # by default 3, which is refused
    "CohereCompassForCausalLM": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"sliding_attention": ROPE, "full_attention": ROPE},
    },
    "DbrxForCausalLM": {
        "rope_parameters": ROPE,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
    },
    "DeepseekV2ForCausalLM": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "Dots1ForCausalLM": {
        "n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 1,
    },
    "FalconH1ForCausalLM": {**MAMBA, "mamba_d_ssm": 64},
    "Gemma3nForCausalLM": {"num_kv_shared_layers": 0},
    "GPTNeoForCausalLM": {"attention_types": [[["global", "local"], 1]]},
    "GraniteMoeHybridForCausalLM": {**MAMBA, "layer_types": ["mamba", "attention"]},
    "JambaForCausalLM": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "Lfm2MoeForCausalLM": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "Mamba2ForCausalLM": {"num_heads": 8, "head_dim": 8},
    "ProphetNetForCausalLM": {"pad_token_id": 0},
    "Qwen4ExpForCausalLM": {
        "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 32,
        "indexer_compress_ratio": 4,
    },
    "RecurrentGemmaForCausalLM": {"num_hidden_layers": 3},
    "ReformerModelWithLMHead": {
        "axial_pos_embds_dim": [8, 24], "axial_pos_shape": [32, 32], "pad_token_id": 0,
    },
    "XLMWithLMHeadModel": {"pad_token_id": 2, "causal": True},
    "ZambaForCausalLM": {
        **ZAMBA, "layers_block_type": ["mamba", "hybrid"] * 2, "num_hidden_layers": 4, "n_mamba_heads": 2,
    },
    "Zamba2ForCausalLM": {
        **ZAMBA, "layers_block_type": ["mamba", "hybrid"], "mamba_headdim": 8, "n_mamba_heads": 8,
    },
    "ZayaForCausalLM": {"num_experts_per_tok": 1},
}  # fmt: skip
PADDED = (
    "CamembertForCausalLM", "Data2VecTextForCausalLM", "RobertaForCausalLM", "RobertaPreLayerNormForCausalLM",
    "XLMRobertaForCausalLM", "XLMRobertaXLForCausalLM", "XmodForCausalLM",
)  # fmt: skip
SPECIAL |= {name: {"pad_token_id": 1} for name in PADDED}
SPECIAL["XmodForCausalLM"]["default_language"] = "en_XX"


def architectures() -> dict[str, list[str]]:
    """The model types of each architecture."""
    found: dict[str, list[str]] = {}
    for kind, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        found.setdefault(name if isinstance(name, str) else name[0], []).append(kind)
    return found


def tiny(architecture: str) -> Any:
    """A configuration of a few thousand parameters."""
    config_class = getattr(transformers, architecture).config_class
    fields = _small(config_class) | SPECIAL.get(architecture, {})
    while True:
        try:
            return config_class(**fields)
        except Exception as error:
            # Some must have a token of each kind.
            needed = re.search(r"Field '(\w+)' expected int, got NoneType", str(error))
            if needed is None or needed[1] not in fields:
                raise
            fields[needed[1]] = 0


def tiny_encoder(kind: str) -> Any:
    """A configuration of an encoder of this model type."""
    config_class: Any = type(transformers.AutoConfig.for_model(kind))
    fields = _small(config_class)
    fields.pop("is_decoder", None)
    pad = config_class().pad_token_id or 0
    return config_class(**fields | {"pad_token_id": pad if pad < VOCABULARY else 0})


def _small(config_class: Any) -> dict[str, Any]:
    default = config_class().to_dict()
    fields: dict[str, Any] = {
        name: size
        for name, size in SMALL.items()
        if name in default
        and (type(default[name]) in (int, float) or (default[name] is None and name in UNSET))
    }
    if "kv_lora_rank" in default:
        fields["num_key_value_heads"] = fields["num_attention_heads"]
    kinds = {name: list(dict.fromkeys(default[name])) for name in KINDS if _has_kinds(default.get(name))}
    layers = max([2, *map(len, kinds.values())])
    fields |= {name: (one_of_each * layers)[:layers] for name, one_of_each in kinds.items()}
    if kinds:
        fields |= {name: layers for name in ("num_hidden_layers", "num_layers") if name in fields}
    fields |= {name: None for name in NO_TOKENS if default.get(name) is not None}
    if "is_decoder" in default:
        fields["is_decoder"] = True
    for name, part in getattr(config_class, "sub_configs", {}).items():
        with suppress(Exception):  # some name the class of any configuration
            fields[name] = _small(part)
    return fields


def _has_kinds(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], str)


def make(architecture: str, folder: Path) -> Any:
    """Save a tiny model; gives it back as transformers loads it."""
    torch.manual_seed(3)
    model_class = getattr(transformers, architecture)
    model = model_class(tiny(architecture)).eval()
    parameters = model.num_parameters()
    assert parameters <= MOST_PARAMETERS, f"{parameters} parameters; name what makes them many in SIZES"
    save(model, folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    return model_class.from_pretrained(folder).eval()


def outcome(architecture: str, folder: Path) -> str:
    """How an architecture is served, or why it is refused; one that says anything wrong fails."""
    try:
        models.engine_of(architecture, {"architectures": [architecture]}, {"tokenizer.json"})
    except FailedPrecondition as error:
        why = error.message.partition("cannot be served: ")[2].partition(". ")[0]
        return f"refused: {why}"
    model = make(architecture, folder)
    files = model_files.read(folder)
    settings = Settings(device="cpu", threads=1)
    engine = choice.load(choice.choose("", files), files, settings, Phases())
    assert isinstance(engine, CausalLM)
    engine.warm_up()
    canary = engine.canary()
    for length in PROMPTS:
        compare(engine, model, [(37 * place + length) % (VOCABULARY - 1) + 1 for place in range(length)])
    engine.quiesce()
    engine.wake()
    assert engine.canary() == canary
    if not isinstance(engine._backend, Alone):
        return "many at a time"
    return "one at a time" if engine._backend._in_pieces else "one at a time, prompts whole"


def compare(engine: CausalLM, model: Any, prompt: list[int]) -> None:
    """Fail unless an engine says what transformers' ``generate`` does, token by token."""
    ids = torch.tensor([prompt])
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=COUNT, do_sample=False, pad_token_id=0,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    expected = output.sequences[0, len(prompt) :].tolist()
    logits = torch.stack(output.logits)[:, 0].float()
    work = engine.generate(Generation(prompt=words(prompt), max_new_tokens=COUNT, logprobs=0))
    [answer] = answers(work, run_all(engine, [work])[work])
    told = [logprob.logprob for piece in answer.pieces for logprob in piece.logprobs]
    assert len(answer.tokens) == COUNT
    allowed = TOLERANCE * max(float(logits.std()), 1e-6)
    for place, (token, right) in enumerate(zip(answer.tokens, expected, strict=True)):
        behind = float(logits[place].max() - logits[place][token])
        off = abs(float(torch.log_softmax(logits[place], -1)[token]) - told[place])
        where = f"token {place + 1} after a prompt of {len(prompt)}"
        assert behind <= allowed, f"{where} is {behind:.3g} less likely than transformers' own"
        assert off <= allowed, f"the log-probability of {where} is {off:.3g} off"
        if token != right:
            break  # as likely; what follows is another text


def must_be_refused(architecture: str, folder: Path) -> None:
    """Fail if an architecture that is refused by its name could be served right by now."""
    model = make(architecture, folder)
    load: Callable[[], CausalLM] = partial(
        causal_lm.load, model_files.read(folder), Settings(device="cpu", threads=1), Phases()
    )
    try:
        engine = load()
        for length in PROMPTS:
            compare(engine, model, [(37 * place + length) % (VOCABULARY - 1) + 1 for place in range(length)])
    except Exception:
        return
    raise AssertionError(f"{architecture} says what transformers does; take it out of models.REFUSED")


def documented() -> dict[str, str]:
    """The outcome of each architecture as docs/models.md has it."""
    table = PAGE.read_text().partition(BEGIN)[2].partition(END)[0]
    rows = re.findall(r"^\| `(\w+)` \| [^|]* \| ([^|]*) \|$", table, re.MULTILINE)
    return {name: how.strip() for name, how in rows}


def main() -> None:
    """Write the table anew."""
    rows = ["| Architecture | model_type | Answers |", "| --- | --- | --- |"]
    for name, kinds in sorted(architectures().items(), key=lambda item: item[0].lower()):
        with tempfile.TemporaryDirectory() as folder:
            how = outcome(name, Path(folder))
        rows.append(f"| `{name}` | {', '.join(kinds)} | {how} |")
        print(rows[-1], file=sys.stderr)  # noqa: T201
    before, _, rest = PAGE.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text(before + "\n".join([BEGIN, "", *rows, "", END]) + after)


if __name__ == "__main__":
    main()
