"""Tokens that choose among adapters, in every matrix anew: against a slow twin, in any company, with own pages."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from deepseek.atlas import ExpertUsage
from deepseek.checkpoint import base_tensors, load_model
from deepseek.checkpoint.adapter_files import LoRA, read_adapter
from deepseek.engine import LLM
from deepseek.engine.run_batch import run_file
from deepseek.errors import RequestError
from deepseek.model import CausalLM
from deepseek.model.adapter_paths import FullRank, LowRank
from deepseek.model.adapters import Arrow, Mixture, rows_of, whole
from tests.engine.test_adapters import Served, served  # noqa: F401 - a fixture
from tests.engine.test_deltas import save_tuned
from tests.helpers.adapters import save_adapter
from tests.helpers.engines import exact_in_company, params
from tests.helpers.reference import mixed_prompts

NAMES = ("art", "code", "law", "tax")  # experts have "art", "code" and the delta "tax"
CHOICES: list[Any] = [{"arrow": ["law", "code", "art"], "top": 2}, {"arrow": [*NAMES], "top": 1},
                      {"arrow": ["tax", "law"]}, {"art": 0.5, "tax": 0.5}, "law", None]


@pytest.fixture(scope="module")
def own(served: Callable[..., Served], tmp_path_factory: Any) -> Served:  # noqa: F811
    one, place = served(), tmp_path_factory.mktemp("arrow")
    one.adapters["tax"] = save_tuned(one.plain, place / "tax", 1)
    one.adapters["art"] = save_adapter(one.plain, place / "art", 7, r=2, experts=["1.0", "1.3", "2.2"],
                                       target_modules=["q_proj", "kv_a_proj_with_mqa"])
    return one


def beside(own: Served, folder: Path, **options: Any) -> LLM:
    return own.llm(folder, "law", "code", "art", "tax", **options)


def slow(own: Served, names: Sequence[str], top: int) -> CausalLM:
    """The plain base with modules that compute one token at a time, from whole matrices."""
    model = load_model(own.plain)
    base, added = base_tensors(model), dict[str, list[tuple[Tensor, Tensor]]]()
    for name in sorted(names):
        adapter = read_adapter(own.adapters[name])
        for weight in adapter.changed:
            matrix = adapter.added(weight, 0, len(base[weight])) if isinstance(adapter, LoRA) else (
                adapter.tensor(weight) - base[weight])
            added.setdefault(weight.removesuffix(".weight"), []).append((torch.linalg.svd(matrix)[2][0], matrix))

    def term(module: str, x_K: Tensor) -> Any:
        found = [(abs(float(v_K @ x_K)), matrix @ x_K) for v_K, matrix in added.get(module, ())]
        found.sort(key=lambda each: -each[0])
        weights = torch.tensor([score for score, _ in found[:top]]).softmax(0)
        return sum((w * y for w, (_, y) in zip(weights, found, strict=False)), 0.0)

    def linear(module: Any, name: str) -> Callable[[Tensor], Tensor]:
        plain = module.forward
        return lambda x: plain(x) + torch.stack([term(name, x_K) for x_K in x.flatten(0, -2)]).view(*x.shape[:-1], -1)

    def experts(module: Any, name: str) -> Callable[..., Tensor]:
        def forward(x_TH: Tensor, route: Any) -> Tensor:
            out_TH = torch.zeros_like(x_TH)
            for t, x_H in enumerate(x_TH):
                for e, weight in zip(route.index_TK[t].tolist(), route.weight_TK[t], strict=True):
                    w, down = module.dense(e)
                    gate, up = ((part @ x_H) + term(f"{name}.{e}.{which}_proj", x_H)
                                for part, which in zip(w.chunk(2), ("gate", "up"), strict=True))
                    h = torch.nn.functional.silu(gate) * up
                    out_TH[t] += weight * (down @ h + term(f"{name}.{e}.down_proj", h))
            return out_TH
        return forward

    for name, module in model.named_modules():
        if name in added:
            module.forward = linear(module, name)
        elif name.endswith(".mlp.experts"):
            module.forward = experts(module, name)
    return model


@pytest.mark.parametrize(("names", "top"), [(("art", "code", "law"), 2), (NAMES, 1), (NAMES, 4)], ids=str)
@torch.no_grad()
def test_tokens_choose_as_in_the_slow_twin(own: Served, names: tuple[str, ...], top: int) -> None:
    model, twin, ids = beside(own, own.plain).model, slow(own, names, top), torch.arange(5, 45)[None]
    with rows_of(whole(Arrow(names, top))):
        got, absorbed = model(ids), model(ids, attn_impl="absorbed")
    want = twin(ids)
    scale = want.abs().max()
    assert (got - want).abs().max() <= 1e-5 * scale and (absorbed - want).abs().max() <= 1e-5 * scale
    with rows_of(whole(Mixture.of(dict.fromkeys(names, 1 / len(names))))):
        assert (model(ids) - want).abs().max() > 1e-3 * scale


@exact_in_company
@pytest.mark.parametrize("options", [{}, {"cache_tokens": 768, "max_num_batched_tokens": 33, "max_num_seqs": 5}],
                         ids=str)
def test_a_tokens_bits_do_not_depend_on_its_neighbours(own: Served, options: dict[str, Any]) -> None:
    draw, asked = random.Random(4), params(logprobs=2, prompt_logprobs=1)
    prompts = mixed_prompts(draw, 96, 9)
    chosen = [draw.choice(CHOICES) for _ in prompts]
    llm = beside(own, own.four, **options)
    alone = LLM(llm.model, prefix_cache=False)
    together = llm.generate(prompts, asked, adapter=chosen)
    again = llm.generate(prompts, asked, adapter=chosen)  # from the prefixes
    for prompt, choice, *outputs in zip(prompts, chosen, together, again, strict=True):
        want, = alone.generate([prompt], asked, adapter=choice)
        for output in outputs:
            assert (output.token_ids, output.logprobs, output.prompt_logprobs) == (
                want.token_ids, want.logprobs, want.prompt_logprobs), choice


def test_no_page_of_a_choice_serves_another(own: Served) -> None:
    llm, prompt = beside(own, own.four), list(range(5, 205))
    choices = [*CHOICES, {"arrow": [*NAMES], "top": 2}, {"tax": 0.5, "law": 0.5}]
    cached = lambda choice: llm.generate([prompt], params(), adapter=choice)[0].cached_tokens  # noqa: E731
    assert [cached(choice) for choice in choices] == [0] * len(choices)
    assert cached({"arrow": ["code", "art", "law"], "top": 2}) == len(prompt) - 1


def test_a_direction_is_where_most_is_added() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b, d = (torch.randn(shape, generator=generator) for shape in ((3, 40), (24, 3), (24, 40)))
    for path, matrix in ((LowRank(a, b, 2.0, exact=False), 2 * b @ a), (FullRank(d, d * 0, exact=False), d)):
        added = matrix @ path.direction
        assert float(path.direction.norm()) == pytest.approx(1)
        assert float(added.norm()) == pytest.approx(float(torch.linalg.matrix_norm(matrix, 2)), rel=1e-5)


def test_lines_and_counters_know_it(own: Served, tmp_path: Path) -> None:
    llm, (lines, out) = beside(own, own.four), (tmp_path / name for name in ("in.jsonl", "out.jsonl"))
    lines.write_text('{"prompt": "the fox", "adapter": {"arrow": ["law", "code"]}}\n')
    run_file(llm, lines, out, params(max_tokens=8))
    usage = ExpertUsage(llm.model.config)
    want = llm.generate("the fox", params(max_tokens=8), adapter={"arrow": ["code", "law"], "top": 2}, usage=usage)
    assert json.loads(out.read_text())["text"] == want[0].text
    assert set(usage.adapters) == {"law", "code"}


@pytest.mark.parametrize(("choice", "message"), [
    ({"arrow": ["law", "med"]}, r"arrow: med adapts model\.layers\.0\.self_attn\.kv_b_proj, which is applied to the"),
    ({"arrow": ["law", "rust"]}, "adapter = 'rust': is no adapter that was loaded; there are law, med"),
    ({"arrow": ["law"]}, r"arrow = \['law'\]: must be two different names at least"),
    ({"arrow": ["law", "law"]}, "must be two different names at least"),
    ({"arrow": ["law", "code"], "top": 3}, "top = 3: must be an integer from 1 to 2"),
    ({"arrow": ["law", "code"], "top": True}, "top = True: must be an integer"),
    ({"arrow": ["law", "code"], "k": 1}, "key 'k': must be arrow or top where tokens choose"),
    ({"arrow": "law"}, "adapter = 'arrow': is no adapter that was loaded")])
def test_what_is_no_choice(own: Served, choice: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        own.llm(own.four, "law", "med", "code").requests([5], params(), adapter=choice)
