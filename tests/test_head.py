"""Heads found by trying, and the loss inside the model against the model's own logits."""

import pytest
import torch
import transformers
from torch.nn import functional as F

from fusion.head import FusedLM, head_of
from fusion.objective import fusion_loss_from_logits
from fusion.topk import TopK

SMALL = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS = {  # class, what its config says beside SMALL, scale, softcap
    "llama": ("Llama", {}, None, None),
    "llama_tied": ("Llama", {"tie_word_embeddings": True}, None, None),
    "mistral": ("Mistral", {}, None, None),
    "gpt2": ("GPT2LMHead", {"n_embd": 16, "n_layer": 2, "n_head": 2}, None, None),
    "gpt_neox": ("GPTNeoX", {}, None, None),
    "phi": ("Phi", {}, None, None),  # a bias
    "gemma2": ("Gemma2", {"final_logit_softcapping": 20.0}, None, 20.0),
    "cohere": ("Cohere", {"logit_scale": 0.25}, 0.25, None),
    "granite": ("Granite", {"logits_scaling": 3.0}, 0.3333333, None),
    "mixtral": ("Mixtral", {"num_local_experts": 2}, None, None),
}


def small(name: str) -> torch.nn.Module:
    kind, extra, *_ = MODELS[name]
    torch.manual_seed(1)
    config = getattr(transformers, f"{kind.removesuffix('LMHead')}Config")(**(SMALL | extra))
    model = getattr(transformers, f"{kind}Model" if kind.endswith("Head") else f"{kind}ForCausalLM")
    return model(config).eval()


def batch(V: int = 61) -> tuple[torch.Tensor, torch.Tensor, TopK]:
    ids = torch.randint(V, (3, 9), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[0, :4] = labels[2] = -100
    g = torch.Generator().manual_seed(1)
    fused = TopK(torch.randint(V, (3, 9, 4), generator=g), torch.randn(3, 9, 4, generator=g).log_softmax(-1))
    return ids, labels, fused


@pytest.mark.parametrize("name", MODELS)
def test_the_loss_inside_the_model_is_that_of_its_logits(name):
    lm = small(name)
    target = FusedLM(lm)
    assert target.head is not None
    assert (target.head.scale, target.head.softcap) == MODELS[name][2:]
    ids, labels, fused = batch()
    parameters = list(lm.parameters())
    ours = target(ids, labels, fused, lambda_clm=0.7, chunk=5)
    flat = TopK(fused.ids.flatten(0, 1), fused.logprobs.flatten(0, 1))
    shifted = F.pad(labels[:, 1:], (0, 1), value=-100).flatten()
    whole = fusion_loss_from_logits(lm(input_ids=ids).logits.flatten(0, 1), shifted, flat, 0.7)
    torch.testing.assert_close(ours.loss, whole.loss)
    theirs = torch.autograd.grad(whole.loss, parameters, allow_unused=True)
    for got, wanted in zip(torch.autograd.grad(ours.loss, parameters, allow_unused=True), theirs, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)


def test_language_modelling_alone_is_the_loss_transformers_computes():
    lm = small("llama")
    ids, labels, _ = batch()
    torch.testing.assert_close(FusedLM(lm)(ids, labels, None, lambda_clm=1.0).loss, lm(ids, labels=labels).loss)


def test_a_head_that_does_more_takes_the_exact_path_and_says_so():
    """XLM-RoBERTa's head has a layer of its own; a head that adds something to the logits is no linear map either."""
    config = transformers.XLMRobertaConfig(**SMALL, is_decoder=True, max_position_embeddings=32)
    lm = transformers.XLMRobertaForCausalLM(config).eval()
    assert head_of(lm) is None
    with pytest.warns(UserWarning, match="slower exact path"):
        target = FusedLM(lm)
    ids, labels, fused = batch()
    out = target(ids, labels, fused, lambda_clm=1.0)
    torch.testing.assert_close(out.loss, F.cross_entropy(lm(ids).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()))
    odd = small("llama")
    forward = odd.forward

    def squared(*args, **options):
        out = forward(*args, **options)
        out.logits = out.logits + 1e-2 * out.logits**2
        return out

    odd.forward = squared
    assert head_of(odd) is None


def test_the_head_is_found_without_weights_and_without_touching_the_random_state():
    with torch.device("meta"):
        lm = transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**SMALL))
    before = torch.get_rng_state()
    assert head_of(lm).softcap == 30.0
    assert torch.equal(before, torch.get_rng_state())
