"""Networks of transformers that read sentences, and how any network of transformers is built from its configuration."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import transformers
from torch import nn

from benchmarks.wild.case import Case, tokens

Inputs = Callable[[], Any]

transformers.logging.set_verbosity_error()

BERT = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
BERT |= {"max_position_embeddings": 64}
CAUSAL = BERT | {"num_key_value_heads": 2, "use_cache": False}
T5 = {"vocab_size": 99, "d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2, "use_cache": False}
BART = {"vocab_size": 99, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "use_cache": False}
BART |= {f"{side}_attention_heads": 2 for side in ("encoder", "decoder")} | {
    f"{side}_ffn_dim": 48 for side in ("encoder", "decoder")
}


def built(kind: type[nn.Module], config: type, options: dict[str, Any]) -> nn.Module:
    """A network of a class of transformers, with random weights."""
    return kind(config(**options))


def net(kind: str, config: str, inputs: Inputs, part: str = "", part_inputs: Inputs | None = None, **options: Any) -> Case:
    """A case of transformers."""
    build = partial(built, getattr(transformers, kind), getattr(transformers, f"{config}Config"), options)
    return Case(library="transformers", name=kind, build=build, inputs=inputs, part=part, part_inputs=part_inputs)


def padded() -> dict[str, Any]:
    """Sentences of two lengths with their mask."""
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, 8:] = 0
    return {"input_ids": tokens()(), "attention_mask": mask}


def translated() -> dict[str, Any]:
    """Sentences and the beginnings of their translations."""
    return {"input_ids": tokens()(), "decoder_input_ids": tokens(7)()}


def encoders() -> Iterator[Case]:
    """Networks that read a sentence as a whole."""
    yield net("BertModel", "Bert", tokens(), **BERT)
    yield net("BertForSequenceClassification", "Bert", padded, **BERT, num_labels=3)
    yield net("BertForTokenClassification", "Bert", padded, **BERT, num_labels=3)
    yield net("BertForMaskedLM", "Bert", tokens(), **BERT)
    yield net("RobertaModel", "Roberta", tokens(), **BERT)
    yield net("XLMRobertaModel", "XLMRoberta", padded, **BERT)
    yield net("DistilBertModel", "DistilBert", tokens(), vocab_size=99, dim=32, n_layers=3, n_heads=2, hidden_dim=48)
    yield net(
        "DistilBertForSequenceClassification", "DistilBert", padded, vocab_size=99, dim=32, n_layers=3, n_heads=2, hidden_dim=48
    )
    yield net("AlbertModel", "Albert", tokens(), **BERT, embedding_size=16)
    yield net("ElectraModel", "Electra", tokens(), **BERT, embedding_size=16)
    yield net("DebertaV2Model", "DebertaV2", padded, **BERT, relative_attention=True, pos_att_type=["p2c", "c2p"])
    yield net("MPNetModel", "MPNet", tokens(), **BERT)
    yield net("ModernBertModel", "ModernBert", padded, **BERT, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1)
    yield net("FunnelModel", "Funnel", tokens(), vocab_size=99, block_sizes=[1, 1], d_model=32, n_head=2, d_head=16, d_inner=48)
    yield net("ConvBertModel", "ConvBert", tokens(), **BERT, embedding_size=32)


def decoders() -> Iterator[Case]:
    """Networks that read a sentence word by word."""
    sizes = {"vocab_size": 99, "n_embd": 32, "n_layer": 3, "n_head": 2, "n_positions": 64, "use_cache": False}
    yield net("GPT2Model", "GPT2", tokens(), **sizes)
    yield net("GPT2LMHeadModel", "GPT2", padded, **sizes)
    yield net("OPTModel", "OPT", tokens(), **BERT | {"ffn_dim": 48, "word_embed_proj_dim": 32, "use_cache": False})
    yield net("LlamaModel", "Llama", tokens(), **CAUSAL)
    yield net("LlamaForCausalLM", "Llama", padded, **CAUSAL)
    yield net("MistralModel", "Mistral", tokens(), **CAUSAL)
    yield net("Qwen2Model", "Qwen2", tokens(), **CAUSAL)
    yield net("GPTNeoXModel", "GPTNeoX", tokens(), **BERT, use_cache=False)
    yield net(
        "MambaModel", "Mamba", tokens(), vocab_size=99, hidden_size=32, num_hidden_layers=2, state_size=4, use_cache=False
    )


def translators() -> Iterator[Case]:
    """Networks with an encoder and a decoder."""
    yield net("T5EncoderModel", "T5", tokens(), **T5)
    yield net("T5Model", "T5", translated, **T5)
    yield net("BartModel", "Bart", translated, **BART, max_position_embeddings=64)
    yield net("MarianModel", "Marian", translated, **BART, max_position_embeddings=64, pad_token_id=0, decoder_start_token_id=1)


def cases() -> Iterator[Case]:
    """All that read sentences."""
    yield from encoders()
    yield from decoders()
    yield from translators()
