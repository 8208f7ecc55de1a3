"""The values of `minigpt.analysis`, compared with TransformerLens on the exported model."""

from pathlib import Path

import pytest
import torch
from transformer_lens.model_bridge import TransformerBridge

from minigpt.analysis.activations import activations
from minigpt.analysis.attention import attention_weights, head_scores, repeated_ids
from minigpt.analysis.interventions import ablate_heads, patch_heads, patch_residual
from minigpt.analysis.lens import logit_attribution, logit_lens
from minigpt.exporting import export
from minigpt.model import GPT
from minigpt.runs.folder import Run
from tests.conftest import ROOT

TEXT, OTHER = "Once upon a time, Tom had a red ball.", "Once upon a time, Sam saw a big dog."
TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-3}  # of log-probabilities
POINTS = {  # names of ours and theirs
    "input": "hook_resid_pre", "attention.weights": "attn.hook_pattern",
    "attention.heads": "attn.hook_z", "attention": "hook_attn_out", "middle": "hook_resid_mid",
    "feed_forward.hidden": "mlp.hook_post", "feed_forward": "hook_mlp_out",
}  # fmt: skip


class Pair:
    """The small release in one type, by Mini GPT and by TransformerLens."""

    def __init__(self, folder: Path, dtype: torch.dtype, ids: torch.Tensor, other: torch.Tensor):
        self.net: GPT = Run.load(ROOT / "releases/small").load_model().to(dtype)
        self.bridge = TransformerBridge.boot_transformers(str(folder), dtype=dtype)
        self.bridge.enable_compatibility_mode(no_processing=True)
        self.ids, self.other, self.tolerance = ids, other, TOLERANCES[dtype]
        with torch.no_grad():
            self.logits, self.cache = self.bridge.run_with_cache(ids)

    def check(self, ours: torch.Tensor, theirs: torch.Tensor) -> None:
        """Check values that are log-probabilities or have their size."""
        torch.testing.assert_close(ours, theirs.detach(), rtol=0, atol=self.tolerance)


@pytest.fixture(scope="module", params=TOLERANCES, ids=str)
def pair(request, tmp_path_factory) -> Pair:
    run = Run.load(ROOT / "releases/small")
    folder = tmp_path_factory.mktemp("lens") / "hf"
    export(run, folder)
    ids, other = (torch.tensor([[0, *run.tokenizer.encode(text)]]) for text in (TEXT, OTHER))
    assert ids.shape == other.shape
    return Pair(folder, request.param, ids, other)


def test_activations_and_logits_equal_those_of_transformer_lens(pair: Pair):
    values = activations(pair.net, pair.ids)
    for i in range(pair.net.config.n_layers):
        for ours, theirs in POINTS.items():
            pair.check(values[f"blocks.{i}.{ours}"], pair.cache[f"blocks.{i}.{theirs}"])
    pair.check(values["residual"], pair.cache[f"blocks.{i}.hook_resid_post"])
    pair.check(values["logits"].log_softmax(-1), pair.logits.log_softmax(-1))


def test_logit_lens_equals_that_of_transformer_lens(pair: Pair):
    stream = pair.cache.accumulated_resid(layer=-1, incl_mid=False)  # (L + 1, B, T, d)
    with torch.no_grad():
        logits = [pair.bridge.unembed(pair.bridge.ln_final(x)) for x in stream]
    pair.check(logit_lens(pair.net, pair.ids), torch.cat(logits).log_softmax(-1))


def test_attention_scores_equal_those_of_transformer_lens(pair: Pair):
    ids = repeated_ids(pair.net)
    n = (ids.shape[1] - 1) // 2
    with torch.no_grad():
        _, cache = pair.bridge.run_with_cache(ids)
    scores, weights = head_scores(pair.net), attention_weights(pair.net, ids)
    for i in range(pair.net.config.n_layers):
        pattern = cache["pattern", i][0]  # (nh, T, T)
        pair.check(weights[i], pattern)
        pair.check(scores.previous_token[i], pattern.diagonal(-1, 1, 2).mean(-1))
        pair.check(scores.induction[i], pattern.diagonal(1 - n, 1, 2)[:, 2:].mean(-1))


def test_attribution_by_head_equals_that_of_transformer_lens(pair: Pair):
    bridge, ours = pair.bridge, logit_attribution(pair.net, pair.ids, pair.ids[0])
    for position in (1, pair.ids.shape[1] - 1):
        heads = pair.cache.stack_head_results(layer=-1, pos_slice=position)  # (L · nh, B, d)
        # Their `logit_attrs` needs folded norms, and folding moves value biases out of the heads.
        scale = pair.cache["ln_final.hook_scale"][:, position]
        normal = (heads - heads.mean(-1, keepdim=True)) / scale * bridge.ln_final.weight
        target = bridge.W_U[:, pair.ids[0, position]] - bridge.W_U.mean(-1)
        pair.check(ours.heads[:, :, position].flatten(), (normal @ target).flatten())


def test_ablation_and_patching_equal_those_of_transformer_lens(pair: Pair):
    def without(z: torch.Tensor, hook: object) -> torch.Tensor:
        z = z.clone()
        z[:, :, 1] = 0
        return z

    with torch.no_grad():
        theirs = pair.bridge.run_with_hooks(pair.ids, fwd_hooks=[("blocks.2.attn.hook_z", without)])
    ours = ablate_heads(pair.net, pair.ids, [(2, 1)])
    pair.check(ours.log_softmax(-1), theirs.log_softmax(-1))

    def metric(logits: torch.Tensor) -> float:
        return logits[0, -1].log_softmax(-1)[pair.ids[0, 1]].item()

    def patched(name: str, index: tuple[slice | int, ...]) -> float:
        def replace(x: torch.Tensor, hook: object) -> torch.Tensor:
            x = x.clone()
            x[index] = pair.cache[name][index]
            return x

        with torch.no_grad():
            return metric(pair.bridge.run_with_hooks(pair.other, fwd_hooks=[(name, replace)]))

    whole = slice(None)
    residual = patch_residual(pair.net, pair.ids, pair.other, metric)
    heads = patch_heads(pair.net, pair.ids, pair.other, metric)
    for layer, i in ((0, 6), (3, 7)):
        theirs = patched(f"blocks.{layer}.hook_resid_pre", (whole, i))
        assert residual[layer, i].item() == pytest.approx(theirs, abs=pair.tolerance)
    for layer, i in ((1, 2), (4, 0)):
        theirs = patched(f"blocks.{layer}.attn.hook_z", (whole, whole, i))
        assert heads[layer, i].item() == pytest.approx(theirs, abs=pair.tolerance)
